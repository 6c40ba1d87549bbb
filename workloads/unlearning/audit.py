"""The audit of a model version: what it knows of retained, forgotten and unseen samples, beside a reference.

General: it takes package folders of any head size. Probabilities come from one streamed pass a set.

Shape legend: N samples, B samples of this rank, C classes, K best classes.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from pydantic import Field
from torch import Tensor, nn

from labelmill.data.keys import key_hashes
from labelmill.data.selection import KeepRows
from labelmill.data.shards import read_labels
from labelmill.data.source import LocalSource
from labelmill.data.spec import StreamSpec
from labelmill.data.stream import Batch, RankStream
from labelmill.errors import JobError
from labelmill.evaluation.forgetting import gap, interval, js_divergence, relearn_steps, zrf
from labelmill.evaluation.membership import ATTACKS, Answers, attack, lira_scores, logit_confidence, roc
from labelmill.heads.config import HeadConfig
from labelmill.heads.probabilities import class_probabilities
from labelmill.heads.sharded import ShardedHead
from labelmill.job import StrictModel
from labelmill.run import Run
from labelmill.stages import Fitted, Stage
from labelmill.training.config import TrainConfig
from labelmill.training.objective import Losses, Objective
from workloads.unlearning.methods import FinetuneUnlearner
from workloads.unlearning.model import (
    Dense,
    check_classifier,
    head_start,
    load_encoder,
    package_classes,
    save_hashes,
    trained_ids,
)

FULL = 100  # classes up to which whole distributions are compared


class AuditSection(StrictModel):
    """What is measured."""

    samples: int = Field(2000, ge=10, description="most samples of each kind, drawn by their keys")
    attacks: tuple[str, ...] = Field(tuple(ATTACKS), description="membership inference")
    splits: int = Field(3, ge=1, description="random halves of the unseen samples that the attacks are repeated on")
    shadows: int = Field(
        0, ge=0, description="shadow models for the likelihood-ratio attack (unlearning.compare), each costs a training"
    )
    relearn: TrainConfig | None = Field(
        None,
        description="fine-tuning on the forgotten samples until their accuracy is back; `evaluate_every` steps apart",
    )
    relearn_share: float = Field(0.95, gt=0, le=1, description="of the original's accuracy that counts as back")


class Probe(Objective):
    """Answers of a package, over a sharded head: probabilities of the given and of the best classes."""

    def __init__(self, package: str, random: bool = False) -> None:
        super().__init__()
        spec = check_classifier(Path(package))
        self.encoder = load_encoder(Path(package), spec)
        if random:
            from labelmill.encoders import build_encoder

            self.encoder = build_encoder(spec.encoder, root=Path(package))
        self.encoder.requires_grad_(False)
        self.head = ShardedHead(spec.num_classes, spec.dim, HeadConfig(normalize=spec.normalized, scale=spec.scale))
        self.k = min(spec.num_classes, FULL)
        self.ids_C = torch.from_numpy(trained_ids(package_classes(Path(package))).copy())
        self.anchor = nn.Parameter(torch.zeros(1))

    @property
    def heads(self) -> Mapping[str, ShardedHead]:
        return {"classes": self.head}

    def prepare(self, raw: Any, labels: Any, rng: Any) -> Any:
        return self.encoder.prepare(raw, rng)

    @torch.no_grad()
    def predict(self, batch: Batch) -> dict[str, Tensor]:
        label_B = batch.labels.single_B
        ids_C = self.ids_C.to(label_B.device)
        row_B = torch.searchsorted(ids_C, label_B).clamp_max(len(ids_C) - 1)
        row_B = torch.where(ids_C[row_B] == label_B, row_B, -1)  # a removed class has no row
        found = class_probabilities(self.head, self.encoder(batch.inputs), row_B, self.k)
        return {"label": label_B, "given": found.given_B, "class_id": ids_C[found.class_id_Bk], "prob": found.prob_Bk}


@dataclass(frozen=True)
class Said:
    """Answers of a model about one set of samples, sorted by key."""

    answers: Answers
    class_id_NK: np.ndarray
    correct_N: np.ndarray
    keys: list[str]

    def distribution(self, num_classes: int) -> np.ndarray | None:
        """(N, C) in the order of classes; None where only the best are known."""
        if (self.answers.prob_NK.sum(1) < 0.999).any():
            return None
        out = np.zeros((len(self.answers), num_classes))
        np.put_along_axis(out, self.class_id_NK, self.answers.prob_NK, axis=1)
        return out / out.sum(1, keepdims=True)


def probe(
    run: Run, folder: Path, package: Path, sets: Mapping[str, StreamSpec], config: TrainConfig, random: bool = False
) -> None:
    """Stage: a model's answers about some sets; read with `answers_of`. `random`: of fresh weights in its place."""
    start = {} if random else {"classes": head_start(package, folder)}
    streams = {name: replace(spec, shuffle=False, global_batch=1000) for name, spec in sets.items()}
    objective = partial(Probe, str(package.resolve()), random)
    config = config.model_copy(update={"zero_stage": 0, "precision": "fp32"})
    run.fit(folder, objective, None, config, predict=streams, initial=start)


def probe_version(
    run: Run,
    folder: Path,
    version: Stage,
    sets: Mapping[str, StreamSpec],
    config: TrainConfig,
    random: bool = False,
    package: str | None = None,
) -> dict[str, Any]:
    """Stage: the answers of the package that another stage left (`package`, by default the one it names)."""
    probe(run, folder, version.folder / (package or version.values.get("package", "model")), sets, config, random)
    return {}


def answers_of(folder: Path, name: str) -> Said:
    """What `probe` kept of a set."""
    table = Fitted(folder).predictions(name).sort_by("key")

    def matrix(column: str) -> np.ndarray:
        values = table.column(column).combine_chunks()
        return values.flatten().to_numpy(zero_copy_only=False).reshape(len(table), -1)

    label_N, class_id_NK = table.column("label").to_numpy(), matrix("class_id")
    found = Answers(label_N, table.column("given").to_numpy().astype(np.float64), matrix("prob").astype(np.float64))
    return Said(found, class_id_NK, class_id_NK[:, 0] == label_N, table.column("key").to_pylist())


def ask(
    run: Run, name: str, version: Stage, sets: Mapping[str, StreamSpec], config: TrainConfig, **options: Any
) -> dict[str, Said]:
    """A version's answers about each set, kept by the stage `probe-<name>`; `options`: see `probe_version`."""
    stage = run.stage(f"probe-{name}", probe_version, version=version, sets=sets, config=config, **options)
    return {part: answers_of(stage.folder, part) for part in sets}


def ask_all(
    run: Run, versions: Mapping[str, Stage], sets: Mapping[str, StreamSpec], config: TrainConfig, suffix: str = ""
) -> dict[str, dict[str, Said]]:
    """The answers of all versions, and of `random`: the first one's network with fresh weights."""
    first = next(iter(versions.values()))
    return {
        name: ask(run, f"{file_name(name)}{suffix}", version, sets, config, random=name == "random")
        for name, version in {**versions, "random": first}.items()
    }


def part_of(spec: StreamSpec, most: int, seed: int = 0) -> StreamSpec:
    """The same stream cut to `most` samples, chosen by the hash of the key; all of them if there are no more."""
    if spec.epoch_samples <= most:
        return spec
    shards = range(len(spec.manifest.shards))
    tables = [read_labels(spec.manifest, i).column("key").to_pylist() for i in shards]
    rank = [key_hashes([f"audit|{seed}|{key}" for key in keys])[0] for keys in tables]
    inside = [
        spec.selection.mask(i) if isinstance(spec.selection, KeepRows) else np.ones(len(keys), bool)
        for i, keys in enumerate(tables)
    ]
    limit = np.partition(np.concatenate([r[m] for r, m in zip(rank, inside, strict=True)]), most - 1)[most - 1]
    chosen = KeepRows.of((m & (r <= limit) for r, m in zip(rank, inside, strict=True)), spec.manifest.digest)
    return replace(spec, selection=chosen)


# --- the numbers -------------------------------------------------------------------------------------------------


def accuracies(said: Mapping[str, Said], classes: tuple[int, ...]) -> dict[str, float]:
    """Percent right on retained, forgotten and test samples; test of whole forgotten classes stands apart."""
    test, gone_N = said["test"], np.isin(said["test"].answers.label_N, classes)

    def percent(flags: np.ndarray) -> float:
        return 100 * float(flags.mean()) if len(flags) else math.nan

    return {
        "train_r": percent(said["retain"].correct_N),
        "train_f": percent(said["forget"].correct_N),
        "test_r": percent(test.correct_N[~gone_N]),
        "test_f": percent(test.correct_N[gone_N]),
    }


def membership(
    said: Mapping[str, Said], classes: tuple[int, ...], attacks: tuple[str, ...], splits: int
) -> dict[str, tuple[float, float]]:
    """Attack -> (mean balanced accuracy in percent, half width over the splits); with and without matched classes.

    Unseen samples of a class that is forgotten as a whole take part in the matched attacks alone.
    """
    unseen = said["test"].answers
    others = unseen.take(np.flatnonzero(~np.isin(unseen.label_N, classes)))
    out = {}
    for kind in attacks:
        for matched in (False, True):
            values = [
                100
                * attack(
                    kind,
                    said["forget"].answers,
                    said["retain"].answers,
                    unseen if matched else others,
                    seed=split,
                    match_classes=matched,
                )
                for split in range(splits)
            ]
            out[f"mia_{kind}{'_by_class' if matched else ''}"] = interval(values)
    return out


def audit(
    said: Mapping[str, Said],
    classes: tuple[int, ...],
    section: AuditSection,
    num_classes: int,
    reference: Mapping[str, Said] | None = None,
    random: Mapping[str, Said] | None = None,
) -> dict[str, float]:
    """All numbers of a version, in percent where they are shares.

    Args:
        said: its answers about `retain`, `forget` and `test`.
        reference: those of the retrained model, for the gaps; without one there are none.
        random: those of a randomly initialised model, for ZRF.

    Raises JobError for an unknown attack.
    """
    if unknown := [kind for kind in section.attacks if kind not in ATTACKS]:
        raise JobError(f"audit.attacks: {unknown[0]!r} is none of {', '.join(ATTACKS)}.")
    values = accuracies(said, classes)
    for name, (mean, half) in membership(said, classes, section.attacks, section.splits).items():
        values |= {name: mean, f"{name}_ci": half}
    mine = said["forget"].distribution(num_classes)
    if reference is not None:
        values["gap"] = gap(accuracies(said, classes), accuracies(reference, classes))
        theirs = reference["forget"].distribution(num_classes)
        if mine is not None and theirs is not None:
            values["js_to_retrain"] = float(js_divergence(mine, theirs).mean())
    if random is not None and mine is not None:
        other = random["forget"].distribution(num_classes)
        if other is not None:
            values["zrf"] = zrf(mine, other)
    return values


def shadow_attack(
    said: Mapping[str, Said], shadows: Sequence[Mapping[str, Said]], inside: list[np.ndarray]
) -> dict[str, float]:
    """The offline likelihood-ratio attack on forgotten samples against test samples of their classes.

    Args:
        said: answers of the version.
        shadows: those of the shadow models about the same sets.
        inside: for each, which of the forgotten samples it was trained on.

    Returns the area under the curve and the true-positive rate at 1 % false positives, in percent; nothing when some forgotten
    sample was in every shadow model's training set, or no test sample has one of the classes.
    """
    same_N = np.isin(said["test"].answers.label_N, said["forget"].answers.label_N)
    out_SN = ~np.stack(inside)
    usable_N = out_SN.any(axis=0)
    if not usable_N.any() or not same_N.any():
        return {}

    def confidences(who: Mapping[str, Said]) -> np.ndarray:
        forget, test = who["forget"].answers.given_N[usable_N], who["test"].answers.given_N[same_N]
        return logit_confidence(np.concatenate([forget, test]))

    inside_SN = np.concatenate([~out_SN[:, usable_N], np.zeros((len(shadows), int(same_N.sum())), bool)], axis=1)
    scores_N = lira_scores(confidences(said), np.stack([confidences(s) for s in shadows]), inside_SN, offline=True)
    count = int(usable_N.sum())
    area, at_low = roc(scores_N[:count], scores_N[count:])
    return {"mia_lira_auc": 100 * area, "mia_lira_tpr": 100 * at_low}


class _Relearn(FinetuneUnlearner):
    """CE on whatever the stream gives."""

    def forward(self, batch: Batch) -> Losses:
        return Losses(self.cross_entropy(self.model(batch.inputs), batch.labels.single_B, batch.weight_B > 0))


def relearn(run: Run, folder: Path, package: Path, forget: StreamSpec, config: TrainConfig, wanted: float) -> int:
    """Steps of fine-tuning on forgotten samples until their accuracy is `wanted`; all of the budget if it never is.

    Steps are measured `config.evaluate_every` apart. Raises JobError without that.
    """
    if not config.evaluate_every:
        raise JobError("audit.relearn: set evaluate_every, the steps between two looks at the accuracy.")
    hashes = save_hashes(["-"], folder / "none.npy")  # nobody is set apart
    objective = partial(_Relearn, str(package.resolve()), hashes, None, 0)
    fitted = run.fit(folder, objective, forget, config, evaluate=forget)
    seen = {int(h["step"]): h["eval/top1"] for h in fitted.history if "eval/top1" in h}
    found = relearn_steps(seen, wanted)
    return config.total_steps(forget.epoch_samples) if found is None else found


def relearn_version(
    run: Run, folder: Path, version: Stage, forget: StreamSpec, config: TrainConfig, wanted: float
) -> dict[str, Any]:
    """Stage: how many steps until what was forgotten is known again."""
    package = version.folder / version.values.get("package", "model")
    return {"steps": relearn(run, folder, package, forget, config, wanted)}


def relearning(
    run: Run, section: AuditSection, versions: Mapping[str, Stage], forget: StreamSpec, known_f: float, tag: str = ""
) -> dict[str, float]:
    """Version -> steps of relearning; `known_f` is the original's accuracy on the forgotten samples, in percent.

    Nothing without `audit.relearn`; versions without the rows of some classes can't learn them and are left out.
    """
    out = {}
    for name, version in versions.items() if section.relearn else ():
        package = version.folder / version.values.get("package", "model")
        if "trained_id" not in package_classes(package).column_names:
            stage = run.stage(
                f"relearn-{file_name(name)}{tag}",
                relearn_version,
                version=version,
                forget=forget,
                config=section.relearn,
                wanted=section.relearn_share * known_f / 100,
            )
            out[name] = float(stage["steps"])
    return out


def file_name(name: str) -> str:
    """A version's name as stages and metrics have it."""
    return "".join(c if c.isalnum() else "-" for c in name.lower())


@torch.no_grad()
def error_of(package: Path, state: Mapping[str, Tensor], spec: StreamSpec) -> float:
    """Share of wrong answers of a package with other weights on a stream, in this process."""
    model = Dense(package)
    model.load_state_dict(dict(state))
    model.eval()
    wrong, seen = 0.0, 0.0
    spec = replace(part_of(spec, 5000), shuffle=False, global_batch=1000)

    def prepare(raw: Any, labels: Any, rng: Any) -> Any:
        return model.encoder.prepare(raw, rng)

    for batch in RankStream(spec, LocalSource(spec, 0, 1), 0, 1, prepare):
        kept_B = batch.weight_B > 0
        wrong += float((model(batch.inputs).argmax(1) != batch.labels.single_B)[kept_B].sum())
        seen += float(kept_B.sum())
    return wrong / max(seen, 1)
