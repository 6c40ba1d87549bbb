"""Jobs on a cluster: a Ray head of its own with a job server and token authentication, and commands in real processes."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.ray_head import RayHead

ROOT = Path(__file__).resolve().parents[2]
LABELMILL = [sys.executable, "-m", "labelmill.cli"]
TOKEN = "a-token-that-only-these-tests-know-0123456789"
SECRETS = {"PLANTED_VALUE": "planted-9f8e7d6c5b4a", "AWS_SECRET_ACCESS_KEY": "planted-key-0a1b2c3d4e"}

# what the package of a user may hold beside the module of workloads/README.md
METHODS = '''"""Two methods: one tells what its processes know, one lasts."""
import hashlib, os, time
from labelmill.job import Job
from labelmill.workload import workload


def known(names):
    return {name: hashlib.sha256(os.environ.get(name, "").encode()).hexdigest()[:8] for name in names}


@workload("mine.known", Job)
def tells(job, run):
    import json, labelmill, mymethods, ray
    run.connect()
    names = ["PLANTED_VALUE", "AWS_SECRET_ACCESS_KEY"]
    found = {"driver": known(names), "task": ray.get(ray.remote(known).remote(names))}
    (run.folder / "known.json").write_text(json.dumps(found | {"from": [mymethods.__file__, labelmill.__file__]}))
    raise ZeroDivisionError("no store takes the key " + os.environ["AWS_SECRET_ACCESS_KEY"])


@workload("mine.lasting", Job)
def lasting(job, run):
    with run.progress.stage("wait"):
        for i in range(1000):
            run.progress.update(i, 1000)
            time.sleep(0.2)
'''


@pytest.fixture(scope="module")
def head() -> Iterator[RayHead]:
    # labelmill is there, as on a cluster that others use; what a job ships comes first
    with RayHead(cpus=3, token=TOKEN, PYTHONPATH=str(ROOT / "platform")) as head:
        yield head


@pytest.fixture(scope="module")
def here(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder as a user has it: a package that is installed nowhere but on this side, data, jobs."""
    folder = tmp_path_factory.mktemp("here")
    package = folder / "src" / "mymethods"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("")
    (package / "known.py").write_text(METHODS)
    smoothed = re.search(
        r"```python\n(\"\"\"Softmax with label.*?)```", (ROOT / "workloads/README.md").read_text(), re.S
    )
    assert smoothed is not None
    (package / "smoothed.py").write_text(smoothed[1])
    (package / "notes.txt").write_text("a note\n")
    (package / "scratch.bin").write_bytes(os.urandom(1000))
    (package / ".env").write_text(f"PLANTED_VALUE={SECRETS['PLANTED_VALUE']}\n")
    (folder / "src" / "pyproject.toml").write_text("[project]\nname = 'my-methods'\n")
    (folder / "src" / ".rayignore").write_text("*.bin\n")
    info = folder / "src" / "my_methods-0.1.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: my-methods\nVersion: 0.1\n")
    methods = "mine.smoothed = mymethods.smoothed\nmine.known = mymethods.known\nmine.lasting = mymethods.known\n"
    (info / "entry_points.txt").write_text(f"[labelmill.workloads]\n{methods}")
    return folder


def surroundings(here: Path, head: RayHead | None, **more: str) -> dict[str, str]:
    """The environment of a user of the cluster."""
    env = {name: value for name, value in os.environ.items() if not name.startswith("RAY_A")}
    env |= {"COLUMNS": "140", "PYTHONPATH": f"{here / 'src'}:{ROOT / 'platform'}:{ROOT}"}
    return env | {"RAY_AUTH_TOKEN": TOKEN, **({"RAY_API_SERVER_ADDRESS": head.url} if head else {}), **more}


def command(here: Path, head: RayHead | None, *args: object, **more: str) -> subprocess.CompletedProcess[str]:
    """One call of labelmill in the user's folder, against the cluster."""
    call = [*LABELMILL, *map(str, args)]
    env = surroundings(here, head, **more)
    return subprocess.run(call, cwd=here, env=env, capture_output=True, text=True, timeout=300)


def write(here: Path, name: str, **job: Any) -> Path:
    path = here / f"{name}.yaml"
    path.write_text(
        yaml.safe_dump({"name": name, "cluster": {"workers": 1}, "tracking": {"system_metrics": False}} | job)
    )
    return path


def get(head: RayHead, path: str, token: str = TOKEN) -> tuple[int, str]:
    request = urllib.request.Request(head.url + path, headers={"Authorization": f"Bearer {token}"})
    try:
        with urllib.request.urlopen(request, timeout=10) as answer:
            return answer.status, answer.read().decode()
    except urllib.error.HTTPError as error:
        return error.code, error.read().decode()


@pytest.fixture(scope="module")
def colours(here: Path) -> dict[str, Any]:
    """A job of the user's own method that can be searched with, and its data."""
    rows = "".join(f"{word} number {i},{word}\n" for i in range(12) for word in ("red", "green", "blue"))
    (here / "colours.csv").write_text(f"text,label\n{rows}")
    table = ["data", "import", "table", "colours.csv", "--text", "text", "--label", "label"]
    assert command(here, None, *table, "--split", "train=0.7,test=0.3", "--out", "data").returncode == 0
    return {
        "workload": "mine.smoothed",
        "data": {"train": "data/train", "test": "data/test"},
        "encoder": {"kind": "char_ngrams", "dim": 16, "buckets": 512, "hidden": 0},
        "train": {"global_batch": 8, "steps": 40, "learning_rate": 0.05},
        "search": {
            "metric": "train/loss",
            "goal": "min",
            "space": {"train.learning_rate": [0.05, 0.00001]},
            "searcher": "grid",
            "engine": "in_process",
        },
    }


def test_a_job_trains_there_as_it_does_here(head: RayHead, here: Path, colours: dict[str, Any]) -> None:
    job = write(here, "smoothed", **colours)
    done = command(here, head, "submit", job, "--follow")
    assert done.returncode == 0, done.stdout + done.stderr
    lines = done.stdout.splitlines()
    assert "my_methods-0.1-0" in lines[0], "the package that announces the method travels with labelmill"
    assert "labelmill-" in lines[0]
    assert "--tune would search" in lines[1]
    start = next(i for i, line in enumerate(lines) if line == "fit: starts")
    assert any(re.match(r"fit: 40 / 40 · .*samples/s", line) for line in lines[start:])
    assert any(re.match(r"fit: done in [\d.]+ s", line) for line in lines[start:])
    assert re.match(r"smoothed-\w{6}: SUCCEEDED \d+ s", lines[-1])
    assert not [line for line in lines if "Running entrypoint" in line or "WebSocket" in line]

    # relative paths mean what they mean here, and the run is found here
    kept = command(here, None, "run", job)
    assert "smoothed: finished before, nothing has changed" in kept.stdout
    report = json.loads((here / "runs" / "smoothed" / "report" / "report.json").read_text())
    assert report["metrics"]["test/top1"] > 0.9
    assert report["meta"]["version"]


def test_a_search_runs_there(head: RayHead, here: Path, colours: dict[str, Any]) -> None:
    job = write(here, "searched", **colours)
    wrong = command(here, head, "submit", job, "--tune", "--set", "search.space={train.rate: [1]}")
    assert wrong.returncode == 2
    assert "search.space.train.rate" in wrong.stderr, "said here, before anything is sent"

    done = command(here, head, "submit", job, "--tune", "--follow", "--id", "searched-1")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "searched: 2 trials, 2 at once" in done.stdout
    assert done.stdout.splitlines()[-1].startswith("searched-1: SUCCEEDED")
    root = here / "runs" / "searched" / "search"
    table = json.loads((root / "report" / "report.json").read_text())["tables"]["trials"]
    assert sorted(row[2] for row in table["rows"]) == ["best", "finished"]
    best = yaml.safe_load((root / "best.yaml").read_text())
    assert best["train"]["learning_rate"] == 0.05


def test_looking_and_stopping(head: RayHead, here: Path) -> None:
    job = write(here, "lasting", workload="mine.lasting")
    sent = command(here, head, "submit", job, "--id", "lasting-1")
    assert sent.returncode == 0, sent.stderr
    assert "labelmill jobs logs lasting-1 --follow" in sent.stdout
    again = command(here, head, "submit", job, "--id", "lasting-1")
    assert again.returncode == 2
    assert "lasting-1 already exists" in again.stderr, "the server's reason without its traceback"

    until = time.monotonic() + 60
    while "wait: " not in (logs := command(here, head, "jobs", "logs", "lasting-1").stdout):
        assert time.monotonic() < until, logs
    assert logs.startswith("wait: starts\n")
    (known,) = (
        job for job in json.loads(command(here, head, "jobs", "list", "--json").stdout) if job["id"] == "lasting-1"
    )
    assert (known["status"], known["workload"], known["ended"]) == ("RUNNING", "mine.lasting", None)

    following = subprocess.Popen(
        [*LABELMILL, "jobs", "logs", "lasting-1", "-f"],
        cwd=here,
        env=surroundings(here, head),
        stdout=subprocess.PIPE,
        text=True,
    )
    stopped = command(here, head, "jobs", "stop", "lasting-1")
    assert stopped.stdout == "lasting-1: STOPPED\n"
    out, _ = following.communicate(timeout=60)
    assert following.returncode == 143
    assert out.splitlines()[-1].startswith("lasting-1: STOPPED")
    status = command(here, head, "jobs", "status", "lasting-1")
    assert status.stdout.startswith("lasting-1: STOPPED")
    unknown = command(here, head, "jobs", "logs", "nobody")
    assert unknown.returncode == 2
    assert "nobody: the cluster knows no such job" in unknown.stderr


def test_a_failed_job_and_its_secrets(head: RayHead, here: Path) -> None:
    job = write(here, "known", workload="mine.known", cluster={"env": ["PLANTED_*", "AWS_SECRET_ACCESS_KEY"]})
    done = command(here, head, "submit", job, "--follow", "--id", "known-1", **SECRETS)
    assert done.returncode == 1, done.stdout + done.stderr
    assert "handed over: AWS_SECRET_ACCESS_KEY, PLANTED_VALUE" in done.stdout
    assert "failed: ZeroDivisionError: no store takes the key ***" in done.stdout
    assert done.stdout.splitlines()[-2].startswith("known-1: FAILED")

    # every process of the job had them, and its code came from the archive
    import hashlib

    found = json.loads((here / "runs" / "known" / "known.json").read_text())
    wanted = {name: hashlib.sha256(value.encode()).hexdigest()[:8] for name, value in SECRETS.items()}
    assert found["driver"] == found["task"] == wanted
    assert all(str(head.folder / "ray") in place for place in found["from"])

    # and nothing else has: output, logs and files of Ray, the run with its database, what the servers tell
    key = json.loads(get(head, "/api/jobs/known-1")[1])["metadata"]["handover"]
    assert get(head, f"/api/packages/{key.replace('://', '/')}")[0] == 404, "the driver deleted them"
    told = [get(head, path)[1] for path in ("/api/jobs/", "/api/v0/runtime_envs?detail=1", "/api/v0/actors?detail=1")]
    assert "known-1" in told[0]
    places = [path for root in (head.folder, here / "runs") for path in root.rglob("*") if path.is_file()]
    assert len(places) > 50
    for value in SECRETS.values():
        assert value not in done.stdout + done.stderr
        assert not [text for text in told if value in text]
        assert not [path for path in places if value.encode() in path.read_bytes()]


def test_a_run_on_a_machine_of_the_cluster_hands_its_variables_over(head: RayHead, here: Path) -> None:
    script = f"""
import os, ray
from labelmill.cluster import connect
from labelmill.job import ClusterConfig
with connect(ClusterConfig(address="127.0.0.1:{head.port}", cpus_per_worker=0.1, env=("PLANTED_*",))):
    print(os.environ["LABELMILL_HANDOVER"])
    print(ray.get(ray.remote(lambda: os.environ["PLANTED_VALUE"]).remote()))
print("LABELMILL_HANDOVER" in os.environ)
"""
    call, env = [sys.executable, "-c", script], surroundings(here, head, **SECRETS)
    done = subprocess.run(call, env=env, capture_output=True, text=True, timeout=90)
    assert done.returncode == 0, done.stderr
    key, value, kept = done.stdout.split()
    assert (value, kept) == (SECRETS["PLANTED_VALUE"], "False")
    assert get(head, f"/api/packages/{key.replace('://', '/')}")[0] == 404


def test_what_is_refused(head: RayHead, here: Path) -> None:
    job = write(here, "refused", workload="mine.lasting")
    for name, args, parts in (
        ("client mode", ["--address", "ray://127.0.0.1:10001"], ("driver runs on the cluster", "http://HOST:8265")),
        ("no server", ["--address", "http://127.0.0.1:9"], ("no job server answers", "ssh -L 8265")),
        ("no variable", ["--env", "NOWHERE"], ("NOWHERE is not set",)),
        ("literal", ["--set", "tracking.password=hunter22"], ("Write ${env:NAME}",)),
        ("no folder", ["--workdir", "/nowhere", "--follow"], ("/nowhere", "isn't on this node", "--workdir")),
        ("no package", ["--package", "nothing-of-this-name"], ("not installed here",)),
    ):
        done = command(here, head, "submit", job, *args)
        text = " ".join((done.stdout + done.stderr).split())
        assert done.returncode == 2, f"{name}: {text}"
        assert "Traceback" not in text
        for part in parts:
            assert part in text, f"{name}: {text}"
        assert "hunter22" not in text
    wrong = command(here, head, "jobs", "list", RAY_AUTH_TOKEN="not-the-token-of-this-cluster-0123456789")
    assert wrong.returncode == 2
    assert "wants a token" in wrong.stderr
