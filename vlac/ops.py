"""The table of ops: signature, shape rule, exact meaning, and the numpy reference every engine is tested against.

Activations are 2-D `[rows, features]` float32 with batch 1 written nowhere; index arithmetic is i32, masks are bool.
The reference computes in float64 and rounds once, so that it is closer to the truth than any engine.
`host=True` marks ops of index and mask arithmetic (and of pixel layout): an engine may evaluate those of them that
depend on stage inputs only with the reference, before its own graph runs.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from vlac import float8, kv_codes
from vlac.op_shapes import (
    DTYPES,
    Attr,
    Attrs,
    NpArray,
    Type,
    _argmax,
    _attention,
    _broadcast,
    _column_mean,
    _concat,
    _dtype,
    _embed,
    _float_same,
    _gelu,
    _index_vector,
    _linear,
    _mask,
    _norm,
    _pack,
    _pad,
    _patchify,
    _pick,
    _repeat_each,
    _reshape,
    _rope,
    _round8,
    _round_fp8,
    _shuffle,
    _slice,
    _tile,
    _time,
    _transpose,
    _unpack,
    _weighted_mask,
    _write_rows,
)

__all__ = ["DTYPES", "OPS", "Attr", "Attrs", "NpArray", "Op", "Type"]


@dataclass(frozen=True)
class Op:
    """One row of the table.

    Attributes:
        name: as printed in programs.
        inputs: names of the operands; a trailing "?" is optional, a trailing "*" repeats.
        attrs: attribute name -> kind: "int", "float", "str", "dim" (may hold symbols), "dims" (a tuple of them).
        infer: operand types and attributes to the result's type; raises ProgramError.
        reference: operand arrays and bound attributes to the result.
        host: index or layout arithmetic that may run in numpy on the host.
        doc: what it computes, exactly.
    """

    name: str
    inputs: tuple[str, ...]
    attrs: Mapping[str, str]
    infer: Callable[[Sequence[Type], Attrs], Type]
    reference: Callable[[Sequence[NpArray], Attrs], NpArray]
    host: bool
    doc: str


OPS: dict[str, Op] = {}

Infer = Callable[[Sequence[Type], Attrs], Type]
Reference = Callable[[Sequence[NpArray], Attrs], NpArray]


def _op(name: str, inputs: str, infer: Infer, *, host: bool = False, **attrs: str) -> Callable[[Reference], Reference]:
    def register(fn: Reference) -> Reference:
        OPS[name] = Op(name, tuple(inputs.split()), attrs, infer, fn, host, (fn.__doc__ or "").strip())
        return fn

    return register


def _f32(x: NpArray) -> NpArray:
    return np.ascontiguousarray(x, dtype=np.float32)


def _f64(x: NpArray) -> NpArray:
    return np.asarray(x, dtype=np.float64)


# --- index and mask arithmetic ---------------------------------------------------------------------------------


@_op("arange", "", lambda t, a: Type("i32", (a["stop"] - a["start"],)), host=True, start="dim", stop="dim")
def _(x: Sequence[NpArray], a: Attrs) -> NpArray:
    """start, start+1, ..., stop-1."""
    return np.arange(a["start"], a["stop"], dtype=np.int32)


@_op(
    "full",
    "",
    _dtype,
    host=True,
    shape="dims",
    value="float",
    dtype="str",
)
def _(x: Sequence[NpArray], a: Attrs) -> NpArray:
    """A constant of the given shape and dtype, every entry `value`."""
    return np.full(a["shape"], a["value"], dtype=DTYPES[a["dtype"]])


@_op("cast", "x", _dtype, host=True, dtype="str")
def _(x: Sequence[NpArray], a: Attrs) -> NpArray:
    """Conversion between bool, i32 and f32; bool is 0 or 1, nonzero is true, f32 to i32 truncates."""
    return x[0].astype(DTYPES[a["dtype"]])


@_op("cumsum", "x", _index_vector, host=True)
def _(x: Sequence[NpArray], a: Attrs) -> NpArray:
    """Inclusive running sum of an i32 vector."""
    return np.cumsum(x[0], dtype=np.int32)


@_op("reduce_sum", "x", lambda t, a: Type(_index_vector(t, a).dtype, (1,)), host=True)
def _(x: Sequence[NpArray], a: Attrs) -> NpArray:
    """Sum of an i32 vector, as a vector of one."""
    return np.sum(x[0], dtype=np.int32).reshape(1).astype(np.int32)


@_op("repeat_each", "x", _repeat_each, host=True, times="int")
def _(x: Sequence[NpArray], a: Attrs) -> NpArray:
    """Every entry of a vector `times` times in a row: (a, b) -> (a, a, b, b)."""
    return np.repeat(x[0], a["times"])


@_op("attention_mask", "query_block key_block key_valid", _mask, host=True)
def _(x: Sequence[NpArray], a: Attrs) -> NpArray:
    """[q, k] is true where key_block[k] <= query_block[q] and key_valid[k]: blockwise causal attention."""
    qb, kb, kv = x
    return (kb[None, :] <= qb[:, None]) & kv[None, :]


@_op("weighted_mask", "mask counts", _weighted_mask, host=True)
def _(x: Sequence[NpArray], a: Attrs) -> NpArray:
    """What attention adds to its logits where key k stands for counts[k] >= 1 equal keys: log(counts[k]) where
    mask[q, k], else -1e30 (proportional attention: Bolya et al. 2022, arXiv 2210.09461)."""
    return _f32(np.where(x[0], np.log(_f64(x[1]))[None], -1e30))


@_op("argmax", "x", _argmax, host=True)
def _(x: Sequence[NpArray], a: Attrs) -> NpArray:
    """Column of the largest entry of every row [N, V] -> i32 [N]; the lowest column where several are equal."""
    return np.asarray(np.argmax(x[0], axis=1), dtype=np.int32)


@_op("pick", "x index", _pick, host=True)
def _(x: Sequence[NpArray], a: Attrs) -> NpArray:
    """The entry x[index] of a vector [N], as a vector of one; index i32[1] lies in 0..N-1."""
    return np.asarray(x[0][x[1]])


# --- layout ----------------------------------------------------------------------------------------------------


@_op("concat", "x*", _concat, host=True, axis="int")
def _(x: Sequence[NpArray], a: Attrs) -> NpArray:
    """Operands joined along `axis`."""
    return np.concatenate(x, axis=a["axis"])


@_op("slice", "x", _slice, host=True, axis="int", start="dim", stop="dim")
def _(x: Sequence[NpArray], a: Attrs) -> NpArray:
    """x[start:stop] along `axis`."""
    return np.asarray(x[0][(slice(None),) * a["axis"] + (slice(a["start"], a["stop"]),)])


@_op("reshape", "x", _reshape, host=True, shape="dims")
def _(x: Sequence[NpArray], a: Attrs) -> NpArray:
    """Same values in row-major order under another shape."""
    return np.reshape(x[0], a["shape"])


@_op("transpose", "x", _transpose, host=True, perm="dims")
def _(x: Sequence[NpArray], a: Attrs) -> NpArray:
    """Axes permuted: result axis i is operand axis perm[i]."""
    return np.ascontiguousarray(np.transpose(x[0], a["perm"]))


@_op("pad", "x", _pad, host=True, size="int")
def _(x: Sequence[NpArray], a: Attrs) -> NpArray:
    """Zeros appended to the last axis until it has `size` entries."""
    return np.pad(x[0], [(0, 0)] * (x[0].ndim - 1) + [(0, a["size"] - x[0].shape[-1])])


@_op("tile", "x", _tile, host=True, rows="dim")
def _(x: Sequence[NpArray], a: Attrs) -> NpArray:
    """A tensor whose first axis is 1, repeated along it `rows` times."""
    return np.repeat(x[0], a["rows"], axis=0)


@_op("write_rows", "x rows start", _write_rows)
def _(x: Sequence[NpArray], a: Attrs) -> NpArray:
    """x [M, W] with `rows` [n, W] in place of its rows start, ..., start+n-1; start i32[1] lies in 0..M-n."""
    result: NpArray = np.array(x[0])
    result[int(x[2][0]) + np.arange(x[1].shape[0])] = x[1]
    return result


@_op("patchify", "pixels", _patchify, host=True, patch="int", block="int")
def _(x: Sequence[NpArray], a: Attrs) -> NpArray:
    """[ch, S, S] image to [(S/patch)^2, ch*patch*patch] patches, columns in (channel, row, column) order.

    Rows are row-major over the patch grid for block=1; else over blocks of block x block patches, row-major inside
    each block, so that a pixel shuffle by `block` of what follows is a reshape.
    """
    c, s, _ = x[0].shape
    p, b = a["patch"], a["block"]
    g = s // p // b
    v = x[0].reshape(c, g, b, p, g, b, p).transpose(1, 4, 2, 5, 0, 3, 6)
    return _f32(v.reshape((g * b) ** 2, c * p * p))


@_op("pixel_shuffle", "x", _shuffle, factor="int")
def _(x: Sequence[NpArray], a: Attrs) -> NpArray:
    """[g*g, C] on a row-major grid to [(g/f)^2, f*f*C]; channel (dy*f + dx)*C + c is cell (dy, dx) of a block."""
    rows, width = x[0].shape
    g, f = math.isqrt(rows), a["factor"]
    v = x[0].reshape(g // f, f, g // f, f, width).transpose(0, 2, 1, 3, 4)
    return _f32(v.reshape((g // f) ** 2, f * f * width))


# --- arithmetic ------------------------------------------------------------------------------------------------


@_op("add", "x y", _broadcast, host=True)
def _(x: Sequence[NpArray], a: Attrs) -> NpArray:
    """x + y; y is broadcast into x's shape."""
    return (x[0] + x[1]).astype(x[0].dtype)


@_op("sub", "x y", _broadcast, host=True)
def _(x: Sequence[NpArray], a: Attrs) -> NpArray:
    """x - y; y is broadcast into x's shape."""
    return (x[0] - x[1]).astype(x[0].dtype)


@_op("mul", "x y", _broadcast, host=True)
def _(x: Sequence[NpArray], a: Attrs) -> NpArray:
    """x * y; y is broadcast into x's shape."""
    return (x[0] * x[1]).astype(x[0].dtype)


@_op("scale", "x", _float_same, factor="float")
def _(x: Sequence[NpArray], a: Attrs) -> NpArray:
    """x * factor, the factor rounded to float32 first."""
    return _f32(x[0] * np.float32(a["factor"]))


@_op("linear", "x weight bias?", _linear)
def _(x: Sequence[NpArray], a: Attrs) -> NpArray:
    """x @ weight.T + bias; x [M, K], weight [N, K], bias [N]."""
    y = _f64(x[0]) @ _f64(x[1]).T
    return _f32(y + _f64(x[2]) if len(x) > 2 else y)


@_op("embed", "ids table", _embed)
def _(x: Sequence[NpArray], a: Attrs) -> NpArray:
    """Rows of `table` [V, D] picked by i32 ids [N]; ids outside 0..V-1 are an error before any engine runs."""
    return _f32(x[1][x[0]])


@_op("layer_norm", "x weight? bias?", _norm, eps="float")
def _(x: Sequence[NpArray], a: Attrs) -> NpArray:
    """(x - mean) / sqrt(var + eps) * weight + bias over the last axis, biased variance."""
    v = _f64(x[0])
    v = v - v.mean(-1, keepdims=True)
    v = v / np.sqrt((v * v).mean(-1, keepdims=True) + a["eps"])
    for i, fn in ((1, np.multiply), (2, np.add)):
        v = fn(v, _f64(x[i])) if len(x) > i else v
    return _f32(v)


@_op("rms_norm", "x weight?", _norm, eps="float")
def _(x: Sequence[NpArray], a: Attrs) -> NpArray:
    """x / sqrt(mean(x^2) + eps) * weight over the last axis (Zhang and Sennrich 2019); Gemma's 1+w is in weight."""
    v = _f64(x[0])
    v = v / np.sqrt((v * v).mean(-1, keepdims=True) + a["eps"])
    return _f32(v * _f64(x[1]) if len(x) > 1 else v)


@_op("silu", "x", _float_same)
def _(x: Sequence[NpArray], a: Attrs) -> NpArray:
    """x * sigmoid(x)."""
    v = _f64(x[0])
    return _f32(v * _sigmoid(v))


@_op("sigmoid", "x", _float_same)
def _(x: Sequence[NpArray], a: Attrs) -> NpArray:
    """1 / (1 + exp(-x))."""
    return _f32(_sigmoid(_f64(x[0])))


@_op("round_int8", "x", _round8, form="str", largest="float")
def _(x: Sequence[NpArray], a: Attrs) -> NpArray:
    """x on a grid of 8 bits: s * clip(rint(x / s), -128, 127), s = m/127. m is the largest magnitude of the row (form
    "token"), of each 32 values of a row in order ("block32", the last block as long as it is), or `largest` ("tensor",
    the only one whose values reach -128: QuantizeLinear of ONNX and TensorRT).
    """
    v = _f64(x[0])
    if a["form"] == "tensor":
        s = np.float64(a["largest"]) / 127
        return _f32(np.clip(np.rint(v / s), -128, 127) * s)
    rows, width = v.shape
    block = 32 if a["form"] == "block32" else width
    parts = np.pad(v, ((0, 0), (0, -width % block))).reshape(rows, -1, block)
    s = np.maximum(np.abs(parts).max(axis=2, keepdims=True), 1e-30) / 127
    return _f32((np.rint(parts / s) * s).reshape(rows, -1)[:, :width])


@_op("round_f16", "x", _float_same)
def _(x: Sequence[NpArray], a: Attrs) -> NpArray:
    """x on the grid of float16: nearest, ties to even, infinite from 65520 on."""
    with np.errstate(over="ignore"):
        return _f32(x[0].astype(np.float16))


@_op("round_fp8", "x", _round_fp8, largest="float")
def _(x: Sequence[NpArray], a: Attrs) -> NpArray:
    """x on a grid of float8 E4M3: s * e4m3(x / s), s = largest/448; nearest, ties to even, cut at `largest`."""
    s = np.float64(a["largest"]) / float8.LARGEST
    return _f32(float8.round_e4m3(_f64(x[0]) / s) * s)


@_op("tanh", "x", _float_same)
def _(x: Sequence[NpArray], a: Attrs) -> NpArray:
    """tanh(x)."""
    return _f32(np.tanh(_f64(x[0])))


@_op("relu", "x", _float_same)
def _(x: Sequence[NpArray], a: Attrs) -> NpArray:
    """max(x, 0)."""
    return _f32(np.maximum(x[0], 0))


@_op("gelu", "x", _gelu, approximate="str")
def _(x: Sequence[NpArray], a: Attrs) -> NpArray:
    """GELU (Hendrycks and Gimpel 2016). approximate="tanh": 0.5x(1+tanh(sqrt(2/pi)(x+0.044715x^3))); "none": erf;
    "quick": x*sigmoid(1.702x)."""
    v = _f64(x[0])
    if a["approximate"] == "tanh":
        return _f32(v * _sigmoid(2 * math.sqrt(2 / math.pi) * (v + 0.044715 * v**3)))
    if a["approximate"] == "quick":
        return _f32(v * _sigmoid(1.702 * v))
    erf = np.vectorize(math.erf, otypes=[np.float64])
    return _f32(0.5 * v * (1 + erf(v / math.sqrt(2))))


def _sigmoid(v: NpArray) -> NpArray:
    e = np.exp(-np.abs(v))
    return np.asarray(np.where(v >= 0, 1 / (1 + e), e / (1 + e)))


@_op("softmax", "x", _float_same)
def _(x: Sequence[NpArray], a: Attrs) -> NpArray:
    """Softmax over the last axis."""
    v = _f64(x[0])
    e = np.exp(v - v.max(-1, keepdims=True))
    return _f32(e / e.sum(-1, keepdims=True))


@_op("attention", "q k v mask?", _attention, heads="int", kv_heads="int", scale="float")
def _(x: Sequence[NpArray], a: Attrs) -> NpArray:
    """softmax(q k^T * scale, masked) v per head, heads concatenated.

    q [Nq, H*d], k [Nk, G*d], v [Nk, G*e], heads side by side in the columns; query head h reads kv head h // (H/G).
    mask [Nq, Nk] bool, true = attend; or f32, added to the logits (weighted_mask). A row with no true entry gives some
    finite value that nobody may read.
    """
    h, g = a["heads"], a["kv_heads"]
    q, k, v = (_f64(t) for t in x[:3])
    q = q.reshape(q.shape[0], h, -1).transpose(1, 0, 2)
    k = np.repeat(k.reshape(k.shape[0], g, -1).transpose(1, 0, 2), h // g, axis=0)
    v = np.repeat(v.reshape(v.shape[0], g, -1).transpose(1, 0, 2), h // g, axis=0)
    s = q @ k.transpose(0, 2, 1) * a["scale"]
    if len(x) > 3:
        s = np.where(x[3][None], s, -1e30) if x[3].dtype == np.bool_ else s + x[3][None]
    e = np.exp(s - s.max(-1, keepdims=True))
    y = (e / e.sum(-1, keepdims=True)) @ v
    return _f32(y.transpose(1, 0, 2).reshape(y.shape[1], -1))


@_op("rope", "x positions", _rope, head_dim="int", base="float")
def _(x: Sequence[NpArray], a: Attrs) -> NpArray:
    """Rotary position embedding (Su et al. 2021), half-split ("NeoX") form, on every head of x [N, H*d].

    Angle j < d/2 is positions[n] / base^(2j/d); (x1, x2) = halves of a head; result (x1 cos - x2 sin, x2 cos + x1 sin).
    """
    d = a["head_dim"]
    angle = _f64(x[1])[:, None] / float(a["base"]) ** (np.arange(0, d, 2) / d)
    cos, sin = np.cos(angle)[:, None, :], np.sin(angle)[:, None, :]
    v = _f64(x[0]).reshape(x[0].shape[0], -1, 2, d // 2)
    x1, x2 = v[:, :, 0], v[:, :, 1]
    return _f32(np.stack([x1 * cos - x2 * sin, x2 * cos + x1 * sin], axis=2).reshape(x[0].shape))


@_op("column_mean", "x valid?", _column_mean, host=True)
def _(x: Sequence[NpArray], a: Attrs) -> NpArray:
    """Mean over the rows of x [N, W] that `valid` [N] marks (all without it): [1, W]; zeros where none is."""
    return kv_codes.column_mean(x[0], x[1] if len(x) > 1 else None)


@_op("pack_codes", "x mean?", _pack, host=True, bits="int", head_dim="int", seed="int", scale="str", form="str")
def _(x: Sequence[NpArray], a: Attrs) -> NpArray:
    """Every head of every row of x - mean [N, G*d] as codes of `bits` bits and scales: i32 [N, G*words].

    The head times R(d, seed) (vlac.rotations; seed -1: as it is), over its norm / sqrt(d): y. Code: the nearest level
    of the Lloyd-Max table for d and bits, looked up in cells; q are the levels. Scale: "norm" |x|/|q|, "least_squares"
    |x| <q,y> / (sqrt(d) <q,q>), "raw" |x|/sqrt(d). form "groups": q times the factor, of 16, that suits each group of
    entries best; "head": no factors; "inner": one bit less, and the signs of another rotation of what is left. Words:
    see vlac.kv_codes. Computed in float64 by engines that can, so that they give the same codes.
    """
    mean = x[1] if len(x) > 1 else None
    return kv_codes.encode(x[0], mean, a["bits"], a["head_dim"], a["seed"], a["scale"], a["form"])


@_op("unpack_codes", "codes mean?", _unpack, host=True, bits="int", head_dim="int", seed="int", form="str")
def _(x: Sequence[NpArray], a: Attrs) -> NpArray:
    """What pack_codes stands for: (scale * factors * levels) R(d, seed)^T + mean, f32 [N, G*d]."""
    mean = x[1] if len(x) > 1 else None
    return kv_codes.decode(x[0], mean, a["bits"], a["head_dim"], a["seed"], a["form"])


@_op("time_embedding", "t", _time, host=True, dim="int", min_period="float", max_period="float")
def _(x: Sequence[NpArray], a: Attrs) -> NpArray:
    """Sinusoids of t [N, 1]: concat(sin, cos) of 2*pi*t/period, period = min*(max/min)^(i/(dim/2-1)), in float64."""
    fraction = np.linspace(0.0, 1.0, a["dim"] // 2)
    period = a["min_period"] * (a["max_period"] / a["min_period"]) ** fraction
    angle = (2 * math.pi / period)[None, :] * _f64(x[0])
    return _f32(np.concatenate([np.sin(angle), np.cos(angle)], axis=1))
