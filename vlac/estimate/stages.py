"""The small stages that are measured: linears, attention and other ops by size, ports, a block, next to nothing."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from vlac.dims import Dim, parse_dim
from vlac.formats import FORMATS
from vlac.graph import Node, Param, Program, Stage, StageBuilder, Symbol, infer_stage
from vlac.weights import LazyTensor

WIDTHS, ROWS = (64, 256, 768, 1536), (1, 8, 48, 256, 1024)
"""Sizes of the linears that are measured: square, by rows; those that would take a second each are left out."""
MOST_MACS = 7e8
ATTENTION = ((1, 128), (16, 64), (48, 192), (256, 256), (1024, 1024))
"""(queries, keys) of the attentions that are measured, with the program's own heads."""
SMALL, LARGE = (16, 128), (512, 768)
CHAIN = 12
"""Ops in a row of a probe, so that starting the stage does not count."""
PORTS = 16

_UNARY = (
    "silu",
    "gelu",
    "rms_norm",
    "layer_norm",
    "scale",
    "sigmoid",
    "tanh",
    "relu",
    "round_int8",
    "round_f16",
    "round_fp8",
)
_BINARY = ("add", "sub", "mul")


@dataclass
class Probes:
    """Stages to measure, the weights they share, and how to give them inputs."""

    stages: list[Stage] = field(default_factory=list)
    params: dict[str, Param] = field(default_factory=dict)
    weights: dict[str, LazyTensor] = field(default_factory=dict)
    smallest: Symbol | None = None
    """The program's symbol with the least maximum."""

    def rows(self, count: int) -> Dim:
        """So many rows, spelled with a symbol where the program has one: engines then do not know it beforehand."""
        if self.smallest is None or count <= self.smallest.max:
            return count
        return parse_dim(self.smallest.name) + (count - self.smallest.max)

    def weight(self, name: str, form: str, *shape: int) -> str:
        if name not in self.params:
            rng = np.random.default_rng(len(self.params))
            values = (rng.standard_normal(shape) / math.sqrt(shape[-1])).astype(np.float32)
            self.params[name] = Param(shape, form)
            self.weights[name] = LazyTensor.of(values, name)
        return f"@{name}"

    def stage(self, name: str, draw: Callable[[StageBuilder], str]) -> str:
        b = StageBuilder(name)
        b.output(draw(b))
        self.stages.append(b.build())
        return name


def linears(probes: Probes, form: str) -> dict[str, tuple[int, int, int]]:
    """Stage -> (width, rows, how many linears)."""
    made = {}
    for width in WIDTHS:
        if width % FORMATS[form].block:
            continue
        count = 8 if width < 512 else 3
        for rows in ROWS:
            if rows * width * width > MOST_MACS:
                continue

            def draw(b: StageBuilder, width: int = width, rows: int = rows, count: int = count) -> str:
                x = b.input("state", "f32", probes.rows(rows), width)
                for i in range(count):
                    x = b.op("linear", x, probes.weight(f"{form}.{width}.{i}", form, width, width))
                return x

            made[probes.stage(f"linear_{form}_{width}_{rows}", draw)] = (width, rows, count)
    return made


def attentions(probes: Probes, template: Node, head_dim: int) -> dict[str, float]:
    """Stage -> MAC of each of its two attentions."""
    a, made = template.attr, {}
    heads, groups = int(a["heads"]), int(a["kv_heads"])
    for queries, keys in ATTENTION:

        def draw(b: StageBuilder, queries: int = queries, keys: int = keys) -> str:
            # without a mask all patches of a picture attend to one another: their number is known beforehand
            masked = len(template.inputs) > 3
            rows, others = (probes.rows(queries), probes.rows(keys)) if masked else (queries, keys)
            q = b.input("state", "f32", rows, heads * head_dim)
            k, v = (b.input(n, "f32", others, groups * head_dim) for n in ("noise", "pixels"))
            masks = [b.input("token_valid", "bool", rows, others)] if masked else []
            for _ in range(2):
                q = b.op("attention", q, k, v, *masks, **a)
            return q

        made[probes.stage(f"attention{len(template.inputs)}_{queries}_{keys}", draw)] = (
            2.0 * queries * keys * heads * head_dim
        )
    return made


def others(probes: Probes, nodes: Iterable[Node]) -> dict[str, tuple[str, int, int]]:
    """Stage -> (kind, bytes of one, how many), for the kinds of op that a chain can be made of."""
    made = {}
    first: dict[str, Node] = {}
    for n in nodes:
        if n.op in (*_UNARY, *_BINARY, "rope", "slice", "concat"):
            first.setdefault(n.op, n)
    first.setdefault("add", Node("add", "add", ("x", "y")))
    for kind, node in first.items():
        for rows, width in (SMALL, LARGE):

            def draw(b: StageBuilder, kind: str = kind, node: Node = node, rows: int = rows, width: int = width) -> str:
                return _chain(b, probes, kind, node, rows, width)

            bytes_ = 4 * rows * width * (3 if kind in _BINARY else 2)
            made[probes.stage(f"{kind}_{rows}", draw)] = (kind, bytes_, CHAIN)

    def index(b: StageBuilder) -> str:
        x = b.input("tokens", "i32", 64)
        for i in range(CHAIN):
            x = b.op("add", x, b.op("arange", start=i, stop=i + 64)) if i % 2 else b.op("add", x, x)
        return b.op("cast", x, dtype="f32")

    made[probes.stage("index_64", index)] = ("index", 4 * 64 * 3, CHAIN + CHAIN // 2)
    return made


def ports(probes: Probes) -> None:
    """A stage with many outputs, and one that reads them."""
    rows, width = SMALL
    given, taken = StageBuilder("many_outputs"), StageBuilder("many_inputs")
    x = given.input("state", "f32", rows, width)
    names = [given.op("scale", x, factor=1.0 + i, name=f"port.{i}") for i in range(PORTS)]
    given.output(*names)
    ports = [taken.input(name, "f32", rows, width) for name in names]
    total = ports[0]
    for port in ports[1:]:
        total = taken.op("add", total, port)
    taken.output(total)
    probes.stages += [given.build(), taken.build()]


def dims(program: Program) -> tuple[Dim, Dim]:
    """Rows of the block and of what came before it: symbols where the program has them, of a size near 16 and 64."""
    names = sorted((s for s in program.symbols), key=lambda s: abs(s.max - SMALL[0]))
    dims: list[Dim] = [parse_dim(s.name) for s in names[:2]]
    return (*dims, SMALL[0], 64)[0], (dims[1] + 48 if len(dims) > 1 else 64)


def block(
    probes: Probes, form: str, attention: tuple[Node, int] | None, rope: Node | None, rows: Dim, earlier: Dim
) -> Stage:
    """Four layers of a transformer over a few rows, with keys and values from elsewhere before their own: what nodes
    cost where each is of another kind than the last.

    rows: a symbol where the program has one, for engines to which sizes chosen per call cost something.
    """
    b, width = StageBuilder("block"), 256

    def weight(name: str, out: int, into: int) -> str:
        return probes.weight(f"block.{name}.{out}.{into}", form, out, into)

    x = b.input("state", "f32", rows, width)
    if attention is not None:
        node, head = attention
        inner, outer = int(node.attr["heads"]) * head, int(node.attr["kv_heads"]) * head
        kept = [b.input(name, "f32", earlier, outer) for name in ("noise", "pixels")]
        masks = [b.input("token_valid", "bool", rows, rows + earlier)] if len(node.inputs) > 3 else []
        if rope is not None:
            positions = b.op("cumsum", b.op("cast", b.input("image_valid", "bool", rows), dtype="i32"))
    for i in range(4):
        h = b.op("rms_norm", x, probes.weight(f"block.{i}.norm", "f32", width), eps=1e-5)
        if attention is not None:
            h = b.op("linear", h, weight(f"{i}.qkv", inner + 2 * outer, width))
            cuts = (0, inner, inner + outer, inner + 2 * outer)
            q, k, v = (b.op("slice", h, axis=1, start=cuts[j], stop=cuts[j + 1]) for j in range(3))
            if rope is not None and rope.attr["head_dim"] == head:
                q, k = (b.op("rope", y, positions, **rope.attr) for y in (q, k))
            k, v = (b.op("concat", old, new, axis=0) for old, new in zip(kept, (k, v), strict=True))
            h = b.op("attention", q, k, v, *masks, **node.attr)
            if inner % FORMATS[form].block == 0:
                x = b.op("add", x, b.op("linear", h, weight(f"{i}.out", width, inner)))
        h = b.op("rms_norm", x, probes.weight(f"block.{i}.norm", "f32", width), eps=1e-5)
        h = b.op("linear", h, weight(f"{i}.up", 4 * width, width))
        gate, up = (b.op("slice", h, axis=1, start=2 * width * j, stop=2 * width * (j + 1)) for j in range(2))
        h = b.op("linear", b.op("mul", b.op("silu", gate), up), weight(f"{i}.down", width, 2 * width))
        x = b.op("add", x, h)
    b.output(x)
    return b.build()


def _chain(b: StageBuilder, probes: Probes, kind: str, node: Node, rows: int, width: int) -> str:
    if kind == "slice":
        # every slice starts elsewhere, and an add keeps it alive
        x = b.input("state", "f32", probes.rows(rows), width + CHAIN)
        total = b.op("slice", x, axis=1, start=0, stop=width)
        for i in range(1, CHAIN):
            total = b.op("add", total, b.op("slice", x, axis=1, start=i, stop=i + width))
        return total
    x = b.input("state", "f32", probes.rows(rows), width)
    extra: list[str] = []
    if kind in _BINARY:
        extra = [b.input("noise", "f32", probes.rows(rows), width)]
    elif kind == "rope":
        extra = [b.op("arange", start=0, stop=probes.rows(rows))]
        head = int(node.attr["head_dim"])
        if width % head:
            x = b.op("slice", x, axis=1, start=0, stop=head * (width // head) or width)
    elif kind == "concat":
        extra = [b.input("noise", "f32", 1, width)]
    elif kind in ("rms_norm", "layer_norm"):
        extra = [probes.weight(f"{kind}.{i}.{width}", "f32", width) for i in range(len(node.inputs) - 1)]
    attrs = {"axis": 0} if kind == "concat" else node.attr
    for _ in range(CHAIN):
        x = b.op(kind, x, *extra, **attrs)
    return x


def formats(program: Program) -> dict[str, int]:
    """Format of the linears' weights -> how many values they have."""
    used: dict[str, int] = {}
    for stage in program.stages:
        for n in stage.nodes:
            if n.op == "linear" and n.inputs[1].startswith("@"):
                param = program.params[n.inputs[1][1:]]
                used[param.format] = used.get(param.format, 0) + math.prod(param.shape)
    return used


def typical_attentions(program: Program) -> dict[int, tuple[Node, int]]:
    """Number of operands -> the attention with so many that occurs most, and its head dimension."""
    found: dict[tuple[Any, ...], tuple[int, Node, int]] = {}
    for stage in program.stages:
        types = infer_stage(stage, program.params)
        for n in stage.nodes:
            width = types[n.inputs[0]].shape[1] if n.op == "attention" else None
            if isinstance(width, int):
                key = (n.attrs, width, len(n.inputs))
                count = found.get(key, (0, n, 0))[0]
                found[key] = (count + 1, n, width // int(n.attr["heads"]))
    rising = sorted(found.values(), key=lambda f: f[0])
    return {len(node.inputs): (node, head) for _, node, head in rising}
