"""Shape rules of the table of ops (vlac/ops.py): operand types and attributes to the result's type, or ProgramError."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Union

import numpy as np

from vlac import kv_codes
from vlac.dims import Affine, Dim, product
from vlac.errors import ProgramError

Attr = Union[int, float, str, Affine, tuple["Attr", ...]]
Attrs = Mapping[str, Any]
NpArray = np.ndarray[Any, Any]

DTYPES = {"f32": np.float32, "i32": np.int32, "bool": np.bool_}


@dataclass(frozen=True)
class Type:
    """dtype ("f32", "i32", "bool") and shape of a value; shape entries may hold symbols."""

    dtype: str
    shape: tuple[Dim, ...]

    def __str__(self) -> str:
        return f"{self.dtype}[{','.join(str(d) for d in self.shape)}]"


def _need(condition: bool, message: str) -> None:
    if not condition:
        raise ProgramError(message)


def _numbers(t: Type, dims: Sequence[Dim]) -> list[int]:
    """Dimensions that must not hold symbols."""
    numbers = [d for d in dims if isinstance(d, int)]
    _need(len(numbers) == len(dims), f"{t} has a symbolic dimension here")
    return numbers


def _float_same(t: Sequence[Type], a: Attrs) -> Type:
    _need(t[0].dtype == "f32", f"wants f32, got {t[0]}")
    return t[0]


def _broadcast(t: Sequence[Type], a: Attrs) -> Type:
    """The second operand is repeated into the first: equal dtype, each trailing dimension equal or 1."""
    x, y = t
    _need(x.dtype == y.dtype and x.dtype != "bool", f"dtypes {x.dtype} and {y.dtype}")
    _need(len(y.shape) <= len(x.shape), f"{y} does not broadcast into {x}")
    for dx, dy in zip(reversed(x.shape), reversed(y.shape), strict=False):
        _need(dy in (dx, 1), f"{y} does not broadcast into {x}")
    return x


def _linear(t: Sequence[Type], a: Attrs) -> Type:
    x, w = t[0], t[1]
    _need(x.dtype == "f32" and len(x.shape) == 2 and len(w.shape) == 2, f"linear({x}, {w})")
    _need(x.shape[1] == w.shape[1], f"linear: x has {x.shape[1]} features, weight {w} wants {w.shape[1]}")
    if len(t) > 2:
        _need(t[2].shape == (w.shape[0],), f"linear: bias {t[2]} for weight {w}")
    return Type("f32", (x.shape[0], w.shape[0]))


def _norm(t: Sequence[Type], a: Attrs) -> Type:
    x = t[0]
    _need(x.dtype == "f32" and len(x.shape) == 2, f"norm of {x}")
    for w in t[1:]:
        _need(w.shape == (x.shape[1],), f"norm: parameter {w} for {x}")
    return x


def _embed(t: Sequence[Type], a: Attrs) -> Type:
    ids, table = t
    _need(ids.dtype == "i32" and len(ids.shape) == 1 and len(table.shape) == 2, f"embed({ids}, {table})")
    return Type("f32", (ids.shape[0], table.shape[1]))


def _attention(t: Sequence[Type], a: Attrs) -> Type:
    q, k, v = t[:3]
    h, g = a["heads"], a["kv_heads"]
    _need(all(len(x.shape) == 2 and x.dtype == "f32" for x in (q, k, v)), f"attention({q}, {k}, {v})")
    qw, kw, vw = q.shape[1], k.shape[1], v.shape[1]
    _need(h > 0 and g > 0 and h % g == 0, f"attention: {h} heads on {g} kv heads")
    _need(isinstance(qw, int) and isinstance(kw, int) and isinstance(vw, int), "attention: symbolic width")
    assert isinstance(qw, int) and isinstance(kw, int) and isinstance(vw, int)
    _need(qw % h == 0 and kw % g == 0 and vw % g == 0 and qw // h == kw // g, f"attention: widths {qw}, {kw}")
    _need(k.shape[0] == v.shape[0], f"attention: {k.shape[0]} keys, {v.shape[0]} values")
    if len(t) > 3:
        known = [Type(kind, (q.shape[0], k.shape[0])) for kind in ("bool", "f32")]
        _need(t[3] in known, f"attention: mask {t[3]} for {q}, {k}")
    return Type("f32", (q.shape[0], vw // g * h))


def _rope(t: Sequence[Type], a: Attrs) -> Type:
    x, pos = t
    _need(x.dtype == "f32" and len(x.shape) == 2 and pos == Type("i32", (x.shape[0],)), f"rope({x}, {pos})")
    d = a["head_dim"]
    w = x.shape[1]
    _need(isinstance(w, int) and d > 0 and d % 2 == 0 and w % d == 0, f"rope: width {w}, head_dim {d}")
    return x


def _mask(t: Sequence[Type], a: Attrs) -> Type:
    qb, kb, kv = t
    _need(qb.dtype == "i32" and kb.dtype == "i32" and kv.dtype == "bool", f"attention_mask({qb}, {kb}, {kv})")
    _need(kb.shape == kv.shape and len(kb.shape) == 1 == len(qb.shape), f"attention_mask({qb}, {kb}, {kv})")
    return Type("bool", (qb.shape[0], kb.shape[0]))


def _weighted_mask(t: Sequence[Type], a: Attrs) -> Type:
    mask, counts = t
    _need(mask.dtype == "bool" and len(mask.shape) == 2, f"weighted_mask of {mask}")
    _need(counts == Type("i32", mask.shape[1:]), f"weighted_mask: counts {counts} for {mask}")
    return Type("f32", mask.shape)


def _concat(t: Sequence[Type], a: Attrs) -> Type:
    axis = a["axis"]
    first = t[0]
    _need(0 <= axis < len(first.shape), f"concat along {axis} of {first}")
    total: Dim = 0
    for x in t:
        rest = [d for i, d in enumerate(x.shape) if i != axis]
        want = [d for i, d in enumerate(first.shape) if i != axis]
        _need(
            x.dtype == first.dtype and len(x.shape) == len(first.shape) and rest == want,
            f"concat of {first} and {x} along {axis}",
        )
        total = x.shape[axis] + total
    return Type(first.dtype, (*first.shape[:axis], total, *first.shape[axis + 1 :]))


def _slice(t: Sequence[Type], a: Attrs) -> Type:
    x, axis, start, stop = t[0], a["axis"], a["start"], a["stop"]
    _need(0 <= axis < len(x.shape), f"slice along {axis} of {x}")
    size, extent = stop - start, x.shape[axis]
    if all(isinstance(v, int) for v in (start, stop, extent)):
        _need(0 <= start < stop <= extent, f"slice [{start}:{stop}] of {x}")
    return Type(x.dtype, (*x.shape[:axis], size, *x.shape[axis + 1 :]))


def _reshape(t: Sequence[Type], a: Attrs) -> Type:
    shape = tuple(a["shape"])
    _need(product(t[0].shape) == product(shape), f"reshape of {t[0]} to {shape}")
    return Type(t[0].dtype, shape)


def _transpose(t: Sequence[Type], a: Attrs) -> Type:
    perm = a["perm"]
    axes = range(len(t[0].shape))
    _need(len(perm) == len(axes) and all(axis in perm for axis in axes), f"transpose of {t[0]} by {perm}")
    return Type(t[0].dtype, tuple(t[0].shape[p] for p in perm))


def _pad(t: Sequence[Type], a: Attrs) -> Type:
    x, size = t[0], a["size"]
    last = x.shape[-1] if x.shape else None
    _need(isinstance(last, int) and size >= last, f"pad of {x} to {size}")
    return Type(x.dtype, (*x.shape[:-1], size))


def _tile(t: Sequence[Type], a: Attrs) -> Type:
    x = t[0]
    _need(len(x.shape) >= 1 and x.shape[0] == 1, f"tile wants one row, got {x}")
    return Type(x.dtype, (a["rows"], *x.shape[1:]))


def _patchify(t: Sequence[Type], a: Attrs) -> Type:
    x, p, b = t[0], a["patch"], a["block"]
    _need(x.dtype == "f32" and len(x.shape) == 3 and x.shape[1] == x.shape[2], f"patchify of {x}")
    c, s = _numbers(x, x.shape[:2])
    _need(p > 0 and b > 0 and s % p == 0 and (s // p) % b == 0, f"patchify: size {s}, patch {p}, block {b}")
    return Type("f32", ((s // p) ** 2, c * p * p))


def _shuffle(t: Sequence[Type], a: Attrs) -> Type:
    x, f = t[0], a["factor"]
    _need(x.dtype == "f32" and len(x.shape) == 2, f"pixel_shuffle of {x}")
    rows, width = _numbers(x, x.shape)
    g = math.isqrt(rows)
    _need(f > 0 and g * g == rows and g % f == 0, f"pixel_shuffle: {rows} rows by factor {f}")
    return Type("f32", ((g // f) ** 2, width * f * f))


def _time(t: Sequence[Type], a: Attrs) -> Type:
    _need(t[0].dtype == "f32" and len(t[0].shape) == 2 and t[0].shape[1] == 1, f"time_embedding of {t[0]}")
    _need(a["dim"] % 2 == 0, f"time_embedding: dim {a['dim']} is odd")
    return Type("f32", (t[0].shape[0], a["dim"]))


def _dtype(t: Sequence[Type], a: Attrs) -> Type:
    """`cast` and `full`."""
    _need(a["dtype"] in DTYPES, f"dtype {a['dtype']!r}, expected one of {', '.join(DTYPES)}")
    return Type(a["dtype"], t[0].shape if t else tuple(a["shape"]))


def _gelu(t: Sequence[Type], a: Attrs) -> Type:
    known = ("tanh", "none", "quick")
    _need(a["approximate"] in known, f"gelu: approximate {a['approximate']!r}, expected one of {', '.join(known)}")
    return _float_same(t, a)


def _vector(t: Sequence[Type], a: Attrs) -> Type:
    _need(len(t[0].shape) == 1, f"wants a vector, got {t[0]}")
    return t[0]


def _index_vector(t: Sequence[Type], a: Attrs) -> Type:
    _need(t[0].dtype == "i32", f"wants i32, got {t[0]}")
    return _vector(t, a)


def _argmax(t: Sequence[Type], a: Attrs) -> Type:
    x = t[0]
    _need(x.dtype == "f32" and len(x.shape) == 2, f"argmax of {x}")
    return Type("i32", (x.shape[0],))


def _pick(t: Sequence[Type], a: Attrs) -> Type:
    x, index = t
    _need(len(x.shape) == 1 and index == Type("i32", (1,)), f"pick({x}, {index})")
    return Type(x.dtype, (1,))


def _write_rows(t: Sequence[Type], a: Attrs) -> Type:
    x, rows, start = t
    _need(x.dtype == rows.dtype == "f32" and len(x.shape) == len(rows.shape) == 2, f"write_rows({x}, {rows})")
    _need(x.shape[1] == rows.shape[1] and start == Type("i32", (1,)), f"write_rows({x}, {rows}, {start})")
    if isinstance(x.shape[0], int) and isinstance(rows.shape[0], int):
        _need(rows.shape[0] <= x.shape[0], f"write_rows: {rows} into {x}")
    return x


def _repeat_each(t: Sequence[Type], a: Attrs) -> Type:
    x = _vector(t, a)
    return Type(x.dtype, (x.shape[0] * a["times"],))


def _head_width(a: Attrs) -> tuple[int, int]:
    """(numbers, words) of one head of one row of packed codes."""
    _need(a["bits"] in kv_codes.BITS, f"bits {a['bits']}, expected one of {', '.join(map(str, kv_codes.BITS))}")
    _need(0 < a["head_dim"] <= 4096 and -1 <= a["seed"] < 2**31, f"head_dim {a['head_dim']}, seed {a['seed']}")
    _need(a["form"] in kv_codes.FORMS, f"form {a['form']!r}, expected one of {', '.join(kv_codes.FORMS)}")
    _need(a["form"] != "inner" or a["bits"] - 1 in kv_codes.BITS, f"form inner of {a['bits']} bits")
    return a["head_dim"], kv_codes.words(a["bits"], a["head_dim"], a["form"])


def _pack(t: Sequence[Type], a: Attrs) -> Type:
    x, (d, words) = t[0], _head_width(a)
    _need(a["scale"] in kv_codes.SCALES, f"scale {a['scale']!r}, expected one of {', '.join(kv_codes.SCALES)}")
    _need(x.dtype == "f32" and len(x.shape) == 2, f"pack_codes of {x}")
    (width,) = _numbers(x, x.shape[1:])
    _need(width % d == 0, f"pack_codes: width {width}, head_dim {d}")
    _need(t[1:] in ([], [Type("f32", (1, width))]), f"pack_codes: mean {t[-1]} for {x}")
    return Type("i32", (x.shape[0], width // d * words))


def _unpack(t: Sequence[Type], a: Attrs) -> Type:
    x, (d, words) = t[0], _head_width(a)
    _need(x.dtype == "i32" and len(x.shape) == 2, f"unpack_codes of {x}")
    (width,) = _numbers(x, x.shape[1:])
    _need(width % words == 0, f"unpack_codes: {width} words, {words} for each head")
    result = Type("f32", (x.shape[0], width // words * d))
    _need(t[1:] in ([], [Type("f32", (1, result.shape[1]))]), f"unpack_codes: mean {t[-1]} for {result}")
    return result


def _column_mean(t: Sequence[Type], a: Attrs) -> Type:
    x = t[0]
    _need(x.dtype == "f32" and len(x.shape) == 2, f"column_mean of {x}")
    _need(t[1:] in ([], [Type("bool", x.shape[:1])]), f"column_mean: valid {t[-1]} for {x}")
    return Type("f32", (1, x.shape[1]))


def _round8(t: Sequence[Type], a: Attrs) -> Type:
    x, known = t[0], ("token", "block32", "tensor")
    _need(x.dtype == "f32" and len(x.shape) == 2, f"round_int8 of {x}")
    _need(a["form"] in known, f"round_int8: form {a['form']!r}, expected one of {', '.join(known)}")
    _need(a["form"] != "tensor" or 0 < a["largest"] < math.inf, f"round_int8: largest {a['largest']}")
    _numbers(x, x.shape[1:])
    return x


def _round_fp8(t: Sequence[Type], a: Attrs) -> Type:
    _need(0 < a["largest"] < math.inf, f"round_fp8: largest {a['largest']}")
    return _float_same(t, a)
