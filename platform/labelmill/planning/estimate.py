"""Memory, communication and time of an optimizer step, for the fullest rank of a layout.

Nothing is assumed to overlap: the time of a step is the sum of its parts.

Shape legend: B samples of a rank and micro batch, N = B x shards samples of a replica, P positives of a sample, C
classes of a shard, S of them in a micro batch, U in an optimizer step, D embedding size.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Literal, Protocol

import torch

from labelmill.heads.config import HeadConfig
from labelmill.heads.plan import HardSampling
from labelmill.heads.ranks import check_shards
from labelmill.heads.sampling import block_size
from labelmill.heads.screen import CHUNK as SCREEN_CHUNK
from labelmill.heads.statistics import ACCELERATOR_FACTOR, UPDATE_ELEMENTS, chunk_rows, needs_maximum
from labelmill.heads.traffic import Collective, head_collectives, sent_bytes
from labelmill.planning.spec import ClusterSpec, Precision
from labelmill.planning.trace import EncoderCost, trace_head
from labelmill.training.config import TrainConfig

HEAD_ELEMENT = 4  # bytes of the head's numbers
ZERO_BUCKET = 500_000_000  # DeepSpeed's reduce_bucket_size, elements
ZERO_LIVE = 1_000_000_000  # DeepSpeed's stage3_max_live_parameters


@dataclass(frozen=True)
class Setup:
    """What is planned.

    Attributes:
        encoder: its traced cost.
        head, num_classes, positives: the head; P, the most labels of a sample.
        train: batch, accumulation, ZeRO stage, precision of the encoder.
        workers: ranks.
        head_precision: of the head's matrix products; None for what `head.matmul` gives.
    """

    encoder: EncoderCost
    head: HeadConfig
    num_classes: int
    train: TrainConfig
    workers: int
    positives: int = 1
    head_precision: Precision | None = None

    @property
    def dim(self) -> int:
        return self.encoder.dim

    @property
    def shards(self) -> int:
        return self.head.shards or self.workers

    @property
    def replicas(self) -> int:
        return self.workers // self.shards

    @property
    def batch(self) -> int:
        """B, samples of a rank and micro batch."""
        return max(1, self.train.global_batch // self.train.accumulation // self.workers)

    @property
    def samples(self) -> int:
        """N, samples of a replica and micro batch."""
        return self.batch * self.shards

    @property
    def classes(self) -> int:
        """C of the fullest shard."""
        size = block_size(self.num_classes, self.head.block_rows)
        blocks = -(-self.num_classes // size)
        return min(self.num_classes, -(-blocks // self.shards) * size)

    @property
    def rows(self) -> int:
        """Rows of the fullest shard: a class has `sub_centres` of them."""
        return self.classes * self.head.sub_centres

    @property
    def stored(self) -> int:
        """Bytes of a stored number of the rows."""
        return HEAD_ELEMENT if self.head.rows_dtype == "fp32" else 2

    @property
    def soft(self) -> bool:
        """Whether labels come with weights: taken for granted where the loss takes them."""
        return self.head.loss.soft

    def rows_with(self, micro_batches: int) -> float:
        """Expected rows of the fullest shard that are drawn or are positives of so many micro batches."""
        rate = self.head.sample_rate
        if rate >= 1:
            return self.rows
        labels = self.batch * self.workers * self.positives * micro_batches
        missed = (1 - 1 / self.num_classes) ** labels  # probability that a class is nobody's positive
        return self.rows * (rate + (1 - rate) * (1 - missed))

    @property
    def step_rows(self) -> float:
        """S."""
        return self.rows_with(1)

    @property
    def touched_rows(self) -> float:
        """U."""
        return self.rows_with(self.train.accumulation)

    @property
    def kept(self) -> float:
        """Share of the logits that is kept from forward to backward."""
        logits = self.samples * self.step_rows * HEAD_ELEMENT
        return min(1.0, self.head.memory_mb * 2**20 / logits) if logits else 1.0

    @property
    def head_flops(self) -> float:
        """Of a micro batch: logits, gradient of embeddings and of rows; logits again where they aren't kept."""
        return (6 + 2 * (1 - self.kept)) * self.samples * self.step_rows * self.dim

    @property
    def screened(self) -> float:
        """8-bit multiplications of a micro batch that find the hard classes."""
        return float(self.samples * self.rows * self.dim) if _hard(self)[0] else 0.0

    @property
    def element(self) -> int:
        """Bytes of the encoder's numbers."""
        return 2 if self.train.precision == "bf16" else 4

    def check(self) -> None:
        """Raises JobError when the head's shards don't divide the workers."""
        check_shards(self.shards, self.workers)


def head_precision(setup: Setup, spec: ClusterSpec) -> Precision:
    """Precision of the head's products: `head.matmul: bf16` is tf32 on a GPU, and bf16 on a CPU."""
    if setup.head_precision or setup.head.matmul == "fp32":
        return setup.head_precision or "fp32"
    return "tf32" if on_gpu(spec) else "bf16"


def on_gpu(spec: ClusterSpec) -> bool:
    """Whether the workers are GPUs: only they have a rate for tf32."""
    return "tf32" in spec.tflops


def chunk_of(setup: Setup, spec: ClusterSpec) -> float:
    """Rows that the head works on at once."""
    return min(setup.step_rows, chunk_rows(setup.samples) * (ACCELERATOR_FACTOR if on_gpu(spec) else 1))


def traffic(setup: Setup, gloo: bool = False) -> list[Collective]:
    """Every collective of an optimizer step, head and encoder."""
    head = head_collectives(
        setup.batch,
        setup.positives,
        setup.dim,
        setup.touched_rows,
        setup.shards,
        setup.replicas,
        HEAD_ELEMENT,
        _needs_maximum(setup),
        setup.head.loss.needs_sum,
        _hard(setup),
        setup.soft,
    )
    return head + zero_collectives(setup, gloo)


def _needs_maximum(setup: Setup) -> bool:
    head = setup.head
    scale = head.scale / head.loss.temperature
    return not head.loss.elementwise and needs_maximum(head.normalize, scale, setup.num_classes, torch.float32)


def _hard(setup: Setup) -> tuple[int, int]:
    """Classes of the fullest shard whose hardness is compared, and how many of them it offers at most."""
    head = setup.head
    if not isinstance(head.sampling, HardSampling) or head.sample_rate >= 1:
        return 0, 0
    hard = max(1, round(head.sampling.share * round(head.sample_rate * setup.num_classes)))
    return setup.classes, min(hard, setup.classes)


def zero_collectives(setup: Setup, gloo: bool = False) -> list[Collective]:
    """What DeepSpeed sends: gradients summed (from stage 2 for each micro batch), parts of the weights gathered.

    Stage 3 frees weights above `stage3_max_live_parameters`, which are then gathered for the backward pass too.
    With gloo its reduce-scatter is an all-reduce.
    """
    workers, stage = setup.workers, setup.train.zero_stage
    size = setup.encoder.trainable * setup.element
    if workers == 1 or not size:
        return []
    each: Literal["micro batch", "step"] = "micro batch" if stage >= 2 else "step"
    # half of an all-reduce is a reduce-scatter
    summed = size if stage < 3 or gloo else size / 2
    found = [Collective("encoder gradient", "world", "all_reduce", summed, workers, each)]
    if stage in (1, 2):
        found.append(Collective("encoder weights", "world", "all_gather", size / workers, workers, "step"))
    if stage == 3:
        times = 1 if setup.encoder.parameters <= ZERO_LIVE else 2
        found.append(
            Collective("encoder weights", "world", "all_gather", times * size / workers, workers, "micro batch")
        )
    if setup.train.max_grad_norm:
        found.append(Collective("gradient norm", "world", "all_reduce", 8, workers, "step"))
    return found


def memory(setup: Setup, spec: ClusterSpec, buckets: bool = True) -> dict[str, float]:
    """Bytes of a rank at the peak of a step, by what they hold.

    Args:
        buckets: DeepSpeed's reduce bucket counts whole, as a device allocates it; else only what is used of it.
    """
    encoder, train, head = setup.encoder, setup.train, setup.head
    cost = trace_head(head, setup.dim, setup.positives)
    rows = setup.rows * setup.dim * setup.stored
    workers, stage, e = setup.workers, train.zero_stage, setup.element
    parts = workers if stage else 1
    logits = setup.samples * setup.step_rows * HEAD_ELEMENT
    weights = float(encoder.parameters * e)
    if stage == 3:
        weights = weights / workers + min(encoder.parameters, ZERO_LIVE) * e
    gradients = encoder.trainable * (4 if stage == 0 else e if stage == 1 else 4 / workers)
    states = encoder.trainable * (8 if stage == 0 else 12 / parts)  # moments; fp32 weights of the own part
    bucket = 0.0
    if stage:
        bucket = min(ZERO_BUCKET, ZERO_BUCKET if buckets else encoder.trainable) * (4 if stage == 1 else e)
    return {
        "class rows": rows,
        "row optimizer": max(0.0, setup.classes * cost.class_bytes - rows),
        "rows of a step": setup.touched_rows * cost.step_row_bytes,
        "kept logits": min(head.memory_mb * 2**20, logits),
        "gathered batch": setup.samples * cost.sample_bytes + cost.fixed_bytes,
        "chunks": _chunk_bytes(setup, spec),
        "encoder weights": weights,
        "encoder gradients": gradients,
        "encoder optimizer": states,
        "reduce bucket": bucket,
        "activations": setup.batch * (encoder.activation_bytes * e / 4 + encoder.input_bytes),
    }


def _chunk_bytes(setup: Setup, spec: ClusterSpec) -> float:
    """On a GPU: logits of a chunk that isn't kept; gradient, rows and momentum of those that move at once.

    On a CPU they are small, and part of what was traced.
    """
    if not on_gpu(spec):
        return 0.0
    chunk = chunk_of(setup, spec)
    moved = min(chunk, UPDATE_ELEMENTS / setup.dim * ACCELERATOR_FACTOR)
    return HEAD_ELEMENT * ((setup.kept < 1) * chunk * setup.samples + 3 * moved * setup.dim)


class Machine(Protocol):
    """Seconds of the parts of a step on a rank of a cluster."""

    @property
    def spec(self) -> ClusterSpec: ...

    @property
    def gloo(self) -> bool: ...

    def encoder(self, setup: Setup) -> float:
        """Forward and backward of a micro batch."""
        ...

    def head(self, setup: Setup) -> dict[str, float]:
        """Of a micro batch, by part, without collectives."""
        ...

    def row_update(self, setup: Setup) -> float:
        """Of an optimizer step."""
        ...

    def dense_update(self, setup: Setup) -> float:
        """Of an optimizer step."""
        ...

    def collective(self, item: Collective, setup: Setup) -> float: ...


LAUNCHES_A_SCREEN = 4  # its products stay in cache
LOGIT_BYTES = 20  # a logit is written, its exponential read and written, and read by two products
LAUNCHES_A_CHUNK, LAUNCHES_A_MICRO_BATCH = 20, 80


@dataclass(frozen=True)
class SheetMachine:
    """Times from a cluster's rates and assumed efficiencies."""

    spec: ClusterSpec
    gloo: bool = False

    def encoder(self, setup: Setup) -> float:
        cost, spec = setup.encoder, self.spec
        products = cost.train_flops * setup.batch / spec.flops(setup.train.precision, "encoder")
        # activations are written once and read twice
        moved = 3 * cost.activation_bytes * setup.element / 4 * setup.batch / spec.memory_rate
        return max(products, moved, cost.operations * spec.launch_us * 1e-6)

    def head(self, setup: Setup) -> dict[str, float]:
        spec, numbers = self.spec, setup.step_rows * setup.dim
        # rows are read twice, narrow ones through a wide copy, and their gradient written; sampled rows are gathered first
        read = setup.stored + (2 * HEAD_ELEMENT if setup.stored < HEAD_ELEMENT else 0)
        gathered = 2 * setup.stored if setup.head.sample_rate < 1 else 0
        moved = (2 * read + HEAD_ELEMENT + gathered) * numbers + LOGIT_BYTES * setup.samples * setup.step_rows
        chunks = setup.step_rows / max(1.0, chunk_of(setup, spec))
        launches = LAUNCHES_A_CHUNK * chunks + LAUNCHES_A_MICRO_BATCH
        parts = {
            "head products": setup.head_flops / spec.flops(head_precision(setup, spec), "head"),
            "head memory": moved / spec.memory_rate,
            "head launches": launches * spec.launch_us * 1e-6,
        }
        if setup.screened:
            # 8-bit products are at least as fast as the fastest that the cluster names
            rate = max(spec.flops(name, "head") for name in spec.tflops)
            starts = LAUNCHES_A_SCREEN * setup.rows / SCREEN_CHUNK * spec.launch_us * 1e-6
            parts["hard screen"] = 2 * setup.screened / rate + setup.rows * setup.dim / spec.memory_rate + starts
        return parts

    def row_update(self, setup: Setup) -> float:
        whole = trace_head(setup.head, setup.dim, setup.positives).class_bytes / setup.head.sub_centres
        # row and state are read and written, the gradient is read
        moved = setup.dim * HEAD_ELEMENT + 2 * whole
        return setup.touched_rows * moved / self.spec.memory_rate

    def dense_update(self, setup: Setup) -> float:
        parts = setup.workers if setup.train.zero_stage else 1
        return setup.encoder.trainable / parts * 28 / self.spec.memory_rate + 2e-4

    def collective(self, item: Collective, setup: Setup) -> float:
        apart = setup.shards if item.axis == "replicas" else 1
        return self.spec.seconds(item.kind, item.sent, item.world, apart)


@dataclass(frozen=True)
class Estimate:
    """A plan's numbers for the fullest rank.

    Attributes:
        setup, spec: of what, on what.
        memory: bytes by what they hold.
        seconds: of an optimizer step, by part.
        sent: bytes of an optimizer step, by what travels and over which ranks.
    """

    setup: Setup
    spec: ClusterSpec
    memory: dict[str, float]
    seconds: dict[str, float]
    sent: dict[tuple[str, str], float] = field(default_factory=dict)

    @property
    def total_memory(self) -> float:
        return sum(self.memory.values())

    @property
    def fits(self) -> bool:
        return self.total_memory <= self.spec.memory

    @property
    def step_seconds(self) -> float:
        return sum(self.seconds.values())

    @property
    def samples_a_second(self) -> float:
        return self.setup.train.global_batch / self.step_seconds


def estimate(setup: Setup, machine: Machine) -> Estimate:
    """The plan of a setup. Raises JobError for a layout that doesn't divide the workers."""
    setup.check()
    micro = setup.train.accumulation
    seconds = {"encoder": micro * machine.encoder(setup)}
    seconds |= {name: micro * value for name, value in machine.head(setup).items()}
    sent: dict[tuple[str, str], float] = {}
    links = {"head collectives": 0.0, "replica collectives": 0.0, "encoder collectives": 0.0}
    for item in traffic(setup, machine.gloo):
        times = micro if item.each == "micro batch" else 1
        part = "encoder" if item.what.startswith(("encoder", "gradient")) else "head"
        part = "replica" if item.axis == "replicas" else part
        links[f"{part} collectives"] += times * machine.collective(item, setup)
        sent[item.what, item.axis] = times * sent_bytes(item.kind, item.payload, item.world)
    seconds |= {"row update": machine.row_update(setup), "encoder update": machine.dense_update(setup)}
    seconds |= links
    return Estimate(setup, machine.spec, memory(setup, machine.spec, not machine.gloo), seconds, sent)


def change(setup: Setup, **fields: object) -> Setup:
    """The setup with fields of `train` or `head`, `workers` or `head_precision` replaced."""
    own = {k: v for k, v in fields.items() if k in ("workers", "head_precision")}
    train = {k: v for k, v in fields.items() if k in TrainConfig.model_fields}
    head = {k: v for k, v in fields.items() if k in HeadConfig.model_fields and k not in TrainConfig.model_fields}
    changed = {"train": setup.train.model_copy(update=train), "head": setup.head.model_copy(update=head), **own}
    return replace(setup, **changed)  # type: ignore[arg-type]
