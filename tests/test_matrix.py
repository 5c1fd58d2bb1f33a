"""Every family's golden checkpoint through every target in every engine that opens it, and through every pass.

Targets are those of the registry: one that BOUNDS does not know fails here. What is measured is the distance to the
original implementation's own answer. The weights are random and at most 60 wide, so formats of 8 bits and fewer cost
far more than on a trained network; K-quants fall back to Q8_0 in rows this short (tests/test_sizes.py has longer ones).
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from family_cases import CASES, Case, first_turn_of, reference_turn

import vlac
from vlac.engines.base import get_engine
from vlac.errors import Inapplicable
from vlac.parity import parity
from vlac.registry import passes, targets

pytest.importorskip("torch")
pytestmark = pytest.mark.filterwarnings("ignore::vlac.errors.VlacWarning")

NpArray = np.ndarray[Any, Any]

BOUNDS = {
    "gguf-f32": 1e-5,
    "onnx-fp32": 1e-5,
    "gguf-f16": 2e-3,
    "onnx-fp16": 2e-3,
    "gguf-bf16": 0.02,
    "gguf-q8": 0.06,
    "gguf-q6": 0.06,
    "gguf-q5": 0.12,
    "gguf-q4": 0.35,
    "onnx-int8": 0.08,
    "onnx-int4": 0.8,
    "openvino-bf16": 0.02,
    "openvino-int8": 0.08,
    "tensorrt": 1e-5,
    "tensorrt-fp16": 5e-3,
    "tensorrt-bf16": 0.05,
    "tensorrt-int8": 0.2,
    "tensorrt-fp8": 0.4,
    "tensorrt-int4": 0.8,
}
"""Target -> relative L2 of the action (robot units), or of the first turn (`first_turn`) where tokens are picked."""

TOKENS = ("gguf-f32", "onnx-fp32", "gguf-f16")
"""Targets in which every token is the original's."""

Compiled = Callable[[str, str], Path]


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> Compiled:
    """compiled(case, target): the path of an artifact, made once."""
    made: dict[tuple[str, str], Path] = {}

    def get(name: str, target: str) -> Path:
        if (name, target) not in made:
            case = CASES[name]
            out = tmp_path_factory.mktemp("matrix") / "made"
            path = vlac.compile(case.checkpoint, target, out, goldens=1, **case.options).path
            assert path is not None
            made[name, target] = path
        return made[name, target]

    return get


def distance(found: NpArray, told: NpArray) -> float:
    assert found.shape == told.shape
    return float(np.linalg.norm(found - told) / np.linalg.norm(told))


def runs() -> list[tuple[str, str]]:
    """(target, engine): torch only for float32, of which it is the reference; it decodes all other formats alike."""
    pairs = [(t.name, e) for t in targets.all() for e in t.engines]
    # where there is no GPU, what TensorRT is given runs in ONNX Runtime; which knows no bfloat16 on CPUs
    pairs += [(t, "onnxruntime") for t, e in pairs if e == "tensorrt" and t != "tensorrt-bf16"]
    return [(t, e) for t, e in pairs if e != "torch" or t == "gguf-f32"]


def test_every_target_has_a_bound() -> None:
    assert {t.name for t in targets.all()} <= set(BOUNDS)


@pytest.mark.parametrize(("target", "engine"), runs())
@pytest.mark.parametrize("name", CASES)
def test_the_originals_answer(name: str, target: str, engine: str, compiled: Compiled) -> None:
    case = CASES[name]
    if why := get_engine(engine).missing():
        pytest.skip(f"{engine}: {why}")
    with vlac.load(compiled(name, target), engine=engine, threads=1) as policy:
        for i in case.observations:
            asked = case.observation(i)
            if case.ids is None:
                assert distance(policy.act(**asked), case.answer(i)) <= BOUNDS[target]
                continue
            chunk = policy.act(**asked)
            assert chunk.shape == case.answer(i).shape
            assert distance(first_turn_of(policy, asked), told_turn(case, i)) <= BOUNDS[target]
            if target in TOKENS:
                assert policy.tokens is not None
                assert policy.tokens.tolist() == case.tokens(i)
                assert distance(chunk, case.answer(i)) <= 1e-5


_TOLD: dict[tuple[str, int], NpArray] = {}


def told_turn(case: Case, i: int) -> NpArray:
    """The original's logits of the first token where they were kept, else what the checkpoint computes as drawn."""
    if (case.name, i) not in _TOLD:
        kept = case.arrays.get(f"obs{i}_step_logits")
        _TOLD[case.name, i] = reference_turn(case, i) if kept is None else kept[0]
    return _TOLD[case.name, i]


# --- passes ----------------------------------------------------------------------------------------------------

FLOW = ("smolvla_tiny", "smolvla_letterbox", "pi0_tiny", "pi05_tiny", "groot_n17_tiny")
PREFIX = (*(n for n in FLOW if n != "groot_n17_tiny"), "pi0fast_tiny")
SMALL = ("openvla_tiny", "tinyvla_tiny", "tinyvla_v1_tiny")

RECIPES: dict[str, tuple[str, ...]] = {
    "flow-steps:steps=3": FLOW,
    "flow-steps:steps=4,solver=ab2": FLOW,
    "merge-in-tower:samples=1": PREFIX,
    "mixed-precision:budget=0.2,samples=1,low=q8_0,high=f16": SMALL,
    "quantize-kv": (*PREFIX, "openvla_tiny"),
    "quantize-weights:format=q8_0": tuple(CASES),
    "quantize-weights:format=q4_0,method=gptq,samples=1": tuple(CASES),
    "reduce-visual-tokens:factor=2": tuple(n for n in PREFIX if n != "smolvla_letterbox"),  # 3x3 tokens
    "resolution:size=24": (),
    "rotate-values": tuple(CASES),
    "smooth-norms": tuple(CASES),
    "truncate-layers:keep=2": PREFIX,
}
"""Pass with parameters -> the goldens to which it must apply; Inapplicable is the right answer for others."""

SLOW = "mixed-precision"
"""Measures every linear on its own: tried on small programs only."""


NEED_FILES = {"merge-lora"}
"""Passes that want a file of the user's; their own tests make one."""


def test_every_pass_is_tried() -> None:
    assert {p.name for p in passes.all()} <= {recipe.partition(":")[0] for recipe in RECIPES} | NEED_FILES


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("name", CASES)
def test_a_pass_applies_and_is_compiled_right(name: str, recipe: str, tmp_path: Path) -> None:
    """What the pass costs is no question here: that the engine computes the program it was given, is."""
    case = CASES[name]
    if recipe.startswith(SLOW) and name not in SMALL:
        pytest.skip("a second for each linear")
    try:
        made = vlac.compile(case.checkpoint, "gguf-f32", tmp_path / "out", [recipe], goldens=1, **case.options)
    except Inapplicable:
        assert name not in RECIPES[recipe]
        return
    assert made.path is not None
    engine = "torch" if get_engine("ggml").missing() else "ggml"
    report = parity(made.path, engine=engine, threads=1)
    assert report["compiler"] is None or report["compiler"]["ok"], report["compiler"]
