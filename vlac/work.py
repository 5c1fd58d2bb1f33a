"""How much a program computes and moves: multiply-accumulates and bytes, stage by stage and node by node."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from vlac.dims import Dim, bind_dim
from vlac.formats import FORMATS
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


# --- node by node ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Piece:
    """One node at known sizes. Figures are of one run.

    operands: how many (an attention with a mask has four). rows, width: of the result (of a linear: sqrt of inputs x
    outputs). macs: multiply-accumulates. format: of the
    weight that is read, "f32" without one. weight_bytes: stored. value_bytes: operands and result, 4 bytes a float or
    index, 1 a bool. index: the result is bool or i32, which engines may compute on the host.
    """

    op: str
    operands: int
    rows: int
    width: int
    macs: int
    format: str
    weight_bytes: int
    value_bytes: int
    index: bool


@dataclass(frozen=True)
class StageWork:
    """A stage's pieces, how often it runs for one chunk, and the bytes of its inputs and outputs with their number."""

    name: str
    runs: int
    pieces: tuple[Piece, ...]
    ports: int
    port_bytes: int

    @property
    def weight_bytes(self) -> int:
        """Bytes of weights that one run reads."""
        return sum(p.weight_bytes for p in self.pieces)


_BYTES = {"f32": 4, "i32": 4, "bool": 1}


def stage_works(program: Program, symbols: Mapping[str, int] | None = None) -> list[StageWork]:
    """Every stage of the schedule at the given sizes (default: the largest), in order, every camera slot filled."""
    sizes = {**program.max_symbols(), **(symbols or {})}
    found = []
    for step in program.schedule.steps:
        stage = program.stage(step.stage)
        bound = program.bind(sizes)
        types = {n: _numbers(t, sizes) for n, t in infer_stage(bound.stage(stage.name), program.params).items()}
        for name, p in program.params.items():
            types[f"@{name}"] = ("f32", p.shape)
        runs = step.times if isinstance(step, Repeat) else sizes.get("C", 1) if step.each else 1
        pieces = tuple(_piece(n, program, types) for n in bound.stage(stage.name).nodes)
        ports = [types[n] for n, _ in stage.inputs] + [types[n] for n in stage.outputs]
        total = sum(_BYTES[d] * math.prod(shape) for d, shape in ports)
        found.append(StageWork(stage.name, runs, pieces, len(ports), total))
    return found


Known = tuple[str, tuple[int, ...]]
"""dtype and shape."""


def _numbers(t: Type, sizes: Mapping[str, int]) -> Known:
    shape = (bind_dim(d, sizes) for d in t.shape)
    return t.dtype, tuple(d for d in shape if isinstance(d, int))


def _piece(n: Node, program: Program, types: Mapping[str, Known]) -> Piece:
    dtype, shape = types[n.name]
    weights = [i[1:] for i in n.inputs if i.startswith("@")]
    heaviest = max(weights, key=lambda w: math.prod(program.params[w].shape), default="")
    form = program.params[heaviest].format if heaviest else "f32"
    # an embedding reads the rows that are asked for, everything else the whole weight
    share = min(1.0, shape[0] / program.params[heaviest].shape[0]) if n.op == "embed" and heaviest else 1.0
    stored = sum(math.prod(program.params[w].shape) * FORMATS[program.params[w].format].bits / 8 for w in weights)
    values = [types[i] for i in n.inputs if not i.startswith("@")] + [(dtype, shape)]
    known = {i: Type(*types[i]) for i in (*n.inputs, n.name)}
    width = shape[-1] if shape else 1
    if n.op == "linear":
        width = round(math.sqrt(math.prod(types[n.inputs[1]][1])))
    return Piece(
        n.op,
        len(n.inputs),
        shape[0] if shape else 1,
        width,
        macs([n], known, {}),
        form,
        round(stored * share),
        sum(_BYTES[d] * math.prod(s) for d, s in values),
        dtype != "f32",
    )
