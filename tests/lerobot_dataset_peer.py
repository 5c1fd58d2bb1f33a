"""Run by .venv-lerobot's Python with the repository on PYTHONPATH: LeRobot writes and reads datasets.

python tests/lerobot_dataset_peer.py ACTION ARGUMENT... -- ACTION ARGUMENT... -- ...
  write KIND ROOT      # tests/dataset_files.py's frames, KIND image or video
  read ROOT OUT.npz    # every LeRobotDataset[i], pictures as uint8 HWC, and the statistics
  add ROOT             # one more episode through LeRobotDataset.resume
"""

from __future__ import annotations

import sys
from typing import Any

import dataset_files as files
import numpy as np
import torch
from lerobot.datasets.lerobot_dataset import LeRobotDataset


def record(dataset: Any, episode: int, length: int) -> None:
    for i in range(length):
        dataset.add_frame(files.frame(episode, i))
    dataset.save_episode(parallel_encoding=False)


def write(kind: str, root: str) -> None:
    dataset = LeRobotDataset.create(
        "some/one", fps=files.FPS, features=files.features(kind), root=root, use_videos=kind == "video"
    )
    for episode, length in enumerate(files.LENGTHS):
        record(dataset, episode, length)
    dataset.finalize()


def add(root: str) -> None:
    dataset = LeRobotDataset.resume("some/one", root=root)
    record(dataset, dataset.meta.total_episodes, 3)
    dataset.finalize()


def read(root: str, out: str) -> None:
    dataset = LeRobotDataset("some/one", root=root, return_uint8=True)
    arrays: dict[str, Any] = {"length": len(dataset), "episodes": dataset.meta.total_episodes}
    for i in range(len(dataset)):
        for key, value in dataset[i].items():
            given = value.numpy() if isinstance(value, torch.Tensor) else np.array(value)
            if "image" in key:
                given = np.moveaxis(given, 0, -1)
                given = given if given.dtype == np.uint8 else np.round(given * 255).astype(np.uint8)
            arrays[f"{i}/{key}"] = given
    for key, stats in dataset.meta.stats.items():
        arrays.update({f"stats/{key}/{name}": value for name, value in stats.items()})
    np.savez(out, **arrays)


if __name__ == "__main__":
    for action in " ".join(sys.argv[1:]).split(" -- "):
        name, *arguments = action.split()
        {"write": write, "add": add, "read": read}[name](*arguments)
