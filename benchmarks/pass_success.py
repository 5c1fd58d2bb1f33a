"""What each pass costs on push-cubes: success in closed loop with its interval, drift, milliseconds and megabytes.

python benchmarks/pass_success.py [--episodes 200] [--work FOLDER] [--quick]

A sweep (vlac/sweep) of the bundled policy as gguf-f32, one recipe a row, all over the same unseen starts with the same
noise; started again after a kill it goes on where it was. Then all artifacts take turns at answering the same
observations, each with nothing reused: ms is the median wall time of --rounds of these (on a busy machine --rounds 0
leaves the sweep's). Writes benchmarks/results/pass_success.json; the table of
the README is made from it by scripts/readme_tables.py.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from pathlib import Path
from typing import Any

from compile_full_size import ROOT, machine, versions

from vlac.goldens import synthetic
from vlac.registry import silent
from vlac.runtime.session import load
from vlac.sweep.grid import read_grid
from vlac.sweep.run import groups_of, sweep

RECIPES = (
    (),
    ("flow-steps:steps=5",),
    ("flow-steps:steps=5,solver=ab2",),
    ("flow-steps:steps=5,solver=fitted",),
    ("flow-steps:steps=2,solver=fitted",),
    ("truncate-layers:keep=2,mode=kv-tap,heal=ridge",),
    ("reduce-visual-tokens:factor=2,heal=ridge",),
    ("merge-in-tower",),
    ("resolution:size=32",),
    ("quantize-kv:k=4,v=4",),
    ("smooth-norms:ratio=1",),
    ("quantize-weights:bits=8",),
    ("quantize-weights:bits=4",),
    ("quantize-weights:bits=4,method=hqq",),
    ("quantize-weights:bits=4,method=awq",),
    ("quantize-weights:bits=4,method=gptq",),
    ("quantize-weights:bits=4,method=gptq,rotate=block16",),
    ("quantize-weights:bits=4,method=gptq,tune=1000",),
    ("quantize-weights:bits=4,group=channel",),
    ("quantize-weights:bits=4,group=channel,method=gptq,rotate=block16",),
    ("mixed-precision:budget=rel_l2<=0.02,high=q8_0",),
    ("flow-steps:steps=5,solver=fitted", "quantize-weights:bits=4,method=gptq,rotate=block16"),
)
QUICK = (0, 3, 11, 12, 16, 17)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--episodes", type=int, default=200)
    parser.add_argument("--runs", type=int, default=20)
    parser.add_argument("--rounds", type=int, default=60, help="turns that time all artifacts, interleaved")
    parser.add_argument("--work", type=Path, default=ROOT / "out" / "pass_success")
    parser.add_argument("--quick", action="store_true", help="six recipes")
    options = parser.parse_args()
    recipes = [RECIPES[i] for i in QUICK] if options.quick else list(RECIPES)
    options.work.mkdir(parents=True, exist_ok=True)
    grid = options.work / "grid.yaml"
    table: dict[str, Any] = {
        "checkpoint": "push-cubes",
        "target": "gguf-f32",
        "engine": "ggml",
        "threads": 1,
        "passes": [list(r) for r in recipes],
        "measure": {"runs": options.runs, "goldens": 16, "episodes": options.episodes},
    }
    grid.write_text(json.dumps(table, indent=1), encoding="utf-8")  # JSON is YAML
    progress = (
        silent if not sys.stderr.isatty() else lambda what, done, total: print(what, done, total, file=sys.stderr)
    )
    found = sweep(grid, options.work / "rows", keep=True, progress=progress)
    artifacts = {k: options.work / "rows" / "artifacts" / g.build for g in groups_of(read_grid(grid)) for k in g.keys}
    write(found["rows"], options.episodes, turns(found["rows"], artifacts, options.rounds))
    print(f"{len(found['rows'])} rows, {found['measured']} measured now, {found['failed']} failed")


def turns(rows: list[dict[str, Any]], artifacts: dict[str, Path], rounds: int) -> dict[str, list[float]]:
    """Wall milliseconds of `rounds` answers of every row's artifact, by key; each observation goes to all in turn."""
    keys = [r["key"] for r in rows if r["status"] == "done"] if rounds else []
    policies = {k: load(artifacts[k], engine="ggml", threads=1) for k in keys}
    times: dict[str, list[float]] = {k: [] for k in keys}
    if keys:
        given = synthetic(policies[keys[0]].io, rounds + 1, seed=11)
        for turn, o in enumerate(given):
            for k in keys if turn % 2 else reversed(keys):
                began = time.perf_counter()
                policies[k].act(images=o.images, state=o.state, task=o.task, noise=o.noise, reuse=False)
                times[k].append(1e3 * (time.perf_counter() - began))
    for policy in policies.values():
        policy.close()
    return {k: t[1:] for k, t in times.items()}


def write(measured: list[dict[str, Any]], episodes: int, times: dict[str, list[float]]) -> None:
    """benchmarks/results/pass_success.json from a sweep's rows and what turns() measured."""
    rows = []
    for row in measured:
        kept = {k: row[k] for k in ("passes", "status", "figures", "engine", "threads", "target")}
        if row["status"] == "done":
            kept["success"] = row["eval"]["success"]
            kept["compiler_ok"] = row["parity"]["compiler"]["ok"]
            kept["latency_verdict"] = row["bench"]["verdict"]
            if timed := times.get(row["key"]):
                quarters = statistics.quantiles(timed, n=4)
                kept["figures"] = {**kept["figures"], "ms": quarters[1]}
                kept["latency_verdict"], kept["ms_quartiles"] = "INTERLEAVED", [quarters[0], quarters[2]]
        else:
            kept["error"] = row["error"]["message"]
        rows.append(kept)
    record = {
        "what": "push-cubes, gguf-f32 before passes, ggml engine, one thread",
        "command": f"python benchmarks/pass_success.py --episodes {episodes}",
        "machine": machine(),
        "versions": versions(),
        "episodes": episodes,
        "rows": rows,
    }
    result = ROOT / "benchmarks" / "results" / "pass_success.json"
    result.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
