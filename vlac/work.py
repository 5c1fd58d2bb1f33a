"""How much a program computes: nodes and multiply-accumulates, stage by stage, for one chunk."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from vlac.dims import Dim, bind_dim
from vlac.graph import Node, Program, Repeat, infer_stage
from vlac.ops import Type


@dataclass(frozen=True)
class Work:
    """nodes: of one run. macs: multiply-accumulates of linears and attentions in all runs of one chunk."""

    nodes: int
    macs: int


def work(program: Program, symbols: Mapping[str, int] | None = None) -> dict[str, Work]:
    """Work of every stage for one chunk, at the given sizes (default: the largest), every camera slot filled."""
    sizes = {**program.max_symbols(), **(symbols or {})}
    result: dict[str, Work] = {}
    for step in program.schedule.steps:
        stage = program.stage(step.stage)
        types = infer_stage(stage, program.params)
        params = {f"@{name}": Type("f32", p.shape) for name, p in program.params.items()}
        runs = step.times if isinstance(step, Repeat) else sizes.get("C", 1) if step.each else 1
        result[stage.name] = Work(len(stage.nodes), runs * macs(stage.nodes, {**params, **types}, sizes))
    return result


def macs(nodes: Iterable[Node], types: Mapping[str, Type], symbols: Mapping[str, int]) -> int:
    """Multiply-accumulates of these nodes; `types` knows values and "@weights"."""

    def size(d: Dim) -> int:
        bound = bind_dim(d, symbols)
        return bound if isinstance(bound, int) else 0

    total = 0
    for n in nodes:
        shapes = [[size(d) for d in types[i].shape] for i in n.inputs]
        if n.op == "linear":
            total += shapes[0][0] * math.prod(shapes[1])
        elif n.op == "attention":
            widths = shapes[0][1] + shapes[2][1] * n.attr["heads"] // n.attr["kv_heads"]
            total += shapes[0][0] * shapes[1][0] * widths
    return total
