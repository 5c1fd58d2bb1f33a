"""Who is measured: artifacts on an engine, and other engines that are set up in environments beside the repository.

A peer is started by a script in scripts/peers; where its environment is missing the peer is left out, with the reason.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import vlac
from vlac.errors import VlacError

ROOT = Path(vlac.__file__).resolve().parents[1]
SCRIPTS = ROOT / "scripts" / "peers"

BASE = "lerobot-fp32"
LEROBOT_MODES = ("fp32", "bf16", "compile")


@dataclass(frozen=True)
class Contender:
    """One row of the table.

    Attributes:
        name: as the table shows it.
        artifact: ours: a folder or a .gguf file; None for a peer. engine, options: for `vlac.load`.
        command: of a peer's process, without the number of threads, which is added; peers with equal commands share a
            process. mode: what such a process is asked for in every request.
        file: what a peer loads, for its size.
        prepared: whether the peer takes preprocessed inputs (those of the base) instead of pictures and text.
    """

    name: str
    artifact: Path | None = None
    engine: str = ""
    options: Mapping[str, Any] = field(default_factory=dict)
    command: tuple[str, ...] = ()
    mode: str = ""
    file: Path | None = None
    prepared: bool = False


def lerobot(checkpoint: Path, modes: Sequence[str] = LEROBOT_MODES) -> list[Contender]:
    """LeRobot itself, one process for all modes; the first is what all are compared with. VlacError when missing."""
    python, script = ROOT / ".venv-lerobot" / "bin" / "python", SCRIPTS / "lerobot_worker.py"
    if not python.exists() or not script.exists():
        raise VlacError(
            f"LeRobot is not set up: no {python if script.exists() else script}",
            remedy="run scripts/peers/lerobot.sh in the repository; it is what the others are compared with",
        )
    command = (str(python), str(script), str(checkpoint))
    return [Contender(f"lerobot-{mode}", command=command, mode=mode) for mode in modes]


def ggml_compiler(folder: Path) -> list[Contender]:
    """ggml-compiler's own files in `folder`, one per precision (FOLDER/q8_0/model.gguf), as its script in
    scripts/peers leaves them; none where it is not set up."""
    python, script = ROOT / ".venv-ggml-compiler" / "bin" / "python", SCRIPTS / "ggml_compiler_worker.py"
    if not python.exists():
        return []
    return [
        Contender(
            f"ggml-compiler-{file.parent.name}",
            command=(str(python), str(script), str(file)),
            file=file,
            prepared=True,
        )
        for file in sorted(folder.glob("*/model.gguf"))
    ]


def qvac(folder: Path) -> list[Contender]:
    """Files in QVAC's layout in `folder` (FOLDER/q8_0/model.gguf) in its own engine; none where it is not set up."""
    engine, script = ROOT / ".venv-qvac" / "node_modules" / ".bin" / "bare", SCRIPTS / "qvac_worker.py"
    if not engine.exists():
        return []
    return [
        Contender(
            f"qvac-{file.parent.name}", command=(sys.executable, str(script), str(file)), file=file, prepared=True
        )
        for file in sorted(folder.glob("*/model.gguf"))
    ]
