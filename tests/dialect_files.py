"""Small SmolVLA checkpoints that QVAC's engine can take, and GGUF files taken apart and put together again."""

from __future__ import annotations

import random
import struct
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
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


def mutate(raw: bytes, header: int, rng: random.Random) -> bytes:
    """One of: a bit, a byte or an aligned word of the header; bits of data; a cut; two header pieces exchanged."""
    data = bytearray(raw)
    kind = rng.randrange(7)
    at = rng.randrange(header)
    if kind == 0:
        data[at] ^= 1 << rng.randrange(8)
    elif kind == 1:
        data[at] = rng.randrange(256)
    elif kind == 2:
        struct.pack_into("<I", data, at, rng.choice([0, 1, 4, 5, 8, 16, 0xFFFFFFFF, rng.getrandbits(32)]))
    elif kind == 3:
        struct.pack_into("<Q", data, at, rng.choice([0, 1, 1 << 31, 1 << 63, rng.getrandbits(64)]))
    elif kind == 4:
        del data[rng.randrange(len(data)) :]
    elif kind == 5:
        size, other = rng.randrange(1, 24), rng.randrange(header)
        data[at : at + size], data[other : other + size] = data[other : other + size], data[at : at + size]
    else:
        data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    return bytes(data)


def alter(keys: dict[str, Value], tensors: Tensors, rng: random.Random) -> None:
    """One or two changes that leave a header well formed: a number, a key, a type, a shape, a tensor, data."""
    numbers = [k for k, v in keys.items() if v.kind == "u32" and k != "general.alignment"]
    for _ in range(rng.choice([1, 1, 2])):
        name, key = rng.choice(list(tensors)), rng.choice(numbers)
        kind, shape, data = tensors[name]
        value = keys[key].value
        change = rng.randrange(9)
        if change == 0:
            near = [value + 1, value - 1, value * 2, value // 2] if isinstance(value, int) else []
            keys[key] = Value("u32", max(0, rng.choice([*near, 0, 1, 2, 3, 64, 1024, 4096])))
        elif change == 1:
            keys[key] = Value(rng.choice(["i32", "u64", "f32"]), keys[key].value)
        elif change == 2:
            keys.pop(key, None)
            numbers = [k for k in numbers if k in keys]
        elif change == 3:
            tensors[name] = (rng.choice(["f32", "f16", "bf16"]), shape, data)
        elif change == 4 and shape[-1] % 32 == 0:
            tensors[name] = (rng.choice(["q8_0", "q4_0", "iq4_nl"]), shape, data)
        elif change == 5:
            tensors[name] = (kind, rng.choice([shape[::-1], (1, *shape)[:4], (*shape[:-1], shape[-1] + 1)]), data)
        elif change == 6:
            del tensors[name]
        elif change == 7:
            tensors[f"extra.{rng.randrange(9)}"] = (kind, shape, data)
        else:
            noise = np.frombuffer(rng.randbytes(data.size), np.uint8)
            tensors[name] = (kind, shape, noise)


def mutants(source: Path, folder: Path, count: int, seed: int) -> Iterator[Path]:
    """`count` files made from `source` without vlac's checksums, every second one by bytes, the others well formed."""
    rng, plain = random.Random(seed), stripped(source, folder / "plain.gguf")
    raw, header = plain.read_bytes(), read_gguf(plain).data_start
    for i in range(count):
        path = folder / f"{i:05}.gguf"
        if i % 2:
            path.write_bytes(mutate(raw, header, rng))
        else:
            keys, tensors = take_apart(plain)
            alter(keys, tensors, rng)
            put_together(path, keys, tensors)
        yield path
