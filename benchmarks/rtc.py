"""What latency does to success, with and without real-time chunking: the bundled policy in closed loop.

python benchmarks/rtc.py [--episodes 200] [--seed 0] [--delays 200 300 400 600 800] [--ways naive rtc ...]
    [--target gguf-f32] [--workers N] [--out FILE.json]

For every delay (milliseconds on the robot's clock) the same episodes with the same noise: naive replay of chunks
(vlac.evaluate.Plan) as many rows at a time as the policy says; that with the next inference begun when the last one's
chunk is there; and at that pace `vlac eval --rtc` as it is (chunks are handed over), guidance instead, and guidance
with LeRobot's defaults. Success with Wilson's interval, the paired difference from naive replay with its interval, its
counts and McNemar's exact p, and the jerk of the executed actions. Nothing is timed.
Writes benchmarks/results/rtc.json after every delay; delays of the same episodes that are there already are kept.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Any

from compile_full_size import ROOT, machine, versions

import vlac
from vlac.environments import PUSH_CUBES
from vlac.evaluate import evaluate
from vlac.machine import usable_cores
from vlac.progress import progress
from vlac.runtime.rtc import HORIZON, MAX_WEIGHT
from vlac.statistics import paired

RESULT = ROOT / "benchmarks" / "results" / "rtc.json"
WAYS: dict[str, dict[str, Any]] = {
    "naive": {},
    "naive_paced": {},
    "rtc": {"rtc": True},
    "guidance": {"rtc": True, "guidance": {"displacements": ()}},
    "guidance_lerobot": {
        "rtc": True,
        "guidance": {"displacements": (), "execution_horizon": HORIZON, "max_guidance_weight": MAX_WEIGHT},
    },
}
FIGURES = ("success", "mean_steps", "mean_steps_succeeded", "jerk", "inferences")


def row(artifact: Path, delay: float, ways: list[str], asked: dict[str, Any]) -> dict[str, Any]:
    """Ways of one delay, and their paired differences from naive replay."""
    made: dict[str, Any] = {"delay_ms": delay}
    succeeded = {}
    for name, way in WAYS.items():
        if name not in ways:
            continue
        if name == "naive_paced":
            way = {"n_action_steps": min(made["delay_steps"], made["n_action_steps"])}
        with progress(False) as show:
            report = evaluate(artifact, PUSH_CUBES, delay=delay, progress=show, **way, **asked)
        made.setdefault("delay_steps", report["delay"]["steps"])
        made.setdefault("n_action_steps", report["n_action_steps"])
        made[name] = {k: report[k] for k in FIGURES}
        succeeded[name] = [bool(r["success"]) for r in report["rows"]]
        if name != "naive":
            table = paired(succeeded[name], succeeded["naive"])
            low, high = table.interval()
            made[name]["paired"] = {
                **asdict(table), "difference": table.difference, "low": low, "high": high, "p": table.p
            }  # fmt: skip
    return made


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--episodes", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--delays", type=float, nargs="+", default=[200, 300, 400, 600, 800])
    parser.add_argument("--ways", nargs="+", choices=[w for w in WAYS if w != "naive"], default=list(WAYS)[1:])
    parser.add_argument("--target", default="gguf-f32")
    parser.add_argument("--workers", type=int, default=usable_cores())
    parser.add_argument("--out", type=Path, default=RESULT)
    given = parser.parse_args()
    ways = ["naive", *given.ways]
    key = {"episodes": given.episodes, "seed": given.seed, "target": given.target, "ways": ways}
    known = json.loads(given.out.read_text(encoding="utf-8")) if given.out.exists() else {}
    rows = known["rows"] if known.get("asked") == key else []
    with tempfile.TemporaryDirectory() as folder:
        artifact = vlac.compile("push-cubes", given.target, Path(folder) / "out").path
        for delay in given.delays:
            if any(r["delay_ms"] == delay for r in rows):
                continue
            asked = {"episodes": given.episodes, "seed": given.seed, "workers": given.workers}
            rows = sorted([*rows, row(artifact, delay, ways, asked)], key=lambda r: r["delay_ms"])
            result = {"asked": key, "machine": machine(), "versions": versions(), "rows": rows}
            given.out.parent.mkdir(parents=True, exist_ok=True)
            given.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
            print(json.dumps(rows, indent=1), flush=True)


if __name__ == "__main__":
    main()
