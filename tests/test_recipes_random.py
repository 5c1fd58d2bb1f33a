"""Random legal recipes across families and targets: whatever passes do together, the compiler must not add to it.

Each case draws passes from what is legal for its family, compiles, and asks parity's first question: the engine against
the fp32 reference on the artifact's own program. The draw is seeded; `--seed` of another run is RECIPE_SEED.
"""

from __future__ import annotations

import os
import random
from pathlib import Path
from typing import Any

import pytest
from checkpoint_files import GOLDEN
from test_openvla import OFT_SPEC
from test_pi0 import HEADS

import vlac
from vlac.engines.base import get_engine
from vlac.parity import parity

pytest.importorskip("torch")

SEED = int(os.environ.get("RECIPE_SEED", "11"))

FAMILIES: dict[str, dict[str, Any]] = {
    "smolvla_tiny": {},
    "pi0_tiny": {"spec": HEADS},
    "pi05_tiny": {"spec": HEADS},
    "openvla_oft_tiny": {"spec": OFT_SPEC, "unnorm_key": "bridge_orig"},
    "groot_n17_tiny": {},
}
FLOW = ("flow-steps:steps=3", "flow-steps:steps=4,solver=midpoint", "flow-steps:steps=3,solver=fitted,samples=2")
LAYERS = ("truncate-layers:keep={less}", "truncate-layers:keep={less},select=influence,samples=1")
TAPS = ("truncate-layers:keep={less},mode=kv-tap", "truncate-layers:keep={less},mode=kv-tap,heal=ridge,samples=2")
TOKENS = ("reduce-visual-tokens:factor=2", "reduce-visual-tokens:factor=2,mass=0", "merge-in-tower:merge=0.2,samples=1")
EXACT = ("smooth-norms:ratio=1", "rotate-values")
CACHE = ("quantize-kv:k=8,v=8", "quantize-kv:k=4,v=4,form=head")
LEGAL: dict[str, tuple[tuple[str, ...], ...]] = {
    "smolvla_tiny": (LAYERS + TAPS, TOKENS, EXACT, FLOW, CACHE),
    "pi0_tiny": (LAYERS + TAPS, TOKENS, EXACT, FLOW, CACHE),
    "pi05_tiny": (LAYERS + TAPS, TOKENS, EXACT, FLOW, CACHE),
    "openvla_oft_tiny": (LAYERS, ("reduce-visual-tokens:factor=2",), EXACT),
    "groot_n17_tiny": (LAYERS, EXACT[:1], FLOW, CACHE),
}
"""For each family groups of passes, in an order in which they are legal; a recipe takes at most one of each."""
LAYER_COUNT = {"smolvla_tiny": 4, "pi0_tiny": 3, "pi05_tiny": 3, "openvla_oft_tiny": 2, "groot_n17_tiny": 4}
TARGETS = (("gguf-f32", "ggml", 1e-4), ("gguf-f32", "torch", 1e-4), ("onnx-fp32", "onnxruntime", 1e-4))
ROUNDED = 2e-2
"""With packed keys and values one code more or less is no error of the compiler."""


def draw(seed: int) -> tuple[str, list[str], tuple[str, str, float]]:
    rng = random.Random(seed)
    family = rng.choice(sorted(FAMILIES))
    groups = [g for g in LEGAL[family] if rng.random() < 0.7] or [LEGAL[family][0]]
    recipe = [rng.choice(g).format(less=LAYER_COUNT[family] - 1) for g in groups]
    return family, recipe, rng.choice(TARGETS)


CASES = [draw(SEED + i) for i in range(6)]


@pytest.mark.parametrize(("family", "recipe", "target"), CASES, ids=lambda v: "" if isinstance(v, str) else None)
def test_the_compiler_adds_nothing(
    family: str, recipe: list[str], target: tuple[str, str, float], tmp_path: Path
) -> None:
    name, engine, bound = target
    if why := get_engine(engine).missing():
        pytest.skip(why)
    made = vlac.compile(GOLDEN / family / "checkpoint", name, tmp_path / "o", recipe, goldens=1, **FAMILIES[family])
    if engine in made.manifest.get("declined", {}):
        pytest.skip(f"{engine} declines by name: {made.manifest['declined'][engine]}")
    report = parity(tmp_path / "o", engine=engine)["compiler"]["chunk"]
    assert report["relative_l2"] < (ROUNDED if "quantize-kv" in " ".join(recipe) else bound), (family, recipe, report)
