"""quantize-kv: codebooks and scales against their theory, what crosses to the loop, engines, and what it costs."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from conftest import GoldenFolder
from hypothesis import given
from hypothesis import strategies as st

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


def through(x: NpArray, bits: int, scale: str, form: str = "groups", center: bool = False) -> NpArray:
    """x [n, 64] packed and unpacked."""
    mean = kv_codes.column_mean(x, None) if center else None
    packed = kv_codes.encode(x.astype(np.float32), mean, bits, 64, 3, scale, form)
    return kv_codes.decode(packed, mean, bits, 64, 3, form)


def relative(got: NpArray, want: NpArray) -> float:
    return float(((got - want) ** 2).sum() / (want**2).sum())


@pytest.mark.parametrize("bits", D_MSE)
def test_codes_reach_the_optimal_error(bits: int) -> None:
    x = np.random.default_rng(bits).standard_normal((6000, 64)).astype(np.float32)
    assert abs(relative(through(x, bits, "raw", "head"), x) / D_MSE[bits] - 1) < 0.01


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 8])
def test_factors_for_groups_cost_nothing_and_save_error(bits: int) -> None:
    x = np.random.default_rng(bits).standard_normal((2000, 64)).astype(np.float32)
    assert kv_codes.words(bits, 64, "groups") == kv_codes.words(bits, 64, "head")
    grouped, plain = (relative(through(x, bits, "least_squares", f), x) for f in ("groups", "head"))
    assert grouped < {2: 0.86, 3: 0.67, 4: 0.56, 5: 0.52, 8: 0.52}[bits] * plain


def test_a_scale_that_keeps_the_norm_and_one_that_keeps_the_distance() -> None:
    x = np.random.default_rng(0).standard_normal((1000, 64)).astype(np.float32)
    for form in ("head", "groups"):
        norms = np.linalg.norm(through(x, 2, "norm", form), axis=1) / np.linalg.norm(x, axis=1)
        assert np.abs(norms - 1).max() < 1e-3
        errors = {s: relative(through(x, 2, s, form), x) for s in kv_codes.SCALES}
        assert errors["least_squares"] == min(errors.values())


@pytest.mark.parametrize("form", kv_codes.FORMS)
@pytest.mark.parametrize("bits", kv_codes.BITS)
@pytest.mark.parametrize("d", [6, 12, 64, 72])
def test_packing_loses_no_code(bits: int, d: int, form: str) -> None:
    """Words are as many as `words` says, and decoding gives a level for every entry."""
    if form == "inner" and bits - 1 not in kv_codes.BITS:
        return
    x = np.random.default_rng(1).standard_normal((9, 3 * d)).astype(np.float32) * 5
    packed = kv_codes.encode(x, None, bits, d, 0, "norm", form)
    assert packed.shape == (9, 3 * kv_codes.words(bits, d, form)) and packed.dtype == np.int32
    error = relative(kv_codes.decode(packed, None, bits, d, 0, form), x)
    assert error < {1: 0.5, 2: 0.5, 3: 0.1, 4: 0.03, 5: 0.01, 8: 1e-4}[bits]
    packed[:, 0] ^= 1 << 5
    assert relative(kv_codes.decode(packed, None, bits, d, 0, form), x) != error


@given(width=st.sampled_from([1, 2, 4, 8]), count=st.integers(1, 70), seed=st.integers(0, 99))
def test_fields_come_back_from_words(width: int, count: int, seed: int) -> None:
    fields = np.random.default_rng(seed).integers(0, 1 << width, (3, count)).astype(np.uint32)
    packed = kv_codes.join(fields, width)
    assert packed.shape == (3, -(-count * width // 32))
    np.testing.assert_array_equal(kv_codes.split(packed, width, count), fields)


@given(st.floats(2.0**-31, 2.0**31))
def test_scales_come_back_to_three_digits(s: float) -> None:
    assert abs(float(kv_codes.from_log(kv_codes.log_scale(np.array([s])))[0]) / s - 1) < 3.5e-4


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


def test_the_inner_product_variant_is_unbiased() -> None:
    """<x, decoded> is |x|^2 on average, where plain codes of 2 bits shrink it by their mean square error."""
    x = np.random.default_rng(4).standard_normal((20000, 64)).astype(np.float32)
    inner, head = ((x * through(x, 2, "raw", f)).sum() / (x**2).sum() for f in ("inner", "head"))
    assert abs(inner - 1) < 0.005 and abs(head - 0.8855) < 0.005


# --- programs --------------------------------------------------------------------------------------------------


def test_only_codes_cross_into_the_loop(tiny: Policy) -> None:
    plain = lower(draw(tiny))
    found = crossings(plain)[1]
    assert {c.kind for c in found} == {"k", "v"} and all(c.head_dim == 12 for c in found)
    assert len(found) == 2 * tiny.spec.text.num_hidden_layers
    program = quantize_cache(plain, str(CacheFormat()))
    inputs, made = dict(program.stage("flow").inputs), {o for s in program.stages for o in s.outputs}
    for c in found:
        assert c.name not in inputs and c.name not in made
        heads = c.type.shape[1] // 12  # type: ignore[operator]
        assert inputs[f"{c.name}.codes"] == Type("i32", (c.type.shape[0], heads * kv_codes.words(4, 12)))
    assert [s.stage for s in program.schedule.steps] == [s.stage for s in plain.schedule.steps]
    assert quantize_cache(plain, "f32") is plain


def test_4_bits_with_a_head_of_64_take_less_than_0_30_of_float16() -> None:
    rows = 145  # SmolVLA: two cameras, 16 tokens, the state
    packed = 4 * kv_codes.words(4, 64) + 4 * 64 / rows  # a key, and its share of the mean
    assert packed / (2 * 64) < 0.30
    assert all(4 * kv_codes.words(4, d) / (2 * d) < 0.30 for d in (64, 80, 96, 128, 256))


def held(policy: Policy) -> int:
    """Bytes that the loop holds in a run, with the longest prompt."""
    program, _, _ = lower_for(policy, targets.get("gguf-f32"), {})
    program = program.bind(program.max_symbols())
    (o,), session, stats = calibrate.observations(policy, 1), reference_session(program), dict[str, float]()
    ready = prepare(
        policy.io, policy.tokenizer, program, images=dict(o.images), state=o.state, task=o.task, noise=o.noise
    )
    execute(program, session, ready.env, ready.symbols, stats=stats)
    return int(stats["flow_held_bytes"])


@pytest.mark.parametrize("params", ["k=4,v=4", "k=8,v=3,center=0,protect=1"])
def test_what_the_loop_holds_is_measured(tiny: Policy, params: str) -> None:
    """It is what the pass says, and beside that only the mask and the count of the prefix."""
    after = apply_passes(tiny, [f"quantize-kv:{params}"])
    plain, packed, figures = held(tiny), held(after), after.history[-1].figures
    assert packed < plain
    assert packed - figures["bytes_packed"] == plain - 2 * figures["bytes_f16"]


@pytest.mark.parametrize("part", ["k", "v"])
def test_the_rotation_of_values_is_folded_into_weights(tiny: Policy, part: str) -> None:
    after = apply_passes(tiny, ["quantize-kv"])
    program, _, _ = lower_for(after, targets.get("gguf-f32"), {})
    kinds = {c.name: c.kind for c in crossings(lower(draw(tiny)))[1]}
    seeds = {n.attr["seed"] for n in program.stage("flow").nodes if n.op == "unpack_codes" and kinds[n.name] == part}
    assert (seeds == {-1}) == (part == "v")


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
    assert drifts[0] > 2 * drifts[1] > 8 * drifts[2] and drifts[2] < 0.01
    assert drift(tiny, "quantize-kv:protect=1") < drifts[1]


@pytest.mark.parametrize("form", kv_codes.FORMS)
@pytest.mark.parametrize(
    ("engine", "target"), [("torch", "gguf-f32"), ("ggml", "gguf-f32"), ("onnxruntime", "onnx-fp32")]
)
def test_engines_agree_on_codes(
    golden: Callable[[str], GoldenFolder], tmp_path: Path, engine: str, target: str, form: str
) -> None:
    if why := get_engine(engine).missing():
        pytest.skip(why)
    checkpoint, recipe = golden("smolvla_tiny").checkpoint, [f"quantize-kv:form={form},k=4,v=3"]
    vlac.compile(checkpoint, target=target, out=tmp_path / "o", passes=recipe, goldens=1)
    report = parity(tmp_path / "o", engine=engine)
    # in float32 a scale may be stored one step of 0.07 % away
    assert report["compiler"]["chunk"]["relative_l2"] < (1e-3 if engine == "onnxruntime" else 1e-5)


def test_openvino_declines_it_by_name(golden: Callable[[str], GoldenFolder], tmp_path: Path) -> None:
    pytest.importorskip("onnx")
    checkpoint = golden("smolvla_tiny").checkpoint
    made = vlac.compile(checkpoint, target="onnx-fp32", out=tmp_path / "o", passes=["quantize-kv"], goldens=1)
    assert made.manifest["engines"] == ["onnxruntime"]
    assert "float32" in made.manifest["declined"]["openvino"]["pack_codes"]


@pytest.mark.parametrize(
    ("params", "says"),
    [
        ("k=6", "1, 2, 3, 4, 5, 8"),
        ("v=0", "v=0"),
        ("protect=4", "leaves none"),
        ("seed=-1", "seed=-1"),
        ("form=qjl", "groups, head, inner"),
        ("form=inner,k=8", "2, 3, 4, 5 bits"),
    ],
)
def test_refusals(tiny: Policy, params: str, says: str) -> None:
    with pytest.raises(Inapplicable, match=says):
        apply_passes(tiny, [f"quantize-kv:{params}"])
    with pytest.raises(Inapplicable, match="already"):
        apply_passes(tiny, ["quantize-kv", "quantize-kv"])


def test_a_cache_format_that_is_none_is_refused(tiny: Policy) -> None:
    with pytest.raises(Unsupported, match="known: f32, codes k=4"):
        quantize_cache(lower(draw(tiny)), "q4_0")
    assert CacheFormat.parse(str(CacheFormat(3, 2, False, 1, 7, "head", True))) == CacheFormat(
        3, 2, False, 1, 7, "head", True
    )
