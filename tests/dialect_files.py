"""Small SmolVLA checkpoints that QVAC's engine can take, and GGUF files taken apart and put together again."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from vlac.gguf import GgufWriter, Value, read_gguf

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "scripts"))

import smolvla_checkpoint as maker  # noqa: E402

Array = np.ndarray[Any, Any]
Tensors = dict[str, tuple[str, tuple[int, ...], Array]]
"""Name -> (type, shape, packed bytes)."""

SMALL = maker.Shape(
    text={
        "hidden_size": 64,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 64,
    },
    vision={
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "image_size": 32,
        "patch_size": 8,
    },
    cameras={"top": (24, 32), "wrist": (32, 32)},
    scale_factor=2,
    vocab=300,
    tokenizer_entries=280,
    state_dim=5,
    action_dim=4,
    policy={"chunk_size": 6, "n_action_steps": 4, "num_steps": 2},
)
"""256 kB of weights: head_dim 64, an expert of width 48 whose rows hold no blocks of 32."""

ENGINE = replace(
    SMALL,
    text={**SMALL.text, "hidden_size": 128, "intermediate_size": 192, "num_hidden_layers": 4},
    vision={**SMALL.vision, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "image_size": 64},
    policy={"chunk_size": 7, "n_action_steps": 4, "num_steps": 3, "max_state_dim": 9, "max_action_dim": 11},
)
"""What runs in QVAC's engine: nothing at its default, an odd chunk, two self and two cross layers."""


def write(folder: Path, shape: Any = SMALL, seed: int = 1, **policy: Any) -> Path:
    """A checkpoint; `policy` are keys of LeRobot's config."""
    maker.write_checkpoint(folder, replace(shape, policy={**shape.policy, **policy}), seed)
    return folder


def take_apart(path: Path) -> tuple[dict[str, Value], Tensors]:
    """Keys and tensors of a file."""
    file = read_gguf(path)
    return dict(file.metadata), {n: (t.type, t.shape, np.array(file.data(n))) for n, t in file.tensors.items()}


def put_together(path: Path, keys: Mapping[str, Value], tensors: Tensors) -> Path:
    """A GGUF file of these; bytes are cut or filled with zeros to what type and shape need."""
    from vlac.gguf import GGML_TYPES

    sizes = {name: (block, size) for name, block, size in GGML_TYPES.values()}
    with path.open("w+b") as out:
        writer = GgufWriter(out, keys, [(n, kind, shape) for n, (kind, shape, _) in tensors.items()])
        for name, (kind, shape, data) in tensors.items():
            block, size = sizes[kind]
            need = int(np.prod(shape)) // block * size
            writer.write(name, np.resize(data, need) if data.size >= need else np.pad(data, (0, need - data.size)))
    return path


def stripped(path: Path, to: Path) -> Path:
    """A file as the engines' own converters write it: nothing of vlac's in it."""
    keys, tensors = take_apart(path)
    foreign = {k: v for k, v in keys.items() if not k.startswith(("vlac.", "tokenizer."))}
    return put_together(to, foreign, {k: v for k, v in tensors.items() if not k.startswith("vlac.")})


def edited(path: Path, to: Path, edit: Callable[[dict[str, Value], Tensors], Any]) -> Path:
    """A stripped copy of a file with `edit` applied to its keys and tensors."""
    keys, tensors = take_apart(stripped(path, to))
    edit(keys, tensors)
    return put_together(to, keys, tensors)


def shape_of(tensors: Tensors, name: str) -> Sequence[int]:
    return tensors[name][1]
