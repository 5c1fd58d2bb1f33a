"""Storage formats of tensors: names, block geometry, bytes; encode float32 to bytes and back.

Block formats are ggml's (a row is cut into blocks of `block` values, each `block_bytes` long). "int8" and "int4" are the
ONNX forms: symmetric, int8 with one float32 scale per output row, int4 with one per 32 inputs of a row; how a folder
artifact lays out their parts is in vlac/layouts.py.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
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
        Format("q4_0", 32, 18, 2),
        Format("iq4_nl", 32, 18, 20),
        Format("q6_k", 256, 210, 14),
        Format("q5_k", 256, 176, 13),
        Format("q4_k", 256, 144, 12),
        Format("int8", 1, 1, None),
        Format("int4", 32, 18, None),
    )
}


def get_format(name: str) -> Format:
    """The format of that name; Unsupported names those there are."""
    if name not in FORMATS:
        raise Unsupported(f"no storage format {name!r}; there are: {', '.join(FORMATS)}")
    return FORMATS[name]
