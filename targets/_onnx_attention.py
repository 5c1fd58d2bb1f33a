"""Long unmasked attention for ONNX Runtime, as one op in floats, or on integers: uint8 queries and probabilities, int8
keys and values.

In floats MultiHeadAttention works block by block and never writes the scores of a layer (48 MB for 12 heads of 1024
rows) to memory: 9 % less time than its three parts. On integers it is one head at a time, so that its scores (4 MB)
stay in the cache. All scales are taken while running, the finest that cost nothing: queries one per head, keys and
probabilities one per row, values one per channel.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from vlac.graph import Node
from vlac.ops import Type
from vlac.targets._onnx_graph import MICROSOFT

if TYPE_CHECKING:
    from vlac.targets._onnx_emitter import StageEmitter

LEAST_ROWS = 256
"""Queries and keys from which it pays: integers, quantising included; in floats, scores that leave the cache."""
TINY = 1e-30


def long_attention(n: Node, types: Mapping[str, Type]) -> bool:
    """Whether this node can be written in these ways: long, as many key heads as query heads, every key visible."""
    if n.op != "attention" or len(n.inputs) != 3 or n.attr["heads"] != n.attr["kv_heads"]:
        return False
    rows = [types[i].shape[0] for i in n.inputs[:2]]
    return all(isinstance(r, int) and r >= LEAST_ROWS for r in rows)


def emit_fused_attention(e: StageEmitter, n: Node, out: str) -> None:
    """Softmax(q k^T scale) v as com.microsoft MultiHeadAttention, which keeps the layout [rows, heads * d]."""
    rows = [e.reshape(e(i), e.tmp(out, c), 1, *e.shape(i)) for i, c in zip(n.inputs, "qkv", strict=True)]
    attrs = {"num_heads": n.attr["heads"], "scale": float(n.attr["scale"])}
    y = e.graph.node("MultiHeadAttention", rows, e.tmp(out, "y3"), domain=MICROSOFT, **attrs)
    e.reshape(y, out, e.shape(n.inputs[0])[0], e.shape(n.inputs[2])[1])


@dataclass(frozen=True)
class _Head:
    """Names in the graph of codes (q uint8 around 128, k and v int8, [rows, d]) with their scales (of queries one, of
    keys one or [keys], of values [d])."""

    q: tuple[str, str]
    k: tuple[str, str]
    v: tuple[str, str]
    queries: int


def emit_integer_attention(e: StageEmitter, n: Node, out: str) -> None:
    """Softmax(q k^T scale) v, each product in integers. Scales that the program fixes are constants."""
    heads = n.attr["heads"]
    (queries, _), (keys, _) = (e.shape(i) for i in n.inputs[:2])
    v8, v_scale = _integer_channels(e, n.inputs[2])
    q, k = _queries(e, n.inputs[0], heads, out), _keys(e, n.inputs[1], heads, keys, out)
    v = zip(_split(e, v8, heads, 1, e.tmp(out, "v")), _split(e, v_scale, heads, 0, e.tmp(out, "v/scales")), strict=True)
    parts = [_Head(*x, queries) for x in zip(q, k, v, strict=True)]
    e.node("Concat", [_head(e, p, n.attr["scale"], f"{out}/{h}") for h, p in enumerate(parts)], out, axis=1)


def _queries(e: StageEmitter, operand: str, heads: int, out: str) -> list[tuple[str, str]]:
    """uint8 queries and their scale, for each head."""
    zero = e.graph.const(128, np.uint8)
    if known := e.fixed(operand):
        return _fixed(e, known, zero, heads, e.tmp(out, "q"))
    parts = _split(e, e(operand), heads, 1, e.tmp(out, "q"))
    scales = [_scale(e, x) for x in parts]
    codes = [e.node("QuantizeLinear", [x, s, zero], e.tmp(x, "u8")) for x, s in zip(parts, scales, strict=True)]
    return list(zip(codes, scales, strict=True))


def _keys(e: StageEmitter, operand: str, heads: int, keys: int, out: str) -> list[tuple[str, str]]:
    """int8 keys and their scales, one for each row unless they are fixed, for each head."""
    if known := e.fixed(operand):
        return _fixed(e, known, e.graph.const(0, np.int8), heads, e.tmp(out, "k"))
    zeros = e.graph.const(np.zeros(keys, np.int8))
    parts = _split(e, e(operand), heads, 1, e.tmp(out, "k"))
    scales = [_scale(e, x, 1) for x in parts]
    pairs = zip(parts, scales, strict=True)
    return [(e.node("QuantizeLinear", [x, s, zeros], e.tmp(x, "s8"), axis=0), s) for x, s in pairs]


def _fixed(e: StageEmitter, known: Node, zero: str, heads: int, name: str) -> list[tuple[str, str]]:
    scale = e.f32(known.attr["largest"] / 127)
    codes = e.node("QuantizeLinear", [e(known.inputs[0]), scale, zero], e.tmp(name, "codes"))
    return [(part, scale) for part in _split(e, codes, heads, 1, name)]


def _split(e: StageEmitter, x: str, parts: int, axis: int, name: str) -> list[str]:
    outs = [e.graph.unique(f"{name}/{h}") for h in range(parts)]
    e.graph.node("Split", [x], outs, axis=axis, num_outputs=parts)
    return outs


def _integer_channels(e: StageEmitter, x: str) -> tuple[str, str]:
    """int8 [rows, width] of a value and its scales [width]; QuantizeLinear along axis 1 itself is scalar code."""
    name = e(x)
    scale = _scale(e, name, 0)
    even = e.node("Div", [name, scale], e.tmp(name, "even"))
    zero = e.graph.const(0, np.int8)
    return e.node("QuantizeLinear", [even, e.f32(1.0), zero], e.tmp(name, "s8")), scale


def _head(e: StageEmitter, x: _Head, scale: float, out: str) -> str:
    (q, q_scale), (k, k_scale), (v, v_scale) = x.q, x.k, x.v
    if scale != 1.0:
        q_scale = e.node("Mul", [q_scale, e.f32(scale)], e.tmp(q, "scaled"))
    scores = _product(e, q, e.transpose(k, e.tmp(k, "T"), 1, 0), q_scale, k_scale, 128, e.tmp(out, "scores"))
    p = e.node("Softmax", [scores], e.tmp(out, "p"), axis=-1)
    # one scale for all rows would round the weights of rows that attend to everything to nothing
    most = e.node("ReduceMax", [p, e.i64(1)], e.tmp(p, "max"), keepdims=0)
    p_scale = e.node("Mul", [most, e.f32(1 / 255)], e.tmp(p, "scale"))
    zeros = e.graph.const(np.zeros(x.queries, np.uint8))
    p8 = e.node("QuantizeLinear", [p, p_scale, zeros], e.tmp(p, "u8"), axis=0)
    y = _product(e, p8, v, e.f32(1.0), v_scale, 0, e.tmp(out, "y"))
    return e.node("Mul", [y, e.reshape(p_scale, e.tmp(p, "scales"), x.queries, 1)], e.graph.unique(out))


def _product(e: StageEmitter, a: str, b: str, a_scale: str, b_scale: str, zero: int, out: str) -> str:
    inputs = [a, b, a_scale, b_scale, e.graph.const(zero, np.uint8)]
    return e.graph.node("MatMulIntegerToFloat", inputs, out, domain=MICROSOFT)


def _scale(e: StageEmitter, x: str, *axes: int) -> str:
    """absmax / 127 over these axes (of all values without), never zero."""
    over = [e.i64(*axes)] if axes else []
    most, least = (e.node(f"Reduce{m}", [x, *over], e.tmp(x, m.lower()), keepdims=0) for m in ("Max", "Min"))
    absmax = e.node("Max", [most, e.node("Neg", [least], e.tmp(x, "neg")), e.f32(TINY)], e.tmp(x, "absmax"))
    return e.node("Mul", [absmax, e.f32(1 / 127)], e.tmp(x, "scale"))


LONG_ATTENTION = {
    "integer": emit_integer_attention,
    "linears": emit_fused_attention,
    "fused": emit_fused_attention,
}
"""Form of the graph -> how it writes long attention; other forms decompose it."""
