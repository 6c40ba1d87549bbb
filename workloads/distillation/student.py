"""A student and what it learns from: labels, a teacher's logits, a teacher's features; on one head or on two.

Shape legend: B samples of this rank, N of all ranks, C classes, E embedding width of the teacher, D of the student.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from labelmill.data.labels import Labels
from labelmill.data.outputs import Outputs, Rows
from labelmill.data.stream import Batch
from labelmill.encoders import EncoderConfig, build_encoder
from labelmill.errors import DataError, JobError
from labelmill.heads.config import HeadConfig
from labelmill.heads.distilled import distillation_loss
from labelmill.heads.probabilities import class_probabilities
from labelmill.heads.ranks import Ranks
from labelmill.heads.sharded import ShardedHead
from labelmill.heads.teaching import ListedTeacher, LogitTeacher
from labelmill.job import StrictModel
from labelmill.losses.class_sums import Listed, dense_distillation
from labelmill.losses.distillation import CrossEntropy, ListedKD
from labelmill.losses.soft_targets import aligned_gradients, gradient_cosine
from labelmill.teachers import TeacherModel
from labelmill.training.objective import Losses, Objective
from workloads.distillation.arms import Arm
from workloads.distillation.matching import FeatureLosses

KEEP_LOGITS = 1000  # classes up to which predictions hold every logit
_NO_CE = CrossEntropy()


class TeacherPlace(StrictModel):
    """Where the workers find the teacher: kept outputs, a packaged model, or an encoder that brings its weights."""

    outputs: str = ""
    package: str = ""
    encoder: EncoderConfig | None = None
    width: int = Field(0, description="of its embedding; 0 without")
    temperatures: tuple[float, ...] = ()

    def live(self) -> TeacherModel:
        """The module."""
        return TeacherModel.of(self.package) if self.package else TeacherModel(build_encoder(self.encoder), None)  # type: ignore[arg-type]


def aux_head(kind: str, dim: int, num_classes: int) -> nn.Module:
    """The second head of dual-head distillation: linear, or a small network of its own (the authors' widths)."""
    if kind == "linear":
        return nn.Linear(dim, num_classes)
    return nn.Sequential(
        nn.Linear(dim, 200), nn.Dropout(0.1), nn.BatchNorm1d(200), nn.ReLU(), nn.Linear(200, num_classes)
    )


class Student(Objective):
    """Encoder, a main head, and what an arm says.

    Args:
        encoder, head: config sections; without `head` the main head is a dense layer with a bias.
        num_classes: C.
        arm: of the job.
        seed: of a sharded head.
        teacher: where it is.
        epoch_steps: steps of an epoch, for schedules; `step_samples` positions of a step.
        log_every: steps between logged metrics.
    """

    def __init__(
        self,
        encoder: EncoderConfig,
        head: HeadConfig | None,
        num_classes: int,
        arm: Arm,
        seed: int,
        teacher: TeacherPlace | None,
        epoch_steps: float,
        step_samples: int,
        log_every: int = 1,
    ) -> None:
        super().__init__()
        self.encoder = build_encoder(encoder)
        self.num_classes, self.arm = num_classes, arm
        self.epoch_steps, self.step_samples = epoch_steps, step_samples
        self.log_every, self.logged = log_every, True
        self.sharded: dict[str, ShardedHead] = {}
        if head:
            self.sharded["classes"] = ShardedHead(num_classes, self.encoder.dim, head, seed=seed)
            if arm.align != "none" or arm.cosine:
                raise JobError("align and cosine work on a dense head: leave head out.")
            if arm.aux == "nonlinear":
                raise JobError(
                    "aux nonlinear has a dense layer over all classes: use aux linear beside a sharded head."
                )
        else:
            self.classes = nn.Linear(self.encoder.dim, num_classes)
        # after the main head, so that an arm without a second head draws the same first weights
        if arm.aux != "none":
            if head:
                self.sharded["aux"] = ShardedHead(num_classes, self.encoder.dim, head, seed=seed + 1)
            else:
                self.aux = aux_head(arm.aux, self.encoder.dim, num_classes)
        self.ranks = Ranks()
        self.kept = Outputs(teacher.outputs) if teacher and teacher.outputs and arm.taught else None
        # a tuple, so that the teacher is no part of the module: nobody trains, saves or exports it
        self.live: tuple[TeacherModel, ...] = (
            (teacher.live(),) if teacher and not teacher.outputs and arm.taught else ()
        )
        self.temperatures = teacher.temperatures if teacher else ()
        self.matching: FeatureLosses | None = None
        if arm.features:
            assert teacher is not None
            other = self.live[0].encoder if self.live else None
            self.matching = FeatureLosses(arm.features, self.encoder, other, teacher.width, self.ranks)

    @property
    def heads(self) -> Mapping[str, ShardedHead]:
        return self.sharded

    def begin(self, step: int, total: int) -> None:
        self.logged = (step + 1) % self.log_every == 0 or step + 1 == total

    def prepare(self, raw: Any, labels: Labels, rng: np.ndarray | None) -> Any:
        inputs = {"student": self.encoder.prepare(raw, rng)}
        if self.live and self.training:
            inputs["teacher"] = self.live[0].encoder.prepare(raw, rng)  # the same keys: the same augmentation
        return inputs

    # --- the teacher --------------------------------------------------------------------------------------

    def join(self, keys: Sequence[str], weight_B: Tensor) -> dict[str, Any]:
        """Kept outputs of a training batch. Padding and holes may carry keys that nobody knows: they get those of a sample
        that counts, unused."""
        if self.kept is None or not self.training:
            return {}
        live = weight_B.numpy() > 0
        if not live.all():
            good = keys[int(live.argmax())] if live.any() else self.kept.first_key
            keys = [key if known else good for key, known in zip(keys, live.tolist(), strict=True)]
        return {"teacher": self.kept.read(keys)}

    @torch.no_grad()
    def teach(self, batch: Batch) -> Rows:
        """What the teacher says of a batch, on its device."""
        device = batch.weight_B.device
        if self.kept is not None:
            rows = batch.columns["teacher"]
        else:
            model = self.live[0].to(device)
            inputs, maps = batch.inputs["teacher"], list[Tensor]()
            if self.arm.needs_maps:
                emb_BE, logits_BC, maps = model.with_maps(inputs)
            else:
                emb_BE, logits_BC = model(inputs)
            rows = Rows(torch.ones(len(batch), dtype=torch.bool), logits_BC, embedding_BE=emb_BE, maps=tuple(maps))
        names = ("valid_B", "logits_BC", "ids_Bk", "values_Bk", "tail_BT", "embedding_BE")
        moved = {n: None if (v := getattr(rows, n)) is None else v.to(device) for n in names}
        if self.arm.shuffled:
            moved = {n: None if v is None else v.roll(1, 0) for n, v in moved.items()}
        shown = tuple(v.roll(1, 0) if self.arm.shuffled else v for v in rows.maps)
        return Rows(**moved, maps=shown)  # type: ignore[arg-type]

    def _listed(self, rows: Rows, temperature: float) -> Listed:
        if rows.ids_Bk is None or rows.values_Bk is None or rows.tail_BT is None:
            raise DataError("loss listed_kd needs teacher.columns topk.")
        if temperature not in self.temperatures:
            raise DataError(f"the teacher's tails were kept for temperatures {self.temperatures}, not {temperature:g}.")
        return Listed(rows.ids_Bk, rows.values_Bk, rows.tail_BT[:, self.temperatures.index(temperature)], temperature)

    # --- losses -------------------------------------------------------------------------------------------

    def epoch_of(self, batch: Batch) -> float:
        """The epoch that a batch belongs to, equal on all ranks."""
        return int(batch.positions_B.min()) // self.step_samples / self.epoch_steps

    def forward(self, batch: Batch) -> Losses:
        epoch = self.epoch_of(batch)
        maps: list[Tensor] = []
        if self.arm.needs_maps:
            emb_BD, maps = self.encoder.maps(batch.inputs["student"])
        else:
            emb_BD = self.encoder(batch.inputs["student"])
        terms = [(weight, term.loss) for term in self.arm.losses if (weight := term.at(epoch))]
        looks = [(weight, term) for term in self.arm.features if (weight := term.at(epoch))]
        rows = self.teach(batch) if terms or looks else None
        parts: dict[str, Tensor] = {}
        own: list[Tensor] = []  # of the labels
        taught: list[Tensor] = []
        for weight, term in looks:
            assert rows is not None
            assert self.matching is not None
            parts[term.kind] = self.matching(term, emb_BD, maps, rows, batch.weight_B)
            taught.append(weight * parts[term.kind])
        if self.sharded:
            return Losses(sum(taught, self._sharded(emb_BD, terms, rows, batch)), parts)
        self._dense(emb_BD, terms, rows, batch, parts, own, taught)
        both = own + taught
        watches = self.arm.align != "none" or (self.arm.cosine and self.logged)
        if watches and terms and torch.is_grad_enabled():
            ce, other = own[0], sum(taught[1:], taught[0])
            pair = self._gradients(ce, other)
            parts |= self._cosines(*pair)
            if self.arm.align != "none":
                return Losses((ce + other).detach() + self._aligned(*pair), parts)
        return Losses(sum(both[1:], both[0]) if both else emb_BD.sum() * 0, parts)

    def _dense(
        self,
        emb_BD: Tensor,
        terms: list[Any],
        rows: Rows | None,
        batch: Batch,
        parts: dict[str, Tensor],
        own: list[Tensor],
        taught: list[Tensor],
    ) -> None:
        logits_BC, weight_B = self.classes(emb_BD), batch.weight_B
        if self.arm.ce:
            ce_B = F.cross_entropy(logits_BC, batch.labels.single_B, reduction="none")
            parts["ce"] = ce_B @ (weight_B / weight_B.sum().clamp_min(1))
            own.append(self.arm.ce * parts["ce"])
        if not terms:
            return
        assert rows is not None
        target_BC = logits_BC if self.arm.aux == "none" else self._aux(emb_BD)
        known_B = weight_B * rows.valid_B
        share_B = known_B / known_B.sum().clamp_min(1)
        for weight, loss in terms:
            if loss.kind == "listed_kd":
                loss_B = dense_distillation(
                    loss, target_BC, None, batch.labels.single_B, known_B, self._listed(rows, loss.temperature)
                )
            else:
                if rows.logits_BC is None:
                    raise DataError(f"loss {loss.kind} needs teacher.columns logits.")
                loss_B = self._over_ranks(loss, target_BC, rows.logits_BC, batch.labels.single_B, known_B)
            parts[loss.kind] = loss_B @ share_B
            taught.append(weight * parts[loss.kind])

    def _aux(self, emb_BD: Tensor) -> Tensor:
        if self.arm.aux == "nonlinear" and self.training and len(emb_BD) < 2:
            raise DataError(
                "the nonlinear second head has BatchNorm, and a rank's batch has one sample: use aux linear."
            )
        return self.aux(emb_BD)

    def _over_ranks(self, loss: Any, s_BC: Tensor, t_BC: Tensor, label_B: Tensor, weight_B: Tensor) -> Tensor:
        """A loss that compares samples sees those of all ranks."""
        if loss.kind != "dist" or self.ranks.world == 1:
            return dense_distillation(loss, s_BC, t_BC, label_B, weight_B)
        counts = [n for (n,) in self.ranks.gather_numbers([len(s_BC)], s_BC.device)]
        s_NC = self.ranks.gather_rows_with_grad(s_BC, counts)
        t_NC, label_N, weight_N = (self.ranks.gather_rows(x.contiguous(), counts) for x in (t_BC, label_B, weight_B))
        lo = sum(counts[: self.ranks.rank])
        return dense_distillation(loss, s_NC, t_NC, label_N, weight_N)[lo : lo + len(s_BC)]

    def _sharded(self, emb_BD: Tensor, terms: list[Any], rows: Rows | None, batch: Batch) -> Tensor:
        label_B, weight_B = batch.labels.single_B, batch.weight_B
        main, aux = self.sharded["classes"], self.sharded.get("aux")
        total = emb_BD.new_zeros(())
        teacher: Any = None
        if terms:
            assert rows is not None
            listed = [loss for _, loss in terms if isinstance(loss, ListedKD)]
            if listed and len(listed) < len(terms):
                raise DataError("on a sharded head listed_kd doesn't go with losses on all logits.")
            if listed:
                teacher = ListedTeacher(self._listed(rows, listed[0].temperature))
            elif rows.logits_BC is None:
                raise DataError("these losses need teacher.columns logits.")
            else:
                teacher = LogitTeacher(rows.logits_BC)
        own = [(self.arm.ce, _NO_CE)] if self.arm.ce else []
        if own or aux is None:
            mixed = own if aux is not None else own + terms
            total = total + distillation_loss(main, emb_BD, mixed, teacher if aux is None else None, label_B, weight_B)
        if aux is not None and terms:
            total = total + distillation_loss(aux, emb_BD, terms, teacher, label_B, weight_B)
        return total

    def _gradients(self, ce: Tensor, taught: Tensor) -> tuple[list[Tensor | None], list[Tensor | None]]:
        """Of both losses by each parameter, averaged over the ranks, as their directions are compared; None for zero."""
        params = [p for p in self.parameters() if p.requires_grad]
        pair: list[list[Tensor | None]] = []
        for loss in (ce, taught):
            grads = torch.autograd.grad(loss, params, retain_graph=True, allow_unused=True)
            pair.append([None if g is None else self.ranks.sum_(g.contiguous()) / self.ranks.world for g in grads])
        return pair[0], pair[1]

    def _within(self, prefix: str) -> list[bool]:
        """Which of the parameters belong to a part of the student."""
        return [name.startswith(prefix) for name, p in self.named_parameters() if p.requires_grad]

    def _cosines(self, first: list[Tensor | None], second: list[Tensor | None]) -> dict[str, Tensor]:
        """Between the gradients of labels and teacher: over all parameters, in the encoder, and in the head.

        With a linear second head the latter compares the two heads, row by row the same class: what one head would meet.
        """

        def only(grads: list[Tensor | None], prefix: str) -> list[Tensor | None]:
            return [g for g, inside in zip(grads, self._within(prefix), strict=True) if inside]

        found = {
            "cosine_all": gradient_cosine(first, second),
            "cosine_backbone": gradient_cosine(only(first, "encoder."), only(second, "encoder.")),
        }
        if self.arm.aux != "nonlinear":
            other = "classes." if self.arm.aux == "none" else "aux."
            found["cosine_heads"] = gradient_cosine(only(first, "classes."), only(second, other))
        return {name: value.float() for name, value in found.items()}

    def _aligned(self, first: list[Tensor | None], second: list[Tensor | None]) -> Tensor:
        """A scalar of value 0 whose gradient is the aligned sum of both losses' (DHKD's gradient alignment)."""
        params = [p for p in self.parameters() if p.requires_grad]
        inside = self._within("" if self.arm.align == "all" else "encoder.")
        joined = aligned_gradients(
            [g if use else None for g, use in zip(first, inside, strict=True)],
            [g if use else None for g, use in zip(second, inside, strict=True)],
        )
        total = params[0].new_zeros(())
        for p, a, b, both, use in zip(params, first, second, joined, inside, strict=True):
            whole = both if use else (a if b is None else b if a is None else a + b)
            if whole is not None:
                total = total + (whole.detach() * (p - p.detach())).sum()
        return total

    # --- prediction: the main head alone ---------------------------------------------------------------------

    @torch.no_grad()
    def evaluate(self, batch: Batch) -> dict[str, Tensor]:
        found = self.predict(batch)
        return {"top1": found["class_id"][:, 0] == found["label"]}

    @torch.no_grad()
    def predict(self, batch: Batch) -> dict[str, Tensor]:
        emb_BD, label_B = self.encoder(batch.inputs["student"]), batch.labels.ids_BP[:, 0]
        keep = self.num_classes <= KEEP_LOGITS
        if self.sharded:
            head = self.sharded["classes"]
            found = class_probabilities(head, emb_BD, label_B, 1)
            out = {"label": label_B, "class_id": found.class_id_Bk, "prob": found.prob_Bk}
            if keep:
                score_BC, id_BC = head.topk(emb_BD, self.num_classes)
                out["logits"] = torch.zeros_like(score_BC).scatter_(1, id_BC, head.config.scale * score_BC)
            return out
        logits_BC = self.classes(emb_BD).float()
        prob, ids = torch.softmax(logits_BC, 1).topk(1)
        return {"label": label_B, "class_id": ids, "prob": prob} | ({"logits": logits_BC} if keep else {})
