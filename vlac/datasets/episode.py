"""An episode that is being recorded: its frames as they will be stored, pictures already encoded, and its statistics.

A writer commits it whole; several may be open at a time (one per robot, or per client of a server).
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from vlac.datasets import statistics
from vlac.datasets.columns import value_of
from vlac.datasets.files import UNFINISHED
from vlac.datasets.layout import Feature
from vlac.datasets.pictures import encode_png
from vlac.datasets.video import VideoWriter
from vlac.errors import InputError

NpArray = np.ndarray[Any, Any]


class OpenEpisode:
    """Frames in memory (pictures as PNG), videos in unfinished files of the dataset's folder.

    Attributes:
        tasks: the instruction of each frame.
        nbytes: of the pictures and numbers held.
        videos: camera key -> its file's writer.
    """

    def __init__(self, root: Path, number: int, features: Mapping[str, Feature], fps: int, png_level: int) -> None:
        self.features, self.fps = features, fps
        self.tasks: list[str] = []
        self.nbytes = 0
        self.videos: dict[str, VideoWriter] = {}
        self._root, self._number, self._png_level = root, number, png_level
        self._columns: dict[str, list[Any]] = {k: [] for k, f in features.items() if f.dtype != "video"}
        self._pictures = {k: statistics.Pictures() for k, f in features.items() if f.is_picture}

    def __len__(self) -> int:
        return len(self.tasks)

    def add(self, frame: Mapping[str, Any], task: str | None = None) -> None:
        """One moment: a value for every feature, and the instruction (as `task` or frame["task"]).

        Raises InputError naming what does not fit; nothing of the frame is kept then.
        """
        text = frame.get("task") if task is None else task
        if not isinstance(text, str):
            raise InputError(f"a frame needs its instruction; task is {text!r}")
        given, wanted = set(frame) - {"task"}, set(self.features)
        if given != wanted:
            missing, unknown = sorted(wanted - given), sorted(given - wanted)
            raise InputError(
                f"the frame {f'lacks {missing}' if missing else ''}{' and ' if missing and unknown else ''}"
                f"{f'has {unknown}, which the dataset has not' if unknown else ''}"
            )
        values = {key: value_of(f, frame[key]) for key, f in self.features.items()}
        for key, value in values.items():
            feature = self.features[key]
            if feature.is_picture:
                self._pictures[key].add(value)
            if feature.dtype == "video":
                self._video(key, feature).add(value)
                continue
            stored = encode_png(value, self._png_level) if feature.is_picture else value
            self.nbytes += len(stored) if isinstance(stored, bytes) else value.nbytes
            self._columns[key].append(stored)
        self.tasks.append(text)

    def unfinished(self, key: str) -> Path:
        """Where the video of a camera lies until it is committed."""
        return self._root / f".{key}.{self._number}.mp4{UNFINISHED}"

    def _video(self, key: str, feature: Feature) -> VideoWriter:
        if key not in self.videos:
            self.videos[key] = VideoWriter(self.unfinished(key), self.fps, feature.shape[0], feature.shape[1])
        return self.videos[key]

    def columns(self, index: int, start: int, tasks: Mapping[str, int]) -> dict[str, Any]:
        """As episode `index` whose first frame is number `start`: pictures as PNG bytes, the rest as arrays."""
        counting = np.arange(len(self))
        result: dict[str, Any] = {k: v if k in self._pictures else np.stack(v) for k, v in self._columns.items()}
        result |= {"timestamp": (counting / self.fps).astype(np.float32), "frame_index": counting}
        result |= {"episode_index": np.full(len(self), index), "index": start + counting}
        return result | {"task_index": np.array([tasks[t] for t in self.tasks])}

    def statistics(self, columns: Mapping[str, Any]) -> dict[str, statistics.Stats]:
        """Of every feature and default column."""
        result = {key: pictures.result() for key, pictures in self._pictures.items()}
        for key, values in columns.items():
            if key not in self._pictures:
                result[key] = statistics.of_vectors(values.reshape(len(values), -1))
        return result

    def discard(self) -> None:
        """Forgets it, and removes its unfinished videos."""
        for key, video in self.videos.items():
            video.abandon()
            self.unfinished(key).unlink(missing_ok=True)
        self.videos = {}
