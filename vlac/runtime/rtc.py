"""Real-time chunking: a chunk that goes on from the one the robot is still executing.

In every turn of a flow loop the clean chunk that its velocity points to is drawn towards what is left of the chunk
before, with a weight for each row (Black et al. 2025, arXiv 2506.07339; closed form and defaults as LeRobot 0.6 has
them). It is arithmetic on the loop's state between two turns, so every program whose loop is Euler's can be guided, by
every engine that runs the loop turn by turn, and without guidance nothing is different.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from vlac.errors import InputError
from vlac.graph import Node, Program, Repeat
from vlac.io import IO, Step

NpArray = np.ndarray[Any, Any]

SCHEDULES = ("zeros", "ones", "linear", "exp")
"""How the weight falls between the delay and the horizon."""
HORIZON, MAX_WEIGHT = 10, 10.0
"""LeRobot's execution_horizon and max_guidance_weight where none is said."""
STEADY = 2.0
"""The least value of `guidance_weight`, at half time: as a bound it makes the pull the same in every turn."""


def closed_loop(delay: int, displacements: Sequence[int] = ()) -> dict[str, Any]:
    """Arguments of `Session.act` for a robot's loop that says nothing else: keep what the robot will have executed, and
    leave what it has not to the newer observation. Where actions are displacements, by handing the path over
    (vlac.runtime.hand_over) instead of guidance, which would draw its first rows away from what the observation says.

    LeRobot's defaults are for chunks of 50: a horizon of 10 rows is most of what is left of a chunk of 10. And its
    weight is larger than the flow's own path warrants where the time is near 0 or 1, for it stands where the derivative
    of a network would make it smaller. Both cost success on push-cubes (docs/rtc.md).
    """
    if displacements:
        return {"inference_delay": delay, "execution_horizon": 0, "displacements": tuple(displacements)}
    return {"inference_delay": delay, "execution_horizon": delay, "max_guidance_weight": STEADY}


def prefix_weights(schedule: str, delay: int, horizon: int, rows: int) -> NpArray:
    """Weight of each of `rows` rows, f32: 1 for the first `delay`, 0 from `horizon` on, `schedule` between.

    zeros: 0. ones: 1. linear: evenly down, neither 1 nor 0 itself. exp: that times (e^that - 1) / (e - 1).
    InputError names a schedule that is none, and counts below 0.
    """
    schedule = schedule.lower()
    if schedule not in SCHEDULES:
        raise InputError(f"schedule {schedule!r}; there are {', '.join(SCHEDULES)}")
    for name, count in (("inference_delay", delay), ("execution_horizon", horizon)):
        if isinstance(count, bool) or not isinstance(count, (int, np.integer)) or count < 0:
            raise InputError(f"{name}={count!r}, expected a number of control steps, 0 or more")
    start, end = min(delay, horizon, rows), min(horizon, rows)
    falling = np.linspace(1, 0, end - start + 2)[1:-1]
    if schedule == "exp":
        falling = falling * np.expm1(falling) / (math.e - 1)
    elif schedule != "linear":
        falling = np.full(end - start, float(schedule == "ones"))
    return np.asarray(np.concatenate([np.ones(start), falling, np.zeros(rows - end)]), dtype=np.float32)


def guidance_weight(left: float, most: float) -> float:
    """How strongly a turn is drawn that has `left` of the flow's time before it (1 = noise): arXiv 2506.07339, eq. 4,
    at most `most`."""
    gone = 1.0 - left
    if gone <= 1e-6:  # of the first turn, where it has no bound
        return most
    return min(most, left / gone * (left**2 + gone**2) / left**2)


@dataclass(frozen=True)
class Guidance:
    """What draws one call's flow loop.

    stage: the loop's. before: f32 [N, A], the earlier chunk's rows from now on, zeros behind. weights: f32 [N, 1].
    dts: the loop's time steps, f64. most: the largest guidance weight.
    """

    stage: str
    before: NpArray
    weights: NpArray
    dts: NpArray
    most: float = MAX_WEIGHT

    def guided(self, turn: int, x: NpArray, x_next: NpArray) -> NpArray:
        """x_next as it would be, had the turn's velocity been the guided one; f32 [N, A]."""
        dt, left = abs(float(self.dts[turn])), abs(float(self.dts[turn:].sum()))
        clean = x + (x_next.astype(np.float64) - x) * (left / dt)
        drawn = guidance_weight(left, self.most) * dt * self.weights * (self.before - clean)
        return np.asarray(x_next + drawn, dtype=np.float32)


def guidance(
    program: Program,
    io: IO,
    tensor: Callable[[str], NpArray],
    chunk: Any,
    rows: int,
    *,
    delay: int,
    horizon: int,
    schedule: str,
    most: float,
) -> Guidance:
    """The guidance of one call.

    Args:
        tensor: values of a parameter by name.
        chunk: what is left of the chunk before, normalised, [T, action_dim] or [T, max_action_dim], T up to the
            policy's chunk size; its first row is for the control step of this observation. Missing rows and columns
            count as zeros, as in LeRobot; weights end with T.
        rows: rows that the loop computes now.

    Raises: InputError for a policy that cannot be guided, and for values that do not fit.
    """
    stage, dts = check_guidable(program, io, tensor)
    size, columns = io.noise_shape
    try:
        given = np.asarray(chunk, dtype=np.float32)
    except (TypeError, ValueError) as error:
        raise InputError(f"prev_chunk: {error}") from None
    given = given[0] if given.ndim == 3 and len(given) == 1 else given
    if given.ndim != 2 or given.shape[1] not in (io.action_dim, columns) or len(given) > size:
        raise InputError(
            f"prev_chunk is {list(given.shape)}, expected [up to {size}, {io.action_dim}]",
            remedy="give the rows of Session.normalised that are not executed yet",
        )
    if not np.isfinite(given).all():
        raise InputError("prev_chunk holds NaN or Inf")
    if not (math.isfinite(most) and most > 0):
        raise InputError(f"max_guidance_weight={most!r}, expected a number above 0")
    weights = prefix_weights(schedule, delay, min(horizon, len(given)), size)
    before = np.zeros((size, columns), dtype=np.float32)
    before[: len(given), : given.shape[1]] = given
    return Guidance(stage, before[:rows], weights[:rows, None], dts, most)


def check_guidable(program: Program, io: IO, tensor: Callable[[str], NpArray]) -> tuple[str, NpArray]:
    """`euler_loop` of a policy that can be guided; InputError for one that cannot."""
    found = euler_loop(program, tensor)
    check_meaning(io)
    return found


def check_meaning(io: IO) -> None:
    """InputError where an earlier chunk's numbers say something else now, or are not the loop's own."""
    if any(s.step == "add_state" for s in io.action_steps):
        raise InputError(
            "prev_chunk: this policy's actions are relative to the state, so an earlier chunk means another motion now",
            remedy="replay its chunks without prev_chunk",
        )
    changed = _changing(io.normalised_action_steps)
    if changed:
        raise InputError(f"prev_chunk: this policy's normalised actions are no longer its network's own ({changed})")


def _changing(steps: Iterable[Step]) -> str:
    return ", ".join(s.step for s in steps if s.step not in ("take", "take_rows"))


def euler_loop(program: Program, tensor: Callable[[str], NpArray]) -> tuple[str, NpArray]:
    """(stage, time steps f64) of the loop that makes the chunk by x <- x + dt v from noise over a time of 1.

    InputError says why the program has none.
    """
    refused = f"prev_chunk: {program.name} cannot be guided by an earlier chunk: "
    for step in program.schedule.steps:
        if not isinstance(step, Repeat) or program.schedule.result not in [out for out, _, _ in step.carry]:
            continue
        if len(step.carry) > 1:
            raise InputError(
                f"{refused}its solver carries a memory beside the actions, and only Euler's steps are guided",
                remedy="compile it without a multistep solver (pass flow-steps: solver=euler)",
            )
        table = _time_steps(program, step)
        if not table:
            raise InputError(f"{refused}its loop {step.stage} does not step by x + dt * velocity")
        dts = np.asarray(tensor(table), dtype=np.float64).reshape(-1)[: step.times]
        if len(dts) < step.times or not (dts * dts[0] > 0).all() or abs(abs(dts.sum()) - 1) > 1e-3:
            raise InputError(f"{refused}its time steps do not lead from noise to actions: {dts.tolist()}")
        return step.stage, dts
    raise InputError(f"{refused}no flow from noise makes its actions", remedy="leave prev_chunk out")


def _time_steps(program: Program, step: Repeat) -> str:
    """Name of the table dt in x_next = x + velocity * dt[index]; empty where the stage ends otherwise."""
    (out, x, initial) = step.carry[0]
    made: dict[str, Node] = {n.name: n for n in program.stage(step.stage).nodes}
    last = made.get(out)
    if initial != "noise" or last is None or last.op != "add" or x not in last.inputs:
        return ""
    moved = [made[i] for i in last.inputs if i in made]
    if len(moved) != 1 or moved[0].op != "mul":
        return ""
    for name in moved[0].inputs:
        read = made.get(name)
        if read is not None and read.op == "embed" and read.inputs[0] == step.index and read.inputs[1][:1] == "@":
            return read.inputs[1][1:]
    return ""
