"""Weights of linears that read pictures: rounded to bfloat16 so that errors cancel where pictures are smooth."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from checkpoint_files import GOLDEN
from conftest import GoldenFolder

from vlac.api import lower_for
from vlac.checkpoint import read_policy
from vlac.graph import Program
from vlac.layouts import bf16_from_f32, f32_from_bf16
from vlac.ops import OPS, NpArray
from vlac.registry import ReadOptions, targets
from vlac.rewrites import rounding
from vlac.rewrites.rounding import _alike, rounded


def nearest(w: NpArray) -> NpArray:
    return np.asarray(f32_from_bf16(bf16_from_f32(w)))


def test_what_is_rounded_is_held_exactly_and_errors_cancel_over_a_group() -> None:
    w = np.random.default_rng(0).standard_normal((40, 16 * 6)).astype(np.float32)
    shaped = rounded(w, _alike(16, 0.9))
    np.testing.assert_array_equal(shaped, nearest(shaped))
    sums = [np.square((q - w).reshape(40, 16, 6).sum(1)).sum() for q in (shaped, nearest(w))]
    assert sums[0] < 0.1 * sums[1]
    assert np.square(shaped - w).sum() < 2 * np.square(nearest(w) - w).sum()


def test_without_moments_it_is_rounding_to_nearest() -> None:
    w = np.random.default_rng(0).standard_normal((5, 12)).astype(np.float32)
    np.testing.assert_array_equal(rounded(w, np.eye(4)), nearest(w))


@pytest.fixture(scope="module", params=["push-cubes", "smolvla_tiny", "pi0_tiny"])
def pair(request: pytest.FixtureRequest) -> tuple[Program, Program]:
    """A policy for openvino-bf16 with shaped rounding, and without."""
    where = request.param if "_" not in request.param else str(GOLDEN / request.param / "checkpoint")
    spec = {"vision.num_attention_heads": 3} if request.param == "pi0_tiny" else {}
    policy, target = read_policy(where, ReadOptions(spec=spec)), targets.get("openvino-bf16")
    shaped, _, _ = lower_for(policy, target, {})
    with pytest.MonkeyPatch.context() as m:
        m.setattr("vlac.targets.openvino.shape_rounding", lambda program: program)
        plain, _, _ = lower_for(policy, target, {})
    return shaped, plain


def changed(pair: tuple[Program, Program]) -> list[str]:
    shaped, plain = pair
    assert shaped.stages == plain.stages and dict(shaped.params) == dict(plain.params)
    return [n for n in plain.params if not np.array_equal(shaped.weights[n].load(), plain.weights[n].load())]


def test_only_linears_that_read_patches_or_joined_tokens_change(pair: tuple[Program, Program]) -> None:
    names = changed(pair)
    made = {n.name: n.op for s in pair[1].stages for n in s.nodes}
    readers = [n for s in pair[1].stages for n in s.nodes if any("@" + name in n.inputs for name in names)]
    assert len(readers) == len(names) > 0
    assert {made[n.inputs[0]] for n in readers} <= {"patchify", "reshape", "pixel_shuffle"}
    assert "patchify" in {made[n.inputs[0]] for n in readers}


def smooth(rng: np.random.Generator, size: int) -> NpArray:
    """A picture of blobs and edges, in which neighbours are alike."""
    low = rng.uniform(-1, 1, (3, size // 8 + 2, size // 8 + 2)).repeat(8, 1).repeat(8, 2)
    for axis in (1, 2):
        low = np.cumsum(low, axis)
        low = (np.take(low, range(5, low.shape[axis]), axis) - np.take(low, range(low.shape[axis] - 5), axis)) / 5
    return np.asarray(low[:, :size, :size] + rng.uniform(-1, 1, (3, 1, 1)), np.float32)


def test_patches_of_smooth_pictures_come_out_nearer(pair: tuple[Program, Program]) -> None:
    """And of pictures that are noise in every pixel hardly further off."""
    shaped, plain = pair
    stage = next(s for s in plain.stages if any(n.op == "patchify" for n in s.nodes))
    cut = next(n for n in stage.nodes if n.op == "patchify")
    linear = next(n for n in stage.nodes if cut.name in n.inputs)
    name, size = linear.inputs[1][1:], dict(stage.inputs)[cut.inputs[0]].shape[1]
    assert isinstance(size, int)
    exact = plain.weights[name].load()
    rng = np.random.default_rng(0)

    def errors(picture: NpArray) -> list[float]:
        x = OPS["patchify"].reference([picture], cut.attr)
        return [float(np.square(x @ (w - exact).T).sum()) for w in (shaped.weights[name].load(), nearest(exact))]

    near, far = errors(smooth(rng, size)), errors(rng.uniform(-1, 1, (3, size, size)).astype(np.float32))
    assert near[0] < 0.25 * near[1]
    assert far[0] < 1.3 * far[1]


def test_other_formats_are_left_alone(golden: Callable[[str], GoldenFolder]) -> None:
    policy = read_policy(str(golden("smolvla_tiny").checkpoint))
    program, _, _ = lower_for(policy, targets.get("openvino-int8"), {})
    after = rounding.shape_rounding(program)
    assert all(after.weights[n] is program.weights[n] for n in program.params)
