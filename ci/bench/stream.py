"""Our stream against the other loaders and the decode limit, on the same data, alternated in one run.

    .venv/bin/python ci/bench/stream.py [--only jp|fm|tx] [--loaders A,B] [--rounds N] [--samples N] [--quick]
    .venv/bin/python ci/bench/stream.py --from s3           the same stream from an S3 server on loopback and from disk

Prints a Markdown table and the ratios to the aims; `--out FILE` keeps every number as JSON. Each loader runs
in a fresh process, `--rounds` times in turn with the others: a cold pass (it starts its session or workers) and a warm
one in the same process. A further turn, apart from the timed ones, takes memory. See ci/bench/README.md.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import stream_data
from stream_loaders import DEFAULT, EXTRA, RIVALS, Options, limit, run
from stream_tables import aims, machine, table


def bench(name: str, loaders: list[str], rounds: int, memory: bool, options: Options) -> dict[str, Any]:
    """All loaders in turn, `rounds` times; then once more for memory."""
    result: dict[str, Any] = {"name": name, "limit": [], "runs": {loader: [] for loader in loaders}, "memory": {}}
    failed: dict[str, str] = {}
    for number in range(rounds + (1 if memory else 0)):
        for_memory = number == rounds
        if not for_memory:
            result["limit"].append(limit(name, options))
        # turned by one each round, so that none always comes after the same one
        for loader in loaders[number % len(loaders) :] + loaders[: number % len(loaders)]:
            if loader in failed:
                continue
            try:
                records = run(name, loader, options, for_memory)
            except RuntimeError as error:
                failed[loader] = str(error)
                print(f"FAILED {error}", file=sys.stderr, flush=True)
                continue
            if for_memory:
                result["memory"][loader] = records[-1]
            else:
                result["runs"][loader].append(records)
            last = records[-1]
            print(
                f"  {name} {'memory' if for_memory else f'round {number + 1}'} {loader}: warm {last['rate']:,.0f}/s, "
                f"{last['cpu_per_1k']:.3f} CPU s/1k, first {last['first_s']:.2f} s",
                file=sys.stderr,
                flush=True,
            )
    result["failed"] = failed
    return result


def joined(old: dict[str, Any], new: dict[str, Any]) -> dict[str, Any]:
    """The rounds of two calls of one data set together."""
    loaders = dict.fromkeys([*old["runs"], *new["runs"]])
    runs = {loader: old["runs"].get(loader, []) + new["runs"].get(loader, []) for loader in loaders}
    return new | {"limit": old["limit"] + new["limit"], "runs": runs, "memory": old["memory"] | new["memory"]}


@contextmanager
def on_s3(name: str, data: Path) -> Iterator[str]:
    """The data set on a moto server on loopback; its URI."""
    from stream_s3 import serve, upload

    layout = stream_data.KINDS[name].layouts[-1]
    with serve():
        yield upload(data / name / layout, f"bench/{name}")


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=list(stream_data.KINDS), action="append", help="data set; repeat")
    parser.add_argument("--loaders", help=f"comma-separated; default {','.join(DEFAULT)}; more: {','.join(EXTRA)}")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--samples", type=int, default=2**62, help="most samples of a pass")
    parser.add_argument(
        "--quick", action="store_true", help="one round over few samples, no memory turn: does it work?"
    )
    parser.add_argument("--no-memory", action="store_true", help="leave out the memory turn")
    parser.add_argument("--from", dest="place", choices=["disk", "s3"], default="disk")
    parser.add_argument("--data", type=Path, default=Path(stream_data.DEFAULT))
    parser.add_argument("--rivals", help="Python of the environment made by rivals.sh; by default in --data")
    parser.add_argument("--out", type=Path, help="JSON file with every number")
    parser.add_argument("--add", action="store_true", help="add to the rounds that --out holds")
    given = parser.parse_args()
    loaders = given.loaders.split(",") if given.loaders else list(DEFAULT)
    if given.place == "s3" and not given.loaders:
        loaders = ["labelmill", "labelmill-s3"]
    rivals = given.rivals or os.environ.get("LABELMILL_BENCH_PYTHON") or str(given.data / "rivals/bin/python")
    if any(loader.split("-")[0] in RIVALS for loader in loaders) and not Path(rivals).exists():
        raise SystemExit(
            f"{rivals} isn't there: run ci/bench/rivals.sh, or leave the others out with --loaders labelmill"
        )
    samples, rounds = (min(given.samples, 4_000), 1) if given.quick else (given.samples, given.rounds)
    options = Options(given.data, rivals, samples)
    old = json.loads(given.out.read_text())["results"] if given.add and given.out and given.out.exists() else []
    results: dict[str, Any] = {result["name"]: result for result in old}
    began = time.time()
    print(f"{machine()}; {rounds} round(s)\n", flush=True)
    for name in given.only or list(stream_data.KINDS):
        stream_data.make(name, given.data)
        if any(loader.split("-")[0] in RIVALS for loader in loaders):
            stream_data.convert(name, given.data, rivals)
        memory = not (given.quick or given.no_memory)
        with on_s3(name, given.data) if "labelmill-s3" in loaders else nullcontext() as options.uri:
            result = bench(name, loaders, rounds, memory, options)
        result = joined(results[name], result) if name in results else result
        results[name] = result
        print(table(result), aims(result), sep="\n\n", end="\n\n", flush=True)
        if given.out:
            record = {"machine": machine(), "at": time.strftime("%F %T", time.localtime(began))}
            given.out.parent.mkdir(parents=True, exist_ok=True)
            given.out.write_text(json.dumps(record | {"results": list(results.values())}, indent=1))
    print(f"took {time.time() - began:.0f} s")
    if any(result["failed"] for result in results.values()):
        raise SystemExit("some loaders failed (above)")


if __name__ == "__main__":
    main()
