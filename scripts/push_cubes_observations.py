"""The recorded observations that are bundled with push-cubes: one moment of each of 64 episodes of the scripted expert.

    python scripts/push_cubes_observations.py            # writes vlac/zoo/push_cubes/observations
    python scripts/push_cubes_observations.py --check    # makes them again and compares, to the pixel

The seeds are neither of training (1_000_000 and up) nor of evaluation (below 100_000). Needs the extra `sim`.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from vlac.datasets.pictures import decode
from vlac.recorded import read_index, write_folder
from vlac.sim import TASKS, Expert, PushCubes

BUNDLED = Path(__file__).resolve().parents[1] / "vlac" / "zoo" / "push_cubes" / "observations"
FIRST_SEED, COUNT = 900_000, 64


def moment(seed: int) -> dict[str, Any]:
    """A frame of the expert's episode from this seed: every task in turn, at a moment that the seed draws."""
    env, expert = PushCubes(), Expert()
    phrasings = list(TASKS.values())
    phrases = phrasings[seed % len(phrasings)]
    draw = np.random.Generator(np.random.PCG64(seed))
    instruction = phrases[int(draw.integers(len(phrases)))]
    seen, info = env.reset(seed=seed, options={"instruction": instruction})
    moments = []
    for step in range(env.max_steps):
        action = expert.act(env)
        moments.append((step, seen, action))
        seen, _, done, cut, info = env.step(action)
        if done or cut:
            break
    step, seen, action = moments[int(draw.integers(len(moments)))]
    return {
        "images": {f"observation.images.{name}": picture for name, picture in seen["pixels"].items()},
        "state": seen["agent_pos"],
        "action": action,
        "task": info["instruction"],
        "seed": seed,
        "episode": seed - FIRST_SEED,
        "frame": step,
    }


def write(folder: Path) -> None:
    """All of them into a folder."""
    note = {"made by": "scripts/push_cubes_observations.py", "environment": "vlac/PushCubes-v0"}
    write_folder(folder, [moment(FIRST_SEED + i) for i in range(COUNT)], note)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=BUNDLED)
    parser.add_argument("--check", action="store_true", help="compare with what is there; write nothing")
    options = parser.parse_args()
    if not options.check:
        write(options.out)
        return 0
    with tempfile.TemporaryDirectory() as temporary:
        write(Path(temporary))
        differ = differences(Path(temporary), options.out)
    for line in differ:
        print(f"{options.out}: {line} is not what the environment gives now")
    return 1 if differ else 0


def differences(made: Path, kept: Path) -> list[str]:
    """What of two folders differs, pictures compared decoded: PNG's compression is another one in every zlib."""
    mine, theirs = read_index(made), read_index(kept)
    found = [f"observation {i}" for i, (a, b) in enumerate(zip(mine, theirs, strict=True)) if a != b]
    for name in sorted(f for entry in theirs for f in entry["images"].values()):
        a, b = (decode((folder / name).read_bytes(), name) for folder in (made, kept))
        if not np.array_equal(a, b):
            found.append(name)
    return found


if __name__ == "__main__":
    sys.exit(main())
