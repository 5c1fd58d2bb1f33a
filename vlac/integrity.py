"""Are the bytes on this disk the ones that were compiled? A flipped bit in a weight must not move an arm.

`verify` reads every file (folder: sha256) or tensor (GGUF: CRC-32) and raises at the first difference. A session does
it beside its first inference (`Verification`), so that loading stays a matter of mapping and no chunk is returned
before the answer is known. Files are read, not mapped: nothing stays resident.
"""

from __future__ import annotations

import hashlib
import json
import threading
import zlib
from collections.abc import Iterator
from pathlib import Path

from vlac.artifact import PREPARED, STAMP, Artifact
from vlac.errors import ArtifactError

BLOCK = 1 << 20


def verify(artifact: Artifact, stop: threading.Event | None = None) -> None:
    """Raises ArtifactError naming the first file or tensor whose bytes are not those of the manifest.

    `stop`, once set, ends the reading early without an answer.
    """
    checks = _gguf(artifact) if artifact.container == "gguf" else _folder(artifact)
    for what, right in checks:
        if stop is not None and stop.is_set():
            return
        if not right:
            raise ArtifactError(
                f"{what} does not match its checksum: the file is damaged or was changed",
                remedy="copy the artifact again, compile again, or prepare again what lies in its folder prepared",
            )


def _blocks(path: Path, start: int, nbytes: int) -> Iterator[bytes]:
    try:
        with path.open("rb") as f:
            f.seek(start)
            while nbytes > 0 and (block := f.read(min(BLOCK, nbytes))):
                nbytes -= len(block)
                yield block
    except OSError as error:
        raise ArtifactError(f"{path} cannot be read: {error.strerror or error}") from None


def _gguf(artifact: Artifact) -> Iterator[tuple[str, bool]]:
    from vlac.gguf import read_gguf

    file = read_gguf(artifact.path)
    for name, info in file.tensors.items():
        crc = 0
        for block in _blocks(artifact.path, file.data_start + info.offset, info.nbytes):
            crc = zlib.crc32(block, crc)
        yield f"{artifact.path}: tensor {name}", artifact.manifest["crc32"].get(name) == f"{crc:08x}"


def _folder(artifact: Artifact) -> Iterator[tuple[str, bool]]:
    for name, listed in artifact.manifest.get("files", {}).items():
        if "sha256" in listed:
            yield _same(artifact.file(name), listed["sha256"])
    for stamp in sorted((artifact.path / PREPARED).glob(f"*/{STAMP}")):
        for name, listed in json.loads(stamp.read_text(encoding="utf-8"))["files"].items():
            yield _same(stamp.with_name(name), listed["sha256"])


def _same(path: Path, digest: str) -> tuple[str, bool]:
    found = hashlib.sha256()
    for block in _blocks(path, 0, path.stat().st_size):
        found.update(block)
    return str(path), digest == found.hexdigest()


class Verification:
    """`verify` in a thread of its own; `wait` returns once all is well and raises what was found otherwise."""

    def __init__(self, artifact: Artifact) -> None:
        self._stop = threading.Event()
        self._found: Exception | None = None
        self._thread = threading.Thread(target=self._run, args=(artifact,), name="vlac-verify", daemon=True)
        self._thread.start()

    def _run(self, artifact: Artifact) -> None:
        try:
            verify(artifact, self._stop)
        except Exception as error:  # whatever it is, `wait` raises it where the caller is
            self._found = error

    def wait(self) -> None:
        """Raises ArtifactError when the artifact is damaged; returns at once after the first time."""
        self._thread.join()
        if self._found is not None:
            raise self._found

    def cancel(self) -> None:
        """Ends the reading; for sessions that are closed before they were used."""
        self._stop.set()
        self._thread.join()
