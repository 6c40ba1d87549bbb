"""A student's embeddings and feature maps beside a teacher's, with the layers that bring them to one shape.

Shape legend: B samples of this rank, N of all ranks, E embedding width of the teacher, D of the student; C, H, W of a map.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from labelmill.data.outputs import Rows
from labelmill.encoders.base import Encoder
from labelmill.errors import DataError, JobError
from labelmill.heads.ranks import Ranks
from labelmill.losses import features
from workloads.distillation.arms import FeatureTerm

_MOST_TRIPLETS = 512  # samples of a batch: N^3 angles
Shape = tuple[int, ...]


def map_shapes(encoder: Encoder) -> list[Shape]:
    """(C, H, W) of an encoder's feature maps. Raises JobError for one that has none."""
    config = encoder.config
    side, channels = getattr(config, "image_size", 1), getattr(config, "channels", 1)
    was_training = encoder.training
    with torch.no_grad():
        found = encoder.eval().maps(torch.zeros(1, channels, side, side))[1]
    encoder.train(was_training)
    return [tuple(found_1CHW.shape[1:]) for found_1CHW in found]


def paired(term: FeatureTerm, student: Sequence[Shape], teacher: Sequence[Shape]) -> list[tuple[int, int]]:
    """Which maps a term compares. Raises JobError where none are alike in height and width."""
    sizes = f"the student's maps are {_sizes(student)}, the teacher's {_sizes(teacher)} (height x width)"
    for s, t in term.stages:
        if not (0 <= s < len(student) and 0 <= t < len(teacher)) or student[s][1:] != teacher[t][1:]:
            raise JobError(f"features {term.kind}: stages [{s}, {t}] aren't two maps of one size: {sizes}.")
    if term.stages:
        return list(term.stages)
    last_s, last_t = ({shape[1:]: i for i, shape in enumerate(shapes)} for shapes in (student, teacher))
    found = [(s, last_t[size]) for size, s in last_s.items() if size in last_t]
    if not found:
        raise JobError(f"features {term.kind}: no two maps of one size: {sizes}. Choose encoders that share one.")
    return found if term.kind == "attention" else found[-1:]


def _sizes(shapes: Sequence[Shape]) -> str:
    return ", ".join(f"{h} x {w}" for _, h, w in shapes)


class FeatureLosses(nn.Module):
    """The feature losses of an arm. `teacher` is the encoder of one that runs live, for losses on maps."""

    def __init__(
        self, terms: Sequence[FeatureTerm], student: Encoder, teacher: Encoder | None, width: int, ranks: Ranks
    ) -> None:
        super().__init__()
        self.ranks = ranks
        if any(term.kind in ("fitnet", "cosine", "crd") for term in terms):
            self.adapter = nn.Linear(student.dim, width)
        self.pairs: dict[str, list[tuple[int, int]]] = {}
        of_maps = [term for term in terms if term.of_maps]
        if not of_maps:
            return
        if teacher is None:
            raise JobError(f"features {of_maps[0].kind}: feature maps aren't kept, set teacher.live to true.")
        shapes = map_shapes(student), map_shapes(teacher)
        for term in of_maps:
            self.pairs[term.kind] = paired(term, *shapes)
        self.hints = nn.ModuleList(
            nn.Conv2d(shapes[0][s][0], shapes[1][t][0], 1) for s, t in self.pairs.get("fitnet_maps", ())
        )

    def forward(
        self, term: FeatureTerm, emb_BD: Tensor, maps: Sequence[Tensor], rows: Rows, weight_B: Tensor
    ) -> Tensor:
        """The term's loss, a scalar; `maps` are the student's."""
        live_B = (weight_B > 0) & rows.valid_B
        if term.of_maps:
            return _mean(self._between_maps(term, maps, rows.maps), live_B)
        if rows.embedding_BE is None:
            raise DataError(f"feature loss {term.kind} needs teacher.columns embedding.")
        t_BE = rows.embedding_BE
        if term.kind in ("fitnet", "cosine"):
            s_BE = self.adapter(emb_BD)
            each_B = (s_BE - t_BE).square().mean(1) if term.kind == "fitnet" else features.embedding_cosine(s_BE, t_BE)
            return _mean(each_B, live_B)
        counts = [n for (n,) in self.ranks.gather_numbers([len(emb_BD)], emb_BD.device)]
        t_NE, live_N = self.ranks.gather_rows(t_BE.contiguous(), counts), self.ranks.gather_rows(live_B, counts)
        if term.kind == "crd":
            own_B = sum(counts[: self.ranks.rank]) + torch.arange(len(emb_BD), device=emb_BD.device)
            s_BE = self.adapter(emb_BD)
            return _mean(features.contrastive_distillation(s_BE, t_NE, own_B, term.temperature, live_N), live_B)
        if term.kind == "rkd" and sum(counts) > _MOST_TRIPLETS:
            raise DataError(
                f"rkd compares all triplets of a batch: {sum(counts)} samples are too many, {_MOST_TRIPLETS} the most."
            )
        s_ND = self.ranks.gather_rows_with_grad(emb_BD, counts)
        function = features.rkd if term.kind == "rkd" else features.similarity_preserving
        return function(s_ND[live_N], t_NE[live_N])

    def _between_maps(self, term: FeatureTerm, student: Sequence[Tensor], teacher: Sequence[Tensor]) -> Tensor:
        """Of each sample, (B,), the mean over the pairs of maps."""
        found = []
        for i, (s, t) in enumerate(self.pairs[term.kind]):
            t_BCHW = teacher[t].to(student[s].dtype)
            if term.kind == "attention":
                found.append(features.attention_transfer(student[s], t_BCHW))
            else:
                found.append((self.hints[i](student[s]) - t_BCHW).square().flatten(1).mean(1))
        return torch.stack(found).mean(0)


def _mean(each_B: Tensor, live_B: Tensor) -> Tensor:
    return torch.where(live_B, each_B, 0.0).sum() / live_B.sum().clamp_min(1)
