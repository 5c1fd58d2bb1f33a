"""Float32 weights packed by ggml's own quantizers, where its library is there; `vlac.formats` asks for it."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np

from vlac.engines.ggml_lib import default_threads, load
from vlac.errors import EngineError

Array = np.ndarray[Any, Any]
_PACK_BLOCKS = 1 << 14


def quantize_rows(type_id: int, rows: Array, row_bytes: int, importance: Array) -> Array:
    """float32 rows [n, k] packed by ggml's quantizer for importance matrices, as uint8 [n * row_bytes].

    importance [k], all above 0: how much an error in each column counts.
    """
    lib = load()
    n, k = rows.shape
    source = np.ascontiguousarray(rows, dtype=np.float32)
    weights = np.ascontiguousarray(importance, dtype=np.float32)
    if weights.shape != (k,) or not (np.isfinite(weights).all() and (weights > 0).all()):
        raise EngineError(f"importance {list(weights.shape)} for rows of {k}: one number above 0 per column is needed")
    if lib.type_size(type_id) * (k // lib.blck_size(type_id)) != row_bytes:
        raise EngineError(f"{lib.directory}: rows of {k} of ggml type {type_id} do not take {row_bytes} bytes")
    out = np.empty(n * row_bytes, dtype=np.uint8)
    lib.quantize_chunk(type_id, source.ctypes.data, out.ctypes.data, 0, n, k, weights.ctypes.data)
    return out


def quantize(type_id: int, blocks: Array, block_bytes: int) -> Array:
    """float32 blocks [n, block] packed by ggml's reference quantizer, as uint8 [n * block_bytes].

    Blocks are independent, so they are packed on all CPUs and the bytes do not depend on how many there are.
    """
    lib = load()
    count, width = blocks.shape
    if (lib.blck_size(type_id), lib.type_size(type_id)) != (width, block_bytes):
        raise EngineError(f"{lib.directory}: ggml type {type_id} is not {width} values in {block_bytes} bytes")
    out = np.empty(count * block_bytes, dtype=np.uint8)
    source, target = blocks.ctypes.data, out.ctypes.data

    def pack(start: int) -> None:
        n = min(_PACK_BLOCKS, count - start)
        lib.quantize_chunk(type_id, source + start * width * 4, target + start * block_bytes, 0, n, width, None)

    starts = range(0, count, _PACK_BLOCKS)
    if len(starts) < 2:
        for start in starts:
            pack(start)
        return out
    with ThreadPoolExecutor(default_threads()) as pool:
        list(pool.map(pack, starts))
    return out
