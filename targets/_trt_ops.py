"""Stages as strongly typed ONNX for TensorRT: every value has one type, and where it changes there is a Cast.

Half precision (float16 or bfloat16) is for what is multiplied: linears with such weights, attention, and what lies
between two of them. Norms, rotations, sums onto the residual stream, the flow state and everything that touches it stay
float32; so do the inputs and outputs of a stage. A linear on integers reads its input through QuantizeLinear and
DequantizeLinear with one scale and its weight through DequantizeLinear, all in float32.

Dialect 10.3 uses operators of opset 20 (21 where 4-bit weights need it): RMSNorm, rotation and attention are spelt out.
Dialect 10.16 has RMSNormalization, RotaryEmbedding and, in half precision, Attention.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np

from vlac.artifact import NpArray
from vlac.dims import Affine
from vlac.errors import Unsupported
from vlac.graph import Node
from vlac.layouts import INT4, bf16_from_f32
from vlac.targets._onnx_emitter import EMITTERS, Emit, StageEmitter, emits_into
from vlac.targets._onnx_extents import sources
from vlac.targets._onnx_graph import Weight, onnx_type
from vlac.targets._onnx_ops import MASKED, _angles, _rope_tables

ONNX_TYPES = {"f32": "FLOAT", "f16": "FLOAT16", "bf16": "BFLOAT16"}
MASKED_HALF = -3e4
"""Of masked keys in half precision: added to a score it stays finite in float16, and its exponential is 0."""
FOLLOW = (
    *("gelu", "silu", "sigmoid", "tanh", "relu", "mul", "scale"),
    *("slice", "reshape", "transpose", "concat", "tile", "pad", "pixel_shuffle"),
)
"""Ops whose result is half precision when all they read is."""
ATTENTION_HEADS = range(32, 257, 8)
"""Widths of heads for which the Attention operator is used."""
CONST_BYTES = 1 << 20
"""Float32 parameters up to this size become constants of the type that reads them; larger ones are cast."""


class TensorRTEmitter(StageEmitter):
    """Writes one stage.

    half: "f16", "bf16" or "" (all float32). modern: dialect 10.16 instead of 10.3. integer: parameters whose linears
    read rounded inputs; all other integer weights are widened to `half`.
    """

    def __init__(self, *args: Any, half: str, modern: bool, integer: frozenset[str], **options: Any) -> None:
        super().__init__(*args, **options)
        self.half, self.modern, self.by_integers = half, modern, integer
        self.kind = "f32"
        self._kinds: dict[str, str] = {}
        self.emitters = {**EMITTERS, **_OWN}

    def fixed(self, operand: str) -> Node | None:
        """Nothing is drawn together over a rounding: Q, DQ and a product stay what TensorRT looks for."""
        return None

    # types

    def write(self, node: Node) -> None:
        """One node in the type that its op wants; a stage's outputs are float32."""
        is_float = self.types[node.name].dtype == "f32"
        if node.op == "round_f16" and self._is_f16(node):
            return
        kind = self._kind_of(node) if is_float else "f32"
        leaves = node.name in self.stage.outputs and kind != "f32"
        out = self.graph.unique(self._prefix + (f"{node.name}/{kind}" if leaves else node.name))
        self.kind = kind
        self.emitters[node.op](self, node, out)
        self.kind = "f32"
        self._names[node.name], self._kinds[node.name] = out, kind
        if leaves:
            wide = self.graph.unique(self._prefix + node.name)
            self._names[node.name] = self._as(out, "f32", wide)
            self.cache["as", kind, wide] = out
            self._kinds[node.name] = "f32"

    def _is_f16(self, node: Node) -> bool:
        """Whether what is to be rounded to float16 is float16 already: one value with two names."""
        source = node.inputs[0]
        if self._kinds.get(source) != "f16" or node.name in self.stage.outputs:
            return False
        self._names[node.name], self._kinds[node.name] = self._names[source], "f16"
        return True

    def _kind_of(self, node: Node) -> str:
        if not self.half:
            return "f32"
        if node.op == "round_f16":
            return "f16" if self.half == "f16" else "f32"
        if node.op == "linear":
            return self._linear_kind(node)
        if node.op == "embed" and node.inputs[1].startswith("@"):
            return self.half if self.program.params[node.inputs[1][1:]].format != "f32" else "f32"
        if node.op == "attention":
            return self.half
        values = [i for i in node.inputs if i not in self.constants]
        if node.op in FOLLOW and values and all(self._kinds.get(i) == self.half for i in values):
            return self.half
        return "f32"

    def _linear_kind(self, node: Node) -> str:
        weight = node.inputs[1]
        if not weight.startswith("@") or weight[1:] in self.by_integers:
            return "f32"
        fmt = self.program.params[weight[1:]].format
        return self.half if fmt == self.half or fmt in ("int8", "fp8", *INT4) else "f32"

    def __call__(self, operand: str) -> str:
        """Name of an operand in the type of the node being written; integers and masks as they are."""
        if operand in self.constants:
            array = self.constants[operand]
            return self.floats(array) if array.dtype == np.float32 else self.graph.const(array)
        if operand.startswith("@"):
            return self._param_as(operand[1:])
        name = self._names[operand]
        if self.types[operand].dtype != "f32" or self._kinds.get(operand, "f32") == self.kind:
            return name
        return self._as(name, self.kind)

    def unchanged(self, operand: str) -> str:
        """Name of an operand in whatever type it has."""
        return self(operand) if operand in self.constants or operand.startswith("@") else self._names[operand]

    def _as(self, name: str, kind: str, out: str = "") -> str:
        """A float value in another type; cast once."""

        def make() -> str:
            made = out or self.tmp(name, kind)
            return self.graph.node("Cast", [name], made, to=onnx_type(ONNX_TYPES[kind]))

        return str(self.once(("as", kind, name), make))

    def _param_as(self, name: str) -> str:
        shape, fmt = self.program.params[name].shape, self.program.params[name].format
        if fmt == "f32" and self.kind != "f32" and 4 * int(np.prod(shape)) <= CONST_BYTES:
            return str(self.once(("const", self.kind, name), lambda: self.floats(self.program.weights[name].load())))
        w = self.graph.param(name)
        if w.format not in ONNX_TYPES:
            return self._float_param(name)  # says why not
        return w.values if w.format == self.kind else self._as(w.values, self.kind)

    def floats(self, values: Any) -> str:
        """A constant in the type of the node being written."""
        array = np.asarray(values, np.float32)
        if self.kind == "f16":
            return self.graph.const(array.astype(np.float16))
        return self.graph.const(bf16_from_f32(array) if self.kind == "bf16" else array)

    def f32(self, value: float) -> str:
        return self.floats(value)

    def cast(self, x: str, out: str, dtype: str) -> str:
        """Also to the type of the node being written, which "f32" stands for there."""
        name = ONNX_TYPES[self.kind] if dtype == "f32" else {"i32": "INT32", "bool": "BOOL"}[dtype]
        return self.node("Cast", [x], out, to=onnx_type(name))

    # shapes: no attribute of Shape, no Squeeze without axes

    def _free(self, dim: Affine) -> str:
        return str(self.once(("dim", dim), lambda: self._sum_of_extents(dim)))

    def _sum_of_extents(self, dim: Affine) -> str:
        found, rest = sources(dim, self.stage.inputs)
        total = ""
        for s in found:
            value = self._names[s.value]
            shape = str(self.once(("shape", value), partial(self._shape_of, value)))
            ends = [self.i64(s.axis), self.i64(s.axis + 1), self.i64(0)]
            term = self.node("Slice", [shape, *ends], self.tmp(value, "extent"))
            if s.factor != 1:
                term = self.node("Mul", [term, self.i64(s.factor)], self.tmp(value, "extents"))
            total = self.node("Add", [total, term], self.tmp(value, "sum")) if total else term
        return self.node("Add", [total, self.i64(rest)], self.tmp(total, "dim")) if rest else total

    def _shape_of(self, value: str) -> str:
        return self.node("Shape", [value], self.tmp(value, "shape"))

    def scalar(self, x: str) -> str:
        return self.node("Squeeze", [x, self.i64(0)], self.tmp(x, "number"))


_OWN: dict[str, Emit] = {}


_emits = emits_into(_OWN)


def _trt(e: StageEmitter) -> TensorRTEmitter:
    assert isinstance(e, TensorRTEmitter)
    return e


# --- indices and masks -----------------------------------------------------------------------------------------


@_emits("arange")
def _(e: StageEmitter, n: Node, out: str) -> None:
    ends = [n.attr[k] for k in ("start", "stop")]
    if all(isinstance(v, int) for v in ends):
        EMITTERS["arange"](e, n, out)
        return
    names = [e.graph.const(v, np.int64) if isinstance(v, int) else e.scalar(e.extent(v)) for v in ends]
    e.cast(e.node("Range", [*names, e.graph.const(1, np.int64)], e.tmp(out, "range")), out, "i32")


@_emits("cumsum")
def _(e: StageEmitter, n: Node, out: str) -> None:
    """In float32, exact for counts below 2^24: the older parser sums no integers."""
    x = e.cast(e(n.inputs[0]), e.tmp(out, "floats"), "f32")
    e.cast(e.node("CumSum", [x, e.graph.const(0, np.int64)], e.tmp(out, "sums")), out, "i32")


@_emits("weighted_mask")
def _(e: StageEmitter, n: Node, out: str) -> None:
    mask, counts = n.inputs
    logs = e.node("Log", [e.cast(e(counts), e.tmp(out, "counts"), "f32")], e.tmp(out, "logs"))
    row = e.reshape(logs, e.tmp(out, "row"), 1, e.shape(counts)[0])
    e.node("Where", [e(mask), row, e.f32(MASKED)], out)


# --- norms and rotations ---------------------------------------------------------------------------------------


@_emits("rms_norm")
def _(e: StageEmitter, n: Node, out: str) -> None:
    if _trt(e).modern:
        EMITTERS["rms_norm"](e, n, out)
        return
    x = e(n.inputs[0])
    square = e.node("Mul", [x, x], e.tmp(out, "square"))
    mean = e.node("ReduceMean", [square, e.i64(-1)], e.tmp(out, "mean"), keepdims=1)
    size = e.node("Sqrt", [e.node("Add", [mean, e.f32(n.attr["eps"])], e.tmp(out, "sum"))], e.tmp(out, "size"))
    weighted = len(n.inputs) > 1
    even = e.node("Div", [x, size], e.tmp(out, "even") if weighted else out)
    if weighted:
        e.node("Mul", [even, e(n.inputs[1])], out)


@_emits("rope")
def _(e: StageEmitter, n: Node, out: str) -> None:
    """Halves of every head turned: (x1 cos - x2 sin, x2 cos + x1 sin)."""
    x, positions = n.inputs
    rows, width = e.shape(x)
    d = n.attr["head_dim"]
    if _trt(e).modern:
        _rotary_operator(e, n, out)
        return
    cos, sin = _rope_columns(e, n, positions, d)
    heads = e.reshape(e(x), e.tmp(out, "heads"), rows, width // d, d)
    ends = [e.i64(v) for v in (0, d // 2, d)]
    x1, x2 = (e.node("Slice", [heads, ends[i], ends[i + 1], e.i64(2)], e.tmp(out, f"x{i + 1}")) for i in range(2))
    parts = [
        [e.node("Mul", [a, b], e.tmp(out, name)) for a, b, name in ((x1, c, f"{k}1"), (x2, s, f"{k}2"))]
        for c, s, k in ((cos, sin, "low"), (sin, cos, "high"))
    ]
    low = e.node("Sub", parts[0], e.tmp(out, "low"))
    high = e.node("Add", parts[1], e.tmp(out, "high"))
    e.reshape(e.node("Concat", [low, high], e.tmp(out, "turned"), axis=2), out, rows, width)


def _rotary_operator(e: StageEmitter, n: Node, out: str) -> None:
    """On [1, heads, rows, width], the only shape that TensorRT's layer is documented for."""
    x, positions = n.inputs
    (rows, width), d, base = e.shape(x), n.attr["head_dim"], float(n.attr["base"])
    cos, sin = e.once(("rope", positions, d, base), lambda: _rope_tables(e, n, positions, d, base))
    split = e.reshape(e(x), e.tmp(out, "x4"), 1, rows, width // d, d)
    turned = e.node("RotaryEmbedding", [e.transpose(split, e.tmp(out, "xt"), 0, 2, 1, 3), cos, sin], e.tmp(out, "y4"))
    e.reshape(e.transpose(turned, e.tmp(out, "yt"), 0, 2, 1, 3), out, rows, width)


def _rope_columns(e: StageEmitter, n: Node, positions: str, d: int) -> tuple[str, str]:
    """cos and sin [rows, 1, d/2], from the tables that the other targets use."""
    base = float(n.attr["base"])
    if positions in e.constants:
        angle = _angles(e.constants[positions], d, base)[:, None]
        return e.graph.const(np.cos(angle), np.float32), e.graph.const(np.sin(angle), np.float32)

    def make() -> tuple[str, str]:
        rows = e.shape(positions)[0]
        tables = _rope_tables(e, n, positions, d, base)  # [1, rows, d/2]
        cos, sin = (e.reshape(t, e.tmp(t, "columns"), rows, 1, d // 2) for t in tables)
        return cos, sin

    made: tuple[str, str] = e.once(("columns", positions, d, base), make)
    return made


# --- weights ---------------------------------------------------------------------------------------------------


@_emits("embed")
def _(e: StageEmitter, n: Node, out: str) -> None:
    """Rows of a table in its own float type, or of one of integers dequantised."""
    ids, table = e(n.inputs[0]), n.inputs[1]
    w = e.graph.param(table[1:]) if table.startswith("@") else None
    values = e(table) if w is None or w.format in ONNX_TYPES else _dequantized(_trt(e), table[1:], w)
    e.node("Gather", [values, ids], out, axis=0)


@_emits("linear")
def _(e: StageEmitter, n: Node, out: str) -> None:
    biased = len(n.inputs) > 2
    product = e.tmp(out, "product") if biased else out
    weight = n.inputs[1]
    w = e.graph.param(weight[1:]) if weight.startswith("@") else None
    if w is None:
        columns = e.turned(e(weight), False)
    elif w.format in ONNX_TYPES:
        columns = e.turned(w.values if w.format == _trt(e).kind else e(weight), w.layout == "columns")
    else:
        columns = e.turned(_dequantized(_trt(e), weight[1:], w), w.layout == "columns")
    e.node("MatMul", [e(n.inputs[0]), columns], product)
    if biased:
        e.node("Add", [product, e(n.inputs[2])], out)


def _dequantized(e: TensorRTEmitter, name: str, w: Weight) -> str:
    """A weight of integers in the type of its scale; turned, if at all, afterwards: integers exist before it only."""
    axis = 1 if w.layout == "columns" else 0
    attrs: dict[str, int] = {"axis": axis}
    if w.format in INT4:
        attrs = {"axis": 0, "block_size": int(w.format.removeprefix("int4").removeprefix("g") or 32)}
    made = e.once(
        ("float", w.values),
        lambda: e.node("DequantizeLinear", [w.values, w.scale], e.tmp(w.values, "float"), **attrs),
    )
    kind = "f16" if e.half and name not in e.by_integers else "f32"
    return str(made) if kind == e.kind else e._as(str(made), e.kind)


@_emits("round_int8")
def _(e: StageEmitter, n: Node, out: str) -> None:
    """A fixed scale as QuantizeLinear and DequantizeLinear, with nothing before them: TensorRT fuses the two."""
    if n.attr["form"] != "tensor":
        EMITTERS["round_int8"](e, n, out)
        return
    scale, zero = e.f32(n.attr["largest"] / 127), e.graph.const(0, np.int8)
    codes = e.node("QuantizeLinear", [e(n.inputs[0]), scale, zero], e.tmp(out, "codes"))
    e.node("DequantizeLinear", [codes, scale, zero], out)


@_emits("round_f16")
def _(e: StageEmitter, n: Node, out: str) -> None:
    """The cast that float16 takes anyway; back and forth where the graph is not in float16."""
    if _trt(e).kind != "f16":
        EMITTERS["round_f16"](e, n, out)
        return
    e.node("Cast", [_trt(e).unchanged(n.inputs[0])], out, to=onnx_type("FLOAT16"))


@_emits("time_embedding")
def _(e: StageEmitter, n: Node, out: str) -> None:
    raise Unsupported(
        f"stage {e.stage.name}: {n.name} = time_embedding wants float64, TensorRT computes it in float32",
        remedy="draw it on the step's index, so that lowering makes a table of it, or use another target",
    )


# --- attention -------------------------------------------------------------------------------------------------


@_emits("attention")
def _(e: StageEmitter, n: Node, out: str) -> None:
    """In four dimensions [1, heads, rows, width], the scale in the queries; K and V are never repeated."""
    t = _trt(e)
    heads, groups = n.attr["heads"], n.attr["kv_heads"]
    (queries, q_width), (keys, _), (_, v_width) = (e.shape(i) for i in n.inputs[:3])
    d, v_dim = q_width // heads, v_width // groups
    q, k, v = (e(i) for i in n.inputs[:3])
    if t.modern and t.half and d == v_dim and d in ATTENTION_HEADS and heads > 1:  # of one masked head: no kernel
        _attention_operator(t, n, (q, k, v), out)
        return
    per = heads // groups
    if n.attr["scale"] != 1.0:
        q = e.once(("scaled", q, n.attr["scale"]), lambda: e.node("Mul", [q, e.f32(n.attr["scale"])], e.tmp(out, "q")))
    if per == 1:
        q = e.transpose(e.reshape(q, e.tmp(out, "q4"), 1, queries, heads, d), e.tmp(out, "qt"), 0, 2, 1, 3)
    else:  # the query heads of one key head become rows of one matrix
        q = e.transpose(e.reshape(q, e.tmp(out, "q5"), 1, queries, groups, per, d), e.tmp(out, "qt"), 0, 2, 3, 1, 4)
        q = e.reshape(q, e.tmp(out, "q4"), 1, groups, per * queries if queries > 0 else -1, d)
    k = e.transpose(e.reshape(k, e.tmp(out, "k4"), 1, keys, groups, d), e.tmp(out, "kt"), 0, 2, 3, 1)
    v = e.transpose(e.reshape(v, e.tmp(out, "v4"), 1, keys, groups, v_dim), e.tmp(out, "vt"), 0, 2, 1, 3)
    scores = e.node("MatMul", [q, k], e.tmp(out, "scores"))
    if len(n.inputs) > 3:
        scores = e.node("Add", [scores, _bias(t, n.inputs[3], per)], e.tmp(out, "masked"))
    y = e.node("MatMul", [e.node("Softmax", [scores], e.tmp(out, "p"), axis=-1), v], e.tmp(out, "y"))
    if per == 1:
        y = e.transpose(y, e.tmp(out, "yt"), 0, 2, 1, 3)
    else:
        y = e.reshape(y, e.tmp(out, "y5"), 1, groups, per, queries, v_dim)
        y = e.transpose(y, e.tmp(out, "yt"), 0, 3, 1, 2, 4)
    e.reshape(y, out, queries, heads * v_dim)


def _attention_operator(e: TensorRTEmitter, n: Node, x: tuple[str, str, str], out: str) -> None:
    """Four-dimensional operands, no caches, one output: what TensorRT 10.14 and later reads."""
    counts = (n.attr["heads"], n.attr["kv_heads"], n.attr["kv_heads"])
    parts = []
    for name, letter, count, operand in zip(x, "qkv", counts, n.inputs, strict=False):
        rows, width = e.shape(operand)
        split = e.reshape(name, e.tmp(out, f"{letter}4"), 1, rows, count, width // count)
        parts.append(e.transpose(split, e.tmp(out, f"{letter}t"), 0, 2, 1, 3))
    if len(n.inputs) > 3:
        parts.append(_bias(e, n.inputs[3], 1))
    y = e.node("Attention", parts, e.tmp(out, "y"), scale=float(n.attr["scale"]))
    rows, width = e.shape(n.name)
    e.reshape(e.transpose(y, e.tmp(out, "yt"), 0, 2, 1, 3), out, rows, width)


def _bias(e: TensorRTEmitter, mask: str, per: int) -> str:
    """What is added to the scores [1, 1, per * queries, keys]; made once per mask, type and head grouping."""
    masked = MASKED if e.kind == "f32" else MASKED_HALF
    queries, keys = e.shape(mask)

    def constant(known: NpArray) -> str:
        bias = np.where(known, 0.0, masked) if known.dtype == np.bool_ else np.maximum(known, masked)
        return e.floats(np.tile(bias, (per, 1))[None, None])

    def made() -> str:
        name = e.unchanged(mask)
        if e.types[mask].dtype != "f32":
            bias = e.node("Where", [name, e.f32(0.0), e.f32(masked)], e.tmp(name, "bias"))
        elif e.kind == "f32":
            bias = e(mask)
        else:  # between stages it is as the program says
            finite = e.node("Max", [name, e.graph.const(np.float32(masked))], e.tmp(name, "finite"))
            bias = e.cast(finite, e.tmp(name, "bias"), "f32")
        if per > 1:
            bias = e.node("Concat", [bias] * per, e.tmp(name, f"bias{per}"), axis=0)
        shape = (1, 1, per * queries if queries > 0 else -1, keys)
        if shape.count(-1) < 2:
            return e.reshape(bias, e.tmp(name, "bias4"), *shape)
        return e.node("Unsqueeze", [bias, e.i64(0, 1)], e.tmp(name, "bias4"))

    if mask in e.constants:
        return constant(e.constants[mask])
    return str(e.once(("bias", mask, per, e.kind), made))
