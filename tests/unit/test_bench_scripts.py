"""What the scripts under ci/bench measure with: processes' CPU time and memory, and the table made of it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def scripts(monkeypatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(ROOT / "ci/bench"))
    import stream_measure
    import stream_tables

    stream_measure.tables = stream_tables
    return stream_measure


BURN = """
import multiprocessing, sys, time

def burn(seconds):
    kept = bytearray(50 << 20)
    for i in range(0, len(kept), 4096):
        kept[i] = 1
    while time.process_time() < seconds:
        pass
    print("done", flush=True)
    sys.stdin.readline() or time.sleep(60)  # a forked process has no input

if __name__ == "__main__":
    other = multiprocessing.get_context("fork").Process(target=burn, args=(0.3,))
    other.start()
    burn(0.3)
    other.kill()
    other.join()
    print("alone", flush=True)
    sys.stdin.readline() or time.sleep(60)  # a forked process has no input
"""


def test_cpu_and_memory_of_a_tree(scripts, tmp_path):
    (tmp_path / "burn.py").write_text(BURN)
    line = [sys.executable, str(tmp_path / "burn.py")]
    with subprocess.Popen(line, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as child:
        tree = scripts.Tree(child.pid, memory=True, period=0.05)
        assert [child.stdout.readline(), child.stdout.readline()] == ["done\n", "done\n"]
        both, daemons = tree.cpu()
        peak = tree.look().own
        child.stdin.write("\n")
        child.stdin.flush()
        assert child.stdout.readline() == "alone\n"
        after, _ = tree.cpu()
        child.stdin.write("\n")
        child.stdin.flush()
        tree.close()
    assert 0.55 <= both < 2.0
    assert daemons == 0.0
    assert after >= both  # what the ended process had used still counts
    assert 100 < peak < 250


def run(rate: float, cpu: float, others: float = 0.0) -> list[dict[str, float]]:
    cold = {
        "rate": rate / 2,
        "steady": rate,
        "cpu_per_1k": cpu,
        "daemon_cpu_per_1k": 0.0,
        "first_s": 1.0,
        "others": 0.0,
    }
    return [cold, cold | {"rate": rate, "first_s": 0.2, "others": others}]


def test_aims(scripts):
    memory = {"peak_mb": 400.0, "shared_mb": 10.0, "files_mb": 100.0, "daemons_mb": 0.0}
    result = {
        "name": "jp",
        "limit": [{"rate": 8000.0, "cpu_per_1k": 0.25, "cores": 2, "best": "threads"}],
        "runs": {
            "labelmill": [run(6600, 0.30), run(6400, 0.32), run(6500, 0.29)],
            "litdata-w2": [run(5000, 0.4)],
            "litdata-w2-shuffle": [run(9000, 0.4)],
            "webdataset-w0": [run(2000, 0.4, others=0.3)],
            "ray-webdataset": [run(1000, 1.4)],
        },
        "memory": {"labelmill": memory, "litdata-w2": memory | {"peak_mb": 500.0, "files_mb": 300.0}},
    }
    text = scripts.tables.aims(result)
    for line in (
        "| warm samples/s over the best other, litdata-w2 | 1.30 | >= 1.2 | yes |",
        "| warm samples/s over ray-webdataset | 6.50 | >= 3 | yes |",
        "| warm samples/s over the decode limit | 0.81 | >= 0.8 | yes |",
        "| CPU per 1,000 samples over pure decode | 1.20 | <= 1.25 | yes |",
        "| first batch in a warm session, s | 0.20 | <= 0.5 | yes |",
        "| peak memory over the lightest other | 0.80 | <= 1 | yes |",
        "| peak memory without mapped files over the lightest other | 1.50 | <= 1 | no |",
    ):
        assert line in text
    assert "S3" not in text  # not measured, so not judged
    table = scripts.tables.table(result)
    assert (
        "| labelmill | 6,500 (6,400-6,600) | 6,500 (6,400-6,600) | 3,250 (3,200-3,300) | 0.300 (0.290-0.320) |" in table
    )
    assert "In 1 of 14 passes other processes took more than 10% of the machine (up to 30%)" in table
