"""Sequences of rows, reasoned about: which rows an index vector numbers how, what a mask hides, how a value is cut."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from vlac.dims import Dim
from vlac.graph import Node
from vlac.ops import Type
from vlac.rewrites.draft import is_weight, node
from vlac.rewrites.linears import ROW_WISE

ELEMENTWISE = ("add", "sub", "mul")
BY_ROW = (*ROW_WISE, "pad")
"""Ops whose result row i depends on row i of the first operand and on weights."""


@dataclass(frozen=True)
class Run:
    """`rows` entries of an index vector that lie in lo..hi; `counts`: lo, lo+1, ... one by one."""

    rows: Dim
    lo: float
    hi: float
    counts: bool = False


def runs(value: str, made: Mapping[str, Node]) -> tuple[Run, ...] | None:
    """What is known of an i32 vector from the nodes that make it; None where that is too little."""
    n = made.get(value)
    if n is None:
        return None
    a = n.attr
    if n.op == "full":
        return (Run(a["shape"][0], a["value"], a["value"]),)
    if n.op == "arange" and isinstance(a["start"], int):
        last = a["stop"] - 1
        return (Run(a["stop"] - a["start"], a["start"], last if isinstance(last, int) else float("inf"), True),)
    if n.op == "concat":
        parts = [runs(i, made) for i in n.inputs]
        return tuple(r for p in parts if p is not None for r in p) if None not in parts else None
    return None


def split_runs(found: tuple[Run, ...] | None, at: Dim) -> tuple[tuple[Run, ...], tuple[Run, ...]] | None:
    """The runs before and from row `at` on; None if that row lies inside of one."""
    rows: Dim = 0
    for i, r in enumerate(found or ()):
        if rows == at:
            return (found or ())[:i], (found or ())[i:]
        rows = rows + r.rows
    return None


def hides_later(mask: str, at: Dim, made: Mapping[str, Node]) -> bool:
    """Whether a mask over one sequence never lets rows before `at` see rows from `at` on."""
    n = made.get(mask)
    if n is None or n.op != "attention_mask":
        return False
    query, key = (split_runs(runs(i, made), at) for i in n.inputs[:2])
    return query is not None and key is not None and max(r.hi for r in query[0]) < min(r.lo for r in key[1])


def is_causal(mask: str, rows: Dim, made: Mapping[str, Node]) -> bool:
    """Whether, of the last `rows` keys, query i (of `rows` queries) sees at most the first i + 1."""
    n = made.get(mask)
    if n is None or n.op != "attention_mask":
        return False
    query, key = (runs(i, made) for i in n.inputs[:2])
    if not query or not key:
        return False
    own = key[-1]
    return len(query) == 1 and query[0].rows == own.rows == rows and own.counts and query[0] == own


def spans_rows(t: Type, rows: Dim) -> bool:
    """Whether a value has one entry per row, rather than being broadcast over them."""
    return bool(t.shape) and t.shape[0] == rows


class Cutter:
    """Cuts values that one stage makes, by as few new nodes as will do; `nodes` grows in order."""

    def __init__(self, nodes: list[Node], types: dict[str, Type], taken: set[str]) -> None:
        self.nodes, self.types, self.taken = nodes, types, taken
        self._cuts: dict[tuple[str, Dim, Dim], str] = {}

    def cut(self, value: str, start: Dim, stop: Dim) -> str:
        """Rows start..stop of a value; the value itself where that is all of it, or where it is a weight."""
        if is_weight(value) or (start == 0 and self.types[value].shape[0] == stop):
            return value
        key = (value, start, stop)
        if key not in self._cuts:
            self._cuts[key] = self._make(value, start, stop)
        return self._cuts[key]

    def _make(self, value: str, start: Dim, stop: Dim) -> str:
        n = next((n for n in self.nodes if n.name == value), None)
        a = n.attr if n is not None else {}
        if n is not None and n.op == "full":
            return self._add(value, "full", (), {**a, "shape": (stop - start, *a["shape"][1:])}, stop - start)
        if n is not None and n.op == "arange":
            ends = {"start": a["start"] + start, "stop": a["start"] + stop}
            return self._add(value, "arange", (), ends, stop - start)
        if n is not None and n.op == "concat" and a["axis"] == 0:
            inside = self._operands(n, start, stop)
            if inside is not None:
                return inside[0] if len(inside) == 1 else self._add(value, "concat", inside, a, stop - start)
        if n is not None and n.op == "attention_mask":
            query = self.cut(n.inputs[0], start, stop)
            return self._add(value, n.op, (query, *n.inputs[1:]), {}, stop - start)
        return self._add(value, "slice", (value,), {"axis": 0, "start": start, "stop": stop}, stop - start)

    def _operands(self, n: Node, start: Dim, stop: Dim) -> tuple[str, ...] | None:
        """Operands of a concat that fill these rows exactly; None if an end lies inside of one."""
        rows: Dim = 0
        ends: list[Dim] = [0]
        for i in n.inputs:
            rows = rows + self.types[i].shape[0]
            ends.append(rows)
        return n.inputs[ends.index(start) : ends.index(stop)] if start in ends and stop in ends else None

    def _add(self, value: str, op: str, inputs: tuple[str, ...], attrs: Mapping[str, object], rows: Dim) -> str:
        name, i = f"{value}.rows", 1
        while name in self.taken:
            name, i = f"{value}.rows.{i}", i + 1
        self.taken.add(name)
        self.nodes.append(node(name, op, *inputs, **attrs))  # type: ignore[arg-type]
        t = self.types[value]
        self.types[name] = Type(t.dtype, (rows, *t.shape[1:]))
        return name
