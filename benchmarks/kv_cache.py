"""What quantize-kv costs and saves on a policy: drift of the chunk, and bytes that the loop holds, measured.

python benchmarks/kv_cache.py CHECKPOINT [--observations N]

CHECKPOINT: a folder (scripts/make_full_size.py makes a SmolVLA of the published size with random weights). Seeded
observations, the same noise, float32 in the torch engine; the vision stage runs once per observation. "held" is what
the runtime hands to the loop beside what it carries, in bytes. Writes benchmarks/results/kv_cache.json.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from compile_full_size import ROOT, machine, versions

from vlac.api import apply_passes, lower_for
from vlac.checkpoint import read_policy
from vlac.engines.base import EngineSession, NpArray, Values
from vlac.goldens import reference_session, synthetic
from vlac.policy import Policy
from vlac.registry import targets
from vlac.runtime.inputs import prepared
from vlac.runtime.session import execute

RECIPES = (
    "",
    "k=8,v=8",
    "k=5,v=4",
    "k=4,v=4",
    "k=4,v=4,center=0",
    "k=4,v=4,form=head",
    "k=4,v=4,form=inner",
    "k=4,v=8",
    "k=8,v=4",
    "k=3,v=3",
    "k=2,v=2",
)
HELD = "flow_held_bytes"


class VisionOnce(EngineSession):
    """Runs the vision stage of an observation once for all programs: no pass here touches it."""

    engine = "torch"

    def __init__(self, inner: EngineSession, known: dict[bytes, dict[str, NpArray]]) -> None:
        self.inner, self.known = inner, known
        self.info = inner.info

    def run(self, stage: str, inputs: Values, symbols: Mapping[str, int]) -> dict[str, NpArray]:
        if stage != "vision":
            return self.inner.run(stage, inputs, symbols)
        key = np.ascontiguousarray(inputs["pixels"]).tobytes()
        if key not in self.known:
            self.known[key] = self.inner.run(stage, inputs, symbols)
        return self.known[key]


def chunks(policy: Policy, given: Any, known: dict[bytes, dict[str, NpArray]]) -> tuple[list[NpArray], int]:
    """Normalised chunks, and the bytes that the loop holds."""
    program, _, _ = lower_for(policy, targets.get("gguf-f32"), {})
    session = VisionOnce(reference_session(program), known)
    found, stats = [], {}
    for o in given:
        ready = prepared(policy.io, policy.tokenizer, program, o)
        stats = {}
        found.append(execute(program, session, ready.env, ready.symbols, stats=stats))
    session.inner.close()
    return found, int(stats[HELD])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--observations", type=int, default=2)
    options = parser.parse_args()
    policy = read_policy(str(options.checkpoint))
    given, known = synthetic(policy.io, options.observations, seed=77), {}
    want, plain = chunks(policy, given, known)
    b = np.concatenate([c.ravel() for c in want]).astype(np.float64)
    rows = []
    for recipe in RECIPES:
        after = apply_passes(policy, [f"quantize-kv:{recipe}"]) if recipe else policy
        got, held = chunks(after, given, known) if recipe else (want, plain)
        a = np.concatenate([c.ravel() for c in got]).astype(np.float64)
        rows.append(
            {
                "quantize-kv": recipe or "none",
                "cosine": float(a @ b / np.linalg.norm(a) / np.linalg.norm(b)),
                "relative_l2": float(np.linalg.norm(a - b) / np.linalg.norm(b)),
                "held_bytes": held,
                "of_float16": round(held / (plain / 2), 4),
            }
        )
        print(rows[-1], flush=True)
    record = {"machine": machine(), "versions": versions(), "observations": options.observations, "rows": rows}
    (ROOT / "benchmarks" / "results" / "kv_cache.json").write_text(json.dumps(record, indent=1) + "\n", "utf-8")


if __name__ == "__main__":
    main()
