"""The board's part of a bench report as lines for people."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from vlac.board.summary import known
from vlac.tables import number, size

Report = Mapping[str, Any]

_SAID = ("governor", "power_mode", "frequency_mhz", "temperature_c", "throttling", "memory", "other_work", "energy")


def lines(r: Report) -> list[str]:
    """Deadlines, steadiness, memory, the board, energy, and in one line whatever is not available and why."""
    b = r["board"]
    told = [
        _deadline(r["deadline"]),
        _steady(r["steady"]),
        _memory(r),
        _setting(b),
        "; ".join(
            text for text in (_heat(b), _clock(b, "frequency_mhz", "clock"), _clock(b, "gpu_mhz", "GPU")) if text
        ),
        _joined(_throttling(b), _load(b)),
        _energy(b["energy"]),
    ]
    return [line for line in told if line] + _absent(r)


def _joined(*texts: str) -> str:
    return "; ".join(text for text in texts if text)


def _deadline(d: Any) -> str:
    if not known(d):
        return ""
    low, high = d["interval95"]
    return (
        f"at {number(d['rate_hz'])} Hz a chunk has {number(d['budget_ms'])} ms: {d['misses']} of {d['chunks']} late "
        f"({100 * d['share']:.1f} %, 95 % interval {100 * low:.1f}..{100 * high:.1f} %)"
    )


def _steady(s: Report) -> str:
    if not known(s["reached"]):
        return ""
    state = "settled" if s["reached"] else "NOT settled"
    left = f", the first {s['from_chunk']} chunks left out" if s["from_chunk"] else ""
    return f"latency {state} ({s['rule']}): {s['chunks']} chunks in {s['seconds']:.0f} s{left}"


def _memory(r: Report) -> str:
    m = r["memory"]
    delta = m["system_delta_bytes"]
    grew = f", system memory in use rose by {size(max(0, delta))}" if known(delta) else ""
    peak = f"peak RSS {size(m['peak_rss_bytes'])} (before load {size(m['before_load_bytes'])})"
    return f"{peak}{grew}, artifact {size(r['artifact']['bytes'])}"


def _setting(b: Report) -> str:
    parts = [str(b["model"])] if known(b["model"]) else []
    parts += [f"{word} {b[key]}" for key, word in (("governor", "governor"), ("boost", "boost")) if known(b[key])]
    parts += [b["power_mode"]] if known(b["power_mode"]) else []
    if known(b["page_size"]):
        parts.append(f"pages of {b['page_size'] // 1024} KiB")
    if known(b["memory"]):
        m = b["memory"]
        swap = f"swap {size(m['swap_used'])} of {size(m['swap_total'])}" if m["swap_total"] else "no swap"
        parts.append(f"{size(m['available'])} of {size(m['total'])} RAM available before, {swap}")
    return " | ".join(parts)


def _heat(b: Report) -> str:
    t = b["temperature_c"]
    if not known(t):
        return ""
    return f"temperature {number(t['start'])} -> {number(t['end'])} C (max {number(t['max'])})"


def _clock(b: Report, key: str, word: str) -> str:
    c = b[key]
    if not known(c):
        return ""
    return (
        f"{word} {number(c['start'], 4)} MHz before, {number(c['min'], 4)}..{number(c['max'], 4)} during, "
        f"{number(c['end'], 4)} after"
    )


def _throttling(b: Report) -> str:
    t, pi = b["throttling"], b["throttled"]
    if not known(t):
        return ""
    bits = f" (get_throttled {pi['start']} -> {pi['during']} -> {pi['end']})" if known(pi) else ""
    return f"throttling: {', '.join(t['meaning']) or 'none'}{bits}"


def _load(b: Report) -> str:
    load, other = b["load_average"], b["other_work"]
    parts = [f"load average {number(load['start'])} -> {number(load['end'])}"] if known(load) else []
    if known(other):
        parts.append(f"other work {100 * other['cores']:.0f} % of a core")
    return "; ".join(parts)


def _energy(e: Any) -> str:
    if not known(e):
        return ""
    before = f", {number(e['watts_before'])} W before" if "watts_before" in e else ""
    source = f"{e['source']}: {e['covers']}"
    return f"energy {number(e['joules_per_chunk'])} J a chunk, {number(e['watts'])} W{before} ({source})"


def _absent(r: Report) -> list[str]:
    """What this machine does not tell, each reason once; JSON has the lesser ones too."""
    reasons: dict[str, list[str]] = {}
    for key, value in r["board"].items():
        if key in _SAID and not known(value):
            reasons.setdefault(str(value).removeprefix("not available: "), []).append(key)
    return [f"not available: {', '.join(keys)}: {why}" for why, keys in reasons.items()]
