"""Pixels, state and actions are torch's and LeRobot's to the bit or nearly; wrong pictures are refused by name."""

from __future__ import annotations

import warnings
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

import vlac
from vlac.errors import ArtifactError, InputError
from vlac.io import Step
from vlac.runtime.actions import ACTION_STEPS, apply_action_steps, unnormalise
from vlac.runtime.observation import (
    IMAGE_STEPS,
    STATE_STEPS,
    check_steps,
    normalise,
    pad,
    resize_bilinear,
    resize_with_pad,
)

GOLDEN = Path(__file__).parent / "golden"
SIZES = st.integers(1, 70)


def picture(height: int, width: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


# --- resize ----------------------------------------------------------------------------------------------------


@settings(max_examples=150, deadline=None)
@given(SIZES, SIZES, SIZES, SIZES, st.integers(0, 9))
def test_the_resize_is_torchs(height: int, width: int, new_height: int, new_width: int, seed: int) -> None:
    torch = pytest.importorskip("torch")
    x = np.random.default_rng(seed).random((3, height, width), dtype=np.float32)
    want = torch.nn.functional.interpolate(
        torch.from_numpy(x)[None], size=(new_height, new_width), mode="bilinear", align_corners=False, antialias=False
    )[0].numpy()
    assert np.abs(resize_bilinear(x, new_height, new_width) - want).max() <= 2.4e-7  # 2 ulp of 1.0


@pytest.mark.parametrize("height, width", [(480, 640), (720, 1280), (1080, 1920), (512, 511), (97, 1013), (2000, 30)])
def test_the_resize_is_torchs_at_camera_sizes(height: int, width: int) -> None:
    torch = pytest.importorskip("torch")
    image = picture(height, width)
    ratio = max(width / 512, height / 512)
    small = torch.nn.functional.interpolate(
        torch.from_numpy(image).permute(2, 0, 1)[None].float() / 255,
        size=(int(height / ratio), int(width / ratio)),
        mode="bilinear",
        align_corners=False,
    )
    want = torch.nn.functional.pad(small, (512 - small.shape[3], 0, 512 - small.shape[2], 0), value=0)[0] * 2 - 1
    assert np.abs(vlac.preprocess_image(image) - want.numpy()).max() <= 1e-6


def test_sizes_are_cut_not_rounded_and_padding_is_left_and_above() -> None:
    x = np.ones((3, 50, 36), np.float32)
    y = resize_with_pad(x, width=48, height=48)
    assert y.shape == (3, 48, 48)
    columns = np.flatnonzero(y[0].any(axis=0))
    assert columns.tolist() == list(range(48 - 34, 48))  # 36 / (50/48) = 34.56
    wide = resize_with_pad(np.ones((3, 30, 80), np.float32), width=48, height=48, value=0.25)
    assert (wide[:, : 48 - 18] == 0.25).all() and (wide[:, 48 - 18 :] == 1).all()


def test_centred_padding_has_the_odd_pixel_right_and_below() -> None:
    y = resize_with_pad(np.ones((3, 50, 35), np.float32), width=48, height=48, align="center")
    assert np.flatnonzero(y[0].any(axis=0)).tolist() == list(range(7, 40))  # 33 wide: 7 left, 8 right


def test_a_picture_of_the_right_size_is_not_touched() -> None:
    x = np.random.default_rng(0).random((3, 48, 48), dtype=np.float32)
    assert resize_with_pad(x, width=48, height=48) is x


def test_a_picture_too_thin_to_fit_is_refused() -> None:
    with pytest.raises(InputError, match="camera top: 1000x1 pixels are too thin"):
        vlac.preprocess_image(picture(1, 1000), 64, camera="top")


# --- goldens ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["smolvla_tiny", "smolvla_letterbox"])
def test_pixels_are_lerobots(name: str) -> None:
    with np.load(GOLDEN / name / "golden.npz") as z:
        for i in range(2):
            keys = [k for k in z.files if k.startswith(f"obs{i}/image/")]
            for camera, key in enumerate(keys):
                want = z[f"obs{i}/tap/image_preprocessed_{camera}"][0]
                assert np.abs(vlac.preprocess_image(z[key], want.shape[1]) - want).max() <= 1e-6


# --- what a picture may be -------------------------------------------------------------------------------------


def test_uint8_float_and_pil_pictures_give_the_same_pixels() -> None:
    image = picture(30, 40)
    want = vlac.preprocess_image(image, 64)
    assert want.dtype == np.float32 and want.shape == (3, 64, 64) and want.flags.c_contiguous
    np.testing.assert_array_equal(vlac.preprocess_image(Image.fromarray(image), 64), want)
    np.testing.assert_array_equal(vlac.preprocess_image(image / np.float32(255), 64), want)
    np.testing.assert_allclose(vlac.preprocess_image(image / 255.0, 64), want, atol=3e-7)


def test_a_size_is_a_square_or_width_and_height_or_a_policys_steps() -> None:
    image = picture(30, 40)
    assert vlac.preprocess_image(image, (64, 32)).shape == (3, 32, 64)
    steps = (Step("affine", {"scale": 3.0, "offset": 1.0}),)
    np.testing.assert_array_equal(
        vlac.preprocess_image(np.zeros((4, 6, 3), np.uint8), steps), np.ones((3, 4, 6), np.float32)
    )


def test_the_callers_picture_is_not_changed() -> None:
    image = np.random.default_rng(0).random((48, 48, 3), dtype=np.float32)
    before = image.copy()
    vlac.preprocess_image(image, 48)
    np.testing.assert_array_equal(image, before)


BAD_PICTURES = {
    "channels first": (np.zeros((3, 8, 8), np.uint8), "channels come first", "transpose"),
    "alpha": (np.zeros((8, 8, 4), np.uint8), "alpha channel", r"image\[..., :3\]"),
    "grey": (np.zeros((8, 8), np.uint8), "grey", "repeat"),
    "grey with an axis": (np.zeros((8, 8, 1), np.uint8), "grey", "repeat"),
    "batch": (np.zeros((1, 8, 8, 3), np.uint8), "batch axis", r"image\[0\]"),
    "two channels": (np.zeros((8, 8, 2), np.uint8), r"uint8\[8, 8, 2\]", r"\[H, W, 3\]"),
    "empty": (np.zeros((0, 8, 3), np.uint8), "empty", "crop"),
    "int64": (np.zeros((8, 8, 3), np.int64), "int64", "uint8"),
    "bool": (np.zeros((8, 8, 3), bool), "bool", "uint8"),
    "floats to 255": (np.full((8, 8, 3), 255.0), "from 255 to 255", "divide by 255"),
    "floats from -1": (np.full((8, 8, 3), -1.0), "from -1", r"do not normalise to \[-1, 1\]"),
    "NaN": (np.full((8, 8, 3), np.nan), "nan", "uint8"),
    "Inf": (np.full((8, 8, 3), np.inf), "inf", "uint8"),
    "text": ("a.png", "expected", r"\[H, W, 3\]"),
    "None": (None, "expected", r"\[H, W, 3\]"),
    "ragged": ([[1, 2], [3]], "no picture", r"\[H, W, 3\]"),
    "PIL grey": (Image.new("L", (8, 8)), "mode L", "convert"),
    "PIL alpha": (Image.new("RGBA", (8, 8)), "mode RGBA", "convert"),
}


@pytest.mark.parametrize("case", BAD_PICTURES)
def test_a_wrong_picture_is_refused_with_the_camera_and_a_remedy(case: str) -> None:
    image, message, remedy = BAD_PICTURES[case]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(InputError, match=f"camera wrist: .*{message}") as caught:
            vlac.preprocess_image(image, 64, camera="wrist")
    assert caught.match(remedy) and caught.value.remedy


# --- state and actions -----------------------------------------------------------------------------------------

STATS = {
    "MEAN_STD": {"mean": [1.0, -2.0, 0.5], "std": [2.0, 0.0, 0.1]},
    "MIN_MAX": {"min": [-1.0, 3.0, 0.0], "max": [1.0, 3.0, 10.0]},
    "QUANTILES": {"q01": [-1.0, 3.0, 0.0], "q99": [1.0, 3.0, 10.0]},
    "QUANTILE10": {"q10": [-1.0, 3.0, 0.0], "q90": [1.0, 3.0, 10.0]},
    "IDENTITY": {},
}


@pytest.mark.parametrize("mode", STATS)
def test_normalisation_is_lerobots_formula_in_float32(mode: str) -> None:
    torch = pytest.importorskip("torch")
    x = np.array([0.3, 3.0, 7.7], np.float32)
    stats = {k: torch.tensor(v) for k, v in STATS[mode].items()}
    t, eps = torch.from_numpy(x), 1e-8
    if mode == "IDENTITY":
        forward, back = t, t
    elif mode == "MEAN_STD":
        forward, back = (t - stats["mean"]) / (stats["std"] + eps), t * stats["std"] + stats["mean"]
    else:
        low, high = stats.values()
        d = torch.where(high - low == 0, torch.tensor(eps), high - low)
        forward, back = 2.0 * (t - low) / d - 1.0, (t + 1.0) / 2.0 * d + low
    np.testing.assert_array_equal(normalise(x, mode=mode, eps=eps, **STATS[mode]), forward.numpy())
    np.testing.assert_array_equal(unnormalise(x[None], mode=mode, eps=eps, **STATS[mode])[0], back.numpy())


@settings(max_examples=100, deadline=None)
@given(
    st.sampled_from([m for m in STATS if m != "IDENTITY"]), st.lists(st.floats(-3, 3, width=32), min_size=3, max_size=3)
)
def test_unnormalising_undoes_normalising_where_the_statistics_have_width(mode: str, values: list[float]) -> None:
    x = np.array([values], np.float32)
    back = normalise(unnormalise(x, mode=mode, **STATS[mode])[0], mode=mode, **STATS[mode])
    np.testing.assert_allclose(back[[0, 2]], x[0, [0, 2]], atol=1e-5)


def test_statistics_of_pictures_act_per_channel() -> None:
    x = np.ones((3, 2, 2), np.float32)
    y = normalise(x, mode="MEAN_STD", mean=[[[0.0]], [[1.0]], [[2.0]]], std=[[[1.0]], [[1.0]], [[0.5]]])
    np.testing.assert_allclose(y[:, 0, 0], [1.0, 0.0, -2.0], atol=1e-6)


def test_pad_state_appends_zeros() -> None:
    np.testing.assert_array_equal(vlac.pad_state([1, 2, 3], 5), np.array([1, 2, 3, 0, 0], np.float32))
    assert vlac.pad_state(np.ones((1, 6))).shape == (1, 32)
    assert vlac.pad_state([1.0]).dtype == np.float32
    with pytest.raises(InputError, match="6 values do not fit into 4"):
        vlac.pad_state(np.ones(6), 4)
    with pytest.raises(InputError, match="NaN or Inf at index 1"):
        vlac.pad_state([0.0, float("nan")], 4)
    with pytest.raises(InputError, match="not an array of numbers"):
        vlac.pad_state(["a"], 4)  # type: ignore[list-item]


def test_action_steps_give_the_caller_its_own_array() -> None:
    chunk = np.ones((2, 5), np.float32)
    out = apply_action_steps((Step("take", {"size": 3}),), chunk)
    out += 1
    assert out.shape == (2, 3) and chunk.max() == 1


BAD_STEPS = {
    "unknown": (STATE_STEPS, Step("whiten"), "step 'whiten' is unknown"),
    "missing": (STATE_STEPS, Step("pad"), "step pad: .*size"),
    "extra": (STATE_STEPS, Step("pad", {"size": 3, "side": "left"}), "step pad: .*side"),
    "mode": (STATE_STEPS, Step("normalise", {"mode": "ZSCORE"}), "mode 'ZSCORE' is none of"),
    "statistic": (STATE_STEPS, Step("normalise", {"mode": "MIN_MAX", "min": [0, 0, 0]}), "MIN_MAX needs max"),
    "length": (
        ACTION_STEPS,
        Step("unnormalise", {"mode": "MEAN_STD", "mean": [0], "std": [1]}),
        "mean has 1 entries, expected 3",
    ),
    "infinite": (
        STATE_STEPS,
        Step("normalise", {"mode": "MEAN_STD", "mean": [0, 0, float("inf")], "std": [1, 1, 1]}),
        "mean holds NaN or Inf",
    ),
    "words": (STATE_STEPS, Step("normalise", {"mode": "MEAN_STD", "mean": "abc", "std": [1, 1, 1]}), "not a list"),
    "image": (IMAGE_STEPS, Step("crop", {"size": 3}), "step 'crop' is unknown"),
}


@pytest.mark.parametrize("case", BAD_STEPS)
def test_a_broken_step_is_refused_when_loading(case: str) -> None:
    table, step, message = BAD_STEPS[case]
    with pytest.raises(ArtifactError, match=message):
        check_steps(table, (step,), "io.steps", 3)


def test_pad_refuses_to_cut() -> None:
    with pytest.raises(InputError, match="5 values do not fit into 4"):
        pad(np.ones(5, np.float32), size=4)
