"""Which points of a sweep are worth having: the Pareto front of size, latency, drift and success; table and picture."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any
from xml.sax.saxutils import escape

from vlac.tables import likeness, markdown, number

Row = Mapping[str, Any]

AIMS: Mapping[str, float] = {"mb": 1, "ms": 1, "drift": 1, "success": -1}
"""Figure -> 1: less is better, -1: more is."""

WIDTH, HEIGHT, MARGIN = 460, 320, 56


def front(rows: Sequence[Row]) -> list[bool]:
    """Whether no other row is at least as good in every figure that all measured rows have, and better in one."""
    known = [a for a in AIMS if all(_figure(r, a) is not None for r in rows if r["status"] == "done")]
    points = [
        tuple(AIMS[a] * float(r["figures"][a]) for a in known) if r["status"] == "done" and known else None
        for r in rows
    ]
    return [p is not None and not any(q is not None and _better(q, p) for q in points) for p in points]


def _better(a: Sequence[float], b: Sequence[float]) -> bool:
    return all(x <= y for x, y in zip(a, b, strict=True)) and any(x < y for x, y in zip(a, b, strict=True))


def _figure(row: Row, name: str) -> float | None:
    value = row["figures"].get(name)
    return value if isinstance(value, (int, float)) and math.isfinite(value) else None


def marked(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """The rows, each with "front": whether it is on the Pareto front of these."""
    return [{**r, "front": on} for r, on in zip(rows, front(rows), strict=True)]


def text(rows: Sequence[Row], total: int) -> str:
    """Markdown: a table of all rows, those on the front marked, and why others have no figures."""
    columns = ["front", "target", "passes", "engine", "MB", "ms", "drift", "cosine", "success"]
    cells = [
        [
            "*" if r["front"] else "",
            r["target"],
            " ".join(r["passes"]) or "none",
            _engine(r),
            *(number(_figure(r, k)) for k in ("mb", "ms", "drift")),
            likeness(_figure(r, "cosine")),
            number(_figure(r, "success")),
        ]
        for r in rows
        if r["status"] == "done"
    ]
    others = [f"- {r['status']}: {r['label']}: {r['error']['message']}" for r in rows if r["status"] != "done"]
    said = f"{len(rows)} of {total} points measured or refused."
    return "\n".join([*markdown(columns, cells), "", said, *([""] if others else []), *others]) + "\n"


def _engine(row: Row) -> str:
    threads = f" x{row['threads']}" if row["threads"] else ""
    return f"{row['parity']['engine']}{threads}"


# --- picture -----------------------------------------------------------------------------------------------------


def picture(rows: Sequence[Row]) -> str:
    """SVG: drift against size, and against latency where it was measured; the front filled, each point with its label
    as a tooltip. Logarithmic where the figures allow it."""
    done = [r for r in rows if r["status"] == "done"]
    panels = [_panel(done, x, "drift", f"{name} ({unit})", i) for i, (x, name, unit) in enumerate(_axes_of(done))]
    width = WIDTH * max(1, len(panels))
    head = (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{HEIGHT}" viewBox="0 0 {width} {HEIGHT}" '
        'font-family="sans-serif" font-size="11" fill="currentColor">'
    )
    return "\n".join([head, "<title>Pareto front of a sweep</title>", *panels, "</svg>"]) + "\n"


def _axes_of(rows: Sequence[Row]) -> list[tuple[str, str, str]]:
    axes = [("mb", "size", "MB"), ("ms", "latency", "ms per chunk"), ("success", "success", "share of episodes")]
    return [a for a in axes if any(_figure(r, a[0]) is not None for r in rows)]


def _panel(rows: Sequence[Row], x: str, y: str, label: str, i: int) -> str:
    known = [r for r in rows if _figure(r, x) is not None and _figure(r, y) is not None]
    across = _Scale([float(r["figures"][x]) for r in known], i * WIDTH + MARGIN, (i + 1) * WIDTH - 16)
    up = _Scale([float(r["figures"][y]) for r in known], HEIGHT - MARGIN, 24)
    left, right, bottom, top = i * WIDTH + MARGIN, (i + 1) * WIDTH - 16, HEIGHT - MARGIN, 24
    lines = [
        f'<path d="M{left} {top}V{bottom}H{right}" fill="none" stroke="currentColor" stroke-opacity="0.5"/>',
        f'<text x="{(left + right) / 2:.0f}" y="{HEIGHT - 12}" text-anchor="middle">{escape(label)}</text>',
        f'<text x="{left}" y="{top - 8}">drift (relative L2)</text>',
    ]
    for v in across.ticks():
        at = across(v)
        lines.append(f'<path d="M{at:.1f} {bottom}v4" stroke="currentColor"/>')
        lines.append(f'<text x="{at:.1f}" y="{bottom + 16}" text-anchor="middle">{number(v, 2)}</text>')
    for v in up.ticks():
        at = up(v)
        lines.append(f'<path d="M{left} {at:.1f}h-4" stroke="currentColor"/>')
        lines.append(f'<text x="{left - 6}" y="{at + 4:.1f}" text-anchor="end">{number(v, 2)}</text>')
    for r in known:
        fill = "#0072b2" if r["front"] else "none"
        where = f'cx="{across(r["figures"][x]):.1f}" cy="{up(r["figures"][y]):.1f}"'
        tip = f"{r['label']}: {number(r['figures'][x])}, drift {number(r['figures'][y])}"
        lines.append(f'<circle {where} r="5" fill="{fill}" stroke="#0072b2"><title>{escape(tip)}</title></circle>')
    return "\n".join(lines)


class _Scale:
    """Values to pixels, logarithmic when all are positive and span more than a factor of three."""

    def __init__(self, values: Sequence[float], start: float, stop: float) -> None:
        low, high = (min(values), max(values)) if values else (0.0, 1.0)
        self.log = low > 0 and high > 3 * low
        pad = 1.15 if self.log else 0.08 * (high - low) or abs(high) * 0.1 or 1.0
        self.low, self.high = (low / pad, high * pad) if self.log else (low - pad, high + pad)
        self.start, self.stop = start, stop

    def __call__(self, value: float) -> float:
        a, b, v = (math.log(x) for x in (self.low, self.high, value)) if self.log else (self.low, self.high, value)
        return self.start + (v - a) / (b - a) * (self.stop - self.start)

    def ticks(self) -> list[float]:
        if self.log:
            powers = range(math.floor(math.log10(self.low)), math.ceil(math.log10(self.high)) + 1)
            steps = [m * 10.0**p for p in powers for m in (1, 2, 5)]
            return [s for s in steps if self.low <= s <= self.high]
        return [self.low + (self.high - self.low) * k / 4 for k in range(5)]
