"""CPU, memory, disk, network and GPU metrics of the host."""

from __future__ import annotations

import threading
import time
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from labelmill.tracking.run import Tracker

_INTERVAL_S = 10.0


class SystemMetrics:
    """Samples CPU, memory, disk, network and GPUs of this host into the tracker.

    MLflow's own thread stops for good at the first failed call; this one goes through the spool.
    """

    def __init__(self, tracker: Tracker, began_s: float) -> None:
        self._tracker = tracker
        self._began_s = began_s
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._work, name="system-metrics", daemon=True)
        self._thread.start()

    def _work(self) -> None:
        from mlflow.system_metrics.system_metrics_monitor import SystemMetricsMonitor

        monitor = SystemMetricsMonitor(self._tracker.run_id, tracking_uri=self._tracker.store.uri)
        while True:
            monitor.collect_metrics()
            values = monitor.aggregate_metrics()
            for part in monitor.monitors:
                part.clear_metrics()
            # the step is the age of the run in seconds, so that a resumed run goes on after what it has
            step = round(time.time() - self._began_s)
            self._tracker.metrics([(f"system/{key}", value, step, None) for key, value in values.items()])
            if self._stop.wait(_INTERVAL_S):
                return

    def stop(self) -> None:
        """Ends the thread; what it sampled is in the tracker's buffer."""
        self._stop.set()
        self._thread.join(timeout=30)
