"""What the two ONNX engines share: which graph file belongs to a stage, checked before any native code reads it."""

from __future__ import annotations

import json
import os
from pathlib import Path

from vlac.artifact import Artifact, sha256
from vlac.errors import ArtifactError, EngineError
from vlac.layouts import INT4

SINGLE = "model"
"""Name of the one graph of a `--single-file` artifact in manifest["onnx"]."""


FALLBACK = {
    "integer": ("fused", "portable"),
    "linears": ("integer", "fused", "portable"),
    "fused": ("portable",),
    "unrounded": ("portable",),
    "portable": (),
}
"""form -> forms to take where a stage does not have it."""


def graph_files(artifact: Artifact, engine: str, form: str) -> dict[str, Path]:
    """Stage name -> graph file. Graph files are small: their hashes are checked; of data files the size.

    `form` is "portable"; "fused": the same with long attention as ONNX Runtime's own op; "unrounded": the same, of
    which no activation is rounded on a fixed scale; "linears": activations of int8 linears are quantised in the graph;
    or "integer": long attention is on integers, too. Where a stage has no such form, `FALLBACK` tells what is taken.
    Raises EngineError for an artifact without ONNX graphs, ArtifactError for a file that is missing or changed.
    """
    table = artifact.manifest.get("onnx")
    if (
        artifact.container != "folder"
        or not isinstance(table, dict)
        or not all(isinstance(row, dict) for row in table.values())
    ):
        raise EngineError(
            f"{artifact.path} holds no ONNX graphs (target {artifact.manifest.get('target')})",
            remedy="compile with --target onnx-fp32, onnx-fp16, onnx-int8 or onnx-int4, or choose another engine",
        )
    declined = artifact.manifest.get("declined")
    if isinstance(declined, dict) and engine in declined:
        why = json.dumps(declined[engine]).strip("{}").replace('"', "")
        raise EngineError(f"{engine} cannot run {artifact.path}: {why}", remedy="choose another engine")
    single = bool(artifact.manifest.get("single_file"))
    stages = [SINGLE] if single else [s.name for s in artifact.program.stages]
    result: dict[str, Path] = {}
    for stage in stages:
        row = table.get(stage) or {}
        name = next((row[f] for f in (form, *FALLBACK[form]) if f in row), None)
        if not isinstance(name, str):
            raise ArtifactError(f"{artifact.path}/manifest.json: no graph of stage {stage}", remedy="compile again")
        path = artifact.file(name)
        if sha256(path) != artifact.manifest["files"][name].get("sha256"):
            raise ArtifactError(
                f"{path} is not the file that was compiled (its sha256 is not the one in manifest.json)",
                remedy="copy the whole folder again, or compile again",
            )
        result[stage] = path
    return result


def repeated_stages(artifact: Artifact) -> set[str]:
    """Stages that a Repeat runs (they carry the flow state)."""
    from vlac.graph import Repeat

    return {s.stage for s in artifact.program.schedule.steps if isinstance(s, Repeat)}


def integer_formats(artifact: Artifact) -> set[str]:
    """Which of int8 and the int4 formats the program's parameters use."""
    return {p.format for p in artifact.program.params.values()} & {"int8", *INT4}


def default_threads() -> int:
    """CPUs this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return max(1, len(os.sched_getaffinity(0)))
    return os.cpu_count() or 1
