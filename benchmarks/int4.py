"""How far int4 weights move the action chunk: rounding to nearest against rounding with care, at the same size.

python benchmarks/int4.py [--checkpoint FOLDER] [--observations N] [--samples N] [--recipes 0,3,4]

Without --checkpoint: the bundled push-cubes policy, judged twice, with two families of seeds, on the beginnings of 200
episodes and on moments of 200 others that neither training nor calibration has seen; passes calibrate on what they take
by default: recorded observations. With it: seeded observations judge, others are calibrated on (a checkpoint with
random weights tells what rounding does to a network of that size, not to a robot's task). Drift: relative L2 of the
normalised chunk to the untouched policy's, all observations together, and of single ones the median, the mean and the
largest; the same noise; the program lowered for gguf-f32 with weights as stored, in the fp32 engine. Rows that are
there already are kept. Writes benchmarks/results/int4.json (int4-FOLDER.json).
"""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from compile_full_size import ROOT, machine, peak_mb, versions

from vlac import calibrate
from vlac.api import apply_passes, lower_for
from vlac.artifact import Golden
from vlac.checkpoint import read_policy
from vlac.engines.base import EngineSession
from vlac.formats import FORMATS
from vlac.goldens import reference_session, synthetic
from vlac.graph import Program
from vlac.io import IO
from vlac.passes.mixed_precision import stored
from vlac.policy import Policy
from vlac.registry import targets
from vlac.runtime.inputs import prepared
from vlac.runtime.session import execute

BUNDLED = ROOT / "vlac" / "zoo" / "push_cubes"
INT4 = "quantize-weights:bits=4"
RECIPES = (
    INT4,
    f"{INT4},method=clip",
    f"{INT4},method=awq",
    f"{INT4},method=gptq",
    f"{INT4},method=gptq,rotate=block16",
    f"{INT4},method=gptq,rotate=block32",
    f"{INT4},method=gptq,rotate=hadamard",
    f"{INT4},method=gptq,tune=1000",
)
SEEDS = ((90_000, 950_000), (95_000, 981_000))
"""First seeds of episodes whose beginnings, and of others whose moments, judge push-cubes: held back until then."""


def unseen(io: IO, count: int, seeds: tuple[int, int] = SEEDS[0]) -> dict[str, tuple[Golden, ...]]:
    """Beginnings of `count` episodes of push-cubes, and moments of the scripted expert's in `count` others."""
    sys.path.insert(0, str(ROOT / "scripts"))
    from push_cubes_observations import moment

    from vlac.sim import PushCubes

    def golden(seed: int, seen: dict[str, Any]) -> Golden:
        noise = np.random.default_rng([seed, 1]).standard_normal(io.noise_shape).astype(np.float32)
        empty = np.zeros((0, 0), np.float32)
        return Golden(seen["images"], np.asarray(seen["state"], np.float32), seen["task"], noise, empty, empty)

    def beginning(seed: int) -> dict[str, Any]:
        seen, info = PushCubes().reset(seed=seed)
        images = {f"observation.images.{name}": picture for name, picture in seen["pixels"].items()}
        return {"images": images, "state": seen["agent_pos"], "task": info["instruction"]}

    starts, moments = ([*range(first, first + count)] for first in seeds)
    return {
        "starts": tuple(golden(seed, beginning(seed)) for seed in starts),
        "moments": tuple(golden(seed, moment(seed)) for seed in moments),
    }


def as_stored(policy: Policy) -> tuple[Program, EngineSession]:
    """The lowered program, and a session of the reference in which weights are rounded as they are stored."""
    program, _, _ = lower_for(policy, targets.get("gguf-f32"), {})
    kept = {n: program.params[n].format for n in program.params if program.params[n].format != "f32"}
    changed = {n: program.weights[n].map(lambda w, f=f: stored(w, f)) for n, f in kept.items()}
    session = reference_session(program.replace(weights=program.weights.with_(**changed)), threads=1)
    return program, session


def chunks(policy: Policy, given: Sequence[Golden]) -> tuple[Program, list[np.ndarray]]:
    """The lowered program and its normalised chunks [N, action_dim], weights rounded as they are stored."""
    program, session = as_stored(policy)
    found = []
    for o in given:
        ready = prepared(policy.io, policy.tokenizer, program, o)
        found.append(execute(program, session, ready.env, ready.symbols)[:, : policy.io.action_dim])
    session.close()
    return program, found


def drifts(got: Sequence[np.ndarray], want: Sequence[np.ndarray]) -> dict[str, float]:
    single = [calibrate.drift([g], [w]) for g, w in zip(got, want, strict=True)]
    return {
        "drift": round(calibrate.drift(got, want), 5),
        "median": round(float(np.median(single)), 5),
        "mean": round(float(np.mean(single)), 5),
        "largest": round(max(single), 5),
    }


def row(policy: Policy, recipe: str, judges: dict[str, Any], want: dict[str, list[np.ndarray]]) -> dict[str, Any]:
    started = os.times().user
    after = apply_passes(policy, [recipe])
    seconds = os.times().user - started
    found: dict[str, Any] = {"recipe": recipe}
    for name, given in judges.items():
        program, got = chunks(after, given)
        found[name] = drifts(got, want[name])
        bits = sum(math.prod(p.shape) * FORMATS[p.format].bits for p in program.params.values())
        found["weight_mb"] = round(bits / 8e6, 3)
    return {**found, "pass_cpu_s": round(seconds), "peak_mb": round(peak_mb()), "figures": after.history[-1].figures}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", type=Path, default=BUNDLED)
    parser.add_argument("--observations", type=int, help="that judge; default: 200 of push-cubes, else 4")
    parser.add_argument("--samples", type=int, help="observations that passes calibrate on; default: the pass's own")
    parser.add_argument("--recipes", default=",".join(str(i) for i in range(len(RECIPES))), help="numbers from 0 on")
    options = parser.parse_args()
    bundled = options.checkpoint == BUNDLED
    name = "int4" if bundled else f"int4-{options.checkpoint.name}"
    result = ROOT / "benchmarks" / "results" / f"{name}.json"
    record = json.loads(result.read_text(encoding="utf-8")) if result.exists() else {"rows": []}
    policy = read_policy(str(options.checkpoint))
    count = options.observations or (200 if bundled else 4)
    judges = {"seeded": synthetic(policy.io, count, seed=77)} if not bundled else {}
    for i, seeds in enumerate(SEEDS if bundled else (), start=1):
        judges |= {f"{name}_{i}": given for name, given in unseen(policy.io, count, seeds).items()}
    want = {name: chunks(policy, given)[1] for name, given in judges.items()}
    known = {r["recipe"] for r in record["rows"]}
    for recipe in (RECIPES[int(i)] for i in options.recipes.split(",")):
        given = f"{recipe},samples={options.samples}" if options.samples and recipe != INT4 else recipe
        if given in known:
            continue
        record["rows"].append(row(policy, given, judges, want))
        print(json.dumps(record["rows"][-1]), file=sys.stderr, flush=True)
        record = {
            "what": f"{policy.io.chunk_size} x {policy.io.action_dim} chunks of {options.checkpoint.name}",
            "command": f"python benchmarks/{Path(__file__).name}" + ("" if bundled else " --checkpoint FOLDER"),
            "machine": machine(),
            "versions": versions(),
            "observations": count,
            "rows": sorted(record["rows"], key=lambda r: RECIPES.index(r["recipe"].split(",samples=")[0])),
        }
        result.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
