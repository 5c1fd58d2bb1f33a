"""The FAST action tokenizer of a checkpoint, from its JSON files alone; the Python file beside them is never run."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vlac.errors import CheckpointError, Unsupported
from vlac.readers.safetensors_file import read_json
from vlac.runtime.fast import BYTES

PLACES = ("bpe_tokenizer/tokenizer.json", "tokenizer.json")
"""Where transformers 5 and 4 put the BPE tokenizer."""


@dataclass(frozen=True)
class FastTokenizer:
    """`pieces` by token id; coefficient = code point + min_token, over scale."""

    pieces: tuple[str, ...]
    min_token: int
    scale: float


def read_fast_tokenizer(find: Callable[[str], Path]) -> FastTokenizer:
    """The tokenizer; `find(filename)` gives a file of its folder or raises CheckpointError.

    Raises CheckpointError (missing, broken) and Unsupported (not byte-level BPE).
    """
    config = find("processor_config.json")
    try:
        path = find(PLACES[0])
    except CheckpointError:
        path = find(PLACES[1])
    table = read_json(config)
    least, scale = (table.get(key) if isinstance(table, dict) else None for key in ("min_token", "scale"))
    if type(least) is not int or not isinstance(scale, (int, float)) or not 0 < scale < 1e9:
        raise CheckpointError(f"{config}: min_token is {least!r}, scale is {scale!r}; expected an integer and a number")
    return FastTokenizer(_pieces(path), least, float(scale))


def _pieces(path: Path) -> tuple[str, ...]:
    table = read_json(path)
    model: Any = table.get("model") if isinstance(table, dict) else None
    decoder = table.get("decoder") if isinstance(table, dict) else None
    if not isinstance(model, dict) or model.get("type") != "BPE" or (decoder or {}).get("type") != "ByteLevel":
        raise Unsupported(f"{path}: the action tokenizer is not byte-level BPE")
    vocabulary = model.get("vocab")
    if not isinstance(vocabulary, dict) or sorted(vocabulary.values()) != list(range(len(vocabulary))):
        raise CheckpointError(f"{path}: the vocabulary's ids are not 0 .. {len(vocabulary or ()) - 1}")
    pieces = sorted(vocabulary, key=vocabulary.__getitem__)
    foreign = {c for piece in pieces for c in piece} - set(BYTES)
    if foreign:
        raise CheckpointError(f"{path}: {len(foreign)} characters are none of byte-level BPE's alphabet")
    return tuple(pieces)
