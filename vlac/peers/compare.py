"""One run of `vlac bench --peers`: who takes part, the rounds, and the report."""

from __future__ import annotations

import platform
from collections.abc import Mapping, Sequence
from datetime import datetime, timezone
from importlib import metadata
from pathlib import Path
from typing import Any

from vlac import machine
from vlac.artifact import open_artifact
from vlac.engines.base import get_engine
from vlac.engines.onnx_files import default_threads
from vlac.errors import InputError
from vlac.peers.contenders import Contender, ggml_compiler, lerobot, qvac
from vlac.peers.figures import rows_of
from vlac.peers.rounds import run, started
from vlac.registry import Progress, silent

PACKAGES = ("vlac-compiler", "numpy", "torch", "onnx", "onnxruntime", "openvino", "transcribe-cpp-native")


def ours(path: str | Path, engine: str = "", options: Mapping[str, Any] | None = None, name: str = "") -> Contender:
    """An artifact on an engine, the artifact's best without one."""
    artifact = open_artifact(path)
    engine = engine or next((e for e in artifact.engines if not get_engine(e).missing()), artifact.engines[0])
    return Contender(name or f"{artifact.manifest['target']} ({engine})", artifact.path, engine, options or {})


def compare(
    contenders: Sequence[Contender],
    checkpoint: Path,
    *,
    rounds: int = 5,
    threads: int | None = None,
    peers: Sequence[Contender] | None = None,
    progress: Progress = silent,
) -> dict[str, Any]:
    """Measures artifacts beside LeRobot on the checkpoint they were compiled from, and beside whatever else is set up.

    Where memory does not hold all at once they come in groups, one after another, each with LeRobot in its turns:
    ratios are to LeRobot of the same group.

    Args:
        contenders: ours. checkpoint: a LeRobot folder. peers: the others, the base first; None: all that are set up.

    Raises: VlacError when LeRobot is not set up; a contender that fails is reported in its row.
    """
    machine.refuse_emulated()
    if rounds < 1:
        raise InputError(f"rounds={rounds}: at least 1")
    count = threads or default_threads()
    given = (
        peers
        if peers is not None
        else [*lerobot(checkpoint), *ggml_compiler(checkpoint / "ggml-compiler"), *qvac(checkpoint / "qvac")]
    )
    io = open_artifact(_first(contenders)).io
    base, *waiting = [*given, *contenders]
    rows: list[dict[str, Any]] = []
    groups: list[dict[str, Any]] = []
    torch, loads = "", []
    while waiting or not rows:
        with started([base, *waiting], count, progress) as found:
            loads += (here := run(found, rounds, io, progress))
            first, *others = rows_of(found, count)
            rows += others if rows else [first, *others]
            torch = found[0].process.start.get("torch", "") if found[0].process else ""
        waiting = waiting[len(found) - 1 :]
        names = [m.contender.name for m in found]
        groups.append({"rows": names, "load_average": [round(x, 1) for x in here], "base": first.get("cold", {})})
    return {
        "date": f"{datetime.now(timezone.utc):%Y-%m-%d}",
        "threads": count,
        "rounds": rounds,
        "load_average": [round(x, 1) for x in loads],
        "machine": machine.describe(),
        "versions": versions() | {"lerobot_torch": str(torch)},
        "groups": groups,
        "rows": rows,
    }


def _first(contenders: Sequence[Contender]) -> Path:
    path = next((c.artifact for c in contenders if c.artifact is not None), None)
    if path is None:
        raise InputError("no artifact to compare", remedy="give at least one")
    return path


def versions() -> dict[str, str]:
    """What is installed here; "not installed" for the rest."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = "not installed"
    return found
