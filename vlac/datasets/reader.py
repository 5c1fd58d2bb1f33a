"""open_dataset: a recorded dataset as frames by number. Only what a frame needs is read and decoded."""

from __future__ import annotations

import bisect
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, TypedDict, TypeVar

import numpy as np

from vlac.datasets.layout import (
    INFO,
    STATS,
    Episode,
    Feature,
    Info,
    episodes_v2,
    inside,
    read_info,
    read_json,
    tasks_v2,
)
from vlac.datasets.pictures import decode
from vlac.datasets.tables import Rows, episodes_v3, tasks_v3
from vlac.datasets.video import TOLERANCE, Video
from vlac.errors import DatasetError, InputError, Unsupported

NpArray = np.ndarray[Any, Any]

STATE, ACTION = "observation.state", "action"
OPEN_FILES = 8
"""Parquet files and videos kept open, each."""

T = TypeVar("T", Rows, Video)


class Frame(TypedDict):
    """One moment of a recording.

    images: camera key -> uint8 [H, W, 3] RGB. state: float32 [S], empty when the dataset has none. action: float32 [A],
    or None. episode, frame: its numbers, both from 0. timestamp: seconds since the episode began.
    """

    images: dict[str, NpArray]
    state: NpArray
    task: str
    action: NpArray | None
    episode: int
    frame: int
    timestamp: float


def open_dataset(path: str | Path) -> Dataset:
    """Opens a LeRobotDataset folder (v3.x, v2.1, v2.0); reads its metadata, no frame yet.

    Raises:
        DatasetError: the folder holds none, or its metadata is broken: file, key or column, what was expected.
        Unsupported: another version. VlacError: pyarrow is missing.
    """
    root = Path(path)
    if root.name == "info.json" and root.parent.name == "meta":
        root = root.parent.parent
    info = read_info(root)
    if info.version[0] == 2:
        return Dataset(root, info, episodes_v2(root, info), tasks_v2(root))
    if not info.total_episodes:
        return Dataset(root, info, (), {})
    return Dataset(root, info, episodes_v3(root, info), tasks_v3(root))


class Dataset:
    """An opened dataset: frames by number, from 0 to len - 1, episode after episode. Not thread-safe.

    Attributes:
        path, info, fps: the folder, its info.json, frames per second.
        cameras: keys of the features that are pictures.
        episodes: all of them, in order.
        tasks: task_index -> instruction.
    """

    def __init__(self, path: Path, info: Info, episodes: tuple[Episode, ...], tasks: dict[int, str]) -> None:
        self.path, self.info, self.episodes, self.tasks = path, info, episodes, tasks
        self.fps = info.fps
        self.cameras = tuple(f.key for f in info.features.values() if f.is_picture)
        self._starts = [e.start for e in episodes]
        self._rows: OrderedDict[tuple[str, tuple[str, ...]], Rows] = OrderedDict()
        self._videos: OrderedDict[str, Video] = OrderedDict()

    def __len__(self) -> int:
        return self.info.total_frames

    def __enter__(self) -> Dataset:
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        """Closes the files that are open; the dataset can still be used."""
        for rows in self._rows.values():
            rows.close()
        for video in self._videos.values():
            video.close()
        self._rows.clear()
        self._videos.clear()

    def locate(self, index: int) -> tuple[Episode, int]:
        """The episode of frame `index`, and the frame's number in it; InputError outside the dataset."""
        if not 0 <= index < len(self):
            raise InputError(f"{self.path} has frames 0 to {len(self) - 1}; asked for {index}")
        episode = self.episodes[bisect.bisect_right(self._starts, index) - 1]
        return episode, index - episode.start

    def statistics(self) -> dict[str, Any] | None:
        """meta/stats.json as it stands, None where there is none (v2.1 keeps them by episode)."""
        found = read_json(self.path / STATS) if (self.path / STATS).is_file() else None
        if found is not None and not isinstance(found, dict):
            raise DatasetError(f"{self.path / STATS} is not a JSON object")
        return found

    def frame(self, index: int, cameras: Sequence[str] | None = None) -> Frame:
        """Frame `index` with pictures of `cameras` (None: all).

        Raises:
            InputError: no such frame or camera.
            DatasetError: file, column and what was expected.
        """
        episode, number = self.locate(index)
        wanted = [self._camera(key) for key in (self.cameras if cameras is None else cameras)]
        has = self.info.features
        columns = ["episode_index", "task_index", "timestamp"] + [k for k in (STATE, ACTION) if k in has]
        columns += [f.key for f in wanted if f.dtype == "image"]
        rows = self._opened(self._rows, (episode.data, tuple(columns)), lambda p: Rows(p, columns), episode.data)
        row = {key: value.as_py() for key, value in rows.row(episode.row + number).items()}
        where = f"{rows.path}: row {episode.row + number}"
        self._check_row(where, row, episode)
        state = self._vector(where, row, STATE)
        return Frame(
            images={f.key: self._picture(f, episode, row, where) for f in wanted},
            state=np.zeros(0, np.float32) if state is None else state,
            task=self._task(where, row["task_index"]),
            action=self._vector(where, row, ACTION),
            episode=episode.index,
            frame=number,
            timestamp=float(row["timestamp"]),
        )

    def frames(self, indices: Iterable[int], cameras: Sequence[str] | None = None) -> Iterator[Frame]:
        """The frames asked for, in that order, one at a time; in rising order they are read fastest."""
        return (self.frame(i, cameras) for i in indices)

    def _camera(self, key: str) -> Feature:
        feature = self.info.features.get(key)
        if feature is None or not feature.is_picture:
            raise InputError(f"{self.path} has no camera {key!r}; it has {', '.join(self.cameras) or 'none'}")
        return feature

    def _opened(self, cache: OrderedDict[Any, T], key: Any, make: Callable[[Path], T], relative: str) -> T:
        if key not in cache:
            cache[key] = make(inside(self.path, relative))
            if len(cache) > OPEN_FILES:
                cache.popitem(last=False)[1].close()
        cache.move_to_end(key)
        return cache[key]

    def _check_row(self, where: str, row: dict[str, Any], episode: Episode) -> None:
        if row["episode_index"] != episode.index:
            raise DatasetError(
                f"{where}: column 'episode_index' is {row['episode_index']!r}; "
                f"the metadata puts episode {episode.index} there"
            )
        at = row["timestamp"]
        if not isinstance(at, float) or not np.isfinite(at):
            raise DatasetError(f"{where}: column 'timestamp' is {at!r}, expected seconds")

    def _task(self, where: str, index: Any) -> str:
        if index not in self.tasks:
            raise DatasetError(f"{where}: column 'task_index' is {index!r}; the tasks are {sorted(self.tasks)[:8]}")
        return self.tasks[index]

    def _vector(self, where: str, row: dict[str, Any], key: str) -> NpArray | None:
        if key not in row:
            return None
        feature, value = self.info.features[key], row[key]
        if len(feature.shape) != 1:
            raise Unsupported(f"{self.path / INFO}: feature {key!r} has shape {list(feature.shape)}, expected one axis")
        values = value if isinstance(value, list) else [value]
        if len(values) != feature.shape[0] or not all(isinstance(v, (int, float)) for v in values):
            raise DatasetError(
                f"{where}: column {key!r} holds {_short(value)}, expected {feature.shape[0]} numbers ({INFO})"
            )
        return np.array(values, dtype=np.float32)

    def _picture(self, feature: Feature, episode: Episode, row: dict[str, Any], where: str) -> NpArray:
        if feature.dtype == "image":
            value = row[feature.key]
            data = value.get("bytes") if isinstance(value, dict) else value
            return decode(data, f"{where}: column {feature.key!r}")
        relative, begin = episode.videos[feature.key]
        video = self._opened(self._videos, relative, Video, relative)
        at = float(row["timestamp"])
        # timestamps are stored as float32: after some minutes their rounding is no longer small beside the tolerance
        return video.frame(begin + at, TOLERANCE + float(np.spacing(np.float32(at))))


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) < 60 else text[:57] + "..."
