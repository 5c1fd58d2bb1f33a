"""Writing so that a file is there whole or not at all, also when the process is killed or the power goes."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

UNFINISHED = ".unfinished"
"""Suffix of files that are being written; whoever opens the dataset for recording removes what a killed one left."""


def replace_with(path: Path, write: Callable[[Path], None]) -> None:
    """`write` makes the file under another name; then it is on disk and takes its place in one step."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}{UNFINISHED}")
    write(temporary)
    put(temporary, path)


def put(temporary: Path, path: Path) -> None:
    """Moves a finished file to its place, durably."""
    path.parent.mkdir(parents=True, exist_ok=True)
    sync(temporary)
    temporary.replace(path)
    sync(path.parent)


def replace_json(path: Path, value: Any) -> None:
    """A JSON file, as LeRobot indents it."""
    text = json.dumps(value, indent=4, ensure_ascii=False)

    def write(temporary: Path) -> None:
        temporary.write_text(text, encoding="utf-8")

    replace_with(path, write)


def sync(path: Path) -> None:
    """fsync of a file or folder."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
