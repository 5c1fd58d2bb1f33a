"""Integer formats of ONNX artifacts: round trips, error bounds, and the parts that decode_parts refuses."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from vlac.errors import ArtifactError
from vlac.layouts import (
    bf16_from_f32,
    decode_parts,
    f32_from_bf16,
    pack_int4,
    quantize_int4_blocks,
    quantize_int8_rows,
    unpack_int4,
)

finite = st.floats(-1e4, 1e4, width=32)
matrices = st.tuples(st.integers(1, 5), st.integers(1, 3)).flatmap(
    lambda s: arrays(np.float32, (s[0], s[1] * 32), elements=finite)
)


@given(matrices)
def test_int8_is_within_half_a_step(w: np.ndarray) -> None:
    q, scale = quantize_int8_rows(w)
    assert q.dtype == np.int8 and q.min() >= -127
    step = np.abs(w).max(1) / 127
    assert np.all(np.abs(q * scale[:, None] - w) <= step[:, None] * 0.5001 + 2e-36)


@given(matrices)
@settings(deadline=None)
def test_int4_is_no_worse_than_plain_rounding(w: np.ndarray) -> None:
    q, scale = quantize_int4_blocks(w)
    assert q.min() >= -8 and q.max() <= 7 and np.all(np.isfinite(scale)) and np.all(scale != 0)
    got = (q.reshape(len(w), -1, 32) * scale[:, :, None]).reshape(w.shape).astype(np.float64)
    blocks = w.reshape(len(w), -1, 32).astype(np.float64)
    plain = np.maximum(np.abs(blocks).max(2, keepdims=True) / 7, 1e-37)
    rounded = np.clip(np.rint(blocks / plain), -8, 7) * plain
    error = ((got.reshape(blocks.shape) - blocks) ** 2).sum(2)
    assert np.all(error <= ((rounded - blocks) ** 2).sum(2) * 1.0001 + 1e-5 * (blocks**2).sum(2) + 1e-30)


def test_int4_beats_absmax_over_seven_on_gaussian_weights() -> None:
    w = np.random.default_rng(0).standard_normal((64, 256)).astype(np.float32)
    q, scale = quantize_int4_blocks(w)
    got = (q.reshape(64, -1, 32) * scale[:, :, None]).reshape(w.shape)
    blocks = w.reshape(64, -1, 32)
    step = np.abs(blocks).max(2, keepdims=True) / 7
    plain = np.rint(blocks / step) * step
    assert np.linalg.norm(got - w) < 0.95 * np.linalg.norm(plain - blocks)
    assert np.linalg.norm(got - w) / np.linalg.norm(w) < 0.09


def test_int4_wants_whole_blocks() -> None:
    with pytest.raises(ValueError, match="40 values are no multiple of 32"):
        quantize_int4_blocks(np.ones((2, 40), np.float32))


@given(arrays(np.int8, st.integers(1, 50), elements=st.integers(-8, 7)))
def test_nibbles_round_trip(q: np.ndarray) -> None:
    packed = pack_int4(q)
    assert packed.size == (q.size + 1) // 2
    assert np.array_equal(unpack_int4(packed, q.shape), q)


def test_first_value_is_the_low_nibble() -> None:
    assert pack_int4(np.array([1, -2, 7], np.int8)).tolist() == [0xE1, 0x07]


@given(
    arrays(
        np.float32,
        16,
        elements=st.floats(width=32, allow_nan=False, allow_infinity=False, max_value=2.0**126, min_value=-(2.0**126)),
    )
)
def test_bf16_is_within_half_a_step(x: np.ndarray) -> None:
    assert np.all(np.abs(f32_from_bf16(bf16_from_f32(x)).astype(np.float64) - x) <= np.abs(x) / 256 + 1e-40)


W = np.random.default_rng(1).standard_normal((6, 64)).astype(np.float32)
Q8, S8 = quantize_int8_rows(W)
Q4, S4 = quantize_int4_blocks(W)
CASES = {
    ("f32", "rows"): ({"values": W}, 0.0),
    ("f32", "columns"): ({"values": np.ascontiguousarray(W.T)}, 0.0),
    ("f16", "rows"): ({"values": W.astype(np.float16)}, 1e-3),
    ("bf16", "columns"): ({"values": bf16_from_f32(np.ascontiguousarray(W.T))}, 8e-3),
    ("int8", "rows"): ({"q": Q8, "scale": S8}, 0.02),
    ("int8", "columns"): ({"q": np.ascontiguousarray(Q8.T), "scale": S8}, 0.02),
    ("int4", "columns"): ({"q": pack_int4(Q4.T), "scale": np.ascontiguousarray(S4.T)}, 0.3),
}


@pytest.mark.parametrize(("key", "case"), CASES.items(), ids=lambda c: "-".join(c) if isinstance(c[0], str) else "")
def test_decode_parts_gives_the_tensor_back(key: tuple[str, str], case: tuple[dict[str, np.ndarray], float]) -> None:
    got = decode_parts(*key, W.shape, case[0], "t")
    assert got.shape == W.shape and got.dtype == np.float32 and got.flags.c_contiguous
    assert np.abs(got - W).max() <= case[1]


@pytest.mark.parametrize(
    ("format", "layout", "shape", "parts", "message"),
    [
        ("f32", "diagonal", (6, 64), {}, "layout 'diagonal'"),
        ("f32", "columns", (6,), {"values": W}, "layout 'columns' for shape"),
        ("f32", "rows", (6, 64), {}, "part 'values' is missing; there are none"),
        ("f32", "columns", (6, 64), {"values": W}, r"float32\[6, 64\], expected float32\[64, 6\]"),
        ("int8", "rows", (6, 64), {"q": Q8, "scale": S8[:5]}, r"'scale' is float32\[5\]"),
        ("int8", "rows", (6, 64), {"q": W, "scale": S8}, "'q' is float32"),
        ("int4", "rows", (6, 64), {"q": Q8, "scale": S8}, "no layout 'rows' of format 'int4'"),
        ("int4", "columns", (6, 60), {"q": Q8, "scale": S8}, "no layout 'columns' of format 'int4'"),
        ("q8_0", "rows", (6, 64), {"values": W}, "of format 'q8_0'"),
    ],
)
def test_decode_parts_refuses(format: str, layout: str, shape: tuple[int, ...], parts: dict, message: str) -> None:
    with pytest.raises(ArtifactError, match="tensor w: .*" + message):
        decode_parts(format, layout, shape, parts, "tensor w")
