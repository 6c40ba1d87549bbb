"""The two objectives of RCAL: momentum contrast without labels, and a classifier with calibrated features.

Shape legend: B samples of this rank, N samples of the training set, S synthetic features, K classes, D width,
M negatives.
"""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import torch
from pydantic import Field
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional as F

from labelmill.data.labels import Labels
from labelmill.data.manifest import Manifest
from labelmill.data.shards import read_labels
from labelmill.data.stream import Batch
from labelmill.encoders import EncoderConfig, build_encoder
from labelmill.encoders.hashing import mix64, tag
from labelmill.errors import DataError
from labelmill.heads.ranks import Ranks
from labelmill.job import StrictModel
from labelmill.losses.contrastive import info_nce
from labelmill.training.objective import Losses, Objective
from labelmill.training.sample_state import SampleState


class ContrastSection(StrictModel):
    """Momentum contrast (He et al., MoCo, CVPR 2020)."""

    encoder: EncoderConfig | None = Field(
        None, description="the same encoder with stronger augmentation; default: as is"
    )
    width: int = Field(64, ge=2, description="of the projection that is compared")
    queue: int = Field(4096, ge=16, description="negatives")
    momentum: float = Field(0.99, ge=0, lt=1, description="of the key encoder")
    temperature: float = Field(0.1, gt=0)


class Contrast(Objective):
    """Query and key encoder with two-layer projections; keys move slowly after the queries. Labels are not looked at."""

    queue_MD: Tensor
    place: Tensor

    def __init__(self, encoder: EncoderConfig, section: ContrastSection, seed: int) -> None:
        super().__init__()
        self.encoder = build_encoder(encoder)
        dim = self.encoder.dim
        self.project = nn.Sequential(nn.Linear(dim, dim), nn.ReLU(), nn.Linear(dim, section.width))
        self.keys = nn.ModuleList([copy.deepcopy(self.encoder), copy.deepcopy(self.project)]).requires_grad_(False)
        self.section, self.ranks = section, Ranks()
        generator = torch.Generator().manual_seed(seed)
        queue = F.normalize(torch.randn(section.queue, section.width, generator=generator), dim=1)
        self.register_buffer("queue_MD", queue)
        self.register_buffer("place", torch.zeros(1, dtype=torch.int64))

    def prepare(self, raw: Any, labels: Labels, rng: np.ndarray | None) -> Any:
        with np.errstate(over="ignore"):
            other = None if rng is None else mix64(np.asarray(rng).astype(np.uint64) + tag(1907))
        return {"query": self.encoder.prepare(raw, rng), "key": self.encoder.prepare(raw, other)}

    @torch.no_grad()
    def _keys(self, inputs: Any) -> Tensor:
        """Moves the key encoder, then embeds the other view: unit rows (B, width)."""
        queries = [*self.encoder.parameters(), *self.project.parameters()]
        for key, query in zip(self.keys.parameters(), queries, strict=True):
            key.lerp_(query.to(key.dtype), 1 - self.section.momentum)
        return F.normalize(self.keys[1](self.keys[0](inputs)).float(), dim=1)

    @torch.no_grad()
    def _enqueue(self, key_BD: Tensor, weight_B: Tensor) -> None:
        """The keys of all ranks replace the oldest of the queue, on every rank alike."""
        counts = [n for (n,) in self.ranks.gather_numbers([len(key_BD)], key_BD.device)]
        key_ND = self.ranks.gather_rows(key_BD, counts)
        alive_N = self.ranks.gather_rows(weight_B, counts) > 0
        key_ND = key_ND[alive_N][-len(self.queue_MD) :]
        at = (int(self.place) + torch.arange(len(key_ND), device=key_ND.device)) % len(self.queue_MD)
        self.queue_MD[at] = key_ND.to(self.queue_MD.dtype)
        self.place.copy_((self.place + len(key_ND)) % len(self.queue_MD))

    def forward(self, batch: Batch) -> Losses:
        query_BD = self.project(self.encoder(batch.inputs["query"]))
        key_BD = self._keys(batch.inputs["key"])
        loss_B = info_nce(query_BD, key_BD, self.queue_MD.clone(), self.section.temperature)
        self._enqueue(key_BD, batch.weight_B)
        return Losses((loss_B * batch.weight_B).sum() / batch.weight_B.sum().clamp_min(1))


class Calibration(StrictModel):
    """One arm: what of RCAL takes part."""

    pretrained: bool = Field(True, description="start from the contrastive encoder")
    neighbours: int = Field(20, ge=0, description="of the local outlier factor; 0 keeps every row")
    borrow: float = Field(0.5, ge=0, le=1, description="beta: how much tail classes borrow from head classes")
    lenders: int = Field(3, ge=1, description="q: head classes that a tail class borrows from")
    spread: float = Field(0.1, ge=0, description="alpha: added to the covariance of tail classes")
    synthetic: float = Field(1.0, ge=0, description="weight of the loss on features drawn from the Gaussians")
    anchor: float = Field(0.3, ge=0, description="weight of the distance to the contrastive features")
    mixup: float = Field(1.0, ge=0, description="Beta(a, a) of mixup; 0: none")
    balanced: bool = Field(False, description="weight samples by 1 / the number of their class's labels (a baseline)")

    @property
    def draws(self) -> bool:
        """Whether features are drawn."""
        return self.pretrained and self.synthetic > 0


class Calibrated(Objective):
    """Encoder and linear classifier: mixup cross-entropy, cross-entropy on drawn features, distance to the stored ones.

    Args:
        encoder: config section.
        data: the noisy training set.
        arm: what takes part.
        weights: exported file of the contrastive encoder, for an arm that starts from it.
        embeddings: file of the contrastive features, row for row with the shards, where they are needed.
        gaussians: file of the calibrated Gaussians (mean, factor, missing), where features are drawn.
        seed: of mixup and draws.
    """

    step: Tensor

    def __init__(
        self,
        encoder: EncoderConfig,
        data: Manifest,
        arm: Calibration,
        weights: str,
        embeddings: str,
        gaussians: str,
        seed: int,
    ) -> None:
        super().__init__()
        assert data.label.num_classes is not None
        self.encoder = build_encoder(encoder)
        self.classes = nn.Linear(self.encoder.dim, data.label.num_classes)
        self.arm, self.seed, self.ranks = arm, seed, Ranks()
        self.register_buffer("step", torch.zeros(1, dtype=torch.int64))
        self.class_weight_K = balancing_weights(data) if arm.balanced else None
        if arm.pretrained:
            state = load_file(weights)
            own = {k.removeprefix("encoder."): v for k, v in state.items() if k.startswith("encoder.")}
            self.encoder.load_state_dict(own)
        self.stored = stored_features(data, embeddings, self.encoder.dim) if arm.pretrained and arm.anchor else None
        self.gaussians = load_file(gaussians) if arm.draws else None

    def prepare(self, raw: Any, labels: Labels, rng: np.ndarray | None) -> Any:
        return self.encoder.prepare(raw, rng)

    def _random(self) -> torch.Generator:
        """Of this step and rank."""
        number = (self.seed * 1_000_003 + int(self.step)) * 4099 + self.ranks.rank
        return torch.Generator().manual_seed(number % 2**63)

    def forward(self, batch: Batch) -> Losses:
        random, weight_B = self._random(), batch.weight_B
        total = weight_B.sum().clamp_min(1)
        label_B, z_BD = batch.labels.single_B, self.encoder(batch.inputs)
        mixed_B = self._mixup(batch, z_BD, label_B, random)
        if self.class_weight_K is not None:
            mixed_B = mixed_B * self.class_weight_K.to(label_B.device)[label_B]
        parts = {"mixup": (mixed_B * weight_B).sum() / total}
        loss = parts["mixup"]
        if self.gaussians is not None:
            drawn_SD, class_S = self.draw(len(label_B), random)
            parts["synthetic"] = F.cross_entropy(self.classes(drawn_SD.to(z_BD)), class_S.to(label_B.device))
            loss = loss + self.arm.synthetic * parts["synthetic"]
        if self.stored is not None:
            away_B = ((z_BD - self.stored.read(self.stored.rows(batch.keys))) ** 2).sum(dim=1)
            parts["anchor"] = (away_B * weight_B).sum() / total
            loss = loss + self.arm.anchor * parts["anchor"]
        self.step += 1
        return Losses(loss, parts)

    def _mixup(self, batch: Batch, z_BD: Tensor, label_B: Tensor, random: torch.Generator) -> Tensor:
        """Cross-entropy (B,) of mixed samples; of inputs that can't be mixed (text) the features are."""
        if not self.arm.mixup:
            return F.cross_entropy(self.classes(z_BD), label_B, reduction="none")
        a = self.arm.mixup
        seed = int(torch.randint(2**31, (1,), generator=random))
        share = float(np.random.default_rng(seed).beta(a, a))
        # a hole must not be mixed into a sample
        alive = (batch.weight_B > 0).nonzero()[:, 0]
        other = torch.arange(len(label_B), device=label_B.device)
        other[alive] = alive[torch.randperm(len(alive), generator=random).to(alive.device)]
        if isinstance(batch.inputs, Tensor) and batch.inputs.is_floating_point():
            mixed = self.encoder(share * batch.inputs + (1 - share) * batch.inputs[other])
        else:
            mixed = share * z_BD + (1 - share) * z_BD[other]
        logits = self.classes(mixed)
        first = F.cross_entropy(logits, label_B, reduction="none")
        return share * first + (1 - share) * F.cross_entropy(logits, label_B[other], reduction="none")

    def draw(self, number: int, random: torch.Generator) -> tuple[Tensor, Tensor]:
        """(features (S, D), classes (S,)): classes by what they lack to the largest one."""
        assert self.gaussians is not None
        mean, factor, missing = (self.gaussians[name] for name in ("mean", "factor", "missing"))
        class_S = torch.multinomial(missing, number, replacement=True, generator=random)
        noise = torch.randn(number, mean.shape[1], generator=random)
        return mean[class_S] + torch.einsum("sij,sj->si", factor[class_S], noise), class_S

    @torch.no_grad()
    def predict(self, batch: Batch) -> dict[str, Tensor]:
        _, ids = self.classes(self.encoder(batch.inputs)).topk(1)
        return {"label": batch.labels.ids_BP[:, 0], "class_id": ids}


def balancing_weights(data: Manifest) -> Tensor:
    """float32 (K,): 1 / n_k, scaled so that the weights of all samples have mean 1; 0 for classes without labels."""
    label_N = np.concatenate([read_labels(data, i).column("label").to_numpy() for i in range(len(data.shards))])
    count_K = np.bincount(label_N, minlength=data.label.num_classes or 0)
    found = (count_K > 0).sum()
    return torch.from_numpy(np.where(count_K > 0, len(label_N) / (found * np.maximum(count_K, 1)), 0.0)).float()


def stored_features(data: Manifest, file: str, dim: int) -> SampleState:
    """The contrastive features by sample key. Raises DataError for features of another width or number."""
    emb_ND = load_file(file)["emb"]
    if emb_ND.shape != (data.num_samples, dim):
        raise DataError(
            f"{file}: stored features {list(emb_ND.shape)} for {data.num_samples} samples and an encoder of width {dim}."
        )
    keys = [key for i in range(len(data.shards)) for key in read_labels(data, i).column("key").to_pylist()]
    state = SampleState(keys, dim)
    state.values_NW[state.rows(keys)] = emb_ND
    return state
