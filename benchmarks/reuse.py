"""What a policy need not compute again, at the published size: its share of a cold chunk, and whether it is the same.

python benchmarks/reuse.py ARTIFACT[:ENGINE] ... [--rounds 15] [--threads 2] [--out FILE.json]

In every round an artifact answers one observation cold, then with one camera new, then with only state and noise new,
then the first observation again for 10 actions only (cold). In the first rounds the last three are compared with cold
answers to the same inputs: max_abs is 0 where bits are equal. A share is the median over the rounds of a case's time
over the same round's cold chunk, its neighbour in time, with the quartiles beside it: other work on the machine moves
single rounds by a tenth. Wall time wants a quiet machine, CPU time --threads 1.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from vlac import machine
from vlac.goldens import synthetic
from vlac.runtime.session import Session, load

ACTIONS = 10
CHECKED = 8
"""Rounds, the one that warms up among them, whose answers are compared."""
BARS = {"camera": 0.65, "state": 0.25, "actions": 0.9}


def timed(policy: Session, given: Mapping[str, Any], **how: Any) -> tuple[Any, float, float]:
    """The chunk, wall seconds, CPU seconds."""
    wall, cpu = time.perf_counter(), time.process_time()
    chunk = policy.act(**given, units="normalized", **how)
    return chunk, time.perf_counter() - wall, time.process_time() - cpu


def one(path: str, engine: str | None, rounds: int, threads: int | None) -> dict[str, Any]:
    """All cases of one artifact."""
    times: dict[str, list[tuple[float, float]]] = {}
    apart = dict.fromkeys(BARS, 0.0)
    with load(path, engine=engine, threads=threads) as policy:
        seen = synthetic(policy.io, 2 * rounds + 2, seed=7)
        for i in range(rounds + 1):
            a, b = seen[2 * i : 2 * i + 2]
            cold = {"images": a.images, "state": a.state, "task": a.task, "noise": a.noise}
            last = list(a.images)[-1]
            cases: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
                "cold": (cold, {}),
                "camera": ({**cold, "images": {**a.images, last: b.images[last]}}, {}),
                "state": (
                    {**cold, "images": {**a.images, last: b.images[last]}, "state": b.state, "noise": b.noise},
                    {},
                ),
                "actions": (cold, {"n_actions": ACTIONS, "reuse": False}),
            }
            for case, (given, how) in cases.items():
                chunk, *took = timed(policy, given, **how)
                if i:  # the first round warms up
                    times.setdefault(case, []).append((took[0], took[1]))
                if case in apart and i < CHECKED:
                    whole = np.asarray(policy.act(**given, units="normalized", reuse=False))[: len(chunk)]
                    apart[case] = max(apart[case], float(np.abs(chunk - whole).max()))
                    if case != "actions":  # what is reused next is this case's
                        policy.act(**given, units="normalized")
        info = {"engine": policy.hparams.engine, "target": policy.hparams.target}
    shares = {
        k: [[case[j] / cold[j] for case, cold in zip(times[k], times["cold"], strict=True)] for j in (0, 1)]
        for k in BARS
    }
    rows = {
        k: {
            "wall": statistics.median(wall),
            "wall_quartiles": statistics.quantiles(wall, n=4)[::2],
            "cpu": statistics.median(cpu),
            "max_abs": apart[k],
            "bar": BARS[k],
        }
        for k, (wall, cpu) in shares.items()
    }
    wall, cpu = (statistics.median(t[j] for t in times["cold"]) for j in (0, 1))
    return {**info, "artifact": Path(path).name, "cold_s": {"wall": wall, "cpu": cpu}, "of_cold": rows}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("artifacts", nargs="+", metavar="ARTIFACT[:ENGINE]")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    if args.rounds < 2:
        parser.error("quartiles want two rounds or more")
    warnings.simplefilter("ignore")
    rows = []
    for given in args.artifacts:
        path, _, engine = given.partition(":")
        before = os.getloadavg()[0]
        rows.append({**one(path, engine or None, args.rounds, args.threads), "load_average": round(before, 1)})
        shares = ", ".join(f"{k} {v['wall']:.3f} ({v['max_abs']:.1e})" for k, v in rows[-1]["of_cold"].items())
        print(
            f"{rows[-1]['artifact']} on {rows[-1]['engine']}: {rows[-1]['cold_s']['wall']:.2f} s; {shares}", flush=True
        )
    report = {
        "rounds": args.rounds,
        "threads": args.threads,
        "actions": ACTIONS,
        "checked": min(CHECKED, args.rounds + 1),
        "machine": machine.describe(),
    }
    if args.out:
        args.out.write_text(json.dumps({**report, "rows": rows}, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
