"""preprocessor_config.json of an OpenVLA checkpoint -> image steps.

The stored `tvf_*` parameters win over means and stds: the original's processor sets them over what it computes, and in
released files they are rounded to bfloat16.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from vlac.blocks_timm import TowerSpec
from vlac.errors import CheckpointError, Unsupported
from vlac.io import Step
from vlac.readers.safetensors_file import read_json
from vlac.runtime.pillow_steps import FILTERS


def read_preprocessing(folder: Path, towers: Sequence[TowerSpec]) -> tuple[Step, ...]:
    """Image steps: one picture, resized once, normalised for every tower, cut to whole patches.

    Raises CheckpointError (missing, broken) and Unsupported (towers that are resized differently).
    """
    path = folder / "preprocessor_config.json"
    if not path.is_file():
        raise CheckpointError(f"{path}: missing; it says how pictures are resized and normalised")
    table = read_json(path)
    if not isinstance(table, dict):
        raise CheckpointError(f"{path}: not an object")
    resize, crop, normal = (_per_tower(path, table, f"tvf_{k}_params", towers) for k in ("resize", "crop", "normalize"))
    if any(r != resize[0] for r in resize) or any(c != crop[0] for c in crop):
        raise Unsupported(f"{path}: towers are resized or cropped differently: {resize}, {crop}")
    height, width = _pair(path, crop[0].get("output_size"))
    side, patch = towers[0].image_size, towers[0].patch_size
    if any(v // patch * patch != side for v in (height, width)):
        raise CheckpointError(f"{path}: pictures of {height}x{width} for towers of {side}")
    size = resize[0].get("size")
    size = size[0] if isinstance(size, list) and len(size) == 1 else size
    kind = resize[0].get("interpolation", 2)
    if isinstance(kind, bool) or not (kind in range(len(FILTERS)) or kind in FILTERS):
        raise CheckpointError(f"{path}: interpolation {kind!r}; known: 0..{len(FILTERS) - 1} or {', '.join(FILTERS)}")
    steps = []
    if table.get("tvf_do_letterbox"):
        steps.append(Step("square", {"fill": _fill(path, table.get("tvf_letterbox_fill"))}))
    steps.append(
        Step(
            "pillow_resize",
            {
                "size": size if isinstance(size, int) else list(_pair(path, size)),
                "filter": FILTERS[kind] if isinstance(kind, int) else kind,
            },
        )
    )
    if isinstance(size, int):
        steps.append(Step("centre_crop", {"height": height, "width": width}))
    means, stds = ([_channels(path, n.get(k), k) for n in normal] for k in ("mean", "std"))
    steps.append(Step("stack_normalised", {"mean": means, "std": stds}))
    if (height, width) != (side, side):
        steps.append(Step("top_left", {"height": side, "width": side}))
    return tuple(steps)


def _per_tower(path: Path, table: dict[str, Any], key: str, towers: Sequence[TowerSpec]) -> list[dict[str, Any]]:
    value = table.get(key)
    if not isinstance(value, list) or len(value) != len(towers) or not all(isinstance(v, dict) for v in value):
        raise CheckpointError(f"{path}: {key} needs one entry for each of {len(towers)} towers")
    return value


def _pair(path: Path, value: Any) -> tuple[int, int]:
    if isinstance(value, int) and not isinstance(value, bool):
        value = [value, value]
    if not isinstance(value, list) or len(value) != 2 or not all(type(v) is int and 0 < v < 8192 for v in value):
        raise CheckpointError(f"{path}: {value!r} is not a picture size")
    return value[0], value[1]


def _channels(path: Path, value: Any, what: str) -> list[float]:
    numbers = isinstance(value, list) and len(value) == 3 and all(type(v) in (int, float) for v in value)
    if not numbers or (what == "std" and 0 in value):
        raise CheckpointError(f"{path}: {what} {value!r}, expected three numbers")
    return [float(v) for v in value]


def _fill(path: Path, value: Any) -> list[int]:
    if not isinstance(value, list) or len(value) != 3 or not all(type(v) is int and 0 <= v < 256 for v in value):
        raise CheckpointError(f"{path}: tvf_letterbox_fill {value!r}, expected three bytes")
    return value
