"""One answer of an artifact from files and text: what `vlac run` does."""

from __future__ import annotations

import os
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from vlac import machine
from vlac.errors import InputError, VlacWarning
from vlac.runtime.session import load

NpArray = np.ndarray[Any, Any]


def act_once(
    path: str | Path,
    *,
    images: Mapping[str, str | Path],
    state: str | None,
    task: str | None,
    seed: int | None = None,
    units: str | None = None,
    engine: str | None = None,
    threads: int | None = None,
    options: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Loads an artifact and acts once.

    Args:
        images: camera (feature key or its last part) -> picture file.
        state: "0,0,..." raw values, None if the policy takes none.
        options: for the engine, as in vlac.load.

    Returns: chunk (float32 [chunk_size, action_dim]), actions (names), units, engine, stats (milliseconds; none under
        emulation), warnings.
    Raises: VlacError for files, state and cameras that do not fit.
    """
    pictures = {name: read_image(Path(file)) for name, file in images.items()}
    values = parse_state(state)
    policy = load(path, engine=engine, threads=threads, options=options)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", VlacWarning)  # they are in the answer
            chunk = policy.act(images=pictures, state=values, task=task, seed=seed, units=units)
        names = list(policy.io.action_names) or [f"action {i}" for i in range(chunk.shape[1])]
        return {
            "units": units or policy.hparams.units,
            "engine": policy.hparams.engine,
            "actions": names,
            "chunk": chunk,
            "stats": {} if machine.emulation() else dict(policy.stats),  # emulated times mean nothing
            "warnings": list(policy.warnings),
        }
    finally:
        policy.close()


def read_image(path: Path) -> NpArray:
    """A picture file as uint8 [H, W, 3] RGB, as it is stored (no EXIF rotation: a camera frame has none)."""
    from PIL import Image, UnidentifiedImageError

    try:
        with Image.open(path) as picture:
            if picture.mode in ("I", "F") or picture.mode.startswith("I;"):  # Pillow would cut them off at 255
                raise InputError(
                    f"--image: {path} has mode {picture.mode}, more than 8 bits a channel",
                    remedy="convert it to 8-bit RGB as the camera of the training data gave it",
                )
            return np.asarray(picture.convert("RGB"), dtype=np.uint8)
    except FileNotFoundError:
        raise InputError(f"--image: {path} does not exist", remedy="check the path behind CAMERA=") from None
    except (UnidentifiedImageError, OSError, ValueError, Image.DecompressionBombError) as error:
        raise InputError(
            f"--image: {path} is not a picture that can be read: {error}", remedy="give a PNG or JPEG"
        ) from None


def parse_state(text: str | None) -> NpArray | None:
    """ "0,1.5,-2" -> float32 [3]; None and "" -> None."""
    if not text:
        return None
    try:
        return np.array([float(v) for v in text.split(",")], dtype=np.float32)
    except ValueError:
        raise InputError(
            f"--state {text!r}: numbers separated by commas are expected", remedy="write --state 0,0.5,-1"
        ) from None


def save(path: Path, array: NpArray) -> None:
    """Writes an .npy file beside `path` and renames it, so that an interrupt leaves the earlier file whole."""
    beside = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with beside.open("wb") as f:
            np.save(f, array, allow_pickle=False)
        beside.replace(path)
    finally:
        beside.unlink(missing_ok=True)
