"""Which tensors of a GR00T N1.7 checkpoint are which weights: names, one embodiment's slices, and tables."""

from __future__ import annotations

import re
from collections.abc import Iterator
from fnmatch import fnmatchcase

import numpy as np

from vlac.blocks_groot import QwenVisionSpec, frequencies
from vlac.errors import CheckpointError
from vlac.families.groot import GrootSpec, shapes
from vlac.readers.safetensors_file import FLOATS
from vlac.weights import Array, LazyTensor, Weights

Pairs = Iterator[tuple[str, LazyTensor]]

DEAD = ("language_model.norm.weight", "*lm_head.weight", "*.inv_freq", "action_head.mask_token")
"""Tensors that inference never reads."""


EMBEDDING = "language_model.embed_tokens.weight"


def plain_names(tensors: Weights) -> Weights:
    """Tensors under "visual.", "language_model." and "action_head.", whatever wraps them."""
    result: dict[str, LazyTensor] = {}
    for name, tensor in tensors.items():
        plain = re.sub(
            r"^(_groot_model\.)?(backbone\.(model\.)*)?(?=visual\.|language_model\.|action_head\.)", "", name
        )
        if plain in result:
            raise CheckpointError(f"{tensor.source} and {result[plain].source} are both {plain}")
        result[plain] = tensor
    tied = next((n for n in result if n.endswith("lm_head.weight")), "")
    if tied and EMBEDDING not in result:  # LeRobot's files hold the shared tensor under the head's name
        result[EMBEDDING] = result[tied]
    return Weights(result)


class _Source:
    """The checkpoint's tensors, noting which were asked for."""

    def __init__(self, tensors: Weights) -> None:
        self.tensors = tensors
        self.used: set[str] = set()

    def __getitem__(self, name: str) -> LazyTensor:
        self.used.add(name)
        return self.tensors[name]

    def linear(self, theirs: str, ours: str) -> Pairs:
        for part in ("weight", "bias"):
            yield f"{ours}.{part}", self[f"{theirs}.{part}"]


def canonical_weights(tensors: Weights, spec: GrootSpec, sections: tuple[int, int, int], category: int) -> Weights:
    """Canonical name -> tensor; shapes and dtypes checked, nothing read. CheckpointError names what does not fit.

    sections: of M-RoPE. category: whose projectors.
    """
    source = _Source(tensors)
    found = dict(_vision(source, spec.vision))
    found |= dict(_text(source, spec, sections))
    found |= dict(_mixer(source, spec))
    found |= dict(_projectors(source, spec, category))
    found |= dict(_dit(source, spec))
    for name, shape in shapes(spec).items():
        tensor = found[name]
        if tensor.shape != shape or tensor.dtype.upper() not in FLOATS:
            raise CheckpointError(
                f"{tensor.source}: {tensor.dtype.upper()} {list(tensor.shape)} where the network has {list(shape)}",
                remedy="config.json belongs to another checkpoint, or a size needs --spec",
            )
    kept = spec.text.num_hidden_layers
    dead = (n for n in tensors if (m := re.match(r"language_model\.layers\.(\d+)\.", n)) and int(m[1]) >= kept)
    known = source.used | set(dead)
    extra = [n for n in tensors if n not in known and not any(fnmatchcase(n, p) for p in DEAD)]
    if extra:
        raise CheckpointError(f"{len(extra)} tensors that the network does not have: {', '.join(extra[:6])}")
    return Weights({name: found[name] for name in shapes(spec)})


# --- vision ----------------------------------------------------------------------------------------------------


def _vision(source: _Source, spec: QwenVisionSpec) -> Pairs:
    d = spec.hidden_size
    patch = source["visual.patch_embed.proj.weight"]
    flat = (d, spec.num_channels * spec.patch_size**2)
    # one picture fills every frame of a patch, so the frames' weights act as their sum
    yield "vision.patch_embedding.weight", patch.map(lambda w: w.sum(axis=2, dtype=np.float64).reshape(flat), flat)
    yield "vision.patch_embedding.bias", source["visual.patch_embed.proj.bias"]
    table = source["visual.pos_embed.weight"]
    yield "vision.position_embedding", table.map(lambda w: _positions(w, spec), (spec.grid**2, d))
    row, column = merge_order(spec)
    frequency = frequencies(d // spec.num_attention_heads // 2, 10000.0)
    angles = np.concatenate([np.outer(row, frequency), np.outer(column, frequency)], axis=1).astype(np.float32)
    yield from _rotation("vision.rotation", angles)
    for i in range(spec.num_hidden_layers):
        block, layer = f"visual.blocks.{i}", f"vision.layers.{i}"
        for n in (1, 2):
            yield from source.linear(f"{block}.norm{n}", f"{layer}.layer_norm{n}")
            yield from source.linear(f"{block}.mlp.linear_fc{n}", f"{layer}.mlp.fc{n}")
        for part in ("weight", "bias"):
            joined = source[f"{block}.attn.qkv.{part}"]
            for j, name in enumerate("qkv"):
                yield f"{layer}.self_attn.{name}_proj.{part}", _third(joined, j, d)
        yield from source.linear(f"{block}.attn.proj", f"{layer}.self_attn.out_proj")
    mergers = {"visual.merger": "connector"}
    mergers |= {f"visual.deepstack_merger_list.{j}": f"connector.deepstack.{j}" for j in range(len(spec.deepstack))}
    for theirs, ours in mergers.items():
        yield from source.linear(f"{theirs}.norm", f"{ours}.norm")
        for n in (1, 2):
            yield from source.linear(f"{theirs}.linear_fc{n}", f"{ours}.fc{n}")


def _third(tensor: LazyTensor, j: int, rows: int) -> LazyTensor:
    return tensor.map(lambda w: w[j * rows : (j + 1) * rows], (rows, *tensor.shape[1:]))


def merge_order(spec: QwenVisionSpec) -> tuple[Array, Array]:
    """Row and column of every patch, block of merge x merge patches by block."""
    g, m = spec.grid // spec.merge, spec.merge
    grid = np.arange(spec.grid**2).reshape(g, m, g, m).transpose(0, 2, 1, 3).reshape(-1)
    return (grid // spec.grid).astype(np.float32), (grid % spec.grid).astype(np.float32)


def _positions(table: Array, spec: QwenVisionSpec) -> Array:
    """The learned square of positions, interpolated to this grid, in merge order."""
    side = round(table.shape[0] ** 0.5)
    if side * side != table.shape[0]:
        raise CheckpointError(f"visual.pos_embed has {table.shape[0]} rows, which is no square")
    at = np.linspace(0, side - 1, spec.grid, dtype=np.float32)
    low = at.astype(np.int64)
    high, part = np.minimum(low + 1, side - 1), (at - low).astype(np.float32)
    square = table.reshape(side, side, -1)
    rows = square[low] * (1 - part)[:, None, None] + square[high] * part[:, None, None]
    both = rows[:, low] * (1 - part)[None, :, None] + rows[:, high] * part[None, :, None]
    row, column = (t.astype(np.int64) for t in merge_order(spec))
    return np.asarray(both[row, column], dtype=np.float32)


def _rotation(name: str, angles: Array) -> Pairs:
    yield f"{name}.cos", LazyTensor.of(np.cos(angles), "rotations")
    yield f"{name}.sin", LazyTensor.of(np.sin(angles), "rotations")


# --- language --------------------------------------------------------------------------------------------------


def prompt_positions(spec: GrootSpec) -> Array:
    """(time, height, width) of every row of the longest prompt, f32 [max_tokens, 3]: words advance all three by one; a
    picture's rows stand at one time, at their row and column, and advance by the longer side."""
    side, found = spec.vision.grid // spec.vision.merge, [(i, i, i) for i in range(spec.prompt_start)]
    at = spec.prompt_start
    for _ in range(spec.cameras):
        found.append((at, at, at))
        found += [(at + 1, at + 1 + i, at + 1 + j) for i in range(side) for j in range(side)]
        at += 1 + side
        found.append((at, at, at))
        at += 1
    found += [(at + i, at + i, at + i) for i in range(spec.text_tokens)]
    return np.array(found, dtype=np.float32)


def prompt_angles(spec: GrootSpec, sections: tuple[int, int, int]) -> Array:
    """Interleaved M-RoPE: rotation j turns by height if j % 3 = 1, by width if j % 3 = 2, within their sections, else
    by time. [max_tokens, head_dim / 2]"""
    axis = np.zeros(spec.text.head_dim // 2, dtype=np.int64)
    for a in (1, 2):
        axis[a : 3 * sections[a] : 3] = a
    angles: Array = prompt_positions(spec)[:, axis] * frequencies(spec.text.head_dim, spec.text.rope_theta)
    return angles


def _text(source: _Source, spec: GrootSpec, sections: tuple[int, int, int]) -> Pairs:
    yield "text.embed_tokens.weight", source["language_model.embed_tokens.weight"]
    yield from _rotation("text.rotation", prompt_angles(spec, sections))
    for name in shapes(spec):
        if name.startswith("text.layers."):
            yield name, source["language_model." + name.removeprefix("text.")]


# --- head ------------------------------------------------------------------------------------------------------


def _attention(source: _Source, theirs: str, ours: str) -> Pairs:
    for part in "qkv":
        yield from source.linear(f"{theirs}.to_{part}", f"{ours}.{part}_proj")
    yield from source.linear(f"{theirs}.to_out.0", f"{ours}.out_proj")


def _mixer(source: _Source, spec: GrootSpec) -> Pairs:
    yield from source.linear("action_head.vlln", "mixer.norm")
    for i in range(spec.mixer.num_hidden_layers):
        block, layer = f"action_head.vl_self_attention.transformer_blocks.{i}", f"mixer.layers.{i}"
        yield from source.linear(f"{block}.norm1", f"{layer}.layer_norm1")
        yield from source.linear(f"{block}.norm3", f"{layer}.layer_norm2")
        yield from _attention(source, f"{block}.attn1", f"{layer}.self_attn")
        yield from source.linear(f"{block}.ff.net.0.proj", f"{layer}.mlp.fc1")
        yield from source.linear(f"{block}.ff.net.2", f"{layer}.mlp.fc2")


def _dit(source: _Source, spec: GrootSpec) -> Pairs:
    model = "action_head.model"
    for n in (1, 2):
        yield from source.linear(f"{model}.timestep_encoder.timestep_embedder.linear_{n}", f"dit.time.fc{n}")
    yield from source.linear(f"{model}.proj_out_1", "dit.out_modulation")
    yield from source.linear(f"{model}.proj_out_2", "dit.out_proj")
    for i in range(spec.dit.num_hidden_layers):
        block, layer = f"{model}.transformer_blocks.{i}", f"dit.layers.{i}"
        yield from source.linear(f"{block}.norm1.linear", f"{layer}.modulation")
        yield from _attention(source, f"{block}.attn1", f"{layer}.self_attn")
        yield from source.linear(f"{block}.ff.net.0.proj", f"{layer}.mlp.fc1")
        yield from source.linear(f"{block}.ff.net.2", f"{layer}.mlp.fc2")


def _projectors(source: _Source, spec: GrootSpec, category: int) -> Pairs:
    """One embodiment's slices of the category-specific linears, whose weights are (category, in, out)."""
    names = {f"{who}.layer{n}": f"{who}.fc{n}" for who in ("state_encoder", "action_decoder") for n in (1, 2)}
    names |= {f"action_encoder.W{n}": f"action_encoder.fc{n}" for n in (1, 2, 3)}
    for theirs, ours in names.items():
        w, bias = source[f"action_head.{theirs}.W"], source[f"action_head.{theirs}.b"]
        if len(w.shape) != 3 or len(bias.shape) != 2 or not category < min(w.shape[0], bias.shape[0]):
            raise CheckpointError(f"{w.source}: shapes {list(w.shape)}, {list(bias.shape)} for embodiment {category}")
        yield f"{ours}.weight", w.map(lambda v: v[category].T, (w.shape[2], w.shape[1]))
        yield f"{ours}.bias", bias.map(lambda v: v[category], bias.shape[1:])
    table = source["action_head.position_embedding.weight"]
    if table.shape[0] < spec.chunk_size:
        raise CheckpointError(f"{table.source}: {spec.chunk_size} rows of actions, positions for {table.shape[0]}")
    yield (
        "action_encoder.position_embedding",
        table.map(lambda v: v[: spec.chunk_size], (spec.chunk_size, *table.shape[1:])),
    )
