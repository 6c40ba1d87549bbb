"""How many trials run at once, so that none waits for what another one holds.

A trial with Ray workers is a driver, which reserves a small share, and a group of workers, which is placed as a whole. A
trial with more than the share would keep CPUs that its own or another trial's workers wait for: none of them would go on.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from labelmill.errors import ClusterError
from labelmill.job import ClusterConfig

DRIVER_CPUS = 0.05


def trial_resources(cluster: ClusterConfig, in_process: bool) -> dict[str, float]:
    """What Tune reserves for a trial: all it needs in its own process, or a driver's share beside its workers."""
    if not in_process:
        return {"CPU": DRIVER_CPUS}
    gpus = {"GPU": cluster.gpus_per_worker} if cluster.gpus_per_worker else {}
    return {"CPU": cluster.cpus_per_worker, **gpus}


def concurrent_trials(
    cluster: ClusterConfig, nodes: Sequence[Mapping[str, float]], in_process: bool, wanted: int | None, trials: int
) -> int:
    """Trials at once.

    Args:
        cluster: of a trial.
        nodes: free resources of each node (`CPU`, `GPU`).
        in_process: a trial trains in its own process.
        wanted: `search.concurrent`.
        trials: of the search; more at once make no sense.

    Raises ClusterError when not even one fits, or fewer than wanted.
    """
    workers = 1 if in_process else cluster.workers
    fits = 0
    while fits < trials and _slots(cluster, nodes, in_process, fits + 1) >= (fits + 1) * workers:
        fits += 1
    cpus = sum(node.get("CPU", 0.0) for node in nodes)
    gpus = sum(node.get("GPU", 0.0) for node in nodes)
    gpu = f" and {cluster.gpus_per_worker:g} GPU" if cluster.gpus_per_worker else ""
    need = f"{workers} worker(s) x {cluster.cpus_per_worker:g} CPU{gpu}, {cluster.read_cpus:g} CPU for reading"
    have = f"{cpus:g} CPU and {gpus:g} GPU on {len(nodes)} node(s) are free"
    if not fits:
        raise ClusterError(
            f"search: a trial needs {need}, but {have}. Use fewer cluster.workers, a smaller cluster.cpus_per_worker or "
            "cluster.gpus_per_worker, or a larger cluster."
        )
    if wanted and wanted > fits and wanted <= trials:
        raise ClusterError(
            f"search.concurrent: {wanted} trials at once, each with {need}; {have}, which holds {fits}. With more they would "
            f"wait for each other without end. Write {fits}, or leave it out."
        )
    return min(fits, wanted or fits)


def _slots(cluster: ClusterConfig, nodes: Sequence[Mapping[str, float]], in_process: bool, trials: int) -> int:
    """Workers that the nodes hold beside the drivers of `trials` and one read task, wherever these may be placed."""
    drivers = 0.0 if in_process else trials * DRIVER_CPUS
    slots = 0
    for node in nodes:
        free = node.get("CPU", 0.0) - cluster.read_cpus - drivers
        here = max(0, int(free / cluster.cpus_per_worker + 1e-9))
        if cluster.gpus_per_worker:
            here = min(here, int(node.get("GPU", 0.0) / cluster.gpus_per_worker + 1e-9))
        slots += here
    return slots
