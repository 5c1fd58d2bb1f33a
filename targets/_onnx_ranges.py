"""Bounds of integer values: which positions a rope may see, so that its cos/sin table can be built at compile time.

Plain interval arithmetic over the index ops, following values from stage to stage along the schedule.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from vlac.graph import Node, Program, Repeat, Stage, infer_stage
from vlac.ops import Type

Range = tuple[int, int] | None
"""(least, largest) a value can be, None = not known."""

_KEEP = ("slice", "reshape", "transpose", "tile", "repeat_each")


def ranges(program: Program) -> dict[str, dict[str, Range]]:
    """For every stage of a bound program, the range of each i32 and bool value, by value name."""
    result: dict[str, dict[str, Range]] = {}
    known: dict[str, Range] = {}
    for step in program.schedule.steps:
        stage = program.stage(step.stage)
        given = dict(known)
        if isinstance(step, Repeat):
            given[step.index] = (0, step.times - 1)
            given.update(dict.fromkeys((into for _, into, _ in step.carry), None))
        result[stage.name] = _stage_ranges(program, stage, given)
        for out in stage.outputs:
            found = result[stage.name].get(out)
            # a camera slot without a camera holds zeros
            known[out] = _union([found, (0, 0)]) if not isinstance(step, Repeat) and step.each else found
    return result


def _stage_ranges(program: Program, stage: Stage, given: Mapping[str, Range]) -> dict[str, Range]:
    types = infer_stage(stage, program.params)
    values: dict[str, Range] = {n: (0, 1) if t.dtype == "bool" else given.get(n) for n, t in stage.inputs}
    for node in stage.nodes:
        if types[node.name].dtype == "bool":
            values[node.name] = (0, 1)
        elif types[node.name].dtype == "i32":
            values[node.name] = _node_range(node, [values.get(i) for i in node.inputs], types)
    return values


def _node_range(node: Node, x: Sequence[Range], types: Mapping[str, Type]) -> Range:
    a = node.attr
    if node.op == "arange":
        return int(a["start"]), int(a["stop"]) - 1
    if node.op == "full":
        return int(a["value"]), int(a["value"])
    if node.op == "argmax":
        columns = types[node.inputs[0]].shape[1]
        return (0, columns - 1) if isinstance(columns, int) else None
    if node.op == "pick":
        return x[0]
    if any(r is None for r in x) or not x:
        return None
    known = [r for r in x if r is not None]
    lo, hi = known[0]
    if node.op in _KEEP:
        return lo, hi
    if node.op == "cast":
        return None if types[node.inputs[0]].dtype == "f32" else (lo, hi)
    if node.op == "concat":
        return _union(x)
    if node.op == "pad":
        return _union([x[0], (0, 0)])
    if node.op in ("cumsum", "reduce_sum"):
        count = types[node.inputs[0]].shape[0]
        assert isinstance(count, int)
        least = 1 if node.op == "cumsum" else count
        return min(lo * least, lo * count), max(hi * least, hi * count)
    if node.op in ("add", "sub", "mul"):
        corners = [_arithmetic(node.op, p, q) for p in known[0] for q in known[1]]
        return min(corners), max(corners)
    return None


def _arithmetic(op: str, p: int, q: int) -> int:
    return {"add": p + q, "sub": p - q, "mul": p * q}[op]


def _union(x: Sequence[Range]) -> Range:
    known = [r for r in x if r is not None]
    if len(known) < len(x) or not known:
        return None
    return min(r[0] for r in known), max(r[1] for r in known)
