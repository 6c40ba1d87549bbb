"""Ends a group of Ray Train workers whose driver ends early, so that nothing of it is left on the cluster.

Ray keeps the placement group of a run whose controller died until the whole session ends (it has a cleaner, which needs the
dashboard); its CPUs would be lost to everyone else.
"""

from __future__ import annotations

import contextlib
from typing import Any


def this_group() -> str:
    """The id of the placement group that this worker is in; empty outside of one."""
    import ray

    group = ray.util.get_current_placement_group()
    return group.id.hex() if group else ""


def end_group(group: str, controller: Any = None) -> None:
    """Ends the controller first, which would start workers again, then its workers. Ended ones are no error."""
    import ray
    from ray._raylet import PlacementGroupID
    from ray.util.placement_group import PlacementGroup, remove_placement_group

    if controller is not None:
        with contextlib.suppress(Exception):
            ray.kill(controller)
    if group:
        with contextlib.suppress(Exception):
            remove_placement_group(PlacementGroup(PlacementGroupID(bytes.fromhex(group))))
