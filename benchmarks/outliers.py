"""What outlier channels cost every shipped int8 form: the same network, rescaled so that a few channels tower.

python benchmarks/outliers.py CHECKPOINT [--factor 25] [--channels 6] [--observations 2] [--out FILE.json]

In every norm whose results only linears read, `channels` channels get `factor` times as large and the columns of the
readers that much smaller: float32 answers stay the same, int8 activations do not. Each int8 target is compiled from the
original, from the rescaled network without smooth-norms, and from the rescaled one as it ships; drift is relative L2 of
normalised chunks against the fp32 reference of the original, the worst observation. Nothing is timed.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

import vlac
from vlac import calibrate
from vlac.policy import Policy
from vlac.registry import Pass, passes, targets

FORMS = (
    ("onnx-int8", "onnxruntime"),
    ("onnx-int8", "openvino"),
    ("openvino-int8", "openvino"),
    ("gguf-q8", "ggml"),
)
LIMIT = 0.046
CASES = {"plain": (), "outliers": ("outliers",), "as shipped": ("outliers",)}


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


def measure(checkpoint: str, observations: int, work: Path) -> list[dict[str, Any]]:
    """One row for each form: drift in every case."""
    rows: dict[tuple[str, str], dict[str, Any]] = {f: {"target": f[0], "engine": f[1]} for f in FORMS}
    for target in dict.fromkeys(t for t, _ in FORMS):
        entry = targets.get(target)
        for case, recipe in CASES.items():
            if case == "outliers":
                targets.add(dataclasses.replace(entry, passes=()))
            try:
                out = work / f"{target}-{case.replace(' ', '-')}"
                vlac.compile(checkpoint, target=target, out=out, passes=recipe, goldens=observations)
            finally:
                targets.add(entry)
            for form, row in rows.items():
                if form[0] == target:
                    row[case] = drift(out, form[1])
                    print(f"{form[0]} on {form[1]}, {case}: {row[case]:.4f}", flush=True)
    return list(rows.values())


def main() -> None:
    """All forms; exits with 1 when one that ships exceeds the limit."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint")
    parser.add_argument("--factor", type=float, default=25.0)
    parser.add_argument("--channels", type=int, default=6)
    parser.add_argument("--observations", type=int, default=2)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    register(args.factor, args.channels)
    with tempfile.TemporaryDirectory() as folder:
        rows = measure(args.checkpoint, args.observations, Path(folder))
    report = {"factor": args.factor, "channels": args.channels, "limit": LIMIT, "rows": rows}
    if args.out is not None:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    raise SystemExit(any(r["as shipped"] > LIMIT for r in rows))


if __name__ == "__main__":
    main()
