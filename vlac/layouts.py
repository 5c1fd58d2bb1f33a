"""How a folder artifact lays out the parts of a tensor, and the two symmetric integer formats of ONNX files.

`decode_parts` turns the parts that a target wrote back into the float32 values an engine effectively uses; the
`quantize_*` and `*_int4` functions make those parts. Base install: numpy only, shared by targets and by the artifact.

Layouts: "rows" keeps a parameter [N, K] as the program has it; "columns" stores it transposed, [K, N], as MatMul wants.
Formats: f32, f16 and bf16 (as uint16) have one part "values"; int8 has "q" int8 and "scale" f32 [N], one per output
row; fp8 the same with E4M3 codes as uint8; int4 (columns only) has "q" uint8, two values a byte, and "scale" f32
[K/32, N] (int4g64: [K/64, N], ...). Scales may be f16 where an engine computes with these weights in float16.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from vlac.errors import ArtifactError
from vlac.float8 import LARGEST as FP8_LARGEST
from vlac.float8 import decode_e4m3, encode_e4m3
from vlac.formats import FORMATS, int4_codes, int8_codes
from vlac.weights import Array

NpArray = np.ndarray[Any, Any]
Int8 = np.ndarray[Any, np.dtype[np.int8]]
UInt8 = np.ndarray[Any, np.dtype[np.uint8]]

INT4_BLOCK = 32
INT4 = ("int4g16", "int4", "int4g64", "int4g128")
"""Formats of 4 bits, finest first: 16, 32, 64, 128 inputs share a scale (vlac.formats)."""
FLOAT_DTYPES = {"f32": "<f4", "f16": "<f2", "bf16": "<u2"}
LAYOUTS = ("rows", "columns")

# Divisors of a block's largest value that are tried as its scale. A block of 32 Gaussian values is coded best with the
# largest value slightly clipped (about 7.5..8.5); blocks with one outlier want it kept exactly (7).
_INT4_DIVISORS = (5.5, 6.0, 6.5, 7.0, 7.25, 7.5, 7.75, 8.0, 8.25, 8.5, 9.0, 9.5)


# --- integer formats -------------------------------------------------------------------------------------------


def quantize_int8_rows(w: Array) -> tuple[Int8, Array]:
    """Symmetric 8 bit, one scale per row: w [N, K] -> q int8 [N, K] in -127..127, scale f32 [N].

    w ~ q * scale[:, None], scale = max|row| / 127, rounding half to even. A row of zeros has scale 1. Rows that are
    code * scale already keep both.
    """
    given = int8_codes(np.ascontiguousarray(w, dtype=np.float32)) if w.size else None
    if given is not None:
        return given[1].astype(np.int8), _nonzero(given[0][:, 0])
    scale = _nonzero(_row_absmax(w) / np.float32(127))
    q = np.rint(w / scale[:, None])
    return np.clip(q, -127, 127, out=q).astype(np.int8), scale


def quantize_fp8_rows(w: Array) -> tuple[UInt8, Array]:
    """E4M3, one scale per row: w [N, K] -> codes uint8 [N, K], scale f32 [N] = max|row| / 448; 1 for a row of zeros."""
    scale = _nonzero(_row_absmax(w) / np.float32(FP8_LARGEST))
    return encode_e4m3(w / scale[:, None].astype(np.float64)), scale


def half_scales(w: Array, format: str, layout: str, parts: Mapping[str, NpArray]) -> dict[str, NpArray]:
    """Parts of an int8 or int4 weight w [N, K] for an engine that keeps scales in float16: every scale is rounded (none
    to 0), and codes become the nearest under it."""
    block = w.shape[1] if format == "int8" else FORMATS[format].block
    half = np.maximum(parts["scale"].astype(np.float16), np.float16(2.0**-24))
    rows = half[:, None] if format == "int8" else half.T
    lowest, highest = (-127, 127) if format == "int8" else (-8, 7)
    wide = rows.astype(np.float32).repeat(block, axis=1)
    q = np.clip(np.rint(w / wide), lowest, highest).astype(np.int8)
    if format != "int8":
        return {"q": pack_int4(q.T), "scale": half}
    return {"q": np.ascontiguousarray(q.T) if layout == "columns" else q, "scale": half}


def quantize_int4_blocks(w: Array, block: int = INT4_BLOCK) -> tuple[Int8, Array]:
    """Symmetric 4 bit, one scale per `block` inputs: w [N, K] -> q int8 [N, K] in -8..7, scale f32 [N, K/block].

    Of several candidate scales, each refitted by least squares (scale = <q, w> / <q, q>), the one with the smallest
    squared error is kept, per block. Blocks that are code * scale already keep both. K must be a multiple of `block`.
    """
    n, k = w.shape
    if k % block:
        raise ValueError(f"rows of {k} values are no multiple of {block}")
    blocks = np.ascontiguousarray(w, dtype=np.float32).reshape(n * (k // block), block)
    given = int4_codes(blocks)
    if given is not None:
        scale = np.where(given[0][:, 0] == 0, np.float32(1), given[0][:, 0]).astype(np.float32)
        return given[1].astype(np.int8).reshape(n, k), scale.reshape(n, k // block)
    best_q = np.empty(blocks.shape, dtype=np.int8)
    best_scale = np.empty(len(blocks), dtype=np.float32)
    step = max(1, (1 << 20) // block)  # a few MB at a time: the candidates stay in cache
    for start in range(0, len(blocks), step):
        part = slice(start, start + step)
        best_q[part], best_scale[part] = _best_int4(blocks[part])
    return best_q.reshape(n, k), best_scale.reshape(n, k // block)


def _best_int4(blocks: Array) -> tuple[Int8, Array]:
    absmax = _row_absmax(blocks)
    best_error = np.full(len(blocks), np.inf, dtype=np.float32)
    best_q = np.zeros(blocks.shape, dtype=np.int8)
    best_scale = np.ones(len(blocks), dtype=np.float32)
    energy = np.einsum("ij,ij->i", blocks, blocks)
    for divisor in _INT4_DIVISORS:
        q = np.rint(blocks / _nonzero(absmax / np.float32(divisor))[:, None])
        np.clip(q, -8, 7, out=q)
        dot, square = np.einsum("ij,ij->i", q, blocks), np.einsum("ij,ij->i", q, q)
        scale = np.where(square > 0, dot / np.maximum(square, 1), np.float32(1)).astype(np.float32)
        error = energy - np.where(square > 0, dot * scale, 0)  # |w - s q|^2 at the least-squares s
        better = error < best_error
        best_error[better] = error[better]
        best_q[better] = q[better].astype(np.int8)
        best_scale[better] = _nonzero(scale[better])
    return best_q, best_scale


def _row_absmax(w: Array) -> Array:
    largest: Array = np.maximum(w.max(axis=1), -w.min(axis=1))
    return largest


def _nonzero(scale: Array) -> Array:
    """Scales of all-zero rows become 1; so do those so small that dividing by them would overflow."""
    return np.where(scale > np.finfo(np.float32).tiny, scale, np.float32(1)).astype(np.float32)


def pack_int4(q: Int8) -> UInt8:
    """Values in -8..7 of any shape to bytes, ONNX INT4: row-major, first value in the low nibble, last byte padded."""
    flat = np.ascontiguousarray(q, dtype=np.int8).reshape(-1)
    nibbles = (flat & 0xF).astype(np.uint8)
    if nibbles.size % 2:
        nibbles = np.append(nibbles, np.uint8(0))
    packed: UInt8 = nibbles[0::2] | (nibbles[1::2] << np.uint8(4))
    return packed


def unpack_int4(packed: NpArray, shape: tuple[int, ...]) -> Int8:
    """Inverse of pack_int4."""
    count = int(np.prod(shape))
    data = np.asarray(packed, dtype=np.uint8).reshape(-1)
    nibbles = np.empty(2 * data.size, dtype=np.uint8)
    nibbles[0::2], nibbles[1::2] = data & 0xF, data >> 4
    signed = (nibbles[:count] << np.uint8(4)).view(np.int8) >> 4  # arithmetic shift brings the sign down
    return signed.reshape(shape)


def bf16_from_f32(x: Array) -> NpArray:
    """bfloat16 as uint16, rounded to nearest even."""
    bits = np.ascontiguousarray(x, dtype=np.float32).view(np.uint32)
    rounded = bits + (np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1)))
    return (rounded >> np.uint32(16)).astype(np.uint16)


def f32_from_bf16(x: NpArray) -> Array:
    """float32 values of bfloat16 given as uint16."""
    return (np.asarray(x, dtype=np.uint32) << np.uint32(16)).view(np.float32)


# --- parts to values -------------------------------------------------------------------------------------------


def decode_parts(format: str, layout: str, shape: tuple[int, ...], parts: Mapping[str, NpArray], where: str) -> Array:
    """The float32 values [*shape] of a tensor from its parts.

    Raises ArtifactError naming `where`, for an unknown layout or format, and for a part that is missing or has another
    shape or dtype than the tensor's shape implies.
    """
    if layout not in LAYOUTS or (layout == "columns" and len(shape) != 2):
        raise ArtifactError(f"{where}: layout {layout!r} for shape {list(shape)}; known: {', '.join(LAYOUTS)}")
    if format in FLOAT_DTYPES:
        stored = shape if layout == "rows" else shape[::-1]
        values = _part(parts, "values", FLOAT_DTYPES[format], stored, where)
        floats = f32_from_bf16(values) if format == "bf16" else values.astype(np.float32)
        return floats if layout == "rows" else np.ascontiguousarray(floats.T)
    if format == "int8" and len(shape) == 2:
        scale = _scale(parts, shape[:1], where)
        if layout == "rows":
            rows = _part(parts, "q", "|i1", shape, where).astype(np.float32)
        else:
            rows = np.ascontiguousarray(_part(parts, "q", "|i1", shape[::-1], where).T).astype(np.float32)
        rows *= scale[:, None]
        return rows
    if format == "fp8" and len(shape) == 2:
        scale = _scale(parts, shape[:1], where)
        codes = _part(parts, "q", "|u1", shape if layout == "rows" else shape[::-1], where)
        rows = np.ascontiguousarray(decode_e4m3(codes if layout == "rows" else codes.T))
        rows *= scale[:, None]
        return rows
    if format in INT4 and layout == "columns" and shape[1] % FORMATS[format].block == 0:
        n, k = shape
        q = unpack_int4(_part(parts, "q", "|u1", ((n * k + 1) // 2,), where), (k, n)).astype(np.float32)
        block = FORMATS[format].block
        scale = _scale(parts, (k // block, n), where)
        values = q.reshape(k // block, block, n) * scale[:, None, :]
        return np.ascontiguousarray(values.reshape(k, n).T)
    raise ArtifactError(f"{where}: no layout {layout!r} of format {format!r} for shape {list(shape)}")


def _scale(parts: Mapping[str, NpArray], shape: tuple[int, ...], where: str) -> Array:
    """Scales as float32, stored so or as float16."""
    half = "scale" in parts and parts["scale"].dtype == np.dtype("<f2")
    return np.asarray(_part(parts, "scale", "<f2" if half else "<f4", shape, where), dtype=np.float32)


def _part(parts: Mapping[str, NpArray], name: str, dtype: str, shape: tuple[int, ...], where: str) -> NpArray:
    if name not in parts:
        raise ArtifactError(f"{where}: part {name!r} is missing; there are {', '.join(sorted(parts)) or 'none'}")
    part = parts[name]
    if part.shape != shape or part.dtype != np.dtype(dtype):
        raise ArtifactError(
            f"{where}: part {name!r} is {part.dtype}{list(part.shape)}, expected {np.dtype(dtype)}{list(shape)}",
            remedy="compile again",
        )
    return part
