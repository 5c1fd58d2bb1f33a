"""A checkpoint, however it is named, as a Policy: find it, let the right reader read it, note exactly what was read."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path
from typing import Any

from vlac.errors import CheckpointError, Unsupported, VlacError
from vlac.gguf_dialects import foreign_file
from vlac.policy import Policy, Source
from vlac.readers.hub import policy_folder, resolve
from vlac.readers.safetensors_file import weight_files
from vlac.recorded import Recorded, beside
from vlac.registry import Reader, ReadOptions, readers

SMALL = 4 << 20
"""Files up to this many bytes are hashed even when only headers are read."""


def read_policy(checkpoint: str, options: ReadOptions | None = None) -> Policy:
    """The Policy of a local folder or hub id.

    Raises VlacError (nothing there, offline), Unsupported (no reader or family for it) and CheckpointError (broken).
    With `options.headers_only` no weight is read and problems that a person can fix become `Policy.warnings`.
    """
    options = options or ReadOptions()
    path = resolve(checkpoint, options.revision)
    path = foreign_file(path) or policy_folder(path)
    policy = _reader(path).read(path, options)
    inside = f"{path}{os.sep}"
    warnings = tuple(w.replace(inside, "") for w in policy.warnings)  # they go into artifacts
    return policy.replace(source=_source(checkpoint, path, options), warnings=warnings, recorded=beside(path))


def recorded_beside(checkpoint: str, revision: str | None = None) -> Recorded | None:
    """The observations/ folder in a checkpoint's folder, if there is one; VlacError when there is no checkpoint."""
    path = resolve(checkpoint, revision)
    return beside(foreign_file(path) or policy_folder(path))


def _reader(path: Path) -> Reader:
    for reader in readers.all():
        if reader.detect(path):
            return reader
    known = ", ".join(r.name for r in readers.all())
    if path.is_file():
        raise Unsupported(f"{path}: a file that no reader knows (readers: {known})", remedy="give a checkpoint folder")
    if not (path / "config.json").exists():
        raise VlacError(
            f"{path}: no config.json, so this is not a policy checkpoint (readers: {known})",
            remedy="give the folder that save_pretrained wrote, with config.json and safetensors in it",
        )
    raise Unsupported(f"{path}: config.json names no policy type that a reader knows (readers: {known})")


def _source(checkpoint: str, path: Path, options: ReadOptions) -> Source:
    """Sizes and sha256 of every JSON and weight file; of large files only when more than headers is read."""
    files: dict[str, dict[str, Any]] = {}
    if path.is_file():
        digest = {} if options.headers_only else {"sha256": sha256(path)}
        return Source(checkpoint, "", {path.name: {"size": path.stat().st_size, **digest}})
    candidates = {*path.glob("*.json"), *path.glob("*.safetensors"), *path.glob("*/*.json"), *weight_files(path)}
    candidates |= {*path.glob("assets/**/norm_stats.json"), *path.glob("*.pt")}
    for file in sorted(candidates):
        if not file.is_file():
            continue
        entry: dict[str, Any] = {"size": file.stat().st_size}
        if entry["size"] <= SMALL or not options.headers_only:
            entry["sha256"] = sha256(file)
        files[file.relative_to(path).as_posix()] = entry
    revision = path.resolve().name if path.resolve().parent.name == "snapshots" else options.revision or ""
    return Source(checkpoint, revision, files)


def sha256(path: Path) -> str:
    """Hexadecimal sha256 of a file, read in pieces."""
    digest = hashlib.sha256()
    try:
        with path.open("rb") as file:
            while piece := file.read(1 << 20):
                digest.update(piece)
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror or error}") from None
    return digest.hexdigest()
