"""Parquet files of a dataset, read row by row: one batch in memory, forwards without starting again.

Everything that pyarrow refuses becomes a DatasetError that names file and column.
"""

from __future__ import annotations

import bisect
import contextlib
import importlib
import itertools
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from vlac.datasets.layout import INFO, TASKS, Episode, Info, check_episodes, fill, inside
from vlac.errors import DatasetError, VlacError

BATCH = 16
"""Rows decoded at once: with pictures inside, a batch of two cameras at 480x640 is about 10 MB."""


def need(module: str) -> Any:
    """pyarrow or av, imported late; VlacError with the extra to install when it is missing."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise VlacError(
            f"datasets need {module.split('.')[0]}, which cannot be imported: {error}",
            remedy="pip install 'vlac-compiler[datasets]'",
        ) from None


@contextlib.contextmanager
def refusals(path: Path, what: str) -> Iterator[None]:
    """What pyarrow raises on a broken file, as a DatasetError."""
    pa = need("pyarrow")
    try:
        yield
    except (pa.ArrowException, OSError, ValueError, TypeError, IndexError, KeyError) as error:
        raise DatasetError(
            f"{path} is broken: {what}: {str(error).splitlines()[0] if str(error) else error!r}"
        ) from None


class Rows:
    """Rows of one parquet file by number, columns by name. Not thread-safe.

    Raises DatasetError when the file is broken, or a column is missing (the ones it has are named).
    """

    def __init__(self, path: Path, columns: Sequence[str]) -> None:
        pq = need("pyarrow.parquet")
        self.path, self.columns = path, tuple(columns)
        with refusals(path, "its footer cannot be read"):
            self._file = pq.ParquetFile(path)
            meta = self._file.metadata
            sizes = [meta.row_group(g).num_rows for g in range(meta.num_row_groups)]
            names = list(self._file.schema_arrow.names)
        self.starts: list[int] = [0, *itertools.accumulate(sizes)]
        for column in columns:
            if column not in names:
                raise DatasetError(f"{path}: column {column!r} is missing; it has {', '.join(names)}")
        self._batches: Iterator[Any] = iter(())
        self._group = -1
        self._first = self._end = 0
        self._batch: Any = None

    def __len__(self) -> int:
        return self.starts[-1]

    def row(self, i: int) -> dict[str, Any]:
        """Row i as pyarrow scalars by column."""
        if not 0 <= i < len(self):
            raise DatasetError(f"{self.path} has {len(self)} rows; the metadata wants row {i}")
        with refusals(self.path, f"row {i} cannot be read"):
            if not self._first <= i < self._end:
                self._seek(i)
            return {c: self._batch.column(c)[i - self._first] for c in self.columns}

    def _seek(self, i: int) -> None:
        group = bisect.bisect_right(self.starts, i) - 1
        if group != self._group or i < self._first:
            self._batches = self._file.iter_batches(batch_size=BATCH, row_groups=[group], columns=list(self.columns))
            self._group, self._end = group, self.starts[group]
        while self._end <= i:
            self._batch = next(self._batches, None)
            if self._batch is None or not len(self._batch):
                self._group, self._first, self._end = -1, 0, 0
                raise DatasetError(f"{self.path}: row group {group} ends before row {i}, which its footer promises")
            self._first, self._end = self._end, self._end + len(self._batch)

    def close(self) -> None:
        self._batch, self._batches, self._first, self._end = None, iter(()), 0, 0
        self._file.close()


def read_columns(path: Path, columns: Mapping[str, str]) -> dict[str, list[Any]]:
    """Whole columns as lists; `columns` maps a name to what its values have to be (a key of _KINDS).

    Raises DatasetError naming file, column, what was found and what was expected.
    """
    pq = need("pyarrow.parquet")
    with refusals(path, "its footer cannot be read"):
        file = pq.ParquetFile(path)
        names = list(file.schema_arrow.names)
    for name in columns:
        if name not in names:
            raise DatasetError(f"{path}: column {name!r} is missing; it has {', '.join(names[:12])}")
    with refusals(path, "a column cannot be read"):
        table = file.read(columns=list(columns), use_threads=False)
        found = {name: table.column(name).to_pylist() for name in columns}
        file.close()
    for name, kind in columns.items():
        for i, value in enumerate(found[name]):
            if not _KINDS[kind](value):
                raise DatasetError(f"{path}: column {name!r}, row {i} is {value!r}, expected {kind}")
    return found


_KINDS = {
    "a count": lambda v: isinstance(v, int) and v >= 0,
    "a number": lambda v: isinstance(v, (int, float)) and v == v and abs(v) != float("inf"),
    "text": lambda v: isinstance(v, str),
    "a list of texts": lambda v: isinstance(v, list) and all(isinstance(t, str) for t in v),
}


def episodes_v3(root: Path, info: Info) -> tuple[Episode, ...]:
    """Episodes of meta/episodes, as many as info.json says: what a killed recording left beyond them is not read."""
    cameras = [f.key for f in info.features.values() if f.dtype == "video"]
    wanted = dict.fromkeys(("episode_index", "length", "data/chunk_index", "data/file_index"), "a count")
    wanted |= {"dataset_from_index": "a count", "dataset_to_index": "a count", "tasks": "a list of texts"}
    for camera in cameras:
        wanted |= {f"videos/{camera}/{n}": "a count" for n in ("chunk_index", "file_index")}
        wanted[f"videos/{camera}/from_timestamp"] = "a number"
    folder = root / "meta" / "episodes"
    rows: dict[int, tuple[Path, dict[str, Any]]] = {}
    for path in sorted(folder.glob("*/*.parquet")):
        found = read_columns(inside(root, path.relative_to(root).as_posix()), wanted)
        for i, index in enumerate(found["episode_index"]):
            if index >= info.total_episodes:
                continue
            if index in rows:
                raise DatasetError(f"{path}: episode {index} is in {rows[index][0].name} as well")
            rows[index] = path, {name: values[i] for name, values in found.items()}
    first: dict[tuple[int, int], int] = {}
    for _, row in rows.values():
        file = row["data/chunk_index"], row["data/file_index"]
        first[file] = min(first.get(file, row["dataset_from_index"]), row["dataset_from_index"])
    episodes = [_episode(rows[i][0], rows[i][1], info, cameras, first) for i in sorted(rows)]
    check_episodes(folder, episodes, info)
    for before, after in itertools.pairwise(episodes):
        if before.start + before.length != after.start:
            raise DatasetError(
                f"{rows[after.index][0]}: episode {after.index} starts at frame {after.start}, "
                f"episode {before.index} ends at {before.start + before.length}"
            )
    return tuple(episodes)


def _episode(
    path: Path, row: Mapping[str, Any], info: Info, cameras: Sequence[str], first: Mapping[tuple[int, int], int]
) -> Episode:
    start, stop = row["dataset_from_index"], row["dataset_to_index"]
    if stop - start != row["length"]:
        raise DatasetError(
            f"{path}: episode {row['episode_index']} has length {row['length']}, but its frames are {start}..{stop}"
        )
    file = row["data/chunk_index"], row["data/file_index"]
    videos = {}
    for camera in cameras:
        at = {n: row[f"videos/{camera}/{n}"] for n in ("chunk_index", "file_index")}
        videos[camera] = (
            fill(info.video_path, {**at, "video_key": camera}),
            float(row[f"videos/{camera}/from_timestamp"]),
        )
    return Episode(
        index=row["episode_index"],
        length=row["length"],
        start=start,
        tasks=tuple(row["tasks"]),
        data=fill(info.data_path, {"chunk_index": file[0], "file_index": file[1]}),
        row=start - first[file],
        videos=videos,
    )


def tasks_v3(root: Path) -> dict[int, str]:
    """task_index -> instruction, of meta/tasks.parquet (pandas keeps the instructions as its index)."""
    path = inside(root, TASKS)
    pq = need("pyarrow.parquet")
    with refusals(path, "its footer cannot be read"):
        names = list(pq.ParquetFile(path).schema_arrow.names)
    text = "task" if "task" in names else "__index_level_0__"
    if text not in names:
        raise DatasetError(f"{path}: column 'task' is missing; it has {', '.join(names)}; {INFO} counts the tasks")
    found = read_columns(path, {"task_index": "a count", text: "text"})
    return dict(zip(found["task_index"], found[text], strict=True))
