"""What happens, counted and kept: Prometheus metrics, and the last chunks for the dashboard.

Everything is bounded: counters, histograms with fixed buckets, and a ring of the newest chunks.
"""

from __future__ import annotations

import math
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from vlac.metrics import Joint
from vlac.serve.core import Answer, Asked
from vlac.serve.refusal import CODES

NpArray = np.ndarray[Any, Any]
BUCKETS_MS = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000)
KEPT = 600
"""Chunks that the dashboard shows."""
MAX_STAGES = 24


@dataclass
class _Histogram:
    counts: list[int] = field(default_factory=lambda: [0] * (len(BUCKETS_MS) + 1))
    total: float = 0.0

    def add(self, value: float) -> None:
        self.counts[sum(value > b for b in BUCKETS_MS)] += 1
        self.total += value


@dataclass
class _Last:
    chunk: NpArray
    step: int | None


class Watch:
    """Counts and keeps; thread-safe. Works as one of a core's `after`.

    Args:
        joints: names and ranges of the actions.
        n_action_steps: rows that a robot executes; the hand-over is judged there unless the client tells its step.
        deadline_ms: a reply later than this, counted from the observation's arrival, is a miss.
        facts: what the page says about the policy.
    """

    def __init__(
        self, joints: tuple[Joint, ...], n_action_steps: int, deadline_ms: float, facts: Mapping[str, Any] | None = None
    ) -> None:
        self.joints, self.n_action_steps, self.deadline_ms = joints, n_action_steps, deadline_ms
        self.facts = dict(facts or {})
        self.gauges: dict[str, Callable[[], float]] = {}
        self._lock = threading.Lock()
        self._counts: dict[str, int] = {"chunks": 0, **dict.fromkeys(CODES, 0)}
        self._events: dict[tuple[str, str], int] = {}
        self._histograms: dict[str, _Histogram] = {}
        self._kept: deque[dict[str, Any]] = deque(maxlen=KEPT)
        self._drifts: deque[dict[str, Any]] = deque(maxlen=KEPT)
        self._last: dict[str, _Last] = {}
        self._begun = time.time()
        self._number = 0

    def count(self, name: str) -> None:
        """One more chunk, or refusal with this code."""
        with self._lock:
            self._counts[name] = self._counts.get(name, 0) + 1

    def event(self, kind: str, name: str) -> None:
        """One more of a named event ("limit", "range<=0.1")."""
        with self._lock:
            self._events[kind, name] = self._events.get((kind, name), 0) + 1

    def drift(self, value: float, per_joint: list[float]) -> None:
        """A chunk's drift against the reference: max |d| over the joint's range."""
        with self._lock:
            self._drifts.append({"t": time.time() - self._begun, "drift": value, "joints": per_joint})

    # --- as one of the core's `after` ---

    def chunk(self, asked: Asked, answer: Answer) -> Answer:
        """Keeps a chunk's figures; the answer as it is."""
        with self._lock:
            self._number += 1
            missed = answer.timing["total_ms"] > self.deadline_ms
            for stage, value in list(answer.timing.items())[:MAX_STAGES]:
                self._histograms.setdefault(stage[:-3], _Histogram()).add(value)
            if missed:
                self._events["deadline", "missed"] = self._events.get(("deadline", "missed"), 0) + 1
            self._kept.append(
                {
                    "n": self._number,
                    "t": time.time() - self._begun,
                    "client": asked.client,
                    "task": asked.observation.get("task"),
                    "ms": {k[:-3]: round(v, 3) for k, v in answer.timing.items()},
                    "missed": missed,
                    "handover": self._handover(asked, answer.chunk),
                    "held": answer.held,
                    "said": list(answer.said),
                    "actions": _plain(answer.chunk[: self.n_action_steps]),
                }
            )
        return answer

    def gone(self, client: str) -> None:
        """Forgets a client's last chunk."""
        with self._lock:
            self._last.pop(client, None)

    def _handover(self, asked: Asked, chunk: NpArray) -> float | None:
        """How far the new chunk begins from where the old one would be at that time, max over joints of |d| / range;
        None for a first chunk, or one that begins after the old one's end."""
        old = self._last.get(asked.client)
        self._last[asked.client] = _Last(chunk, asked.step)
        if old is None or old.chunk.shape[1:] != chunk.shape[1:]:
            return None
        known = asked.step is not None and old.step is not None
        passed = asked.step - old.step if known else self.n_action_steps  # type: ignore[operator]
        if not 0 < passed < len(old.chunk):
            return None
        return float(np.max(np.abs(chunk[0] - old.chunk[passed]) / spans(self.joints, chunk)))

    # --- what is shown ---

    def health(self) -> dict[str, Any]:
        """For /healthz."""
        with self._lock:
            return {"chunks": self._counts["chunks"], "uptime_s": round(time.time() - self._begun, 1)}

    def page(self, after: int = 0) -> dict[str, Any]:
        """The dashboard's data: chunks with a number above `after`."""
        gauges = {k: v() for k, v in self.gauges.items()}
        with self._lock:
            return {
                "facts": self.facts,
                "deadline_ms": self.deadline_ms,
                "joints": [{"name": j.name, "low": j.low, "high": j.high} for j in self.joints],
                "counts": dict(self._counts),
                "events": {f"{k} {n}": v for (k, n), v in self._events.items()},
                "gauges": gauges,
                "chunks": [c for c in self._kept if c["n"] > after],
                "drifts": list(self._drifts),
            }

    def prometheus(self) -> str:
        """The text exposition format, version 0.0.4."""
        gauges = {k: v() for k, v in self.gauges.items()}
        with self._lock:
            lines = ["# TYPE vlac_requests_total counter"]
            lines += [f'vlac_requests_total{{outcome="{_label(k)}"}} {v}' for k, v in sorted(self._counts.items())]
            lines.append("# TYPE vlac_events_total counter")
            for (kind, name), n in sorted(self._events.items()):
                lines.append(f'vlac_events_total{{kind="{_label(kind)}",name="{_label(name)}"}} {n}')
            lines.append("# TYPE vlac_latency_ms histogram")
            for stage, h in self._histograms.items():
                running = 0
                for bound, n in zip((*BUCKETS_MS, math.inf), h.counts, strict=True):
                    running += n
                    le = "+Inf" if bound == math.inf else f"{bound}"
                    lines.append(f'vlac_latency_ms_bucket{{stage="{_label(stage)}",le="{le}"}} {running}')
                lines.append(f'vlac_latency_ms_sum{{stage="{_label(stage)}"}} {h.total:.3f}')
                lines.append(f'vlac_latency_ms_count{{stage="{_label(stage)}"}} {running}')
            if self._drifts:
                gauges["drift"] = self._drifts[-1]["drift"]
            for name, value in sorted(gauges.items()):
                lines += [f"# TYPE vlac_{name} gauge", f"vlac_{name} {value:g}"]
        return "\n".join(lines) + "\n"


def spans(joints: tuple[Joint, ...], chunk: NpArray) -> NpArray:
    """What a difference in each joint is measured by: its range where that is known, else 1 (the joint's unit)."""
    if len(joints) != chunk.shape[-1]:
        return np.ones(chunk.shape[-1])
    return np.array([j.span or 1.0 for j in joints])


def _plain(chunk: NpArray) -> list[list[float]]:
    return [[float(f"{v:.6g}") for v in row] for row in chunk]


def _label(text: str) -> str:
    return text.replace("\\", "\\\\").replace('"', '\\"').replace("\n", " ")
