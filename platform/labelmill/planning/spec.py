"""The cluster a plan is for: memory, rates and links of its workers.

Written as a preset (`h100:64`), a preset with changes (`h100:64,memory_gb=40`), fields alone, or a YAML file.
Units are decimal: GB is 1e9 bytes.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import Field, model_validator

from labelmill.errors import JobError, did_you_mean
from labelmill.job import StrictModel, validate_section

Precision = Literal["fp32", "tf32", "bf16"]


class Efficiency(StrictModel):
    """Shares of the data-sheet rates that training reaches: assumptions, unless they are measured."""

    encoder: float = Field(0.4, gt=0, le=1, description="of tflops, by the encoder's forward and backward pass")
    head: float = Field(0.5, gt=0, le=1, description="of tflops, by the head's matrix products")
    memory: float = Field(0.7, gt=0, le=1, description="of memory_gbps")
    network: float = Field(0.7, gt=0, le=1, description="of intra_gbps and inter_gbps")


class ClusterSpec(StrictModel):
    """A cluster of equal workers; a worker is one GPU, or one process on CPUs."""

    name: str = "cluster"
    workers: int = Field(1, ge=1)
    workers_per_node: int = Field(8, ge=1)
    memory_gb: float = Field(gt=0, description="memory of a worker, GB")
    reserved_gb: float = Field(2.0, ge=0, description="taken by driver, libraries and fragmentation, GB a worker")
    memory_gbps: float = Field(gt=0, description="rate of a worker's memory, GB/s")
    tflops: dict[Precision, float] = Field(min_length=1, description="dense TFLOP/s of a worker by precision")
    intra_gbps: float = Field(gt=0, description="what a worker can send within its node, GB/s")
    inter_gbps: float = Field(gt=0, description="what a worker can send to other nodes, GB/s")
    intra_us: float = Field(3.0, ge=0, description="time of a hop within a node, microseconds")
    inter_us: float = Field(8.0, ge=0, description="time of a hop between nodes, microseconds")
    launch_us: float = Field(4.0, ge=0, description="time to start one operation on the device, microseconds")
    efficiency: Efficiency = Efficiency()

    @model_validator(mode="after")
    def _rates(self) -> ClusterSpec:
        wrong = {name: rate for name, rate in self.tflops.items() if not rate > 0}
        if wrong:
            raise ValueError(f"tflops must be positive, not {wrong}")
        if self.reserved_gb >= self.memory_gb:
            raise ValueError(f"reserved_gb {self.reserved_gb} leaves nothing of memory_gb {self.memory_gb}")
        return self

    @property
    def memory(self) -> float:
        """Bytes of a worker that a job may use."""
        return (self.memory_gb - self.reserved_gb) * 1e9

    @property
    def memory_rate(self) -> float:
        """Bytes a second of a worker's memory."""
        return self.memory_gbps * 1e9 * self.efficiency.memory

    def flops(self, precision: Precision, part: Literal["encoder", "head"]) -> float:
        """FLOP/s that a part of the step reaches. Raises JobError for a precision without a rate."""
        if precision not in self.tflops:
            raise JobError(
                f"cluster {self.name}: tflops.{precision} is needed, there are only {', '.join(self.tflops)}."
            )
        return self.tflops[precision] * 1e12 * getattr(self.efficiency, part)

    def link(self, ranks: int, apart: int = 1) -> tuple[float, float]:
        """(bytes/s, seconds a hop) of a ring over `ranks` workers that are `apart` from each other.

        Between nodes a ring uses the links of all its members in a node, up to what they can pass on within it.
        """
        share = self.efficiency.network * 1e9
        span = (ranks - 1) * apart + 1
        if span <= self.workers_per_node:
            return self.intra_gbps * share, self.intra_us * 1e-6
        in_node = max(1, self.workers_per_node // apart)
        rate = self.inter_gbps * in_node
        return (min(rate, self.intra_gbps) if in_node > 1 else rate) * share, self.inter_us * 1e-6

    def seconds(self, kind: str, sent: float, ranks: int, apart: int = 1) -> float:
        """Time of a collective in which each rank sends `sent` bytes."""
        if ranks == 1:
            return 0.0
        rate, hop = self.link(ranks, apart)
        # a gather passes every part around the ring, sums go up and down a tree when they are small
        hops = ranks - 1 if kind == "all_gather" else 2 * math.ceil(math.log2(ranks))
        return hops * hop + sent / rate


_SHEET = {"workers_per_node": 8}
PRESETS: dict[str, dict[str, Any]] = {
    # NVIDIA's data sheets, dense rates: H100 SXM (80 GB HBM3, NVLink 900 GB/s both ways together) in a DGX H100
    # with one 400 Gb/s adapter a GPU; H200 SXM alike; A100 SXM 80 GB (NVLink 600 GB/s) in a DGX A100 with one
    # 200 Gb/s adapter a GPU
    "h100": {
        "memory_gb": 80,
        "memory_gbps": 3350,
        "tflops": {"fp32": 67, "tf32": 494.5, "bf16": 989.5},
        "intra_gbps": 450,
        "inter_gbps": 50,
        **_SHEET,
    },
    "h200": {
        "memory_gb": 141,
        "memory_gbps": 4800,
        "tflops": {"fp32": 67, "tf32": 494.5, "bf16": 989.5},
        "intra_gbps": 450,
        "inter_gbps": 50,
        **_SHEET,
    },
    "a100": {
        "memory_gb": 80,
        "memory_gbps": 2039,
        "tflops": {"fp32": 19.5, "tf32": 156, "bf16": 312},
        "intra_gbps": 300,
        "inter_gbps": 25,
        **_SHEET,
    },
}
LOCAL = "local"


def read_spec(text: str, workers: int) -> ClusterSpec:
    """SPEC of the command line -> cluster; `workers` is the job's number, for a spec that names none.

    Raises JobError that names the wrong field.
    """
    head, *changes = text.split(",")
    fields: dict[str, Any] = {"workers": workers}
    name, colon, count = head.partition(":")
    if Path(head).suffix in (".yaml", ".yml"):
        fields |= _read_file(Path(head))
    elif name in PRESETS:
        fields |= PRESETS[name] | {"name": name}
        if colon:
            fields["workers"] = _value(count)
    elif "=" in head:
        changes = [head, *changes]
    else:
        raise JobError(
            f"--cluster {text!r}: write a preset ({', '.join(PRESETS)}) with the number of workers, as h100:64, "
            f"fields as memory_gb=40,..., a .yaml file, or {LOCAL}.{did_you_mean(name, [*PRESETS, LOCAL])}"
        )
    for change in changes:
        path, equals, value = change.partition("=")
        if not equals:
            raise JobError(f"--cluster {text!r}: {change!r} is no change; write field=value, as memory_gb=40.")
        *outer, last = path.strip().split(".")
        node = fields
        for part in outer:
            node[part] = dict(node.get(part) or {})
            node = node[part]
        node[last] = _value(value)
    return validate_section(fields, ClusterSpec, f"--cluster {text}")


def _read_file(path: Path) -> dict[str, Any]:
    try:
        found = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise JobError(f"--cluster {path}: {error.strerror or error}.") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise JobError(f"--cluster {path}: not readable as YAML: {error}") from error
    if not isinstance(found, dict):
        raise JobError(f"--cluster {path}: a cluster is a mapping of fields, not a {type(found).__name__}.")
    if "preset" in found:
        preset = found.pop("preset")
        if preset not in PRESETS:
            raise JobError(f"--cluster {path}: preset: {preset!r} is unknown.{did_you_mean(str(preset), PRESETS)}")
        found = PRESETS[preset] | {"name": preset} | found
    return found


def _value(text: str) -> Any:
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError:
        return text
