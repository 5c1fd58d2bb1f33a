"""FAST action tokens back to actions (Pertsch et al. 2025, arXiv 2501.09747): byte-level BPE, then an inverse DCT.

The tokenizer's table travels in the step's parameters; no code of a checkpoint is run.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from vlac.errors import VlacWarning
from vlac.runtime.observation import Array


def _byte_of_character() -> dict[str, int]:
    """The alphabet of byte-level BPE: printable Latin-1 bytes stand for themselves, the others for 256, 257, ..."""
    plain = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [b for b in range(256) if b not in plain]
    return {chr(b): b for b in plain} | {chr(256 + i): b for i, b in enumerate(others)}


BYTES = _byte_of_character()


def decode_pieces(pieces: Sequence[str]) -> str:
    """Byte-level BPE pieces as text; bytes that are no UTF-8 become U+FFFD."""
    return bytes(BYTES[c] for piece in pieces for c in piece).decode("utf-8", errors="replace")


def inverse_dct(coefficients: npt.NDArray[np.float64]) -> Array:
    """Inverse of the orthonormal DCT-II along axis 0: x[t] = sum_k c[k] s[k] cos(pi (2t+1) k / 2N), f64 inside.

    s[0] = sqrt(1/N), s[k] = sqrt(2/N) (scipy.fft.idct with type=2, norm="ortho").
    """
    n = coefficients.shape[0]
    k = np.arange(n)
    basis = np.cos(np.pi * (2 * k[:, None] + 1) * k[None, :] / (2 * n)) * np.sqrt(np.where(k == 0, 1 / n, 2 / n))
    return np.asarray(basis @ coefficients, dtype=np.float32)


def without(ids: Sequence[int], sequence: Sequence[int]) -> list[int]:
    """`ids` with every occurrence of `sequence` taken out, from left to right."""
    result, i, n = [], 0, len(sequence)
    while i < len(ids):
        if n and list(ids[i : i + n]) == list(sequence):
            i += n
        else:
            result.append(ids[i])
            i += 1
    return result


def fast_decode(
    x: Array,
    *,
    pieces: Sequence[str],
    first: int,
    stop: int,
    remove: Sequence[int],
    begin: Sequence[int],
    min_token: int,
    scale: float,
    rows: int,
    columns: int,
) -> Array:
    """Generated token ids x [1, M] -> normalised actions [rows, columns].

    Ids behind the first `stop` are dropped, and every occurrence of the ids `remove` ("Action: "). FAST token n was
    generated as id first - n and stands for pieces[n]; each character of the text is a DCT coefficient, its code point
    plus `min_token`, divided by `scale`. Missing coefficients are zeros, further ones are dropped.

    Where an id is no FAST token, or the answer does not begin with the ids `begin`, all coefficients are zeros, with a
    VlacWarning: what LeRobot does with an answer that it cannot decode.
    """
    ids = [int(i) for i in np.asarray(x).reshape(-1)]
    ids = ids[: ids.index(stop)] if stop in ids else ids
    coefficients = np.zeros(rows * columns, dtype=np.float64)
    tokens = [first - i for i in without(ids, remove)]
    wrong = [t for t in tokens if not 0 <= t < len(pieces)]
    if wrong or ids[: len(begin)] != list(begin):
        what = f"{len(wrong)} of {len(tokens)} tokens are no action tokens" if wrong else "it does not begin as trained"
        warnings.warn(f"the policy's answer is no action ({what}); it counts as zeros", VlacWarning, stacklevel=2)
    else:
        text = decode_pieces([pieces[t] for t in tokens])[: rows * columns]
        coefficients[: len(text)] = [ord(c) + min_token for c in text]
    return inverse_dct(coefficients.reshape(rows, columns) / scale)
