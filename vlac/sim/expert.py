"""The scripted expert of PushCubes: round both cubes to the far side of the named one, then push it straight.

A function of what is on the table now, without memory, so that a policy that sees one moment can imitate it.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from vlac.sim.push_cubes import DIRECTIONS, HALF, MAX_STEP, RADIUS, PushCubes, Vector

_TOUCH = HALF + RADIUS
_BEHIND = 0.15
"""Distance from the cube's centre at which a push begins."""
_ROUND = 0.136
"""Distance kept from a cube's centre on the way: half its diagonal, the pusher and a little."""
_SPEED = 0.03


class Expert:
    """act(env) -> the displacement to make now, f32[2]."""

    def act(self, env: PushCubes) -> npt.NDArray[np.float32]:
        way = np.array(DIRECTIONS[env.direction])
        side = np.array([-way[1], way[0]])
        cube, here = env.cube_position(env.target), env.pusher_position
        along, aside = float((here - cube) @ way), float((here - cube) @ side)
        if -_BEHIND - 0.03 < along < -0.8 * _TOUCH and abs(aside) < 0.035:
            forward = _SPEED * float(np.exp(-((aside / 0.022) ** 2)))
            back = -0.02 if abs(aside) > 0.03 and along > -_TOUCH - 0.01 else 0.0
            move = way * (forward + back) + side * float(np.clip(-0.7 * aside, -0.02, 0.02))
        else:
            goal = np.clip(cube - way * _BEHIND, RADIUS, 1 - RADIUS)
            move = self._walk(here, goal, [cube, env.cube_position(env.other)])
        return move.astype(np.float32)

    def _walk(self, here: Vector, goal: Vector, obstacles: list[Vector]) -> Vector:
        """A step towards the goal, round the nearest circle that stands in the way."""
        path = goal - here
        distance = float(np.hypot(path[0], path[1]))
        if distance < 1e-9:
            return np.zeros(2)
        heading = path / distance
        for centre in sorted(obstacles, key=lambda c: float(np.hypot(*(c - here)))):
            to = centre - here
            reach = float(np.hypot(to[0], to[1]))
            nearest = float(np.clip(to @ heading, 0, distance))
            gap = to - heading * nearest
            if float(np.hypot(gap[0], gap[1])) >= _ROUND - 1e-6 and reach >= _ROUND:
                continue
            left = 1.0 if heading[0] * to[1] - heading[1] * to[0] < 0 else -1.0
            across = np.array([-to[1], to[0]]) / reach * left
            if reach <= _ROUND:  # too near: along the circle, and outwards
                step = across * float(to @ heading > -0.3 * reach) * 0.8 - to / reach * min(
                    1.0, (_ROUND - reach) / 0.02 + 0.2
                )
                return _limited(step, MAX_STEP)
            sine = _ROUND / reach
            return _limited(to / reach * float(np.sqrt(1 - sine * sine)) + across * sine, MAX_STEP)
        return heading * min(distance, MAX_STEP)


def _limited(step: Vector, length: float) -> Vector:
    return step / max(float(np.hypot(step[0], step[1])), 1e-9) * length
