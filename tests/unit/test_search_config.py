"""The search section: what it means, what is refused before anything starts, how many trials fit."""

from __future__ import annotations

import copy
import json
import random
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml

from labelmill import api
from labelmill.errors import ClusterError, JobError
from labelmill.job import ClusterConfig
from labelmill.search_config import SearchConfig
from labelmill.tuning.capacity import DRIVER_CPUS, concurrent_trials, trial_resources
from labelmill.tuning.check import changeable_fields, is_changeable
from labelmill.tuning.follow import Follow, StopOnFile
from labelmill.tuning.pointer import Pointer, keep, place, sweep
from labelmill.tuning.search import _secrets, _without_secrets
from labelmill.tuning.space import draw, value_of, with_values
from labelmill.tuning.state import SearchFolder, append_line, read_lines, read_record, write_outcome
from labelmill.tuning.trial import MetricError, Watch
from labelmill.workload import find_workload

EXAMPLE = Path(__file__).resolve().parents[2] / "workloads/discrimination/jobs/spelling-search.yaml"
ASHA = {"kind": "asha", "grace_steps": 10}
PBT = {"kind": "pbt", "interval_steps": 10}
RATE = {"kind": "log_uniform", "low": 0.001, "high": 0.1}


def written(**changes: Any) -> dict[str, Any]:
    """The example job with other fields of its search."""
    raw = yaml.safe_load(EXAMPLE.read_text())
    raw["search"] |= changes
    raw["search"] = {key: value for key, value in raw["search"].items() if value is not None}
    return raw


def refused(folder: Path, raw: dict[str, Any], *parts: str) -> None:
    path = folder / "job.yaml"
    path.write_text(yaml.safe_dump(raw, sort_keys=False))
    with pytest.raises(JobError) as caught:
        api.check(path)
    for part in (str(path), *parts):
        assert part in str(caught.value), caught.value


def test_the_example_is_valid_and_lists_are_choices() -> None:
    search = api.check(EXAMPLE).search
    assert search is not None
    assert search.space["head.margin"].kind == "choice"
    assert (search.total, search.scheduler.kind, search.searcher.kind) == (8, "asha", "random")
    assert "search" in api.schema("discrimination.spelling")["properties"]


def test_a_search_needs_a_search_section(tmp_path: Path) -> None:
    raw = written()
    del raw["search"]
    path = tmp_path / "job.yaml"
    path.write_text(yaml.safe_dump(raw | {"output": str(tmp_path / "runs")}))
    with pytest.raises(JobError, match=r"no search section\. Write at least `search: "):
        api.tune(path)
    assert not (tmp_path / "runs").exists()


SPACE_ERRORS = [
    ({"train.learning_rat": RATE}, ["search.space.train.learning_rat", "Did you mean 'learning_rate'?"]),
    ({"head.scale": {"kind": "uniform", "low": -1, "high": 8}}, ["search.space.head.scale", "refuses -1.0", "greater"]),
    ({"encoder.kind": ["char_ngrams", "resnet"]}, ["search.space.encoder.kind", "'resnet'"]),
    ({"head.margin": [{"kind": "arcfaces"}]}, ["search.space.head.margin", "arcface"]),
    ({"cluster.workers": [1, 2]}, ["search.space.cluster.workers", "where trials run"]),
    ({"register_as": ["a"]}, ["search.space.register_as", "best trial is registered"]),
    ({"words.count.x": [1]}, ["search.space.words.count.x", "is a value, not a section"]),
    ({"head.scale": {"kind": "uniform", "low": 8, "high": 8}}, ["low 8.0 must be below high 8.0"]),
    ({"head.scale": {"kind": "unifrom", "low": 8, "high": 9}}, ["search.space.head.scale.kind", "'uniform'"]),
    ({"head.scale": {"kind": "log_uniform", "low": 0, "high": 9}}, ["search.space.head.scale.low", "greater than 0"]),
    (
        {"train.global_batch": [100, 126], "train.accumulation": [4, 3]},
        ["the job refuses", "of 64 combinations", "not divisible by accumulation"],
    ),
    (
        {"train.global_batch": [100, 128], "train.accumulation": [2, 3]},
        ["search.space.train.accumulation: the job refuses 3", "not divisible by accumulation 3"],
    ),
]


@pytest.mark.parametrize(("space", "parts"), SPACE_ERRORS)
def test_spaces_that_cannot_work_are_named(tmp_path: Path, space: dict[str, Any], parts: list[str]) -> None:
    refused(tmp_path, written(space=space, scheduler=None), *parts)


SECTION_ERRORS = [
    ({"metric": "eval/top2"}, ["search.metric", "reports no 'eval/top2'", "Did you mean 'eval/top1'?"]),
    (
        {"metric": "train/final_loss"},
        ["asha compares trials while they train", "eval/top1", "train/loss", "scheduler: none"],
    ),
    ({"metric": "test/top1", "scheduler": None}, ["test/top1 is measured on data.test", "Take eval/top1"]),
    ({"trials": None}, ["search: trials: say how many"]),
    ({"searcher": "grid"}, ["a grid runs every combination once; leave trials out"]),
    ({"searcher": "grid", "trials": None}, ["space.train.learning_rate: a grid needs a few values", "log_uniform"]),
    ({"searcher": "bohb"}, ["scheduler: {kind: hyperband"]),
    ({"searcher": "optuna", "scheduler": {"kind": "hyperband", "first_steps": 10}}, ["write searcher: bohb"]),
    (
        {"scheduler": ASHA | {"grace_steps": 90}},
        ["search.scheduler.grace_steps: 90", "a trial trains 90", "tenth of it, 9"],
    ),
    ({"scheduler": PBT, "trials": 1}, ["population of two or more"]),
    ({"scheduler": PBT, "searcher": "optuna"}, ["searcher: random"]),
    (
        {"scheduler": PBT, "space": {"encoder.dim": [32, 64]}},
        ["encoder.dim: pbt changes", "train.learning_rate", "head.scale"],
    ),
    ({"scheduler": PBT, "space": {"train.global_batch": [128, 256]}}, ["train.global_batch: pbt changes"]),
    ({"scheduler": "ahsa"}, ["search.scheduler.kind", "'asha'"]),
    ({"goal": "maximum"}, ["search.goal", "'max' or 'min'"]),
]


@pytest.mark.parametrize(("changes", "parts"), SECTION_ERRORS)
def test_searches_that_cannot_work_are_named(tmp_path: Path, changes: dict[str, Any], parts: list[str]) -> None:
    refused(tmp_path, written(**changes), *parts)


def test_evaluation_has_to_be_asked_for(tmp_path: Path) -> None:
    raw = written()
    del raw["train"]["evaluate_every"]
    refused(tmp_path, raw, "set train.evaluate_every")
    raw = written(scheduler={"kind": "hyperband", "first_steps": 10}, searcher="bohb")
    raw["train"] = {"global_batch": 256, "epochs": 1}
    refused(tmp_path, raw, "give train.steps instead of train.epochs")


def test_only_what_no_weight_depends_on_may_change_under_pbt() -> None:
    job_type = find_workload("discrimination.spelling").job_type
    known = changeable_fields(job_type)
    assert {"train.learning_rate", "head.scale", "head.margin", "align"} <= known
    for path in ("head.margin.m", "head.loss.kind", "train.betas"):
        assert is_changeable(job_type, path)
    for path in ("encoder.dim", "train.zero_stage", "head.optimizer.kind", "seed", "words.count", "head.sub_centres"):
        assert not is_changeable(job_type, path)


def test_values_stay_in_their_space() -> None:
    search = SearchConfig.model_validate(
        {
            "metric": "m",
            "trials": 1,
            "space": {
                "a": {"kind": "uniform", "low": 1, "high": 2},
                "b": {"kind": "uniform", "low": 0, "high": 1, "step": 0.3},
                "c": {"kind": "integer", "low": 2, "high": 9, "step": 3},
                "d": {"kind": "integer", "low": 1, "high": 100, "log": True},
                "e": [{"x": 1}, None, "z"],
                "f": {"kind": "log_uniform", "low": 0.1, "high": 10},
            },
        }
    )
    space = search.space
    # population-based training multiplies what was drawn, which may leave the space
    assert [value_of(space["a"], drawn) for drawn in (0.8, 1.5, 2.4)] == [1, 1.5, 2]
    assert [round(value_of(space["b"], drawn), 6) for drawn in (-0.1, 0.16, 0.4, 1.1)] == [0, 0.3, 0.3, 0.9]
    assert [value_of(space["c"], drawn) for drawn in (0.0, 3, 4, 8, 12)] == [2, 2, 5, 8, 8]
    assert [value_of(space["d"], drawn) for drawn in (0, 7, 120)] == [1, 7, 100]
    assert [value_of(space["e"], drawn) for drawn in (0, 1, 5)] == [{"x": 1}, None, "z"]
    rng = random.Random(0)
    for name, one in space.items():
        for _ in range(50):
            value = draw(one, rng)
            assert value in (one.listed() or [value])
            if name in "af":
                assert one.low <= value <= one.high
    assert space["b"].listed() == pytest.approx([0, 0.3, 0.6, 0.9])
    assert space["c"].listed() == [2, 5, 8]


def test_what_tune_draws_is_in_the_space() -> None:
    from ray.tune.search.variant_generator import generate_variants

    from labelmill.tuning.schedule import param_space

    raw = {"metric": "m", "space": {"a": {"kind": "integer", "low": 1, "high": 7, "step": 3}, "b": [[1], [2]]}}
    grid = SearchConfig.model_validate(raw | {"searcher": "grid"})
    assert grid.total == 6
    seen = [variant for _, variant in generate_variants(param_space(grid))]
    values = [tuple(str(value_of(grid.space[path], drawn)) for path, drawn in variant.items()) for variant in seen]
    assert sorted(values) == sorted((str(a), str(b)) for a in (1, 4, 7) for b in ([1], [2]))
    some = SearchConfig.model_validate(raw | {"trials": 3})
    domains = param_space(some)
    drawn = {value_of(some.space["a"], domains["a"].sample()) for _ in range(100)}
    assert drawn == {1, 4, 7}


def test_a_trial_is_the_job_with_its_values() -> None:
    raw = written()
    before = copy.deepcopy(raw)
    values = {"train.learning_rate": 0.5, "head.margin": {"kind": "cosface", "m": 0.2}}
    changed = with_values(raw, values)
    assert changed["train"]["learning_rate"] == 0.5
    assert changed["head"]["margin"]["m"] == 0.2
    assert "search" not in changed
    assert raw == before


# --- capacity -------------------------------------------------------------------------------------------


def cpus(*numbers: float, gpus: float = 0.0) -> list[dict[str, float]]:
    return [{"CPU": number, "GPU": gpus} for number in numbers]


def test_as_many_trials_as_fit_and_no_more() -> None:
    one = ClusterConfig(workers=1)
    assert concurrent_trials(one, cpus(2), False, None, 10) == 2
    assert concurrent_trials(one, cpus(2), True, None, 10) == 2
    assert concurrent_trials(one, cpus(2), False, 1, 10) == 1
    assert concurrent_trials(one, cpus(64), False, None, 3) == 3
    # two workers of one CPU and their drivers don't fit beside another such trial, whatever a sum of CPUs says
    assert concurrent_trials(ClusterConfig(workers=2, cpus_per_worker=1), cpus(4), False, None, 10) == 1
    # workers are as large as they are: 3 + 3 free CPUs hold one of two CPUs each, not three in all
    assert concurrent_trials(ClusterConfig(workers=1, cpus_per_worker=2), cpus(3, 3), False, None, 10) == 2
    gpu = ClusterConfig(workers=4, cpus_per_worker=2, gpus_per_worker=1)
    assert concurrent_trials(gpu, cpus(64, 64, gpus=8), False, None, 50) == 4
    assert trial_resources(gpu, False) == {"CPU": DRIVER_CPUS}
    assert trial_resources(gpu, True) == {"CPU": 2, "GPU": 1}


def test_what_does_not_fit_is_refused_with_what_does() -> None:
    with pytest.raises(ClusterError, match=r"3 worker\(s\) x 0\.75 CPU, .* 2 CPU and 0 GPU on 1 node\(s\) are free"):
        concurrent_trials(ClusterConfig(workers=3), cpus(2), False, None, 4)
    with pytest.raises(ClusterError, match=r"search\.concurrent: 3 trials at once.* Write 2"):
        concurrent_trials(ClusterConfig(), cpus(2), False, 3, 4)


# --- checkpoints by reference ---------------------------------------------------------------------------


def checkpoint(folder: Path, text: str) -> Path:
    (folder / "head-classes").mkdir(parents=True)
    (folder / "head-classes" / "rows").write_text(text)
    (folder / "checkpoint.json").write_text(json.dumps({"of": text}))
    return folder


def test_a_kept_checkpoint_takes_no_bytes_and_outlives_the_training_s(tmp_path: Path) -> None:
    kept, own = tmp_path / "kept", checkpoint(tmp_path / "run" / "step-00000010", "ten")
    pointer = keep(own, "a", "fit", 10, kept)
    assert pointer is not None
    file = Path(pointer.path) / "head-classes" / "rows"
    assert file.samefile(own / "head-classes" / "rows")
    assert Pointer.load(pointer.save()) == pointer
    assert Pointer.load(tmp_path) is None
    for path in sorted(own.rglob("*"), reverse=True):
        path.rmdir() if path.is_dir() else path.unlink()
    assert keep(own, "a", "fit", 10, kept) is None, "the training has dropped it"

    other = checkpoint(tmp_path / "other" / "step-00000030", "thirty").parent
    place(pointer, other)
    assert [path.name for path in other.iterdir()] == ["step-00000010"]
    assert (other / "step-00000010" / "head-classes" / "rows").read_text() == "ten"


def test_old_checkpoints_go_unless_a_trial_is_to_start_from_them(tmp_path: Path) -> None:
    for step in (10, 20, 30, 40):
        checkpoint(tmp_path / "a" / f"step-{step:08d}", str(step))
    sweep(tmp_path, {str(tmp_path / "a" / "step-00000010")})
    assert sorted(path.name[-2:] for path in (tmp_path / "a").iterdir()) == ["10", "30", "40"]


def test_a_line_that_a_crash_cut_is_left_out(tmp_path: Path) -> None:
    (tmp_path / "curve.jsonl").write_text('{"step": 1, "value": 2.0}\n{"step": 2, "va')
    assert read_lines(tmp_path / "curve.jsonl") == [{"step": 1, "value": 2.0}]


# --- trials that fail -----------------------------------------------------------------------------------


def searching(folder: Path, **changes: Any) -> SearchFolder:
    """A search that has begun."""
    raw = written(**changes)
    (folder / "search.json").write_text(json.dumps({"raw": raw, "source": "job.yaml", "max_failed": 1}))
    return SearchFolder(folder)


def test_a_metric_that_the_report_lacks_is_an_error_for_all(tmp_path: Path) -> None:
    folder = searching(tmp_path, metric="eval/top1")
    folder.trial("a").mkdir(parents=True)
    with pytest.raises(MetricError, match=r"discrimination\.spelling has no 'eval/top1'; it has test/top1, test/top5"):
        Watch(folder, "a", None).finish({"test/top5": 0.5, "test/top1": 0.4}, 1.0)


def test_too_many_failures_end_a_search_and_hopeless_ones_at_once(tmp_path: Path) -> None:
    folder = searching(tmp_path)
    trials = [SimpleNamespace(trial_id=name) for name in "abc"]
    follow = Follow(str(tmp_path))
    for trial, fatal in zip(trials, (False, False, True), strict=True):
        folder.trial(trial.trial_id).mkdir(parents=True)
        write_outcome(folder.trial(trial.trial_id), status="failed", error="it broke", fatal=fatal, step=3)
    stop = StopOnFile(str(folder.stop_file))
    follow.on_trial_error(0, trials, trials[0])
    assert not stop.stop_all()
    follow.on_trial_error(0, trials, trials[1])
    assert stop.stop_all()
    assert folder.stop_file.read_text() == "2 trials failed, search.max_failed is 1; the last one: it broke"
    Follow(str(tmp_path)).on_trial_error(0, trials, trials[2])
    assert folder.stop_file.read_text().startswith("every trial would fail like trial c: it broke")


def test_a_search_that_begins_again_keeps_what_did_not_fail(tmp_path: Path) -> None:
    folder = searching(tmp_path)
    for name, rate, outcome in (("a", 0.1, {"status": "finished", "value": 0.5}), ("b", 0.2, {"status": "failed"})):
        append_line(folder.trial(name) / "settings.jsonl", {"time": 1.0, "values": {"r": rate}, "from": None})
        write_outcome(folder.trial(name), **outcome)
    folder.set_trials_aside()
    assert not list(folder.trial("").glob("*"))
    for name, rate in (("c", 0.2), ("d", 0.1), ("e", 0.1)):
        folder.take_over(name, {"r": rate})
    assert [path.name for path in folder.trial("").glob("*")] == ["d"]
    assert read_record(folder.trial("d")).value == 0.5


def test_secrets_are_not_kept_with_the_job(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MY_TOKEN", "from outside")
    monkeypatch.delenv("LABELMILL_TRACKING_PASSWORD", raising=False)
    raw = {"tracking": {"password": "planted", "token": "${env:MY_TOKEN}"}}
    kept = _without_secrets(copy.deepcopy(raw))
    assert "planted" not in json.dumps(kept)
    assert kept["tracking"]["token"] == "${env:MY_TOKEN}"
    environment = _secrets(kept)
    assert environment["LABELMILL_TRACKING_PASSWORD"] == "planted"
    assert environment["MY_TOKEN"] == "from outside"
    monkeypatch.delenv("LABELMILL_TRACKING_PASSWORD")
