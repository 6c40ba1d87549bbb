"""Tracking and the registry against a real local store and a real MLflow server that dies and comes back."""

from __future__ import annotations

import base64
import contextlib
import http.server
import io
import itertools
import json
import math
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
import torch
import torch.nn.functional as F
import yaml
from rich.console import Console

from labelmill.data.labels import LabelSpec
from labelmill.data.manifest import FieldSpec
from labelmill.data.writer import ShardWriter
from labelmill.encoders import build_encoder
from labelmill.errors import DataError, TrackingError
from labelmill.execution import execute
from labelmill.heads.storage import save_range
from labelmill.host import Host
from labelmill.job import TrackingConfig
from labelmill.tracking import registry
from labelmill.tracking.config import Store, client_env
from labelmill.tracking.model import write_model
from labelmill.tracking.report import Report
from labelmill.tracking.run import Tracker, code_version, read_report
from labelmill.training.inprocess import fit_here
from labelmill.workload import load_job

WORDS = ["hello", "world", "banana", "orange", "apple"]
QUICK = {"system_metrics": False, "interval_s": 0.05, "timeout_s": 3.0}


@pytest.fixture(autouse=True)
def _no_outer_store(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("MLFLOW_TRACKING_URI", "MLFLOW_REGISTRY_URI"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture(scope="module")
def output(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of the local store: its database is made once, that takes seconds."""
    return tmp_path_factory.mktemp("runs")


@pytest.fixture(scope="module")
def local() -> TrackingConfig:
    return TrackingConfig(**QUICK)


@pytest.fixture(scope="module")
def package(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A packaged model of five classes in two head files."""
    folder = tmp_path_factory.mktemp("package")
    torch.manual_seed(0)
    encoder = build_encoder({"kind": "char_ngrams", "dim": 32, "buckets": 1024, "hidden": 0})
    rows_CD = F.normalize(encoder.embed(WORDS), dim=1)
    for start, stop in ((0, 2), (2, 5)):
        save_range(folder, "rows", {"rows": rows_CD[start:stop]}, start, stop, {})
    classes = pa.table({"name": WORDS})
    write_model(folder, encoder=encoder, input_kind="text", classes=classes, manifest_digest="d" * 64)
    return folder


def history(config: TrackingConfig, output: Path, run_id: str, name: str) -> list[tuple[int, float]]:
    with client_env(Store.of(config, output)) as client:
        return sorted((m.step, m.value) for m in client.get_metric_history(run_id, name))


# --- a local store ------------------------------------------------------------------------------------------


def test_a_run_holds_everything_and_its_report_can_be_rebuilt(
    local: TrackingConfig, output: Path, tmp_path: Path
) -> None:
    figure = tmp_path / "loss.png"
    figure.write_bytes(b"png")
    report = Report("A run", {"test/top1": 0.5, "worst": math.nan}, figures={"loss": str(figure)}, notes=["n"])
    report.add_table("bands", ["band", "top-1"], [["head", 0.9], ["tail", None]], "by frequency")
    with Tracker.open(local, output, "first", tags={"workload": "w"}, run_dir=tmp_path / "run") as tracker:
        tracker.config({"name": "first", "train": {"lr": 0.1}})
        tracker.params({"train": {"lr": 0.1, "betas": [0.9, 0.95]}, "none": None})
        tracker.dataset("a" * 64, "words", "/data/words", profile={"num_samples": 12})
        tracker.metrics([("loss", 1.0 / (1 + step), step, 1000 + step) for step in range(2500)])
        tracker.figure(figure)
        tracker.report(report)
        assert (tracker.spooled, tracker.refused) == (0, 0)

    with client_env(Store.of(local, output)) as client:
        run = client.get_run(tracker.run_id)
        artifacts = {item.path for item in client.list_artifacts(tracker.run_id)}
        job = yaml.safe_load(Path(client.download_artifacts(tracker.run_id, "job.yaml")).read_text())
    assert run.info.status == "FINISHED"
    assert run.info.run_name == "first"
    assert run.data.params == {"train.lr": "0.1", "train.betas": "[0.9, 0.95]", "none": "null"}
    assert run.data.tags["workload"] == "w"
    assert run.data.tags["labelmill.version"] == code_version()["version"]
    assert run.data.metrics["test/top1"] == 0.5
    assert artifacts == {"job.yaml", "figures", "report"}
    assert job == {"name": "first", "train": {"lr": 0.1}}
    (data,) = run.inputs.dataset_inputs
    assert data.dataset.name == "words"
    assert {tag.key: tag.value for tag in data.tags}["manifest_sha256"] == "a" * 64
    assert history(local, output, tracker.run_id, "loss") == [(s, 1.0 / (1 + s)) for s in range(2500)]

    back = read_report(local, output, tracker.run_id, tmp_path / "back")
    assert back.to_json() == report.to_json()
    assert back.figure_path("loss").read_bytes() == b"png"
    assert (output / "mlflow.db").is_file()
    assert not (Path.cwd() / "mlruns").exists()


def test_values_mlflow_would_refuse_are_made_to_fit(local: TrackingConfig, output: Path, tmp_path: Path) -> None:
    with Tracker.open(local, output, "odd", run_dir=tmp_path) as tracker:
        tracker.params({"long": "x" * 20_000, "k@y": 1, **{f"p{i}": i for i in range(250)}})
        tracker.params({"k@y": 2})
        now = int(time.time() * 1000)
        rows = [("a@1//b", v, s, now) for s, v in enumerate([1.0, math.nan, math.inf, -math.inf])]
        tracker.metrics(rows)
        tracker.flush()
        assert (tracker.spooled, tracker.refused) == (0, 0)
    with client_env(Store.of(local, output)) as client:
        data = client.get_run(tracker.run_id).data
    assert len(data.params) == 252
    assert data.params["k_y"] == "1"
    assert data.tags["param.k_y"] == "2"
    assert set(data.params["long"]) == {"x"}
    values = [value for _, value in history(local, output, tracker.run_id, "a_1/b")]
    assert values[0] == 1.0
    assert math.isnan(values[1])
    assert values[2] > 1e308 > -1e308 > values[3]


def test_a_refused_call_is_kept_aside_and_blocks_nothing(local: TrackingConfig, output: Path, tmp_path: Path) -> None:
    with Tracker.open(local, output, "refused", run_dir=tmp_path) as tracker:
        tracker.artifact(tmp_path / "absent.txt")
        tracker._submit({"op": "metrics", "rows": [["no@name", "1.0", 0, 0]]})
        tracker.metrics([("fine", 1.0, 0, None)])
        tracker.flush()
        assert (tracker.spooled, tracker.refused) == (0, 2)
    kept = [json.loads(line) for line in (tmp_path / "tracking-refused.jsonl").read_text().splitlines()]
    assert [record["op"] for record in kept] == ["artifact", "metrics"]
    assert len(history(local, output, tracker.run_id, "fine")) == 1


def test_status_parents_and_going_on_with_a_run(local: TrackingConfig, output: Path, tmp_path: Path) -> None:
    with Tracker.open(local, output, "parent", run_dir=tmp_path) as parent:
        with (
            pytest.raises(RuntimeError),
            Tracker.open(local, output, "child", parent_run_id=parent.run_id, run_dir=tmp_path) as child,
        ):
            raise RuntimeError
        with (
            contextlib.suppress(KeyboardInterrupt),
            Tracker.open(local, output, "stopped", run_dir=tmp_path) as stopped,
        ):
            raise KeyboardInterrupt
    with client_env(Store.of(local, output)) as client:
        assert client.get_run(child.run_id).info.status == "FAILED"
        assert client.get_run(child.run_id).data.tags["mlflow.parentRunId"] == parent.run_id
        assert client.get_run(stopped.run_id).info.status == "KILLED"
    with Tracker.open(local, output, "child", run_id=child.run_id, run_dir=tmp_path) as again:
        assert again.run_id == child.run_id
    with client_env(Store.of(local, output)) as client:
        assert client.get_run(child.run_id).info.status == "FINISHED"
    with (
        pytest.raises(TrackingError, match="not found"),
        Tracker.open(local, output, "x", run_id="0" * 32, run_dir=tmp_path),
    ):
        pass


def test_system_metrics_go_through_the_tracker(output: Path, tmp_path: Path) -> None:
    config = TrackingConfig(**{**QUICK, "system_metrics": True})
    with Tracker.open(config, output, "system", run_dir=tmp_path) as tracker:
        time.sleep(0.5)
    with client_env(Store.of(config, output)) as client:
        names = set(client.get_run(tracker.run_id).data.metrics)
    assert {"system/cpu_utilization_percentage", "system/system_memory_usage_megabytes"} <= names


def test_nothing_of_the_process_is_changed_for_good(local: TrackingConfig, output: Path, tmp_path: Path) -> None:
    import mlflow

    def state() -> dict[str, str]:
        quiet = {
            "MLFLOW_DISABLE_TELEMETRY",
            "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR",
            "MLFLOW_CONFIGURE_LOGGING",
            "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT",
        }
        return {k: v for k, v in os.environ.items() if k.startswith("MLFLOW_") and k not in quiet}

    before = state()
    with Tracker.open(local, output, "env", run_dir=tmp_path) as tracker:
        tracker.metrics([("a", 1.0, 0, None)])
    assert state() == before
    assert not mlflow.is_tracking_uri_set()


# --- stores that aren't there -------------------------------------------------------------------------------


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def test_a_dead_server_is_named_at_once(tmp_path: Path) -> None:
    uri = f"http://127.0.0.1:{free_port()}"
    began = time.monotonic()
    with (
        pytest.raises(TrackingError, match=rf"{uri} doesn't answer.*unset MLFLOW_TRACKING_URI"),
        Tracker.open(TrackingConfig(uri=uri), tmp_path, "x"),
    ):
        pass
    assert time.monotonic() - began < 3


def test_a_server_that_never_answers_is_given_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://127.0.0.1:{silent.getsockname()[1]}")
        began = time.monotonic()
        with (
            pytest.raises(TrackingError, match="within 1 s"),
            Tracker.open(TrackingConfig(timeout_s=1), tmp_path, "x"),
        ):
            pass
        assert time.monotonic() - began < 4


def test_credentials_are_sent_and_a_failing_server_is_an_error(tmp_path: Path) -> None:
    seen: set[str] = set()

    class Failing(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            healthy = self.path == "/health"
            if not healthy:
                seen.add(self.headers.get("Authorization", ""))
            self.send_response(200 if healthy else 500)
            self.send_header("Content-Length", "0")
            self.end_headers()

        do_POST = do_GET

        def log_message(self, *_: Any) -> None:
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Failing)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        uri = f"http://127.0.0.1:{server.server_port}"
        config = TrackingConfig(uri=uri, username="ann", password="secret", timeout_s=5)
        with pytest.raises(TrackingError, match=f"tracking store {uri}"), Tracker.open(config, tmp_path, "x"):
            pass
    finally:
        server.shutdown()
        server.server_close()
    assert seen == {"Basic " + base64.b64encode(b"ann:secret").decode()}


def test_stores_that_mean_nothing(tmp_path: Path) -> None:
    with pytest.raises(TrackingError, match="no longer keeps runs in plain folders"):
        Store.of(TrackingConfig(uri=str(tmp_path)))
    with pytest.raises(TrackingError, match=r"mlflow\.db: there is no tracking store yet"):
        registry.list_models(TrackingConfig(), tmp_path)
    assert not list(tmp_path.iterdir())


# --- the registry -------------------------------------------------------------------------------------------


def test_register_promote_and_predict(local: TrackingConfig, output: Path, package: Path, tmp_path: Path) -> None:
    with Tracker.open(local, output, "fit", run_dir=tmp_path) as tracker:
        tracker.metrics([("test/top1", 0.75, 0, None)])
        versions = [registry.register(tracker, package, "speller", {"workload": "w"}) for _ in range(3)]
    assert versions == [1, 2, 3]

    def aliases() -> dict[str, int]:
        (model,) = [m for m in registry.list_models(local, output) if m.name == "speller"]
        assert (model.latest, model.predictor) == (3, "topk")
        return model.aliases

    assert aliases() == {"candidate": 3}
    assert registry.resolve(local, output, "speller").version == 3  # no champion yet: the candidate
    assert registry.promote(local, output, "speller", 1) == "1"
    assert aliases() == {"candidate": 3, "champion": 1}
    assert registry.promote(local, output, "speller") == "3"
    assert aliases() == {"candidate": 3, "champion": 3, "previous": 1}
    assert registry.promote(local, output, "speller", "champion") == "3"  # nothing changes
    assert aliases()["previous"] == 1
    assert registry.promote(local, output, "speller", "previous") == "1"  # back to the one before
    assert aliases() == {"candidate": 3, "champion": 1, "previous": 3}

    shown = registry.show(local, output, "speller")
    assert [v.version for v in shown] == [3, 2, 1]
    assert shown[0].aliases == ("candidate", "previous")
    assert shown[0].metrics["test/top1"] == 0.75
    assert shown[0].tags["labelmill.manifest"] == "d" * 64
    assert shown[0].run_id == tracker.run_id
    for ref, version in (
        ("speller", 1),
        ("speller@candidate", 3),
        ("speller/2", 2),
        ("models:/speller/2", 2),
    ):
        assert registry.resolve(local, output, ref).version == version
        answers = registry.predict(local, output, ref, ["bananna", "helo"], k=2)
        assert answers[answers["rank"] == 1]["class"].tolist() == ["banana", "hello"]


def write_words(folder: Path, classes: list[str] | None = None) -> None:
    """A data set of forty texts in five classes."""
    fields, label = {"text": FieldSpec(kind="text", ext="txt")}, LabelSpec(form="single", num_classes=5)
    with ShardWriter(folder, "words", fields, label, layout="packed") as writer:
        for i in range(40):
            writer.write(f"s{i}", {"text": f"{WORDS[i % 5]} {i}"}, {"label": i % 5})
        writer.close(pa.table({"name": classes or WORDS}))


def words_job(data: Path, output: Path) -> dict[str, Any]:
    """A classifier over it, as a job file without its name and its training."""
    return {
        "workload": "discrimination.partial_fc",
        "output": str(output),
        "data": {"train": str(data), "test": str(data)},
        "encoder": {"kind": "char_ngrams", "dim": 32, "buckets": 1024, "hidden": 0},
        "tracking": QUICK,
    }


def test_a_job_that_goes_on_from_a_registered_model_names_it_as_its_parent(output: Path, tmp_path: Path) -> None:
    write_words(tmp_path / "data", WORDS[::-1])  # the same classes in another order
    job = words_job(tmp_path / "data", output) | {
        "name": "goes-on",
        "head": {"initial": {"checkpoint": "models:/speller@champion", "encoder": "fresh", "optimizer": "fresh"}},
        "train": {"global_batch": 8, "steps": 2},
        "register_as": "speller-next",
    }
    (tmp_path / "job.yaml").write_text(yaml.safe_dump(job))
    method, checked = load_job(tmp_path / "job.yaml", [])
    text = io.StringIO()
    host = Host(output / "goes-on", fit=fit_here)
    execute(checked, method.run, console=Console(file=text, width=200), host=host)
    assert "5 classes go on, 0 are new, 0 end" in text.getvalue()
    assert registry.resolve(TrackingConfig(**QUICK), output, "speller-next").parents == ("speller/1",)


def test_the_logged_model_is_plain_files_with_a_signature(local: TrackingConfig, output: Path) -> None:
    import mlflow

    with client_env(Store.of(local, output)) as client:
        folder = Path(client.get_model_version_download_uri("speller", "3").removeprefix("file://"))
        info = mlflow.models.get_model_info("models:/speller/3")
    files = [file for file in folder.rglob("*") if file.is_file()]
    assert not [file for file in files if file.is_symlink() or file.suffix in {".pkl", ".pickle", ".pt"}]
    assert {"model.json", "classes.arrow"} <= {file.name for file in files}
    needs = (folder / "requirements.txt").read_text().split()
    assert f"torch=={torch.__version__.partition('+')[0]}" in needs
    assert {need.partition("==")[0] for need in needs} >= {
        "safetensors",
        "pyarrow",
        "numpy",
        "pandas",
        "pydantic",
    }
    assert (
        info.signature.params.to_dict() == [{"name": "k", "default": 5, "shape": None, "type": "long"}]
        or info.signature.params.to_dict()[0]["default"] == 5
    )
    assert info.signature.outputs.input_names() == ["input", "rank", "class_id", "class", "score"]


def test_what_was_changed_in_the_artifact_store_is_neither_read_nor_run(local: TrackingConfig, output: Path) -> None:
    from labelmill.serving.package import fetch_package

    with client_env(Store.of(local, output)) as client:
        folder = Path(client.get_model_version_download_uri("speller", "2").removeprefix("file://"))
    changes = {
        "artifacts/model/model.json": '{"format_version": 1}',
        "pyfunc_model.py": "raise SystemExit('was run')",
        "code/labelmill/more.py": "x = 1",
    }
    for name, content in changes.items():
        path = folder / name
        before = path.read_bytes() if path.is_file() else None
        path.write_text(content)
        with pytest.raises(DataError, match=r"models:/speller/2: .* what was registered \(sha256 differs\)"):
            registry.predict(local, output, "speller/2", ["bananna"], k=1)
        if name.endswith("model.json"):
            with pytest.raises(DataError, match="what was registered"):
                fetch_package(local, output, "speller/2")
        path.unlink() if before is None else path.write_bytes(before)
    assert fetch_package(local, output, "speller/2")[0].version == 2
    assert registry.predict(local, output, "speller/2", ["bananna"], k=1)["class"].tolist() == ["banana"]


def test_references_that_mean_nothing(local: TrackingConfig, output: Path) -> None:
    for ref, message in (
        ("speler", "'speler' doesn't exist. Did you mean 'speller'"),
        ("speller@champoin", "no alias 'champoin'. Did you mean 'champion'"),
        ("speller/9", "no version 9. Known: 3, 2, 1"),
        ("a@b@c", "write NAME, NAME@alias or NAME/version"),
    ):
        with pytest.raises(TrackingError, match=message):
            registry.resolve(local, output, ref)
    with pytest.raises(TrackingError, match="Did you mean 'speller'"):
        registry.promote(local, output, "spelle")
    with pytest.raises(DataError, match="input 1: expected a text, got int"):
        registry.predict(local, output, "speller", ["a", 3])
    with pytest.raises(DataError, match="nothing to predict"):
        registry.predict(local, output, "speller", [])


def test_a_fresh_process_needs_mlflow_and_the_uri_only(output: Path, tmp_path: Path) -> None:
    code = """
import sys, mlflow, pandas as pd
model = mlflow.pyfunc.load_model("models:/speller@candidate")
print(model.predict(pd.DataFrame({"text": ["bananna"]}), params={"k": 1})["class"].tolist())
print(model.predict(["helo", "aple"], params={"k": 1})["class"].tolist())
print(len(model.predict(["helo"])))
try:
    model.predict(pd.DataFrame({"id": ["x"], "text": ["helo"]}))
except mlflow.exceptions.MlflowException as error:
    print(error)
import labelmill.tracking.model as used
print("artifacts" in used.__file__)
engine = {"ray", "deepspeed", "transformers", "labelmill.training"}
print(engine & set(sys.modules))
"""
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    environment |= {"MLFLOW_TRACKING_URI": f"sqlite:///{output}/mlflow.db"}
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=environment,
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == [
        "['banana']",
        "['hello', 'apple']",
        "5",
        "the model needs a column 'text'; the input's first is 'id'",
        "True",
        "set()",
    ]


# --- a server that dies -------------------------------------------------------------------------------------


class Server:
    """A real `mlflow server` on loopback."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.port = folder, free_port()
        self.uri = f"http://127.0.0.1:{self.port}"
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        environment = {k: v for k, v in os.environ.items() if not k.startswith("MLFLOW_")}
        environment |= {"MLFLOW_DISABLE_TELEMETRY": "true", "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}
        command = [
            sys.executable, "-m", "mlflow", "server", "--backend-store-uri", f"sqlite:///{self.folder}/server.db",
            "--artifacts-destination", str(self.folder / "artifacts"), "--workers", "1",
            "--host", "127.0.0.1", "--port", str(self.port),
        ]  # fmt: skip
        with open(self.folder / "server.log", "ab") as log:
            self._process = subprocess.Popen(
                command, cwd=self.folder, stdout=log, stderr=log, start_new_session=True,
                env=environment,
            )  # fmt: skip
        deadline = time.monotonic() + 120
        while time.monotonic() < deadline:
            with contextlib.suppress(OSError), urllib.request.urlopen(self.uri + "/health", timeout=2):
                return
            time.sleep(0.2)
        raise AssertionError((self.folder / "server.log").read_text()[-3000:])

    def hang(self, hanging: bool) -> None:
        """Stops the whole group (the kernel still takes connections) or lets it go on."""
        assert self._process is not None
        os.killpg(self._process.pid, signal.SIGSTOP if hanging else signal.SIGCONT)

    def kill(self) -> None:
        """The whole group at once, as when the host goes."""
        if self._process is not None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait(30)
            self._process = None


@pytest.fixture
def server(tmp_path: Path, output: Path, local: TrackingConfig) -> Iterator[Server]:
    if not (output / "mlflow.db").exists():
        with client_env(Store.of(local, output), create=True) as client:
            client.search_experiments()
    # a database that is set up already: that alone takes seconds
    shutil.copyfile(output / "mlflow.db", tmp_path / "server.db")
    running = Server(tmp_path)
    try:
        running.start()
        yield running
    finally:
        running.kill()


def wait_until_sent(tracker: Tracker, step: int) -> int:
    """Logs on until the spool is empty; returns the next step."""
    deadline = time.monotonic() + 60
    while tracker.spooled:
        assert time.monotonic() < deadline
        tracker.metrics([("loss", float(step), step, None)])
        step += 1
        time.sleep(0.2)
    return step


def test_a_server_that_dies_or_hangs_loses_nothing(server: Server, package: Path, tmp_path: Path) -> None:
    config = TrackingConfig(uri=server.uri, experiment="served", **QUICK)
    with Tracker.open(config, tmp_path, "run", run_dir=tmp_path / "run") as tracker:
        tracker.params({"lr": 0.1})
        tracker.metrics([("odd", math.nan, 0, None), ("odd", math.inf, 1, None), ("loss", 0.0, 0, None)])
        tracker.flush()
        assert (tracker.spooled, tracker.refused) == (0, 0)
        version = registry.register(tracker, package, "speller")
        assert registry.predict(config, tmp_path, f"speller/{version}", ["bananna"], k=1)["class"].tolist() == [
            "banana"
        ]

        server.kill()
        step = 1
        began = time.monotonic()
        for _ in range(4):
            tracker.metrics([("loss", float(step), step, None)])
            tracker.flush()
            step += 1
        tracker.params({"lr": 0.2, "late": 1})
        tracker.report(Report("Out of reach", {"test/top1": 0.5}))
        assert time.monotonic() - began < 5
        assert tracker.spooled >= 6
        spool = next((tmp_path / "run").glob("tracking-spool-*.jsonl"))
        assert len(spool.read_text().splitlines()) == tracker.spooled

        server.start()
        step = wait_until_sent(tracker, step)
        assert not spool.exists()
        server.hang(True)
        tracker.metrics([("loss", float(step), step, None)])
        began = time.monotonic()
    # the run ended while the server hung: no exception, no long wait, its end is in the spool
    assert time.monotonic() - began < 3 * config.timeout_s
    assert tracker.spooled >= 2

    server.hang(False)
    with Tracker.open(config, tmp_path, "run", run_id=tracker.run_id, run_dir=tmp_path / "run") as again:
        assert again.spooled >= 2
        again.tags({"seen": "again"})
        assert again.spooled == 0
    assert history(config, tmp_path, tracker.run_id, "loss") == [(s, float(s)) for s in range(step + 1)]
    odd = dict(history(config, tmp_path, tracker.run_id, "odd"))
    assert math.isnan(odd[0])
    assert odd[1] > 1e308
    with client_env(Store.of(config, tmp_path)) as client:
        run = client.get_run(tracker.run_id)
    assert run.info.status == "FINISHED"
    assert run.data.params == {"lr": "0.1", "late": "1"}
    assert run.data.tags["param.lr"] == "0.2"
    assert read_report(config, tmp_path, tracker.run_id).metrics == {"test/top1": 0.5}


def test_a_server_that_is_away_at_the_start_gets_everything_later(server: Server, tmp_path: Path) -> None:
    server.kill()
    config = TrackingConfig(uri=server.uri, experiment="late", required=False, **QUICK)
    with pytest.raises(TrackingError, match=r"doesn't answer.* set tracking.required to false"):
        Tracker.open(config.model_copy(update={"required": True}), tmp_path, "run").__enter__()
    began = time.monotonic()
    with Tracker.open(config, tmp_path, "run", run_dir=tmp_path / "run") as tracker:
        tracker.params({"lr": 0.1})
        for step in range(3):
            tracker.metrics([("loss", float(step), step, None)])
            tracker.flush()
        assert tracker.run_id == ""
    assert time.monotonic() - began < 5 * config.timeout_s
    spool = tmp_path / "run" / "tracking-spool-pending.jsonl"
    assert len(spool.read_text().splitlines()) == 5

    # the same run goes on while the server is away, and it comes back in the middle
    opened: list[str] = []
    with Tracker.open(config, tmp_path, "run", run_dir=tmp_path / "run") as tracker:
        tracker.on_open = opened.append
        tracker.metrics([("loss", 3.0, 3, None)])
        tracker.flush()
        server.start()
        wait_until_sent(tracker, 4)
    assert opened == [tracker.run_id]
    assert not list((tmp_path / "run").glob("tracking-spool-*"))
    steps = history(config, tmp_path, tracker.run_id, "loss")
    assert steps == [(s, float(s)) for s in range(len(steps))]
    assert len(steps) >= 5
    with client_env(Store.of(config, tmp_path)) as client:
        run = client.get_run(tracker.run_id)
    assert (run.info.status, run.data.params) == ("FINISHED", {"lr": "0.1"})


@pytest.mark.slow
def test_a_server_that_is_killed_while_ray_trains_loses_nothing(
    server: Server, tmp_path: Path, ray_session: None
) -> None:
    """SIGKILL in the middle of a fit, and a start some seconds later: every point arrives, no step waits for it."""
    write_words(tmp_path / "data")
    steps, every = 5000, 10
    job = words_job(tmp_path / "data", tmp_path / "runs") | {
        "name": "struck",
        "cluster": {"workers": 1, "cpus_per_worker": 0.5},
        "train": {"global_batch": 8, "steps": steps, "log_every": every},
        "tracking": QUICK | {"uri": server.uri, "experiment": "struck"},
    }
    (tmp_path / "job.yaml").write_text(yaml.safe_dump(job))
    away: list[float] = []

    def logged() -> list[dict[str, float]]:
        found = [path.read_text() for path in (tmp_path / "runs").glob("struck/stages/fit-*/history.jsonl")]
        return [json.loads(line) for text in found for line in text.splitlines()]

    def strike() -> None:
        deadline = time.monotonic() + 120
        while len(logged()) < 20 and time.monotonic() < deadline:
            time.sleep(0.05)
        server.kill()
        away.append(time.time())
        time.sleep(5)
        server.start()
        away.append(time.time())

    striker = threading.Thread(target=strike)
    striker.start()
    method, checked = load_job(tmp_path / "job.yaml", [])
    execute(checked, method.run, console=Console(file=io.StringIO()))
    striker.join()

    records = logged()
    assert [record["step"] for record in records] == list(range(every, steps + 1, every))
    during = [r["time"] for r in records if away[0] - 1 < r["time"] < away[1] + 5]
    assert len(during) > 20, "it went on training while the server was away"
    usual = [b["time"] - a["time"] for a, b in itertools.pairwise(records) if b["time"] < away[0]]
    longest = max(b - a for a, b in itertools.pairwise(during))
    assert longest < 1.0 + max(usual), "seconds between points, ten steps apart: not a second more than with the server"
    config = checked.tracking
    state = json.loads((tmp_path / "runs/struck/run.json").read_text())
    got = history(config, tmp_path / "runs", state["mlflow_run"], "train/loss")
    assert got == [(record["step"], pytest.approx(record["train/loss"])) for record in records]
    assert not list((tmp_path / "runs/struck").glob("tracking-spool-*"))
    with client_env(Store.of(config, tmp_path / "runs")) as client:
        assert client.get_run(state["mlflow_run"]).info.status == "FINISHED"
