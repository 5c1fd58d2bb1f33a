"""What the tests share: the golden folders, and a closed network for libraries that would ask a hub."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("OMP_NUM_THREADS", "2")

ROOT = Path(__file__).resolve().parents[1]


@dataclass(frozen=True)
class GoldenFolder:
    """A checkpoint with raw observations and LeRobot's answers (layout: tests/golden)."""

    path: Path
    arrays: Mapping[str, np.ndarray[Any, Any]]
    tasks: tuple[str, ...]

    @property
    def checkpoint(self) -> Path:
        return self.path / "checkpoint"

    def observation(self, i: int) -> dict[str, Any]:
        """Arguments of Session.act for observation i, noise included."""
        pictures = f"obs{i}/image/"
        return {
            "images": {k.removeprefix(pictures): v for k, v in self.arrays.items() if k.startswith(pictures)},
            "state": self.arrays[f"obs{i}/state"],
            "task": self.tasks[i],
            "noise": self.arrays[f"obs{i}/noise"][0],
        }

    def chunk(self, i: int, units: str = "robot") -> np.ndarray[Any, Any]:
        """[chunk_size, action_dim] in "robot" or "normalised" units."""
        return self.arrays[f"obs{i}/chunk_{units}"][0]


def open_golden(path: Path) -> GoldenFolder:
    with np.load(path / "golden.npz", allow_pickle=False) as z:
        arrays = {k: z[k] for k in z.files}
    return GoldenFolder(path, arrays, tuple(json.loads((path / "golden.json").read_text(encoding="utf-8"))["tasks"]))


@pytest.fixture(scope="session")
def golden() -> Callable[[str], GoldenFolder]:
    """golden("smolvla_tiny") and golden("smolvla_letterbox")."""
    return lambda name: open_golden(ROOT / "tests" / "golden" / name)
