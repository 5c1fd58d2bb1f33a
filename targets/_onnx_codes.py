"""Packed keys and values as ONNX nodes: column_mean, pack_codes and unpack_codes (vlac.kv_codes tells the format).

In float32 where the references use float64: one code in many thousands may land on the other side of a threshold.
Words are int32 in two's complement, taken apart and put together with Mod, Div and Mul: no engine lacks these, while
unsigned shifts are missing in some.
"""

from __future__ import annotations

import math
from typing import Union

import numpy as np

from vlac import kv_codes
from vlac.artifact import NpArray
from vlac.graph import Node
from vlac.rotations import rotation
from vlac.targets._onnx_emitter import StageEmitter, emits

NpConst = Union[NpArray, np.generic]


class _Draw:
    """Shorthand: `d("Add", x, y)` adds a node with a name of its own; numbers and arrays become constants."""

    def __init__(self, e: StageEmitter, out: str) -> None:
        self.e, self.out = e, out

    def __call__(self, op: str, *inputs: str | NpConst, as_: str = "", **attrs: object) -> str:
        name = as_ or self.e.tmp(self.out, op.lower())
        return self.e.node(op, [i if isinstance(i, str) else self.e.graph.const(i) for i in inputs], name, **attrs)

    def reshape(self, x: str, *shape: int) -> str:
        return self.e.reshape(x, self.e.tmp(self.out, "shaped"), *shape)

    def cast(self, x: str, dtype: str) -> str:
        return self.e.cast(x, self.e.tmp(self.out, dtype), dtype)

    def total(self, x: str, op: str = "ReduceSum", keep: int = 1) -> str:
        """Over the last axis."""
        return self(op, x, np.array([-1], np.int64), keepdims=keep)

    def join(self, fields: str, shape: tuple[int, ...], width: int) -> str:
        """i32 fields of `width` bits [..., m] -> words [..., ceil(m * width / 32)]."""
        per, (*rest, m) = 32 // width, shape
        if m % per:
            fields = self("Concat", fields, np.zeros((*rest, -m % per), np.int32), axis=-1)
        parts = self.reshape(fields, *rest, -(-m // per), per)
        # the highest field carries the word's sign
        limit = np.array([1 << 30] * (per - 1) + [1 << (width - 1)], np.int32)
        negative = self.cast(self("GreaterOrEqual", parts, limit), "i32")
        signed = self("Sub", parts, self("Mul", negative, np.int32(1 << width)))
        return self.total(self("Mul", signed, _powers(width)), keep=0)

    def split(self, words: str, shape: tuple[int, ...], width: int, count: int) -> str:
        """Words [..., k] -> their first `count` fields, i32 [..., count]."""
        *rest, k = shape
        column = self.reshape(words, *rest, k, 1)
        powers = _powers(width)[: 31 if width == 1 else None]
        above = self("Div", self("Sub", column, self("Mod", column, powers, fmod=0)), powers)
        fields = self("Mod", above, np.int32(1 << width), fmod=0)
        if width == 1:
            fields = self("Concat", fields, self.cast(self("Less", column, np.int32(0)), "i32"), axis=-1)
        return self.cut(self.reshape(fields, *rest, k * (32 // width)), 0, count)

    def cut(self, x: str, start: int, stop: int) -> str:
        return self("Slice", x, np.array([start]), np.array([stop]), np.array([-1]))

    def quantise(self, y: str, bits: int, d: int) -> str:
        top = float(kv_codes.levels(bits, d)[-1])
        cell = self("Mul", self("Add", self("Div", y, np.float32(top)), np.float32(1)), np.float32(kv_codes.CELLS / 2))
        cell = self("Clip", cell, np.float32(0), np.float32(kv_codes.CELLS - 1))
        return self("Gather", kv_codes.nearest(bits, d).astype(np.int32), self.cast(cell, "i32"))

    def levels(self, codes: str, bits: int, d: int) -> str:
        return self("Gather", kv_codes.levels(bits, d).astype(np.float32), codes)

    def log_scale(self, s: str) -> str:
        c = self("Round", self("Mul", self("Log", s), np.float32(kv_codes.STEPS / math.log(2))))
        c = self("Clip", self("Add", c, np.float32(kv_codes.ZERO)), np.float32(1), np.float32(65535))
        return self.cast(self("Where", self("Greater", s, np.float32(0)), c, np.float32(0)), "i32")

    def nibbles(self, c: str) -> str:
        """16-bit numbers [..., 1] -> [..., 4]."""
        return self("Mod", self("Div", c, _powers(4)[:4]), np.int32(16), fmod=0)

    def from_log(self, nibbles: str) -> str:
        """[..., 4] -> scales [..., 1]."""
        c = self.total(self("Mul", nibbles, _powers(4)[:4]))
        high, low = self("Div", c, np.int32(kv_codes.STEPS)), self("Mod", c, np.int32(kv_codes.STEPS), fmod=0)
        octave = np.exp2(np.arange(64.0) - kv_codes.ZERO / kv_codes.STEPS).astype(np.float32)
        octave = self("Gather", octave, high)
        part = self("Gather", np.exp2(np.arange(kv_codes.STEPS) / kv_codes.STEPS).astype(np.float32), low)
        there = self.cast(self("Greater", c, np.int32(0)), "f32")
        return self("Mul", self("Mul", octave, part), there)


def _powers(width: int) -> NpArray:
    """2^(width * i) of the fields of a word, the last of 1-bit fields as the int32 it overflows to."""
    return (1 << (width * np.arange(32 // width, dtype=np.int64))).astype(np.int32)


@emits("column_mean")
def _(e: StageEmitter, n: Node, out: str) -> None:
    d, x = _Draw(e, out), e(n.inputs[0])
    rows = e.shape(n.inputs[0])[0]
    if len(n.inputs) == 1:
        d("Div", d("ReduceSum", x, np.array([0]), keepdims=1), np.float32(rows), as_=out)
        return
    valid = d.reshape(d.cast(e(n.inputs[1]), "f32"), rows, 1)
    count = d("Max", d("ReduceSum", valid, np.array([0]), keepdims=1), np.float32(1))
    d(
        "Div",
        d("ReduceSum", d("Where", d("Greater", valid, np.float32(0)), x, np.float32(0)), np.array([0])),
        count,
        as_=out,
    )


@emits("pack_codes")
def _(e: StageEmitter, n: Node, out: str) -> None:
    d, a = _Draw(e, out), n.attr
    (rows, width), size, bits, form = e.shape(n.inputs[0]), a["head_dim"], a["bits"], a["form"]
    heads, count = width // size, kv_codes.groups(size)
    x = e(n.inputs[0]) if len(n.inputs) == 1 else d("Sub", e(n.inputs[0]), e(n.inputs[1]))
    v = d.reshape(x, rows, heads, size)
    if a["seed"] >= 0:
        v = d("MatMul", v, rotation(size, a["seed"]).astype(np.float32))
    norm = d("Sqrt", d.total(v, "ReduceSumSquare"))
    y = d("Div", d("Mul", v, np.float32(math.sqrt(size))), d("Max", norm, np.float32(1e-30)))
    coarse = bits - (form == "inner")
    tail = []
    if form == "groups":
        parts = d.reshape(y, rows, heads, count, size // count)
        ratios = kv_codes.RATIOS.astype(np.float32)
        every = ratios.reshape(16, 1, 1, 1, 1)
        tried = d("Mul", d.levels(d.quantise(d("Div", parts, every), bits, size), bits, size), every)
        error = d.total(d("Sub", tried, parts), "ReduceSumSquare", keep=0)
        best = d("ArgMin", error, axis=0, keepdims=0, select_last_index=0)
        factor = d.reshape(d("Gather", ratios, best), rows, heads, count, 1)
        codes = d.quantise(d("Div", parts, factor), bits, size)
        q = d.reshape(d("Mul", d.levels(codes, bits, size), factor), rows, heads, size)
        codes = d.reshape(codes, rows, heads, size)
        tail = [d.cast(best, "i32")]
    else:
        codes = d.quantise(y, coarse, size)
        q = d.levels(codes, coarse, size)
    square = d.total(q, "ReduceSumSquare")
    if a["scale"] == "norm":
        s = d("Div", norm, d("Sqrt", square))
    elif a["scale"] == "least_squares":
        s = d("Mul", norm, d("Div", d.total(d("Mul", q, y)), d("Mul", square, np.float32(math.sqrt(size)))))
    else:
        s = d("Div", norm, np.float32(math.sqrt(size)))
    logs = [d.nibbles(d.log_scale(s))]
    words, shift = [], 0
    for bits_here in kv_codes.planes(coarse, "head"):
        plane = d("Mod", d("Div", codes, np.int32(1 << shift)), np.int32(1 << bits_here), fmod=0)
        words.append(d.join(plane, (rows, heads, size), bits_here))
        shift += bits_here
    if form == "inner":
        rest = d("Sub", v, d("Mul", d.from_log(logs[0]), q))
        logs.append(d.nibbles(d.log_scale(d("Sqrt", d.total(rest, "ReduceSumSquare")))))
        turned = d("MatMul", rest, rotation(size, abs(a["seed"]) + kv_codes.SIGNS).astype(np.float32))
        signs = d.cast(d("GreaterOrEqual", turned, np.float32(0)), "i32")
        words.append(d.join(signs, (rows, heads, size), 1))
    both = d("Concat", *logs, *tail, axis=-1) if len(logs) + len(tail) > 1 else logs[0]
    words.append(d.join(both, (rows, heads, kv_codes.nibbles(size, form)), 4))
    e.reshape(d("Concat", *words, axis=-1), out, rows, heads * kv_codes.words(bits, size, form))


@emits("unpack_codes")
def _(e: StageEmitter, n: Node, out: str) -> None:
    d, a = _Draw(e, out), n.attr
    size, bits, form = a["head_dim"], a["bits"], a["form"]
    per, (rows, width) = kv_codes.words(bits, size, form), e.shape(n.inputs[0])
    heads, count = width // per, kv_codes.groups(size)
    words = d.reshape(e(n.inputs[0]), rows, heads, per)
    at, planes = 0, []
    for width_here in kv_codes.planes(bits, form):
        k = -(-size * width_here // 32)
        planes.append(d.split(d.cut(words, at, at + k), (rows, heads, k), width_here, size))
        at += k
    tail = d.split(d.cut(words, at, per), (rows, heads, per - at), 4, kv_codes.nibbles(size, form))
    signs = planes.pop() if form == "inner" else ""
    value, coarse = planes[0], bits - (form == "inner")
    if len(planes) > 1:
        low = kv_codes.planes(coarse, "head")[0]
        value = d("Add", value, d("Mul", planes[1], np.int32(1 << low)))
    x = d("Mul", d.levels(value, coarse, size), d.from_log(d.cut(tail, 0, 4)))
    if form == "inner":
        back = rotation(size, abs(a["seed"]) + kv_codes.SIGNS).T.astype(np.float32)
        both = d("Sub", d("Mul", d.cast(signs, "f32"), np.float32(2)), np.float32(1))
        step = d("Mul", d.from_log(d.cut(tail, 4, 8)), np.float32(math.sqrt(math.pi / (2 * size))))
        x = d("Add", x, d("Mul", d("MatMul", both, back), step))
    if form == "groups":
        factor = d("Gather", kv_codes.RATIOS.astype(np.float32), d.cut(tail, 4, 4 + count))
        factor = d.reshape(factor, rows, heads, count, 1)
        x = d.reshape(d("Mul", d.reshape(x, rows, heads, count, size // count), factor), rows, heads, size)
    if a["seed"] >= 0:
        x = d("MatMul", x, rotation(size, a["seed"]).T.astype(np.float32))
    if len(n.inputs) > 1:
        d("Add", d.reshape(x, rows, heads * size), e(n.inputs[1]), as_=out)
    else:
        e.reshape(x, out, rows, heads * size)
