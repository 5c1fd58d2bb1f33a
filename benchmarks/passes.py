"""What each pass does to the action chunk, and how much work and weights it leaves.

python benchmarks/passes.py [--checkpoint FOLDER] [--observations N]

Without --checkpoint: the tiny golden checkpoints (random weights: they tell that a pass is wired right and how passes
compare, not what a trained policy would lose). Drift: relative L2 of the chunk against the untouched policy on
observations that no pass was calibrated on, the same noise, the program lowered for gguf-f32 with weights as stored, in
the fp32 engine. Multiplications: of linears and attention per chunk, every symbol at its largest. CPU: process time of
a chunk in the torch engine on one thread, the least of the observations. Where a policy has recorded observations, the
last 16 judge and passes see the others.
Writes benchmarks/results/passes.json (passes-FOLDER.json with --checkpoint) and prints a table.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from compile_full_size import ROOT, machine, versions
from int4 import as_stored
from visual_tokens import divided

from vlac import calibrate
from vlac.api import apply_passes
from vlac.checkpoint import read_policy
from vlac.errors import Inapplicable
from vlac.formats import FORMATS
from vlac.goldens import synthetic
from vlac.graph import Call, Program, Repeat, infer_stage
from vlac.policy import Policy
from vlac.recorded import Recorded
from vlac.registry import ReadOptions
from vlac.runtime.inputs import prepared
from vlac.runtime.session import execute

sys.path.insert(0, str(ROOT / "tests"))
from test_pi0 import HEADS

RECIPES: tuple[tuple[str, ...], ...] = (
    (),
    ("flow-steps:steps=5",),
    ("flow-steps:steps=5,solver=ab2",),
    ("flow-steps:steps=4,solver=midpoint",),
    ("flow-steps:steps=5,solver=fitted",),
    ("flow-steps:steps=2,solver=fitted",),
    ("flow-steps:steps=2",),
    ("truncate-layers:keep={last},mode=kv-tap",),
    ("truncate-layers:keep={half}",),
    ("truncate-layers:keep={half},select=influence,heal=ridge",),
    ("truncate-layers:keep={half},mode=kv-tap",),
    ("truncate-layers:keep={half},mode=kv-tap,heal=ridge",),
    ("reduce-visual-tokens:factor=2,mass=0,positions=packed",),
    ("reduce-visual-tokens:factor=2",),
    ("reduce-visual-tokens:factor=2,heal=ridge",),
    ("merge-in-tower",),
    ("resolution:size={half_size}",),
    ("quantize-kv:k=8,v=8",),
    ("quantize-kv:k=4,v=4",),
    ("quantize-kv:k=4,v=4,form=head",),
    ("quantize-kv:k=3,v=3",),
    ("smooth-norms:ratio=1",),
    ("rotate-values",),
    ("quantize-weights:format=q8_0",),
    ("quantize-weights:format=q4_0",),
    ("quantize-weights:format=q4_0,method=clip",),
    ("quantize-weights:format=q4_0,method=gptq",),
    ("quantize-weights:format=q4_0,method=gptq,rotate=32",),
    ("mixed-precision:budget=0.05",),
)
NEED_CALIBRATION = ("heal", "fitted", "method", "mixed")
"""Marks of recipes that are left out with --quick: minutes and gigabytes on a model of full size."""


def filled(recipe: Sequence[str], policy: Policy) -> list[str]:
    n, size = policy.spec.text.num_hidden_layers, policy.spec.vision.image_size
    return [r.format(last=n - 1, half=max(1, n // 2), half_size=size // 2) for r in recipe]


def multiplications(program: Program) -> int:
    """Of linears and attentions for one chunk; cameras are counted one by one."""
    symbols = program.max_symbols()
    bound = program.bind(symbols)
    total = 0
    for step in bound.schedule.steps:
        stage = bound.stage(step.stage)
        types, work = infer_stage(stage, bound.params), 0
        for n in stage.nodes:
            shapes = [bound.params[i[1:]].shape if i.startswith("@") else types[i].shape for i in n.inputs]
            if n.op == "linear":
                work += shapes[0][0] * math.prod(shapes[1])
            elif n.op == "attention":
                (q, width), (k, _), (_, v) = shapes[:3]
                work += q * k * (width + v // n.attr["kv_heads"] * n.attr["heads"])
        repeats = (
            step.times
            if isinstance(step, Repeat)
            else symbols.get("C", 1)
            if isinstance(step, Call) and step.each
            else 1
        )
        total += repeats * work
    return total


SECONDS: list[float] = []
"""CPU seconds of every chunk since the last clear: of one thread, so that a busy machine hardly changes them."""


def chunks(policy: Policy, given: Sequence[Any]) -> tuple[Program, list[np.ndarray]]:
    SECONDS.clear()
    program, session = as_stored(policy)
    found = []
    for o in given:
        ready = prepared(policy.io, policy.tokenizer, program, o)
        execute(program, session, ready.env, ready.symbols)
        started = time.process_time()
        found.append(execute(program, session, ready.env, ready.symbols)[:, : policy.io.action_dim])
        SECONDS.append(time.process_time() - started)
    session.close()
    return program, found


def row(policy: Policy, recipe: list[str], given: Sequence[Any], want: Sequence[np.ndarray]) -> dict[str, Any]:
    try:
        after = apply_passes(policy, recipe)
    except Inapplicable as error:
        return {"recipe": recipe, "refused": error.message}
    program, got = chunks(after, given)
    a, b = (np.concatenate([c.ravel() for c in cs]).astype(np.float64) for cs in (got, want))
    return {
        "recipe": recipe,
        "drift": calibrate.drift(got, want),
        "cosine": float(a @ b / np.linalg.norm(a) / np.linalg.norm(b)),
        "multiplications": multiplications(program),
        "weight_bytes": sum(math.prod(p.shape) * FORMATS[p.format].bits / 8 for p in program.params.values()),
        "cpu_ms": round(1e3 * min(SECONDS), 2),
        "figures": dict(after.history[-1].figures) if after.history else {},
    }


def measure(checkpoint: Path, spec: dict[str, Any], count: int, quick: bool) -> list[dict[str, Any]]:
    policy = read_policy(str(checkpoint), ReadOptions(spec=spec))
    given = synthetic(policy.io, count, seed=77)
    work = tempfile.TemporaryDirectory()
    if policy.recorded is not None:  # fits see the others
        _, _, given = divided(policy, 16, Path(work.name))
        policy = policy.replace(recorded=Recorded(Path(work.name) / "observations" / "seen"))
    _, want = chunks(policy, given)
    rows = []
    for recipe in RECIPES:
        text = " ".join(recipe)
        if not (quick and any(mark in text for mark in NEED_CALIBRATION)):
            rows.append(row(policy, filled(recipe, policy), given, want))
            print(
                checkpoint.parent.name,
                text,
                rows[-1].get("drift", rows[-1].get("refused")),
                file=sys.stderr,
                flush=True,
            )
    return rows


def table(measured: dict[str, list[dict[str, Any]]]) -> str:
    """Markdown: one row per recipe, for each checkpoint drift, work and weights as shares of the untouched policy's."""
    names = list(measured)
    lines = [
        "| recipe | " + " | ".join(f"{n}: drift, work, CPU, weights" for n in names) + " |",
        "|---" * (1 + len(names)) + "|",
    ]
    base = {n: measured[n][0] for n in names}
    for i, first in enumerate(measured[names[0]]):
        cells = []
        for n in names:
            r = measured[n][i]
            if "refused" in r:
                cells.append("refused")
                continue
            work, cpu, weights = (r[k] / base[n][k] for k in ("multiplications", "cpu_ms", "weight_bytes"))
            cells.append(f"{r['drift']:.2g}, {work:.0%}, {cpu:.0%}, {weights:.0%}")
        lines.append(f"| `{' '.join(first['recipe']) or 'nothing'}` | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--checkpoint", type=Path)
    parser.add_argument("--observations", type=int, default=4)
    parser.add_argument("--quick", action="store_true", help="leave out recipes that calibrate")
    options = parser.parse_args()
    if options.checkpoint:
        places = {options.checkpoint.name: (options.checkpoint, {})}
        result = ROOT / "benchmarks" / "results" / f"passes-{options.checkpoint.name}.json"
    else:
        golden = ROOT / "tests" / "golden"
        places = {
            n: (golden / n / "checkpoint", HEADS if n.startswith("pi") else {}) for n in ("smolvla_tiny", "pi0_tiny")
        }
        places["push_cubes"] = (ROOT / "vlac" / "zoo" / "push_cubes", {})
        result = ROOT / "benchmarks" / "results" / "passes.json"
    measured = {n: measure(path, spec, options.observations, options.quick) for n, (path, spec) in places.items()}
    record = {"machine": machine(), "versions": versions(), "observations": options.observations, "rows": measured}
    result.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    print(table(measured), end="")


if __name__ == "__main__":
    main()
