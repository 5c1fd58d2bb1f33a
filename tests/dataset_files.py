"""Small datasets for the tests: frames that can be told apart, and a folder in the layout of v2.1."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from vlac.datasets import Writer
from vlac.datasets.pictures import encode_png
from vlac.datasets.video import VideoWriter

HEIGHT, WIDTH, FPS = 48, 64, 10
TOP, WRIST = "observation.images.top", "observation.images.wrist"
LENGTHS = (7, 12, 5)


def features(kind: str = "image") -> dict[str, Any]:
    picture = {"dtype": kind, "shape": (HEIGHT, WIDTH, 3), "names": ["height", "width", "channels"]}
    return {
        TOP: dict(picture),
        WRIST: dict(picture),
        "observation.state": {"dtype": "float32", "shape": (4,), "names": ["x", "y", "vx", "vy"]},
        "action": {"dtype": "float32", "shape": (2,), "names": ["dx", "dy"]},
        "next.done": {"dtype": "bool", "shape": (1,), "names": None},
    }


def frame(episode: int, number: int) -> dict[str, Any]:
    """Blocks of random colours: no two frames are alike."""
    rng = np.random.Generator(np.random.PCG64([episode, number]))

    def picture() -> Any:
        blocks = rng.integers(0, 256, (HEIGHT // 8, WIDTH // 8, 3))
        return np.kron(blocks, np.ones((8, 8, 1), int)).astype(np.uint8)

    return {
        TOP: picture(),
        WRIST: picture(),
        "observation.state": rng.standard_normal(4).astype(np.float32),
        "action": rng.standard_normal(2).astype(np.float32),
        "next.done": np.array([number == 0]),
        "task": f"task {episode % 2}",
    }


def all_frames(lengths: Sequence[int] = LENGTHS) -> list[dict[str, Any]]:
    return [frame(e, i) for e, n in enumerate(lengths) for i in range(n)]


def write(path: Path, kind: str = "image", lengths: Sequence[int] = LENGTHS) -> Path:
    with Writer(path, features(kind), FPS) as writer:
        for episode, length in enumerate(lengths):
            for i in range(length):
                writer.add_frame(frame(episode, i))
            writer.save_episode()
    return path


def write_v2(path: Path, kind: str = "image", lengths: Sequence[int] = LENGTHS) -> Path:
    """A dataset as LeRobot of version 2.1 laid it out: one parquet and one video per camera and episode."""
    (path / "meta").mkdir(parents=True)
    info = {
        "codebase_version": "v2.1",
        "robot_type": "none",
        "total_episodes": len(lengths),
        "total_frames": sum(lengths),
        "total_tasks": 2,
        "total_videos": 2 * len(lengths),
        "total_chunks": 1,
        "chunks_size": 2,
        "fps": FPS,
        "splits": {"train": f"0:{len(lengths)}"},
        "data_path": "data/chunk-{episode_chunk:03d}/episode_{episode_index:06d}.parquet",
        "video_path": "videos/chunk-{episode_chunk:03d}/{video_key}/episode_{episode_index:06d}.mp4",
        "features": {k: {**f, "shape": list(f["shape"])} for k, f in features(kind).items()},
    }
    (path / "meta" / "info.json").write_text(json.dumps(info))
    tasks = [json.dumps({"task_index": i, "task": f"task {i}"}) for i in range(2)]
    (path / "meta" / "tasks.jsonl").write_text("\n".join(tasks) + "\n")
    rows = [{"episode_index": e, "tasks": [f"task {e % 2}"], "length": n} for e, n in enumerate(lengths)]
    (path / "meta" / "episodes.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    for e, n in enumerate(lengths):
        _write_v2_episode(path, kind, e, [frame(e, i) for i in range(n)], sum(lengths[:e]))
    return path


def _write_v2_episode(path: Path, kind: str, e: int, frames: Sequence[Mapping[str, Any]], start: int) -> None:
    n, chunk = len(frames), f"chunk-{e // 2:03d}"
    columns: dict[str, Any] = {
        "observation.state": pa.array([f["observation.state"].tolist() for f in frames], pa.list_(pa.float32())),
        "action": pa.array([f["action"].tolist() for f in frames], pa.list_(pa.float32())),
        "next.done": pa.array([bool(f["next.done"][0]) for f in frames]),
        "timestamp": pa.array([i / FPS for i in range(n)], pa.float32()),
        "frame_index": pa.array(range(n)),
        "episode_index": pa.array([e] * n),
        "index": pa.array(range(start, start + n)),
        "task_index": pa.array([e % 2] * n),
    }
    for camera in (TOP, WRIST):
        if kind == "image":
            columns[camera] = pa.array([{"bytes": encode_png(f[camera], 1), "path": None} for f in frames])
            continue
        video = path / "videos" / chunk / camera / f"episode_{e:06d}.mp4"
        video.parent.mkdir(parents=True, exist_ok=True)
        writer = VideoWriter(video, FPS, HEIGHT, WIDTH)
        for f in frames:
            writer.add(f[camera])
        writer.close()
    data = path / "data" / chunk / f"episode_{e:06d}.parquet"
    data.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table(columns), data)
