"""The table of devices: peaks of their arithmetic, memory and what was reached of them, each figure with its source.

devices.json holds a figure as [value, mark, source], a range as [low, high, mark, source]; marks: "published" (the
source says it), "derived" (arithmetic on published figures), "general" (common knowledge, not checked).
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from vlac.errors import Unsupported

MARKS = ("published", "derived", "general")


@dataclass(frozen=True)
class Unit:
    """A processor of a device. gops: operations (two a multiply-accumulate) in units of 1e9 a second by what is
    multiplied, "f32", "f16" or "int8", dense; bandwidth: GB/s of memory; achieved...: ranges of these that programs
    reach; cores: of a CPU, 0 of a GPU. sources: "field: mark, source" for people."""

    name: str
    cores: int
    gops: dict[str, float]
    bandwidth: float
    achieved: tuple[float, float]
    achieved_bandwidth: tuple[float, float]
    sources: tuple[str, ...]


@dataclass(frozen=True)
class Device:
    """A row of the table. ram_gb: the sizes it is sold with; a GPU in the same chip shares them."""

    key: str
    name: str
    ram_gb: tuple[float, ...]
    units: tuple[Unit, ...]


@cache
def devices() -> dict[str, Device]:
    """All devices by key."""
    rows = json.loads((Path(__file__).parent / "devices.json").read_text(encoding="utf-8"))
    return {key: _device(key, row) for key, row in rows.items()}


def device(key: str) -> Device:
    """The device of that key; Unsupported lists those there are."""
    if key not in devices():
        raise Unsupported(
            f"no device {key!r} in the table; there are: {', '.join(devices())}",
            remedy="`vlac estimate --calibrate` measures the machine at hand instead",
        )
    return devices()[key]


def _device(key: str, row: dict[str, Any]) -> Device:
    units = tuple(_unit(name, u) for name, u in row["units"].items())
    return Device(key, row["name"], tuple(float(v) for v in row["ram_gb"]), units)


def _unit(name: str, u: dict[str, Any]) -> Unit:
    said = [f"{kind} {figure[0]:g} G/s: {figure[1]}, {figure[2]}" for kind, figure in u["gops"].items()]
    said.append(f"memory {u['bandwidth'][0]:g} GB/s: {u['bandwidth'][1]}, {u['bandwidth'][2]}")
    for field, word in (("achieved", "of the arithmetic"), ("achieved_bandwidth", "of the memory")):
        low, high, mark, source = u[field]
        said.append(f"{low:g}..{high:g} {word}: {mark}, {source}")
    return Unit(
        name=name,
        cores=u.get("cores", 0),
        gops={k: float(v[0]) for k, v in u["gops"].items()},
        bandwidth=float(u["bandwidth"][0]),
        achieved=(u["achieved"][0], u["achieved"][1]),
        achieved_bandwidth=(u["achieved_bandwidth"][0], u["achieved_bandwidth"][1]),
        sources=tuple(said),
    )
