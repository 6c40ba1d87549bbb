"""How many training workers fit on the cluster now, host by host; which numbers a job may use; waiting for them."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from labelmill.errors import ClusterError, JobError
from labelmill.heads.ranks import check_shards
from labelmill.job import ClusterConfig

if TYPE_CHECKING:
    from labelmill.training.worker import FitTask

_POLL_S = 0.2
_ROUNDING = 1e-6


def usable_sizes(task: FitTask, cluster: ClusterConfig) -> list[int]:
    """Numbers of workers that training may have, ascending: the global batch and the heads' layout divide by them.

    A number that doesn't divide the batch is left out: shares of different size would change the mean of a loss that
    each rank makes for itself.
    """
    low = cluster.min_workers or cluster.workers
    micro = task.config.global_batch // task.config.accumulation
    sizes = [n for n in range(low, cluster.workers + 1) if micro % n == 0 and _fits_heads(task, n)]
    return sizes or [cluster.workers]


def _fits_heads(task: FitTask, workers: int) -> bool:
    try:
        for shards in task.head_shards:
            check_shards(shards, workers)
    except JobError:
        return False
    return True


def draining_nodes() -> dict[str, int]:
    """Hosts that are about to be taken away: node id -> deadline in Unix milliseconds, 0 for none."""
    from ray._private.state import state  # what Ray Train's own watcher asks; there is no public way

    return dict(state.get_draining_nodes() or {})


def free_workers(cluster: ClusterConfig) -> int:
    """Training workers that could start now beside one read task, each on one host."""
    from ray._private.state import available_resources_per_node

    return _fitting(cluster, available_resources_per_node())


def free_groups(cluster: ClusterConfig, wanted: int) -> int:
    """Groups of `cluster.workers` that could start now, each beside a read task of its own; at most `wanted`."""
    groups = 0
    while groups < wanted:
        reading = cluster.model_copy(update={"read_cpus": (groups + 1) * cluster.read_cpus})
        if free_workers(reading) < (groups + 1) * cluster.workers:
            break
        groups += 1
    return groups


def most_workers(cluster: ClusterConfig) -> int:
    """Training workers that would fit if nothing else ran."""
    import ray

    return _fitting(cluster, {node["NodeID"]: node["Resources"] for node in ray.nodes() if node["Alive"]})


def _fitting(cluster: ClusterConfig, resources: Mapping[str, Mapping[str, float]]) -> int:
    per_worker = {"CPU": cluster.cpus_per_worker, "GPU": cluster.gpus_per_worker}
    leaving = draining_nodes()
    nodes = [of_node for node, of_node in resources.items() if node not in leaving]
    fits = sum(
        int(min(of_node.get(kind, 0.0) / each + _ROUNDING for kind, each in per_worker.items() if each))
        for of_node in nodes
    )
    spare = sum(of_node.get("CPU", 0.0) for of_node in nodes) - cluster.read_cpus
    return max(0, min(fits, int(spare / cluster.cpus_per_worker + _ROUNDING)))


def wait_for_room(cluster: ClusterConfig, sizes: Sequence[int], settle_s: float) -> int:
    """The largest of `sizes` that fits. What an attempt that failed had may take `settle_s` to be seen as free again.

    Raises ClusterError when not even the smallest fits within `cluster.wait_s`.
    """
    began = time.monotonic()
    while True:
        free, most = free_workers(cluster), most_workers(cluster)
        fitting = [size for size in sizes if size <= free]
        possible = [size for size in sizes if size <= most]
        waited = time.monotonic() - began
        if fitting and (fitting[-1] >= max(possible, default=0) or waited >= settle_s):
            return fitting[-1]
        if waited >= cluster.wait_s:
            raise ClusterError(
                f"cluster: {sizes[0]} training worker(s) are needed to go on, and only {free} fit on the hosts that are "
                f"left; waited {cluster.wait_s:.0f} s (cluster.wait_s). Bring hosts back and run the same command again, or "
                "allow fewer workers with cluster.min_workers."
            )
        time.sleep(_POLL_S)
