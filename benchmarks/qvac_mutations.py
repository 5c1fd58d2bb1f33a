"""Mutated GGUF files against the strict check, and those that pass it against QVAC's real engine.

python benchmarks/qvac_mutations.py [--count 1000] [--seed 0] [--out FILE.json]

No file that the check accepts may end the engine's process. Needs scripts/peers/qvac.sh; nothing is timed.
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import dialect_files as files  # noqa: E402
import qvac_peer  # noqa: E402

import vlac  # noqa: E402
from vlac.errors import VlacError  # noqa: E402
from vlac.gguf_dialects import check_file  # noqa: E402

BATCH = 20


def accepted(count: int, seed: int, folder: Path) -> list[Path]:
    """Mutants that pass the check."""
    checkpoint = files.write(folder / "checkpoint")
    result = vlac.compile(checkpoint, target="gguf-f32", out=folder / "small.gguf", dialect="qvac", goldens=1)
    assert result.path is not None
    found = []
    for path in files.mutants(result.path, folder, count, seed):
        try:
            check_file(path, "qvac")
            found.append(path)
        except VlacError:
            path.unlink()
    return found


def run(count: int, seed: int, folder: Path) -> Iterator[dict[str, Any]]:
    """After each batch: counts so far, and every file that the check accepted and the engine did not run."""
    passed, odd = accepted(count, seed, folder), []
    counts = {"ran": 0, "not finite": 0, "refused": 0, "died": 0, "slow": 0}
    for i in range(0, len(passed), BATCH):
        for path, said in qvac_peer.probe(passed[i : i + BATCH], folder / "run").items():
            outcome = next(k for k in ("died", "slow", "refused", "ran") if k in said)
            counts[outcome if said.get("finite", True) else "not finite"] += 1
            if outcome != "ran":
                odd.append({"mutant": path.stem, **said})
        tried = min(i + BATCH, len(passed))
        print(f"{tried} of {len(passed)} tried, {counts['died']} died", file=sys.stderr, flush=True)
        yield {
            "mutants": count,
            "seed": seed,
            "accepted": len(passed),
            "tried": tried,
            "engine": counts,
            "not_run": odd,
        }


def main() -> int:
    """Exit code 1 when a file passed the check and ended the engine."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results" / "qvac_mutations.json")
    parser.add_argument("--work", type=Path, help="Where files are kept; default: a temporary folder.")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = arguments.work or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        for found in run(arguments.count, arguments.seed, folder):
            report = {"vlac": vlac.__version__, "python": platform.python_version(), **found}
            arguments.out.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(report, indent=1))
    return 1 if report["engine"]["died"] else 0


if __name__ == "__main__":
    sys.exit(main())
