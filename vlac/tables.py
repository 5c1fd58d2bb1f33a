"""Words and tables that every report shares: figures as people write them, aligned text, markdown for pasting."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

Cells = Sequence[Sequence[Any]]


def number(value: Any, digits: int = 3) -> str:
    """A figure for people: significant digits, "-" for None, exponent only where it is shorter to read."""
    if value is None:
        return "-"
    if isinstance(value, (bool, str)):
        return str(value)
    if isinstance(value, int):
        return str(value)
    if not math.isfinite(value):
        return str(value)
    if value == 0:
        return "0"
    if 1e-3 <= abs(value) < 1e6:
        places = max(0, digits - 1 - math.floor(math.log10(abs(value))))
        return f"{value:.{places}f}"
    return f"{value:.{max(0, digits - 1)}e}".replace("e-0", "e-").replace("e+0", "e+")


def likeness(value: float | None) -> str:
    """A cosine, with as many nines as it has and two digits more."""
    if value is None or not math.isfinite(value):
        return number(value)
    gap = abs(1 - value)
    if gap < 1e-12:
        return "1"
    return f"{value:.{max(4, min(12, 1 - math.floor(math.log10(gap))))}f}"


def share(value: float | None) -> str:
    """A fraction as a percentage."""
    return "-" if value is None else f"{number(100 * value)} %"


def size(count: int | float) -> str:
    """Bytes in decimal units, as disks and registries count."""
    value = float(count)
    for unit in ("B", "kB", "MB", "GB"):
        if abs(value) < 1000 or unit == "GB":
            return f"{int(value)} B" if unit == "B" else f"{number(value)} {unit}"
        value /= 1000
    raise AssertionError("unreachable")


def many(count: int) -> str:
    """Counts of parameters: 450.0 M."""
    for factor, unit in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if count >= factor:
            return f"{number(count / factor, 4)} {unit}"
    return str(count)


def table(columns: Sequence[str], rows: Cells, indent: str = "  ") -> list[str]:
    """Lines of an aligned table: first column to the left, figures to the right, others to the left."""
    cells = [[str(c) for c in row] for row in rows]
    widths = [max(len(columns[i]), *(len(r[i]) for r in cells)) if cells else len(columns[i]) for i in _span(columns)]
    right = [bool(cells) and i > 0 and all(_figure(r[i]) for r in cells) for i in _span(columns)]

    def line(row: Sequence[str]) -> str:
        parts = [row[i].rjust(widths[i]) if right[i] else row[i].ljust(widths[i]) for i in _span(columns)]
        return (indent + "  ".join(parts)).rstrip()

    return [line(columns), *(line(r) for r in cells)]


def markdown(columns: Sequence[str], rows: Cells) -> list[str]:
    """The same table as markdown, aligned so that it reads well unrendered too."""
    cells = [[str(c).replace("|", "\\|") for c in row] for row in rows]
    widths = [
        max(3, len(columns[i]), *(len(r[i]) for r in cells)) if cells else max(3, len(columns[i]))
        for i in _span(columns)
    ]
    right = [bool(cells) and i > 0 and all(_figure(r[i]) for r in cells) for i in _span(columns)]

    def line(row: Sequence[str]) -> str:
        parts = [row[i].rjust(widths[i]) if right[i] else row[i].ljust(widths[i]) for i in _span(columns)]
        return "| " + " | ".join(parts) + " |"

    rule = "|" + "|".join("-" * (widths[i] + 1) + (":" if right[i] else "-") for i in _span(columns)) + "|"
    return [line(columns), rule, *(line(r) for r in cells)]


def _span(columns: Sequence[str]) -> range:
    return range(len(columns))


def _figure(cell: str) -> bool:
    return cell[:1].isdigit() or cell[:1] in ("-", "+") or cell in ("", "inf", "nan")


def pairs(rows: Sequence[tuple[str, Any]], indent: str = "  ") -> list[str]:
    """ "name  value" lines with the values aligned; a list becomes one line per entry."""
    width = max((len(k) for k, _ in rows), default=0)
    lines = []
    for key, value in rows:
        first, *rest = [str(v) for v in value] if isinstance(value, (list, tuple)) and value else [str(value)]
        lines.append(f"{indent}{key.ljust(width)}  {first}".rstrip())
        lines += [f"{indent}{' ' * width}  {v}" for v in rest]
    return lines


def as_json(value: Any) -> str:
    """A report as JSON text that any parser reads: NaN and infinities become strings, arrays lists."""
    return json.dumps(_plain(value), indent=2, ensure_ascii=False)


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(v) for v in value]
    if isinstance(value, float):
        return value if math.isfinite(value) else str(value)
    if value is None or isinstance(value, (str, int)):
        return value
    if hasattr(value, "tolist"):
        return _plain(value.tolist())
    return str(value)
