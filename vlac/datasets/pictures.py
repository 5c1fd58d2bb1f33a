"""Single pictures inside parquet: PNG (or JPEG) bytes to uint8 RGB and back, exactly."""

from __future__ import annotations

import io
from typing import Any

import numpy as np
from PIL import Image, ImageOps

from vlac.errors import DatasetError

NpArray = np.ndarray[Any, Any]

MAX_PIXELS = 1 << 26
"""Larger pictures are refused before they are decoded: no camera makes them, a broken file may claim them."""

_ORIENTATION = 0x0112


def encode_png(picture: NpArray, level: int) -> bytes:
    """uint8 [H, W, 3] as PNG; `level` is zlib's, 0 to 9."""
    out = io.BytesIO()
    Image.fromarray(picture).save(out, format="PNG", compress_level=level)
    return out.getvalue()


def decode(data: Any, where: str) -> NpArray:
    """uint8 [H, W, 3] of a picture's bytes, turned as its EXIF says (so does LeRobot).

    Raises DatasetError with `where` when there are none, they are no picture, or it is no 8-bit RGB.
    """
    if not isinstance(data, bytes):
        raise DatasetError(
            f"{where} holds no picture bytes but {type(data).__name__}",
            remedy="pictures must lie inside the parquet file (LeRobot embeds them), not beside it",
        )
    try:
        with Image.open(io.BytesIO(data), formats=("PNG", "JPEG")) as picture:
            if picture.width * picture.height > MAX_PIXELS:
                raise DatasetError(
                    f"{where} is a picture of {picture.width}x{picture.height}, more than any camera has"
                )
            if picture.mode != "RGB":
                raise DatasetError(f"{where} is a picture of mode {picture.mode}, expected 8-bit RGB")
            turned = ImageOps.exif_transpose(picture) if picture.getexif().get(_ORIENTATION) else picture
            return np.array(turned, dtype=np.uint8)
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise DatasetError(f"{where} cannot be decoded: {error}") from None
