"""LoRA adapters saved beside a policy: W + scale * B A, merged lazily before anything else reads the weights.

Only plain LoRA on linear layers; every variant that changes the formula is refused by name.
Format: https://huggingface.co/docs/peft (adapter_config.json, adapter_model.safetensors).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from vlac.errors import CheckpointError, Unsupported
from vlac.readers.hub import fetch_repository, is_hub_id
from vlac.readers.safetensors_file import open_file, open_folder, read_json
from vlac.weights import Array, LazyTensor, Weights

CONFIG, MODEL = "adapter_config.json", "adapter_model.safetensors"

_NEUTRAL: Mapping[str, tuple[Any, ...]] = {
    "use_dora": (None, False),
    "fan_in_fan_out": (None, False),
    "bias": (None, "none"),
    "rank_pattern": (None, {}),
    "alpha_pattern": (None, {}),
    "lora_bias": (None, False),
    "megatron_config": (None,),
    "layer_replication": (None,),
    "trainable_token_indices": (None,),
    "init_lora_weights": (None, True, False, "gaussian", "orthogonal"),
}


def is_adapter(folder: Path) -> bool:
    """Whether a folder holds an adapter."""
    return (folder / CONFIG).is_file()


def _base(folder: Path, name: object, revision: object) -> Path:
    if not isinstance(name, str) or not name:
        raise CheckpointError(f"{folder / CONFIG}: no base_model_name_or_path")
    parts = [p for p in re.split(r"[/\\]+", name) if p]
    for local in (name, parts[-1] if parts else ""):
        if local and not Path(local).is_absolute() and ".." not in Path(local).parts and (folder / local).is_dir():
            return folder / local
    if not is_hub_id(name):
        raise CheckpointError(
            f"{folder / CONFIG}: base model {name!r} is neither a folder inside the checkpoint nor a hub id",
            remedy=f"place the base checkpoint at {folder / (parts[-1] if parts else 'base')}",
        )
    return fetch_repository(name, revision if isinstance(revision, str) else None)


def open_merged(folder: Path) -> tuple[Weights, list[Path]]:
    """The base policy's weights with the adapter merged in, and the files read."""
    if not is_adapter(folder):
        raise CheckpointError(f"{folder}: use_peft is true but {CONFIG} is missing", remedy="copy the adapter's files")
    config = read_json(folder / CONFIG)
    if not isinstance(config, dict) or config.get("peft_type") != "LORA":
        kind = config.get("peft_type") if isinstance(config, dict) else config
        raise Unsupported(f"{folder / CONFIG}: peft_type {kind!r}; only LORA is implemented")
    for key, neutral in _NEUTRAL.items():
        if config.get(key) not in neutral:
            raise Unsupported(f"{folder / CONFIG}: {key} = {config[key]!r} is not implemented")
    rank, alpha = config.get("r"), config.get("lora_alpha")
    if isinstance(rank, bool) or not isinstance(rank, int) or rank < 1 or not isinstance(alpha, (int, float)):
        raise CheckpointError(f"{folder / CONFIG}: r = {rank!r}, lora_alpha = {alpha!r}")
    scale = float(alpha) / (rank**0.5 if config.get("use_rslora") else rank)
    base = open_folder(_base(folder, config.get("base_model_name_or_path"), config.get("revision")))
    return merge(base, open_file(folder / MODEL), rank, scale, str(folder / MODEL)), [folder / CONFIG, folder / MODEL]


def merge(base: Weights, adapter: Weights, rank: int, scale: float, where: str) -> Weights:
    """`base` with every lora_A/lora_B pair added and every saved module replaced; CheckpointError names a misfit."""
    merged: dict[str, LazyTensor] = {}
    for name in adapter:
        plain = name.removeprefix("base_model.model.")
        if plain.endswith(".lora_B.weight"):
            continue
        if plain.endswith(".lora_A.weight"):
            target = plain.removesuffix(".lora_A.weight") + ".weight"
            merged[target] = _sum(base, adapter, name, target, rank, scale, where)
        elif plain not in base:
            raise CheckpointError(f"{where}: tensor {name} belongs to no tensor of the base model")
        elif adapter[name].shape != base[plain].shape:
            raise CheckpointError(f"{where}: {name} is {adapter[name].shape}, the base's is {base[plain].shape}")
        else:
            merged[plain] = adapter[name]
    if not merged:
        raise CheckpointError(f"{where}: holds no adapter tensors")
    return base.with_(**merged)


def _sum(base: Weights, adapter: Weights, name: str, target: str, rank: int, scale: float, where: str) -> LazyTensor:
    other = name.replace(".lora_A.", ".lora_B.")
    if target not in base or other not in adapter:
        raise CheckpointError(f"{where}: {name}: {target if target not in base else other} is missing")
    w, a, b = base[target], adapter[name], adapter[other]
    if len(w.shape) != 2 or a.shape != (rank, w.shape[1]) or b.shape != (w.shape[0], rank):
        raise CheckpointError(
            f"{where}: {name} {a.shape} and {other} {b.shape} do not fit {target} {w.shape}, r={rank}"
        )

    def load() -> Array:
        delta = b.load().astype(np.float64) @ a.load().astype(np.float64)
        return (w.load() + scale * delta).astype(np.float32)

    return LazyTensor(w.shape, load, w.dtype, f"{w.source} + LoRA")
