"""resolution: smaller pictures for the vision tower, fewer patches and fewer tokens.

The tower keeps its weights; its table of positions loses rows by the rule of the checkpoint's own architecture
(VisionSpec.position_rule): "buckets" takes row floor(i * trained / new) on each axis, as Idefics3's embeddings do for
smaller images (computed here in whole numbers; the original's float comparison can land one row off in bf16), "table"
resamples bicubically (a = -0.75, no antialiasing), as Hugging Face's SigLIP does. Work in the tower falls with the
square and faster. No training-free effect on success is published: measure the drift.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np

from vlac import calibrate
from vlac.errors import Inapplicable
from vlac.io import IO, Step
from vlac.ops import NpArray
from vlac.policy import Policy
from vlac.registry import Pass, passes

TABLE = "vision.position_embedding"


def buckets(new: int, trained: int) -> NpArray:
    """Rows of a trained x trained table (row-major) that a new x new grid reads: i64 [new*new]."""
    one = np.arange(new) * trained // new
    return np.asarray((one[:, None] * trained + one[None, :]).reshape(-1))


def bicubic(new: int, trained: int) -> NpArray:
    """[new, trained] float64: cubic convolution weights (a = -0.75, half-pixel centres, edges repeated)."""
    at = (np.arange(new) + 0.5) * trained / new - 0.5
    low = np.floor(at).astype(int)
    result, a = np.zeros((new, trained)), -0.75
    for k in range(-1, 3):
        d = np.abs(at - (low + k))
        near = (a + 2) * d**3 - (a + 3) * d**2 + 1
        far = a * (d**3 - 5 * d**2 + 8 * d - 4)
        np.add.at(result, (np.arange(new), np.clip(low + k, 0, trained - 1)), np.where(d <= 1, near, far))
    return result


def resampled(table: NpArray, new: int, trained: int) -> NpArray:
    """A row-major table [trained^2, D] on a new x new grid."""
    m = bicubic(new, trained)
    grid = np.einsum("ai,bj,ijd->abd", m, m, table.reshape(trained, trained, -1).astype(np.float64), optimize=True)
    return np.asarray(grid.reshape(new * new, -1), dtype=np.float32)


def _resize(io: IO, size: int) -> int:
    """Index of the step that gives pictures the tower's size; -1 if there is none."""
    found = [
        i for i, s in enumerate(io.image_steps) if s.params.get("width") == size and s.params.get("height") == size
    ]
    return found[-1] if found else -1


def _requires(policy: Policy, size: int) -> None:
    vision = getattr(policy.spec, "vision", None)
    if vision is None or TABLE not in policy.weights:
        raise Inapplicable(f"{policy.family} has no vision tower with a table of positions", remedy="leave it out")
    if _resize(policy.io, vision.image_size) < 0:
        raise Inapplicable(
            f"pictures reach the tower without a resize to {vision.image_size}: their size is the camera's",
            remedy="leave it out, or let the camera give smaller pictures and train with them",
        )
    unit = vision.patch_size * getattr(policy.spec, "scale_factor", 1) * getattr(policy.spec, "token_pool", 1)
    if size < unit or size >= vision.image_size or size % unit:
        raise Inapplicable(
            f"size={size}: the tower sees {vision.image_size}; smaller multiples of {unit} "
            f"(patch {vision.patch_size} x tokens joined {unit // vision.patch_size}) are legal"
        )
    if vision.position_rule not in ("buckets", "table"):
        raise Inapplicable(f"positions of rule {vision.position_rule!r} cannot be made for another grid")


def _apply(policy: Policy, size: int) -> tuple[Policy, Mapping[str, Any]]:
    vision = policy.spec.vision
    smaller = dataclasses.replace(vision, image_size=size)
    new, trained, width = smaller.grid, vision.grid, vision.hidden_size

    def rows(table: NpArray) -> NpArray:
        return table[buckets(new, trained)] if vision.position_rule == "buckets" else resampled(table, new, trained)

    at = _resize(policy.io, vision.image_size)
    step = policy.io.image_steps[at]
    changed = Step(step.step, {**step.params, "width": size, "height": size})
    steps = (*policy.io.image_steps[:at], changed, *policy.io.image_steps[at + 1 :])
    after = policy.replace(
        spec=dataclasses.replace(policy.spec, vision=smaller),
        io=dataclasses.replace(policy.io, image_steps=steps, image_size=size),
        weights=policy.weights.map(TABLE, rows, (new**2, width)),
    )
    figures = {
        "image_size_before": vision.image_size,
        "image_size_after": size,
        "patches_before": trained**2,
        "patches_after": new**2,
    }
    return after, figures


def _ensures(before: Policy, after: Policy, size: int) -> None:
    calibrate.draw(after)


RESOLUTION = passes.add(
    Pass(
        name="resolution",
        apply=_apply,
        params={"size": (int, None, "side of the square that the vision tower sees, in pixels")},
        requires=_requires,
        ensures=_ensures,
        doc="Smaller pictures for the vision tower.",
    )
)
