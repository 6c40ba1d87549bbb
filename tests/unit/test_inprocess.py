"""A job that trains in its own process: no Ray for fits and passes, and the same result as elsewhere."""

from __future__ import annotations

import io
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from labelmill.data.config import DataConfig, StreamConfig
from labelmill.data.importers import import_table
from labelmill.data.manifest import Manifest
from labelmill.encoders import CharNgramsConfig
from labelmill.errors import JobError
from labelmill.execution import execute
from labelmill.heads.config import HeadConfig
from labelmill.job import ClusterConfig, TrackingConfig, validate_section
from labelmill.losses.classification import MultiSoftmax, Softmax
from labelmill.run import Run
from labelmill.stages import Fitted
from labelmill.training.config import TrainConfig, TrainJob
from labelmill.training.objective import Objective
from labelmill.training.passes import load_embeddings
from workloads.discrimination.partial_fc import PartialFCJob, partial_fc, ranked_classes
from workloads.noisy.ldr import RobustClassifier

ENCODER = CharNgramsConfig(dim=8, buckets=256, hidden=8)


class Nothing(Objective):
    """No weights at all."""

    def prepare(self, raw: Any, labels: Any, rng: Any) -> torch.Tensor:
        return torch.zeros(len(raw), 1)


def job_of(tmp_path: Path) -> TrainJob:
    return TrainJob(
        workload="w",
        name="j",
        output=tmp_path / "runs",
        tracking=TrackingConfig(system_metrics=False),
        cluster=ClusterConfig(in_process=True),
        train=TrainConfig(global_batch=30, epochs=20, learning_rate=0.02),
    )


def test_an_encoder_without_weights_cannot_be_trained(make_text_data: Callable[..., Manifest], tmp_path: Path) -> None:
    stream = StreamConfig().stream(make_text_data(30, 30, classes=3), "text", 30)

    def method(job: TrainJob, run: Run) -> None:
        run.fit(tmp_path / "fit", Nothing, stream, job.train)

    with pytest.raises(JobError, match="the encoder has no weights"):
        execute(job_of(tmp_path), method, console=Console(file=io.StringIO()))


def test_fits_and_passes_run_here(
    make_text_data: Callable[..., Manifest], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import ray

    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("Ray was asked for")

    # another test's session may be up in this process
    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    for name in ("init", "remote", "put"):
        monkeypatch.setattr(ray, name, refuse)
    data = make_text_data(90, 30, classes=3)
    stream = StreamConfig().stream(data, "text", 30)

    def fit_stage(run: Run, folder: Path) -> dict[str, Any]:
        build = partial(RobustClassifier, ENCODER, Softmax(), data)
        seconds = run.fit(folder / "fit", build, stream, run.job.train, predict={"all": stream}).seconds  # type: ignore[attr-defined]
        run.embed(folder / "emb", data, ENCODER, Fitted(folder / "fit").dense("encoder."))
        return {"train": seconds["train"]}

    def method(job: TrainJob, run: Run) -> None:
        fit = run.stage("fit", fit_stage)
        emb_ND, valid_N = load_embeddings(fit.folder / "emb")
        assert emb_ND.shape == (90, 8)
        assert bool(valid_N.all())
        fitted = Fitted(fit.folder / "fit")
        assert sorted(fitted.predictions("all")["key"].to_pylist()) == [f"s{i:05d}" for i in range(90)]
        losses = [record["train/loss"] for record in fitted.history]
        run.report.metrics["fell"] = losses[0] - losses[-1]

    report = execute(job_of(tmp_path), method, console=Console(file=io.StringIO()))
    assert report.metrics["fell"] > 0.1


@pytest.mark.parametrize("other", [{"workers": 2}, {"address": "auto"}])
def test_in_process_is_one_worker_alone(other: dict[str, Any]) -> None:
    with pytest.raises(JobError, match="in_process trains in the calling process alone"):
        validate_section({"in_process": True, **other}, ClusterConfig, "job")


def test_samples_of_several_labels_are_kept_to_the_widest(tmp_path: Path) -> None:
    """Batches of a prediction differ in how many labels a sample has at most."""
    colours = ("red", "green", "blue", "pink")
    rows = [[colours[i % 4], *([colours[(i + 1) % 4], colours[(i + 2) % 4]] if i == 39 else [])] for i in range(40)]
    table = tmp_path / "table.csv"
    table.write_text("key,text,tags\n" + "".join(f"k{i:02d},{' '.join(r)},{'|'.join(r)}\n" for i, r in enumerate(rows)))
    columns = {"text_column": "text", "label_column": "tags", "key_column": "key"}
    import_table(table, tmp_path / "data", label_form="multi", separator="|", **columns)  # type: ignore[arg-type]
    job = PartialFCJob(
        workload="discrimination.partial_fc",
        name="j",
        output=tmp_path / "runs",
        tracking=TrackingConfig(system_metrics=False),
        cluster=ClusterConfig(in_process=True),
        data=DataConfig(train=str(tmp_path / "data"), test=str(tmp_path / "data")),
        encoder=ENCODER,
        head=HeadConfig(loss=MultiSoftmax()),
        train=TrainConfig(global_batch=20, epochs=2),
        eval_batch=4,
    )
    kept: list[tuple[int, ...]] = []

    def method(job: PartialFCJob, run: Run) -> None:
        partial_fc.run(job, run)
        kept.extend(tuple(sorted(row)) for row in ranked_classes(run.stages[0])[2].tolist())

    execute(job, method, console=Console(file=io.StringIO()))
    assert sorted(len([label for label in row if label >= 0]) for row in kept) == [1] * 39 + [3]
    assert {len(row) for row in kept} == {3}
