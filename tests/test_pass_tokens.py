"""reduce-visual-tokens and resolution: fewer image tokens, fewer patches, and where positions come from."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from checkpoint_files import GOLDEN
from conftest import GoldenFolder
from hypothesis import given
from hypothesis import strategies as st
from test_openvla import OFT_SPEC
from test_pi0 import HEADS

import vlac
from vlac import calibrate
from vlac.api import apply_passes
from vlac.checkpoint import read_policy
from vlac.engines.base import NpArray, get_engine
from vlac.errors import Inapplicable
from vlac.ops import OPS
from vlac.parity import parity
from vlac.passes.resolution import bicubic, buckets, resampled
from vlac.policy import Policy
from vlac.registry import ReadOptions

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


@given(st.integers(0, 1000), st.integers(1, 4), st.integers(2, 5))
def test_a_key_of_weight_n_is_n_equal_keys(seed: int, queries: int, keys: int) -> None:
    """Exactly what proportional attention promises, through the ops themselves."""
    rng = np.random.default_rng(seed)
    q, k, v = (rng.standard_normal((n, 8)).astype(np.float32) for n in (queries, keys, keys))
    counts = rng.integers(1, 5, keys).astype(np.int32)
    mask = rng.random((queries, keys)) < 0.7
    mask[:, 0] = True
    how = {"heads": 2, "kv_heads": 2, "scale": 0.5}
    weighted = OPS["weighted_mask"].reference([mask, counts], {})
    got = OPS["attention"].reference([q, k, v, weighted], how)
    many = [np.repeat(x, counts, axis=0) for x in (k, v)]
    want = OPS["attention"].reference([q, *many, np.repeat(mask, counts, axis=1)], how)
    np.testing.assert_allclose(got, want, atol=1e-6)


def watched(policy: Policy, absent: int) -> tuple[dict[str, NpArray], dict[str, NpArray]]:
    """(positions and validity of the prefix, with a camera missing; what the loop's stage was given)."""
    (o,) = calibrate.observations(policy, 1)
    images = {k: v for i, (k, v) in enumerate(o.images.items()) if i != absent}
    seen: dict[str, dict[str, NpArray]] = {}

    def see(_: int, stage: str, values: Any) -> None:
        seen.setdefault(stage, dict(values))

    names = {"prefix": ["positions", "prefix_valid"], "flow": ["prefix_count"]}
    calibrate.watch(policy, [dataclasses.replace(o, images=images)], names, see)
    return seen["prefix"], seen["flow"]


@pytest.mark.parametrize("name", ["smolvla_tiny", "pi0_tiny"])
def test_blocks_have_their_middles_positions(golden: Callable[[str], GoldenFolder], name: str) -> None:
    """Against the positions of the untouched policy: the first camera is missing, and nothing else moves."""
    policy = read_policy(str(golden(name).checkpoint), ReadOptions(spec=HEADS if name == "pi0_tiny" else {}))
    policy = policy.replace(io=dataclasses.replace(policy.io, max_missing_cameras=1))
    (before, flow), (after, short) = (watched(p, 0) for p in (policy, apply_passes(policy, ["reduce-visual-tokens"])))
    n = policy.spec.tokens_per_camera
    side, cameras = math.isqrt(n), (len(before["positions"]) - len(after["positions"])) * 4 // (3 * n)
    old = before["positions"][: cameras * n].reshape(cameras, side // 2, 2, side // 2, 2)[
        before["prefix_valid"][: cameras * n : n]
    ]
    want = np.floor(old.transpose(0, 1, 3, 2, 4).reshape(len(old), n // 4, 4).mean(axis=-1))
    valid = after["prefix_valid"]
    got = after["positions"][: cameras * n // 4][valid[: cameras * n // 4]]
    np.testing.assert_array_equal(got, want.reshape(-1))
    np.testing.assert_array_equal(after["positions"][cameras * n // 4 :], before["positions"][cameras * n :])
    np.testing.assert_array_equal(flow["prefix_count"], short["prefix_count"])


def test_weight_positions_and_a_fit_each_bring_it_closer(golden: Callable[[str], GoldenFolder]) -> None:
    policy = read_policy(str(golden("pi0_tiny").checkpoint), ReadOptions(spec=HEADS))
    given = calibrate.observations(policy, 3)
    want = calibrate.watch(policy, given, {}, lambda *_: None)

    def drift(params: str) -> float:
        after = apply_passes(policy, [f"reduce-visual-tokens:{params}"])
        return calibrate.drift(calibrate.watch(after, given, {}, lambda *_: None), want)

    plain = drift("mass=0,positions=packed")
    assert drift("positions=packed") < 0.9 * plain  # 0.51, 0.44
    assert drift("mass=0") < 0.97 * plain and drift("heal=ridge,samples=6") < 0.9 * plain  # 0.48, 0.42


@pytest.mark.parametrize("heal", ["pool", "shuffle"])
def test_healing_is_judged_on_held_out_observations(tiny: Policy, heal: str) -> None:
    figures = apply_passes(tiny, [f"reduce-visual-tokens:method={heal},heal=ridge,samples=8"]).history[0].figures
    assert figures["held_out_observations"] == 2
    assert figures["held_out_token_error_after"] < 0.8 * figures["held_out_token_error_before"]


@pytest.mark.parametrize("engine", ["onnxruntime", "openvino", "ggml"])
def test_engines_weigh_keys(golden: Callable[[str], GoldenFolder], tmp_path: Path, engine: str) -> None:
    if why := get_engine(engine).missing():
        pytest.skip(why)
    checkpoint, target = golden("smolvla_tiny").checkpoint, "gguf-f32" if engine == "ggml" else "onnx-fp32"
    vlac.compile(checkpoint, target=target, out=tmp_path / "o", passes=["reduce-visual-tokens"], goldens=1)
    assert parity(tmp_path / "o", engine=engine)["compiler"]["chunk"]["relative_l2"] < 2e-5


@pytest.mark.parametrize("name", ["openvla_tiny", "openvla_oft_tiny"])
def test_openvla_has_a_retrofit(name: str) -> None:
    """Fewer rows for the decoder, positions of the rest as before; the mean of the projector's tokens."""
    options = ReadOptions(unnorm_key="bridge_orig", spec=OFT_SPEC if "oft" in name else {})
    policy = read_policy(str(GOLDEN / name / "checkpoint"), options)
    side = math.isqrt(policy.spec.tokens_per_camera)
    after = apply_passes(policy, [f"reduce-visual-tokens:factor={side}"])
    assert after.spec.tokens_per_camera == 1
    for a, b in zip(image_tokens(after), image_tokens(policy), strict=True):
        np.testing.assert_allclose(a, b.mean(axis=0, keepdims=True), rtol=1e-4, atol=1e-5)


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
        ("reduce-visual-tokens:positions=middle", "centre, packed"),
        ("reduce-visual-tokens:heal=lstsq", "none, ridge"),
        ("reduce-visual-tokens:heal=ridge,samples=1", "at least 2"),
        ("resolution:size=30", "smaller multiples of 24"),
        ("resolution:size=48", "the tower sees 48"),
        ("resolution:size=0", "the tower sees 48"),
    ],
)
def test_refusals(tiny: Policy, recipe: str, says: str) -> None:
    with pytest.raises(Inapplicable, match=says):
        apply_passes(tiny, [recipe])
