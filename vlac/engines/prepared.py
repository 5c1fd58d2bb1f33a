"""What an engine made of an artifact on this machine, kept beside it: loading is faster and takes less private memory.

It lies in PREPARED/ENGINE inside the artifact's folder and is bound to the artifact, the engine's version and settings,
and the CPU by a stamp; with another stamp it is made again, or left aside where nothing can be written.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from vlac import machine
from vlac.artifact import PREPARED, STAMP, Artifact, sha256
from vlac.errors import EngineError


class Prepared:
    """One engine's folder. `settings`: whatever else decides what the engine makes (its version above all)."""

    def __init__(self, artifact: Artifact, engine: str, **settings: Any) -> None:
        self.folder = artifact.path / PREPARED / engine
        cpu = hashlib.sha256(f"{machine.cpu_name()} {machine.cpu_features()}".encode()).hexdigest()[:16]
        checksum = str(artifact.manifest.get("checksum", ""))
        self.stamp = {"artifact": checksum, "cpu": cpu, **{k: str(v) for k, v in settings.items()}}

    def exists(self) -> bool:
        """Whether `vlac prepare` was run for this engine, for whatever machine."""
        return (self.folder / STAMP).is_file()

    def ready(self) -> bool:
        """Whether what is there was made here, of this artifact, and is whole."""
        try:
            found = json.loads((self.folder / STAMP).read_text(encoding="utf-8"))
            files = found["files"]
            return found["stamp"] == self.stamp and all(
                (self.folder / name).stat().st_size == row["size"] for name, row in files.items()
            )
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            return False

    def make(self, write: Callable[[Path], None]) -> None:
        """Replaces the folder by what `write(folder)` leaves in a new one; EngineError when nothing can be written."""
        fresh = self.folder.with_name(f".{self.folder.name}.new")
        try:
            shutil.rmtree(fresh, ignore_errors=True)
            fresh.mkdir(parents=True)
            write(fresh)
            made = [p for p in sorted(fresh.rglob("*")) if p.is_file()]
            files = {p.relative_to(fresh).as_posix(): {"size": p.stat().st_size, "sha256": sha256(p)} for p in made}
            (fresh / STAMP).write_text(json.dumps({"stamp": self.stamp, "files": files}, indent=1), encoding="utf-8")
            shutil.rmtree(self.folder, ignore_errors=True)
            fresh.replace(self.folder)
        except OSError as error:
            raise EngineError(
                f"{self.folder} cannot be written: {error.strerror or error}",
                remedy="prepare a copy of the artifact in a place that can be written",
            ) from None
        finally:
            shutil.rmtree(fresh, ignore_errors=True)

    def usable(self, write: Callable[[Path], None]) -> bool:
        """Whether to load from the folder: it is ready, or was made for something else and could be made again."""
        if self.ready():
            return True
        if not self.exists():
            return False
        try:
            self.make(write)
        except EngineError:
            return False
        return True
