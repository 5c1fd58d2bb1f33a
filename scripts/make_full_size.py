"""Writes a SmolVLA of the published size (450.0M parameters, 500 tensors, random seeded weights) as LeRobot saves it.

python scripts/make_full_size.py OUT [--seed 0] [--bf16]

float32: 1.8 GB on disk, about 1 GB of memory. The folder does not belong in git.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))
from smolvla_checkpoint import FULL_SIZE, tensors, write_checkpoint


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--bf16", action="store_true", help="VLM and expert in bfloat16: 0.9 GB")
    args = parser.parse_args()

    started = time.perf_counter()
    shown = [0]

    def progress(name: str, done: int, total: int) -> None:
        if 10 * done // total > shown[0] or done == total:
            shown[0] = 10 * done // total
            print(f"{done}/{total} tensors, {time.perf_counter() - started:.0f} s", file=sys.stderr)

    parameters = write_checkpoint(args.out, FULL_SIZE, args.seed, bf16=args.bf16, progress=progress)
    size = (args.out / "model.safetensors").stat().st_size
    print(
        f"{args.out}: {parameters / 1e6:.1f}M parameters in {len(tensors(FULL_SIZE))} tensors, {size / 1e9:.2f} GB, "
        f"{time.perf_counter() - started:.0f} s"
    )


if __name__ == "__main__":
    main()
