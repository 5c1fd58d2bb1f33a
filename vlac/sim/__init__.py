"""Small simulated tasks whose success is a geometric fact; importing this package registers them with Gymnasium.

Needs the extra `sim` (gymnasium, pymunk); nothing else in vlac imports it.
"""

from __future__ import annotations

from vlac.errors import VlacError

try:
    import gymnasium
    import pymunk  # noqa: F401
except ImportError as e:
    raise VlacError(
        f"the simulated tasks need {e.name}, which is not installed", remedy="pip install 'vlac-compiler[sim]'"
    ) from e

from vlac.sim.expert import Expert
from vlac.sim.push_cubes import DIRECTIONS, INSTRUCTIONS, TASKS, PushCubes

if "vlac/PushCubes-v0" not in gymnasium.registry:
    gymnasium.register("vlac/PushCubes-v0", entry_point="vlac.sim.push_cubes:PushCubes")

__all__ = ["DIRECTIONS", "INSTRUCTIONS", "TASKS", "Expert", "PushCubes"]
