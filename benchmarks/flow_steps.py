"""Evaluations of the flow network x solver x drift x success, beside what int8 weights and activations cost.

python benchmarks/flow_steps.py [CHECKPOINT] [--episodes N] [--workers N] [--steps 1,2,3,5]

CHECKPOINT: by default the bundled push-cubes policy. Drift: relative L2 of the normalised chunk (the robot's own
columns) to the shipped sampler's on the last 16 recorded observations, the same noise; fits see the others. int8: the
onnx-int8 artifact in ONNX Runtime on the same observations. --episodes runs push-cubes in closed loop on seeds
0, 1, ... for every row. Writes benchmarks/results/flow_steps.json.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from compile_full_size import ROOT, machine, versions
from visual_tokens import BUNDLED, chunks, divided

import vlac
from vlac import calibrate
from vlac.api import apply_passes, draw
from vlac.artifact import open_artifact
from vlac.checkpoint import read_policy
from vlac.engines.base import get_engine
from vlac.policy import Policy
from vlac.runtime.inputs import prepared
from vlac.runtime.session import execute

HELD = 16


def recipes(steps: list[int]) -> list[str]:
    found = []
    for n in steps:
        found += [f"steps={n},solver={s}" for s in ("euler", "ab2", *(("midpoint",) if n % 2 == 0 else ()))]
        found.append(f"steps={n},solver=fitted,samples={{fit}}{{seen}}")
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


def save(checkpoint: str, rows: list[dict[str, Any]]) -> None:
    record = {"machine": machine(), "versions": versions(), "checkpoint": checkpoint, "rows": rows}
    path = ROOT / "benchmarks" / "results" / "flow_steps.json"
    path.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("checkpoint", type=Path, nargs="?", default=BUNDLED)
    parser.add_argument("--steps", default="1,2,3,4,5,7")
    parser.add_argument("--episodes", type=int, default=0)
    parser.add_argument("--workers", type=int, default=1)
    options = parser.parse_args()
    policy = read_policy(str(options.checkpoint))
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as work:
        out = Path(work)
        seen, fit, judge = divided(policy, HELD, out)
        want = chunks(policy, draw(policy), judge)

        def add(row: dict[str, Any], target: str, recipe: list[str]) -> None:
            if options.episodes:
                vlac.compile(options.checkpoint, target, out / "one", recipe, goldens=1)
                row |= success(out / "one", options.episodes, options.workers)
            rows.append(row)
            print(row, flush=True)
            save(options.checkpoint.name, rows)  # a fit takes a minute: what is measured stays

        robot = []
        for target in ("onnx-fp32", "onnx-int8"):
            vlac.compile(options.checkpoint, target, out / target, goldens=1)
            robot.append(act_all(policy, out / target, judge))
        add({"recipe": "nothing", "evaluations": len(policy.flow.times), "drift": 0.0}, "onnx-fp32", [])
        evaluations = len(policy.flow.times)
        add(
            {"recipe": "onnx-int8", "evaluations": evaluations, "drift": calibrate.drift(robot[1], robot[0])},
            "onnx-int8",
            [],
        )
        for recipe in recipes([int(n) for n in options.steps.split(",")]):
            full = ["flow-steps:" + recipe.format(fit=fit, seen=seen)]
            after = apply_passes(policy, full)
            row = {
                "recipe": full[0].replace(seen, ""),
                "evaluations": len(after.flow.times),
                "drift": calibrate.drift(chunks(after, draw(after), judge), want),
                "figures": dict(after.history[-1].figures),
            }
            add(row, "onnx-fp32", full)


if __name__ == "__main__":
    main()
