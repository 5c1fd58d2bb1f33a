"""Checkpoints for tests: copies of the golden ones with edits, and a safetensors writer that can write wrong files."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from vlac.checkpoint import read_policy
from vlac.io import IO
from vlac.policy import Policy
from vlac.registry import ReadOptions

GOLDEN = Path(__file__).parent / "golden"
PRE, POST = "policy_preprocessor.json", "policy_postprocessor.json"
PRE_STATE = "policy_preprocessor_step_5_normalizer_processor.safetensors"
POST_STATE = "policy_postprocessor_step_0_unnormalizer_processor.safetensors"
CODES = {"float64": "F64", "float32": "F32", "float16": "F16", "uint16": "BF16", "int64": "I64"}

Array = np.ndarray[Any, Any]


def copy_golden(to: Path, name: str = "smolvla_tiny") -> Path:
    """A writable copy of a golden checkpoint."""
    target = to / name
    shutil.copytree(GOLDEN / name / "checkpoint", target)
    return target


def edit_json(path: Path, edit: Callable[[Any], Any]) -> None:
    """Applies `edit` to a JSON file; what it returns replaces the table if it is not None."""
    table = json.loads(path.read_text(encoding="utf-8"))
    changed = edit(table)
    path.write_text(json.dumps(table if changed is None else changed), encoding="utf-8")


def edit_config(folder: Path, **changes: Any) -> None:
    """Sets keys of config.json."""
    edit_json(folder / "config.json", lambda table: table.update(changes))


def read_tensors(path: Path) -> dict[str, Array]:
    """All tensors of a correct float32 file, without vlac."""
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    header.pop("__metadata__", None)
    result = {}
    for name, entry in header.items():
        assert entry["dtype"] == "F32"
        start, stop = (8 + length + o for o in entry["data_offsets"])
        result[name] = np.frombuffer(data[start:stop], "<f4").reshape(entry["shape"]).copy()
    return result


def safetensors_bytes(tensors: Mapping[str, Array], edit: Callable[[dict[str, Any]], Any] | None = None) -> bytes:
    """A safetensors file; `edit` may spoil the header. uint16 arrays are written as BF16."""
    header: dict[str, Any] = {}
    data = b""
    for name, array in tensors.items():
        raw = np.ascontiguousarray(array).tobytes()
        entry = {"dtype": CODES[array.dtype.name], "shape": list(array.shape)}
        header[name] = {**entry, "data_offsets": [len(data), len(data) + len(raw)]}
        data += raw
    if edit is not None:
        edit(header)
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text + data


def write_tensors(path: Path, tensors: Mapping[str, Array]) -> None:
    """A correct safetensors file."""
    path.write_bytes(safetensors_bytes(tensors))


def sparse_tensors(path: Path, shapes: Mapping[str, tuple[int, ...]]) -> None:
    """A bf16 file of these shapes that takes no room on disk: zeros that were never written."""
    header, end = {}, 0
    for name, shape in shapes.items():
        size = 2 * math.prod(shape)
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [end, end + size]}
        end += size
    raw = json.dumps(header).encode()
    with path.open("wb") as file:
        file.write(len(raw).to_bytes(8, "little") + raw)
        file.truncate(8 + len(raw) + end)


def edit_tensors(path: Path, edit: Callable[[dict[str, Array]], Any]) -> None:
    """Rewrites a safetensors file with `edit` applied to its tensors."""
    tensors = read_tensors(path)
    edit(tensors)
    write_tensors(path, tensors)


def to_older_generation(folder: Path, group: str = "") -> None:
    """Turns a checkpoint into LeRobot's mid-2025 form: no processor files, statistics inside the weights."""
    statistics: dict[str, Array] = {}
    for file in sorted(folder.glob("policy_*.safetensors")):
        statistics |= read_tensors(file)
        file.unlink()
    for file in folder.glob("policy_*.json"):
        file.unlink()

    def add(tensors: dict[str, Array]) -> None:
        for key, values in statistics.items():
            feature, _, stat = key.rpartition(".")
            flat = feature.replace(".", "_")
            for prefix in ["normalize_inputs"] if feature != "action" else ["normalize_targets", "unnormalize_outputs"]:
                tensors[f"{prefix}.{group}buffer_{flat}.{stat}"] = values

    edit_tensors(folder / "model.safetensors", add)


def read(folder: Path, **options: Any) -> Policy:
    return read_policy(str(folder), ReadOptions(**options))


def golden_io(name: str = "smolvla_tiny") -> IO:
    return read_policy(str(GOLDEN / name / "checkpoint")).io


def edit_step(folder: Path, file: str, kind: str, edit: Callable[[dict[str, Any]], Any]) -> None:
    """Edits the step of that kind in a processor file."""

    def change(table: dict[str, Any]) -> None:
        edit(next(s for s in table["steps"] if s["registry_name"] == kind))

    edit_json(folder / file, change)
