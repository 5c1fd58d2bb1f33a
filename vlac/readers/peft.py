"""LoRA adapters: W + scale * B A for every layer they name, merged lazily before anything else reads the weights.

Linear layers and embeddings, rank and alpha patterns, rsLoRA, DoRA and whole saved modules; every variant beyond that
is refused by name. Format: https://huggingface.co/docs/peft (adapter_config.json, adapter_model.safetensors).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from vlac.errors import CheckpointError, Unsupported
from vlac.readers.hub import fetch_repository, is_hub_id
from vlac.readers.safetensors_file import open_file, open_folder, read_json
from vlac.weights import Array, LazyTensor, Weights

CONFIG, MODEL = "adapter_config.json", "adapter_model.safetensors"

_NEUTRAL: Mapping[str, tuple[Any, ...]] = {
    "fan_in_fan_out": (None, False),
    "bias": (None, "none"),
    "lora_bias": (None, False),
    "layer_replication": (None,),
    "trainable_token_indices": (None,),
    "target_parameters": (None, []),
    "alora_invocation_tokens": (None,),
    "init_lora_weights": (None, True, False, "gaussian", "orthogonal", "eva"),
}
"""Keys that change the formula -> values under which they do not."""

_KNOWN_USES, _HARMLESS = ("use_dora", "use_rslora"), ("loftq_config", "eva_config", "megatron_config", "runtime_config")
"""Variants come as use_X or X_config; any other that is set is refused. Harmless: settings of training alone."""

_PARTS = re.compile(
    r"(?P<module>.+)\.(?P<part>lora_A|lora_B|lora_embedding_A|lora_embedding_B|lora_magnitude_vector)"
    r"(?:\.default)?(?:\.weight)?"
)


@dataclass(frozen=True)
class Delta:
    """What an adapter does to one weight: `applied` is exact in float64 and rounds once.

    a [r, in], b [out, r]; for an embedding table [V, D] a is [r, V], b [D, r]. magnitude: DoRA's, [out].
    """

    a: LazyTensor
    b: LazyTensor
    scale: float
    magnitude: LazyTensor | None = None
    embedding: bool = False

    @property
    def shape(self) -> tuple[int, int]:
        """Of the weight that it fits."""
        rows, columns = self.b.shape[0], self.a.shape[1]
        return (columns, rows) if self.embedding else (rows, columns)

    def applied(self, weight: Array) -> Array:
        """The weight with the adapter merged: W + s B A, or m (W + s B A) / |W + s B A| over rows (DoRA)."""
        delta = self.scale * (self.b.load().astype(np.float64) @ self.a.load().astype(np.float64))
        both = weight.astype(np.float64) + (delta.T if self.embedding else delta)
        if self.magnitude is not None:
            size = self.magnitude.load().astype(np.float64).reshape(-1, 1)
            both = both * size / np.linalg.norm(both, axis=1, keepdims=True)
        return np.asarray(both, dtype=np.float32)


@dataclass(frozen=True)
class Adapter:
    """An adapter's deltas and whole tensors, by the name of the tensor in the base model; `files` it was read from."""

    where: str
    deltas: Mapping[str, Delta]
    saved: Mapping[str, LazyTensor]
    files: tuple[Path, ...]
    base: Any = None
    revision: Any = None


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
    adapter = open_adapter(folder)
    return merge(open_folder(_base(folder, adapter.base, adapter.revision)), adapter), list(adapter.files)


def open_adapter(folder: Path) -> Adapter:
    """A PEFT folder, checked: every tensor belongs to a delta or is saved whole. Tensors are read when asked for.

    Raises: CheckpointError for what does not fit, Unsupported for variants that change the formula, by their key.
    """
    if not is_adapter(folder):
        raise CheckpointError(f"{folder}: no {CONFIG}", remedy="name a folder that peft's save_pretrained wrote")
    config = read_json(folder / CONFIG)
    if not isinstance(config, dict) or config.get("peft_type") != "LORA":
        kind = config.get("peft_type") if isinstance(config, dict) else config
        raise Unsupported(f"{folder / CONFIG}: peft_type {kind!r}; only LORA is implemented")
    for key, neutral in _NEUTRAL.items():
        if config.get(key) not in neutral:
            raise Unsupported(f"{folder / CONFIG}: {key} = {config[key]!r} is not implemented")
    for key, value in config.items():
        variant = key.startswith("use_") and key not in _KNOWN_USES
        if value and (variant or (key.endswith("_config") and key not in _HARMLESS)):
            raise Unsupported(f"{folder / CONFIG}: {key} = {value!r} is not implemented")
    rank, alpha = config.get("r"), config.get("lora_alpha")
    if isinstance(rank, bool) or not isinstance(rank, int) or rank < 1 or not isinstance(alpha, (int, float)):
        raise CheckpointError(f"{folder / CONFIG}: r = {rank!r}, lora_alpha = {alpha!r}")
    where = str(folder / MODEL)
    parts: dict[str, dict[str, LazyTensor]] = {}
    saved: dict[str, LazyTensor] = {}
    for name, tensor in open_file(folder / MODEL).items():
        plain = name.removeprefix("base_model.model.")
        if m := _PARTS.fullmatch(plain):
            parts.setdefault(m["module"], {})[m["part"]] = tensor
        else:
            saved[re.sub(r"\.modules_to_save(\.default)?\.", ".", plain)] = tensor
    if not parts and not saved:
        raise CheckpointError(f"{where}: holds no adapter tensors")
    deltas = {f"{module}.weight": _delta(config, module, given, where) for module, given in parts.items()}
    files = (folder / CONFIG, folder / MODEL)
    return Adapter(where, deltas, saved, files, config.get("base_model_name_or_path"), config.get("revision"))


def _delta(config: Mapping[str, Any], module: str, given: Mapping[str, LazyTensor], where: str) -> Delta:
    embedding = any(p.startswith("lora_embedding") for p in given)
    first, second = ("lora_embedding_A", "lora_embedding_B") if embedding else ("lora_A", "lora_B")
    for part in (first, second):
        if part not in given:
            raise CheckpointError(f"{where}: {module}.{part} is missing")
    a, b, magnitude = given[first], given[second], given.get("lora_magnitude_vector")
    if bool(config.get("use_dora")) != (magnitude is not None) or (embedding and magnitude is not None):
        raise CheckpointError(
            f"{where}: {module}: use_dora is {config.get('use_dora', False)}, "
            f"lora_magnitude_vector is {'there' if magnitude is not None else 'missing'}"
        )
    rank = _pattern(config, "rank_pattern", module, config["r"], where)
    alpha = _pattern(config, "alpha_pattern", module, config["lora_alpha"], where)
    if len(a.shape) != 2 or len(b.shape) != 2 or a.shape[0] != rank or b.shape[1] != rank:
        raise CheckpointError(f"{where}: {module}: {first} {a.shape} and {second} {b.shape} do not fit r={rank}")
    if magnitude is not None and magnitude.shape not in ((b.shape[0],), (b.shape[0], 1)):
        raise CheckpointError(f"{where}: {module}.lora_magnitude_vector is {magnitude.shape}, B is {b.shape}")
    return Delta(a, b, float(alpha) / (rank**0.5 if config.get("use_rslora") else rank), magnitude, embedding)


def _pattern(config: Mapping[str, Any], key: str, module: str, default: Any, where: str) -> Any:
    """What rank_pattern or alpha_pattern gives a module: the first regular expression that its name ends with."""
    patterns = config.get(key) or {}
    for pattern, value in patterns.items() if isinstance(patterns, dict) else ():
        try:
            found = re.match(rf"(.*\.)?({pattern})$", module)
        except re.error as error:
            raise CheckpointError(f"{where}: {key} {pattern!r} is no regular expression: {error}") from None
        if found:
            if isinstance(value, bool) or not isinstance(value, (int, float)) or value <= 0:
                raise CheckpointError(f"{where}: {key} {pattern!r} is {value!r}, expected a number above 0")
            return value
    return default


def merge(base: Weights, adapter: Adapter) -> Weights:
    """`base` with every delta added and every saved tensor replaced; CheckpointError names a misfit."""
    merged: dict[str, LazyTensor] = {}
    for name, delta in adapter.deltas.items():
        if name not in base:
            raise CheckpointError(f"{adapter.where}: an adapter for {name}, which is missing in the base model")
        merged[name] = merged_weight(base[name], delta, f"{adapter.where}: {name}")
    for name, tensor in adapter.saved.items():
        if name not in base:
            raise CheckpointError(f"{adapter.where}: tensor {name} belongs to no tensor of the base model")
        if tensor.shape != base[name].shape:
            raise CheckpointError(f"{adapter.where}: {name} is {tensor.shape}, the base's is {base[name].shape}")
        merged[name] = tensor
    return base.with_(**merged)


def merged_weight(weight: LazyTensor, delta: Delta, where: str) -> LazyTensor:
    """The weight with a delta merged when it is loaded; CheckpointError where they do not fit."""
    if weight.shape != delta.shape:
        raise CheckpointError(f"{where} is {list(weight.shape)}, the adapter is for {list(delta.shape)}")
    return LazyTensor(weight.shape, lambda: delta.applied(weight.load()), weight.dtype, f"{weight.source} + LoRA")
