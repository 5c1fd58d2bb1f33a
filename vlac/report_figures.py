"""Pictures of a report as inline SVG: the plane of two figures with its front, and drift by joint and step.

Colours are the page's CSS variables, so that they follow light and dark; every picture has a title and a description,
and the page holds the same figures as text.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape

WIDTH, HEIGHT = 440, 320
_LEFT, _RIGHT, _TOP, _BOTTOM = 66, 14, 14, 44


@dataclass(frozen=True)
class Point:
    """One artifact in the plane; low and high: interval of y. `weight` in [0, 1] is shown as the area."""

    label: str
    x: float
    y: float
    weight: float
    colour: int
    low: float | None = None
    high: float | None = None


@dataclass(frozen=True)
class Axis:
    """An axis: its words, how a tick is written, and whether less is better. log: decades."""

    words: str
    tick: Callable[[float], str]
    less: bool
    log: bool = False
    bounds: tuple[float, float] | None = None

    def span(self, values: Sequence[float]) -> tuple[float, float]:
        """The part of the axis to show."""
        if self.bounds is not None:
            return self.bounds
        if self.log:
            low, high = math.floor(math.log10(min(values)) - 0.1), math.ceil(math.log10(max(values)) + 0.1)
            return 10.0**low, 10.0**high
        room = 0.2 * (max(values) - min(values)) or 0.5 * max(values) or 1.0
        return max(0.0, min(values) - room), max(values) + room

    def place(self, value: float, span: tuple[float, float]) -> float:
        """0..1 along the axis."""
        low, high = span
        if self.log:
            return (math.log10(max(value, low)) - math.log10(low)) / (math.log10(high) - math.log10(low))
        return (value - low) / (high - low)

    def ticks(self, span: tuple[float, float]) -> list[float]:
        """Round numbers within the span, about five."""
        low, high = span
        if self.log:
            first, last = round(math.log10(low)), round(math.log10(high))
            stride = max(1, math.ceil((last - first) / 5))
            return [10.0**e for e in range(first, last + 1, stride)]
        step = 10 ** math.floor(math.log10((high - low) / 4))
        step *= next(m for m in (1, 2, 2.5, 5, 10) if (high - low) / (step * m) <= 5.01)
        first_tick = math.ceil(low / step - 1e-9)
        return [step * i for i in range(first_tick, math.floor(high / step + 1e-9) + 1)]


def front(points: Sequence[Point], x: Axis, y: Axis) -> list[Point]:
    """Points that no other one beats in both figures, from left to right."""

    def beats(a: Point, b: Point) -> bool:
        dx, dy = (b.x - a.x) * (1 if x.less else -1), (b.y - a.y) * (1 if y.less else -1)
        return dx >= 0 and dy >= 0 and (dx > 0 or dy > 0)

    return sorted((p for p in points if not any(beats(q, p) for q in points)), key=lambda p: p.x)


def plane(points: Sequence[Point], x: Axis, y: Axis, name: str, title: str) -> str:
    """A scatter of artifacts with the front joined; `name` makes ids unique in the page."""
    if not points:
        return ""
    xs, ys = x.span([p.x for p in points]), y.span([p.y for p in points])

    def at(px: float, py: float) -> tuple[float, float]:
        return (
            _LEFT + x.place(px, xs) * (WIDTH - _LEFT - _RIGHT),
            HEIGHT - _BOTTOM - y.place(py, ys) * (HEIGHT - _TOP - _BOTTOM),
        )

    best = front(points, x, y)
    described = "; ".join(f"{p.label}: {x.tick(p.x)}, {y.tick(p.y)}" for p in points)
    parts = [*_axes(x, y, xs, ys, at)]
    if len(best) > 1:
        line = " ".join(f"{a:.1f},{b:.1f}" for a, b in (at(p.x, p.y) for p in best))
        parts.append(f'<polyline class="front" points="{line}"/>')
    spots = [at(p.x, p.y) for p in points]
    for p, (a, b) in zip(points, spots, strict=True):
        if p.low is not None and p.high is not None:
            (_, top), (_, bottom) = at(p.x, p.high), at(p.x, p.low)
            parts.append(f'<path class="whisker" d="M{a:.1f} {top:.1f}V{bottom:.1f}m-4 0h8M{a - 4:.1f} {top:.1f}h8"/>')
        radius = _radius(p)
        hint = f"{p.label}: {x.words} {x.tick(p.x)}, {y.words} {y.tick(p.y)}"
        circle = f'<circle class="c{p.colour}" cx="{a:.1f}" cy="{b:.1f}" r="{radius:.1f}">'
        parts.append(f"{circle}<title>{escape(hint)}</title></circle>")
    parts += _labels(points, spots)
    return _svg(WIDTH, HEIGHT, parts, name, title, described)


def _axes(
    x: Axis,
    y: Axis,
    xs: tuple[float, float],
    ys: tuple[float, float],
    at: Callable[[float, float], tuple[float, float]],
) -> list[str]:
    parts = []
    for value in x.ticks(xs):
        a, _ = at(value, ys[0])
        parts.append(f'<path class="grid" d="M{a:.1f} {_TOP}V{HEIGHT - _BOTTOM}"/>')
        parts.append(
            f'<text x="{a:.1f}" y="{HEIGHT - _BOTTOM + 16}" text-anchor="middle">{escape(x.tick(value))}</text>'
        )
    for value in y.ticks(ys):
        _, b = at(xs[0], value)
        parts.append(f'<path class="grid" d="M{_LEFT} {b:.1f}H{WIDTH - _RIGHT}"/>')
        parts.append(f'<text x="{_LEFT - 6}" y="{b + 4:.1f}" text-anchor="end">{escape(y.tick(value))}</text>')
    middle = (_LEFT + WIDTH - _RIGHT) / 2
    parts.append(f'<text class="words" x="{middle}" y="{HEIGHT - 8}" text-anchor="middle">{escape(x.words)}</text>')
    half = (_TOP + HEIGHT - _BOTTOM) / 2
    turned = f'transform="translate(12 {half}) rotate(-90)"'
    parts.append(f'<text class="words" {turned} text-anchor="middle">{escape(y.words)}</text>')
    return parts


Box = tuple[float, float, float, float]
"""Left, top, right, bottom."""


def _labels(points: Sequence[Point], spots: Sequence[tuple[float, float]]) -> list[str]:
    """Each name where it hides least: beside, above or below its point, further away with a line to it."""
    taken: list[Box] = [(a - r, b - r, a + r, b + r) for (a, b), r in zip(spots, map(_radius, points), strict=True)]
    parts: list[str] = []
    for p, (a, b) in zip(points, spots, strict=True):
        wide, reach = 7.4 * len(p.label), _radius(p) + 3
        places = [
            (a + dx * (reach + away) - wide * (dx < 0) - wide / 2 * (dx == 0), b + dy * (reach + 6 + away))
            for away in (0, 12, 26, 42, 60)
            for dx, dy in ((1, 0), (-1, 0), (0, -1), (0, 1), (1, -1), (-1, -1), (1, 1), (-1, 1))
        ]
        boxes = [(x, y - 7, x + wide, y + 7) for x, y in places]
        cost = [_hidden(box, taken) + 0.6 * i for i, box in enumerate(boxes)]
        left, top, right, bottom = boxes[cost.index(min(cost))]
        taken.append((left, top, right, bottom))
        end = (min(max(a, left), right), min(max(b, top + 2), bottom - 2))
        if math.dist(end, (a, b)) > reach + 8:
            parts.append(f'<path class="leader" d="M{a:.1f} {b:.1f}L{end[0]:.1f} {end[1]:.1f}"/>')
        parts.append(f'<text class="name" x="{left:.1f}" y="{bottom - 3:.1f}">{escape(p.label)}</text>')
    return parts


def _hidden(box: Box, taken: Sequence[Box]) -> float:
    """How much of other things a label hides, and how much of it lies outside: square pixels."""

    def common(other: Box) -> float:
        wide = min(box[2], other[2]) - max(box[0], other[0])
        high = min(box[3], other[3]) - max(box[1], other[1])
        return max(0.0, wide) * max(0.0, high)

    area = (box[2] - box[0]) * (box[3] - box[1])
    return sum(map(common, taken)) + 4 * (area - common((_LEFT, _TOP, WIDTH, HEIGHT - _BOTTOM)))


def _radius(p: Point) -> float:
    return 4 + 7 * math.sqrt(p.weight)


def heat_map(values: Sequence[Sequence[float]], joints: Sequence[str], executed: int, name: str, title: str) -> str:
    """Drift [steps][joints], a share of the joint's range, as squares of deepening colour.

    Depth is logarithmic, from 0.01 % to 10 % and more; a line ends what is executed.
    """
    left, row, top = 96, 18, 6
    width = WIDTH - left - 8
    cell = width / len(values)
    parts = []
    for j, joint in enumerate(joints):
        y = top + j * row
        parts.append(f'<text x="{left - 6}" y="{y + row - 5}" text-anchor="end">{escape(_short(joint, 14))}</text>')
        for i, step in enumerate(values):
            hint = f"{joint}, step {i}: {100 * step[j]:.3g} % of its range"
            parts.append(
                f'<rect class="heat" x="{left + i * cell:.2f}" y="{y}" width="{cell:.2f}" height="{row - 1}" '
                f'style="--depth:{depth(step[j]):.3f}"><title>{escape(hint)}</title></rect>'
            )
    bottom = top + len(joints) * row
    if executed < len(values):
        parts.append(f'<path class="cut" d="M{left + executed * cell:.1f} {top - 4}V{bottom + 4}"/>')
    parts.append(f'<text x="{left}" y="{bottom + 15}">step 0</text>')
    parts.append(f'<text x="{left + width}" y="{bottom + 15}" text-anchor="end">{len(values) - 1}</text>')
    worst = max((step[j], joint, i) for i, step in enumerate(values) for j, joint in enumerate(joints))
    described = f"worst: {worst[1]} at step {worst[2]}, {100 * worst[0]:.3g} % of its range"
    return _svg(WIDTH, bottom + 22, parts, name, title, described)


def depth(share: float) -> float:
    """Colour depth 0..1 of a drift: logarithmic between 1e-4 and 1e-1 of a joint's range; NaN is deepest."""
    if math.isnan(share):
        return 1.0
    return min(1.0, max(0.0, (math.log10(max(share, 1e-12)) + 4) / 3))


def _short(text: str, most: int) -> str:
    return text if len(text) <= most else text[: most - 1] + "…"


def _svg(width: float, height: float, parts: Sequence[str], name: str, title: str, described: str) -> str:
    body = "".join(parts)
    return (
        f'<svg viewBox="0 0 {width} {height}" role="img" aria-labelledby="{name}-t {name}-d">'
        f'<title id="{name}-t">{escape(title)}</title><desc id="{name}-d">{escape(described)}</desc>{body}</svg>'
    )
