"""What a SmolVLM backbone's name or config.json adds to tensor shapes: head sizes, epsilons, activations."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vlac.errors import CheckpointError, Unsupported
from vlac.readers.hub import companion, local_companion
from vlac.readers.safetensors_file import read_json


@dataclass(frozen=True)
class Backbone:
    """What the VLM's name or config.json adds to the tensor shapes. `layers` and `heads` 0 = unknown."""

    head_dim: int
    vision_heads: int
    layers: int = 0
    heads: int = 0
    rms_norm_eps: float = 1e-5
    layer_norm_eps: float = 1e-6
    hidden_act: str = "silu"
    vision_act: str = "gelu_pytorch_tanh"


KNOWN_VLMS = {
    "HuggingFaceTB/SmolVLM2-500M-Video-Instruct": Backbone(head_dim=64, vision_heads=12, layers=32),
    "HuggingFaceTB/SmolVLM2-256M-Video-Instruct": Backbone(head_dim=64, vision_heads=12, layers=30),
    "HuggingFaceTB/SmolVLM2-2.2B-Instruct": Backbone(head_dim=64, vision_heads=16, layers=24),
}
"""What tensor shapes do not tell, for the published backbones; other names need their config.json."""


def find_backbone(folder: Path, name: str, spec: Mapping[str, Any]) -> Backbone:
    """From the folder inside the checkpoint that `name` means, the table, --spec, or the hub, in that order.

    Raises CheckpointError when none of them knows.
    """
    path = local_companion(folder, name, "config.json")
    if path is None and name in KNOWN_VLMS:
        return KNOWN_VLMS[name]
    if path is None and {"text.head_dim", "vision.num_attention_heads"} <= set(spec):
        return Backbone(0, 0)  # both are taken from --spec
    try:
        return read_backbone(path or companion(folder, name, "config.json", "the VLM (vlm_model_name)"))
    except CheckpointError as error:
        say = "say its head sizes, for example --spec text.head_dim=64 --spec vision.num_attention_heads=12"
        raise CheckpointError(error.message, remedy=f"{error.remedy}; or {say}" if error.remedy else say) from None


def read_backbone(path: Path) -> Backbone:
    """A SmolVLM config.json. Raises CheckpointError (broken) and Unsupported (biases in the decoder)."""
    table = read_json(path)
    text = table.get("text_config") if isinstance(table, dict) else None
    vision = table.get("vision_config") if isinstance(table, dict) else None
    if not isinstance(text, dict) or not isinstance(vision, dict):
        raise CheckpointError(f"{path}: needs text_config and vision_config, as SmolVLM's config.json has")
    for key in ("attention_bias", "mlp_bias"):
        if text.get(key):
            raise Unsupported(f"{path}: text_config.{key} = true is not implemented")

    def size(part: dict[str, Any], key: str) -> int:
        value = part.get(key)
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise CheckpointError(f"{path}: {key} is {value!r}, expected a size")
        return value

    def eps(part: dict[str, Any], key: str) -> float:
        value = part.get(key, 1e-6)  # the default of LlamaConfig and SmolVLMVisionConfig, which saving may leave out
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < 1:
            raise CheckpointError(f"{path}: {key} is {value!r}, expected a small positive number")
        return float(value)

    given = text.get("head_dim") is not None
    return Backbone(
        head_dim=size(text, "head_dim") if given else size(text, "hidden_size") // size(text, "num_attention_heads"),
        vision_heads=size(vision, "num_attention_heads"),
        layers=size(text, "num_hidden_layers"),
        heads=size(text, "num_attention_heads"),
        rms_norm_eps=eps(text, "rms_norm_eps"),
        layer_norm_eps=eps(vision, "layer_norm_eps"),
        hidden_act=str(text.get("hidden_act", "silu")),
        vision_act=str(vision.get("hidden_act", "gelu_pytorch_tanh")),
    )
