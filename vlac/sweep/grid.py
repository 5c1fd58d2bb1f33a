"""GRID.yaml: every combination of targets, engines, threads and passes, as points.

    checkpoint: push-cubes            # one or a list
    target: [gguf-q8, onnx-int8]
    engine: [null]                    # null: the best here
    threads: [2]
    passes:                           # axes: one choice of each, in this order
      flow: [none, "flow-steps:steps=5", [flow-steps: {steps: 5, solver: ab2}, rotate-values]]
      weights: [none, "quantize-weights:bits=4,method=gptq"]
    measure: {runs: 10, goldens: 2, observations: robot.npz, episodes: 50, environment: push-cubes}
    read: {stats_from: FILE}          # as the options of `vlac compile`

A choice is `none`, a pass, or a list of passes as in a recipe; `passes` may be a plain list of recipes as well.
"""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from vlac.errors import InputError, VlacError
from vlac.sweep.point import Build, Measure, Point

KEYS = ("checkpoint", "target", "engine", "threads", "passes", "measure", "read")
READ = ("revision", "stats_key", "stats_from", "no_stats", "spec", "unnorm_key", "embodiment", "tokenizer")
MAX_POINTS = 100_000
FORM = "checkpoint: FOLDER\ntarget: [gguf-q8]\npasses:\n  flow: [none, 'flow-steps:steps=5']\nmeasure: {runs: 10}"


@dataclass(frozen=True)
class Grid:
    """Points in the order of the file, and what is measured of each."""

    points: tuple[Point, ...]
    measure: Measure


def read_grid(path: str | Path) -> Grid:
    """The grid of a YAML file, every name in it checked. VlacError names the file, the key and the legal ones."""
    from vlac.recipes import load_yaml

    table = load_yaml(path, "grid", FORM)
    where = f"grid {path}"
    if not isinstance(table, dict) or not set(table) >= {"checkpoint", "target"}:
        raise VlacError(f"{where}: expected a mapping with at least checkpoint and target", remedy=f"write:\n{FORM}")
    _known(table, KEYS, where)
    measure = _measure(table.get("measure") or {}, where)
    read = table.get("read") or {}
    if not isinstance(read, dict):
        raise VlacError(f"{where}: read is {read!r:.60}, expected a mapping")
    _known(read, READ, f"{where}, read")
    axes = _axes(table.get("passes"), where)
    lists = [_list(table.get(k), k, where) for k in ("checkpoint", "target", "engine", "threads")]
    _check_names(lists[1], lists[2], where)
    if math.prod(len(x) for x in (*lists, *axes.values())) > MAX_POINTS:
        raise VlacError(f"{where}: more than {MAX_POINTS} points", remedy="several smaller grids")
    points = []
    for checkpoint, target, engine, threads in itertools.product(*lists):
        for choice in itertools.product(*axes.values()):
            passes = tuple(p for text in choice for p in text)
            place = {k: " ".join(text) or "none" for k, text in zip(axes, choice, strict=True)}
            points.append(Point(Build(str(checkpoint), target, passes, read), engine, threads, place))
    _check_passes(points, where)
    return Grid(tuple(points), measure)


def shard_of(text: str) -> tuple[int, int]:
    """ "2/8" -> (2, 8): the second of eight shards."""
    m = re.fullmatch(r"(\d+)/(\d+)", text)
    if not m or not 1 <= int(m[1]) <= int(m[2]):
        raise InputError(f"--shard {text!r}: write i/n with 1 <= i <= n, such as 2/8")
    return int(m[1]), int(m[2])


def _known(table: Mapping[Any, Any], keys: tuple[str, ...], where: str) -> None:
    for key in table:
        if key not in keys:
            raise VlacError(f"{where}: unknown key {key!r}; there are: {', '.join(keys)}")


def _list(value: Any, key: str, where: str) -> list[Any]:
    items = value if isinstance(value, list) else [value]
    if not items:
        raise VlacError(f"{where}: {key} is an empty list")
    kinds: tuple[type, ...] = (int, type(None)) if key == "threads" else (str, type(None))
    for item in items:
        if not isinstance(item, kinds) or (item is None and key in ("checkpoint", "target")):
            raise VlacError(f"{where}: {key} holds {item!r:.60}, expected {kinds[0].__name__}")
    if key == "threads" and any(t is not None and t < 1 for t in items):
        raise VlacError(f"{where}: threads must be 1 or more")
    return items


def _measure(table: Any, where: str) -> Measure:
    if not isinstance(table, dict):
        raise VlacError(f"{where}: measure is {table!r:.60}, expected a mapping")
    names = {f.name: f.type for f in fields(Measure)}
    _known(table, tuple(names), f"{where}, measure")
    for key, value in table.items():
        if key in ("observations", "environment"):
            legal = isinstance(value, str)
        else:
            legal = isinstance(value, int) and not isinstance(value, bool) and value >= 0
        if not legal:
            wanted = "a text" if key in ("observations", "environment") else "a number, not negative"
            raise VlacError(f"{where}, measure: {key} is {value!r:.60}, expected {wanted}")
    found = Measure(**table)
    if found.goldens < 1:
        raise VlacError(f"{where}, measure: goldens is 0; drift needs at least 1 observation")
    if found.observations and not Path(found.observations).exists():
        raise VlacError(f"{where}, measure: observations {found.observations} is not there")
    if found.episodes:
        from vlac.environments import BUNDLED

        if found.environment not in BUNDLED:
            known = ", ".join(BUNDLED)
            raise VlacError(f"{where}, measure: no environment {found.environment!r}; there are: {known}")
    return found


def _axes(value: Any, where: str) -> dict[str, list[tuple[str, ...]]]:
    if value is None:
        return {}
    table = value if isinstance(value, dict) else {"passes": value}
    result = {}
    for axis, choices in table.items():
        if not isinstance(choices, list) or not choices:
            raise VlacError(f"{where}: passes, {axis}: expected a list of choices, found {choices!r:.60}", remedy=FORM)
        result[str(axis)] = [_choice(c, f"{where}: {axis}, choice {i}") for i, c in enumerate(choices, 1)]
    return result


def _choice(value: Any, where: str) -> tuple[str, ...]:
    from vlac.recipes import entry

    if value is None or value == "none":
        return ()
    items = value if isinstance(value, list) else [value]
    return tuple(entry(item, where) for item in items)


def _check_names(target: list[Any], engine: list[Any], where: str) -> None:
    from vlac.engines.base import NAMES
    from vlac.registry import targets

    for name in target:
        targets.get(name)
    for name in engine:
        if name is not None and name not in NAMES:
            raise VlacError(f"{where}: no engine {name!r}; there are: {', '.join(NAMES)}")


def _check_passes(points: list[Point], where: str) -> None:
    from vlac.api import typed_passes

    for passes in dict.fromkeys(p.build.passes for p in points):
        try:
            typed_passes(passes)
        except VlacError as error:
            raise VlacError(f"{where}: {error.message}", remedy=error.remedy) from None
