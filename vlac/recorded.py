"""Recorded observations for parity, calibration and golden answers, whatever they lie in: a LeRobotDataset folder, an
observations/ folder (pictures and one JSON), or an .npz (vlac/observations.py). Needs no engine and no checkpoint.

An observations/ folder holds index.json, {"observations": [{"images": {camera key: "file.png"}, "state": [...],
"task": "...", ...}]}, and the pictures beside it. Beside a checkpoint's config.json or beside an artifact it is the
default that parity and calibration take.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from vlac.artifact import Golden
from vlac.errors import DatasetError, InputError
from vlac.io import IO
from vlac.observations import load_observations

if TYPE_CHECKING:
    from vlac.datasets import Frame
    from vlac.datasets.layout import Episode

NpArray = np.ndarray[Any, Any]

FOLDER, INDEX = "observations", "index.json"


@dataclass(frozen=True)
class Recorded:
    """Where observations lie, and `rename`: its camera names -> those of the policy (full keys or their last parts)."""

    path: Path
    rename: Mapping[str, str] = field(default_factory=dict)

    @property
    def is_dataset(self) -> bool:
        return (self.path / "meta" / "info.json").is_file()

    @property
    def is_folder(self) -> bool:
        return (self.path / INDEX).is_file()

    def take(self, io: IO, count: int | None) -> tuple[Golden, ...]:
        """At most `count` observations (None: all), spread over what there is, checked against the policy's inputs.

        Of a dataset: spread over its episodes and over each episode. Noise is seeded; chunks are empty unless an .npz
        holds some.

        Raises: InputError (cameras, state or pictures that do not fit, with what there is and what is wanted),
        DatasetError (broken files), VlacError (pyarrow or av missing).
        """
        if count is not None and count < 1:
            raise InputError(f"{count} observations were asked for; at least 1 is needed")
        if self.is_dataset:
            return self._of_dataset(io, count)
        if self.is_folder:
            return self._of_folder(io, count)
        if self.path.is_dir():
            raise InputError(
                f"{self.path} holds neither meta/info.json (a LeRobotDataset) nor {INDEX} (recorded observations)",
                remedy="give a dataset's folder, an observations/ folder or an .npz file",
            )
        if self.rename:
            raise InputError(f"{self.path}: cameras of an .npz are not renamed; its keys are the policy's")
        return load_observations(self.path, io)[:count]

    def describe(self) -> str:
        """For reports: what it is and its name, without its place."""
        if self.is_dataset:
            return f"dataset {self.path.resolve().name}"
        return f"recorded observations ({self.path.resolve().name}/)" if self.is_folder else f"given: {self.path.name}"

    def _of_dataset(self, io: IO, count: int | None) -> tuple[Golden, ...]:
        from vlac.datasets import open_dataset

        with open_dataset(self.path) as dataset:
            named = match_cameras(io, dataset.cameras, self.rename, str(self.path))
            chosen = spread(dataset.episodes, len(dataset) if count is None else count)
            if not chosen:
                raise InputError(f"{self.path} holds no frames")
            frames = dataset.frames(chosen, list(named.values()))
            return tuple(_golden(io, f, named, i, str(self.path)) for i, f in enumerate(frames))

    def _of_folder(self, io: IO, count: int | None) -> tuple[Golden, ...]:
        entries = read_index(self.path)
        keys = tuple(dict.fromkeys(k for e in entries for k in e["images"]))
        named = match_cameras(io, keys, self.rename, str(self.path))
        some = min(count or len(entries), len(entries))
        frames = [_read_entry(self.path, entries[i * len(entries) // some], named) for i in range(some)]
        return tuple(_golden(io, f, named, i, str(self.path)) for i, f in enumerate(frames))


def beside(path: Path) -> Recorded | None:
    """The observations/ folder of a checkpoint or artifact (folder or file), None when there is none."""
    home = path if path.is_dir() else path.parent
    found = Recorded(home / FOLDER)
    return found if found.is_folder else None


# --- which cameras -----------------------------------------------------------------------------------------------


def match_cameras(io: IO, there: Sequence[str], rename: Mapping[str, str], where: str) -> dict[str, str]:
    """Policy camera key -> recorded camera key.

    By `rename`, by the policy's own renaming, by the same key, then by the same last part where that is unambiguous.
    Cameras that the policy may miss stay out when nothing is called like them.

    Raises InputError naming both sides when a camera that is needed is not there, or `rename` names what is not.
    """
    wanted = [c.key for c in io.cameras]
    given = {_one(source, there, f"{where}: --rename", "recorded"): target for source, target in rename.items()}
    renamed = {_one(target, wanted, f"{where}: --rename", "policy"): source for source, target in given.items()}
    if len(renamed) < len(given):
        raise InputError(f"{where}: --rename gives two cameras the same name")
    free = [k for k in there if k not in given]
    result = dict(renamed)
    for key in (k for k in wanted if k not in renamed):
        alike = [k for k in free if io.rename.get(k, k) == key] or [k for k in free if _last(k) == _last(key)]
        if len(alike) == 1:
            result[key] = alike[0]
    missing = [c for c in io.cameras if c.key not in result]
    if len(missing) > io.max_missing_cameras or not result:
        spare = [k for k in free if k not in result.values()]
        raise InputError(
            f"{where} has no camera {', '.join(_last(c.key) for c in missing)}: "
            f"the policy takes {', '.join(wanted)}; recorded are {', '.join(there) or 'none'}",
            remedy=f"say which is which: --rename {_last(spare[0]) if spare else 'THEIRS'}={_last(missing[0].key)}",
        )
    return {k: result[k] for k in wanted if k in result}


def _one(name: str, keys: Sequence[str], where: str, whose: str) -> str:
    if name in keys:
        return name
    alike = [k for k in keys if _last(k) == name]
    if len(alike) != 1:
        raise InputError(f"{where}: {name!r} is no {whose} camera; there are {', '.join(keys) or 'none'}")
    return alike[0]


def _last(key: str) -> str:
    return key.rsplit(".", 1)[-1]


# --- which frames ------------------------------------------------------------------------------------------------


def spread(episodes: Sequence[Episode], count: int) -> list[int]:
    """`count` frame numbers in rising order (all frames if there are fewer), the same every time: evenly over episodes,
    and over the length of episodes by steps of the golden ratio, so that beginnings and ends are both there."""
    filled = [e for e in episodes if e.length]
    total = sum(e.length for e in filled)
    count = min(count, total)
    if count <= 0:
        return []
    turns = math.ceil(count / len(filled))
    taken: set[int] = set()
    for k in range(count):
        episode = filled[k * len(filled) // count] if turns == 1 else filled[k % len(filled)]
        part = (k // len(filled) + (k * 0.6180339887) % 1) / turns
        number = episode.start + min(int(part * episode.length), episode.length - 1)
        while number in taken:
            number = (number + 1) % total
        taken.add(number)
    return sorted(taken)


def _golden(io: IO, frame: Frame, named: Mapping[str, str], i: int, where: str) -> Golden:
    at = f"{where}: episode {frame['episode']}, frame {frame['frame']}"
    state = np.asarray(frame["state"], np.float32)
    if not io.state_dim:
        state = np.zeros(0, np.float32)
    if state.shape != (io.state_dim,):
        raise InputError(
            f"{at}: the state has {state.size} numbers, the policy takes {io.state_dim}",
            remedy="this recording is of another robot, or its state has other parts",
        )
    if not np.isfinite(state).all():
        raise InputError(f"{at}: the state holds NaN or Inf")
    images = {mine: frame["images"][theirs] for mine, theirs in named.items() if theirs in frame["images"]}
    rng = np.random.Generator(np.random.PCG64([1, i]))
    noise = np.asarray(rng.standard_normal(io.noise_shape), dtype=np.float32)
    empty = np.zeros((0, 0), np.float32)
    return Golden(images=images, state=state, task=frame["task"], noise=noise, chunk=empty, chunk_normalised=empty)


# --- an observations/ folder -------------------------------------------------------------------------------------


def read_index(folder: Path) -> list[dict[str, Any]]:
    """The entries of an observations/ folder, checked: DatasetError names the entry and the key."""
    from vlac.datasets.layout import read_json

    path = folder / INDEX
    found = read_json(path)
    entries = found.get("observations") if isinstance(found, dict) else None
    if not isinstance(entries, list) or not entries:
        raise DatasetError(f"{path}: key 'observations' is no list of observations")
    for i, entry in enumerate(entries):
        good = isinstance(entry, dict) and isinstance(entry.get("images"), dict) and isinstance(entry.get("task"), str)
        good = good and all(isinstance(f, str) for f in entry["images"].values())
        if not good or not isinstance(entry.get("state"), list):
            raise DatasetError(
                f"{path}: observation {i} needs 'images' (key: file), 'state' (numbers) and 'task' (text)"
            )
        if not all(isinstance(v, (int, float)) and not isinstance(v, bool) for v in entry["state"]):
            raise DatasetError(f"{path}: observation {i}: 'state' holds other things than numbers")
    return entries


def _read_entry(folder: Path, entry: Mapping[str, Any], named: Mapping[str, str]) -> Frame:
    from vlac.datasets.layout import fill, inside
    from vlac.datasets.pictures import decode

    images = {}
    for key in named.values():
        if key in entry["images"]:
            path = inside(folder, fill(entry["images"][key], {}))
            images[key] = decode(path.read_bytes(), str(path))
    return {
        "images": images,
        "state": np.array(entry["state"], np.float32),
        "task": entry["task"],
        "action": None,
        "episode": int(entry.get("episode", 0)),
        "frame": int(entry.get("frame", 0)),
        "timestamp": 0.0,
    }


def write_folder(folder: Path, frames: Sequence[Mapping[str, Any]], note: Mapping[str, Any]) -> None:
    """Writes frames ({"images", "state", "task", and what else JSON can hold}) as an observations/ folder.

    `note` goes into index.json beside them (how they were made). The same frames give the same bytes.
    """
    from vlac.datasets.pictures import encode_png

    folder.mkdir(parents=True, exist_ok=True)
    entries = []
    for i, frame in enumerate(frames):
        files = {}
        for key, picture in frame["images"].items():
            files[key] = f"{i:03d}_{_last(key)}.png"
            (folder / files[key]).write_bytes(encode_png(np.ascontiguousarray(picture), 9))
        rest = {k: v for k, v in frame.items() if k not in ("images", "state", "action")}
        arrays = {k: [float(x) for x in frame[k]] for k in ("state", "action") if frame.get(k) is not None}
        entries.append({"images": files, **arrays, **rest})
    text = json.dumps({**note, "observations": entries}, indent=1, ensure_ascii=False)
    (folder / INDEX).write_text(text + "\n", encoding="utf-8")
