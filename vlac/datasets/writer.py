"""Writer: records a LeRobotDataset v3 that LeRobot loads, safe against being killed.

An episode is committed when meta/info.json counts it; that file is written last. Until then its rows, videos and
metadata lie behind what is counted, where no reader looks. So a kill at any moment loses at most the open episode.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np

from vlac.datasets import statistics
from vlac.datasets.columns import as_info, check_features, data_table, tasks_table
from vlac.datasets.episode import OpenEpisode
from vlac.datasets.files import UNFINISHED, put, replace_json, replace_with
from vlac.datasets.layout import (
    CHUNKS_SIZE,
    DATA_PATH,
    EPISODES_PATH,
    INFO,
    STATS,
    TASKS,
    VIDEO_PATH,
    Feature,
    fill,
    read_info,
    read_json,
)
from vlac.datasets.tables import need, refusals, tasks_v3
from vlac.errors import DatasetError, InputError

NpArray = np.ndarray[Any, Any]

PACK_BYTES = 8 << 20
"""A data file grows, by being written again with the next episode, until it is this large."""
PACK_EPISODES = 64
"""Episodes per file at most: it is written again with each of them."""


class Writer:
    """Records episodes: `add_frame` for each moment, `save_episode` to commit them.

    Args:
        path: the dataset's folder; it must not hold a dataset yet (`Writer.resume` goes on with one).
        features: LeRobot's form, {key: {"dtype": ..., "shape": [...], "names": [...]}}; dtype "image" stores PNG
            exactly, "video" H.264 (smaller, not exact), numbers have one axis. The columns timestamp, frame_index,
            episode_index, index and task_index come by themselves.
        fps: frames per second, whole.
        robot_type: a note in info.json.
        png_level: zlib level of pictures.

    Several episodes may be open at a time (`begin`, `commit`). One writer per folder (a second is refused). Not
    thread-safe.
    Raises: InputError for features and frames that do not fit, DatasetError for a folder that is taken or broken.
    """

    def __init__(
        self,
        path: str | Path,
        features: Mapping[str, Any],
        fps: int,
        *,
        robot_type: str | None = None,
        png_level: int = 1,
    ) -> None:
        root = Path(path)
        checked = check_features(features)
        if isinstance(fps, bool) or not isinstance(fps, int) or fps < 1:
            raise InputError(f"fps={fps!r}, expected a whole number of frames per second")
        need("pyarrow.parquet")
        if root.exists() and (not root.is_dir() or any(root.iterdir())):
            raise DatasetError(
                f"{root} exists and is not an empty folder",
                remedy="give a new folder, or go on with a dataset: Writer.resume(path)",
            )
        root.mkdir(parents=True, exist_ok=True)
        self._open(root, checked, fps, png_level)
        self._info: dict[str, Any] = {
            "codebase_version": "v3.0",
            "fps": fps,
            "features": as_info(checked, fps),
            "total_episodes": 0,
            "total_frames": 0,
            "total_tasks": 0,
            "chunks_size": CHUNKS_SIZE,
            "data_files_size_in_mb": 100,
            "video_files_size_in_mb": 200,
            "data_path": DATA_PATH,
            "video_path": VIDEO_PATH,
            "robot_type": robot_type,
            "splits": {},
        }
        replace_json(root / INFO, self._info)

    @classmethod
    def resume(cls, path: str | Path, *, png_level: int = 1) -> Writer:
        """Goes on with a v3 dataset (one of LeRobot's too); removes what a killed recording left uncommitted."""
        root = Path(path)
        info = read_info(root)
        if info.version[0] != 3:
            raise DatasetError(f"{root / INFO}: version {info.version}; only v3 datasets are added to")
        self = cls.__new__(cls)
        self._open(root, check_features(info.features), int(info.fps), png_level)
        self._info = {
            "data_path": DATA_PATH,
            "video_path": VIDEO_PATH,
            "chunks_size": CHUNKS_SIZE,
            **read_json(root / INFO),
        }
        try:
            self._take_up()
        except BaseException:
            self.close()
            raise
        return self

    def _open(self, root: Path, features: dict[str, Feature], fps: int, png_level: int) -> None:
        import fcntl  # POSIX; reading works without

        self.path, self.features, self.fps = root, features, fps
        self._png_level = png_level
        self._lock = os.open(root, os.O_RDONLY)
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            os.close(self._lock)
            self._lock = -1
            raise DatasetError(
                f"{root} is being recorded to by another process", remedy="give another folder"
            ) from None
        self._tasks: list[str] = []
        self._stats: dict[str, statistics.Stats] = {}
        self._last: dict[str, Any] = {}
        self._begun = 0
        self._open_episodes: list[OpenEpisode] = []
        self._current: OpenEpisode | None = None

    # --- open episodes ---

    @property
    def episodes(self) -> int:
        """How many are committed."""
        return int(self._info["total_episodes"])

    def begin(self) -> OpenEpisode:
        """An episode of its own, beside others that are open: `add` its frames, then `commit` or `discard` it."""
        if self._lock < 0:
            raise InputError(f"the writer of {self.path} is closed")
        episode = OpenEpisode(self.path, self._begun, self.features, self.fps, self._png_level)
        self._begun += 1
        self._open_episodes.append(episode)
        return episode

    def add_frame(self, frame: Mapping[str, Any], task: str | None = None) -> None:
        """One moment of the episode that `save_episode` commits; see OpenEpisode.add."""
        if self._current is None or self._lock < 0:
            self._current = self.begin()
        self._current.add(frame, task)

    def save_episode(self) -> int:
        """Commits what `add_frame` was given; see `commit`."""
        if self._current is None:
            raise InputError("the open episode has no frames")
        episode, self._current = self._current, None
        return self.commit(episode)

    def discard_episode(self) -> None:
        """Forgets what `add_frame` was given since the last commit."""
        if self._current is not None:
            self.discard(self._current)
            self._current = None

    def discard(self, episode: OpenEpisode) -> None:
        """Forgets an open episode."""
        episode.discard()
        self._open_episodes.remove(episode)

    # --- committing ---

    def commit(self, episode: OpenEpisode) -> int:
        """Commits an open episode; when this returns it survives a kill and a loss of power. Returns its number.

        When it fails (a full disk) the writer is closed, what is committed stays, and `resume` goes on.
        """
        if not len(episode):
            raise InputError("the open episode has no frames")
        try:
            index = self._commit(episode)
        except BaseException:
            self.close()
            raise
        self._open_episodes.remove(episode)
        return index

    def _commit(self, episode: OpenEpisode) -> int:
        frames, index, start = len(episode), self.episodes, int(self._info["total_frames"])
        tasks, known = list(dict.fromkeys(episode.tasks)), len(self._tasks)
        self._tasks += [t for t in tasks if t not in self._tasks]
        columns = episode.columns(index, start, {t: i for i, t in enumerate(self._tasks)})
        stats = episode.statistics(columns)
        row: dict[str, Any] = {"episode_index": index, "tasks": tasks, "length": frames}
        row |= self._write_data(columns) | {"dataset_from_index": start, "dataset_to_index": start + frames}
        for key, video in episode.videos.items():
            video.close()
            row |= self._put_video(key, episode.unfinished(key), frames)
        if len(self._tasks) > known:
            self._write_table(self.path / TASKS, tasks_table(self._tasks))
        row |= {f"stats/{k}/{name}": v.tolist() for k, one in stats.items() for name, v in one.items()}
        self._write_row(row)
        self._stats = {k: statistics.together([self._stats[k], s]) if k in self._stats else s for k, s in stats.items()}
        replace_json(self.path / STATS, statistics.as_lists(self._stats))
        self._info |= {"total_episodes": index + 1, "total_frames": start + frames, "total_tasks": len(self._tasks)}
        self._info["splits"] = {"train": f"0:{index + 1}"}
        replace_json(self.path / INFO, self._info)  # from here on the episode counts
        self._last = row
        return index

    def _write_data(self, columns: Mapping[str, Any]) -> dict[str, int]:
        """Adds the rows to the last data file while that is small, else begins the next."""
        pq = need("pyarrow.parquet")
        chunk, file = self._last_file("data")
        path = self.path / self._data_file(chunk, file)
        table = data_table(self.features, columns)
        before: Any = None
        if self._last and path.stat().st_size < PACK_BYTES:
            with refusals(path, "it cannot be read to add to it"):
                before = pq.ParquetFile(path)
                if before.num_row_groups >= PACK_EPISODES or not before.schema_arrow.equals(table.schema):
                    before = None
        if before is None and self._last:
            chunk, file = self._next(chunk, file)
            path = self.path / self._data_file(chunk, file)

        groups = before.num_row_groups if before is not None else 0

        def write(temporary: Path) -> None:
            with pq.ParquetWriter(temporary, table.schema, compression="snappy") as out:
                for group in range(groups):
                    out.write_table(before.read_row_group(group))
                out.write_table(table)  # one row group per episode, as LeRobot writes them

        replace_with(path, write)
        return {"data/chunk_index": chunk, "data/file_index": file}

    def _put_video(self, key: str, finished: Path, frames: int) -> dict[str, Any]:
        chunk, file = self._last_file(f"videos/{key}")
        if self._last:
            chunk, file = self._next(chunk, file)
        put(finished, self.path / self._video_file(key, chunk, file))
        names = {"chunk_index": chunk, "file_index": file, "from_timestamp": 0.0, "to_timestamp": frames / self.fps}
        return {f"videos/{key}/{name}": value for name, value in names.items()}

    def _write_row(self, row: dict[str, Any]) -> None:
        pq, pa = need("pyarrow.parquet"), need("pyarrow")
        chunk, file = self._last_file("meta/episodes")
        row |= {"meta/episodes/chunk_index": chunk, "meta/episodes/file_index": file}
        table, path = pa.Table.from_pylist([row]), self.path / self._episodes_file(chunk, file)
        before = None
        if self._last:
            with refusals(path, "it cannot be read to add to it"):
                before = pq.read_table(path, partitioning=None)
        if before is not None and len(before) < PACK_EPISODES and before.schema.equals(table.schema):
            table = pa.concat_tables([before, table]).combine_chunks()
        elif before is not None:
            chunk, file = self._next(chunk, file)
            row |= {"meta/episodes/chunk_index": chunk, "meta/episodes/file_index": file}
            table, path = pa.Table.from_pylist([row], table.schema), self.path / self._episodes_file(chunk, file)
        self._write_table(path, table)

    def _write_table(self, path: Path, table: Any) -> None:
        pq = need("pyarrow.parquet")
        replace_with(path, lambda temporary: pq.write_table(table, temporary, compression="snappy"))

    # --- where files lie ---

    def _last_file(self, what: str) -> tuple[int, int]:
        return int(self._last.get(f"{what}/chunk_index", 0)), int(self._last.get(f"{what}/file_index", 0))

    def _next(self, chunk: int, file: int) -> tuple[int, int]:
        return (chunk + 1, 0) if file + 1 >= int(self._info["chunks_size"]) else (chunk, file + 1)

    def _data_file(self, chunk: int, file: int) -> str:
        return fill(self._info["data_path"], {"chunk_index": chunk, "file_index": file})

    def _video_file(self, key: str, chunk: int, file: int) -> str:
        return fill(self._info["video_path"], {"video_key": key, "chunk_index": chunk, "file_index": file})

    def _episodes_file(self, chunk: int, file: int) -> str:
        return fill(EPISODES_PATH, {"chunk_index": chunk, "file_index": file})

    # --- taking up a recording that ended somewhere ---

    def _take_up(self) -> None:
        """Reads where the committed episodes end, and removes what lies behind them."""
        for left in (*self.path.glob(f".*{UNFINISHED}"), *self.path.glob(f"*/**/.*{UNFINISHED}")):
            left.unlink()
        if self.episodes:
            tasks = tasks_v3(self.path)
            if sorted(tasks) != list(range(len(tasks))):
                raise DatasetError(f"{self.path / TASKS}: column 'task_index' has gaps: {sorted(tasks)[:8]}")
            self._tasks = [tasks[i] for i in range(len(tasks))]
            self._last, self._stats = self._committed()
            self._trim(self._episodes_file(*self._last_file("meta/episodes")), "episode_index", self.episodes)
            self._trim(self._data_file(*self._last_file("data")), "index", int(self._info["total_frames"]))
        self._remove_behind("data", self._data_file)
        self._remove_behind("meta/episodes", self._episodes_file)
        for key, feature in self.features.items():
            if feature.dtype == "video":
                self._remove_behind(f"videos/{key}", functools.partial(self._video_file, key))

    def _committed(self) -> tuple[dict[str, Any], dict[str, statistics.Stats]]:
        """The metadata of the last committed episode, and the statistics of all of them."""
        pq = need("pyarrow.parquet")
        last: dict[str, Any] = {}
        parts: dict[str, list[statistics.Stats]] = {}
        for path in sorted((self.path / "meta" / "episodes").glob("*/*.parquet")):
            with refusals(path, "it cannot be read"):
                rows = pq.read_table(path, partitioning=None).to_pylist()
            for row in (r for r in rows if r["episode_index"] < self.episodes):
                last = max(last, row, key=lambda r: int(r.get("episode_index", -1)))
                found: dict[str, statistics.Stats] = {}
                for column, value in row.items():
                    if column.startswith("stats/"):
                        key, name = column.removeprefix("stats/").rsplit("/", 1)
                        found.setdefault(key, {})[name] = np.asarray(value)
                for key, one in found.items():
                    parts.setdefault(key, []).append(one)
        if last.get("episode_index") != self.episodes - 1:
            raise DatasetError(f"{self.path}/meta/episodes: episode {self.episodes - 1} of {INFO} is not there")
        return last, {key: statistics.together(some) for key, some in parts.items()}

    def _trim(self, relative: str, column: str, bound: int) -> None:
        """Drops the rows of a parquet file whose `column` is `bound` or more; leaves a file without any alone."""
        pq, pc = need("pyarrow.parquet"), need("pyarrow.compute")
        path = self.path / relative
        with refusals(path, f"column {column!r} cannot be read"):
            numbers = pq.read_table(path, columns=[column], partitioning=None).column(column)
            if pc.max(numbers).as_py() < bound:
                return
            before = pq.ParquetFile(path)

        def write(temporary: Path) -> None:
            with pq.ParquetWriter(temporary, before.schema_arrow, compression="snappy") as out:
                for group in range(before.num_row_groups):
                    table = before.read_row_group(group)
                    kept = table.filter(pc.less(table.column(column), bound))
                    if len(kept):
                        out.write_table(kept)

        with refusals(path, "it cannot be cut to the committed rows"):
            replace_with(path, write)

    def _remove_behind(self, what: str, file_of: Callable[[int, int], str]) -> None:
        """Removes the files that follow the last committed one."""
        chunk, file = self._last_file(what)
        if self._last:
            chunk, file = self._next(chunk, file)
        while (path := self.path / file_of(chunk, file)).is_file():
            path.unlink()
            chunk, file = self._next(chunk, file)

    # --- the end ---

    def close(self) -> None:
        """Forgets open episodes and lets the folder go; committed ones need nothing more."""
        if self._lock >= 0:
            for episode in self._open_episodes:
                episode.discard()
            self._open_episodes, self._current = [], None
            os.close(self._lock)
            self._lock = -1

    def __enter__(self) -> Writer:
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, at: TracebackType | None) -> None:
        self.close()
