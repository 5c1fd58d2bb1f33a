"""A table with a red and a blue cube and a round pusher: "push the red cube to the left", in 2-D rigid-body physics.

Table units: the table is the unit square, x to the right, y up. One step is 0.1 s. Observation: a view of the whole
table, a view that follows the pusher, and the pusher's position and velocity; action: the pusher's displacement.
Success is geometric: the named cube has moved far enough the named way, not aside, and the other cube stayed.
"""

from __future__ import annotations

import atexit
import weakref
from dataclasses import dataclass
from typing import Any

import gymnasium
import numpy as np
import numpy.typing as npt
import pymunk

from vlac.sim.draw import Canvas, Colour, Window

Vector = npt.NDArray[np.float64]

DIRECTIONS: dict[str, tuple[float, float]] = {"left": (-1, 0), "right": (1, 0), "up": (0, 1), "down": (0, -1)}
CUBES = ("red", "blue")
_VERBS = ("push", "move", "slide")
_NOUNS = ("cube", "block")
_ADVERBS = {"left": "to the left", "right": "to the right", "up": "upwards", "down": "downwards"}

TASKS: dict[tuple[str, str], tuple[str, ...]] = {
    (cube, way): tuple(
        f"{verb} the {cube} {noun} {where}" for verb in _VERBS for noun in _NOUNS for where in (way, _ADVERBS[way])
    )
    for cube in CUBES
    for way in DIRECTIONS
}
"""(cube, direction) -> the phrasings of that task, the same number for each."""

INSTRUCTIONS: tuple[str, ...] = tuple(phrase for phrases in TASKS.values() for phrase in phrases)
_MEANING = {phrase: task for task, phrases in TASKS.items() for phrase in phrases}

HALF = 0.065
"""Half the side of a cube."""
RADIUS = 0.035
"""Of the pusher."""
MAX_STEP = 0.04
"""Longest displacement of the pusher in one step."""
DISTANCE, ASIDE, DISTURBED = 0.15, 0.07, 0.05
"""Success: the cube moved this far the named way, at most this far aside, and the other cube at most this far."""
SECONDS, SUBSTEPS = 0.1, 10
_APART, _MARGIN, _CLEAR = 0.2, 0.24, 0.14

_TABLE: Colour = (226, 222, 226)
_FLOOR: Colour = (92, 90, 92)
_PUSHER: tuple[Colour, Colour] = ((30, 70, 30), (60, 150, 60))
_CUBE: dict[str, tuple[Colour, Colour]] = {
    "red": ((168, 28, 40), (220, 60, 72)),
    "blue": ((40, 28, 168), (72, 60, 220)),
}
_GOAL: Colour = (240, 206, 120)


@dataclass(frozen=True)
class Physics:
    """What is drawn anew for each episode."""

    friction: float
    grip: float
    turning: float


class PushCubes(gymnasium.Env[dict[str, Any], npt.NDArray[np.float32]]):
    """The Gymnasium environment; the same seed and actions give the same episode, to the pixel."""

    metadata: dict[str, Any] = {"render_modes": ["rgb_array"], "render_fps": 10}  # noqa: RUF012 - read from the class

    def __init__(self, image_size: int = 64, max_steps: int = 80, render_mode: str | None = "rgb_array"):
        self.image_size, self.max_steps, self.render_mode = image_size, max_steps, render_mode
        box = gymnasium.spaces.Box
        picture = box(0, 255, (image_size, image_size, 3), np.uint8)
        self.observation_space = gymnasium.spaces.Dict(
            {
                "pixels": gymnasium.spaces.Dict({"top": picture, "follow": picture}),
                "agent_pos": box(-np.inf, np.inf, (4,), np.float32),
            }
        )
        self.action_space = box(-MAX_STEP, MAX_STEP, (2,), np.float32)
        self.instruction, self.target, self.direction = INSTRUCTIONS[0], "red", "left"
        self._random = np.random.Generator(np.random.PCG64(0))
        self._place({"red": (0.3, 0.3), "blue": (0.7, 0.7)}, {"red": 0.0, "blue": 0.0}, (0.5, 0.5), Physics(4, 0.4, 1))
        _OPEN.add(self)

    # -- Gymnasium -----------------------------------------------------------------------------------------------------

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        """A new episode. options: "instruction", one of INSTRUCTIONS, else one is drawn; the layout, drawn first, does
        not depend on it: every layout allows every instruction."""
        super().reset(seed=seed)
        if seed is not None:
            self._random = np.random.Generator(np.random.PCG64(seed))
        draw = self._random
        physics = Physics(
            friction=float(draw.uniform(3, 6)), grip=float(draw.uniform(0.3, 0.6)), turning=float(draw.uniform(0.7, 1))
        )
        centres = self._draw_centres()
        angles = {name: float(draw.uniform(-0.3, 0.3)) for name in CUBES}
        start = self._draw_start(centres)
        drawn = INSTRUCTIONS[int(draw.integers(len(INSTRUCTIONS)))]
        self._instruct((options or {}).get("instruction") or drawn)
        self._place({k: (v[0], v[1]) for k, v in centres.items()}, angles, (start[0], start[1]), physics)
        return self._observation(), self._info()

    def step(self, action: npt.NDArray[np.float32]) -> tuple[dict[str, Any], float, bool, bool, dict[str, Any]]:
        """One control step. The displacement is shortened to MAX_STEP, and the pusher stays on the table."""
        move: Vector = np.asarray(action, np.float64).reshape(2)
        move = np.where(np.isfinite(move), move, 0.0)
        length = float(np.sqrt(move[0] * move[0] + move[1] * move[1]))
        if length > MAX_STEP:
            move *= MAX_STEP / length
        before = self.pusher_position
        goal = np.clip(before + move, RADIUS, 1 - RADIUS)
        self._nudge()
        self._pusher.velocity = tuple((goal - before) / SECONDS)
        for _ in range(SUBSTEPS):
            self._space.step(SECONDS / SUBSTEPS)
        self._velocity = (self.pusher_position - before) / SECONDS
        self._pusher.velocity = (0, 0)
        self._steps += 1
        info = self._info()
        done = bool(info["success"])
        return self._observation(), float(done), done, not done and self._steps >= self.max_steps, info

    def render(self) -> npt.NDArray[np.uint8]:
        """The table at 256 pixels with the square where the cube should go, for people; a policy never sees it."""
        canvas = Canvas(256, Window(0.5, 0.5, 1.06), _FLOOR)
        canvas.square(0.5, 0.5, 0.5, 1, 0, _TABLE)
        way = np.array(DIRECTIONS[self.direction])
        goal = self._start[self.target] + way * DISTANCE
        canvas.square(goal[0], goal[1], HALF + 0.012, 1, 0, _GOAL)
        canvas.square(goal[0], goal[1], HALF, 1, 0, _TABLE)
        self._paint(canvas)
        return canvas.pixels()

    def close(self) -> None:
        """Frees the physics; the environment is not usable afterwards."""
        for name in ("_space", "_cubes", "_pusher"):
            self.__dict__.pop(name, None)

    # -- state ---------------------------------------------------------------------------------------------------------

    @property
    def pusher_position(self) -> Vector:
        """Of the pusher's centre."""
        return np.array(self._pusher.position, np.float64)

    def cube_position(self, name: str) -> Vector:
        """Of the named cube's centre."""
        return np.array(self._cubes[name].position, np.float64)

    @property
    def other(self) -> str:
        """The cube that is not named."""
        return CUBES[1 - CUBES.index(self.target)]

    @property
    def success(self) -> bool:
        """Whether the named cube is where it should be now."""
        way = np.array(DIRECTIONS[self.direction])
        moved = self.cube_position(self.target) - self._start[self.target]
        along, aside = float(moved @ way), float(abs(moved[0] * way[1] - moved[1] * way[0]))
        other = self.cube_position(self.other) - self._start[self.other]
        return along >= DISTANCE and aside <= ASIDE and float(np.sqrt(other @ other)) <= DISTURBED

    # -- parts ---------------------------------------------------------------------------------------------------------

    def _draw_centres(self) -> dict[str, Vector]:
        """Two centres, apart along both axes: no cube stands in the way of any push of the other."""
        while True:
            a, b = self._random.uniform(_MARGIN, 1 - _MARGIN, (2, 2))
            if min(abs(a - b)) >= _APART:
                return dict(zip(CUBES, (a, b), strict=True))

    def _draw_start(self, centres: dict[str, Vector]) -> Vector:
        """Of the pusher: anywhere but at the cubes."""
        while True:
            start: Vector = self._random.uniform(0.06, 0.94, 2)
            if all(np.hypot(*(start - c)) >= _CLEAR for c in centres.values()):
                return start

    def _instruct(self, instruction: str) -> None:
        if instruction not in _MEANING:
            raise ValueError(f"no instruction of this task: {instruction!r}; see vlac.sim.INSTRUCTIONS")
        self.instruction = instruction
        self.target, self.direction = _MEANING[instruction]

    def _place(
        self,
        centres: dict[str, tuple[float, float]],
        angles: dict[str, float],
        start: tuple[float, float],
        physics: Physics,
    ) -> None:
        """A new space with the bodies where they start."""
        space = self._space = pymunk.Space()
        space.iterations = 20
        self._physics = physics
        self._cubes = {name: _cube(space, centres[name], angles[name], physics) for name in CUBES}
        self._pusher = pymunk.Body(body_type=pymunk.Body.KINEMATIC)
        self._pusher.position = (float(start[0]), float(start[1]))
        disc = pymunk.Circle(self._pusher, RADIUS)
        disc.friction = physics.grip
        space.add(self._pusher, disc)
        for ends in (((0, 0), (0, 1)), ((0, 1), (1, 1)), ((1, 1), (1, 0)), ((1, 0), (0, 0))):
            wall = pymunk.Segment(space.static_body, *ends, 0.002)
            wall.friction = 0.5
            space.add(wall)
        self._start = {name: self.cube_position(name) for name in CUBES}
        self._velocity = np.zeros(2)
        self._steps = 0

    def _nudge(self) -> None:
        """Contact noise: a cube beside the pusher feels a small random force in this step."""
        noise = self._random.standard_normal((2, 2)) * 0.15 * self._physics.friction
        for body, force in zip(self._cubes.values(), noise, strict=True):
            away = np.array(body.position) - self.pusher_position
            if away @ away < (1.5 * HALF + RADIUS) ** 2:
                body.apply_impulse_at_world_point((float(force[0]) * 0.01, float(force[1]) * 0.01), body.position)

    def _observation(self) -> dict[str, Any]:
        x, y = self.pusher_position
        pixels = {}
        for name, window in (("top", Window(0.5, 0.5, 1.0)), ("follow", Window(float(x), float(y), 0.9))):
            canvas = Canvas(self.image_size, window, _FLOOR)
            canvas.square(0.5, 0.5, 0.5, 1, 0, _TABLE)
            self._paint(canvas)
            pixels[name] = canvas.pixels()
        return {"pixels": pixels, "agent_pos": np.array([x, y, *self._velocity], np.float32)}

    def _paint(self, canvas: Canvas) -> None:
        for name, body in self._cubes.items():
            (x, y), turn = body.position, body.rotation_vector
            for half, colour in zip((HALF, HALF * 0.72), _CUBE[name], strict=True):
                canvas.square(x, y, half, turn.x, turn.y, colour)
        x, y = self._pusher.position
        for radius, colour in zip((RADIUS, RADIUS * 0.65), _PUSHER, strict=True):
            canvas.disc(x, y, radius, colour)

    def _info(self) -> dict[str, Any]:
        return {
            "instruction": self.instruction,
            "target": self.target,
            "direction": self.direction,
            "success": self.success,
        }


_OPEN: weakref.WeakSet[PushCubes] = weakref.WeakSet()


@atexit.register
def _close_all() -> None:
    """pymunk must not be freed after its own module at the end of the process."""
    for env in list(_OPEN):
        env.close()


def _cube(space: pymunk.Space, centre: tuple[float, float], angle: float, physics: Physics) -> pymunk.Body:
    """A cube that the table's friction holds: joints to the table with a largest force and torque."""
    body = pymunk.Body(1.0, pymunk.moment_for_box(1.0, (2 * HALF, 2 * HALF)))
    body.position, body.angle = (float(centre[0]), float(centre[1])), angle
    shape = pymunk.Poly.create_box(body, (2 * HALF, 2 * HALF))
    shape.friction = 1.0
    slide = pymunk.PivotJoint(space.static_body, body, (0, 0), (0, 0))
    turn = pymunk.GearJoint(space.static_body, body, 0.0, 1.0)
    slide.max_bias = turn.max_bias = 0
    slide.max_force = physics.friction
    turn.max_force = physics.friction * physics.turning * HALF * 0.77  # mean distance from a square's middle
    space.add(body, shape, slide, turn)
    return body
