"""One interface for every method: unlearn(model, retain, forget, budget) -> model.

Models are package folders (`labelmill.tracking.model`), data are streams with masks, the budget is a `train` section.
"""

from __future__ import annotations

import shutil
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from labelmill.data.choose import keep_classes, keep_keys
from labelmill.data.deletion import unlabelled
from labelmill.data.mix import Mix
from labelmill.data.selection import KeepRows
from labelmill.data.shards import read_labels
from labelmill.data.spec import AnySpec, MixedSpec, StreamSpec
from labelmill.errors import JobError
from labelmill.evaluation.forgetting import rewind
from labelmill.heads.config import HeadConfig
from labelmill.job import validate_section
from labelmill.run import Run
from labelmill.stages import Fitted
from labelmill.tracking.model import ModelSpec, read_spec
from labelmill.training.checkpoint_files import complete, read_dense
from labelmill.training.config import TrainConfig
from workloads.discrimination.partial_fc import Classifier
from workloads.unlearning import laf
from workloads.unlearning.fisher import Fisher
from workloads.unlearning.methods import UNLEARNERS, Finetune, LastLayers, Retrain
from workloads.unlearning.model import check_classifier, check_whole, save_hashes, write_package
from workloads.unlearning.sisa import forget_slices


def unlearn(
    run: Run,
    folder: Path,
    model: Path,
    retain: StreamSpec,
    forget: StreamSpec,
    method: Any,
    budget: TrainConfig,
    seed: int,
    classes: tuple[int, ...] = (),
    held_out: StreamSpec | None = None,
) -> tuple[Path, float]:
    """Makes of a model one that forgets.

    Args:
        folder: for everything that is made on the way; the new model is `folder/model`.
        model: package folder of the original.
        retain, forget: streams over one manifest with masks that exclude each other.
        method: a section of `methods.MethodConfig`.
        budget: how long and how fast it trains; `method.train` goes first.
        classes: forgotten as a whole.
        held_out: unseen samples of the forgotten ones' classes, for SCRUB+R.

    Returns the package folder and the seconds of training. Raises JobError and DataError for what a method can't work with.
    """
    folder.mkdir(parents=True, exist_ok=True)
    check_classifier(model)
    if not isinstance(method, laf.LafConfig):  # which touches no row
        check_whole(model)
    _disjoint(retain, forget)
    config: TrainConfig = method.train or budget
    if isinstance(method, Retrain):
        config = method.train or recipe(read_spec(model))[1] or budget
    if config.zero_stage == 3:
        raise JobError("unlearning keeps frozen copies of whole models: use zero_stage 0, 1 or 2")
    keys = save_hashes(keys_of(forget), folder / "forget.npy")
    if isinstance(method, Retrain) and read_spec(model).encoder["kind"] == "ensemble":
        made, measured = forget_slices(run, folder, model, retain)
        return made, measured["seconds"]
    if isinstance(method, Retrain):
        return retrain(run, folder, model, retain, config, seed)
    if isinstance(method, laf.LafConfig):
        return _laf(run, folder, model, retain, forget, method, config, seed, keys)
    kind = UNLEARNERS[method.kind]
    stream = stream_of(retain, forget, kind.uses, config.global_batch)
    if isinstance(method, Fisher):  # weights stay until the end
        config = config.model_copy(update={"zero_stage": 0, "precision": "fp32", "weight_decay": 0.0})
    rewinds = bool(getattr(method, "rewind", False))
    if rewinds:
        if held_out is None:
            raise JobError("method.rewind compares with held-out samples of the forgotten classes: there are none.")
        steps = config.total_steps(stream.epoch_samples)
        config = config.model_copy(update={"checkpoint_every": max(2, steps // 10), "keep_checkpoints": 20})
    objective = partial(kind, str(model.resolve()), keys, method, seed, classes)
    fitted = run.fit(folder / "fit", objective, stream, config, seed=seed)
    state = fitted.dense("model.")
    if rewinds:
        assert held_out is not None
        state = _rewound(run, folder, model, forget, held_out, state)
    seconds = fitted.seconds.get("train", 0.0)
    encoder = {k.removeprefix("encoder."): v for k, v in state.items() if k.startswith("encoder.")}
    return write_package(folder / "model", model, encoder, state["rows_CD"]), seconds


def keys_of(spec: StreamSpec) -> list[str]:
    """Keys of the samples that a stream with a mask gives."""
    assert isinstance(spec.selection, KeepRows)
    found: list[str] = []
    for i in range(len(spec.manifest.shards)):
        mask = spec.selection.mask(i)
        if mask.any():
            keys = read_labels(spec.manifest, i).column("key").to_pylist()
            found += [key for key, here in zip(keys, mask, strict=True) if here]
    return found


def _disjoint(retain: StreamSpec, forget: StreamSpec) -> None:
    for name, spec in (("retain", retain), ("forget", forget)):
        if not isinstance(spec.selection, KeepRows):
            raise JobError(f"the {name} stream needs a mask over its samples (data.deletion.resolve makes both)")
    assert isinstance(retain.selection, KeepRows)
    assert isinstance(forget.selection, KeepRows)
    if retain.manifest.digest != forget.manifest.digest:
        raise JobError(
            "retained and forgotten samples must come from one data set, the one that the model was trained on"
        )
    for i in range(len(retain.manifest.shards)):
        if (retain.selection.mask(i) & forget.selection.mask(i)).any():
            raise JobError(f"some samples of {retain.manifest.shard_path(i)} are both retained and forgotten")


def stream_of(
    retain: StreamSpec, forget: StreamSpec, uses: tuple[bool, bool], batch: int, share: float | None = None
) -> AnySpec:
    """The stream a method trains on; with both kinds of samples each global batch holds fixed numbers of them.

    Args:
        share: of forgotten samples in a batch; by default as in the data, at least one. Never more than there are.
    """
    if uses == (True, False):
        return replace(retain, global_batch=batch)
    if uses == (False, True):
        return replace(forget, global_batch=batch)
    if batch < 2:
        raise JobError("train.global_batch must be at least 2: a batch holds retained and forgotten samples.")
    few, many = forget.epoch_samples, retain.epoch_samples
    wanted = round(batch * (few / (few + many) if share is None else share))
    number = max(1, min(wanted, few, batch - 1))
    # an epoch is one of the first part
    if share is None:
        parts, numbers = (retain, forget), [batch - number, number]
    else:
        parts, numbers = (forget, retain), [number, batch - number]
    return MixedSpec(parts, Mix(numbers), batch)


# --- retraining -------------------------------------------------------------------------------------------------


def recipe(spec: ModelSpec) -> tuple[HeadConfig, TrainConfig | None]:
    """Head and `train` section of the job that made a model; a plain head and None where it isn't known."""
    job = spec.extra.get("job") or {}
    plain = HeadConfig(normalize=spec.normalized, scale=spec.scale)
    head = validate_section(job["head"], HeadConfig, "the model's job: head") if "head" in job else plain
    train = validate_section(job["train"], TrainConfig, "the model's job: train") if "train" in job else None
    return head.model_copy(update={"initial": None, "shards": None}), train


def retrain(
    run: Run, folder: Path, model: Path, retain: StreamSpec, config: TrainConfig, seed: int
) -> tuple[Path, float]:
    """From scratch on the retained samples, with the head and the encoder of the original's job."""
    from labelmill.encoders import build_encoder

    spec = read_spec(model)
    head, _ = recipe(spec)
    encoder: Any = build_encoder(spec.encoder, root=model).config
    objective = partial(Classifier, encoder, head, spec.num_classes, seed)
    fitted = run.fit(folder / "fit", objective, retain, config, augment=True, seed=seed)
    return package_of(fitted, folder / "model", model), fitted.seconds.get("train", 0.0)


def package_of(fitted: Fitted, folder: Path, parent: Path) -> Path:
    """The package of a fitted `Classifier`, with everything but the weights as in `parent`."""
    files = [fitted.folder / "export" / "head-classes" / entry["file"] for entry in fitted.head_shards("classes")]
    return write_package(folder, parent, fitted.dense("encoder."), files)


# --- LAF --------------------------------------------------------------------------------------------------------


def _laf(
    run: Run,
    folder: Path,
    model: Path,
    retain: StreamSpec,
    forget: StreamSpec,
    method: laf.LafConfig,
    config: TrainConfig,
    seed: int,
    keys: str,
) -> tuple[Path, float]:
    bare = unlabelled(retain.manifest)
    run.progress.line("labels are dropped: the method doesn't see them")
    # the masks were made with labels and say nothing of them
    u, s = replace(forget, manifest=bare), replace(retain, manifest=bare)
    both = (retain.selection.mask(i) | forget.selection.mask(i) for i in range(len(bare.shards)))  # type: ignore[union-attr]
    folder.mkdir(parents=True, exist_ok=True)
    all_rows = KeepRows.of(both, bare.digest).save(str((folder / "all.arrow").resolve()))
    whole = replace(s, selection=all_rows, shuffle=False, global_batch=1024)
    stream = stream_of(s, u, (True, True), config.global_batch, share=0.5)
    seconds = 0.0
    data = laf.embed(run, folder / "embed", model, whole, config)
    dim = read_spec(model).dim
    vaes = {}
    for name, selection in (("all", None), ("forget", _among(data, forget))):
        spec = StreamSpec(data, laf.FIELD, method.vae_batch, seed=seed, selection=selection)
        vae_config = TrainConfig(
            global_batch=method.vae_batch,
            epochs=method.vae_epochs,
            learning_rate=method.vae_rate,
            schedule="constant",
            warmup=0.0,
            zero_stage=0,
            log_every=200,
        )
        vae = run.fit(folder / f"vae-{name}", partial(laf.FitVae, dim, method, seed), spec, vae_config, seed=seed)
        seconds += vae.seconds.get("train", 0.0)
        vaes[name] = str((folder / f"vae-{name}").resolve())
    objective = partial(
        laf.Laf, str(model.resolve()), keys, method, vaes["all"], vaes["forget"], config.global_batch, seed
    )
    # an epoch is a pass over the forgotten samples, and each batch is for two turns
    steps = 2 * config.total_steps(stream.epoch_samples) if config.steps is None else config.steps
    turns = config.model_copy(update={"epochs": None, "steps": steps})
    fitted = run.fit(folder / "fit", objective, stream, turns, seed=seed)
    seconds += fitted.seconds.get("train", 0.0)
    made = write_package(folder / "model", model, fitted.dense("encoder."))
    if method.repair is None:
        return made, seconds
    repair: Any = Finetune() if method.repair_layers == 0 else LastLayers(k=method.repair_layers)
    shutil.rmtree(folder / "before-repair", ignore_errors=True)
    made.rename(folder / "before-repair")
    made, more = unlearn(run, folder / "repair", folder / "before-repair", retain, forget, repair, method.repair, seed)
    return Path(shutil.copytree(made, folder / "model")), seconds + more


def _among(data: Any, forget: StreamSpec) -> KeepRows:
    """The forgotten samples' rows of the embeddings, by key."""
    return keep_keys(data, keys_of(forget))


# --- SCRUB+R ----------------------------------------------------------------------------------------------------


def _rewound(
    run: Run, folder: Path, model: Path, forget: StreamSpec, held_out: StreamSpec, last: dict[str, torch.Tensor]
) -> dict[str, torch.Tensor]:
    """The checkpoint whose error on forgotten samples is nearest to the last one's error on held-out samples."""
    from workloads.unlearning.audit import error_of

    states = [
        {k.removeprefix("model."): v for k, v in read_dense(path).items() if k.startswith("model.")}
        for path in complete(folder / "fit" / "checkpoints")
    ]
    wanted = error_of(model, last, same_classes(held_out, forget))
    errors = [error_of(model, state, forget) for state in states]
    chosen = rewind(errors, wanted)
    shown = ", ".join(f"{e:.3f}" for e in errors)
    run.progress.line(f"rewind: errors on the forgotten samples {shown}; held-out {wanted:.3f}: number {chosen + 1}")
    return states[chosen]


def same_classes(held_out: StreamSpec, forget: StreamSpec) -> StreamSpec:
    """The held-out samples of the forgotten ones' classes. Raises DataError when there are none."""
    assert isinstance(forget.selection, KeepRows)
    found = set[int]()
    for i in range(len(forget.manifest.shards)):
        label_B = read_labels(forget.manifest, i).column("label").to_numpy()
        found |= set(label_B[forget.selection.mask(i)].tolist())
    mask = keep_classes(held_out.manifest, found)
    if not isinstance(held_out.selection, KeepRows):
        return replace(held_out, selection=mask)
    both = (mask.mask(i) & held_out.selection.mask(i) for i in range(len(mask.shard_samples)))
    return replace(held_out, selection=KeepRows.of(both, mask.data))
