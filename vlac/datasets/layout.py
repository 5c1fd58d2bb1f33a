"""What lies where in a LeRobotDataset: meta/info.json with its features and path templates, episodes and tasks.

v3: meta/episodes/chunk-*/file-*.parquet and meta/tasks.parquet; files of data and video hold many episodes.
v2: meta/episodes.jsonl and meta/tasks.jsonl; one file per episode. Both become `Info`, `Episode` and a task table.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any, TypeGuard

from vlac.errors import DatasetError, Unsupported

INFO = "meta/info.json"
DATA_PATH = "data/chunk-{chunk_index:03d}/file-{file_index:03d}.parquet"
VIDEO_PATH = "videos/{video_key}/chunk-{chunk_index:03d}/file-{file_index:03d}.mp4"
EPISODES_PATH = "meta/episodes/chunk-{chunk_index:03d}/file-{file_index:03d}.parquet"
V2_DATA_PATH = "data/chunk-{episode_chunk:03d}/episode_{episode_index:06d}.parquet"
V2_VIDEO_PATH = "videos/chunk-{episode_chunk:03d}/{video_key}/episode_{episode_index:06d}.mp4"
TASKS = "meta/tasks.parquet"
STATS = "meta/stats.json"
CHUNKS_SIZE = 1000
PICTURES = ("image", "video")

_FIELD = re.compile(r"\{(\w+)(?::0?(\d{1,2})d)?\}")


@dataclass(frozen=True)
class Feature:
    """A column: key, dtype ("float32", "image", "video", ...), shape; `depth` marks depth maps: no pictures."""

    key: str
    dtype: str
    shape: tuple[int, ...]
    names: Any = None
    depth: bool = False

    @property
    def is_picture(self) -> bool:
        return self.dtype in PICTURES and not self.depth


@dataclass(frozen=True)
class Info:
    """meta/info.json, checked. `version` is (major, minor); counters say what is committed."""

    version: tuple[int, int]
    fps: float
    features: Mapping[str, Feature]
    total_episodes: int
    total_frames: int
    chunks_size: int
    data_path: str
    video_path: str
    robot_type: str | None = None


@dataclass(frozen=True)
class Episode:
    """An episode and where it lies.

    Attributes:
        index, length: its number and its frames.
        start: number of its first frame in the dataset.
        tasks: its instructions, as the metadata lists them.
        data, row: its parquet file (relative), and the row of its first frame there.
        videos: camera key -> (relative .mp4 file, seconds into it at which the episode begins).
    """

    index: int
    length: int
    start: int
    tasks: tuple[str, ...]
    data: str
    row: int
    videos: Mapping[str, tuple[str, float]] = field(default_factory=dict)


def read_info(root: Path) -> Info:
    """meta/info.json of a dataset folder.

    Raises:
        DatasetError: it is missing, no JSON, or a key is missing or of another kind (named).
        Unsupported: a version other than v2.x and v3.x.
    """
    path = root / INFO
    raw = read_json(path)
    if not isinstance(raw, dict):
        raise DatasetError(f"{path} is not a JSON object")
    version = _version(path, raw.get("codebase_version"))
    features = _features(path, raw.get("features"))
    v3 = version[0] == 3
    fps = raw.get("fps")
    if isinstance(fps, bool) or not isinstance(fps, (int, float)) or not math.isfinite(fps) or fps <= 0:
        raise DatasetError(f"{path}: key 'fps' is {fps!r}, expected a positive number")
    return Info(
        version=version,
        fps=float(fps),
        features=features,
        total_episodes=_count(path, raw, "total_episodes"),
        total_frames=_count(path, raw, "total_frames"),
        chunks_size=_count(path, raw, "chunks_size", CHUNKS_SIZE) or CHUNKS_SIZE,
        data_path=_text(path, raw, "data_path", DATA_PATH if v3 else V2_DATA_PATH),
        video_path=_text(path, raw, "video_path", VIDEO_PATH if v3 else V2_VIDEO_PATH),
        robot_type=raw.get("robot_type") if isinstance(raw.get("robot_type"), str) else None,
    )


def _version(path: Path, found: Any) -> tuple[int, int]:
    match = re.fullmatch(r"v?(\d{1,4})\.(\d{1,4})(\.\d{1,4})?", found) if isinstance(found, str) else None
    if match is None:
        raise DatasetError(f"{path}: key 'codebase_version' is {found!r}, expected such as 'v3.0'")
    version = int(match[1]), int(match[2])
    if version[0] not in (2, 3):
        raise Unsupported(
            f"{path}: a dataset of version {found}; v3.x, v2.1 and v2.0 are read",
            remedy="convert it with LeRobot (lerobot.scripts.convert_dataset_v21_to_v30 and its predecessors)",
        )
    return version


def _features(path: Path, found: Any) -> dict[str, Feature]:
    if not isinstance(found, dict) or not found:
        raise DatasetError(f"{path}: key 'features' is {_kind(found)}, expected an object of features")
    result = {}
    for key, entry in found.items():
        if not isinstance(entry, dict) or not isinstance(entry.get("dtype"), str):
            raise DatasetError(f"{path}: features[{key!r}] has no 'dtype'")
        shape = entry.get("shape")
        if not isinstance(shape, list) or not all(isinstance(d, int) and d >= 0 for d in shape):
            if entry["dtype"] != "language":
                raise DatasetError(f"{path}: features[{key!r}]: 'shape' is {shape!r}, expected a list of sizes")
            shape = []
        about = entry.get("info") if isinstance(entry.get("info"), dict) else entry.get("video_info")
        about = about if isinstance(about, dict) else {}
        depth = bool(about.get("is_depth_map") or about.get("video.is_depth_map"))
        result[key] = Feature(key, entry["dtype"], tuple(shape), entry.get("names"), depth)
    return result


def _count(path: Path, raw: Mapping[str, Any], key: str, default: int | None = None) -> int:
    found = raw.get(key, default)
    if isinstance(found, bool) or not isinstance(found, int) or found < 0:
        raise DatasetError(f"{path}: key {key!r} is {found!r}, expected a count")
    return found


def _text(path: Path, raw: Mapping[str, Any], key: str, default: str) -> str:
    found = raw.get(key)
    if found is not None and not isinstance(found, str):
        raise DatasetError(f"{path}: key {key!r} is {_kind(found)}, expected a path template such as {default}")
    return found or default


def fill(template: str, values: Mapping[str, int | str]) -> str:
    """A path template with its fields filled in; only plain fields and zero-padded numbers, no other format language.

    Raises DatasetError for another field, and for a path that is not plainly inside the dataset.
    """

    def put(match: re.Match[str]) -> str:
        value = values.get(match[1])
        if value is None:
            raise DatasetError(f"{INFO}: the path template {template!r} names {match[1]!r}; known: {', '.join(values)}")
        return f"{value:0{match[2]}d}" if match[2] and isinstance(value, int) else str(value)

    path = _FIELD.sub(put, template)
    parts = PurePosixPath(path).parts
    if not parts or PurePosixPath(path).is_absolute() or ".." in parts or re.search(r"[\\{}\0]", path):
        raise DatasetError(
            f"{INFO}: the path template {template!r} gives {path!r}, which is no path inside the dataset"
        )
    return path


def inside(root: Path, relative: str) -> Path:
    """root/relative, with links followed: it must exist and stay in the dataset (or in its hub cache's blobs)."""
    path = root / relative
    try:
        real = path.resolve(strict=True)
    except FileNotFoundError:
        raise DatasetError(f"{path} does not exist", remedy="the dataset was copied in part; copy it whole") from None
    except (OSError, RuntimeError) as error:
        raise DatasetError(f"{path} cannot be followed: {error}") from None
    home = root.resolve()
    allowed = [home, home.parent.parent / "blobs"] if home.parent.name == "snapshots" else [home]
    if not any(real.is_relative_to(a) for a in allowed):
        raise DatasetError(
            f"{path} leads out of the dataset, to {real}", remedy="copy the dataset with its links followed"
        )
    return path


def read_json(path: Path) -> Any:
    """Raises DatasetError naming the file when it is missing or no JSON."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise DatasetError(
            f"{path} does not exist: no LeRobotDataset here",
            remedy="give the folder that holds meta/, data/ and perhaps videos/",
        ) from None
    except (ValueError, RecursionError, OSError) as error:
        raise DatasetError(f"{path} is not readable JSON: {error}") from None


def _lines(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise DatasetError(f"{path} does not exist; a v2 dataset has it") from None
    except (OSError, ValueError) as error:
        raise DatasetError(f"{path} cannot be read: {error}") from None
    for number, line in enumerate(text.splitlines(), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise DatasetError(f"{path}: line {number} is not JSON: {error}") from None
        if not isinstance(row, dict):
            raise DatasetError(f"{path}: line {number} is not a JSON object")
        yield number, row


def episodes_v2(root: Path, info: Info) -> tuple[Episode, ...]:
    """Episodes of meta/episodes.jsonl, in order of their number."""
    path = root / "meta" / "episodes.jsonl"
    rows: dict[int, tuple[int, tuple[str, ...]]] = {}
    for number, row in _lines(path):
        index, length, tasks = row.get("episode_index"), row.get("length"), row.get("tasks", [])
        if not _is_count(index) or not _is_count(length) or not isinstance(tasks, list):
            raise DatasetError(f"{path}: line {number} needs 'episode_index' and 'length' as counts, 'tasks' as a list")
        if index in rows:
            raise DatasetError(f"{path}: line {number}: episode {index} is there twice")
        rows[index] = (length, tuple(str(t) for t in tasks))
    result, start = [], 0
    cameras = [f.key for f in info.features.values() if f.dtype == "video"]
    for index in sorted(rows)[: info.total_episodes]:
        length, tasks = rows[index]
        values = {"episode_chunk": index // info.chunks_size, "episode_index": index}
        videos = {c: (fill(info.video_path, {**values, "video_key": c}), 0.0) for c in cameras}
        result.append(Episode(index, length, start, tasks, fill(info.data_path, values), 0, videos))
        start += length
    check_episodes(path, result, info)
    return tuple(result)


def tasks_v2(root: Path) -> dict[int, str]:
    """task_index -> instruction, of meta/tasks.jsonl."""
    path = root / "meta" / "tasks.jsonl"
    result = {}
    for number, row in _lines(path):
        index, task = row.get("task_index"), row.get("task")
        if not _is_count(index) or not isinstance(task, str):
            raise DatasetError(f"{path}: line {number} needs 'task_index' as a count and 'task' as text")
        result[index] = task
    return result


def check_episodes(path: Path, episodes: list[Episode], info: Info) -> None:
    """As many episodes and frames as info.json says, numbered without gaps."""
    numbers = [e.index for e in episodes]
    if numbers != list(range(info.total_episodes)):
        missing = sorted(set(range(info.total_episodes)) - set(numbers))[:3]
        raise DatasetError(
            f"{path} lists {len(numbers)} episodes{f', episode {missing[0]} is not there' if missing else ''}; "
            f"{INFO} says {info.total_episodes}"
        )
    frames = sum(e.length for e in episodes)
    if frames != info.total_frames:
        raise DatasetError(f"{path} lists {frames} frames, {INFO} says {info.total_frames}")


def _is_count(value: Any) -> TypeGuard[int]:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _kind(value: Any) -> str:
    return "missing" if value is None else f"a {type(value).__name__}"
