"""What outlier channels cost every shipped int8 form: the same network, rescaled so that a few channels tower.

python benchmarks/outliers.py CHECKPOINT [--factor 25] [--channels 6] [--observations 2] [--cases ...] [--out FILE.json]

In every norm whose results only linears read, `channels` channels get `factor` times as large and the columns of the
readers that much smaller: float32 answers stay the same, int8 activations do not. Each int8 target is compiled from the
original, from the rescaled network without smooth-norms, and from the rescaled one as it ships; drift is relative L2 of
normalised chunks against the fp32 reference of the original, the worst observation. Nothing is timed.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

import vlac
from vlac import calibrate
from vlac.policy import Policy
from vlac.registry import Pass, passes, targets

FORMS = (
    ("onnx-int8", "onnxruntime", ""),
    ("onnx-int8", "openvino", ""),
    ("openvino-int8", "openvino", ""),
    ("gguf-q8", "ggml", ""),
    ("onnx-int8", "onnxruntime", "quantize-weights:bits=8,group=channel,act=int8-tensor,samples=4"),
    ("openvino-int8", "openvino", "quantize-weights:bits=8,group=channel,act=int8-tensor,attend=true,samples=4"),
)
"""(target, engine, pass that fixes scales of activations, or "" for scales that are taken while running)."""
LIMIT = 0.046
CASES = {"plain": (), "outliers": ("outliers",), "as shipped": ("outliers",)}
"""Fixed scales are shipped with smooth-norms before them: a target's own passes do not follow passes that round."""


def add_outliers(policy: Policy, factor: float, channels: int, seed: int) -> tuple[Policy, Mapping[str, Any]]:
    """The pass: weights whose float32 function is that of the policy's, with outlier channels."""
    from vlac.passes.smooth_norms import smoothable

    rng, weights = np.random.default_rng(seed), policy.weights
    norms = smoothable(calibrate.draw(policy))
    for norm in norms:
        width = policy.weights[norm.params[0]].shape[0]
        r = np.ones(width, np.float32)
        r[rng.choice(width, min(channels, width // 4), replace=False)] = factor
        for name in norm.params:
            weights = weights.map(name, lambda v, r=r: v * r)
        for name in norm.readers:
            weights = weights.map(name, lambda v, r=r: v / r)
    return policy.replace(weights=weights), {"norms": len(norms)}


def register(factor: float, channels: int) -> None:
    """The pass under the name "outliers"."""
    passes.all()  # those of the package come first
    passes.add(
        Pass(
            name="outliers",
            apply=add_outliers,
            params={"factor": (float, factor, "of a channel"), "channels": (int, channels, "of each norm")}
            | {"seed": (int, 0, "which channels")},
            doc="A benchmark's own: the same function with outlier channels.",
        )
    )


def drift(artifact: Path, engine: str, **options: Any) -> float:
    """The worst observation's, against the reference's answers in the artifact."""
    worst = 0.0
    with vlac.load(artifact, engine=engine, options=options) as policy:
        for g in policy.artifact.goldens():
            chunk = policy.act(
                images=g.images, state=g.state, task=g.task, noise=g.noise, units=policy.hparams.units, reuse=False
            )
            worst = max(worst, float(np.linalg.norm(chunk - g.chunk) / np.linalg.norm(g.chunk)))
    return worst


def measure(checkpoint: str, observations: int, work: Path, cases: Sequence[str]) -> list[dict[str, Any]]:
    """One row for each form: drift in every case. An artifact is deleted when it has answered."""
    rows = {f: {"target": f[0], "engine": f[1], "passes": f[2]} for f in FORMS}
    for target, fixed in dict.fromkeys((t, p) for t, _, p in FORMS):
        entry = targets.get(target)
        for case in cases:
            own = () if case == "outliers" else entry.passes
            recipe = (*CASES[case], *own, fixed) if fixed else CASES[case]
            out = work / target
            targets.add(dataclasses.replace(entry, passes=own))
            try:
                vlac.compile(checkpoint, target=target, out=out, passes=recipe, goldens=observations)
            finally:
                targets.add(entry)
            for form, row in rows.items():
                if (form[0], form[2]) == (target, fixed):
                    row[case] = drift(out, form[1])
                    how = ", fixed scales" if fixed else ""
                    print(f"{form[0]} on {form[1]}{how}, {case}: {row[case]:.4f}", flush=True)
            shutil.rmtree(out)
    return list(rows.values())


def main() -> None:
    """All forms; exits with 1 when one that ships exceeds the limit."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint")
    parser.add_argument("--factor", type=float, default=25.0)
    parser.add_argument("--channels", type=int, default=6)
    parser.add_argument("--observations", type=int, default=2)
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    register(args.factor, args.channels)
    with tempfile.TemporaryDirectory() as folder:
        rows = measure(args.checkpoint, args.observations, Path(folder), args.cases)
    report = {"factor": args.factor, "channels": args.channels, "limit": LIMIT, "rows": rows}
    if args.out is not None:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    raise SystemExit(any(r.get("as shipped", 0.0) > LIMIT for r in rows))


if __name__ == "__main__":
    main()
