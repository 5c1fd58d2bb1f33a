"""Evaluations of the flow network x solver x drift x success, beside what int8 weights and activations cost.

python benchmarks/flow_steps.py [CHECKPOINT] [--episodes N] [--workers N] [--steps 1,2,3,5] [--unseen N]

CHECKPOINT: by default the bundled push-cubes policy. Drift: relative L2 of the normalised chunk (the robot's own
columns) to the shipped sampler's, the same noise. Of push-cubes on the beginnings of N episodes and on moments of N
others, none of which any fit saw (fits see what the pass takes by default: the recorded observations); all together,
and the median of single ones. Of another checkpoint on seeded observations, fits see others. int8: the onnx-int8
artifact in ONNX Runtime on the same observations. --episodes runs push-cubes in closed loop on seeds 0, 1, ... for
every row; without it, success that the file already holds for a recipe stays. Writes
benchmarks/results/flow_steps.json.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from compile_full_size import ROOT, machine, versions
from int4 import BUNDLED, drifts, unseen
from visual_tokens import chunks

import vlac
from vlac.api import apply_passes, draw
from vlac.artifact import open_artifact
from vlac.checkpoint import read_policy
from vlac.engines.base import get_engine
from vlac.goldens import synthetic
from vlac.policy import Policy
from vlac.runtime.inputs import prepared
from vlac.runtime.session import execute

RESULT = ROOT / "benchmarks" / "results" / "flow_steps.json"


def recipes(steps: list[int]) -> list[str]:
    found = []
    for n in steps:
        found += [f"steps={n},solver={s}" for s in ("euler", "ab2", *(("midpoint",) if n % 2 == 0 else ()))]
        found.append(f"steps={n},solver=fitted")
    return found


def success(artifact: Path, episodes: int, workers: int) -> dict[str, Any]:
    from vlac.environments import PUSH_CUBES
    from vlac.evaluate import evaluate

    report = evaluate(artifact, PUSH_CUBES, episodes=episodes, workers=workers)
    return {k: report[k] for k in ("success", "episodes") if k in report}


def act_all(policy: Policy, artifact: Path, given: Any) -> list[np.ndarray]:
    """Normalised chunks of an artifact in ONNX Runtime."""
    opened, found = open_artifact(artifact), []
    session = get_engine("onnxruntime").open(opened)
    for o in given:
        ready = prepared(policy.io, policy.tokenizer, opened.program, o)
        found.append(execute(opened.program, session, ready.env, ready.symbols)[:, : policy.io.action_dim])
    session.close()
    return found


def save(checkpoint: str, count: int, rows: list[dict[str, Any]]) -> None:
    record = {
        "machine": machine(),
        "versions": versions(),
        "checkpoint": checkpoint,
        "observations": count,
        "rows": rows,
    }
    RESULT.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("checkpoint", type=Path, nargs="?", default=BUNDLED)
    parser.add_argument("--steps", default="1,2,3,4,5,7")
    parser.add_argument("--unseen", type=int, default=200, help="observations of each kind that judge")
    parser.add_argument("--episodes", type=int, default=0)
    parser.add_argument("--workers", type=int, default=1)
    options = parser.parse_args()
    policy = read_policy(str(options.checkpoint))
    bundled = options.checkpoint == BUNDLED
    judges = unseen(policy.io, options.unseen) if bundled else {"seeded": synthetic(policy.io, options.unseen, seed=77)}
    program = draw(policy)
    want = {name: chunks(policy, program, given) for name, given in judges.items()}
    rows: list[dict[str, Any]] = []
    there = json.loads(RESULT.read_text(encoding="utf-8"))["rows"] if RESULT.exists() else []
    known = {r["recipe"]: {k: r[k] for k in ("success", "episodes") if k in r} for r in there}
    with tempfile.TemporaryDirectory() as work:
        out = Path(work)

        def add(row: dict[str, Any], target: str, recipe: list[str]) -> None:
            if options.episodes:
                vlac.compile(options.checkpoint, target, out / "one", recipe, goldens=1)
                row |= success(out / "one", options.episodes, options.workers)
            else:
                row |= known.get(row["recipe"], {})
            rows.append(row)
            print(row, flush=True)
            save(options.checkpoint.name, options.unseen, rows)  # a fit takes minutes: what is measured stays

        evaluations = len(policy.flow.times)
        plain = {name: drifts(w, w) for name, w in want.items()}
        add({"recipe": "nothing", "evaluations": evaluations, "drift": plain}, "onnx-fp32", [])
        for target in ("onnx-fp32", "onnx-int8"):
            vlac.compile(options.checkpoint, target, out / target, goldens=1)
        found = {
            name: drifts(*(act_all(policy, out / target, given) for target in ("onnx-int8", "onnx-fp32")))
            for name, given in judges.items()
        }
        add({"recipe": "onnx-int8", "evaluations": evaluations, "drift": found}, "onnx-int8", [])
        for recipe in recipes([int(n) for n in options.steps.split(",")]):
            full = [f"flow-steps:{recipe}"]
            after = apply_passes(policy, full)
            program = draw(after)
            row = {
                "recipe": full[0],
                "evaluations": len(after.flow.times),
                "drift": {n: drifts(chunks(after, program, given), want[n]) for n, given in judges.items()},
                "figures": dict(after.history[-1].figures),
            }
            add(row, "onnx-fp32", full)


if __name__ == "__main__":
    main()
