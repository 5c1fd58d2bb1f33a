"""Storage formats: bytes equal to ggml's reference quantizers, values equal to the `gguf` package's, errors by name."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from vlac.engines import ggml_lib
from vlac.errors import EngineError, Unsupported
from vlac.formats import FORMATS, decode, encode, int4_codes, int8_codes

NpArray = np.ndarray[Any, Any]

PACKED = [f for f in FORMATS.values() if f.ggml_type is not None]
OWN = ["f32", "f16", "bf16", "q8_0", "q5_0", "q4_0"]
NO_GGML = ggml_lib.missing()
needs_ggml = pytest.mark.skipif(bool(NO_GGML), reason=NO_GGML or "ggml is there")

# relative rms error of gaussian values, measured; a wrong nibble order or scale is far above
ERRORS = {
    "f32": 0.0, "f16": 3e-4, "bf16": 2e-3, "q8_0": 6e-3, "q6_k": 2e-2, "q5_k": 4e-2,
    "q4_1": 8.5e-2,
    "q5_0": 5e-2, "q4_k": 8e-2, "iq4_nl": 9e-2, "q4_0": 1e-1,
}  # fmt: skip

rows = arrays(
    np.float32,
    st.tuples(st.integers(1, 5), st.sampled_from([256, 512])),
    elements=st.floats(-60000, 60000, width=32, allow_subnormal=True),
)


def nasty() -> NpArray:
    """Gaussian rows of many scales, zero rows, single spikes, ties and halves."""
    r = np.random.default_rng(5)
    x = (r.standard_normal((64, 512)) * 10.0 ** r.uniform(-6, 3, (64, 1))).astype(np.float32)
    x[3], x[4, :64], x[5] = 0, 0, np.round(x[5] * 2) / 2
    x[6] = 0
    x[6, 7], x[7], x[8, ::2] = -5, 1.5, -x[8, 1::2]
    return x


def reference(fmt: str, x: NpArray) -> NpArray:
    lib = ggml_lib.load()
    form = FORMATS[fmt]
    out = np.empty(form.nbytes(x.shape), dtype=np.uint8)
    lib.quantize_chunk(form.ggml_type, x.ctypes.data, out.ctypes.data, 0, x.shape[0], x.shape[1], None)
    return out


@needs_ggml
@pytest.mark.parametrize("fmt", [f.name for f in PACKED])
def test_bytes_are_those_of_ggml(fmt: str) -> None:
    x = nasty()
    assert np.array_equal(encode(fmt, x), reference(fmt, x))


@needs_ggml
@settings(max_examples=60, deadline=None)
@given(x=rows, fmt=st.sampled_from(OWN))
def test_own_encoders_agree_with_ggml_on_any_values(x: NpArray, fmt: str) -> None:
    x[np.abs(x) < 1e-30] = 0  # below, ggml's 1/d overflows and its result is undefined
    given = int4_codes(x.reshape(-1, 32)) if fmt == "q4_0" else None
    assume(given is None or (given[1].min(axis=1) == -8)[given[0][:, 0] != 0].all())  # else kept exactly, unlike ggml
    eight = int8_codes(x.reshape(-1, 32)) if fmt == "q8_0" else None
    assume(eight is None or (np.abs(eight[1]).max(axis=1) == 127)[eight[0][:, 0] != 0].all())  # likewise
    assert np.array_equal(encode(fmt, x), reference(fmt, x))


@needs_ggml
@pytest.mark.parametrize("form", PACKED, ids=lambda f: f.name)
def test_values_are_those_of_the_gguf_package(form: Any) -> None:
    gguf = pytest.importorskip("gguf")
    x = nasty()
    data = encode(form.name, x)
    kind = gguf.GGMLQuantizationType(form.ggml_type)
    assert gguf.GGML_QUANT_SIZES[kind] == (form.block, form.block_bytes)
    if form.name == "f32":
        want = x
    else:
        want = gguf.quants.dequantize(data.reshape(x.shape[0], -1), kind)
    assert np.array_equal(decode(form.name, data, x.shape), want)


@pytest.mark.parametrize("form", PACKED, ids=lambda f: f.name)
def test_any_bytes_decode_to_that_many_values(form: Any) -> None:
    data = np.random.default_rng(1).integers(0, 256, 6 * form.nbytes((2 * 256,)), dtype=np.uint8)
    with np.errstate(all="ignore"):
        assert decode(form.name, data, (2, 3, 512)).shape == (2, 3, 512)


@needs_ggml
@pytest.mark.parametrize("fmt", [f.name for f in PACKED])
def test_error_is_what_the_bits_buy(fmt: str) -> None:
    x = np.random.default_rng(0).standard_normal((300, 512)).astype(np.float32)
    data = encode(fmt, x)
    assert data.dtype == np.uint8
    assert data.ndim == 1
    assert data.nbytes == FORMATS[fmt].nbytes(x.shape)
    error = np.sqrt(np.mean((decode(fmt, data, x.shape) - x) ** 2))
    assert error <= ERRORS[fmt]


@pytest.mark.parametrize("fmt", ["f32", "f16", "bf16", "q8_0"])
def test_encoding_decoded_values_again_changes_nothing(fmt: str) -> None:
    x = nasty()
    once = decode(fmt, encode(fmt, x), x.shape)
    assert np.array_equal(decode(fmt, encode(fmt, once), x.shape), once)


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("fmt", ["q8_0", "q5_0", "q4_0"])
def test_blocks_of_the_smallest_numbers_become_zeros(fmt: str) -> None:
    x = np.full((1, 32), np.float32(1e-45))
    assert not decode(fmt, encode(fmt, x), x.shape).any()


def test_bf16_rounds_to_nearest_even() -> None:
    bits = np.array([0x3F808000, 0x3F818000, 0x3F808001, 0x3F807FFF, 0xBF818000], dtype=np.uint32)
    kept = encode("bf16", bits.view(np.float32)).view(np.uint16)
    assert [hex(v) for v in kept] == ["0x3f80", "0x3f82", "0x3f81", "0x3f80", "0xbf82"]


@pytest.mark.parametrize(
    ("fmt", "shape", "said"),
    [
        ("q8_0", (3, 36), "multiples of 32"),
        ("q4_k", (3, 960), "multiples of 256"),
        ("int8", (3, 32), "no packed form"),
        ("q9", (3, 32), "no storage format 'q9'"),
    ],
)
def test_refusals_name_what_is_wrong(fmt: str, shape: tuple[int, ...], said: str) -> None:
    with pytest.raises(Unsupported, match=said):
        encode(fmt, np.zeros(shape, dtype=np.float32))


@pytest.mark.parametrize(("fmt", "value"), [("f16", 7e4), ("q8_0", 1e8), ("q4_0", -1e7), ("bf16", 3.4e38)])
def test_values_beyond_the_format_are_refused(fmt: str, value: float) -> None:
    x = np.zeros((2, 32), dtype=np.float32)
    x[1, 3] = value
    with pytest.raises(Unsupported, match=fmt):
        encode(fmt, x)


def test_a_wrong_byte_count_is_refused() -> None:
    with pytest.raises(ValueError, match=r"33 bytes do not make q8_0\[1, 32\], that takes 34"):
        decode("q8_0", np.zeros(33, dtype=np.uint8), (1, 32))


def test_without_ggml_k_quants_say_what_to_install(monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> None:
    monkeypatch.setenv("VLAC_GGML_LIB", str(tmp_path))
    monkeypatch.setattr(ggml_lib, "_loaded", None)
    with pytest.raises(EngineError, match=r"VLAC_GGML_LIB=.* holds no libggml-base") as caught:
        encode("q4_k", np.zeros((1, 256), dtype=np.float32))
    assert "pip install" in caught.value.remedy
