"""What stands around a language model in OpenVLA-OFT (Kim et al. 2025): a token for the state, and the L1 action head.

Weights are named state_proj.* and head.*.
"""

from __future__ import annotations

from vlac.blocks import Shapes, linear
from vlac.blocks_timm import linear_shapes
from vlac.graph import StageBuilder


def state_token(b: StageBuilder, size: int) -> str:
    """A row of the decoder's width from `state` f32 [1, size]; adds the stage's input."""
    state = linear(b, b.input("state", "f32", 1, size), "state_proj.fc1", bias=True)
    return linear(b, b.op("gelu", state, approximate="none"), "state_proj.fc2", bias=True)


def state_token_shapes(size: int, width: int) -> Shapes:
    """Weights of `state_token`."""
    return linear_shapes("state_proj.fc1", width, size) | linear_shapes("state_proj.fc2", width, width)


def l1_head(b: StageBuilder, x: str, steps: int, action_dim: int, width: int, blocks: int) -> str:
    """[steps * action_dim, width] -> `actions` [steps, action_dim]: a residual MLP on one step's rows side by side."""

    def norm(x: str, name: str) -> str:
        return b.op("layer_norm", x, f"@{name}.weight", f"@{name}.bias", eps=1e-5)

    x = b.op("reshape", x, shape=(steps, action_dim * width))
    x = b.op("relu", linear(b, norm(x, "head.norm1"), "head.fc1", bias=True))
    for i in range(blocks):
        name = f"head.blocks.{i}"
        x = b.op("add", x, b.op("relu", linear(b, norm(x, f"{name}.norm"), f"{name}.fc", bias=True)))
    return linear(b, norm(x, "head.norm2"), "head.fc2", bias=True, as_="actions")


def l1_head_shapes(action_dim: int, width: int, blocks: int) -> Shapes:
    """Weights of `l1_head`."""
    read = action_dim * width
    result: Shapes = {"head.norm1.weight": (read,), "head.norm1.bias": (read,)}
    result |= linear_shapes("head.fc1", width, read)
    for i in range(blocks):
        result |= {f"head.blocks.{i}.norm.weight": (width,), f"head.blocks.{i}.norm.bias": (width,)}
        result |= linear_shapes(f"head.blocks.{i}.fc", width, width)
    result |= {"head.norm2.weight": (width,), "head.norm2.bias": (width,)}
    return result | linear_shapes("head.fc2", action_dim, width)
