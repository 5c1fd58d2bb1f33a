"""The process in which `vlac doctor` tries one engine: for each target a product of matrices is written and run.

    python -m vlac.doctor_worker ENGINE TARGET [TARGET ...]

A line of JSON per target, as soon as it is known, so that an engine which kills the process is found out.
"""

from __future__ import annotations

import dataclasses
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from vlac.artifact import FORMAT_VERSION, Artifact, Sidecars, open_artifact
from vlac.engines.base import get_engine
from vlac.errors import VlacError
from vlac.graph import Call, Param, Program, Schedule, StageBuilder
from vlac.io import IO
from vlac.registry import Target, silent, targets
from vlac.weights import LazyTensor, Weights

ROWS, INTO, OUT = 2, 256, 64
"""A row of 256 suits the blocks of every format."""
LIKE = 0.97
"""Cosine with the float32 product from which a target works: 4-bit weights reach 0.99, a wrong kernel none."""


def product(target: Target) -> Program:
    """y [2, 64] = state [2, 256] @ w.T, in the format that the target plans for a linear."""
    b = StageBuilder("product")
    b.output(b.op("linear", b.input("state", "f32", ROWS, INTO), "@w", name="y"))
    values = np.random.default_rng(1).standard_normal((OUT, INTO)).astype(np.float32) / 16
    params = {"w": Param((OUT, INTO), target.plan("w", (OUT, INTO), "linear"))}
    weights = Weights({"w": LazyTensor.of(values, "w")})
    return Program("product", (), (b.build(),), params, Schedule((Call("product"),), "y"), weights)


def written(target: Target, folder: Path) -> Artifact:
    """The product as an artifact of the target; VlacError where it cannot be written here."""
    program = product(target)
    shape: dict[str, Any] = {
        "state_key": "state",
        "state_dim": INTO,
        "action_key": "action",
        "action_dim": OUT,
        "max_action_dim": OUT,
        "chunk_size": ROWS,
        "n_action_steps": ROWS,
    }
    steps = [f.name for f in dataclasses.fields(IO) if f.name.endswith("_steps") and f.name != "n_action_steps"]
    lists: dict[str, Any] = dict.fromkeys(steps, ())
    io = IO(cameras=(), **shape, **lists)
    manifest = {
        "format_version": FORMAT_VERSION,
        "engines": list(target.engines),
        "target": target.name,
        "family": "product",
        "parameters": OUT * INTO,
    }
    sidecars = Sidecars(str(program), io.to_json(), manifest, None, None)
    target.emit(program, sidecars, folder, {}, silent)
    return open_artifact(folder)


def attempt(name: str, engine: str) -> dict[str, Any]:
    """{"target", "written", "works", "says"}: says is empty where it works, else why not, with what to do."""
    target = targets.get(name)
    found: dict[str, Any] = {"target": name, "written": False, "works": False, "says": ""}
    with tempfile.TemporaryDirectory(prefix="vlac-doctor-") as folder:
        try:
            artifact = written(target, Path(folder))
            found["written"] = True
            if engine == "-":
                return found
            session = get_engine(engine).open(artifact, threads=1)
            x = np.random.default_rng(0).standard_normal((ROWS, INTO)).astype(np.float32)
            y = session.run("product", {"state": x}, {})["y"]
            session.close()
        except VlacError as error:
            found["says"] = f"{error.message}" + (f" -> {error.remedy}" if error.remedy else "")
        except Exception as error:  # whatever an engine throws: the others are still to be tried
            found["says"] = f"{type(error).__name__}: {error}"
        else:
            want = x @ product(target).weights["w"].load().T
            like = float((y * want).sum() / np.linalg.norm(y) / np.linalg.norm(want))
            found["works"] = bool(like > LIKE)
            found["says"] = "" if found["works"] else f"a product of matrices is wrong: cosine {like:.3f}"
    return found


def main() -> None:
    """Tries every target named."""
    for name in sys.argv[2:]:
        print(json.dumps(attempt(name, sys.argv[1])), flush=True)


if __name__ == "__main__":
    main()
