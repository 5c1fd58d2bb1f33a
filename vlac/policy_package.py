"""A policy package: one model file and a manifest that other runtimes read (format policy_package, version 1.0).

Intel's physicalai loads such a folder as it is: its own ONNX Runtime or OpenVINO adapter runs the model, and the steps
around it (resizing, tokenising, statistics) are vlac's, named in the manifest by their classes in vlac.policy_steps.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vlac.artifact import Artifact, checked_file, open_artifact, sha256
from vlac.engines.onnx_files import SINGLE, graph_files, integer_formats
from vlac.errors import ArtifactError, Unsupported, VlacError
from vlac.graph import Program
from vlac.io import IO
from vlac.place import partial
from vlac.program_text import parse
from vlac.runtime.actions import needs_state

FORMAT, VERSION = "policy_package", "1.0"
MANIFEST = "manifest.json"
SIDE = "vlac"
"""The folder of what vlac's own steps read; also the manifest's key for what is vlac's."""
OPENVINO = "vlac-openvino"
"""The backend in a manifest: physicalai's OpenVINO adapter with a package's settings (vlac.policy_adapter)."""
BACKENDS = {"onnx": "onnx", "openvino": OPENVINO}
_STEPS = "vlac.policy_steps"
_FEATURE = "physicalai.inference.data.features.InferenceFeature"


@dataclass(frozen=True)
class Package:
    """What the steps around the model need."""

    io: IO
    program: Program
    tokenizer: bytes | None


def write_package(artifact: str | Path, out: str | Path, backend: str | None = None) -> Path:
    """Writes a package from an artifact that is one ONNX graph (`vlac compile --single-file`).

    Args:
        artifact: of an onnx or openvino target.
        out: a new or empty folder; it appears whole or not at all.
        backend: "onnx" or "openvino" (the model as OpenVINO's .xml and .bin); None = by the artifact's target.

    Raises Unsupported for what a package cannot hold, VlacError for a folder that is not empty.
    """
    opened, folder = open_artifact(artifact), Path(out)
    backend = backend or ("openvino" if str(opened.manifest["target"]).startswith("openvino") else "onnx")
    _check(opened, backend)
    if folder.is_symlink() or (folder.exists() and (not folder.is_dir() or any(folder.iterdir()))):
        raise VlacError(f"{folder} exists and is not an empty folder", remedy="give a new folder")
    graph = graph_files(opened, "onnxruntime" if backend == "onnx" else "openvino", "portable")[SINGLE]
    need = sum(f["size"] for f in opened.manifest["files"].values())
    with partial(folder, need) as temp:
        name = _WRITERS[backend](opened, graph, temp, policy_name(opened))
        (temp / SIDE).mkdir()
        (temp / SIDE / "io.json").write_text(opened.io.to_json(), encoding="utf-8", newline="\n")
        for file in ("program.txt", "tokenizer.json", "golden.npz"):
            if file in opened.manifest["files"]:
                shutil.copyfile(opened.file(file), temp / SIDE / file)
        files = {
            p.relative_to(temp).as_posix(): {"size": p.stat().st_size, "sha256": sha256(p)}
            for p in sorted(temp.rglob("*"))
            if p.is_file()
        }
        text = json.dumps(manifest(opened, backend, name, files), indent=1, sort_keys=True) + "\n"
        (temp / MANIFEST).write_text(text, encoding="utf-8", newline="\n")
    return folder


def open_package(side: str | Path) -> Package:
    """What lies in a package's folder `vlac`, with every file of the package held against its checksum, model included.

    Raises ArtifactError naming the file.
    """
    root = Path(side).parent
    try:
        found = json.loads((root / MANIFEST).read_text(encoding="utf-8"))[SIDE]
        listed = {"files": dict(found["files"])}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ArtifactError(f"{root} is not a policy package that vlac wrote: {error!r}") from None
    for name, row in listed["files"].items():
        if sha256(checked_file(root, name, listed)) != row["sha256"]:
            raise ArtifactError(f"{root / name} is not the file that was exported", remedy="copy the folder again")
    texts = {
        n: checked_file(root, f"{SIDE}/{n}", listed).read_text(encoding="utf-8") for n in ("io.json", "program.txt")
    }
    tokenizer = root / SIDE / "tokenizer.json"
    known = f"{SIDE}/tokenizer.json" in listed["files"]
    return Package(
        IO.from_json(texts["io.json"]), parse(texts["program.txt"]), tokenizer.read_bytes() if known else None
    )


def policy_name(artifact: Artifact) -> str:
    """The artifact's name in the characters that a manifest may hold; the model file is called so."""
    name = re.sub(r"[^A-Za-z0-9_.-]+", "-", str(artifact.manifest.get("name") or artifact.program.name))
    return name.strip("-._") or "policy"


def _check(artifact: Artifact, backend: str) -> None:
    if backend not in BACKENDS:
        raise VlacError(f"no backend {backend!r}; there are: {', '.join(BACKENDS)}")
    if artifact.container != "folder" or "onnx" not in artifact.manifest:
        raise Unsupported(
            f"{artifact.path} (target {artifact.manifest['target']}) holds no ONNX graph",
            remedy="compile with --target onnx-fp32 --single-file, or another onnx or openvino target",
        )
    if not artifact.manifest.get("single_file"):
        raise Unsupported(
            f"{artifact.path} is several graphs; a policy package runs its model in one pass",
            remedy="compile with --single-file",
        )
    if needs_state(artifact.io.action_steps):
        raise Unsupported(
            "actions of this policy are relative to the state, which the steps after the model are not given",
            remedy="load the artifact itself: vlac.load",
        )


# --- the model -------------------------------------------------------------------------------------------------


def _write_onnx(artifact: Artifact, graph: Path, folder: Path, name: str) -> str:
    """The graph under the policy's name, its data under the name that the graph knows."""
    shutil.copyfile(graph, folder / f"{name}.onnx")
    for file in artifact.manifest["files"]:
        if file.endswith(".onnx.data"):
            shutil.copyfile(artifact.file(file), folder / file)
    return f"{name}.onnx"


def _write_openvino(artifact: Artifact, graph: Path, folder: Path, name: str) -> str:
    """OpenVINO's own files, values as they are."""
    try:
        import openvino
    except ImportError:
        raise VlacError("openvino is not installed", remedy="pip install 'vlac-compiler[openvino]'") from None
    openvino.save_model(openvino.Core().read_model(graph), folder / f"{name}.xml", compress_to_fp16=False)
    return f"{name}.xml"


def openvino_settings(artifact: Artifact) -> dict[str, Any]:
    """What OpenVINO must be told for this model: as vlac's own engine does, on a CPU.

    Exact weights are computed in float32; for rounded ones the device's own precision stays.
    """
    from vlac.engines.openvino_engine import _groups, _snippets

    rounded = any(p.format == "bf16" for p in artifact.program.params.values()) or integer_formats(artifact)
    exact = {} if rounded else {"INFERENCE_PRECISION_HINT": "f32"}
    return {**_groups(artifact.program, SINGLE, "CPU"), **_snippets(artifact.program, SINGLE, "CPU"), **exact}


_WRITERS: dict[str, Callable[[Artifact, Path, Path, str], str]] = {"onnx": _write_onnx, "openvino": _write_openvino}


# --- the manifest ----------------------------------------------------------------------------------------------


def manifest(artifact: Artifact, backend: str, model: str, files: dict[str, Any]) -> dict[str, Any]:
    """manifest.json: what physicalai 0.3 reads, and under "vlac" where it came from and what every file must be."""
    io, made = artifact.io, artifact.manifest
    after = {"class_path": f"{_STEPS}.After", "init_args": {"artifact": SIDE}}
    state = {"state": {"shape": [io.state_dim]}} if io.state_dim else {}
    return {
        "format": FORMAT,
        "version": VERSION,
        "policy": {"name": policy_name(artifact), "source": {}},
        "model": {
            "n_obs_steps": 1,
            "artifacts": {BACKENDS[backend]: model},
            "runner": {"class_path": f"{_STEPS}.OnePass", "init_args": {"chunk_size": io.chunk_size}},
            "preprocessors": [{"class_path": f"{_STEPS}.Before", "init_args": {"artifact": SIDE}}],
            "postprocessors": [after],
            "input_features": _inputs(io),
            "output_features": [_feature("ACTION", "action", [io.chunk_size, io.action_dim])],
        },
        "hardware": {
            "robots": [{"name": "main", **state, "action": {"shape": [io.action_dim], "order": list(io.action_names)}}],
            "cameras": [{"name": c.name, "shape": list(c.shape)} for c in io.cameras],
        },
        "metadata": {"created_by": f"vlac {made.get('vlac', '')}".strip()},
        SIDE: {
            "target": made["target"],
            "family": made["family"],
            "units": io.units,
            "n_action_steps": io.n_action_steps,
            "files": files,
            **({"openvino": openvino_settings(artifact)} if backend == "openvino" else {}),
        },
    }


def _inputs(io: IO) -> list[dict[str, Any]]:
    found = [_feature("VISUAL", f"images.{c.name}", list(c.shape)) for c in io.cameras]
    if io.state_dim:
        found.append(_feature("STATE", "state", [io.state_dim]))
    if io.text_steps:
        found.append(_feature("LANGUAGE", "task", [1], "string"))
    return found


def _feature(kind: str, name: str, shape: list[int], dtype: str = "float32") -> dict[str, Any]:
    return {"class_path": _FEATURE, "init_args": {"ftype": kind, "name": name, "shape": shape, "dtype": dtype}}
