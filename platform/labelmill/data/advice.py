"""From measured costs to a ceiling and to what would raise it: the arithmetic of `labelmill data bench`."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import asdict, dataclass
from typing import Any, Literal

Place = Literal["late", "task"]
READING = ("fetch", "verify", "parse", "gather")
_WORTH = 0.10  # of all CPU time: less isn't worth a change
_READERS = 2  # read tasks at once, by default


@dataclass(frozen=True)
class Cost:
    """CPU and wall seconds per 1,000 samples, on one thread."""

    cpu_s: float
    wall_s: float

    def __add__(self, other: Cost) -> Cost:
        return Cost(self.cpu_s + other.cpu_s, self.wall_s + other.wall_s)


@dataclass(frozen=True)
class Ceiling:
    """Samples per second that a decode place can reach on this machine, and what stands in the way of more."""

    rate: float
    bound: str


@dataclass
class Bench:
    """What `labelmill.data.bench.bench` found.

    Attributes:
        name, layout, field, kind, samples, shards: what was measured.
        sample_bytes, stored_bytes: mean bytes of the field's content, and of a sample in its shard.
        shard_samples: mean samples of the data set's shards.
        threads: CPUs that the ceilings assume.
        remote: whether the shards come over a network; `latency_s` is then the time of one small read.
        parts: costs of fetch, verify (sha256), parse (finding the samples), gather (blocks in the plan's order), decode
            (in the rank). With a Ray session also tasks (starting read tasks) and hand over (a block through the object
            store). For images "decode, task", "hand over, task" and "copy, task" (into the batch) stand for decode and
            hand over when read tasks decode.
        fetch_rate: samples/s of `threads` fetches at once.
        decode_rate: samples/s of decoding alone: `one` thread, that many `threads`, that many `processes`.
        packed: cost of parse and gather if the same samples were packed; None where that wasn't tried.
    """

    name: str
    layout: str
    field: str
    kind: str
    samples: int
    shards: int
    sample_bytes: float
    stored_bytes: float
    shard_samples: float
    threads: int
    remote: bool
    latency_s: float = 0.0
    parts: dict[str, Cost] = dataclasses.field(default_factory=dict)
    fetch_rate: float = 0.0
    decode_rate: dict[str, float] = dataclasses.field(default_factory=dict)
    packed: Cost | None = None

    @property
    def decode_limit(self) -> float:
        """Samples/s if nothing but decoding had to be done."""
        return max(self.decode_rate.values())

    @property
    def places(self) -> tuple[Place, ...]:
        """Where this field can be decoded."""
        return ("late", "task") if self.kind == "image" else ("late",)

    def used(self, place: Place) -> dict[str, Cost]:
        """The parts that a stream pays when it decodes at `place`."""
        late = ("decode", "hand over")
        if place == "late":
            return {name: cost for name, cost in self.parts.items() if not name.endswith(", task")}
        return {name: cost for name, cost in self.parts.items() if name not in late}

    def cpu_s(self, place: Place) -> float:
        """CPU seconds per 1,000 samples."""
        return sum(cost.cpu_s for cost in self.used(place).values())

    def ceiling(self, place: Place) -> Ceiling:
        """The slowest of: all CPUs busy with all parts, the decoder, the rank's copy, the network."""
        parts = self.used(place)
        largest = max(parts, key=lambda name: parts[name].cpu_s)
        total = self.cpu_s(place)
        share = parts[largest].cpu_s / total if total else 0.0
        way = "threads" if place == "late" else "processes"
        limits = {
            f"CPU time, {share:.0%} of it {largest}": self.threads * 1000 / max(total, 1e-9),
            f"the decoder in {way}": self.decode_rate.get(way, self.decode_rate["one"]),
        }
        if place == "task":
            limits["copying into batches"] = 1000 / max(self.parts["copy, task"].wall_s, 1e-9)
        if self.remote:
            limits["the network"] = self.fetch_rate
        bound = min(limits, key=lambda name: limits[name])
        return Ceiling(limits[bound], bound)

    @property
    def best(self) -> Place:
        """The decode place with the higher ceiling."""
        return max(self.places, key=lambda place: self.ceiling(place).rate)

    def as_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        ceilings = {place: asdict(self.ceiling(place)) for place in self.places}
        more = {"decode_limit": self.decode_limit, "ceilings": ceilings, "best": self.best, "advice": advise(self)}
        return asdict(self) | more


def advise(found: Bench) -> list[str]:
    """What would help, most first; each from costs that were measured."""
    place = found.best
    total = max(found.cpu_s(place), 1e-9)
    hints = [*_storage(found, total), *_places(found), *_readers(found, place)]
    hints = [(gain, text) for gain, text in hints if gain >= _WORTH]
    ceiling, limit = found.ceiling(place), found.decode_limit
    lines = [text for _, text in sorted(hints, reverse=True)]
    if ceiling.rate >= 0.8 * limit:
        what = " or, for a job that needs less detail, a smaller image_size" if found.kind == "image" else ""
        lines.append(f"The decoder sets the pace ({ceiling.rate / limit:.0%} of its limit): only more CPUs{what} help.")
    return lines or ["Nothing stands out: no single change would save a tenth of the CPU time."]


def _storage(found: Bench, total: float) -> list[tuple[float, str]]:
    """Layout, shards, checksums, cache: (share of the CPU time or of the wait that it would save, advice)."""
    parts, hints = found.parts, []
    if found.packed is not None:
        now = parts["parse"].cpu_s + parts["gather"].cpu_s
        hints.append(
            (
                (now - found.packed.cpu_s) / total,
                f"Pack the samples (import with --layout packed): parse and gather take {now:.4f} CPU s per 1,000 as a tar of "
                f"{found.stored_bytes:,.0f} bytes a sample, {found.packed.cpu_s:.4f} packed, of {total:.4f} in all.",
            )
        )
    verify = parts["verify"].cpu_s
    hints.append(
        (
            verify / total,
            f"Checksums take {verify / total:.0%} of the CPU time: with data.verify: first, only the first epoch pays them.",
        )
    )
    if found.remote:
        share = max(parts["fetch"].cpu_s / total, 1 - found.fetch_rate / found.decode_limit)
        hints.append(
            (
                share,
                f"Keep local copies (data.cache.folder): fetching takes {parts['fetch'].cpu_s / total:.0%} of the CPU time "
                f"and {found.threads} at once give {found.fetch_rate:,.0f} samples/s; later epochs would read from disk.",
            )
        )
        wait = found.latency_s / max(parts["fetch"].wall_s * found.shard_samples / 1000, 1e-9)
        hints.append(
            (
                wait,
                f"Make larger shards (--shard-mb): a request takes {found.latency_s * 1000:.1f} ms before the first byte, "
                f"{wait:.0%} of the time a shard of {found.shard_samples:,.0f} samples takes.",
            )
        )
    if "tasks" in parts:
        share = parts["tasks"].cpu_s / total
        hints.append(
            (
                share,
                f"Make larger shards (--shard-mb) or data.window larger: starting read tasks takes {share:.0%} of the CPU "
                f"time at {found.shard_samples:,.0f} samples a shard.",
            )
        )
    return hints


def _places(found: Bench) -> list[tuple[float, str]]:
    if "task" not in found.places or "hand over, task" not in found.parts:
        return []
    late, task = found.ceiling("late").rate, found.ceiling("task").rate
    rates, hint = found.decode_rate, ""
    if rates.get("threads", math.inf) < 0.8 * rates.get("processes", 0.0):
        hint = (
            f" Threads hinder each other in this decoder ({rates['threads']:,.0f}/s against {rates['processes']:,.0f}/s "
            "in processes)."
        )
    if late >= task:
        text = (
            f"Decode in the rank's threads (data.decode: late): up to {late:,.0f} samples/s, in read tasks {task:,.0f}."
        )
        return [(1 - task / late, text + hint)]
    text = f"Decode in read tasks (data.decode: task): up to {task:,.0f} samples/s, late in the rank {late:,.0f}."
    return [(1 - late / task, text + hint)]


def _readers(found: Bench, place: Place) -> list[tuple[float, str]]:
    names = [*READING, *(["decode, task"] if place == "task" else [])]
    cost = sum((found.parts[name] for name in names), Cost(0.0, 0.0))
    needed = math.ceil(found.ceiling(place).rate * cost.wall_s / 1000 - 0.05)
    if needed <= _READERS:
        return []
    busy = min(1.0, cost.cpu_s / max(cost.wall_s, 1e-9))
    text = (
        f"Read with more tasks (data.readers: {needed}, each with cluster.read_cpus: {max(0.25, round(busy * 4) / 4):g}): one "
        f"takes {cost.wall_s:.3f} s for 1,000 samples, so {_READERS} of them give {_READERS * 1000 / cost.wall_s:,.0f} samples/s."
    )
    return [(1 - _READERS / needed, text)]
