"""Observations in a file, for parity, golden answers and bench: an .npz in one of two layouts.

For observation i = 0, 1, ... the file holds
  obs{i}/image/<camera key>  uint8 [H, W, 3] RGB, raw
  obs{i}/state               float32 [state_dim], raw
  obs{i}/task                the instruction: UTF-8 bytes as uint8, or a text array; or <file>.json or golden.json
                             beside the file with a list under "tasks"
  obs{i}/noise               float32 io.noise_shape, a leading 1 allowed; seeded when absent
  obs{i}/chunk, or chunk_robot, and chunk_normalised   [chunk_size, action_dim], a leading 1 allowed; optional: answers
                             of an fp32 reference
That is what artifacts carry (vlac.artifact.write_goldens) and what the golden folders of the tests hold.
"""

from __future__ import annotations

import json
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from vlac.artifact import Golden
from vlac.errors import InputError
from vlac.io import IO

NpArray = np.ndarray[Any, Any]
_LAYOUT = "the layout is described at the top of vlac/observations.py"


def load_observations(path: Path, io: IO) -> tuple[Golden, ...]:
    """Observations of a file, checked against the policy's inputs; chunks are empty (0, 0) where the file has none.

    Raises:
        InputError: names the file and the key, what it holds and what was expected.
    """
    arrays = _read(path)
    tasks = _tasks_beside(path)
    result: list[Golden] = []
    while any(k.startswith(f"obs{len(result)}/") for k in arrays):
        result.append(_one(path, arrays, tasks, len(result), io))
    if not result:
        found = ", ".join(sorted(arrays)[:6]) or "nothing"
        raise InputError(f"{path} holds no obs0/...; it holds {found}", remedy=_LAYOUT)
    return tuple(result)


def _read(path: Path) -> dict[str, NpArray]:
    try:
        with np.load(path, allow_pickle=False) as z:
            return {k: np.asarray(z[k]) for k in z.files}
    except FileNotFoundError:
        raise InputError(f"{path} does not exist", remedy="give an .npz file to --observations") from None
    except (ValueError, KeyError, OSError, AttributeError, EOFError, zipfile.BadZipFile) as error:
        raise InputError(f"{path} is not a readable .npz file: {error}", remedy=_LAYOUT) from None


def _tasks_beside(path: Path) -> list[str]:
    for name in (path.with_suffix(".json"), path.with_name("golden.json")):
        if name.is_file():
            try:
                tasks = json.loads(name.read_text(encoding="utf-8")).get("tasks")
            except (ValueError, AttributeError, RecursionError) as error:
                raise InputError(f"{name} is not a JSON object: {error}") from None
            if isinstance(tasks, list) and all(isinstance(t, str) for t in tasks):
                return tasks
    return []


def _one(path: Path, arrays: Mapping[str, NpArray], tasks: list[str], i: int, io: IO) -> Golden:
    prefix = f"obs{i}/"
    images = {k[len(prefix) + 6 :]: v for k, v in arrays.items() if k.startswith(prefix + "image/")}
    for key, image in images.items():
        if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3:
            raise InputError(f"{path}: {prefix}image/{key} is {_kind(image)}, expected uint8 [H, W, 3]")
    if prefix + "state" in arrays:
        state = _float(path, prefix + "state", arrays[prefix + "state"], (io.state_dim,))
    elif io.state_dim:
        raise InputError(f"{path}: {prefix}state is missing", remedy=_LAYOUT)
    else:
        state = np.zeros(0, np.float32)
    shape = io.noise_shape
    if prefix + "noise" in arrays:
        noise = _float(path, prefix + "noise", arrays[prefix + "noise"], shape)
    else:
        rng = np.random.Generator(np.random.PCG64([1, i]))
        noise = np.asarray(rng.standard_normal(shape), dtype=np.float32)
    answers = []
    for names in (("chunk", "chunk_robot"), ("chunk_normalised",)):
        found = next((prefix + n for n in names if prefix + n in arrays), None)
        answers.append(
            _float(path, found, arrays[found], (io.chunk_size, io.action_dim))
            if found
            else np.zeros((0, 0), np.float32)
        )
    return Golden(
        images=images,
        state=state,
        task=_task(path, arrays.get(prefix + "task"), tasks, i, bool(io.text_steps)),
        noise=noise,
        chunk=answers[0],
        chunk_normalised=answers[1],
    )


def _task(path: Path, stored: NpArray | None, tasks: list[str], i: int, needed: bool) -> str:
    if stored is not None:
        if stored.dtype == np.uint8:
            try:
                return bytes(stored).decode("utf-8")
            except UnicodeDecodeError:
                raise InputError(f"{path}: obs{i}/task is not UTF-8") from None
        if stored.dtype.kind == "U" and stored.size == 1:
            return str(stored.reshape(-1)[0])
        raise InputError(f"{path}: obs{i}/task is {_kind(stored)}, expected UTF-8 bytes (uint8) or one string")
    if i < len(tasks):
        return tasks[i]
    if needed:
        raise InputError(
            f"{path}: no task for observation {i}: no obs{i}/task and no golden.json beside it with 'tasks'"
        )
    return ""


def _float(path: Path, key: str, array: NpArray, shape: tuple[int, ...]) -> NpArray:
    if array.ndim == len(shape) + 1 and array.shape[0] == 1:
        array = array[0]
    if array.shape != shape or array.dtype.kind != "f":
        raise InputError(f"{path}: {key} is {_kind(array)}, the policy wants float {list(shape)}")
    if not np.isfinite(array).all():
        raise InputError(f"{path}: {key} holds NaN or Inf")
    return np.ascontiguousarray(array, dtype=np.float32)


def _kind(array: NpArray) -> str:
    return f"{array.dtype} {list(array.shape)}"
