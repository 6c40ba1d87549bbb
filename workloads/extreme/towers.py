"""The objective of dual encoders: one encoder for queries and labels, a sharded label axis, three kinds of negatives.

Shape legend: B queries of this rank, P positives of a query (padded with -1), C labels of this rank, U labels of a pool, M
mined labels of a query, D embedding size.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Mapping
from typing import Annotated, Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
from pydantic import Field
from torch import Tensor

from labelmill.data.extreme import PLACEHOLDER
from labelmill.data.labels import Labels
from labelmill.data.manifest import Manifest
from labelmill.data.stream import Batch
from labelmill.encoders import Encoder, EncoderConfig, Prepared, build_encoder, to_device
from labelmill.encoders.hashing import mix64
from labelmill.heads.encoded import EncodedHead, encode_cached, encoded_head_config, in_pool, label_pool
from labelmill.heads.ranks import Ranks
from labelmill.heads.sharded import ShardedHead
from labelmill.job import StrictModel
from labelmill.losses.retrieval import RetrievalLoss, draw_positives, most_positives
from labelmill.training.objective import Losses, Objective, Progress


class FullNegatives(StrictModel):
    """Every step compares with every label: the gradient cache encodes all of them, twice."""

    kind: Literal["full"] = "full"
    chunk: int = Field(4096, ge=1, description="labels encoded at a time; memory of their activations")


class InBatchNegatives(StrictModel):
    """The other queries' drawn positives, over all workers."""

    kind: Literal["in_batch"] = "in_batch"
    chunk: int = Field(4096, ge=1)


class MinedNegatives(StrictModel):
    """In-batch negatives first; then hard ones besides, found by exact search in rounds."""

    kind: Literal["mined"] = "mined"
    chunk: int = Field(4096, ge=1)
    start: int = Field(200, ge=0, description="steps with in-batch negatives alone")
    every: int = Field(200, ge=1, description="steps of a round: then all labels are encoded for the search anew")
    top: int = Field(100, ge=1, description="labels found for a query; its positives among them are dropped")
    per_query: int = Field(1, ge=1, description="of those, drawn as hard negatives")


Negatives = Annotated[FullNegatives | InBatchNegatives | MinedNegatives, Field(discriminator="kind")]


def label_texts(data: Manifest) -> pa.ChunkedArray:
    """The labels' texts in id order; labels without text become `(no text)`, with a warning."""
    names = data.load_classes()["name"]
    blank = pc.equal(pc.utf8_trim_whitespace(names), "")
    if count := int(pc.sum(blank).as_py() or 0):
        warnings.warn(f"{data.name}: {count} labels have no text; they are encoded as {PLACEHOLDER!r}", stacklevel=2)
        names = pc.if_else(blank, PLACEHOLDER, names)
    return names if isinstance(names, pa.ChunkedArray) else pa.chunked_array([names])


class LabelSide:
    """Prepared label texts: own labels are kept prepared as far as `budget_mb` goes."""

    def __init__(self, texts: pa.ChunkedArray, start: int, stop: int, chunk: int, budget_mb: float) -> None:
        self.texts, self.start, self.stop, self.chunk, self.budget = texts, start, stop, chunk, budget_mb * 2**20
        self._kept: list[Prepared] | None = None

    @property
    def sizes(self) -> list[int]:
        """Own labels by chunk."""
        return [min(self.chunk, self.stop - lo) for lo in range(self.start, self.stop, self.chunk)]

    def own(self, encoder: Encoder, index: int) -> Prepared:
        """Chunk `index` of own labels."""
        if self._kept is None:
            # all before the first is encoded: between activations they would leave holes that nothing else fits in
            self._kept, room = [], self.budget
            for place in range(len(self.sizes)):
                made = self._prepare(encoder, place)
                room -= sum(t.numel() * t.element_size() for t in (made.values() if isinstance(made, dict) else [made]))
                if room < 0:
                    break
                self._kept.append(made)
        return self._kept[index] if index < len(self._kept) else self._prepare(encoder, index)

    def _prepare(self, encoder: Encoder, index: int) -> Prepared:
        lo = self.start + index * self.chunk
        return encoder.prepare(self.texts.slice(lo, min(self.chunk, self.stop - lo)).to_pylist())

    def some(self, encoder: Encoder, ids_U: Tensor) -> Prepared:
        """Any labels."""
        return encoder.prepare(self.texts.take(pa.array(ids_U.cpu().numpy())).to_pylist())


class DualEncoder(Objective):
    """Query and label towers are one encoder; a score is the inner product (or cosine) over the temperature.

    Args:
        encoder, loss, negatives: config sections.
        data: the training set; its class names are the labels' texts.
        k: labels that `predict` ranks.
        embed: `predict` also gives the queries' embeddings.
        label_cache_mb: memory for prepared label texts, MiB a rank.
    """

    passes: Tensor

    def __init__(
        self,
        encoder: EncoderConfig,
        loss: RetrievalLoss,
        negatives: Negatives,
        data: Manifest,
        normalize: bool = True,
        temperature: float = 0.05,
        seed: int = 0,
        k: int = 100,
        embed: bool = False,
        label_cache_mb: float = 1024.0,
        memory_mb: float = 512.0,
    ) -> None:
        super().__init__()
        assert data.label.num_classes is not None
        self.encoder = build_encoder(encoder)
        self.loss, self.negatives, self.seed = loss, negatives, seed
        self.k, self.embed = min(k, data.label.num_classes), embed
        self.head_config = encoded_head_config(loss, normalize, temperature, memory_mb)
        self.head = EncodedHead(data.label.num_classes, self.encoder.dim, loss, self.head_config, seed)
        self.side = LabelSide(label_texts(data), self.head.start, self.head.stop, negatives.chunk, label_cache_mb)
        self.ranks = Ranks()
        self._current = False  # the head's rows are those of the encoder as it is
        if isinstance(negatives, MinedNegatives):
            self.snapshot = copy.deepcopy(self.encoder).requires_grad_(
                False
            )  # of the last round; saved with checkpoints
            self.register_buffer("passes", torch.zeros((), dtype=torch.int64))
            self._miner: EncodedHead | None = None

    @property
    def heads(self) -> Mapping[str, ShardedHead]:
        return {"classes": self.head}

    def prepare(self, raw: Any, labels: Labels, rng: np.ndarray | None) -> Any:
        inputs: dict[str, Any] = {"query": self.encoder.prepare(raw, rng)}
        if self.training:
            size = len(labels)
            keys_B = np.arange(size, dtype=np.uint64) if rng is None else np.asarray(rng)
            weights = None if labels.weights_BP is None else labels.weights_BP.numpy()
            drawn_BP = draw_positives(keys_B, labels.ids_BP.numpy(), weights, most_positives(self.loss))
            inputs["drawn"] = torch.from_numpy(drawn_BP)
            inputs["key"] = torch.from_numpy(keys_B.view(np.int64).copy())
        return inputs

    @property
    def device(self) -> torch.device:
        return next(self.encoder.parameters()).device

    def forward(self, batch: Batch) -> Losses:
        self._current = False
        ids_BP, drawn_BP = batch.labels.ids_BP, batch.inputs["drawn"].to(self.head.dtype)
        # a query without a label has nothing to learn from; the report counts them
        weight_B = torch.where((drawn_BP > 0).any(dim=1), batch.weight_B, 0.0)
        emb_BD = self.encoder(batch.inputs["query"])
        if isinstance(self.negatives, FullNegatives):
            rows_CD = self._encode_own(self.encoder, self.head)
            return Losses(self.head.encoded_loss(emb_BD, rows_CD, ids_BP, drawn_BP, weight_B))
        used_BP = torch.where((drawn_BP > 0) & (weight_B > 0)[:, None], ids_BP, -1)
        wanted = [used_BP]
        if isinstance(self.negatives, MinedNegatives):
            if bool(self.passes >= self.negatives.start):
                wanted.append(self._mine(emb_BD.detach(), ids_BP, batch.inputs["key"]))
            self.passes += 1
        return self._pool_loss(emb_BD, torch.cat(wanted, dim=1), ids_BP, drawn_BP, weight_B)

    def _pool_loss(
        self, emb_BD: Tensor, wanted_BW: Tensor, ids_BP: Tensor, drawn_BP: Tensor, weight_B: Tensor
    ) -> Losses:
        """The loss over the labels that any query of the global batch wants.

        A positive that is in the pool for another query's sake and wasn't drawn has weight 0: masked, no negative.
        """
        pool_U = label_pool(self.ranks, wanted_BW)
        if not len(pool_U):  # no query of the global batch has a label
            return Losses(emb_BD.sum() * 0.0)
        head = EncodedHead(max(1, len(pool_U)), self.encoder.dim, self.loss, self.head_config, self.seed)
        own_U = pool_U[head.start : head.stop]
        sizes = [len(part) for part in own_U.split(self.negatives.chunk)] if len(own_U) else []
        parts = own_U.split(self.negatives.chunk) if len(own_U) else ()

        def give(index: int) -> Prepared:
            return to_device(self.side.some(self.encoder, parts[index]), self.device)

        rows_UD = encode_cached(self.encoder, give, sizes, head.room_for_rows())
        place_BP = in_pool(ids_BP, pool_U)
        target_BP = torch.where(place_BP >= 0, drawn_BP, 0.0)
        value = head.encoded_loss(emb_BD, rows_UD, place_BP, target_BP, weight_B)
        return Losses(value, {"pool": torch.tensor(float(len(pool_U)))})

    def _encode_own(self, encoder: Encoder, head: EncodedHead) -> Tensor:
        """Embeddings of own labels (C, D) in the head's memory, by the gradient cache."""

        def give(index: int) -> Prepared:
            return to_device(self.side.own(encoder, index), self.device)

        return encode_cached(encoder, give, self.side.sizes, head.room_for_rows())

    # --- mining -----------------------------------------------------------------------------------------

    @torch.no_grad()
    def _mine(self, emb_BD: Tensor, ids_BP: Tensor, key_B: Tensor) -> Tensor:
        """Hard negatives of each query (B, M): drawn from its best labels by exact search less all its positives.

        Labels are as the last round's encoder has them, queries as they are now. Collective.
        """
        assert isinstance(self.negatives, MinedNegatives)
        done = int(self.passes) - self.negatives.start
        if done % self.negatives.every == 0:
            self.snapshot.load_state_dict(self.encoder.state_dict())
            self._miner = None
        if self._miner is None:
            self._miner = EncodedHead(self.head.num_classes, self.encoder.dim, self.loss, self.head_config, self.seed)
            self._miner.give_rows(self._encode_own(self.snapshot.eval(), self._miner))
        _, found_BK = self._miner.topk(emb_BD, min(self.negatives.top, self.head.num_classes))
        return draw_hard(found_BK, ids_BP, key_B, self.negatives.per_query)

    # --- use --------------------------------------------------------------------------------------------

    @torch.no_grad()
    def _settle(self, progress: Progress | None = None) -> None:
        """Gives the head the labels' embeddings by the encoder as it is."""
        if not self._current:
            training = self.encoder.training
            self.encoder.eval()
            self.head.give_rows(self._encode_own(self.encoder, self.head))
            self.encoder.train(training)
            self._current = True

    def finish(self, progress: Progress) -> None:
        self._current = False
        self._settle(progress)

    @torch.no_grad()
    def evaluate(self, batch: Batch) -> dict[str, Tensor]:
        self._settle()
        _, ids_BK = self.head.topk(self.encoder(batch.inputs["query"]), min(10, self.k))
        hit_BK = (ids_BK[:, :, None] == batch.labels.ids_BP[:, None, :]).any(dim=2)
        number_B = (batch.labels.ids_BP >= 0).sum(dim=1).clamp_min(1)
        return {"p1": hit_BK[:, 0], "r10": hit_BK.sum(dim=1) / number_B}

    @torch.no_grad()
    def predict(self, batch: Batch) -> dict[str, Tensor]:
        self._settle()
        emb_BD = self.encoder(batch.inputs["query"])
        scores_BK, ids_BK = self.head.topk(emb_BD, self.k)
        out = {"class_id": ids_BK, "score": scores_BK}
        return out | {"emb": emb_BD} if self.embed else out


def draw_hard(found_BK: Tensor, ids_BP: Tensor, key_B: Tensor, count: int) -> Tensor:
    """`count` of the found labels of each query that are none of its positives (B, count), -1 where there are fewer.

    Which ones depends on the query's key and the labels' ids alone.
    """
    positive_BK = (found_BK[:, :, None] == ids_BP[:, None, :]).any(dim=2)
    keys_B, found = key_B.cpu().numpy().view(np.uint64), found_BK.cpu().numpy()
    chance_BK = mix64(keys_B[:, None] ^ mix64(found.astype(np.uint64) + np.uint64(1))) >> np.uint64(1)
    chance_BK = np.where(positive_BK.cpu().numpy() | (found < 0), np.uint64(2**64 - 1), chance_BK)
    order_BM = np.argsort(chance_BK, axis=1, kind="stable")[:, :count]
    taken = np.take_along_axis(found, order_BM, axis=1)
    taken[np.take_along_axis(chance_BK, order_BM, axis=1) == np.uint64(2**64 - 1)] = -1
    return torch.from_numpy(taken).to(found_BK.device)


__all__ = ["DualEncoder", "FullNegatives", "InBatchNegatives", "MinedNegatives", "Negatives", "draw_hard"]
