"""From looks at a board to figures: before, during and after the measured run, energy of a chunk, other work.

Every field is a figure or the text "not available: why".
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from vlac.board import energy, readers
from vlac.board.reading import Absent, Tree

Look = Mapping[str, Any]

LEAST_S = 2.0
"""Shortest run for which the kernel's CPU clock, which ticks every 10 ms, tells other work from rounding."""


@dataclass(frozen=True)
class Run:
    """What was measured meanwhile: its moments (time.time), threads, chunks, and the CPU seconds it used itself."""

    start: float
    end: float
    threads: int
    chunks: int
    cpu_s: float


def known(value: Any) -> bool:
    """Whether a field of a summary or a look is there."""
    return value is not None and not (isinstance(value, str) and value.startswith("not available"))


def summarise(tree: Tree, looks: Sequence[Look], run: Run, set_before: Mapping[str, Any]) -> dict[str, Any]:
    """The board's part of a report. set_before: `readers.describe` before the run; looks: at least one, ascending."""
    during = within(looks, run)
    clock = _moving(looks, during, "cpu_mhz", lambda v: slowest_used(v, run.threads))
    throttling = _throttling(looks, during)
    swap = _moving(looks, during, "memory", lambda v: v["swap_used"])
    load = _moving(looks, during, "load", float)
    after = readers.describe(tree)
    fixed = {k: _text(v) for k, v in set_before.items()}
    changed = {k: _text(after[k]) for k in ("governor", "power_mode", "clock_limits_mhz") if after[k] != set_before[k]}
    return {
        **fixed,
        **({"changed_meanwhile": changed} if changed else {}),
        "temperature_c": _moving(looks, during, "temperature_c", lambda v: max(v.values())),
        "heat_limit_c": _text(readers.heat_limit(tree)),
        "frequency_mhz": clock,
        "gpu_mhz": _moving(looks, during, "gpu_mhz", float),
        "throttled": _pi(throttling),
        "throttling": throttling,
        "load_average": load,
        "other_work": _other_work(looks, run),
        "swap_growth_bytes": swap["end"] - swap["start"] if isinstance(swap, dict) else swap,
        "energy": _energy(looks, run),
        "looks": {"count": len(looks), "during": len(during)},
    }


def _text(value: Any) -> Any:
    return str(value) if isinstance(value, Absent) else value


def within(looks: Sequence[Look], run: Run) -> list[Look]:
    """Looks during the run; of a run shorter than the time between two, the one nearest to its middle."""
    inside = [x for x in looks if run.start <= x["t"] <= run.end]
    middle = (run.start + run.end) / 2
    return inside or [min(looks, key=lambda x: abs(x["t"] - middle))]


def slowest_used(clocks: Sequence[float], threads: int) -> float:
    """The slowest of as many of the fastest cores as there are threads: idle cores may sleep, a slow worker may not."""
    return sorted(clocks, reverse=True)[: max(1, threads)][-1]


def _moving(looks: Sequence[Look], during: Sequence[Look], key: str, figure: Any) -> Any:
    """start and end (before and after the process), min, max and mean during the run; else why not."""
    values = [figure(x[key]) for x in looks if known(x.get(key))]
    inside = [figure(x[key]) for x in during if known(x.get(key))]
    if not values or not inside:
        return _why_not(during, looks, key)
    return {
        "start": values[0],
        "end": values[-1],
        "min": min(inside),
        "mean": sum(inside) / len(inside),
        "max": max(inside),
    }


def _why_not(during: Sequence[Look], looks: Sequence[Look], key: str) -> str:
    """The reason of a look during the run, or of any: a sensor may have been there before."""
    reasons = (str(x[key]) for x in (*during, *looks) if x.get(key) and not known(x[key]))
    return next(reasons, "not available: nobody looked")


def _throttling(looks: Sequence[Look], during: Sequence[Look]) -> Any:
    """before, during (bits joined, states at their highest, counts at their last), after; and what it means."""
    seen = [x["throttling"] for x in looks if known(x.get("throttling"))]
    if not seen:
        return _why_not(during, looks, "throttling")
    inside = [x["throttling"] for x in during if known(x.get("throttling"))]
    joined: dict[str, int] = {}
    for look in inside:
        for name, value in look.items():
            joined[name] = (joined.get(name, 0) | value) if name == "get_throttled" else max(joined.get(name, 0), value)
    return {"before": seen[0], "during": joined, "after": seen[-1], "meaning": _meaning(seen[0], joined, seen[-1])}


def _meaning(before: Mapping[str, int], during: Mapping[str, int], after: Mapping[str, int]) -> list[str]:
    """What happened between the first look and the last, in words; empty where nothing did."""
    said = []
    for name, value in during.items():
        first, last = before.get(name, 0), after.get(name, 0)
        if name == "get_throttled":
            rose = (value | last) & ~first
            said += readers.pi_flags(value & 0xF | rose)
        elif name.startswith("state ") and value > 0:
            said.append(f"{name.removeprefix('state ')} slowed down to state {value}")
        elif name.startswith("count ") and max(value, last) > first:
            said.append(f"{name.removeprefix('count ')} throttled {max(value, last) - first} times")
    return said


def _pi(throttling: Any) -> Any:
    """get_throttled as the firmware writes it, and its bits by name."""
    if not isinstance(throttling, Mapping):
        return throttling
    if "get_throttled" not in throttling["before"]:
        return "not available: no Raspberry Pi's get_throttled here; see throttling"
    bits = {
        when: throttling[key].get("get_throttled", 0)
        for when, key in (("start", "before"), ("during", "during"), ("end", "after"))
    }
    return {**{k: hex(v) for k, v in bits.items()}, "flags": {k: readers.pi_flags(v) for k, v in bits.items()}}


def _other_work(looks: Sequence[Look], run: Run) -> Any:
    """How much of one core everything else used during the run, and which processes used most since before it."""
    times = [(x["t"], x["busy_s"], x["own_s"]) for x in looks if known(x.get("busy_s"))]
    if not times:
        return next((x["busy_s"] for x in looks if x.get("busy_s")), "not available: nobody looked")
    seconds = run.end - run.start
    if seconds < LEAST_S:
        return f"not available: the run of {seconds:.1f} s is shorter than {LEAST_S:.0f} s (--sustain runs longer)"
    import numpy as np

    t = [x[0] for x in times]
    busy, own = (
        float(np.interp(run.end, t, [x[i] for x in times]) - np.interp(run.start, t, [x[i] for x in times]))
        for i in (1, 2)
    )
    return {"cores": max(0.0, busy - run.cpu_s - own) / seconds, "most": _busiest(looks)}


def _busiest(looks: Sequence[Look]) -> list[str]:
    """Names of up to three processes that lived from the first look to the last and used most CPU between them."""
    first, last = looks[0], looks[-1]
    if "processes" not in first or "processes" not in last:
        return []
    used = {
        pid: (name, seconds - first["processes"][pid][1])
        for pid, (name, seconds) in last["processes"].items()
        if pid in first["processes"] and name == first["processes"][pid][0]
    }
    span = max(1e-3, last["t"] - first["t"])
    most = sorted(used.values(), key=lambda v: -v[1])[:3]
    return [f"{name} ({100 * seconds / span:.0f} % of a core)" for name, seconds in most if seconds > 0.02 * span]


def _energy(looks: Sequence[Look], run: Run) -> Any:
    """joules_per_chunk, mean watts of the run, and watts before it where power is read; else why not."""
    seen = [(x["t"], x["energy"]) for x in looks if known(x.get("energy"))]
    if not seen:
        return next((x["energy"] for x in looks if x.get("energy")), "not available: nobody looked")
    times, readings = [t for t, _ in seen], [e for _, e in seen]
    if any(r["source"] != readings[0]["source"] for r in readings):
        return "not available: the sensor changed during the run"
    joules = energy.spent(times, readings, run.start, run.end)
    if isinstance(joules, Absent):
        return str(joules)
    seconds = run.end - run.start
    if seconds < LEAST_S:
        return f"not available: the run of {seconds:.1f} s is shorter than {LEAST_S:.0f} s (--sustain runs longer)"
    source = readings[0]["source"]
    before = (
        {} if "uj" in readings[0] else {"watts_before": energy.watts(readings[0]), "rails": sorted(readings[0]["mw"])}
    )
    return {
        "joules_per_chunk": joules / run.chunks,
        "watts": joules / seconds,
        "source": source,
        "covers": energy.COVERS[source],
        **before,
    }
