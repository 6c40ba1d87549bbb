"""What can be seen of a run: Prometheus metrics scraped while it trains, the dashboard's queries, the trace, the status."""

from __future__ import annotations

import gzip
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import promql_parser
import pytest
import yaml

from labelmill.errors import TrackingError
from labelmill.job import TrackingConfig
from labelmill.tracking.status import read_status
from labelmill.training.loop import PARTS
from labelmill.training.metrics import LABELS, METRICS, RETRIES, SAMPLES

ROOT = Path(__file__).resolve().parents[2]
JOB = {
    "workload": "discrimination.spelling",
    "name": "seen",
    "words": {"languages": ["en"], "count": 600, "typos_per_word": 4, "queries": 50},
    "cluster": {"workers": 2, "cpus_per_worker": 0.5},
    "encoder": {"kind": "char_ngrams", "dim": 16, "buckets": 1024, "hidden": 0},
    "train": {"global_batch": 32, "steps": 240, "log_every": 20, "checkpoint_every": 60},
}
# runs the job in a thread and scrapes the node as Prometheus would, until the workers are gone
SCRAPE = """
import json, os, sys, threading, time, urllib.request
os.environ["RAY_metrics_report_interval_ms"] = "500"
from labelmill import api
from rich.console import Console
import ray
failed = []
def work():
    try:
        api.run("job.yaml", profile=True, console=Console(file=sys.stderr))
    except BaseException as error:
        failed.append(repr(error))
job = threading.Thread(target=work)
job.start()
seen = {}
while job.is_alive():
    time.sleep(0.3)
    try:
        (node,) = ray.nodes()
        url = f"http://{node['NodeManagerAddress']}:{node['MetricsExportPort']}/metrics"
        text = urllib.request.urlopen(url, timeout=5).read().decode()
    except Exception:
        continue
    for line in text.splitlines():
        if line.startswith("ray_labelmill_"):
            series, value = line.rsplit(" ", 1)
            seen[series] = float(value)
print(json.dumps(seen))
sys.exit(failed[0] if failed else 0)
"""


@pytest.fixture(scope="module")
def seen(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, float]]:
    """The folder of a finished run, and the last value of each series that was scraped while it trained."""
    folder = tmp_path_factory.mktemp("seen")
    (folder / "job.yaml").write_text(yaml.safe_dump(JOB))
    env = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": f"{ROOT / 'platform'}:{ROOT}"}
    done = subprocess.run(
        [sys.executable, "-c", SCRAPE], cwd=folder, env=env, capture_output=True, text=True, timeout=240, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return folder, json.loads(done.stdout.splitlines()[-1])


def labels_of(series: str) -> dict[str, str]:
    return dict(re.findall(r'(\w+)="([^"]*)"', series))


def test_every_metric_is_exported_by_every_rank(seen: tuple[Path, dict[str, float]]) -> None:
    series = seen[1]
    names = {name.partition("{")[0] for name in series}
    # these two count what didn't happen
    quiet = {RETRIES.exported, "ray_labelmill_bad_samples_total"}
    assert names == {m.exported for m in METRICS} - quiet
    for metric in METRICS:
        found = [labels_of(name) for name in series if name.startswith(metric.exported + "{")]
        if metric.exported not in quiet:
            assert {labels["rank"] for labels in found} == {"0", "1"}, metric.name
            assert {labels["run"] for labels in found} == {"seen"}
            assert all({*LABELS, *metric.labels} <= labels.keys() for labels in found)
    parts = {labels_of(n)["part"] for n in series if n.startswith("ray_labelmill_step_seconds{")}
    assert parts == set(PARTS)
    samples = [value for name, value in series.items() if name.startswith(SAMPLES.exported + "{")]
    assert len(samples) == 2
    assert all(0 < value <= 240 * 16 for value in samples)
    shares = [value for name, value in series.items() if name.startswith("ray_labelmill_data_wait_share{")]
    assert all(0 <= value <= 1 for value in shares)
    kinds = {labels_of(n)["collective"] for n in series if n.startswith("ray_labelmill_head_sent_bytes_total{")}
    assert {"all_gather", "all_reduce"} <= kinds


def selectors(node: Any) -> Iterator[Any]:
    """The series selectors of a parsed PromQL expression."""
    if isinstance(node, promql_parser.VectorSelector):
        yield node
    elif isinstance(node, promql_parser.MatrixSelector):
        yield from selectors(node.vector_selector)
    for part in ("expr", "lhs", "rhs"):
        if (below := getattr(node, part, None)) is not None:
            yield from selectors(below)
    for argument in getattr(node, "args", None) or ():
        yield from selectors(argument)


def queries() -> Iterator[tuple[str, str]]:
    """(expression, legend) of every target of the dashboard, its variables filled in."""
    board = json.loads((ROOT / "cluster" / "grafana" / "training.json").read_text())
    for panel in board["panels"]:
        for target in panel["targets"]:
            text = target["expr"].replace("$__rate_interval", "1m").replace("$run", ".*").replace("$stage", ".*")
            yield text, target["legendFormat"]
    for variable in board["templating"]["list"]:
        if match := re.fullmatch(
            r"label_values\((.*), (\w+)\)",
            str(variable["query"].get("query", "")) if (isinstance(variable["query"], dict)) else "",
        ):
            yield match[1].replace("$run", ".*"), f"{{{{{match[2]}}}}}"


def test_the_dashboard_asks_for_what_is_exported() -> None:
    known = {metric.exported: metric for metric in METRICS}
    drawn = set()
    for text, legend in queries():
        found = list(selectors(promql_parser.parse(text)))
        assert found, text
        wanted = set(re.findall(r"\{\{(\w+)\}\}", legend))
        grouped = set(re.findall(r"\w+", " ".join(re.findall(r"by \(([^)]*)\)", text))))
        for selector in found:
            metric = known[selector.name]
            drawn.add(metric.exported)
            have = {*LABELS, *metric.labels}
            assert {m.name for m in selector.matchers.matchers} <= have, text
            assert wanted | grouped <= have, text
            counted = any(
                call in text
                for call in (
                    "rate(",
                    "sum by (run, stage) (ray_labelmill_bad",
                    "sum by (run, stage) (ray_labelmill_storage",
                )
            )
            assert counted == (metric.kind == "counter"), f"a counter is drawn as a rate: {text}"
    assert drawn == set(known), "every metric has a panel"


def test_the_trace_shows_the_parts_of_a_step(seen: tuple[Path, dict[str, float]]) -> None:
    traces = sorted((seen[0] / "runs" / "seen" / "stages").glob("*/profile/trace-rank*.json.gz"))
    assert [path.name for path in traces] == ["trace-rank0.json.gz", "trace-rank1.json.gz"]
    with gzip.open(traces[0]) as file:
        events = json.load(file)["traceEvents"]
    counts = {part: sum(event.get("name") == part and event.get("ph") == "X" for event in events) for part in PARTS}
    assert counts == dict.fromkeys(PARTS, 3)
    assert any("all_gather" in event.get("name", "") or "allgather" in event.get("name", "") for event in events)


def test_the_status_tells_all_from_the_run_alone(seen: tuple[Path, dict[str, float]], tmp_path: Path) -> None:
    config = TrackingConfig(uri=f"sqlite:///{seen[0]}/runs/mlflow.db")
    found = read_status(config, tmp_path, "seen")
    assert (found.state, found.step, found.total_steps, found.restarts) == ("FINISHED", 240, 240, 0)
    assert set(found.stages) >= {"fit"}
    assert found.samples_per_second is not None
    assert found.damage == {}
    assert "train/loss" in found.metrics
    assert read_status(config, tmp_path, found.run_id) == found
    with pytest.raises(TrackingError, match="Did you mean 'seen'"):
        read_status(config, tmp_path, "sene")
    command = [str(Path(sys.executable).with_name("labelmill")), "status", "seen", "--output", str(seen[0] / "runs")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=100, check=True)
    assert re.search(r"step +240 of 240\n", done.stdout)
    assert re.search(r"restarts +0\n", done.stdout)
