"""Unlearning for real, small: all methods side by side, and a request from its file to the audited champion."""

from __future__ import annotations

import io
import math
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import yaml
from rich.console import Console

from labelmill import api
from labelmill.data.labels import LabelSpec
from labelmill.data.manifest import FieldSpec
from labelmill.data.selection import load_selection
from labelmill.data.writer import ShardWriter

CLASSES, WIDTH = 4, 8


def blobs(folder: Path, count: int, seed: int) -> Path:
    """Points around four centres, in a wide space: easy to tell apart, easy to remember."""
    rng = np.random.default_rng(seed)
    centres = np.eye(CLASSES, WIDTH) * 3
    fields = {"x": FieldSpec(kind="array", ext="npy", shape=(WIDTH,), dtype="float32")}
    label = LabelSpec(form="single", num_classes=CLASSES)
    with ShardWriter(folder, f"blobs{seed}", fields, label, layout="packed", samples_per_shard=150) as writer:
        for i in range(count):
            x = centres[i % CLASSES] + rng.normal(size=WIDTH)
            writer.write(f"user-{i % 10}/s{i:05d}", {"x": x.astype(np.float32)}, {"label": i % CLASSES})
        writer.close(classes=pa.table({"name": ["north", "east", "south", "west"]}))
    return folder


SMALL: dict[str, Any] = {
    "cluster": {"in_process": True},
    "encoder": {"kind": "linear", "field": "x", "in_dim": WIDTH, "dim": 6},
    "head": {"scale": 8.0, "optimizer": {"kind": "adamw", "weight_decay": 0.0}},
    "train": {"global_batch": 32, "epochs": 8, "learning_rate": 0.01, "log_every": 50, "zero_stage": 0},
}
BUDGET = {"global_batch": 32, "epochs": 6, "learning_rate": 0.03, "log_every": 50, "zero_stage": 0}


def run(folder: Path, job: dict[str, Any]) -> tuple[Any, str]:
    path, text = folder / f"{job['name']}.yaml", io.StringIO()
    path.write_text(yaml.safe_dump({"output": str(folder / "runs"), **job}))
    return api.run(path, console=Console(file=text, width=200)), text.getvalue()


METHODS: dict[str, Any] = {
    "finetune": {"kind": "finetune"},
    "ascent": {"kind": "ascent", "train": BUDGET | {"learning_rate": 0.01}},
    "neggrad_plus": {"kind": "neggrad_plus", "alpha": 0.7},
    "random_labels": {"kind": "random_labels"},
    "boundary_shrink": {"kind": "boundary_shrink", "step": 1.0, "train": BUDGET | {"learning_rate": 0.01}},
    "bad_teacher": {"kind": "bad_teacher"},
    "scrub": {"kind": "scrub"},
    "dampening": {"kind": "dampening", "alpha": 1.2, "train": BUDGET | {"epochs": 1}},
    "eu": {"kind": "last_layers", "k": 2, "fresh": True},
    "unsir": {"kind": "unsir", "noise": 8, "noise_steps": 10},
    "laf": {
        "kind": "laf",
        "latent": 2,
        "vae_epochs": 3,
        "train": BUDGET | {"epochs": 10, "learning_rate": 0.01, "schedule": "constant"},
        "repair": BUDGET | {"epochs": 1},
        "repair_layers": 0,
    },
}


RELEARN = BUDGET | {"epochs": None, "steps": 40, "learning_rate": 0.01, "evaluate_every": 2}


def test_all_methods_beside_retraining(tmp_path: Path) -> None:
    job = SMALL | {
        "workload": "unlearning.compare",
        "name": "all",
        "data": {
            "train": str(blobs(tmp_path / "train", 400, 0)),
            "test": str(blobs(tmp_path / "test", 200, 1)),
        },
        "task": {"kind": "class", "ids": [0]},
        "seeds": [0],
        "methods": METHODS,
        "budget": BUDGET,
        "audit": {"samples": 200, "splits": 1, "attacks": ["threshold", "logistic"], "shadows": 2, "relearn": RELEARN},
    }
    report, _ = run(tmp_path, job)
    found = report.metrics
    assert found["original/train_f"] > 90
    assert found["retrain/train_f"] < 20
    assert found["retrain/gap"] == found["retrain/js_to_retrain"] == 0
    assert {row[0] for row in report.tables["versions"].rows} == {"original", "retrain", *METHODS}
    for name in ("finetune", "neggrad-plus", "random-labels", "eu", "scrub"):
        assert found[f"{name}/train_f"] < 30, name
    for name in ("ascent", "boundary-shrink", "bad-teacher", "unsir", "laf"):
        assert found[f"{name}/train_f"] < found["original/train_f"] - 20, name
    assert found["dampening/train_f"] < found["original/train_f"]
    for name in METHODS:
        assert found[f"{name.replace('_', '-')}/test_r"] > 70, name
    assert 0 <= found["bad-teacher/zrf"] <= 1
    assert 20 < found["retrain/mia_lira_auc"] < 80
    assert not any(math.isnan(value) for value in report.metrics.values())
    assert found["original/relearn"] == 2, "it knows them: at the first look"
    assert found["retrain/relearn"] > 2, "it has to learn them first"
    assert "relearn" in report.tables["versions"].columns


@pytest.mark.slow
def test_shadow_models_are_trials_of_ray_tune(tmp_path: Path) -> None:
    """On a Ray cluster the shadow models come from a search, and their answers are those of trainings in process."""
    job = SMALL | {
        "workload": "unlearning.compare",
        "data": {"train": str(blobs(tmp_path / "train", 400, 0)), "test": str(blobs(tmp_path / "test", 200, 1))},
        "task": {"kind": "random", "ids": [0, 1], "rate": 0.4},
        "seeds": [0],
        "methods": {"finetune": {"kind": "finetune"}},
        "budget": BUDGET,
        "audit": {"samples": 200, "splits": 1, "attacks": ["threshold"], "shadows": 3},
        "tracking": {"system_metrics": False},
    }
    here, _ = run(tmp_path, job | {"name": "here"})
    ray, text = run(tmp_path, job | {"name": "ray", "cluster": {"workers": 1, "read_cpus": 0.25}})
    assert "3 trainings, by Ray Tune" in text
    trials = sorted((tmp_path / "runs" / "ray-shadows-s0" / "search" / "trials").iterdir())
    assert len(trials) == 3
    for name in ("original", "retrain", "finetune"):
        for measure in ("mia_lira_auc", "mia_lira_tpr"):
            assert ray.metrics[f"{name}/{measure}"] == pytest.approx(here.metrics[f"{name}/{measure}"], abs=0.5)


# --- the registry flow -----------------------------------------------------------------------------------------------


def registered(folder: Path, more: dict[str, Any] | None = None) -> dict[str, Any]:
    """A registered classifier over blobs, champion of `blobs`; `more`: sections of its job."""
    job = (
        SMALL
        | (more or {})
        | {
            "workload": "discrimination.partial_fc",
            "name": "original",
            "data": {"train": str(blobs(folder / "train", 400, 0)), "test": str(blobs(folder / "test", 200, 1))},
            "register_as": "blobs",
        }
    )
    run(folder, job)
    api.promote("blobs", output=folder / "runs")
    return {
        "workload": "unlearning.forget",
        "name": "forget",
        "model": "blobs",
        "cluster": {"in_process": True},
        "method": {"kind": "scrub", "rewind": True},
        "train": BUDGET,
        "audit": {"samples": 200, "splits": 1, "attacks": ["threshold"]},
    }


def test_from_a_request_to_the_audited_champion(tmp_path: Path) -> None:
    from labelmill.data.deletion import contains
    from labelmill.errors import DataError, JobError, TrackingError
    from labelmill.job import TrackingConfig
    from labelmill.tracking import promotion, registry
    from labelmill.tracking.requests import forgotten

    config, output = TrackingConfig(), tmp_path / "runs"
    job = registered(tmp_path)
    (tmp_path / "ids.txt").write_text("".join(f"user-7/s{i:05d}\n" for i in range(7, 400, 20)))
    by_user = {"kind": "where", "all": [{"field": "key", "glob": "user-7/*"}, {"field": "label", "equals": 3}]}
    report, text = run(tmp_path, job | {"request": {"kind": "ids", "file": str(tmp_path / "ids.txt")}})
    assert "registered blobs version 2, alias candidate" in text
    assert report.metrics["request/samples"] == 20
    assert "rewind: errors on the forgotten samples" in text
    assert {"parent", "scrub", "retrain"} <= set(report.tables["audit"].columns)
    measures = [row[0] for row in report.tables["audit"].rows]
    assert {"train_r", "train_f", "test_r", "gap", "js_to_retrain", "zrf", "time", "mia_threshold"} <= set(measures)
    assert report.metrics["audit/test_r"] > 80

    new = registry.resolve(config, output, "blobs@candidate")
    assert new.version == 2
    assert new.parents == ("blobs/1",)
    assert new.tags["labelmill.method"] == "scrub"
    assert float(new.tags["audit.test_r"]) == pytest.approx(report.metrics["audit/test_r"], abs=0.01)
    assert [v.version for _, v in promotion.lineage(config, output, "blobs@candidate")] == [2, 1]
    found, digest = forgotten(config, output, "blobs/2", ["user-7/s00007", "user-7/s00017"])
    assert found == {"user-7/s00007": True, "user-7/s00017": False}
    assert digest == new.tags["labelmill.request"] == report.meta["request"]
    (kept,) = (output / "forget" / "stages").glob("request-*/request")
    assert contains(kept, ["user-7/s00027"], digest) == {"user-7/s00027": True}
    with pytest.raises(TrackingError, match="doesn't answer a deletion request"):
        forgotten(config, output, "blobs/1", ["a"])

    # the old version ends, the new one takes its place
    with pytest.raises(TrackingError, match="is the champion: name the version"):
        promotion.revoke(config, output, "blobs/1")
    with pytest.raises(TrackingError, match="as well"):
        promotion.revoke(config, output, "blobs/1", champion=1)
    old, champion = promotion.revoke(config, output, "blobs/1", champion="candidate", why="request")
    assert champion == 2
    assert old.revoked.endswith("request")
    assert promotion.revoke(config, output, "blobs/1", champion=2)[0].revoked == old.revoked, "again changes nothing"
    x = [[3.0] + [0.0] * (WIDTH - 1)]
    assert api.predict("blobs", x, k=1, output=output)["class"].tolist() == ["north"]
    for refused in (
        lambda: api.predict("blobs/1", x, k=1, output=output),
        lambda: api.promote("blobs", "1", output=output),
        lambda: promotion.rollback(config, output, "blobs"),
        lambda: api.predict_data("blobs/1", tmp_path / "test", tmp_path / "out", output=output),
        lambda: api.serve("blobs/1", output=output).__enter__(),
        lambda: run(tmp_path, job | {"name": "late", "model": "blobs/1", "request": by_user}),
    ):
        with pytest.raises(TrackingError, match=r"was revoked|no champion before"):
            refused()

    # any versions beside each other, the revoked one excepted
    audit = {
        "workload": "unlearning.audit",
        "name": "audit",
        "request": {"kind": "ids", "file": str(tmp_path / "ids.txt")},
    }
    audit |= {"models": ["blobs/2"], "audit": job["audit"] | {"relearn": RELEARN}, "cluster": job["cluster"]}
    found = run(tmp_path, audit)[0].metrics
    assert found["blobs-2/test_r"] == pytest.approx(report.metrics["audit/test_r"])
    assert found["blobs-2/relearn"] >= 2
    with pytest.raises(JobError, match="none of the models"):
        run(tmp_path, audit | {"reference": "blobs/1"})

    # the next request, against the new version: a whole class by its rows alone, no data set named
    whole = {"kind": "classes", "ids": [3]}
    removal = {"kind": "remove_classes", "repair": 6, "neighbours": 1}
    report, _ = run(tmp_path, job | {"name": "class", "request": whole, "method": removal, "reference": False})
    answers = api.predict("blobs@candidate", np.eye(WIDTH)[:CLASSES] * 3, k=3, output=output)
    assert set(answers["class"]) == {"north", "east", "south"}
    assert report.metrics["audit/train_f"] == report.metrics["audit/test_f"] == 0
    assert report.metrics["audit/test_r"] > 85
    third = registry.resolve(config, output, "blobs@candidate")
    assert third.parents == ("blobs/2",)
    # it also answers for the request before, whose samples didn't come back
    assert forgotten(config, output, "blobs/3", ["user-7/s00007", "user-3/s00003", "user-1/s00001"])[0] == {
        "user-7/s00007": True,
        "user-3/s00003": True,
        "user-1/s00001": False,
    }
    (made,) = (output / "class" / "stages").glob("request-*")
    # the 20 of the first request are of class 3 as well
    assert [load_selection(str(made / f"{name}.arrow")).samples for name in ("forget", "retain")] == [80, 300]

    # what can't be done is said before anything trains
    other_user = {"kind": "where", "all": [{"field": "key", "glob": "user-3/*"}]}
    for wrong, error, message in (
        ({"request": {"kind": "ids", "file": "nowhere.txt"}}, JobError, "nowhere.txt: no such file"),
        ({"request": {"kind": "classes", "ids": [0, 1, 2, 3]}}, DataError, "all 380 samples"),
        ({"request": whole, "model": "blobs/3"}, DataError, "has forgotten before"),
        (
            {"request": whole | {"ids": [2]}, "model": "blobs/3", "method": {"kind": "retrain"}},
            JobError,
            "classes were removed",
        ),
        ({"request": other_user, "method": {"kind": "unsir"}}, JobError, "no class is forgotten whole"),
        ({"request": by_user}, DataError, "has forgotten before"),
        ({"request": other_user, "data": {"train": str(tmp_path / "test")}}, DataError, "not the train data"),
    ):
        with pytest.raises(error, match=message):
            run(tmp_path, job | {"name": "wrong"} | wrong)


@pytest.mark.slow
def test_laf_leaves_the_shards_of_a_head_alone(tmp_path: Path) -> None:
    """Two Ray workers hold half of the classes each; LAF and its audit run on them, and the row files stay as they are."""
    cluster = {"cluster": {"workers": 2, "cpus_per_worker": 0.5, "read_cpus": 0.25}}
    job = registered(tmp_path, cluster)
    method = {"latent": 2, "vae_epochs": 3, "temperature": 1.0}
    train = BUDGET | {"epochs": 20, "schedule": "constant", "zero_stage": 2}
    laf = {"workload": "unlearning.laf", "method": method, "train": train, "request": {"kind": "classes", "ids": [0]}}
    report, text = run(tmp_path, job | laf | cluster | {"reference": False})
    assert "labels are dropped" in text
    (made,) = (tmp_path / "runs" / "forget" / "stages").glob("forget-*")
    (parent,) = (tmp_path / "runs" / "forget" / "stages").glob("parent-*")
    rows = sorted(path.name for path in (parent / "model").glob("rows-*.safetensors"))
    assert len(rows) == 2, "a file a worker"
    for name in rows:
        assert (made / "model" / name).read_bytes() == (parent / "model" / name).read_bytes()
    encoder = "encoder.safetensors"
    assert (made / "model" / encoder).read_bytes() != (parent / "model" / encoder).read_bytes()
    names = {column: i for i, column in enumerate(report.tables["audit"].columns)}
    before = {row[0]: row[names["parent"]] for row in report.tables["audit"].rows}
    assert report.metrics["audit/train_f"] < before["train_f"] - 50
    assert report.metrics["audit/test_r"] > 60


def test_the_walk_through_of_the_readme(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every command of it, in one process: starting Python a dozen times costs more than what they do."""
    import re
    import shlex

    from typer.testing import CliRunner

    from labelmill.cli import app

    text = (Path(__file__).resolve().parents[2] / "workloads" / "unlearning" / "README.md").read_text()
    part = text[text.index("## A request, from") : text.index("## `unlearning.forget`")]
    monkeypatch.chdir(tmp_path)
    said = ""
    for block in re.findall(r"```bash\n(.*?)```", part, re.DOTALL):
        for name, _, content, command in re.findall(
            r"cat > (\S+) <<'(\w+)'\n(.*?)\n\2\n|^(labelmill [^\n]*)$", block, re.DOTALL | re.MULTILINE
        ):
            if name:
                Path(name).write_text(content + "\n")
                continue
            words = shlex.split(command)[1:]
            done = CliRunner().invoke(app, words)
            assert done.exit_code == 0, f"{words}\n{done.output}\n{done.exception!r}"
            said += done.output
    revoked = "tickets/1 is revoked; champion is version 2"
    for line in ("registered tickets version 2", "parent models", "bob-2: forgotten", revoked):
        assert line in said, said
