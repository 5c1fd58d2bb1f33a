"""Limits on what leaves the server: joint range, jerk, drift against a reference; it says so, and holds if asked.

A limit is "range<=0.05" (how far an action may lie outside its joint's range, in ranges), "jerk<=2.5" (of a chunk, the
joints' units per step^3, vlac.metrics.jerk), or "drift<=0.1" (the newest comparison with the shadow, in ranges).
"""

from __future__ import annotations

import dataclasses
import logging
import math
import re
from dataclasses import dataclass
from typing import Any

import numpy as np

from vlac import metrics
from vlac.errors import InputError
from vlac.metrics import Joint
from vlac.serve.core import Answer, Asked
from vlac.serve.refusal import Refused
from vlac.serve.watch import Watch, spans

NpArray = np.ndarray[Any, Any]
HOLDS = ("last", "zero")
log = logging.getLogger("vlac.serve")


@dataclass(frozen=True)
class Bound:
    """figure <= value."""

    figure: str
    value: float

    def __str__(self) -> str:
        return f"{self.figure}<={self.value:g}"


def parse_bound(text: str) -> Bound:
    """ "range<=0.05" -> Bound; InputError tells the grammar."""
    found = re.fullmatch(r"\s*(range|jerk|drift)\s*<=\s*(\S+)\s*", text)
    try:
        value = float(found[2]) if found else math.nan
    except ValueError:
        value = math.nan
    if found is None or not (math.isfinite(value) and value >= 0):
        raise InputError(f"--limit {text!r}: write range<=NUMBER, jerk<=NUMBER or drift<=NUMBER")
    return Bound(found[1], value)


def outside(chunk: NpArray, joints: tuple[Joint, ...]) -> float:
    """How far the worst action lies outside its joint's range, in ranges; joints without a known range do not count."""
    worst = 0.0
    for column, joint in zip(chunk.T, joints, strict=False):
        if joint.span is not None and joint.low is not None and joint.high is not None:
            over = max(float(column.max()) - joint.high, joint.low - float(column.min()), 0.0)
            worst = max(worst, over / joint.span)
    return worst


class Guard:
    """Judges every chunk. One of the core's `after`.

    Args:
        bounds: what must hold.
        hold: None says so only; "last" repeats the last action of the client that held within limits (positions);
            "zero" answers zeros (displacements, velocities).
    """

    def __init__(self, bounds: tuple[Bound, ...], hold: str | None, watch: Watch) -> None:
        if hold is not None and hold not in HOLDS:
            raise InputError(f"--hold {hold!r}, expected {' or '.join(HOLDS)}")
        if any(b.figure == "range" for b in bounds) and not any(j.span for j in watch.joints):
            raise InputError("--limit range: this policy knows no range of its joints", remedy="leave it out")
        self.bounds, self.hold, self.watch = bounds, hold, watch
        self.drift: float | None = None
        self._good: dict[str, NpArray] = {}

    def chunk(self, asked: Asked, answer: Answer) -> Answer:
        """The answer, with what was exceeded; a held one if asked."""
        said = tuple(text for b in self.bounds if (text := self._judge(b, answer.chunk)))
        if not said:
            row = min(self.watch.n_action_steps, len(answer.chunk)) - 1
            self._good[asked.client] = answer.chunk[row]
            return answer
        for b in self.bounds:
            if any(t.startswith(str(b)) for t in said):
                self.watch.event("limit", str(b))
        log.warning("client %s: %s", asked.client, "; ".join(said))
        if self.hold is None:
            return dataclasses.replace(answer, said=said)
        self.watch.event("held", self.hold)
        return dataclasses.replace(answer, said=said, held=True, chunk=self._held(asked.client, answer.chunk, said))

    def gone(self, client: str) -> None:
        """Forgets a client's last good action."""
        self._good.pop(client, None)

    def _judge(self, bound: Bound, chunk: NpArray) -> str:
        if bound.figure == "range":
            figure: float | None = outside(chunk, self.watch.joints)
        elif bound.figure == "jerk":
            figure = metrics.jerk(chunk)
        else:
            figure = self.drift
        if figure is None or figure <= bound.value:
            return ""
        return f"{bound} does not hold: {figure:.4g}"

    def _held(self, client: str, chunk: NpArray, said: tuple[str, ...]) -> NpArray:
        if self.hold == "zero":
            return np.zeros_like(chunk)
        if client not in self._good:
            raise Refused(
                "limit", f"{'; '.join(said)}, and there is no earlier action to hold", remedy="do not move the robot"
            )
        return np.tile(self._good[client], (len(chunk), 1))


def drift_of(chunk: NpArray, reference: NpArray, joints: tuple[Joint, ...]) -> tuple[float, list[float]]:
    """(max, per joint) of |chunk - reference| over the joint's range."""
    per = np.max(np.abs(chunk - reference), axis=0) / spans(joints, chunk)
    return float(per.max()), [float(v) for v in per]
