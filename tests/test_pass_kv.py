"""quantize-kv: codebooks and scales against their theory, what crosses to the loop, engines, and what it costs."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from conftest import GoldenFolder

import vlac
from vlac import calibrate, kv_codes
from vlac.api import apply_passes, draw, lower_for
from vlac.checkpoint import read_policy
from vlac.engines.base import NpArray, get_engine
from vlac.errors import Inapplicable, Unsupported
from vlac.goldens import reference_session
from vlac.lower import lower
from vlac.ops import Type
from vlac.parity import parity
from vlac.policy import Policy
from vlac.registry import targets
from vlac.rewrites.cache import CacheFormat, crossings, quantize_cache
from vlac.rotations import hadamard, rotation
from vlac.runtime.session import execute, prepare

pytest.importorskip("torch")

D_MSE = {1: 0.358387, 2: 0.114526, 3: 0.033391, 4: 0.009132, 5: 0.002399, 8: 0.0000393}
"""Mean square error of the optimal codes for entries of unit vectors in 64 dimensions, by bits (arXiv 2504.19874)."""


@pytest.fixture(scope="module")
def tiny(golden: Callable[[str], GoldenFolder]) -> Policy:
    return read_policy(str(golden("smolvla_tiny").checkpoint))


# --- codes -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bits", D_MSE)
def test_codes_reach_the_optimal_error(bits: int) -> None:
    x = np.random.default_rng(bits).standard_normal((6000, 64)).astype(np.float32)
    y = kv_codes.decode(kv_codes.encode(x, None, bits, 64, 3, "raw"), None, bits, 64, 3)
    error = float(((x - y) ** 2).sum() / (x**2).sum())
    # the scale is a float16: it adds about (2^-11)^2 / 12 relative, visible at 8 bits only
    assert abs(error - D_MSE[bits]) < 0.01 * D_MSE[bits] + 3e-8


def test_a_scale_that_keeps_the_norm_and_one_that_keeps_the_distance() -> None:
    x = np.random.default_rng(0).standard_normal((500, 128)).astype(np.float32)

    def through(scale: str) -> NpArray:
        return kv_codes.decode(kv_codes.encode(x, None, 2, 64, 0, scale), None, 2, 64, 0).reshape(-1, 64)

    heads = x.reshape(-1, 64)
    norms = np.linalg.norm(through("norm"), axis=1) / np.linalg.norm(heads, axis=1)
    assert np.abs(norms - 1).max() < 1e-3
    errors = {s: float(((through(s) - heads) ** 2).sum()) for s in kv_codes.SCALES}
    assert errors["least_squares"] == min(errors.values())


@pytest.mark.parametrize("bits", kv_codes.BITS)
@pytest.mark.parametrize("d", [6, 12, 64, 72])
def test_packing_loses_no_code(bits: int, d: int) -> None:
    """Decoding and encoding again gives the same words: codes and scales stand where they are read."""
    x = np.random.default_rng(1).standard_normal((9, 3 * d)).astype(np.float32) * 5
    words = kv_codes.encode(x, None, bits, d, 0, "norm")
    assert words.shape == (9, 3 * kv_codes.words(bits, d)) and words.dtype == np.int32
    again = kv_codes.encode(kv_codes.decode(words, None, bits, d, 0), None, bits, d, 0, "norm")
    per_head = (a.reshape(9, 3, -1)[..., :-1] for a in (words, again))
    np.testing.assert_array_equal(*per_head)


def test_zeros_stay_zeros_and_a_mean_comes_back() -> None:
    zeros, mean = np.zeros((2, 12), np.float32), np.linspace(-50, 50, 12, dtype=np.float32)[None]
    assert not kv_codes.decode(kv_codes.encode(zeros, None, 4, 12, 0, "norm"), None, 4, 12, 0).any()
    x = np.repeat(mean, 3, axis=0)
    np.testing.assert_allclose(
        kv_codes.decode(kv_codes.encode(x, mean, 4, 12, 0, "norm"), mean, 4, 12, 0), x, atol=1e-5
    )
    valid = np.array([True, False, True])
    np.testing.assert_allclose(kv_codes.column_mean(np.stack([mean[0], 9 * mean[0], -mean[0]]), valid), 0, atol=1e-6)


@pytest.mark.parametrize("n", [1, 2, 12, 20, 48, 60, 64, 480, 720, 960, 1152])
def test_hadamard_matrices(n: int) -> None:
    h = hadamard(n)
    assert h is not None and set(np.unique(h)) <= {-1.0, 1.0}
    np.testing.assert_array_equal(h @ h.T, n * np.eye(n))


def test_rotations_are_orthogonal_where_no_hadamard_is() -> None:
    assert hadamard(36) is None and hadamard(72) is not None
    for n in (3, 36, 72):
        np.testing.assert_allclose(rotation(n, 1) @ rotation(n, 1).T, np.eye(n), atol=1e-12)


# --- attention -------------------------------------------------------------------------------------------------


def keys_with_outliers(rng: np.random.Generator) -> tuple[NpArray, NpArray, NpArray]:
    """(queries, keys, values): keys of rank 8 with noise and four biased channels, as measured in language models."""
    k = 1.5 * (0.8 * rng.standard_normal((177, 8)) @ rng.standard_normal((8, 64)) / math.sqrt(8))
    k += 0.9 * rng.standard_normal((177, 64))
    channels = rng.permutation(64)[:4]
    k[:, channels] = 2 * k[:, channels] + rng.choice([-10.0, 10.0], 4)
    q = k[rng.integers(0, 177, 50)] + 0.5 * rng.standard_normal((50, 64))
    logits = q @ k.T
    return q * 3 / (logits - logits.mean(1, keepdims=True)).std(), k.astype(np.float32), rng.standard_normal((177, 64))


def attended(q: NpArray, k: NpArray, v: NpArray) -> NpArray:
    s = q @ k.T
    p = np.exp(s - s.max(1, keepdims=True))
    return np.asarray(p / p.sum(1, keepdims=True) @ v)


def key_error(codes: Callable[[NpArray], NpArray], seeds: int = 6) -> float:
    total = 0.0
    for seed in range(seeds):
        q, k, v = keys_with_outliers(np.random.default_rng(seed))
        want = attended(q, k, v)
        total += float(((attended(q, codes(k), v) - want) ** 2).sum() / (want**2).sum())
    return total / seeds


def by_codes(bits: int, scale: str, center: bool) -> Callable[[NpArray], NpArray]:
    def through(k: NpArray) -> NpArray:
        mean = kv_codes.column_mean(k, None) if center else None
        return kv_codes.decode(kv_codes.encode(k, mean, bits, 64, 0, scale), mean, bits, 64, 0)

    return through


def by_inner_product(bits: int) -> Callable[[NpArray], NpArray]:
    """TurboQuant's unbiased variant: bits-1 for the codes, one for the signs of a random projection of the rest."""

    def through(k: NpArray) -> NpArray:
        coarse = kv_codes.decode(kv_codes.encode(k, None, bits - 1, 64, 0, "raw"), None, bits - 1, 64, 0)
        rest = k - coarse
        s = np.random.default_rng(5).standard_normal((64, 64))
        size = np.linalg.norm(rest, axis=1, keepdims=True)
        return np.asarray(coarse + size * math.sqrt(math.pi / 2) / 64 * np.sign(rest @ s.T) @ s)

    return through


def test_what_repairs_keys_with_biased_channels() -> None:
    """Taking the mean off first, or a scale that keeps the norm; together they are no better than the scale alone."""
    raw, centered = (key_error(by_codes(4, "raw", c)) for c in (False, True))
    norm = key_error(by_codes(4, "norm", False))
    assert centered < raw / 2.5 and norm < raw / 4  # measured 3.2e-2, 1.1e-2, 5.8e-3
    assert key_error(by_codes(4, "norm", True)) < 1.5 * norm


def test_the_inner_product_variant_loses_at_equal_bits() -> None:
    for bits in (3, 4):
        assert key_error(by_inner_product(bits)) > 2 * key_error(by_codes(bits, "norm", False))


# --- programs --------------------------------------------------------------------------------------------------


def test_only_codes_cross_into_the_loop(tiny: Policy) -> None:
    plain = lower(draw(tiny))
    found = crossings(plain)[1]
    assert {c.kind for c in found} == {"k", "v"} and all(c.head_dim == 12 for c in found)
    assert len(found) == 2 * tiny.spec.text.num_hidden_layers
    program = quantize_cache(plain, str(CacheFormat()))
    inputs = dict(program.stage("flow").inputs)
    for c in found:
        assert c.name not in inputs
        heads = c.type.shape[1] // 12  # type: ignore[operator]
        assert inputs[f"{c.name}.codes"] == Type("i32", (c.type.shape[0], heads * kv_codes.words(4, 12)))
    assert [s.stage for s in program.schedule.steps] == ["vision", "prefix", "cache", "flow"]
    assert quantize_cache(plain, "f32") is plain


def test_4_bits_with_a_head_of_64_take_less_than_0_30_of_float16() -> None:
    rows = 145  # SmolVLA: two cameras, 16 tokens, the state
    packed = 4 * kv_codes.words(4, 64) + 4 * 64 / rows  # a key, and its share of the mean
    assert packed / (2 * 64) < 0.30


def drift(policy: Policy, recipe: str) -> float:
    given = calibrate.observations(policy, 3)
    want = calibrate.watch(policy, given, {}, lambda *_: None)
    after = apply_passes(policy, [recipe])
    program, _, _ = lower_for(after, targets.get("gguf-f32"), {})
    session = reference_session(program)
    got = []
    for o in given:
        ready = prepare(
            after.io, after.tokenizer, program, images=dict(o.images), state=o.state, task=o.task, noise=o.noise
        )
        got.append(execute(program, session, ready.env, ready.symbols))
    return calibrate.drift(got, want)


def test_more_bits_drift_less(tiny: Policy) -> None:
    drifts = [drift(tiny, f"quantize-kv:k={b},v={b}") for b in (2, 4, 8)]
    assert drifts[0] > 2 * drifts[1] > 8 * drifts[2] and drifts[2] < 0.01  # measured 0.23, 0.066, 0.005
    assert drift(tiny, "quantize-kv:protect=1") < drifts[1]


@pytest.mark.parametrize("engine", ["torch", "ggml"])
def test_engines_agree_on_codes(
    golden: Callable[[str], GoldenFolder], tmp_path: Path, engine: str, tiny: Policy
) -> None:
    if why := get_engine(engine).missing():
        pytest.skip(why)
    vlac.compile(
        golden("smolvla_tiny").checkpoint, target="gguf-f32", out=tmp_path / "o", passes=["quantize-kv"], goldens=1
    )
    report = parity(tmp_path / "o", engine=engine)
    assert report["compiler"]["chunk"]["relative_l2"] < 1e-5


def test_onnx_targets_decline_it_by_name(golden: Callable[[str], GoldenFolder], tmp_path: Path) -> None:
    pytest.importorskip("onnx")
    with pytest.raises(Unsupported, match="column_mean has no ONNX form"):
        vlac.compile(
            golden("smolvla_tiny").checkpoint, target="onnx-fp32", out=tmp_path / "o", passes=["quantize-kv"], goldens=1
        )
    assert not (tmp_path / "o").exists()


@pytest.mark.parametrize(
    ("params", "says"),
    [("k=6", "1, 2, 3, 4, 5, 8"), ("v=0", "v=0"), ("protect=4", "leaves none"), ("seed=-1", "seed=-1")],
)
def test_refusals(tiny: Policy, params: str, says: str) -> None:
    with pytest.raises(Inapplicable, match=says):
        apply_passes(tiny, [f"quantize-kv:{params}"])
    with pytest.raises(Inapplicable, match="already"):
        apply_passes(tiny, ["quantize-kv", "quantize-kv"])


def test_a_cache_format_that_is_none_is_refused(tiny: Policy) -> None:
    with pytest.raises(Unsupported, match="known: f32, codes k=4"):
        quantize_cache(lower(draw(tiny)), "q4_0")
    assert CacheFormat.parse(str(CacheFormat(3, 2, False, 1, 7))) == CacheFormat(3, 2, False, 1, 7)
