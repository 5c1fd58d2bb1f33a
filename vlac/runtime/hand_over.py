"""Chunks of displacements that arrive late: the rows that come after make up for what the late ones would have moved.

A chunk of displacements is a path, counted from where its observation was taken. While it was computed the robot
executed the chunk before; dropping its late rows drops whatever they say otherwise (a correction, above all), and as
every chunk arrives late, so does every next one: the robot never makes up for it. Positions need none of this.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from vlac.errors import InputError
from vlac.io import IO
from vlac.runtime.actions import apply_action_steps
from vlac.runtime.rtc import check_meaning

NpArray = np.ndarray[Any, Any]
SHARE = 0.5
"""Of what is missing, how much each row makes up for; the last row, all of it."""


def hand_over(chunk: NpArray, left: NpArray, delay: int, columns: Sequence[int]) -> NpArray:
    """The chunk as it can be executed from its observation on, f32 [N, A], robot units.

    Args:
        chunk: [N, A], row 0 for the control step of its observation.
        left: [T, A], rows of the chunk before from that step on; where they end the robot stands still.
        delay: rows that will have been executed of `left` before this chunk is there.
        columns: the displacements, all of one unit; other columns are executed as they are.

    Its first `delay` rows are those of `left`; then `columns` lead from where these end to the path of `chunk`, by
    rows no longer than the longest of both chunks.
    """
    out, move = np.array(chunk, dtype=np.float32), list(columns)
    late = min(delay, len(out))
    kept = min(late, len(left))
    out[:kept] = left[:kept]
    out[kept:late, move] = 0
    path = np.asarray(chunk, dtype=np.float64)[:, move]
    missing = (path[:late] - out[:late, move]).sum(axis=0)
    longest = max(np.linalg.norm(rows[:, move], axis=1).max(initial=0) for rows in (chunk, left))
    for i in range(late, len(out)):
        row = path[i] + max(SHARE, 1 / (len(out) - i)) * missing
        row *= min(1.0, longest / max(float(np.linalg.norm(row)), 1e-12))
        missing -= row - path[i]
        out[i, move] = row
    return out


def check_columns(io: IO, columns: Sequence[int]) -> None:
    """InputError unless these are columns of an action, each once."""
    if sorted(set(columns)) != sorted(columns) or not set(columns) <= set(range(io.action_dim)):
        raise InputError(f"displacements {list(columns)}, expected columns of an action, 0 to {io.action_dim - 1}")


def handed_over(io: IO, x: NpArray, before: Any, delay: int, columns: Sequence[int]) -> NpArray:
    """`hand_over` of normalised rows x [N, max_action_dim]; `before` as `Session.act(prev_chunk=)` takes it.

    Raises: InputError for columns that are none, and where an earlier chunk's numbers say something else now.
    """
    check_meaning(io)
    if any(s.step == "unnormalise_rows" for s in io.action_steps):
        raise InputError("prev_chunk: every row of this policy's chunks has a range of its own, and rows move up")
    check_columns(io, columns)
    given = np.asarray(before, dtype=np.float32)
    given = (given[0] if given.ndim == 3 else given).reshape(-1, given.shape[-1])[: len(x), : io.action_dim]
    wide = np.zeros_like(x)
    wide[: len(given), : given.shape[1]] = given
    robot, left = (apply_action_steps(io.action_steps, rows) for rows in (x, wide))
    made = hand_over(robot, left[: len(given)], delay, columns)
    zero, one = (apply_action_steps(io.action_steps, np.full_like(x, value)) for value in (0, 1))
    scale = one - zero
    out = np.array(x)
    # anew, not by the difference: where the robot's units are clamped, that would be of something else
    anew = (made != robot) & (scale != 0)
    out[: len(made), : io.action_dim][anew] = ((made - zero) / np.where(scale == 0, np.float32(1), scale))[anew]
    return out
