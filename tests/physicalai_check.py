"""Run by .venv-physicalai's Python: a policy package in physicalai's unmodified InferenceModel.

python tests/physicalai_check.py PACKAGE OBSERVATIONS.npz OUT.npz
"""

from __future__ import annotations

import importlib.metadata
import sys
from pathlib import Path
from typing import Any

import numpy as np
import tomllib

ROOT = Path(__file__).resolve().parents[1]


class Installed(importlib.metadata.Distribution):
    """Stands for an installed vlac, so that physicalai finds its adapter the way it finds any."""

    def read_text(self, filename: str) -> str | None:
        if filename == "entry_points.txt":
            groups = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["entry-points"]
            return "".join(f"[{g}]\n" + "".join(f"{k} = {v}\n" for k, v in rows.items()) for g, rows in groups.items())
        return "Metadata-Version: 2.1\nName: vlac-compiler\nVersion: 0\n" if "METADATA" in filename else None

    def locate_file(self, path: Any) -> Path:
        return ROOT / str(path)


class Finder(importlib.metadata.DistributionFinder):
    def find_distributions(self, context: Any = None) -> Any:
        return [Installed()]

    def find_spec(self, *args: Any) -> None:
        return None


def main(package: str, observations: str, out: str) -> None:
    sys.meta_path.append(Finder())
    from physicalai.inference import InferenceModel

    with np.load(observations) as z:
        images = {k.removeprefix("image/").split(".")[-1]: z[k] for k in z.files if k.startswith("image/")}
        state, noise, task = z["state"], z["noise"], str(z["task"])
    model = InferenceModel(package)
    # as its robot loop hands it over: channels last, uint8, a batch of one
    seen: dict[str, Any] = {f"images.{k}": v[None] for k, v in images.items()}
    seen |= {"state": state[None], "task": [task], "noise": noise}
    chunk = model.predict_action_chunk(seen)
    # as datasets hand it over: channels first, floats, LeRobot's names, nested
    floats = {k: v.transpose(2, 0, 1).astype(np.float32) / 255 for k, v in images.items()}
    again = model.predict_action_chunk(
        {"observation.images": floats, "observation.state": state, "task": task, "noise": noise[None]}
    )
    model.reset()
    first = model.select_action(seen)
    names = np.array([f.name for f in model.input_features])
    np.savez(out, chunk=chunk, again=again, first=first, rows=model.chunk_size, backend=model.backend, names=names)


if __name__ == "__main__":
    main(*sys.argv[1:])
