"""tokenizer.json, checked and made neutral: truncation and padding are the policy's steps, not the file's."""

from __future__ import annotations

import json
from pathlib import Path

from vlac.errors import CheckpointError
from vlac.readers.safetensors_file import read_json


def read_tokenizer(path: Path) -> bytes:
    """The file's bytes, without truncation and padding of its own. CheckpointError when it does not load."""
    from tokenizers import Tokenizer

    table = read_json(path)
    if not isinstance(table, dict):
        raise CheckpointError(f"{path}: not a tokenizer file")
    data = path.read_bytes()
    if table.get("truncation") is not None or table.get("padding") is not None:
        data = json.dumps({**table, "truncation": None, "padding": None}, ensure_ascii=False).encode()
    try:
        Tokenizer.from_str(data.decode("utf-8"))
    except Exception as error:  # tokenizers raises plain Exception
        raise CheckpointError(f"{path}: tokenizers cannot load it: {error}") from None
    return data


def given_tokenizer(place: str) -> bytes:
    """--tokenizer: a tokenizer.json, or a folder that holds one."""
    path = Path(place)
    path = path / "tokenizer.json" if path.is_dir() else path
    if not path.is_file():
        raise CheckpointError(f"--tokenizer {place}: no tokenizer.json there")
    return read_tokenizer(path)


def token_id(data: bytes, token: str, where: str) -> int:
    """Id of a token that must exist."""
    from tokenizers import Tokenizer

    found = Tokenizer.from_str(data.decode("utf-8")).token_to_id(token)
    if found is None:
        raise CheckpointError(f"{where}: the tokenizer has no token {token!r}")
    return int(found)
