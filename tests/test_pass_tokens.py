"""reduce-visual-tokens and resolution: fewer image tokens, fewer patches, and where positions come from."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import numpy as np
import pytest
from conftest import GoldenFolder
from hypothesis import given
from hypothesis import strategies as st

from vlac import calibrate
from vlac.api import apply_passes
from vlac.checkpoint import read_policy
from vlac.engines.base import NpArray
from vlac.errors import Inapplicable
from vlac.passes.resolution import bicubic, buckets, resampled
from vlac.policy import Policy

torch = pytest.importorskip("torch")


@pytest.fixture(scope="module")
def tiny(golden: Callable[[str], GoldenFolder]) -> Policy:
    return read_policy(str(golden("smolvla_tiny").checkpoint))


def image_tokens(policy: Policy) -> list[NpArray]:
    """What the vision stage gives for every camera of two observations."""
    seen: list[NpArray] = []
    stage = calibrate.draw(policy).stage("vision")
    watched = {"vision": list(stage.outputs)}
    calibrate.watch(policy, calibrate.observations(policy, 2), watched, lambda _, __, v: seen.append(v["image_tokens"]))
    return seen


@pytest.mark.parametrize("method", ["pool", "shuffle"])
def test_a_token_is_the_mean_of_its_block(tiny: Policy, method: str) -> None:
    after = apply_passes(tiny, [f"reduce-visual-tokens:factor=2,method={method}"])
    assert (tiny.spec.tokens_per_camera, after.spec.tokens_per_camera) == (4, 1)
    for a, b in zip(image_tokens(after), image_tokens(tiny), strict=True):
        np.testing.assert_allclose(a, b.mean(axis=0, keepdims=True), rtol=1e-5, atol=1e-6)
    figures = after.history[0].figures
    assert (figures["tokens_per_camera_before"], figures["tokens_per_camera_after"]) == (4, 1)
    grown = figures["parameters_after"] - figures["parameters_before"]
    assert grown == (0 if method == "pool" else 3 * np.prod(tiny.weights["connector.proj.weight"].shape))


def test_blocks_are_square(tiny: Policy) -> None:
    """On a 4x4 grid of tokens (a smaller shuffle) rows 0, 1, 4, 5 become the first token."""
    width, hidden = tiny.spec.vision.hidden_size, tiny.spec.text.hidden_size
    smaller = tiny.replace(
        spec=dataclasses.replace(tiny.spec, scale_factor=2),
        weights=tiny.weights.map("connector.proj.weight", lambda w: w[:, : 4 * width].copy(), (hidden, 4 * width)),
    )
    before = image_tokens(smaller)
    for method in ("pool", "shuffle"):
        after = image_tokens(apply_passes(smaller, [f"reduce-visual-tokens:factor=2,method={method}"]))
        for a, b in zip(after, before, strict=True):
            blocks = b.reshape(2, 2, 2, 2, -1).mean(axis=(1, 3)).reshape(4, -1)
            np.testing.assert_allclose(a, blocks, rtol=1e-5, atol=1e-6)


def test_resolution_changes_pictures_positions_and_size(tiny: Policy) -> None:
    assert any("width" in s.params for s in tiny.io.image_steps)
    after = apply_passes(tiny, ["resolution:size=24"])
    assert after.spec.vision.image_size == after.io.image_size == 24
    assert [s.params["width"] for s in after.io.image_steps if "width" in s.params] == [24]
    old, new = (p.weights["vision.position_embedding"].load() for p in (tiny, after))
    rows = [r * 8 + c for r in (0, 2, 4, 6) for c in (0, 2, 4, 6)]  # every second of the 8x8 table
    np.testing.assert_array_equal(new, old[rows])
    assert after.history[0].figures["patches_after"] == 16
    (tokens, *_) = image_tokens(after)
    assert tokens.shape == (1, tiny.spec.text.hidden_size)


def test_without_a_resize_the_camera_decides(tiny: Policy) -> None:
    steps = tuple(s for s in tiny.io.image_steps if "width" not in s.params)
    bare = tiny.replace(io=dataclasses.replace(tiny.io, image_steps=steps))
    with pytest.raises(Inapplicable, match="without a resize"):
        apply_passes(bare, ["resolution:size=24"])


@given(st.integers(1, 40), st.integers(1, 40))
def test_buckets_are_idefics3s(new: int, trained: int) -> None:
    """floor of the fractional coordinate in units of the trained grid, with exact fractions."""
    from fractions import Fraction

    one = [int(Fraction(i, new) * trained) for i in range(new)]
    np.testing.assert_array_equal(buckets(new, trained), [a * trained + b for a in one for b in one])


@pytest.mark.parametrize(("new", "trained"), [(8, 16), (12, 16), (7, 16), (16, 16), (3, 5)])
def test_bicubic_is_torchs(new: int, trained: int) -> None:
    table = np.random.default_rng(0).standard_normal((trained**2, 6)).astype(np.float32)
    grid = torch.from_numpy(table).double().reshape(1, trained, trained, 6).permute(0, 3, 1, 2)
    want = torch.nn.functional.interpolate(grid, size=(new, new), mode="bicubic", align_corners=False)
    got = resampled(table, new, trained)
    np.testing.assert_allclose(got, want[0].permute(1, 2, 0).reshape(new * new, 6).numpy(), atol=2e-6)
    np.testing.assert_allclose(bicubic(new, trained).sum(axis=1), 1, atol=1e-12)


@pytest.mark.parametrize(
    ("recipe", "says"),
    [
        ("reduce-visual-tokens:factor=3", "2x2 tokens per camera; legal: 2"),
        ("reduce-visual-tokens:factor=1", "legal: 2"),
        ("reduce-visual-tokens:method=drop", "pool, shuffle"),
        ("resolution:size=30", "smaller multiples of 24"),
        ("resolution:size=48", "the tower sees 48"),
        ("resolution:size=0", "the tower sees 48"),
    ],
)
def test_refusals(tiny: Policy, recipe: str, says: str) -> None:
    with pytest.raises(Inapplicable, match=says):
        apply_passes(tiny, [recipe])
