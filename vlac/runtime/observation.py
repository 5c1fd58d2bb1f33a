"""Camera pictures and robot state, as a policy wants them: the steps of `IO.image_steps` and `IO.state_steps` by name.

The formulas are LeRobot's (resize_with_pad, NormalizerProcessorStep), all float32. The bilinear
resize agrees with torch's `interpolate(mode="bilinear", align_corners=False, antialias=False)` to 2.4e-7.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import lru_cache
from typing import Any, Union

import numpy as np
import numpy.typing as npt

from vlac.errors import ArtifactError, InputError
from vlac.io import Step
from vlac.runtime.area_steps import area_resize
from vlac.runtime.pillow_steps import centre_crop, pillow_fit, pillow_resize, square, stack_normalised, top_left
from vlac.runtime.tensor_steps import tensor_resize, to_square, window

Array = npt.NDArray[np.float32]
Index = npt.NDArray[np.int64]
StepFunction = Callable[..., Array]

FLOAT_SLACK = 1e-3
"""How far a float picture may lie outside [0, 1] (rounding of whoever scaled it); such values are used as they are."""

STATISTICS = {
    "MEAN_STD": ("mean", "std"),
    "MIN_MAX": ("min", "max"),
    "QUANTILES": ("q01", "q99"),
    "QUANTILE10": ("q10", "q90"),
}
"""Normalisation mode -> the two statistics it reads. IDENTITY reads none."""


# --- steps -----------------------------------------------------------------------------------------------------


@lru_cache(maxsize=64)
def interpolation_table(size: int, new_size: int) -> tuple[Index, Index, Array, Array]:
    """For each of `new_size` samples of an axis of length `size`: index, next index, and their two weights [new_size].

    torch's area_pixel_compute_source_index: source = size/new * (i + 0.5) - 0.5, not below 0. Its float32 kernel
    contracts that to one fused multiply-add, which float64 with one rounding reproduces; two roundings would move
    weights by 1e-5.
    """
    ratio = float(np.float32(size) / np.float32(new_size))
    source = np.maximum((np.arange(new_size) + 0.5) * ratio - 0.5, 0.0).astype(np.float32)
    low = np.minimum(source.astype(np.int64), size - 1)
    high = np.minimum(low + 1, size - 1)
    weight = np.clip(source - low.astype(np.float32), np.float32(0), np.float32(1))
    table = (low, high, np.float32(1) - weight, weight)
    for part in table:
        part.setflags(write=False)
    return table


def _along(x: Array, axis: int, new_size: int) -> Array:
    """Linear interpolation of x [3, H, W] along axis 1 or 2."""
    if x.shape[axis] == new_size:
        return x
    low, high, w_low, w_high = interpolation_table(x.shape[axis], new_size)
    column = (slice(None), None) if axis == 1 else (slice(None),)
    result: Array = np.take(x, low, axis=axis, mode="clip")
    result *= w_low[column]
    upper: Array = np.take(x, high, axis=axis, mode="clip")
    upper *= w_high[column]
    result += upper
    return result


def resize_bilinear(x: Array, height: int, width: int) -> Array:
    """x [3, H, W] -> [3, height, width], half-pixel centres, no antialiasing, no clamp."""
    return _along(_along(x, 2, width), 1, height)


def resize_with_pad(x: Array, *, width: int, height: int, align: str = "right-bottom", value: float = 0.0) -> Array:
    """x [3, H, W] scaled to fit into width x height, aspect kept and sizes truncated; the rest is filled with `value`.

    align "right-bottom": the picture sits at the right and the bottom, padding is left and above; "center": padding on
    both sides, the odd pixel right and below. A picture of the right size is not touched.
    """
    h, w = x.shape[1:]
    if (h, w) == (height, width):
        return x
    ratio = max(w / width, h / height)
    new_h, new_w = int(h / ratio), int(w / ratio)
    if new_h < 1 or new_w < 1:
        raise InputError(f"{w}x{h} pixels are too thin to be fitted into {width}x{height}", remedy="check the crop")
    small = resize_bilinear(x, new_h, new_w)
    if (new_h, new_w) == (height, width):
        return small
    top, left = height - new_h, width - new_w
    if align == "center":
        top, left = top // 2, left // 2
    result = np.full((x.shape[0], height, width), value, dtype=np.float32)
    result[:, top : top + new_h, left : left + new_w] = small
    return result


def affine(x: Array, *, scale: float, offset: float) -> Array:
    """x * scale + offset."""
    y = x * np.float32(scale)
    y += np.float32(offset)
    return y


def clamp(x: Array, *, low: float, high: float) -> Array:
    """Values below `low` become `low`, above `high` become `high`."""
    return np.clip(x, np.float32(low), np.float32(high))


def span(mode: str, eps: float, stats: Mapping[str, Any]) -> tuple[Array, Array]:
    """(low, D) of the modes that map a range to [-1, 1]: D = high - low, and eps where that is 0."""
    low, high = statistics(mode, stats)
    width = high - low
    return low, np.where(width == 0, np.float32(eps), width)


def statistics(mode: str, stats: Mapping[str, Any]) -> tuple[Array, Array]:
    """The two statistics that a mode reads, each float32 [n] (one per joint, or per channel of a picture)."""
    first, second = (np.asarray(stats[name], dtype=np.float32).reshape(-1) for name in STATISTICS[mode])
    return first, second


def normalise(x: Array, *, mode: str, eps: float = 1e-8, **stats: Any) -> Array:
    """LeRobot's normalisation of a state [..., d], or of a picture [3, H, W] with one statistic per channel.

    MEAN_STD: (x - mean) / (std + eps). MIN_MAX, QUANTILES, QUANTILE10: 2 (x - low) / D - 1 with D = high - low, eps
    where that is 0. IDENTITY: x. No clamping.
    """
    if mode == "IDENTITY":
        return x
    a, b = statistics(mode, stats) if mode == "MEAN_STD" else span(mode, eps, stats)
    if x.ndim == 3:
        a, b = a[:, None, None], b[:, None, None]
    if mode == "MEAN_STD":
        return (x - a) / (b + np.float32(eps))
    return np.float32(2) * (x - a) / b - np.float32(1)


def pad(x: Array, *, size: int) -> Array:
    """Zeros appended to the last axis until it has `size` entries."""
    if x.shape[-1] > size:
        raise InputError(f"{x.shape[-1]} values do not fit into {size}", remedy="check which policy this state is for")
    return np.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, size - x.shape[-1])])


def silence(x: Array, *, columns: Sequence[int]) -> Array:
    """Zeros in these columns of a state [..., d]: joints that never moved in training."""
    y = np.array(x)
    y[..., list(columns)] = 0
    return y


IMAGE_STEPS: dict[str, StepFunction] = {
    "resize_with_pad": resize_with_pad,
    "affine": affine,
    "clamp": clamp,
    "normalise": normalise,
    "square": square,
    "pillow_resize": pillow_resize,
    "pillow_fit": pillow_fit,
    "centre_crop": centre_crop,
    "stack_normalised": stack_normalised,
    "top_left": top_left,
    "tensor_resize": tensor_resize,
    "window": window,
    "to_square": to_square,
    "area_resize": area_resize,
}
STATE_STEPS: dict[str, StepFunction] = {"normalise": normalise, "clamp": clamp, "pad": pad, "silence": silence}


def step_function(table: Mapping[str, StepFunction], step: Step) -> StepFunction:
    """The function of a step; ArtifactError names a step that this version does not know."""
    if step.step not in table:
        raise ArtifactError(
            f"step {step.step!r} is unknown to this vlac, which has {', '.join(sorted(table))}",
            remedy="update vlac on this machine, or compile again with this version",
        )
    return table[step.step]


def apply_steps(table: Mapping[str, StepFunction], steps: Iterable[Step], x: Array) -> Array:
    """The steps in order."""
    for step in steps:
        x = step_function(table, step)(x, **step.params)
    return x


def check_steps(
    table: Mapping[str, StepFunction], steps: Iterable[Step], where: str, size: int = 0, takes: int = 1
) -> None:
    """Raises ArtifactError when a step is unknown, has wrong parameters, or statistics of another length than `size`.

    where: the list, for the message ("io.state_steps"). takes: positional operands of the functions in `table`.
    """
    for step in steps:
        fn = step_function(table, step)
        try:
            inspect.signature(fn).bind(*[None] * takes, **step.params)
        except TypeError as error:
            raise ArtifactError(f"{where}: step {step.step}: {error}", remedy="compile again") from None
        if step.step in ("normalise", "unnormalise"):
            _check_statistics(step.params, f"{where}: step {step.step}", size)


def _check_statistics(params: Mapping[str, Any], where: str, size: int) -> None:
    mode = params["mode"]
    if mode != "IDENTITY" and mode not in STATISTICS:
        raise ArtifactError(f"{where}: mode {mode!r} is none of IDENTITY, {', '.join(STATISTICS)}")
    for name in STATISTICS.get(mode, ()):
        if name not in params:
            raise ArtifactError(f"{where}: mode {mode} needs {name}", remedy="compile again")
        try:
            values = np.asarray(params[name], dtype=np.float32).reshape(-1)
        except (TypeError, ValueError):
            raise ArtifactError(f"{where}: {name} is not a list of numbers") from None
        if size and values.size != size:
            raise ArtifactError(f"{where}: {name} has {values.size} entries, expected {size}", remedy="compile again")
        if not np.isfinite(values).all():
            raise ArtifactError(f"{where}: {name} holds NaN or Inf", remedy="compile with statistics that are whole")


# --- pictures --------------------------------------------------------------------------------------------------


def to_planes(image: Any, camera: str = "image") -> Array:
    """A picture as float32 [3, H, W] in [0, 1].

    Takes uint8 [H, W, 3] RGB (divided by 255), float [H, W, 3] that is already in [0, 1], or an RGB PIL.Image.
    Raises InputError that names the camera for any other layout, channel count, dtype or range.
    """
    x = _as_array(image, camera)
    if x.ndim != 3 or x.shape[2] != 3 or x.size == 0:
        raise _layout_error(x, camera)
    if x.dtype == np.uint8:
        scaled: Array = np.divide(x.transpose(2, 0, 1), np.float32(255), dtype=np.float32, order="C")
        return scaled
    if x.dtype.kind != "f":
        raise InputError(
            f"camera {camera}: pixels are {x.dtype}, expected uint8 (0..255) or float in [0, 1]",
            remedy="convert it: image.astype(numpy.uint8)",
        )
    planes = np.ascontiguousarray(x.transpose(2, 0, 1), dtype=np.float32)
    low, high = float(planes.min()), float(planes.max())  # NaN and Inf come through
    if not (low >= -FLOAT_SLACK and high <= 1 + FLOAT_SLACK):
        raise InputError(
            f"camera {camera}: float pixels reach from {low:g} to {high:g}, expected [0, 1]",
            remedy="give uint8 0..255, or divide by 255; do not normalise to [-1, 1], the policy does that itself",
        )
    return planes


def _as_array(image: Any, camera: str) -> npt.NDArray[Any]:
    mode = getattr(image, "mode", None)
    if isinstance(mode, str) and hasattr(image, "getbands") and mode != "RGB":
        raise InputError(
            f"camera {camera}: the picture has mode {mode}, expected RGB", remedy='convert it: image.convert("RGB")'
        )
    try:
        return np.asarray(image)
    except (ValueError, TypeError, RuntimeError) as error:
        raise InputError(
            f"camera {camera}: a {type(image).__name__} is no picture ({error})", remedy="give a uint8 array [H, W, 3]"
        ) from None


def _layout_error(x: npt.NDArray[Any], camera: str) -> InputError:
    found = f"camera {camera}: the picture is {x.dtype}{list(x.shape)}, expected [height, width, 3] RGB"
    if x.size == 0:
        return InputError(found + "; it is empty", remedy="check the camera and the crop")
    if x.ndim == 2 or (x.ndim == 3 and x.shape[2] == 1):
        return InputError(found + "; it is grey", remedy="repeat it: numpy.repeat(image[..., None], 3, axis=2)")
    if x.ndim == 3 and x.shape[2] == 4:
        return InputError(found + "; it has an alpha channel", remedy="drop it: image[..., :3]")
    if x.ndim == 3 and x.shape[0] == 3:
        return InputError(found + "; channels come first", remedy="move them last: image.transpose(1, 2, 0)")
    if x.ndim == 4 and x.shape[0] == 1:
        return InputError(found + "; it has a batch axis", remedy="give one picture: image[0]")
    return InputError(found, remedy="give a uint8 array [H, W, 3]")


def letterbox(width: int, height: int) -> tuple[Step, ...]:
    """The steps most policies of this kind were trained with: fit, pad left and above with black, [0, 1] to [-1, 1]."""
    return (
        Step("resize_with_pad", {"width": width, "height": height, "align": "right-bottom", "value": 0.0}),
        Step("affine", {"scale": 2.0, "offset": -1.0}),
    )


def preprocess_image(
    image: Any, target: Union[int, tuple[int, int], Sequence[Step]] = 512, *, camera: str = "image"
) -> Array:
    """A camera picture of any size as the pixels that a vision tower reads.

    Args:
        image: uint8 [H, W, 3] RGB, float [H, W, 3] in [0, 1], or a PIL.Image in mode RGB.
        target: a policy's own steps (`artifact.io.image_steps`); or the size of a `letterbox`: (width, height), or one
            number for a square.
        camera: a name for error messages.

    Returns: float32 [3, height, width].
    Raises: InputError that names the camera.
    """
    if isinstance(target, int):
        target = (target, target)
    steps = [t for t in target if isinstance(t, Step)]
    if sizes := [t for t in target if isinstance(t, int)]:
        steps.extend(letterbox(*sizes))
    try:
        return np.ascontiguousarray(apply_steps(IMAGE_STEPS, steps, to_planes(image, camera)))
    except InputError as error:
        if error.message.startswith("camera "):
            raise
        raise InputError(f"camera {camera}: {error.message}", remedy=error.remedy) from None


def pad_state(state: npt.ArrayLike, size: int = 32) -> Array:
    """A state [..., d] with zeros appended: float32 [..., size]. InputError when d > size, or NaN or Inf is in it."""
    return pad(finite_vector(state, "state"), size=size)


def finite_vector(values: npt.ArrayLike, what: str) -> Array:
    """`values` as float32 of at least one axis; InputError when it is not numbers, empty, NaN or Inf."""
    try:
        raw = np.asarray(values)
        if raw.dtype.kind not in "fiu":
            raise TypeError(f"its dtype is {raw.dtype}")
        with np.errstate(over="ignore"):
            x = np.atleast_1d(raw).astype(np.float32)
    except (TypeError, ValueError, RuntimeError) as error:
        raise InputError(f"{what} is not an array of numbers: {error}", remedy="give a list of floats") from None
    bad = np.flatnonzero(~np.isfinite(x))
    if x.size == 0 or bad.size:
        problem = f"NaN or Inf at index {', '.join(map(str, bad[:8]))}" if bad.size else "no values"
        raise InputError(f"{what} has {problem}", remedy="check the sensor or the key that it was read from")
    return x
