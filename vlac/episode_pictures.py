"""Episodes as pictures: an animated GIF and a PNG strip of frames, of one that succeeded and one that failed."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from vlac.drivers import open_driver
from vlac.environments import World, open_world
from vlac.errors import InputError
from vlac.registry import Progress, silent

if TYPE_CHECKING:
    from vlac.evaluate import Episode, Run

NpArray = np.ndarray[Any, Any]

WIDTH = 256
"""Pixels of a frame's longer side in the GIF; the strip takes frames three quarters as large."""
FRAMES, SHOWN, ROW = 120, 8, 4
"""Frames of a GIF at most, of a strip, and of a row of it."""


def draw_both(run: Run, episodes: Sequence[Episode], folder: Path, progress: Progress = silent) -> list[dict[str, Any]]:
    """Runs the first episode that succeeded and the first that failed again, watched, and writes their pictures.

    Returns: per episode: outcome, seed, task, steps and the files written.
    Raises InputError when the environment draws no pictures.
    """
    chosen = [next((e for e in episodes if e.success is wanted), None) for wanted in (True, False)]
    folder.mkdir(parents=True, exist_ok=True)
    driver, world = open_driver(run.path, run.engine, run.threads or 1), open_world(run.adapter)
    written: list[dict[str, Any]] = []
    try:
        for episode in filter(None, chosen):
            progress("drawing an episode", len(written), 2)
            frames, again = watched(run, driver, world, episode.seed)
            outcome = "succeeded" if again.success else "failed"
            name = f"{outcome}_seed{episode.seed}"
            files = [str(write_gif(folder / f"{name}.gif", frames, world.fps))]
            files.append(str(write_strip(folder / f"{name}.png", frames)))
            written.append(
                {"outcome": outcome, "seed": episode.seed, "task": again.told, "steps": again.steps, "files": files}
            )
    finally:
        world.close()
        driver.close()
    return written


def watched(run: Run, driver: Any, world: World, seed: int) -> tuple[list[NpArray], Episode]:
    """The frames of one episode, uint8 [H, W, 3] each, and the episode."""
    from vlac.evaluate import run_episode

    frames: list[NpArray] = []

    def watch(at: World, step: int) -> None:
        picture = at.render()
        if picture is None:
            raise InputError(f"{run.adapter.env} draws no pictures", remedy="leave --pictures out")
        frames.append(picture)

    return frames, run_episode(driver, world, seed, run.plan, run.told.get(seed), run.control, watch)


def _sized(frame: NpArray, longer: int) -> Any:
    from PIL import Image

    picture = Image.fromarray(frame)
    scale = longer / max(picture.size)
    size = (max(1, round(picture.width * scale)), max(1, round(picture.height * scale)))
    return picture.resize(size, Image.Resampling.LANCZOS) if size != picture.size else picture


def write_gif(path: Path, frames: Sequence[NpArray], fps: float) -> Path:
    """An animation in real time, thinned to FRAMES frames; the last one stays for a second."""
    stride = -(-len(frames) // FRAMES)
    kept = [*range(0, len(frames) - 1, stride), len(frames) - 1]
    pictures = [_sized(frames[i], WIDTH).quantize(64) for i in kept]
    times = [round(1000 / fps * (b - a)) for a, b in itertools.pairwise(kept)] + [1000]
    pictures[0].save(path, save_all=True, append_images=pictures[1:], duration=times, loop=0, optimize=True)
    return path


def write_strip(path: Path, frames: Sequence[NpArray]) -> Path:
    """SHOWN frames at equal distances of time, first and last among them, each with its step, ROW to a row."""
    from PIL import Image, ImageDraw

    indices = sorted({round(i * (len(frames) - 1) / (SHOWN - 1)) for i in range(SHOWN)})
    tiles = [_sized(frames[i], WIDTH * 3 // 4) for i in indices]
    gap, below = 4, 16
    width, height = tiles[0].width + gap, tiles[0].height + below
    strip = Image.new("RGB", (ROW * width - gap, -(-len(tiles) // ROW) * height), "white")
    draw = ImageDraw.Draw(strip)
    for place, (tile, step) in enumerate(zip(tiles, indices, strict=True)):
        x, y = place % ROW * width, place // ROW * height
        strip.paste(tile, (x, y))
        draw.text((x + 2, y + tile.height + 2), f"step {step}", fill="black")
    strip.save(path, optimize=True)
    return path
