"""What can be computed at compile time: nodes that read only weights, and those that read the step index besides."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from vlac.graph import Node, Program, Repeat
from vlac.ops import NpArray
from vlac.rewrites.clean import prune
from vlac.rewrites.draft import (
    Draft,
    StageDraft,
    closure,
    evaluate,
    has_symbols,
    is_weight,
    node,
    static_shape,
)
from vlac.weights import LazyTensor


def _depending_only_on(draft: Draft, stage: StageDraft, sources: set[str]) -> set[str]:
    """Names of nodes of static shape that read nothing but weights, `sources` and each other.

    A `tile` is never among them: its operand says the same in fewer bytes, and engines broadcast.
    """
    types = draft.types(stage)
    inside = set(sources)
    for n in stage.nodes:
        movable = n.op != "tile" and static_shape(types[n.name]) is not None
        if (
            movable
            and not any(has_symbols(v) for _, v in n.attrs)
            and all(is_weight(i) or i in inside for i in n.inputs)
        ):
            inside.add(n.name)
    return inside - sources


def _frontier(stage: StageDraft, inside: set[str]) -> list[Node]:
    """Nodes of `inside` that somebody outside reads."""
    read = {i for n in stage.nodes if n.name not in inside for i in n.inputs} | set(stage.outputs)
    return [n for n in stage.nodes if n.name in inside and n.name in read]


def _reads_weight(nodes: Sequence[Node]) -> bool:
    return any(is_weight(i) for n in nodes for i in n.inputs)


def _snapshot(draft: Draft, nodes: Sequence[Node]) -> dict[str, LazyTensor]:
    return {i[1:]: draft.lazy(i[1:]) for n in nodes for i in n.inputs if is_weight(i)}


def fold(program: Program) -> Program:
    """Float nodes that read only weights and constants become weights, evaluated when the weight is loaded.

    Index constants (`arange`, `full`) stay nodes: engines make them cheaper than files do.
    """
    draft = Draft.of(program)
    for stage in draft.stages:
        types = draft.types(stage)
        inside = _depending_only_on(draft, stage, set())
        renamed: dict[str, str] = {}
        for n in _frontier(stage, inside):
            part = closure(stage.nodes, n.name)
            shape = static_shape(types[n.name])
            if types[n.name].dtype != "f32" or shape is None or n.name in stage.outputs or not _reads_weight(part):
                continue
            weights = _snapshot(draft, part)

            def load(part: list[Node] = part, name: str = n.name, w: dict[str, LazyTensor] = weights) -> NpArray:
                return evaluate(part, name, w, {})

            renamed[n.name] = draft.add_param(f"{stage.name}.{n.name}", LazyTensor(shape, load, "f32", n.name))
        stage.rename_uses(renamed)
        stage.nodes = [n for n in stage.nodes if n.name not in renamed]
    return prune(draft.build())


def tabulate_steps(program: Program) -> Program:
    """In a repeated stage, what depends only on weights and the step index (embedded times, modulations of norms)
    becomes a table with one row per step.

    `embed(step, @table)` picks the row; the table is evaluated by the numpy references when it is loaded.
    """
    draft = Draft.of(program)
    for step in draft.repeats():
        stage = draft.stage(step.stage)
        types = draft.types(stage)
        inside = _depending_only_on(draft, stage, {step.index})
        for n in _frontier(stage, inside):
            part = closure(stage.nodes, n.name)
            shape = static_shape(types[n.name])
            depends = any(step.index in p.inputs for p in part)
            if types[n.name].dtype != "f32" or not shape or not depends or _is_row_pick(n, step):
                continue
            table = draft.add_param(f"{stage.name}.{n.name}.table", _table(draft, step, part, n.name, shape))
            if shape == (1, shape[-1]):
                stage.replace(n, [node(n.name, "embed", step.index, table)])
            else:
                row = stage.fresh(f"{n.name}.row")
                stage.replace(n, [node(row, "embed", step.index, table), node(n.name, "reshape", row, shape=shape)])
    return prune(draft.build())


def _is_row_pick(n: Node, step: Repeat) -> bool:
    return n.op == "embed" and n.inputs[0] == step.index and is_weight(n.inputs[1])


def _table(draft: Draft, step: Repeat, part: list[Node], name: str, shape: tuple[int, ...]) -> LazyTensor:
    weights = _snapshot(draft, part)
    width = int(np.prod(shape))

    def load() -> NpArray:
        # loaded and widened once, not once per turn: the references compute in float64
        given = {f"@{w}": t.load().astype(np.float64) for w, t in weights.items()}
        indices = (np.array([i], dtype=np.int32) for i in range(step.times))
        turns = [evaluate(part, name, weights, {**given, step.index: i}) for i in indices]
        return np.stack([np.asarray(t, dtype=np.float32).reshape(width) for t in turns])

    return LazyTensor((step.times, width), load, "f32", f"table of {name}")
