"""Features of a dataset to be written: what they may be, values checked against them, and their Arrow columns.

The Arrow types and the pandas and Hugging Face notes in the schema are those that LeRobot 0.6.1 writes.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from vlac.datasets.layout import PICTURES, Feature
from vlac.datasets.tables import need
from vlac.errors import InputError

NpArray = np.ndarray[Any, Any]

NUMBERS = ("float32", "float64", "int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64", "bool")
DEFAULTS = {
    "timestamp": Feature("timestamp", "float32", (1,)),
    "frame_index": Feature("frame_index", "int64", (1,)),
    "episode_index": Feature("episode_index", "int64", (1,)),
    "index": Feature("index", "int64", (1,)),
    "task_index": Feature("task_index", "int64", (1,)),
}
"""Columns that every dataset has and no caller gives."""


def check_features(given: Mapping[str, Any]) -> dict[str, Feature]:
    """Features in LeRobot's form ({key: {"dtype", "shape", "names"}}) or as `Feature`s, checked.

    Raises InputError naming the feature, what it is and what can be written.
    """
    result = {}
    for key, entry in given.items():
        if key in DEFAULTS:
            continue
        if not isinstance(key, str) or not key or "/" in key or key == "task":
            raise InputError(f"feature {key!r}: a key is text without '/', and not 'task'")
        feature = entry if isinstance(entry, Feature) else _feature(key, entry)
        if feature.dtype in PICTURES:
            if len(feature.shape) != 3 or feature.shape[2] != 3 or feature.depth:
                raise InputError(f"feature {key!r}: shape {list(feature.shape)}, expected [height, width, 3] of RGB")
            if feature.dtype == "video" and (feature.shape[0] % 2 or feature.shape[1] % 2):
                raise InputError(
                    f"feature {key!r}: a video of {feature.shape[0]}x{feature.shape[1]}; H.264 with 4:2:0 colour needs "
                    "even sizes",
                    remedy='record this camera with dtype "image", or crop it',
                )
        elif feature.dtype not in NUMBERS or len(feature.shape) != 1 or not feature.shape[0]:
            raise InputError(
                f"feature {key!r}: {feature.dtype} {list(feature.shape)} cannot be recorded",
                remedy=f"give image, video, or one axis of {', '.join(NUMBERS)}",
            )
        result[key] = feature
    if not result:
        raise InputError("a dataset needs at least one feature")
    return result


def _feature(key: str, entry: Any) -> Feature:
    try:
        shape = tuple(int(d) for d in entry["shape"])
        return Feature(key, str(entry["dtype"]), shape, entry.get("names"))
    except (KeyError, TypeError, ValueError, AttributeError):
        raise InputError(
            f'feature {key!r}: {entry!r}, expected {{"dtype": ..., "shape": [...], "names": [...]}}'
        ) from None


def as_info(features: Mapping[str, Feature], fps: int) -> dict[str, Any]:
    """The "features" of meta/info.json, default columns included."""
    result: dict[str, Any] = {}
    for key, f in {**features, **DEFAULTS}.items():
        names = f.names if f.names is not None or f.dtype not in PICTURES else ["height", "width", "channels"]
        result[key] = {"dtype": f.dtype, "shape": list(f.shape), "names": names}
        if f.dtype == "video":
            result[key]["info"] = {
                "video.height": f.shape[0],
                "video.width": f.shape[1],
                "video.codec": "h264",
                "video.pix_fmt": "yuv420p",
                "video.fps": fps,
                "video.channels": 3,
                "has_audio": False,
                "is_depth_map": False,
            }
    return result


def value_of(feature: Feature, value: Any) -> NpArray:
    """A value as the array that is stored; InputError names the feature, what was given and what it must be."""
    array = np.asarray(value)
    if array.shape == () and feature.shape == (1,):
        array = array[None]
    dtype = "uint8" if feature.dtype in PICTURES else feature.dtype
    if array.shape != feature.shape or array.dtype.hasobject or not np.can_cast(array.dtype, dtype, "same_kind"):
        raise InputError(
            f"feature {feature.key!r} was given {array.dtype} {list(array.shape)}, "
            f"expected {dtype} {list(feature.shape)}"
        )
    if feature.dtype in PICTURES and array.dtype != np.uint8:
        raise InputError(f"feature {feature.key!r} was given {array.dtype}, expected uint8 pictures of 0 to 255")
    if array.dtype.kind == "f" and not np.isfinite(array).all():
        raise InputError(f"feature {feature.key!r} holds NaN or Inf: it would spoil the dataset's statistics")
    return array.astype(dtype, copy=True)


def data_table(features: Mapping[str, Feature], columns: Mapping[str, Any]) -> Any:
    """The rows of an episode as an Arrow table: pictures as lists of PNG bytes, numbers as arrays [n, d]."""
    pa = need("pyarrow")
    arrays: dict[str, Any] = {}
    notes: dict[str, Any] = {}
    for key, feature in {**features, **DEFAULTS}.items():
        if feature.dtype == "video":
            continue
        if feature.dtype == "image":
            kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
            cells = [{"bytes": b, "path": f"frame-{i:06d}.png"} for i, b in enumerate(columns[key])]
            arrays[key], notes[key] = pa.array(cells, kind), {"_type": "Image"}
            continue
        values = np.ascontiguousarray(columns[key])
        flat = pa.array(values.ravel())
        value = {"dtype": feature.dtype, "_type": "Value"}
        if feature.shape == (1,):
            arrays[key], notes[key] = flat, value
        else:
            arrays[key] = pa.FixedSizeListArray.from_arrays(flat, feature.shape[0])
            notes[key] = {"feature": value, "length": feature.shape[0], "_type": "List"}
    note = {"huggingface": json.dumps({"info": {"features": notes}})}
    return pa.table(arrays).replace_schema_metadata(note)


def tasks_table(tasks: Sequence[str]) -> Any:
    """meta/tasks.parquet: task_index, with the instruction as pandas' index (LeRobot looks tasks up by it)."""
    pa = need("pyarrow")
    columns = [
        {"name": "task_index", "field_name": "task_index", "pandas_type": "int64", "numpy_type": "int64"},
        {"name": "task", "field_name": "task", "pandas_type": "unicode", "numpy_type": "object"},
    ]
    names = {"name": None, "field_name": None, "pandas_type": "unicode", "numpy_type": "object"}
    note = {
        "index_columns": ["task"],
        "column_indexes": [{**names, "metadata": {"encoding": "UTF-8"}}],
        "columns": [{**c, "metadata": None} for c in columns],
        "creator": {"library": "pyarrow", "version": pa.__version__},
        "pandas_version": "2.2.0",
    }
    table = pa.table(
        {"task_index": pa.array(range(len(tasks)), pa.int64()), "task": pa.array(list(tasks), pa.string())}
    )
    return table.replace_schema_metadata({"pandas": json.dumps(note)})
