"""Storage formats of tensors: names, block geometry, bytes; encode float32 to bytes and back.

Block formats are ggml's (a row is cut into blocks of `block` values, each `block_bytes` long). "int8" and "int4" are
the ONNX forms: symmetric, int8 with one float32 scale per output row, int4 with one per 32 inputs of a row (int4g16,
int4g64, int4g128: per 16, 64, 128); "fp8" is E4M3 with one scale per output row (vlac/float8.py). How a folder artifact
lays out their parts is in vlac/layouts.py.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from vlac.errors import Unsupported

Bytes = np.ndarray[Any, np.dtype[np.uint8]]


@dataclass(frozen=True)
class Format:
    """A storage format. `ggml_type` is the type id in GGUF files, None where GGUF has no such type."""

    name: str
    block: int
    block_bytes: int
    ggml_type: int | None

    @property
    def bits(self) -> float:
        """Bits per value, scales included."""
        return 8 * self.block_bytes / self.block

    def nbytes(self, shape: Sequence[int]) -> int:
        """Bytes of a tensor whose last dimension is a multiple of `block`."""
        return math.prod(shape) // self.block * self.block_bytes


FORMATS: dict[str, Format] = {
    f.name: f
    for f in (
        Format("f32", 1, 4, 0),
        Format("f16", 1, 2, 1),
        Format("bf16", 1, 2, 30),
        Format("q8_0", 32, 34, 8),
        Format("q5_0", 32, 22, 6),
        Format("q4_1", 32, 20, 3),
        Format("q4_0", 32, 18, 2),
        Format("iq4_nl", 32, 18, 20),
        Format("q6_k", 256, 210, 14),
        Format("q5_k", 256, 176, 13),
        Format("q4_k", 256, 144, 12),
        Format("int8", 1, 1, None),
        Format("fp8", 1, 1, None),
        Format("int4", 32, 18, None),
        Format("int4g16", 16, 10, None),
        Format("int4g64", 64, 34, None),
        Format("int4g128", 128, 66, None),
    )
}


GRIDS: dict[str, str] = {
    f"w{bits}{'row' if group == 0 else f'g{group}'}": f"{bits} bits with a scale for every "
    + ("row" if group == 0 else f"{group} inputs")
    for bits in (4, 8)
    for group in (16, 32, 64, 128, 0)
}
"""Grids of symmetric codes by bits and group; each target says in which of its formats it holds one."""


def get_format(name: str) -> Format:
    """The format of that name; Unsupported names those there are."""
    if name not in FORMATS:
        raise Unsupported(f"no storage format {name!r}; there are: {', '.join(FORMATS)}")
    return FORMATS[name]


# --- float32 to bytes and back -----------------------------------------------------------------------------------

F32 = np.ndarray[Any, np.dtype[np.float32]]

_CHUNK = 1 << 20
"""Values handled at a time: bounds the temporaries to some tens of MB whatever the tensor's size."""

_F16_MAX = 65504.0
_IQ4_VALUES = np.array([-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113], dtype=np.float32)


def encode(fmt: str, values: F32, importance: F32 | None = None) -> Bytes:
    """float32 values of any shape to the packed bytes of a ggml format, as a 1-D uint8 array.

    Every row (last dimension) must be a multiple of the format's block; Unsupported says which is not, and names values
    that a format with float16 parts cannot hold. f32, f16, bf16 (round to nearest even), q8_0, q5_0 and q4_0 are
    numpy, bit-equal to ggml's reference quantizers (but q8_0 and q4_0 keep what are codes times a scale already: ggml
    rounds those once more); iq4_nl and the K-quants are packed by ggml's `ggml_quantize_chunk`
    and raise EngineError when no ggml library is installed. Equal values give equal bytes.

    importance [k]: mean squares of what multiplies the columns of a weight [n, k]; ggml then packs every format below
    8 bits so that errors in important columns are small. Values that are codes of the format already stay as they are.
    """
    form, type_id = _ggml_format(fmt)
    array = np.ascontiguousarray(values, dtype=np.float32)
    _check_row(form, array.shape)
    if fmt == "f32":
        return array.reshape(-1).view(np.uint8)
    if importance is not None and form.bits < 8 and array.ndim == 2 and not _has_codes(form, array):
        from vlac.engines.ggml_pack import quantize_rows

        floor = 1e-6 * max(float(importance.max()), 1e-30)
        return quantize_rows(type_id, array, form.nbytes(array.shape[1:]), np.maximum(importance, floor))
    if fmt in _ENCODERS:
        return _encode_numpy(form, array.reshape(-1))
    from vlac.engines.ggml_pack import quantize

    return quantize(type_id, array.reshape(-1, form.block), form.block_bytes)


def _has_codes(form: Format, array: F32) -> bool:
    return form.name == "q4_0" and int4_codes(array.reshape(-1, form.block)) is not None


def decode(fmt: str, data: Bytes, shape: Sequence[int]) -> F32:
    """Inverse of encode: packed bytes (uint8, 1-D) to float32 of `shape`, as ggml's own dequantizers compute it.

    Raises Unsupported when the row does not suit the format, ValueError when the byte count does not match.
    """
    form, _ = _ggml_format(fmt)
    _check_row(form, shape)
    raw = np.ascontiguousarray(data, dtype=np.uint8).reshape(-1)
    if raw.size != form.nbytes(shape):
        raise ValueError(f"{raw.size} bytes do not make {fmt}{list(shape)}, that takes {form.nbytes(shape)}")
    if fmt == "f32":
        return raw.view(np.float32).reshape(shape)
    blocks = raw.reshape(-1, form.block_bytes)
    out = np.empty((blocks.shape[0], form.block), dtype=np.float32)
    step = max(1, _CHUNK // form.block)
    for i in range(0, blocks.shape[0], step):
        out[i : i + step] = _DECODERS[fmt](np.ascontiguousarray(blocks[i : i + step]))
    return out.reshape(shape)


def _ggml_format(fmt: str) -> tuple[Format, int]:
    form = get_format(fmt)
    if form.ggml_type is None:
        raise Unsupported(
            f"format {fmt} has no packed form of its own (it is ONNX's)", remedy="see vlac.layouts for folder artifacts"
        )
    return form, form.ggml_type


def _check_row(form: Format, shape: Sequence[int]) -> None:
    row = shape[-1] if len(shape) else 1
    if row % form.block:
        raise Unsupported(
            f"format {form.name} wants rows that are multiples of {form.block}, got shape {list(shape)}",
            remedy="pad the row, or store this tensor in f16, bf16 or f32",
        )


def _encode_numpy(form: Format, flat: F32) -> Bytes:
    out = np.empty((flat.size // form.block, form.block_bytes), dtype=np.uint8)
    blocks = flat.reshape(-1, form.block)
    step = max(1, _CHUNK // form.block)
    for i in range(0, blocks.shape[0], step):
        _ENCODERS[form.name](blocks[i : i + step], out[i : i + step])
    return out.reshape(-1)


def _to_f16(x: F32, what: str) -> np.ndarray[Any, np.dtype[np.float16]]:
    with np.errstate(over="ignore"):
        half = x.astype(np.float16)
    if not np.isfinite(half).all():
        raise Unsupported(
            f"{what}: a value of magnitude {float(np.abs(x).max()):g} does not fit float16 (largest {_F16_MAX:g})",
            remedy="store this tensor in bf16 or f32",
        )
    return half


def _put_f16(x: F32, out: Bytes) -> None:
    out[:] = _to_f16(x, "f16").view(np.uint8)


def _put_bf16(x: F32, out: Bytes) -> None:
    bits = np.ascontiguousarray(x).view(np.uint32)
    rounded = (bits + (0x7FFF + ((bits >> 16) & 1))) >> 16
    if ((rounded & 0x7F80) == 0x7F80).any():
        raise Unsupported("bf16: a value is not finite, or rounds to infinity", remedy="store this tensor in f32")
    out[:] = rounded.astype(np.uint16).view(np.uint8)


_TINY = np.float32(2.0**-127)
"""Below this 1/d overflows float32 (and the float16 scale is 0 anyway): such blocks are written as zeros."""


def _inverse(d: F32) -> F32:
    return np.divide(np.float32(1), d, out=np.zeros_like(d), where=np.abs(d) > _TINY)


def _put_q8_0(x: F32, out: Bytes) -> None:
    """d = max|x|/127 as float16, then 32 int8: q = round half away from zero of x/d (with the unrounded d)."""
    d = np.abs(x).max(axis=1, keepdims=True) / np.float32(127)
    v = x * _inverse(d)
    # round half away from zero, exactly as roundf: adding 0.5 first would be wrong just below a half
    whole = np.trunc(v)
    whole += np.trunc(2 * (v - whole))
    given = int8_codes(x)
    if given is not None:  # blocks with code 127 are exact already
        other = (np.abs(given[1]).max(axis=1) < 127) & (given[0][:, 0] != 0)
        d[other], whole[other] = given[0][other], given[1][other]
    out[:, :2] = _to_f16(d, "q8_0 scale").view(np.uint8)
    out[:, 2:] = whole.astype(np.int8).view(np.uint8)


def _symmetric(x: F32, half: int) -> tuple[F32, Bytes]:
    """Scale d = (entry of largest magnitude)/-half, and q = min(2*half-1, trunc(x/d + half + 0.5))."""
    peak = np.take_along_axis(x, np.abs(x).argmax(axis=1)[:, None], axis=1)
    d = peak / np.float32(-half)
    q = np.trunc(x * _inverse(d) + np.float32(half + 0.5))
    return d, np.minimum(q, 2 * half - 1).astype(np.uint8)


def int4_codes(x: F32) -> tuple[F32, F32] | None:
    """(scales [n, 1], codes -8..7 [n, k]) of blocks that already are code * scale, within 1e-3 of a scale that float16
    can hold; None if any block is not.

    Rounding with care (vlac.rounding) leaves such values; they are stored as they are, not rounded a second time. A
    factor that lowering folded in later keeps the codes.
    """
    return _codes_of(x, (-8, *(s * m for m in range(7, 0, -1) for s in (1, -1))))


def int8_codes(x: F32) -> tuple[F32, F32] | None:
    """The same for codes -127..127, scales above 0."""
    return _codes_of(x, tuple(range(127, 0, -1)))


def _codes_of(x: F32, peaks: Sequence[int]) -> tuple[F32, F32] | None:
    """Tries each code for the value of largest magnitude of every block; for 127 codes its sign is the value's."""
    some = x[:: max(1, len(x) // 32)]
    if len(some) < len(x) and _codes_of(some, peaks) is None:
        return None
    peak = np.take_along_axis(x, np.abs(x).argmax(axis=1)[:, None], axis=1)
    if min(peaks) > 0:
        peak = np.abs(peak)
    low, high = (-8, 7) if min(peaks) < 0 else (-127, 127)
    scale, codes = np.zeros_like(peak), np.zeros_like(x)
    left = np.flatnonzero(peak[:, 0])
    for code in peaks:
        if not left.size:
            break
        d = peak[left] / np.float32(code)
        with np.errstate(over="ignore"):
            half = d.astype(np.float16).astype(np.float32)
        usable = np.isfinite(half) & (np.abs(half) > _TINY)
        d = np.where(usable, d, np.float32(1))
        q = np.rint(np.divide(x[left], d, out=np.zeros_like(x[left]), where=usable))
        fits = (np.abs(x[left] - q * d) <= 1e-3 * np.abs(d)).all(axis=1) & usable[:, 0] & (q <= high).all(axis=1)
        fits &= (q >= low).all(axis=1)
        scale[left[fits]], codes[left[fits]] = d[fits], q[fits]
        left = left[~fits]
    return None if left.size else (scale, codes)


def _put_q4_0(x: F32, out: Bytes) -> None:
    d, q = _symmetric(x, 8)
    given = int4_codes(x)
    if given is not None:  # a block that uses code -8, or holds only zeros, is exact already
        other = (given[1].min(axis=1) > -8) & (given[0][:, 0] != 0)
        d[other], q[other] = given[0][other], (given[1][other] + 8).astype(np.uint8)
    out[:, :2] = _to_f16(d, "q4_0 scale").view(np.uint8)
    out[:, 2:] = q[:, :16] | (q[:, 16:] << 4)


def _put_q4_1(x: F32, out: Bytes) -> None:
    """d = (max - min)/15 and min as float16, then q = min(15, trunc((x - min)/d + 0.5))."""
    least, most = x.min(axis=1, keepdims=True), x.max(axis=1, keepdims=True)
    d = (most - least) / np.float32(15)
    q = np.minimum(np.trunc((x - least) * _inverse(d) + np.float32(0.5)), 15).astype(np.uint8)
    given = _codes_of(x - least, tuple(range(15, 0, -1)))  # chosen with care: codes need not reach 15
    if given is not None:
        d, q = given[0], given[1].astype(np.uint8)
    out[:, :2] = _to_f16(d, "q4_1 scale").view(np.uint8)
    out[:, 2:4] = _to_f16(least, "q4_1 minimum").view(np.uint8)
    out[:, 4:] = q[:, :16] | (q[:, 16:] << 4)


def _put_q5_0(x: F32, out: Bytes) -> None:
    d, q = _symmetric(x, 16)
    out[:, :2] = _to_f16(d, "q5_0 scale").view(np.uint8)
    out[:, 2:6] = np.packbits(q >> 4, axis=1, bitorder="little")
    out[:, 6:] = (q[:, :16] & 15) | ((q[:, 16:] & 15) << 4)


def _f16(b: Bytes) -> F32:
    return np.ascontiguousarray(b).view(np.float16).astype(np.float32)


def _nibbles(b: Bytes) -> Bytes:
    """Low halves of all bytes, then high halves, along the last axis."""
    return np.concatenate([b & 15, b >> 4], axis=-1)


def _get_bf16(b: Bytes) -> F32:
    return (b.view(np.uint16).astype(np.uint32) << 16).view(np.float32)


def _get_q8_0(b: Bytes) -> F32:
    return np.ascontiguousarray(b[:, 2:]).view(np.int8).astype(np.float32) * _f16(b[:, :2])


def _get_q4_0(b: Bytes) -> F32:
    return (_nibbles(b[:, 2:]).astype(np.float32) - np.float32(8)) * _f16(b[:, :2])


def _get_q4_1(b: Bytes) -> F32:
    return _nibbles(b[:, 4:]).astype(np.float32) * _f16(b[:, :2]) + _f16(b[:, 2:4])


def _get_q5_0(b: Bytes) -> F32:
    high = np.unpackbits(b[:, 2:6], axis=1, bitorder="little") << 4
    return ((_nibbles(b[:, 6:]) | high).astype(np.float32) - np.float32(16)) * _f16(b[:, :2])


def _get_iq4_nl(b: Bytes) -> F32:
    return _IQ4_VALUES[_nibbles(b[:, 2:])] * _f16(b[:, :2])


def _k_scales(b: Bytes) -> tuple[F32, F32]:
    """Eight 6-bit scales and eight 6-bit minima from the 12 bytes of a q4_k or q5_k block (get_scale_min_k4)."""
    low, mid, high = b[:, :4], b[:, 4:8], b[:, 8:]
    scale = np.concatenate([low & 63, (high & 15) | ((low >> 6) << 4)], axis=1)
    least = np.concatenate([mid & 63, (high >> 4) | ((mid >> 6) << 4)], axis=1)
    return scale.astype(np.float32), least.astype(np.float32)


def _affine_k(b: Bytes, q: Bytes) -> F32:
    """d*scale*q - dmin*least; q [n, 8, 32]. The block opens with float16 d and dmin, then the packed scales."""
    scale, least = _k_scales(b[:, 4:16])
    d, dmin = _f16(b[:, :2]) * scale, _f16(b[:, 2:4]) * least
    return (d[:, :, None] * q.astype(np.float32) - dmin[:, :, None]).reshape(-1, 256)


def _get_q4_k(b: Bytes) -> F32:
    q = _nibbles(b[:, 16:].reshape(-1, 4, 32)).reshape(-1, 8, 32)
    return _affine_k(b, q)


def _get_q5_k(b: Bytes) -> F32:
    q = _nibbles(b[:, 48:].reshape(-1, 4, 32)).reshape(-1, 8, 32)
    # bit j of byte l of the 32 high bytes belongs to value l of sub-block j
    high = (b[:, None, 16:48] >> np.arange(8, dtype=np.uint8)[None, :, None]) & 1
    return _affine_k(b, q | (high << 4).astype(np.uint8))


def _get_q6_k(b: Bytes) -> F32:
    low = _nibbles(b[:, :128].reshape(-1, 2, 64)).reshape(-1, 2, 4, 32)
    high = b[:, 128:192].reshape(-1, 2, 1, 32) >> np.array([0, 2, 4, 6], dtype=np.uint8)[:, None]
    q = (low | ((high & 3) << 4)).reshape(-1, 16, 16).astype(np.float32) - np.float32(32)
    scale = np.ascontiguousarray(b[:, 192:208]).view(np.int8).astype(np.float32) * _f16(b[:, 208:])
    return (scale[:, :, None] * q).reshape(-1, 256)


_ENCODERS: dict[str, Callable[[F32, Bytes], None]] = {
    "f16": _put_f16,
    "bf16": _put_bf16,
    "q8_0": _put_q8_0,
    "q5_0": _put_q5_0,
    "q4_1": _put_q4_1,
    "q4_0": _put_q4_0,
}
_DECODERS: dict[str, Callable[[Bytes], F32]] = {
    "f16": _f16,
    "bf16": _get_bf16,
    "q8_0": _get_q8_0,
    "q5_0": _get_q5_0,
    "q4_1": _get_q4_1,
    "q4_0": _get_q4_0,
    "iq4_nl": _get_iq4_nl,
    "q6_k": _get_q6_k,
    "q5_k": _get_q5_k,
    "q4_k": _get_q4_k,
}
