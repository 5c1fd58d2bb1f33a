"""mixed-precision against every uniform format of the same size, on observations that no pass saw.

python benchmarks/mixed.py [--observations N] [--samples N]

The bundled push-cubes policy in ggml's formats. For every uniform format above the coarsest: the pass with
size<=(its bytes), and the format itself; drift (relative L2 of the chunk, weights rounded as they are stored) of
both on the observations the pass measured on, and on N beginnings and N moments of other episodes. Seconds are of a
machine that others use. Writes benchmarks/results/mixed.json.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from compile_full_size import ROOT, machine, versions
from int4 import BUNDLED, chunks, drifts, unseen

from vlac.api import apply_passes
from vlac.checkpoint import read_policy
from vlac.policy import Policy

RESULT = ROOT / "benchmarks" / "results" / "mixed.json"
UNIFORM = ("q5_0", "q8_0", "f16")


def figures(policy: Policy) -> dict[str, Any]:
    return dict(policy.history[-1].figures)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--observations", type=int, default=100)
    parser.add_argument("--samples", type=int, help="observations that the pass measures on; default: its own")
    options = parser.parse_args()
    policy = read_policy(str(BUNDLED))
    judges = unseen(policy.io, options.observations)
    want = {name: chunks(policy, given)[1] for name, given in judges.items()}
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        table = Path(folder) / "bits.txt"
        samples = f",samples={options.samples}" if options.samples else ""

        def judge(name: str, recipe: str) -> None:
            started = time.perf_counter()
            after = apply_passes(policy, [recipe])
            row: dict[str, Any] = {"recipe": recipe.replace(f",write={table}", "").replace(f"{folder}/", "")}
            row["seconds"] = round(time.perf_counter() - started)
            row |= {name: drifts(chunks(after, given)[1], want[name]) for name, given in judges.items()}
            row |= {"figures": figures(after), "format": name}
            print(json.dumps(row), file=sys.stderr, flush=True)
            rows.append(row)

        measured = f"high=f32,write={table}{samples}"  # one measurement of every format serves all three
        apply_passes(policy, [f"mixed-precision:budget=rel_l2<=0.02,{measured}"])
        for fmt in UNIFORM:
            same = f"mixed-precision:table={uniform(table, fmt)}"
            size = figures(apply_passes(policy, [same]))["bytes"]
            judge(f"mixed, size of {fmt}", f"mixed-precision:size=<={size}B,{measured}")
            judge(fmt, same)
    record = {
        "what": "mixed-precision and uniform formats of the same size, push-cubes",
        "command": "python benchmarks/mixed.py",
        "machine": machine(),
        "versions": versions(),
        "observations": options.observations,
        "rows": rows,
    }
    RESULT.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


def uniform(table: Path, fmt: str) -> Path:
    """The pass's table with every weight in one format."""
    lines = [line for line in table.read_text(encoding="utf-8").splitlines() if line and not line.startswith("#")]
    out = table.with_name(f"{fmt}.txt")
    out.write_text("".join(f"{line.split()[0]} {fmt}\n" for line in lines), encoding="utf-8")
    return out


if __name__ == "__main__":
    main()
