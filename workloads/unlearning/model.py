"""A registered classifier as a module that can be trained on, and back into a package.

Shape legend: B samples, C classes, D embedding width.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from pydantic import Field
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F

from labelmill import __version__
from labelmill.data.keys import key_hashes
from labelmill.data.manifest import Manifest
from labelmill.data.stream import Batch
from labelmill.encoders import build_encoder
from labelmill.errors import DataError, JobError
from labelmill.heads.config import HeadConfig
from labelmill.heads.ranks import Ranks
from labelmill.heads.source import open_rows
from labelmill.job import StrictModel
from labelmill.run import Run
from labelmill.stages import Fitted, Stage, second_name
from labelmill.tracking import registry
from labelmill.tracking.model import ModelSpec, check_file, read_spec, write_model
from labelmill.training.config import TrainConfig
from labelmill.training.initial import HeadStart
from labelmill.training.objective import Losses, Objective

DENSE_MB = 512.0


class Dense(nn.Module):
    """Encoder and all class rows of a package: logits = scale * cos(e, w_c), or w_c . e for a head that isn't normalised.

    The rows are an ordinary parameter, on every worker whole. Raises JobError for a model without classes, or rows
    beyond 512 MiB (then: retraining, LAF, or removing classes, which leave the rows in their shards).
    """

    rows_CD: nn.Parameter

    def __init__(self, package: str | Path) -> None:
        super().__init__()
        spec = check_classifier(Path(package))
        check_whole(Path(package))
        megabytes = spec.num_classes * spec.dim * 4 / 2**20
        if megabytes > DENSE_MB:
            raise JobError(
                f"{spec.num_classes:,} classes of {spec.dim} numbers are {megabytes:.0f} MiB, and this method holds them whole "
                f"on each worker (limit {DENSE_MB:.0f}). Use method.kind retrain, laf or remove_classes."
            )
        self.encoder = load_encoder(Path(package), spec)
        rows = open_rows(package).read(0, spec.num_classes, ["rows"])["rows"].float()
        self.rows_CD = nn.Parameter(rows)
        self.normalized, self.scale = spec.normalized, spec.scale

    def logits(self, emb_BD: Tensor) -> Tensor:
        """(B, C)."""
        if self.normalized:
            return self.scale * F.normalize(emb_BD, dim=1) @ F.normalize(self.rows_CD, dim=1).t()
        return self.scale * emb_BD @ self.rows_CD.t()

    def forward(self, inputs: Any) -> Tensor:
        return self.logits(self.encoder(inputs))

    def forget_everything(self, seed: int) -> Dense:
        """Fresh weights, as a new model has them."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.encoder.load_state_dict(build_encoder(self.encoder.config).state_dict())
            with torch.no_grad():
                self.rows_CD.copy_(torch.randn_like(self.rows_CD) * self.rows_CD.shape[1] ** -0.5)
        return self

    def layers(self) -> list[list[nn.Parameter]]:
        """Parameters layer by layer in the order they were built; the class rows are the last layer."""
        found = [list(m.parameters(recurse=False)) for m in self.encoder.modules()]
        return [*(layer for layer in found if layer), [self.rows_CD]]


def check_classifier(package: Path) -> ModelSpec:
    """The package's spec. Raises JobError unless it is a classifier that ranks by score alone."""
    spec = read_spec(package)
    if not spec.num_classes:
        raise JobError(f"{package}: the model only embeds; unlearning takes a classifier with class rows.")
    if spec.label_form != "single":
        raise JobError(f"{package}: trained on labels of form {spec.label_form}; unlearning takes one class a sample.")
    if spec.bias:
        raise JobError(
            f"{package}: its class rows have a bias; unlearning takes a model trained with a `head` section."
        )
    return spec


def check_whole(package: Path) -> None:
    """Raises JobError for a model that classes were removed from: its rows aren't those of the training set's classes."""
    if "trained_id" in package_classes(package).column_names:
        raise JobError(
            f"{package}: classes were removed from this model. Go back to the version before, and ask for both at once."
        )


def load_encoder(package: Path, spec: ModelSpec | None = None) -> Any:
    """The package's encoder with its weights. Raises DataError for embeddings that aren't of the model's width."""
    spec = spec or read_spec(package)
    with torch.random.fork_rng(devices=[]):
        encoder = build_encoder(spec.encoder, root=package)
    encoder.load_state_dict(load_file(check_file(package, spec, "encoder.safetensors")))
    return encoder


def frozen(module: nn.Module) -> Any:
    """A module that doesn't train: no gradient, evaluation mode for good."""
    module.requires_grad_(False).eval()
    module.train = lambda mode=True: module  # type: ignore[method-assign]
    return module


class Marked(Objective):
    """An objective that knows which samples of a batch are to be forgotten, and averages over all ranks alike.

    Args:
        forget: `.npy` of the hashes of the forgotten samples' keys (`save_hashes`).
    """

    def __init__(self, forget: str) -> None:
        super().__init__()
        self.forget_F: np.ndarray = np.load(forget, allow_pickle=False)
        self.ranks = Ranks()
        self.step = self.total = 0

    def begin(self, step: int, total: int) -> None:
        self.step, self.total = step, total

    def forgotten(self, batch: Batch) -> Tensor:
        """bool (B,): to be forgotten; holes are neither this nor retained."""
        hashes = key_hashes(batch.keys)[0]
        at = np.minimum(np.searchsorted(self.forget_F, hashes), len(self.forget_F) - 1)
        mark = torch.from_numpy(self.forget_F[at] == hashes).to(batch.weight_B.device)
        return mark & (batch.weight_B > 0)

    def mean(self, loss_B: Tensor, mask_B: Tensor) -> Tensor:
        """Mean over the marked samples of all ranks, as the engine's average over ranks has it; 0 of none."""
        weight_B = mask_B.to(loss_B.dtype)
        total = self.ranks.sum_(weight_B.sum().detach().clone())
        return (loss_B * weight_B).sum() * self.ranks.world / total.clamp_min(1)


class Unlearner(Marked):
    """Base: the original model, trainable, with what `predict` and `evaluate` need.

    Args:
        package: folder of the original model.
        forget: hashes of the forgotten keys.
        config: the method.
        seed: of what is drawn.
        classes: forgotten as a whole.
    """

    uses: tuple[bool, bool] = (True, True)
    """Whether it looks at retained and at forgotten samples."""

    def __init__(self, package: str, forget: str, config: Any, seed: int, classes: tuple[int, ...] = ()) -> None:
        super().__init__(forget)
        self.model = Dense(package)
        self.config, self.seed, self.classes, self.package = config, seed, classes, package

    def prepare(self, raw: Any, labels: Any, rng: Any) -> Any:
        return self.model.encoder.prepare(raw, rng)

    def original(self) -> Dense:
        """A frozen copy of the original model."""
        return frozen(Dense(self.package))

    def cross_entropy(self, logits_BC: Tensor, label_B: Tensor, mask_B: Tensor) -> Tensor:
        return self.mean(F.cross_entropy(logits_BC, label_B, reduction="none"), mask_B)

    def forward(self, batch: Batch) -> Losses:
        forget_B = self.forgotten(batch)
        retain_B = ~forget_B & (batch.weight_B > 0)
        return Losses(self.loss(batch, self.model(batch.inputs), batch.labels.single_B, retain_B, forget_B))

    def loss(self, batch: Batch, z_BC: Tensor, y_B: Tensor, r_B: Tensor, f_B: Tensor) -> Tensor:
        """The method: logits, labels, which are retained, which forgotten -> what is minimised."""
        raise NotImplementedError

    @torch.no_grad()
    def evaluate(self, batch: Batch) -> dict[str, Tensor]:
        return {"top1": self.model(batch.inputs).argmax(1) == batch.labels.single_B}


class Method(StrictModel):
    """What every method has."""

    train: TrainConfig | None = Field(None, description="its own budget; default: the job's `train`")


def save_hashes(keys: Sequence[str], path: Path) -> str:
    """Sorted hashes of keys, uint64; returns the path as workers take it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    np.save(path, np.sort(key_hashes(keys)[0]))
    return str(path.resolve())


# --- packages -------------------------------------------------------------------------------------------------


def package_classes(package: Path) -> pa.Table:
    """The label space of a package."""
    with pa.memory_map(str(package / "classes.arrow")) as file:
        return pa.ipc.open_file(file).read_all()


def trained_ids(classes: pa.Table) -> np.ndarray:
    """Which class of the training set each row is, int64 (C,), rising: classes that were removed leave gaps."""
    if "trained_id" not in classes.column_names:
        return np.arange(classes.num_rows)
    return classes.column("trained_id").to_numpy()


def head_start(package: Path, work: Path) -> HeadStart:
    """Lets a sharded head begin with the class rows of a package."""
    spec = read_spec(package)
    path = work / "all-classes.npy"
    path.parent.mkdir(parents=True, exist_ok=True)
    np.save(path, np.arange(spec.num_classes, dtype=np.int64))
    return HeadStart(
        digest=spec.manifest,
        merge="refuse",
        optimizer="fresh",
        kept=spec.num_classes,
        fresh=0,
        dropped=0,
        folder=str(package.resolve()),
        checkpoint=None,
        map_file=str(path.resolve()),
    )


def write_package(
    folder: Path,
    parent: Path,
    encoder: Mapping[str, Tensor] | None = None,
    rows: Tensor | Sequence[Path] | None = None,
    classes: pa.Table | None = None,
) -> Path:
    """A package like `parent` with other weights; what isn't given is the parent's.

    Args:
        encoder: its state.
        rows: class rows (C, D), or files of them named by their range.
        classes: the label space.

    Raises DataError for rows that aren't finite or have no direction.
    """
    spec = read_spec(parent)
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    if isinstance(rows, Tensor):
        rows = rows.detach().float()
        if not bool(torch.isfinite(rows).all()):
            raise DataError("the class rows aren't finite: the method diverged. Lower its learning rate or its steps.")
        if spec.normalized:
            rows = F.normalize(rows, dim=1)
        save_file({"rows": rows.contiguous()}, folder / f"rows-00000000-{len(rows):08d}.safetensors")
    else:
        given = [parent / shard.file for shard in spec.shards] if rows is None else rows
        for file in given:
            second_name(file, folder / file.name)
    module = build_encoder(spec.encoder, root=parent)
    state = load_file(parent / "encoder.safetensors") if encoder is None else encoder
    write_model(
        folder,
        encoder=module,
        input_kind=spec.input,
        input_shape=spec.shape,
        predictor=spec.predictor,
        classes=package_classes(parent) if classes is None else classes,
        state={name: state[name] for name in module.state_dict()},
        normalized=spec.normalized,
        prior=spec.prior,
        scale=spec.scale,
        label_form=spec.label_form,
        manifest_digest=spec.manifest,
        code_version=__version__,
        extra=spec.extra,
    )
    return folder


def package_fit(
    folder: Path, fitted: Fitted, data: Manifest, encoder: Any, head: HeadConfig, extra: Mapping[str, Any]
) -> Path:
    """The package of a classifier fresh from training."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    for entry in fitted.head_shards("classes"):
        second_name(fitted.folder / "export" / "head-classes" / entry["file"], folder / entry["file"])
    kind: Any = data.fields[encoder.field].kind
    bare = pa.table({"name": [str(i) for i in range(data.label.num_classes or 0)]})
    write_model(
        folder,
        encoder=build_encoder(encoder),
        input_kind=kind,
        input_shape=data.fields[encoder.field].shape if kind == "array" else None,
        classes=data.load_classes() if data.classes else bare,
        state=fitted.dense("encoder."),
        normalized=head.normalize,
        scale=head.scale,
        label_form=data.label.form,
        manifest_digest=data.digest,
        code_version=__version__,
        extra=extra,
    )
    return folder


def register_version(
    run: Run, folder: Path, name: str, made: Stage, tags: dict[str, str], parents: Sequence[str] = ()
) -> dict[str, Any]:
    """Stage: the registry entry of the package that another stage left."""
    version = registry.register(run.tracker, made.folder / made["package"], name, tags=tags, parents=parents)
    run.progress.line(f"registered {name} version {version}, alias candidate")
    return {"name": name, "version": str(version)}
