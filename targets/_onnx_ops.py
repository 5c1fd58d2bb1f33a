"""Every op of the program table as ONNX nodes: one function per op, for `StageEmitter` (_onnx_emitter.py).

Standard ops throughout. Linears with int8 weights have two forms over the same bytes: "integer" quantises activations
per row and multiplies integers (com.microsoft MatMulIntegerToFloat: the fast way in ONNX Runtime), "portable" says
DequantizeLinear + MatMul (OpenVINO compresses it; any engine runs it). "integer" also attends on integers where that is
faster (see _onnx_attention.py); "linears" is "integer" without that. "fused" is "portable" with long attention as one
op of ONNX Runtime's, as in "linears". "unrounded" is "portable" whose activations stay
float where the program fixes their scales: for engines that would take them for a licence to saturate.
"""

from __future__ import annotations

import math

import numpy as np

from vlac.artifact import NpArray
from vlac.errors import Unsupported
from vlac.float8 import LARGEST
from vlac.formats import FORMATS
from vlac.graph import Node
from vlac.layouts import INT4
from vlac.ops import DTYPES, OPS
from vlac.targets._onnx_attention import LONG_ATTENTION, long_attention
from vlac.targets._onnx_emitter import StageEmitter, emits, ints
from vlac.targets._onnx_extents import is_static
from vlac.targets._onnx_graph import MICROSOFT, Weight, onnx_type
from vlac.targets._onnx_parts import emit_part, parted

MASKED = -1e30
"""Added to the score of a masked key: finite, so that a row with no key gives the mean of the values, not NaN."""
MAX_POSITIONS = 1 << 16


# --- index, mask and layout ------------------------------------------------------------------------------------


@emits("arange", "full")
def _(e: StageEmitter, n: Node, out: str) -> None:
    """Only those that are too large to fold or hold symbols arrive here."""
    a = n.attr
    if is_static(a.values()):
        e.node("Identity", [e.graph.const(OPS[n.op].reference([], a))], out)
    elif n.op == "full":
        value = e.graph.const(np.full(1, a["value"], DTYPES[a["dtype"]]))
        e.node("Expand", [value, e.extent(*a["shape"])], out)
    else:
        ends = [e.scalar(e.extent(a[k])) for k in ("start", "stop")]
        e.cast(e.node("Range", [*ends, e.graph.const(1, np.int64)], e.tmp(out, "range")), out, "i32")


@emits("cast")
def _(e: StageEmitter, n: Node, out: str) -> None:
    e.cast(e(n.inputs[0]), out, n.attr["dtype"])


@emits("cumsum")
def _(e: StageEmitter, n: Node, out: str) -> None:
    e.node("CumSum", [e(n.inputs[0]), e.graph.const(0, np.int64)], out)


@emits("reduce_sum")
def _(e: StageEmitter, n: Node, out: str) -> None:
    e.node("ReduceSum", [e(n.inputs[0]), e.i64(0)], out, keepdims=1)


@emits("repeat_each")
def _(e: StageEmitter, n: Node, out: str) -> None:
    (count,), times = e.shape(n.inputs[0]), n.attr["times"]
    column = e.reshape(e(n.inputs[0]), e.tmp(out, "column"), count, 1)
    wide = e.node("Expand", [column, e.i64(1, times)], e.tmp(out, "expanded"))
    e.reshape(wide, out, *e.shape(n.name))


@emits("attention_mask")
def _(e: StageEmitter, n: Node, out: str) -> None:
    query, key, valid = (e(i) for i in n.inputs)
    (queries,), (keys,) = e.shape(n.inputs[0]), e.shape(n.inputs[1])
    column = e.reshape(query, e.tmp(out, "query"), queries, 1)
    row = e.reshape(key, e.tmp(out, "key"), 1, keys)
    sees = e.node("LessOrEqual", [row, column], e.tmp(out, "sees"))
    e.node("And", [sees, e.reshape(valid, e.tmp(out, "valid"), 1, keys)], out)


@emits("weighted_mask")
def _(e: StageEmitter, n: Node, out: str) -> None:
    mask, counts = n.inputs
    logs = e.node("Log", [e.cast(e(counts), e.tmp(out, "counts"), "f32")], e.tmp(out, "logs"))
    row = e.reshape(logs, e.tmp(out, "row"), 1, e.shape(counts)[0])
    e.node("Where", [e(mask), row, e.f32(MASKED)], out)


@emits("argmax")
def _(e: StageEmitter, n: Node, out: str) -> None:
    wide = e.node("ArgMax", [e(n.inputs[0])], e.tmp(out, "i64"), axis=1, keepdims=0, select_last_index=0)
    e.cast(wide, out, "i32")


@emits("pick")
def _(e: StageEmitter, n: Node, out: str) -> None:
    e.node("Gather", [e(i) for i in n.inputs], out, axis=0)


@emits("write_rows")
def _(e: StageEmitter, n: Node, out: str) -> None:
    x, rows, start = (e(i) for i in n.inputs)
    count = e.shape(n.inputs[1])[0]
    first = e.node("Cast", [start], e.tmp(out, "first"), to=onnx_type("INT64"))
    at = e.node("Add", [e.i64(*range(count)), first], e.tmp(out, "at")) if count > 1 else first
    e.node("ScatterND", [x, e.reshape(at, e.tmp(out, "indices"), count, 1), rows], out)


@emits("concat")
def _(e: StageEmitter, n: Node, out: str) -> None:
    e.node("Concat", [e(i) for i in n.inputs], out, axis=n.attr["axis"])


@emits("slice")
def _(e: StageEmitter, n: Node, out: str) -> None:
    a, whole = n.attr, parted(e, n.inputs[0])
    if whole is not None:
        emit_part(e, whole, n, out)
        return
    e.node("Slice", [e(n.inputs[0]), e.extent(a["start"]), e.extent(a["stop"]), e.i64(a["axis"])], out)


@emits("reshape")
def _(e: StageEmitter, n: Node, out: str) -> None:
    shape = n.attr["shape"]
    if sum(not isinstance(d, int) for d in shape) > 1:
        e.node("Reshape", [e(n.inputs[0]), e.extent(*shape)], out)
    else:
        e.reshape(e(n.inputs[0]), out, *e.shape(n.name))


@emits("transpose")
def _(e: StageEmitter, n: Node, out: str) -> None:
    e.transpose(e(n.inputs[0]), out, *n.attr["perm"])


@emits("pad")
def _(e: StageEmitter, n: Node, out: str) -> None:
    shape = e.shape(n.inputs[0])
    zeros = [0] * (2 * len(shape) - 1)
    e.node("Pad", [e(n.inputs[0]), e.i64(*zeros, n.attr["size"] - shape[-1])], out)


@emits("tile")
def _(e: StageEmitter, n: Node, out: str) -> None:
    e.node("Expand", [e(n.inputs[0]), e.extent(*e.types[n.name].shape)], out)


@emits("patchify")
def _(e: StageEmitter, n: Node, out: str) -> None:
    c, s, _ = e.shape(n.inputs[0])
    p, b = n.attr["patch"], n.attr["block"]
    g = s // p // b
    cut = e.reshape(e(n.inputs[0]), e.tmp(out, "cut"), c, g, b, p, g, b, p)
    e.reshape(e.transpose(cut, e.tmp(out, "sorted"), 1, 4, 2, 5, 0, 3, 6), out, *ints(e.types[n.name]))


@emits("pixel_shuffle")
def _(e: StageEmitter, n: Node, out: str) -> None:
    rows, width = e.shape(n.inputs[0])
    g, f = math.isqrt(rows), n.attr["factor"]
    cut = e.reshape(e(n.inputs[0]), e.tmp(out, "cut"), g // f, f, g // f, f, width)
    e.reshape(e.transpose(cut, e.tmp(out, "sorted"), 0, 2, 1, 3, 4), out, *ints(e.types[n.name]))


# --- arithmetic ------------------------------------------------------------------------------------------------


@emits("add", "sub", "mul", "sigmoid", "tanh", "relu")
def _(e: StageEmitter, n: Node, out: str) -> None:
    e.node(n.op.capitalize(), [e(i) for i in n.inputs], out)


@emits("scale")
def _(e: StageEmitter, n: Node, out: str) -> None:
    e.node("Mul", [e(n.inputs[0]), e.f32(n.attr["factor"])], out)


@emits("softmax")
def _(e: StageEmitter, n: Node, out: str) -> None:
    e.node("Softmax", [e(n.inputs[0])], out, axis=-1)


@emits("silu")
def _(e: StageEmitter, n: Node, out: str) -> None:
    """x * sigmoid(x): ONNX Runtime fuses it; its Swish is slower than the parts."""
    x = e(n.inputs[0])
    e.node("Mul", [x, e.node("Sigmoid", [x], e.tmp(out, "sigmoid"))], out)


@emits("gelu")
def _(e: StageEmitter, n: Node, out: str) -> None:
    x = e(n.inputs[0])
    if n.attr["approximate"] != "quick":
        e.node("Gelu", [x], out, approximate=n.attr["approximate"])
        return
    scaled = e.node("Mul", [x, e.f32(1.702)], e.tmp(out, "scaled"))
    e.node("Mul", [x, e.node("Sigmoid", [scaled], e.tmp(out, "sigmoid"))], out)


@emits("layer_norm")
def _(e: StageEmitter, n: Node, out: str) -> None:
    width = e.shape(n.inputs[0])[1]
    weight = e(n.inputs[1]) if len(n.inputs) > 1 else e.graph.const(np.ones(width, np.float32))
    rest = [e(i) for i in n.inputs[2:]]
    e.node("LayerNormalization", [e(n.inputs[0]), weight, *rest], out, axis=-1, epsilon=n.attr["eps"])


@emits("rms_norm")
def _(e: StageEmitter, n: Node, out: str) -> None:
    width = e.shape(n.inputs[0])[1]
    weight = e(n.inputs[1]) if len(n.inputs) > 1 else e.graph.const(np.ones(width, np.float32))
    e.node("RMSNormalization", [e(n.inputs[0]), weight], out, axis=-1, epsilon=n.attr["eps"])


@emits("time_embedding")
def _(e: StageEmitter, n: Node, out: str) -> None:
    """In float64: the angles reach 2 pi / min_period. An engine that computes them in float32 declines the op."""
    a, double = n.attr, onnx_type("DOUBLE")
    fraction = np.linspace(0.0, 1.0, a["dim"] // 2)
    period = a["min_period"] * (a["max_period"] / a["min_period"]) ** fraction
    rate = e.graph.const((2 * math.pi / period)[None, :])
    t = e.node("Cast", [e(n.inputs[0])], e.tmp(out, "t"), to=double)
    angle = e.node("Mul", [t, rate], e.tmp(out, "angle"))
    both = [e.node(f, [angle], e.tmp(out, f.lower())) for f in ("Sin", "Cos")]
    e.cast(e.node("Concat", both, e.tmp(out, "double"), axis=1), out, "f32")


# --- weights ---------------------------------------------------------------------------------------------------


@emits("embed")
def _(e: StageEmitter, n: Node, out: str) -> None:
    """Rows are gathered in their storage format and widened afterwards: the table itself stays mapped."""
    ids, table = e(n.inputs[0]), n.inputs[1]
    if not table.startswith("@"):
        e.node("Gather", [e(table), ids], out, axis=0)
        return
    w = e.graph.param(table[1:])
    if w.format == "f32":
        e.node("Gather", [w.values, ids], out, axis=0)
        return
    rows = e.node("Gather", [w.values, ids], e.tmp(out, "rows"), axis=0)
    if w.format in ("f16", "bf16"):
        e.cast(rows, out, "f32")
        return
    scale = e.node("Gather", [w.scale, ids], e.tmp(out, "scales"), axis=0)
    column = e.reshape(scale, e.tmp(out, "column"), e.shape(n.inputs[0])[0], 1)
    e.node("Mul", [e.cast(rows, e.tmp(out, "floats"), "f32"), column], out)


@emits("linear")
def _(e: StageEmitter, n: Node, out: str) -> None:
    biased = len(n.inputs) > 2
    product = e.tmp(out, "product") if biased else out
    weight = n.inputs[1]
    w = e.graph.param(weight[1:]) if weight.startswith("@") else None
    if w is not None and e.integer(n):
        known = e.fixed(n.inputs[0])
        if known is None:
            _linear_integer(e, n.inputs[0], w, product)
        else:
            _linear_fixed(e, known, w, product)
    elif w is not None and w.format in ("int8", *INT4):
        e.node("MatMul", [e(n.inputs[0]), _dequantized(e, w)], product)
    else:
        e.node("MatMul", [e(n.inputs[0]), e.turned(e(weight), w is not None and w.layout == "columns")], product)
    if biased:
        e.node("Add", [product, e(n.inputs[2])], out)


def _dequantized(e: StageEmitter, w: Weight) -> str:
    """No zero point: OpenVINO reads Convert + Multiply and keeps the integers; ORT fuses int4 to MatMulNBits."""
    attrs = {"axis": 1} if w.format == "int8" else {"axis": 0, "block_size": FORMATS[w.format].block}
    return e.node("DequantizeLinear", [e.columns(w), w.scale], e.tmp(w.values, "f32"), **attrs)


def _linear_integer(e: StageEmitter, x: str, w: Weight, out: str) -> None:
    """x quantised per row to uint8 around 128, times int8 weights: u8 x s8 has fast kernels, s8 x s8 scalar code."""
    quantized, column = e.once(("rows", x), lambda: _quantize_rows(e, x))
    zero = e.graph.const(128, np.uint8)
    q = e.columns(w)
    inputs = [quantized, q, e.f32(1.0), w.scale, zero]
    raw = e.graph.node("MatMulIntegerToFloat", inputs, e.tmp(out, "integer"), domain=MICROSOFT)
    e.node("Mul", [raw, column], out)


def _linear_fixed(e: StageEmitter, known: Node, w: Weight, out: str) -> None:
    """The scale is a constant: nothing is looked at while running, and the product needs no correction behind it."""
    x, zero = e(known.inputs[0]), e.graph.const(128, np.uint8)
    scale = e.f32(known.attr["largest"] / 127)
    codes = e.once(("codes", known.name), lambda: e.node("QuantizeLinear", [x, scale, zero], e.tmp(x, "fixed")))
    inputs = [codes, e.columns(w), scale, w.scale, zero]
    e.graph.node("MatMulIntegerToFloat", inputs, out, domain=MICROSOFT)


@emits("round_int8")
def _(e: StageEmitter, n: Node, out: str) -> None:
    """A fixed scale as QuantizeLinear and DequantizeLinear, which engines fuse; others with Round."""
    x = e(n.inputs[0])
    rows, width = e.shape(n.inputs[0])
    if n.attr["form"] == "tensor" and e.form == "unrounded":
        e.node("Identity", [x], out)
        return
    if n.attr["form"] == "tensor":
        scale, zero = e.f32(n.attr["largest"] / 127), e.graph.const(0, np.int8)
        if e.form in ("integer", "linears"):  # ONNX Runtime moves the pair through reshapes and gets its types wrong
            whole = e.node("Round", [e.node("Div", [x, scale], e.tmp(out, "ratio"))], e.tmp(out, "whole"))
            codes = e.node("Clip", [whole, e.f32(-128.0), e.f32(127.0)], e.tmp(out, "codes"))
            e.node("Mul", [codes, scale], out)
            return
        codes = e.node("QuantizeLinear", [x, scale, zero], e.tmp(out, "codes"))
        e.node("DequantizeLinear", [codes, scale, zero], out)
        return
    pad = -width % 32 if n.attr["form"] == "block32" else 0
    if pad:
        ends = e.graph.const(np.array([0, 0, 0, pad], dtype=np.int64))
        x = e.node("Pad", [x, ends], e.tmp(out, "padded"))
    if n.attr["form"] == "block32":
        x = e.reshape(x, e.tmp(out, "blocks"), rows if rows > 0 else -1, (width + pad) // 32, 32)
    size = e.node("Abs", [x], e.tmp(out, "abs"))
    most = e.node("ReduceMax", [size, e.i64(-1)], e.tmp(out, "most"), keepdims=1)
    scale = e.node("Div", [e.node("Max", [most, e.f32(1e-30)], e.tmp(out, "max")), e.f32(127.0)], e.tmp(out, "scale"))
    codes = e.node("Round", [e.node("Div", [x, scale], e.tmp(out, "ratio"))], e.tmp(out, "codes"))
    if n.attr["form"] == "token":
        e.node("Mul", [codes, scale], out)
        return
    whole = e.node("Mul", [codes, scale], e.tmp(out, "rounded"))
    joined = e.reshape(whole, e.tmp(out, "joined") if pad else out, rows if rows > 0 else -1, width + pad)
    if pad:
        e.node("Slice", [joined, e.i64(0), e.i64(width), e.i64(1)], out)


@emits("round_f16")
def _(e: StageEmitter, n: Node, out: str) -> None:
    half = e.node("Cast", [e(n.inputs[0])], e.tmp(out, "half"), to=onnx_type("FLOAT16"))
    e.node("Cast", [half], out, to=onnx_type("FLOAT"))


@emits("round_fp8")
def _(e: StageEmitter, n: Node, out: str) -> None:
    """The type of the zero point says what is quantised to."""
    scale, zero = e.f32(n.attr["largest"] / LARGEST), e.graph.float8_zero()
    codes = e.node("QuantizeLinear", [e(n.inputs[0]), scale, zero], e.tmp(out, "codes"))
    e.node("DequantizeLinear", [codes, scale, zero], out)


def _quantize_rows(e: StageEmitter, x: str) -> tuple[str, str]:
    """(uint8 [M, K], scales as a column [M, 1]) of a value; shared by all linears that read it."""
    rows, name = e.shape(x)[0], e(x)
    most = e.node("ReduceMax", [name, e.i64(1)], e.tmp(name, "max"), keepdims=0)
    least = e.node("ReduceMin", [name, e.i64(1)], e.tmp(name, "min"), keepdims=0)
    negated = e.node("Neg", [least], e.tmp(name, "neg"))
    absmax = e.node("Max", [most, negated, e.f32(1e-8)], e.tmp(name, "absmax"))
    scale = e.node("Mul", [absmax, e.f32(1 / 127)], e.tmp(name, "scale"))
    if rows > 0:
        zeros = e.graph.const(np.full(rows, 128, np.uint8))
    else:
        extent = e.node("Shape", [scale], e.tmp(name, "rows"))
        zeros = e.node("Expand", [e.graph.const([128], np.uint8), extent], e.tmp(name, "zeros"))
    quantized = e.node("QuantizeLinear", [name, scale, zeros], e.tmp(name, "u8"), axis=0)
    return quantized, e.reshape(scale, e.tmp(name, "scales"), rows, 1)


# --- attention -------------------------------------------------------------------------------------------------


@emits("attention")
def _(e: StageEmitter, n: Node, out: str) -> None:
    """Decomposed; the query heads of one key head become rows of one matrix, so K and V are never repeated."""
    if e.form in LONG_ATTENTION and long_attention(n, e.types):
        LONG_ATTENTION[e.form](e, n, out)
        return
    heads, groups = n.attr["heads"], n.attr["kv_heads"]
    per = heads // groups
    (queries, q_width), (keys, _), (_, v_width) = (e.shape(i) for i in n.inputs[:3])
    d, v_dim = q_width // heads, v_width // groups
    q, k, v = (e(i) for i in n.inputs[:3])
    if n.attr["scale"] != 1.0:
        q = e.once(("scaled", q, n.attr["scale"]), lambda: e.node("Mul", [q, e.f32(n.attr["scale"])], e.tmp(out, "q")))
    if per == 1:
        _attend_each_head(e, n, (q, k, v), out)
        return
    q = e.transpose(e.reshape(q, e.tmp(out, "q4"), queries, groups, per, d), e.tmp(out, "qt"), 1, 2, 0, 3)
    q = e.reshape(q, e.tmp(out, "q3"), groups, per * queries if queries > 0 else -1, d)
    k = e.transpose(e.reshape(k, e.tmp(out, "k3"), keys, groups, d), e.tmp(out, "kt"), 1, 2, 0)
    v = e.transpose(e.reshape(v, e.tmp(out, "v3"), keys, groups, v_dim), e.tmp(out, "vt"), 1, 0, 2)
    y = _attend(e, n, (q, k, v), per, out)
    y = e.reshape(y, e.tmp(out, "y4"), groups, per, queries, v_dim)
    e.reshape(e.transpose(y, e.tmp(out, "yt"), 2, 0, 1, 3), out, queries, heads * v_dim)


def _attend_each_head(e: StageEmitter, n: Node, x: tuple[str, str, str], out: str) -> None:
    """As many key heads as query heads: in four dimensions, whose transposes OpenVINO's attention kernel absorbs."""
    heads = n.attr["heads"]
    q, k, v = (
        e.transpose(e.reshape(name, e.tmp(out, f"{c}4"), 1, rows, heads, width // heads), e.tmp(out, f"{c}t"), *perm)
        for name, c, (rows, width), perm in zip(
            x, "qkv", (e.shape(i) for i in n.inputs[:3]), ((0, 2, 1, 3), (0, 2, 3, 1), (0, 2, 1, 3)), strict=True
        )
    )
    y = _attend(e, n, (q, k, v), 1, out)
    e.reshape(e.transpose(y, e.tmp(out, "yt"), 0, 2, 1, 3), out, e.shape(n.inputs[0])[0], e.shape(n.inputs[2])[1])


def _attend(e: StageEmitter, n: Node, x: tuple[str, str, str], per: int, out: str) -> str:
    """Softmax(q k) v over the last two dimensions; keys come transposed, the scale lies in the queries."""
    q, k, v = x
    scores = e.node("MatMul", [q, k], e.tmp(out, "scores"))
    if len(n.inputs) > 3:
        scores = e.node("Add", [scores, _mask_bias(e, n.inputs[3], per)], e.tmp(out, "masked"))
    p = e.node("Softmax", [scores], e.tmp(out, "p"), axis=-1)
    return e.node("MatMul", [p, v], e.tmp(out, "y"))


def _mask_bias(e: StageEmitter, mask: str, per: int) -> str:
    """0 or MASKED [per * queries, keys], made once per mask and head grouping."""
    if mask in e.constants:
        known = e.constants[mask]
        bias = np.where(known, 0.0, MASKED).astype(np.float32) if known.dtype == np.bool_ else known
        return e.graph.const(np.tile(bias, (per, 1)))

    def one() -> str:
        if e.types[mask].dtype == "f32":
            return e(mask)
        return e.node("Where", [e(mask), e.f32(0.0), e.f32(MASKED)], e.tmp(e(mask), "bias"))

    def tiled() -> str:
        rows = [e.once(("bias", mask, 1), one)] * per
        return e.node("Concat", rows, e.tmp(e(mask), f"bias{per}"), axis=0)

    return str(e.once(("bias", mask, per), one if per == 1 else tiled))


@emits("rope")
def _(e: StageEmitter, n: Node, out: str) -> None:
    x, positions = n.inputs
    rows, width = e.shape(x)
    d, base = n.attr["head_dim"], float(n.attr["base"])
    cos, sin = e.once(("rope", positions, d, base), lambda: _rope_tables(e, n, positions, d, base))
    x3 = e.reshape(e(x), e.tmp(out, "x3"), 1, rows, width)
    e.reshape(e.node("RotaryEmbedding", [x3, cos, sin], e.tmp(out, "y3"), num_heads=width // d), out, rows, width)


def _rope_tables(e: StageEmitter, n: Node, positions: str, d: int, base: float) -> tuple[str, str]:
    """cos and sin [1, rows, d/2] of these positions, from tables made in float64."""
    if positions in e.constants:
        angle = _angles(e.constants[positions], d, base)[None]
        return e.graph.const(np.cos(angle), np.float32), e.graph.const(np.sin(angle), np.float32)
    bounds = e.ranges.get(positions)
    if bounds is None or bounds[1] - bounds[0] >= MAX_POSITIONS:
        raise Unsupported(
            f"stage {e.stage.name}, {n.name} = rope: positions {positions} have no known bound ({bounds}), so no table "
            "of cosines can be made",
            remedy="derive positions from masks and arange, or use a gguf target",
        )
    rows, name = e.shape(positions)[0], e(positions)

    def index() -> str:
        row = e.reshape(name, e.tmp(name, "row"), 1, rows)
        if bounds[0] == 0:
            return row
        return e.node("Sub", [row, e.graph.const(bounds[0], np.int32)], e.tmp(name, "index"))

    at = e.once(("index", positions), index)
    angle = _angles(np.arange(bounds[0], bounds[1] + 1), d, base)
    return (
        e.node("Gather", [e.graph.const(np.cos(angle), np.float32), at], e.tmp(name, f"cos{d}"), axis=0),
        e.node("Gather", [e.graph.const(np.sin(angle), np.float32), at], e.tmp(name, f"sin{d}"), axis=0),
    )


def _angles(positions: NpArray, d: int, base: float) -> NpArray:
    return np.asarray(positions, np.float64)[:, None] / base ** (np.arange(0, d, 2) / d)
