"""smooth-norms and rotate-values: the same function, and what it is good for."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from conftest import GoldenFolder
from hypothesis import given
from hypothesis import strategies as st
from test_pi0 import HEADS

from vlac import calibrate
from vlac.api import apply_passes, draw
from vlac.checkpoint import read_policy
from vlac.engines.base import NpArray
from vlac.errors import Inapplicable
from vlac.passes.rotate_values import rotated_columns, rotated_rows
from vlac.passes.smooth_norms import factors, smoothable
from vlac.policy import Policy
from vlac.registry import ReadOptions
from vlac.rotations import rotation
from vlac.weights import Weights

pytest.importorskip("torch")

NAMES = ("smolvla_tiny", "smolvla_letterbox", "pi0_tiny", "pi05_tiny", "pi0fast_tiny")


@pytest.fixture(scope="module", params=NAMES)
def policy(request: pytest.FixtureRequest, golden: Callable[[str], GoldenFolder]) -> Policy:
    spec = HEADS if request.param.startswith("pi") else {}
    return read_policy(str(golden(request.param).checkpoint), ReadOptions(spec=spec))


@pytest.fixture(scope="module")
def tiny(golden: Callable[[str], GoldenFolder]) -> Policy:
    return read_policy(str(golden("smolvla_tiny").checkpoint))


def chunks(policy: Policy) -> tuple[NpArray, ...]:
    return calibrate.watch(policy, calibrate.observations(policy, 2), {}, lambda *_: None)


def test_smoothing_changes_no_bit(policy: Policy) -> None:
    after = apply_passes(policy, ["smooth-norms:ratio=1"])
    assert after.history[0].figures["smoothed"] > 8
    for a, b in zip(chunks(after), chunks(policy), strict=True):
        np.testing.assert_array_equal(a, b)


def test_rotated_values_give_the_same_chunk(policy: Policy) -> None:
    after = apply_passes(policy, ["rotate-values"])
    changed = {n for n in policy.weights if after.weights[n] is not policy.weights[n]}
    assert any("text" in n for n in changed) and any("vision" in n for n in changed)
    for a, b in zip(chunks(after), chunks(policy), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5 * np.abs(b).max())


def with_outliers(policy: Policy, factor: float = 32.0) -> Policy:
    """The same function with a few channels of every norm large: gamma and beta times `factor`, columns divided."""
    rng, weights = np.random.default_rng(0), policy.weights
    for norm in smoothable(draw(policy)):
        r = np.ones(weights[norm.params[0]].shape[0], np.float32)
        r[rng.permutation(len(r))[:3]] = factor
        weights = _times(weights, norm.params, r)
        weights = _times(weights, norm.readers, 1 / r)
    return policy.replace(weights=weights)


def _times(weights: Weights, names: tuple[str, ...], r: NpArray) -> Weights:
    for name in names:
        weights = weights.map(name, lambda w: (w * r).astype(np.float32))
    return weights


def int8_rows(x: NpArray) -> NpArray:
    scale = np.abs(x).max(axis=1, keepdims=True) / 127
    return np.asarray(np.rint(x / scale) * scale)


def rounding_error(policy: Policy) -> float:
    """Mean relative error of all linears behind norms when their inputs are rounded to int8 per row."""
    norms = smoothable(draw(policy))
    names: dict[str, set[str]] = {}
    for stage, value in (v for n in norms for v in n.values):
        names.setdefault(stage, set()).add(value)
    errors = []

    def see(_: int, stage: str, values: dict[str, NpArray]) -> None:
        for norm in norms:
            for value in (v for s, v in norm.values if s == stage):
                w = np.concatenate([policy.weights[r].load() for r in norm.readers])
                x = values[value]
                errors.append(np.linalg.norm((int8_rows(x) - x) @ w.T) / np.linalg.norm(x @ w.T))

    calibrate.watch(policy, calibrate.observations(policy, 1), names, see)  # type: ignore[arg-type]
    return float(np.mean(errors))


def test_smoothing_repairs_outliers_where_activations_are_int8(tiny: Policy) -> None:
    spoiled = with_outliers(tiny)
    for a, b in zip(chunks(spoiled), chunks(tiny), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5 * np.abs(b).max())
    repaired = apply_passes(spoiled, ["smooth-norms"])
    assert repaired.history[0].figures["smoothed"] == repaired.history[0].figures["norms"]
    before, after, plain = (rounding_error(p) for p in (spoiled, repaired, tiny))
    assert after < before / 2 and after < 2 * plain


def test_norms_without_outliers_are_left(tiny: Policy) -> None:
    after = apply_passes(tiny, ["smooth-norms"])
    assert after.history[0].figures["smoothed"] == 0 and after.replace(history=()) == tiny
    assert after.history[0].figures["largest_to_median_before"] < 4


@given(st.integers(0, 2**32 - 1), st.floats(0, 1))
def test_factors_are_powers_of_two(seed: int, alpha: float) -> None:
    rng = np.random.default_rng(seed)
    size, largest = np.exp(3 * rng.standard_normal((2, 9)))
    size[0] = largest[1] = 0
    r = factors(size, largest, alpha)
    assert r[0] == r[1] == 1
    np.testing.assert_array_equal(np.log2(r), np.rint(np.log2(r)))


def test_only_norms_that_linears_alone_read_are_smoothed(tiny: Policy) -> None:
    """The tower's last norm is read by the pixel shuffle: its channels are not the connector's columns."""
    params = {n.params[0] for n in smoothable(draw(tiny))}
    assert "vision.layers.0.layer_norm1.weight" in params and "vision.post_layernorm.weight" not in params


def test_rotations_of_rows_and_columns_cancel() -> None:
    rng, r = np.random.default_rng(0), rotation(12, 3)
    v, o = rng.standard_normal((24, 7)).astype(np.float32), rng.standard_normal((5, 48)).astype(np.float32)
    made = np.concatenate([v[:12], v[:12], v[12:], v[12:]])  # two query heads read each kv head
    turned = rotated_rows(v, r)
    again = np.concatenate([turned[:12], turned[:12], turned[12:], turned[12:]])
    np.testing.assert_allclose(rotated_columns(o, r) @ again, o @ made, atol=1e-5)
    bias = rotated_rows(v[:, 0], r)
    np.testing.assert_allclose(bias, turned[:, 0], atol=1e-6)


@pytest.mark.parametrize(
    ("recipe", "says"),
    [
        ("smooth-norms:alpha=2", "alpha=2"),
        ("smooth-norms:ratio=0.5", "ratio=0.5"),
        ("smooth-norms:samples=-1", "samples=-1"),
        ("rotate-values:part=expert", "vision, text, all"),
        ("rotate-values:seed=-1", "seed=-1"),
    ],
)
def test_refusals(tiny: Policy, recipe: str, says: str) -> None:
    with pytest.raises(Inapplicable, match=says):
        apply_passes(tiny, [recipe])
