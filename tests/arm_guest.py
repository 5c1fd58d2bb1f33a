"""What scripts/test-arm runs on both sides, emulated and not: vlac's own runtime answers an artifact's observations.

    python tests/arm_guest.py REQUEST.json ANSWERS.npz

REQUEST: {"runs": {name: {"path", "engine", "options", "x"}}}. ANSWERS: for each name its values "NAME/...", and "info",
JSON: {"emulated", "machine", "cpu", "features", "runs": {name: what the engine says it runs on, or {"refused": why}}}.
The values are chunks ("NAME/0", "NAME/1", ...); of an artifact with an "x" (.npy) they are the outputs of its stages,
which read nothing else. Needs what a robot has: numpy, tokenizers, pillow and one engine. No time is taken or told.
"""

from __future__ import annotations

import json
import os
import platform
import sys
import warnings
from pathlib import Path

import numpy as np

import vlac
from vlac import machine
from vlac.artifact import open_artifact
from vlac.engines import ggml_lib
from vlac.engines.base import get_engine
from vlac.errors import VlacError, VlacWarning

Values = dict[str, np.ndarray]


def chunks(run: dict) -> tuple[Values, dict]:
    """An artifact's answers to its golden observations."""
    with vlac.load(run["path"], engine=run["engine"], threads=1, options=run["options"]) as policy:
        seen = policy.artifact.goldens()
        made = {str(i): policy.act(s.images, s.state, s.task, noise=s.noise) for i, s in enumerate(seen)}
        return made, policy.info


def stages(run: dict) -> tuple[Values, dict]:
    """What every stage of an artifact makes of `x`."""
    artifact = open_artifact(run["path"])
    session = get_engine(run["engine"]).open(artifact, threads=1, options=run["options"])
    given = {"noise": np.load(run["x"])}
    made: Values = {}
    for stage in artifact.program.stages:
        made |= session.run(stage.name, given, {})
    return made, session.info


def main(request: str, answers: str) -> None:
    arrays: Values = {}
    said: dict[str, dict] = {}
    if os.environ.get("VLAC_ARM_TRUST"):  # as if a wrong library had passed its self-test
        from vlac.engines.ggml_selftest import best_variant

        ggml_lib.check = best_variant
    for name, run in json.loads(Path(request).read_text(encoding="utf-8"))["runs"].items():
        try:
            made, info = stages(run) if "x" in run else chunks(run)
        except VlacError as error:
            said[name] = {"refused": error.message}
            continue
        arrays |= {f"{name}/{k}": v for k, v in made.items()}
        said[name] = {k: v for k, v in info.items() if isinstance(v, str | int | bool) and k != "artifact"}
    info = {
        "emulated": machine.emulation(),
        "machine": platform.machine(),
        "cpu": machine.cpu_name(),
        "features": machine.cpu_features(),
        "runs": said,
    }
    np.savez(answers, info=np.array(json.dumps(info)), **arrays)


if __name__ == "__main__":
    warnings.simplefilter("ignore", VlacWarning)
    main(*sys.argv[1:])
