"""`vlac build`: TensorRT plans of an artifact, made on the machine that runs them and kept beside it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from vlac.artifact import open_artifact
from vlac.engines import tensorrt_build
from vlac.engines.base import get_engine
from vlac.errors import EngineError, Unsupported
from vlac.registry import Progress, silent


def build(
    path: str | Path,
    force: bool = False,
    workspace_mb: int = tensorrt_build.WORKSPACE_MB,
    progress: Progress = silent,
) -> dict[str, Any]:
    """Builds what is not there, or made for another GPU, TensorRT version or artifact.

    Returns: see tensorrt_build.build. Raises: Unsupported for an artifact of another target, EngineError where
    TensorRT or a GPU is missing or a plan cannot be built.
    """
    artifact = open_artifact(path)
    if "tensorrt" not in artifact.manifest:
        raise Unsupported(
            f"{artifact.path} ({artifact.manifest.get('target')}) holds no graphs for TensorRT",
            remedy="build is for artifacts of the tensorrt targets; others are used as they are, see `vlac prepare`",
        )
    if why := get_engine("tensorrt").missing():
        raise EngineError(f"TensorRT cannot be used here: {why}", remedy="copy the folder to the board and build there")
    stages = len(artifact.program.stages)
    begun = 0

    def say(text: str) -> None:
        nonlocal begun
        if not text.startswith(" "):
            progress(text, begun, stages)
            begun += 1

    try:
        return tensorrt_build.build(artifact.path, force, workspace_mb, say)
    except (tensorrt_build.BuildError, OSError) as error:
        raise EngineError(str(error), remedy="docs/tensorrt.md says what each target needs") from None


def text(report: dict[str, Any]) -> str:
    """The report for people."""
    state = "built" if report["built"] else "were there"
    lines = [f"plans for {report['gpu']} (sm_{report['sm']}), TensorRT {report['tensorrt']} {state}"]
    for stage, plan in report["plans"].items():
        took = f" in {plan['seconds']:.1f} s" if "seconds" in plan else ""
        lines.append(f"  {stage:14s} {plan['bytes'] / 1e6:8.1f} MB{took}  {plan['file']}")
    return "\n".join(lines)
