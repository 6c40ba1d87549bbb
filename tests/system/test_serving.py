"""Registered models in use: promotion by a rule, prediction over shards that survives a kill, HTTP on both servers."""

from __future__ import annotations

import base64
import contextlib
import dataclasses
import io
import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from labelmill.data import store
from labelmill.data.labels import LabelSpec
from labelmill.data.manifest import FieldSpec, Manifest, load_manifest
from labelmill.data.writer import ShardWriter
from labelmill.encoders import build_encoder
from labelmill.errors import DataError, TrackingError
from labelmill.heads.storage import save_range
from labelmill.job import ClusterConfig, TrackingConfig
from labelmill.serving import batch
from labelmill.tracking import promotion, registry
from labelmill.tracking.model import load_model, write_model
from labelmill.tracking.run import Tracker
from tests.conftest import s3_environment
from tests.faults import FaultServer

LABELMILL = Path(sys.executable).with_name("labelmill")
WORDS = ["hello", "world", "banana", "orange", "apple"]
PICTURES = np.random.default_rng(0).integers(0, 255, (5, 8, 8, 1), dtype=np.uint8)
CONFIG = TrackingConfig(system_metrics=False)
CLUSTER = ClusterConfig(workers=2, cpus_per_worker=0.5)


def pack(folder: Path, encoder: dict[str, Any], kind: Any, raw: Any) -> Path:
    """A model of five classes in two head files, whose class vectors are the embeddings of `raw`."""
    torch.manual_seed(0)
    built = build_encoder(encoder)
    rows_CD = F.normalize(built.embed(raw), dim=1)
    folder.mkdir()
    for start, stop in ((0, 2), (2, 5)):
        save_range(folder, "rows", {"rows": rows_CD[start:stop]}, start, stop, {})
    write_model(folder, encoder=built, input_kind=kind, classes=pa.table({"name": WORDS}), manifest_digest="d" * 64)
    return folder


@pytest.fixture(scope="module")
def output(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A local store with three models: texts, vectors, pictures."""
    folder = tmp_path_factory.mktemp("served")
    vectors = np.eye(5, dtype=np.float32)
    models = {
        "speller": ({"kind": "char_ngrams", "dim": 32, "buckets": 1024, "hidden": 0}, "text", WORDS),
        "vectors": ({"kind": "linear", "field": "vector", "in_dim": 5, "dim": 8}, "array", vectors),
        "pictures": ({"kind": "linear", "in_dim": 64, "dim": 16, "image_size": 8}, "image", PICTURES),
    }
    with Tracker.open(CONFIG, folder / "runs", "first", run_dir=folder / "run") as tracker:
        for name, about in models.items():
            assert registry.register(tracker, pack(folder / name, *about), name) == 1
    return folder / "runs"


def labelmill(folder: Path, *args: object) -> subprocess.CompletedProcess[str]:
    env = os.environ | {"COLUMNS": "200", "OMP_NUM_THREADS": "1"}
    command = [str(LABELMILL), *map(str, args)]
    return subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True, timeout=200, check=False)


# --- promotion ------------------------------------------------------------------------------------------------


def trained(output: Path, top1: float, test_data: str = "t" * 64, parents: tuple[str, ...] = ()) -> int:
    """A new version of `rated`, from a run with that metric."""
    with Tracker.open(CONFIG, output, "rated", run_dir=output / "rated") as tracker:
        tracker.params({"train": {"learning_rate": top1 / 10}})
        tracker.dataset("a" * 64, "words", "/data/words", "train", {"parents": ["b" * 64]})
        tracker.dataset(test_data, "tests", "/data/tests", "test")
        tracker.metrics([("test/top1", top1, 0, None)])
        return registry.register(tracker, output.parent / "speller", "rated", parents=parents)


def test_promotion_rollback_comparison_and_lineage(output: Path) -> None:
    def aliases() -> dict[str, int]:
        return next(m.aliases for m in registry.list_models(CONFIG, output) if m.name == "rated")

    assert trained(output, 0.5) == 1
    with pytest.raises(TrackingError, match="no champion"):
        promotion.rollback(CONFIG, output, "rated")
    first = promotion.promote_if(CONFIG, output, "rated", "test/top1 >= champion + 0.2 and test/top1 > 0.4")
    assert (first.promoted, first.champion) == (True, None)
    assert trained(output, 0.6) == 2
    refused = promotion.promote_if(CONFIG, output, "rated", "test/top1 >= champion + 0.2")
    assert not refused.promoted
    assert refused.outcomes[0].right == pytest.approx(0.7)
    assert aliases() == {"candidate": 2, "champion": 1}
    assert trained(output, 0.7, test_data="u" * 64, parents=("rated@champion", "speller")) == 3
    done = promotion.promote_if(CONFIG, output, "rated", "test/top1 >= champion + 0.2")
    assert done.promoted
    assert done.notes == ["the test data of versions 3 (uuuuuuuuuuuu) and 1 (tttttttttttt) differ"]
    assert registry.promote(CONFIG, output, "rated", 2) == "2"
    assert aliases() == {"candidate": 3, "champion": 2, "previous": 3}

    assert promotion.rollback(CONFIG, output, "rated") == (2, 3)
    assert aliases() == {"candidate": 3, "champion": 3, "previous": 1}
    assert promotion.rollback(CONFIG, output, "rated") == (3, 1)
    assert aliases() == {"candidate": 3, "champion": 1}
    with pytest.raises(TrackingError, match="no champion before version 1"):
        promotion.rollback(CONFIG, output, "rated")

    found = promotion.compare(CONFIG, output, "rated/1", "rated/3")
    assert ("test/top1", 0.5, 0.7) in found.metrics
    assert found.params == [("train.learning_rate", "0.05", "0.07" if 0.7 / 10 == 0.07 else str(0.7 / 10))]
    assert found.notes
    third = registry.show(CONFIG, output, "rated")[0]
    assert third.parents == ("rated/1", "speller/1")
    assert {d.context: (d.name, d.digest, d.parents) for d in third.data} == {
        "train": ("words", "a" * 64, ("b" * 64,)),
        "test": ("tests", "u" * 64, ()),
    }
    assert "labelmill.rolled_back" in third.tags
    line = promotion.lineage(CONFIG, output, "rated/3")
    assert [(depth, f"{v.name}/{v.version}") for depth, v in line] == [(0, "rated/3"), (1, "rated/1"), (1, "speller/1")]


def test_promotion_on_the_command_line(output: Path) -> None:
    where = ["--output", output]
    refused = labelmill(output, "models", "promote", "rated", "--if", "test/top1 >= champion + 0.5", *where)
    assert refused.returncode == 3
    assert "doesn't hold (0.7000 and 1.000)" in refused.stdout
    assert "version 3 wasn't promoted; champion stays version 1" in refused.stdout
    wrong = labelmill(output, "models", "promote", "rated", "--if", "test/top >= champion", *where)
    assert wrong.returncode == 2
    assert "Did you mean 'test/top1'?" in wrong.stderr
    shown = labelmill(output, "models", "show", "rated", *where)
    assert f"words {'a' * 64} (/data/words), made from bbbbbbbbbbbb" in shown.stdout
    assert "parent models" in shown.stdout


# --- prediction over shards -----------------------------------------------------------------------------------


def text_data(folder: Path | str, samples: int = 230, per_shard: int = 40) -> Manifest:
    fields = {"text": FieldSpec(kind="text", ext="txt")}
    label = LabelSpec(form="single", num_classes=5)
    with ShardWriter(str(folder), "words", fields, label, layout="packed", samples_per_shard=per_shard) as writer:
        for i in range(samples):
            writer.write(f"s{i:05d}", {"text": WORDS[i % 5] + "x" * (i % 3)}, {"label": i % 5})
        return writer.close()


def check_parts(task: batch.Task, output: Path) -> None:
    """Each sample exactly once, in order, with what the model says of it alone."""
    tables = []
    for shard in range(len(task.manifest.shards)):
        system, inner = store.filesystem(task.part(shard))
        tables.append(pq.read_table(inner, filesystem=system))
    table = pa.concat_tables(tables)
    assert table.column("key").to_pylist() == [f"s{i:05d}" for i in range(task.manifest.num_samples)]
    predictor = load_model(output.parent / "speller")
    alone = predictor.predict([WORDS[i % 5] + "x" * (i % 3) for i in range(table.num_rows)], task.k)
    assert table.column("class").combine_chunks().flatten().to_pylist() == alone.column("class").to_pylist()
    scores = table.column("score").combine_chunks().flatten().to_numpy()
    np.testing.assert_allclose(scores, alone.column("score").to_numpy(), atol=1e-6)
    assert table.column("problem").null_count == table.num_rows


@pytest.mark.ray
def test_a_repeated_job_does_what_is_missing(output: Path, tmp_path: Path, ray_session: None) -> None:
    out = tmp_path / "out"
    task = batch.make_task(CONFIG, output, "speller", text_data(tmp_path / "data"), str(out), k=2)
    done = batch.predict_shards(task, CONFIG, output, CLUSTER)
    assert (done["rows"], done["bad"], len(done["parts"])) == (230, 0, 6)
    check_parts(task, output)
    before = {path.name: path.stat().st_mtime_ns for path in out.glob("part-*")}

    # one part is lost, one cut, and a killed worker left a temporary file long ago
    lost, cut = out / batch.part_name(1), out / batch.part_name(4)
    lost.unlink()
    cut.write_bytes(cut.read_bytes()[:-9])
    left = out / "part-000001.parquet.0badcafe.part"
    left.write_bytes(b"half")
    os.utime(left, (1, 1))
    (out / batch.SUMMARY).unlink()
    assert batch.predict_shards(task, CONFIG, output, CLUSTER) == done
    check_parts(task, output)
    after = {path.name: path.stat().st_mtime_ns for path in out.glob("part-*")}
    assert {name for name in before if after[name] != before[name]} == {lost.name, cut.name}
    assert sorted(path.name for path in out.iterdir()) == ["job.json", *sorted(before), "predictions.json"]

    other = batch.make_task(CONFIG, output, "speller", task.manifest, str(out), k=3)
    with pytest.raises(DataError, match="k: 2 there, 3 asked for"):
        batch.predict_shards(other, CONFIG, output, CLUSTER)
    batch._claim(other, overwrite=True)
    assert [path.name for path in out.iterdir()] == [batch.JOB], "no part of another job is left"
    with pytest.raises(DataError, match="isn't empty"):
        batch.predict_shards(
            batch.make_task(CONFIG, output, "speller", task.manifest, str(output)), CONFIG, output, CLUSTER
        )
    with pytest.raises(DataError, match=r"a field of kind array .* the data has: text \(text\)"):
        batch.make_task(CONFIG, output, "vectors", task.manifest, str(out))


def picture_data(place: str) -> Manifest:
    """Nine pictures in three shards; the seventh is none."""
    fields, label = {"image": FieldSpec(kind="image", ext="png")}, LabelSpec(form="none")
    with ShardWriter(place, "pictures", fields, label, samples_per_shard=4) as writer:
        for i in range(9):
            buffer = io.BytesIO()
            Image.fromarray(PICTURES[i % 5, :, :, 0]).save(buffer, "PNG")
            writer.write(f"p{i}", {"image": buffer.getvalue() if i != 6 else b"no picture"}, {})
        return writer.close()


@pytest.mark.ray
def test_bad_samples_have_a_row_that_says_why(output: Path, tmp_path: Path, ray_session: None) -> None:
    out = tmp_path / "out"
    strict = batch.make_task(CONFIG, output, "pictures", picture_data(str(tmp_path / "data")), str(out), k=1)
    with pytest.raises(DataError, match=r"sample 'p6' can't be used: .*--max-bad"):
        batch.predict_shards(strict, CONFIG, output, CLUSTER)
    assert not (out / batch.part_name(1)).exists()
    lenient = dataclasses.replace(strict, max_bad=1)
    predictor = load_model(output.parent / "pictures")
    assert [batch.predict_shard(predictor, lenient, shard).bad for shard in range(3)] == [0, 1, 0]
    done = batch.predict_shards(lenient, CONFIG, output, CLUSTER)  # finds all parts there and reads them back
    assert (done["rows"], done["bad"]) == (9, 1)
    rows = pq.read_table(out / batch.part_name(1)).to_pylist()
    assert [row["class"] for row in rows] == [["apple"], ["hello"], None, ["banana"]]
    assert "not an image" in rows[2]["problem"]
    with pytest.raises(DataError, match=r"sample 'p6' can't be used"):
        batch.predict_shards(strict, CONFIG, output, CLUSTER)


def test_a_part_on_s3_appears_whole_or_not_at_all(output: Path, s3_store: str) -> None:
    task = batch.make_task(CONFIG, output, "pictures", picture_data("s3://data/in"), "s3://data/out", k=1)
    predictor = load_model(output.parent / "pictures")
    with pytest.raises(DataError, match="sample 'p6'"):
        batch.predict_shard(predictor, task, 1)
    assert store.list_files("s3://data/out") == []
    part = batch.predict_shard(predictor, dataclasses.replace(task, max_bad=1), 1)
    assert (part.rows, part.bad, part.problems[0][0]) == (4, 1, "p6")
    assert store.list_files("s3://data/out") == [batch.part_name(1)]


@pytest.mark.ray
@pytest.mark.parametrize("place", ["disk", "s3"])
def test_a_killed_job_writes_each_part_exactly_once(
    place: str,
    output: Path,
    tmp_path: Path,
    ray_session: None,
    ray_storage: FaultServer,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The command is killed with all its processes after its first part; a worker of the repetition is killed as well."""
    for name, value in s3_environment(ray_storage).items():
        monkeypatch.setenv(name, value)
    store.make_bucket("s3://predictions")
    out = "s3://predictions/out" if place == "s3" else str(tmp_path / "out")
    data = text_data(tmp_path / "data", samples=40_000, per_shard=4096)
    total = len(data.shards)

    def parts() -> set[str]:
        return {name for name in store.list_files(out) if name.endswith(".parquet")}

    command = [str(LABELMILL), "models", "predict", "speller", "--data", data.root, "--out", out, "-k", "2",
               "--cpus", "0.5", "--output", str(output)]  # fmt: skip
    first = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True)
    _until(lambda: parts() or first.poll() is not None)
    assert first.poll() is None, first.communicate()[0].decode()
    _kill_tree(first.pid)
    first.wait(30)
    kept = parts()
    assert 0 < len(kept) < total
    assert batch.SUMMARY not in store.list_files(out)

    task = batch.make_task(CONFIG, output, "speller", load_manifest(data.root), out, k=2)
    written: list[float] = []
    killed: list[int] = []

    def progress(done: float, of: float, rate: float, text: str) -> None:
        written.append(done)
        if len(written) == 2:
            workers = [p for p in _family(os.getpid()) if "ShardPredictor" in " ".join(p.cmdline())]
            workers[0].kill()
            killed.append(workers[0].pid)

    done = batch.predict_shards(task, CONFIG, output, ClusterConfig(workers=1, cpus_per_worker=0.5), progress)
    assert killed
    assert written[0] == len(kept), "what was there isn't done again"
    assert (done["rows"], len(done["parts"])) == (40_000, total)
    check_parts(task, output)


def _family(pid: int) -> list[psutil.Process]:
    """The live descendants of a process, those of Ray's raylet among them."""
    found = []
    with contextlib.suppress(psutil.NoSuchProcess):
        for process in psutil.Process(pid).children(recursive=True):
            with contextlib.suppress(psutil.Error):
                process.cmdline()
                found.append(process)
    return found


def _kill_tree(pid: int) -> None:
    for process in [*_family(pid), psutil.Process(pid)]:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()


def _until(holds: Callable[[], Any], timeout_s: float = 120) -> None:
    deadline = time.monotonic() + timeout_s
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.05)


# --- HTTP -----------------------------------------------------------------------------------------------------


def ask(url: str, content: Any, path: str = "/invocations", kind: str = "application/json") -> tuple[int, str]:
    body = content if isinstance(content, bytes) else json.dumps(content).encode()
    request = urllib.request.Request(url + path, body, {"content-type": kind})
    try:
        with urllib.request.urlopen(request, timeout=30) as answer:
            return answer.status, answer.read().decode()
    except urllib.error.HTTPError as error:
        return error.code, error.read().decode()


def best(answer: tuple[int, str]) -> list[str]:
    """The first class of each input."""
    assert answer[0] == 200, answer
    return [row["class"] for row in json.loads(answer[1])["predictions"] if row["rank"] == 1]


def check_vectors(url: str) -> None:
    """What both servers must do with numbers."""
    whole, broken = [[1, 0, 0, 0, 0], [0, 1, 0, 0, 0]], [[0.0, 0.5, 2, 0.25, 0]]
    assert best(ask(url, {"inputs": whole, "params": {"k": 1}})) == ["hello", "world"]
    assert best(ask(url, {"inputs": broken})) == ["banana"]
    assert best(ask(url, {"instances": [[0, 0, 0, 1.0, 0]]})) == ["orange"]
    frame = {"dataframe_split": {"columns": ["vector"], "data": [[row] for row in whole]}}
    assert best(ask(url, frame)) == ["hello", "world"]
    for content, named in (
        ({"inputs": [[1, 2]]}, ("vector", "inputs[0]")),
        ({"dataframe_split": {"columns": ["vec"], "data": [[[1, 0, 0, 0, 0]]]}}, ("vector",)),
        ({"inputs": whole, "params": {"k": 0}}, ("params.k",)),
        ({"inputs": whole, "params": {"k": "many"}}, ("'k'", "params.k")),
        ({"inputs": [["a", 0, 0, 0, 0]]}, ("'a'", "inputs[0][0]")),
    ):
        status, text = ask(url, content)
        assert status == 400, text
        assert any(name in text for name in named), text
        assert "Traceback" not in text
    assert ask(url, b"{")[0] == 400


def check_words(url: str) -> None:
    assert best(ask(url, {"inputs": ["bananna", "helo"], "params": {"k": 1}})) == ["banana", "hello"]
    status, text = ask(url, {"dataframe_records": [{"txt": "helo"}]})
    assert status == 400
    assert "text" in text


def check_pictures(url: str) -> None:
    buffer = io.BytesIO()
    Image.fromarray(PICTURES[2, :, :, 0]).save(buffer, "PNG")
    assert best(ask(url, {"inputs": [base64.b64encode(buffer.getvalue()).decode()]})) == ["banana"]
    status, text = ask(url, {"inputs": ["aGVsbG8gd29ybGQ="]})
    assert status == 400
    assert "not a readable image" in text


CHECKS = {"vectors": check_vectors, "speller": check_words, "pictures": check_pictures}


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        return probe.getsockname()[1]


@pytest.mark.ray
def test_ray_serve_answers_over_http(output: Path, ray_session: None) -> None:
    from labelmill import api

    port = free_port()
    with api.serve("vectors", port=port, output=output, tracking=CONFIG) as (url, version):
        assert (url, version) == (f"http://127.0.0.1:{port}", "vectors/1")
        with urllib.request.urlopen(url + "/model", timeout=30) as answer:
            assert json.load(answer)["model"] == "vectors/1"
        check_vectors(url)
        assert ask(url, {"inputs": []}) == (200, '{"predictions": []}')
        assert ask(url, {"inputs": []}, kind="text/plain")[0] == 415, "no page of a browser may ask unasked"
        assert ask(url, {"inputs": []}, path="/nowhere")[0] == 404
        listening = {c.laddr.ip for c in psutil.net_connections("tcp") if c.status == "LISTEN" and c.laddr.port == port}
        assert listening == {"127.0.0.1"}


@contextlib.contextmanager
def mlflow_server(output: Path, name: str, log: Path) -> Iterator[str]:
    port = free_port()
    command = [sys.executable, "-m", "mlflow", "models", "serve", "-m", f"models:/{name}/1", "--env-manager", "local",
               "-h", "127.0.0.1", "-p", str(port), "-w", "1"]  # fmt: skip
    env = {k: v for k, v in os.environ.items() if k != "PYTHONPATH" and not k.startswith("MLFLOW_")}
    env |= {"MLFLOW_TRACKING_URI": f"sqlite:///{output}/mlflow.db", "MLFLOW_DISABLE_TELEMETRY": "true"}
    env |= {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", "OMP_NUM_THREADS": "1"}
    with open(log, "wb") as out:
        server = subprocess.Popen(command, env=env, stdout=out, stderr=out, start_new_session=True, cwd=log.parent)
    url = f"http://127.0.0.1:{port}"

    def up() -> bool:
        assert server.poll() is None, log.read_text()[-3000:]
        with contextlib.suppress(OSError), urllib.request.urlopen(url + "/ping", timeout=2):
            return True
        return False

    try:
        _until(up)
        yield url
    finally:
        os.killpg(server.pid, signal.SIGKILL)
        server.wait(30)


@pytest.mark.parametrize("name", ["vectors", "pictures"])
def test_mlflow_serves_it_without_labelmill(name: str, output: Path, tmp_path: Path) -> None:
    with mlflow_server(output, name, tmp_path / "log") as url:
        CHECKS[name](url)
