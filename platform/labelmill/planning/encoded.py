"""Memory of a step of an encoded head with all labels as negatives (`heads.encoded`), for the fullest rank.

Shape legend: N queries of all ranks, C labels of a rank, d embedding size, R labels encoded at a time.
"""

from __future__ import annotations

from dataclasses import dataclass

FP32 = 4


@dataclass(frozen=True)
class EncodedSetup:
    """What is planned.

    Attributes:
        labels, ranks: of the axis, and how many share it.
        dim, batch: d and N.
        parameters: trainable numbers of the encoder.
        prepared_bytes: of a label's prepared text.
        activation_bytes: of one text in the encoder, forward and backward.
        chunk: R.
        memory_mb: room for scores that are kept from forward to backward, as in the job.
        cache_mb: room for prepared label texts, as in the job.
        text_bytes: of a label's text; every rank has all of them.
    """

    labels: int
    ranks: int
    dim: int
    batch: int
    parameters: int
    prepared_bytes: float
    activation_bytes: float
    chunk: int = 4096
    memory_mb: float = 512.0
    cache_mb: float = 1024.0
    text_bytes: float = 24.0

    @property
    def own(self) -> int:
        """C."""
        return -(-self.labels // self.ranks)


def encoded_memory(setup: EncodedSetup) -> dict[str, float]:
    """Bytes of a rank at the peak of a step, by what they hold; with fp32 numbers and AdamW.

    rows 4 C d; their gradient 4 C d; 1/length 4 C; kept scores min(memory_mb, 4 N C); prepared labels min(cache_mb, C p);
    encoder 4 x 4 numbers (weights, two gradients: of the queries and summed over the chunks, each chunk's own one) + 8 of
    AdamW; a chunk's activations; the batch's activations; texts of all labels.
    """
    own, numbers = setup.own, FP32 * setup.parameters
    scores = min(setup.memory_mb * 2**20, float(FP32) * setup.batch * own)
    return {
        "label rows": float(FP32) * own * setup.dim,
        "gradient of label rows": float(FP32) * own * setup.dim,
        "row lengths": float(FP32) * own,
        "kept scores": scores,
        "prepared labels": min(setup.cache_mb * 2**20, own * setup.prepared_bytes),
        "encoder and its optimizer": 6.0 * numbers,
        "activations of a chunk": setup.chunk * setup.activation_bytes,
        "activations of queries": -(-setup.batch // setup.ranks) * setup.activation_bytes,
        "label texts": setup.labels * setup.text_bytes,
    }
