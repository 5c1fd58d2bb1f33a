"""Vision towers as timm draws them for OpenVLA: DINOv2 with class and register tokens, SigLIP without its head.

Several towers may look at one picture, each with its own normalisation; their features stand side by side.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from vlac import blocks
from vlac.blocks import Shapes, linear
from vlac.errors import Unsupported
from vlac.graph import StageBuilder
from vlac.spec import VisionSpec


@dataclass(frozen=True)
class TowerSpec(VisionSpec):
    """A timm ViT whose last layer and norm are left out: `num_hidden_layers` counts the layers that run.

    `prefix_tokens` (class and register tokens) stand before the patches, have no position, and are dropped at the end.
    layer_scale: see blocks.vit_layers.
    """

    prefix_tokens: int = 0
    layer_scale: bool = False


def towers(b: StageBuilder, pixels: str, specs: Sequence[TowerSpec], name: str) -> str:
    """`vision_features` [grid*grid, sum of widths]; channels 3i to 3i+2 of pixels are tower i's."""
    first = specs[0]
    grids = {(t.grid, t.patch_size, t.num_channels, t.image_size) for t in specs}
    if len(grids) != 1:
        raise Unsupported(f"towers of different patch grids: (grid, patch, channels, image) {sorted(grids)}")
    patches, width = b.op("patchify", pixels, patch=first.patch_size, block=1), first.num_channels * first.patch_size**2
    features = []
    for i, spec in enumerate(specs):
        own = b.op("slice", patches, axis=1, start=i * width, stop=(i + 1) * width) if len(specs) > 1 else patches
        features.append(_tower(b, own, spec, f"{name}.{i}"))
    return b.op("concat", *features, axis=1, name="vision_features") if len(features) > 1 else features[0]


def _tower(b: StageBuilder, patches: str, spec: TowerSpec, name: str) -> str:
    x = b.op("add", linear(b, patches, f"{name}.patch_embedding", bias=True), f"@{name}.position_embedding")
    skip = spec.prefix_tokens
    x = b.op("concat", f"@{name}.prefix", x, axis=0) if skip else x
    x = blocks.vit_layers(b, x, spec, name, scaled=spec.layer_scale)
    return b.op("slice", x, axis=0, start=skip, stop=skip + spec.grid**2) if skip else x


def towers_shapes(specs: Sequence[TowerSpec], name: str) -> Shapes:
    """Weights of `towers`."""
    result: Shapes = {}
    for i, spec in enumerate(specs):
        tower = f"{name}.{i}"
        result |= linear_shapes(f"{tower}.patch_embedding", spec.hidden_size, spec.num_channels * spec.patch_size**2)
        result[f"{tower}.position_embedding"] = (spec.grid**2, spec.hidden_size)
        result |= blocks.vit_layers_shapes(spec, tower, spec.layer_scale)
        if spec.prefix_tokens:
            result[f"{tower}.prefix"] = (spec.prefix_tokens, spec.hidden_size)
    return result


def linear_shapes(name: str, rows: int, columns: int) -> Shapes:
    """Weight and bias of a linear layer."""
    return {f"{name}.weight": (rows, columns), f"{name}.bias": (rows,)}
