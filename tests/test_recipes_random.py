"""Random legal recipes on every family and target, and each pass alone: whatever passes do, the compiler adds nothing.

A recipe is drawn from all passes in all orders until the compiler takes it: what it refuses, it refuses by name. Then
every engine that opens the artifact answers parity's first question, at parity's own limits. The draw is seeded:
RECIPE_SEED is another seed. Each target and each pass meets two families; with RECIPES=n every family, n times.
"""

from __future__ import annotations

import os
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from family_cases import CASES, Case

import vlac
from vlac.artifact import open_artifact
from vlac.engines.base import get_engine
from vlac.errors import VlacError
from vlac.parity import parity
from vlac.registry import passes, targets

pytest.importorskip("torch")
pytestmark = pytest.mark.filterwarnings("ignore::vlac.errors.VlacWarning")

SEED = int(os.environ.get("RECIPE_SEED", "11"))
RECIPES = int(os.environ.get("RECIPES", "0"))
TARGETS = tuple(t.name for t in targets.all())
TRIES = 200
"""Recipes that are drawn for one that is legal."""

FORMS: dict[str, tuple[str, ...]] = {
    "truncate-layers": (
        "keep={layers}",
        "keep={layers},select=angular,samples=2",
        "keep={layers},select=influence,samples=2",
        "keep={layers},mode=kv-tap",
        "keep={layers},mode=kv-tap,heal=ridge,samples=4",
        "keep={layers},heal=ridge,samples=4",
    ),
    "reduce-visual-tokens": (
        "factor=2",
        "factor=2,mass=0",
        "factor=2,positions=packed",
        "factor=2,method=shuffle",
        "factor=2,heal=ridge,samples=4",
    ),
    "merge-in-tower": ("merge=0.2,samples=2", "merge=0.4,samples=2"),
    "resolution": ("size={size}",),
    "smooth-norms": ("", "ratio=1", "ratio=1,samples=2", "ratio=1,alpha=0.3"),
    "rotate-values": ("", "seed=3", "part=text", "part=vision"),
    "flow-steps": (
        "steps={steps}",
        "steps={steps},grid=cosine",
        "steps={steps},solver=ab2",
        "steps=4,solver=midpoint",
        "steps={steps},solver=fitted,samples=2",
    ),
    "quantize-kv": ("k={k},v={v}", "k={k},v={v},form=head,center=0", "k={k},v={v},protect=1", "form=inner"),
    "quantize-weights": (
        "bits={bits},group={group},method={method},samples=4",
        "bits={bits},group={group},method={method},rotate={turn},samples=4",
        "bits={bits},method={method},bias_correct=1,samples=4",
        "bits=8,group=channel,act={act},samples=4",
        "bits=8,group=channel,act={act},smooth=0.5,samples=4",
        "bits=8,group=channel,act=int8-tensor,attend=1,samples=4",
        "bits=4,method=gptq,tune=4,samples=4",
        "format={format}",
    ),
    "mixed-precision": (
        "budget=rel_l2<=0.1,low=q5_0,high=q8_0,samples=1",
        "budget=rel_l2<=0.1,low=int8,high=f16,samples=1",
        "size=10MB,low=bf16,high=f32,samples=1",
    ),
}
"""What each pass may be given; merge-lora needs an adapter of the family and has tests of its own."""
LEGAL: dict[str, tuple[Any, ...]] = {
    "layers": (1, 2, 3),
    "size": (16, 32, 48, 64),
    "steps": (1, 2, 3, 5),
    "k": (2, 3, 4, 5, 8),
    "v": (2, 3, 4, 5, 8),
    "bits": (4, 8),
    "group": ("16", "32", "64", "128", "channel"),
    "method": ("rtn", "clip", "hqq", "awq", "gptq"),
    "turn": ("hadamard", "block16", "block32"),
    "act": ("int8-token", "int8-block32", "int8-tensor"),
    "format": ("f16", "bf16", "int8", "int4", "q8_0", "q5_0", "q4_0"),
}


def drawn(rng: random.Random, name: str) -> str:
    """A pass with values, as --pass takes it."""
    text = rng.choice(FORMS[name]).format(**{key: rng.choice(values) for key, values in LEGAL.items()})
    return f"{name}:{text}" if text else name


def made(case: Case, target: str, recipe: list[str], out: Path) -> bool:
    """Whether the compiler takes the recipe; a refusal leaves nothing behind."""
    try:
        vlac.compile(case.checkpoint, target, out, recipe, goldens=1, **case.options)
    except VlacError as refused:
        assert str(refused)
        assert not out.exists()
        return False
    return True


def asked(out: Path, target: str, recipe: list[str]) -> None:
    """Parity's first question of every engine that is here; what TensorRT is given runs in ONNX Runtime."""
    engines = open_artifact(out).manifest["engines"]
    if target.startswith("tensorrt") and target != "tensorrt-bf16":
        engines = [*engines, "onnxruntime"]
    for engine in engines:
        if not get_engine(engine).missing():
            report = parity(out, engine=engine)["compiler"]
            assert report is None or report["ok"], (engine, recipe, report)


def pairs(names: Sequence[str]) -> list[tuple[str, str]]:
    """(family, name): all, or two families for each name."""
    few = [(f, n) for n in names for f in random.Random(f"{SEED} {n}").sample(sorted(CASES), 2)]
    return [(f, n) for f in CASES for n in names] if RECIPES else few


def test_every_pass_is_drawn() -> None:
    assert {p.name for p in passes.all()} == {*FORMS, "merge-lora"}


@pytest.mark.parametrize(("family", "target"), pairs(TARGETS))
def test_a_random_recipe(family: str, target: str, tmp_path: Path) -> None:
    for number in range(max(1, RECIPES)):
        rng = random.Random(f"{SEED + number} {family} {target}")
        out = tmp_path / f"{number}"
        for _ in range(TRIES):
            recipe = [drawn(rng, name) for name in rng.sample(sorted(FORMS), rng.randint(1, 4))]
            if made(CASES[family], target, recipe, out):
                break
        else:
            pytest.fail(f"none of {TRIES} recipes is legal")
        asked(out, target, recipe)


@pytest.mark.parametrize(("family", "name"), pairs(sorted(FORMS)))
def test_a_pass_alone(family: str, name: str, tmp_path: Path) -> None:
    """On targets drawn by the seed; a pass may make no sense for a family, in any form."""
    for number in range(max(1, RECIPES)):
        rng = random.Random(f"{SEED + number} {family} {name}")
        out = tmp_path / f"{number}"
        for _ in range(2 * len(FORMS[name])):
            target, recipe = rng.choice(TARGETS), [drawn(rng, name)]
            if made(CASES[family], target, recipe, out):
                asked(out, target, recipe)
                break
