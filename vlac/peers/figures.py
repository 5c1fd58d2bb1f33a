"""What the rounds amount to: rows with ratios to LeRobot's float32, a table in Markdown, a plot in SVG."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

import numpy as np

from vlac.peers.contenders import BASE, Contender
from vlac.peers.rounds import CASES, Measured

Row = Mapping[str, Any]
TIMES = ("cpu_s", "wall_s")


def rows_of(found: Sequence[Measured], threads: int) -> list[dict[str, Any]]:
    """One row per contender, in order; ratios are of medians, over the base's where only the state is new, too."""
    base = next(m for m in found if m.contender.name == BASE)
    return [{**row(m, base), "threads": threads} for m in found]


def _median(m: Measured, case: str, key: str) -> float:
    return float(np.median([r[key] for r in m.replies[case]]))


def _share(m: Measured, case: str, key: str) -> float:
    """Median over the rounds of a case's time over the same round's cold chunk, its neighbour in time."""
    pairs = zip(m.replies[case], m.replies["cold"], strict=True)
    return round(float(np.median([a[key] / b[key] for a, b in pairs])), 3)


def _stages(m: Measured, case: str) -> dict[str, float]:
    """Median milliseconds of each stage."""
    times = [r.get("stages_ms", {}) for r in m.replies[case]]
    return {k: round(float(np.median([t.get(k, 0.0) for t in times])), 1) for k in times[0]}


def row(m: Measured, base: Measured) -> dict[str, Any]:
    """Times, ratios, drift, sizes and memory of one contender; "failed" instead for one that left."""
    c = m.contender
    result: dict[str, Any] = {"name": c.name, "engine": c.engine, "options": dict(c.options)}
    result["target"] = c.artifact.name if c.artifact is not None else ""
    result["mb"] = size_mb(c)
    if m.failed or not m.replies["cold"]:
        return {**result, "failed": m.failed or "no round was counted"}
    for case in CASES:
        if m.replies[case]:
            ratio = {k: round(_median(m, case, k) / _median(base, "cold", k), 4) for k in TIMES}
            times = {k: [round(r[k], 3) for r in m.replies[case]] for k in TIMES}
            result[case] = {"ratio": ratio, **times, "stages_ms": _stages(m, case)}
    if "state" in result:
        for key in TIMES:
            name = "of_cold" if key == "cpu_s" else "of_cold_wall"
            result[name] = {k: _share(m, k, key) for k in ("camera", "state") if k in result}
    result["relative_l2"] = max((d[0] for d in m.drift), default=0.0)
    result["max_abs"] = max((d[1] for d in m.drift), default=0.0)
    assert m.process is not None
    result["load_s"] = round(m.process.start["load_s"], 2)
    result["cold_load_s"] = None if m.cold_load_s is None else round(m.cold_load_s, 2)
    answers = [r for case in CASES for r in m.replies[case]]
    result["peak_mb"] = round(max(r["peak_mb"] for r in answers))
    result["private_mb"] = round(max(r.get("private_mb", 0.0) for r in answers)) or None
    return result


def size_mb(c: Contender) -> float | None:
    """Of what is loaded, in 10^6 bytes."""
    path = c.artifact or c.file
    if path is None:
        return None
    files = path.rglob("*") if path.is_dir() else [path]
    return round(sum(f.stat().st_size for f in files if f.is_file()) / 1e6, 1)


# --- table -------------------------------------------------------------------------------------------------------

_HEAD = (
    *("form", "wall / LeRobot", "CPU time / LeRobot", "median s", "rel. L2", "max abs"),
    *("one camera new", "state new", "MB", "load s cold / warm", "peak MB", "private MB"),
)


def table(rows: Sequence[Row]) -> str:
    """Markdown; contenders that failed come with their reason below."""
    lines = ["| " + " | ".join(_HEAD) + " |", "|" + "---|" * len(_HEAD)]
    lines += ["| " + " | ".join(_cells(r)) + " |" for r in rows if "failed" not in r]
    lines += [f"\n{r['name']} took no part: {r['failed']}" for r in rows if "failed" in r]
    return "\n".join(lines)


def _cells(r: Row) -> list[str]:
    part = r.get("of_cold_wall", {})
    cold = "" if r["cold_load_s"] is None else f"{r['cold_load_s']:.1f} / "
    return [
        r["name"],
        *(f"{r['cold']['ratio'][k]:.3f}" for k in reversed(TIMES)),
        f"{float(np.median(r['cold']['wall_s'])):.2f}",
        *(f"{r[k]:.1e}" for k in ("relative_l2", "max_abs")),
        *(f"{part[k]:.2f} x cold" if k in part else "" for k in ("camera", "state")),
        "" if r["mb"] is None else f"{r['mb']:.0f}",
        f"{cold}{r['load_s']:.1f}",
        str(r["peak_mb"]),
        str(r["private_mb"] or ""),
    ]


# --- plot --------------------------------------------------------------------------------------------------------

_WIDTH, _HEIGHT, _LEFT, _BOTTOM, _TOP, _RIGHT = 820, 480, 70, 56, 40, 24
_OURS, _THEIRS = "#1f6feb", "#8b949e"
_Box = tuple[float, float, float, float]
_LETTER, _ROW = 6.2, 14
"""Pixels: a letter's width (or less), a label's height."""
FAR = 2.0
"""Times of LeRobot's, beyond which a plot of all would show nothing else."""


def plot(rows: Sequence[Row], title: str) -> str:
    """SVG: wall time across, relative L2 upwards (logarithmic), area of a disc = size of the file. What takes more than
    FAR times LeRobot's time stands at the right edge with its figure."""
    shown = [r for r in rows if "failed" not in r and r["relative_l2"] > 0]
    base = next(r for r in rows if r["name"] == BASE)
    seconds = float(np.median(base["cold"]["wall_s"]))
    most = max([1.0, *(w for r in shown if (w := r["cold"]["ratio"]["wall_s"]) <= FAR)]) * 1.05
    low = math.floor(min([-2.0, *(math.log10(r["relative_l2"]) for r in shown)]))
    high = math.ceil(max([-1.0, *(math.log10(r["relative_l2"]) for r in shown)]))

    def at(ratio: float, drift: float) -> tuple[float, float]:
        x = _LEFT + min(ratio / most, 1.0) * (_WIDTH - _LEFT - _RIGHT)
        y = _TOP + (high - math.log10(drift)) / (high - low) * (_HEIGHT - _TOP - _BOTTOM)
        return x, y

    parts = [_text(_WIDTH / 2, 22, title, "middle", 15)]
    for power in range(low, high + 1):
        _, y = at(0, 10.0**power)
        parts += [_line(_LEFT, y, _WIDTH - _RIGHT, y), _text(_LEFT - 8, y + 4, f"1e{power}", "end")]
    for tenth in range(0, math.floor(most * 10) + 1, 2):
        x, _ = at(tenth / 10, 10.0**low)
        parts += [_line(x, _TOP, x, _HEIGHT - _BOTTOM), _text(x, _HEIGHT - _BOTTOM + 18, f"{tenth / 10:g}", "middle")]
    across = f"wall time of a chunk over LeRobot's in float32 ({seconds:.2f} s)"
    parts += [
        _text(_WIDTH / 2, _HEIGHT - 12, across, "middle"),
        _text(12, _TOP - 12, "relative L2 of the chunk", "start"),
    ]
    discs = [_Disc.of(r, *at(r["cold"]["ratio"]["wall_s"], r["relative_l2"])) for r in shown]
    parts += [d.drawn() for d in sorted(discs, key=lambda d: -d.radius)]
    taken = [d.box() for d in discs]
    for d in sorted(discs, key=lambda d: (d.y, d.x)):
        parts += _label(d, taken)
    body = "\n".join(parts)
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {_HEIGHT}" font-family="sans-serif" '
        f'font-size="12">\n<rect width="100%" height="100%" fill="white"/>\n{body}\n</svg>\n'
    )


@dataclass(frozen=True)
class _Disc:
    """A contender in the plot, pixels."""

    x: float
    y: float
    radius: float
    colour: str
    label: str

    @staticmethod
    def of(r: Row, x: float, y: float) -> _Disc:
        size, ratio = f" {r['mb']:.0f} MB" if r["mb"] else "", r["cold"]["ratio"]["wall_s"]
        label = f"{r['name']}{size}" + (f", at {ratio:.1f}" if ratio > FAR else "")
        return _Disc(x, y, 4 + math.sqrt((r["mb"] or 100) / 8), _OURS if r["engine"] else _THEIRS, label)

    def drawn(self) -> str:
        where = f'cx="{self.x:.1f}" cy="{self.y:.1f}" r="{self.radius:.1f}"'
        return f'<circle {where} fill="{self.colour}" fill-opacity="0.35" stroke="{self.colour}"/>'

    def box(self) -> _Box:
        r = self.radius * 0.7
        return (self.x - r, self.y - r, self.x + r, self.y + r)


def _label(d: _Disc, taken: list[_Box]) -> list[str]:
    """The name beside its disc, or as near as there is room, then with a line to it; `taken` grows by its box."""
    wide, gap = _LETTER * len(d.label), d.radius + 3
    places = [
        (x, d.y + down)
        for down in sorted(range(-_HEIGHT, _HEIGHT, _ROW), key=abs)
        for x in (d.x + gap, d.x - gap - wide)
    ]

    def box(x: float, y: float) -> _Box:
        return (x, y - _ROW / 2, x + wide, y + _ROW / 2)

    def free(x: float, y: float) -> bool:
        left, top, right, bottom = box(x, y)
        inside = left >= _LEFT and right <= _WIDTH and top >= _TOP and bottom <= _HEIGHT - _BOTTOM
        return inside and not any(a < right and left < c and b < bottom and top < e for a, b, c, e in taken)

    x, y = next((p for p in places if free(*p)), places[0])
    taken.append(box(x, y))
    near = x if x > d.x else x + wide
    line = [] if abs(y - d.y) < 1 else [_line(d.x, d.y, near, y)]
    return [*line, _text(x, y + 4, d.label, "start", 11)]


def _text(x: float, y: float, text: str, anchor: str, size: int = 12) -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" font-size="{size}">{escape(text)}</text>'


def _line(x1: float, y1: float, x2: float, y2: float) -> str:
    return f'<line x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}" stroke="#d0d7de"/>'


def save_plot(rows: Sequence[Row], title: str, path: Path) -> None:
    """The plot as a file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(plot(rows, title), encoding="utf-8")
