"""Which tensors of an OpenVLA checkpoint are which weights of the network: names, and lazy rearrangements."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import numpy as np

from vlac.blocks_timm import TowerSpec
from vlac.errors import CheckpointError, VlacError
from vlac.families.openvla import OpenVLASpec, shapes
from vlac.readers.safetensors_file import FLOATS
from vlac.weights import LazyTensor, Weights

LLAMA = "language_model.model."
SKIPPED = (
    "*featurizer.norm.*", "*featurizer.attn_pool.*", "*featurizer.head.*", "*.rotary_emb.inv_freq",
    "language_model.lm_head.weight",
)  # fmt: skip
"""Tensors that inference never reads (the head where OpenVLA-OFT has one of its own)."""

LAYER_SCALES = ("scale_factor", "gamma")
"""A layer scale's name in Hugging Face's form, and timm's."""


def canonical_weights(tensors: Weights, side: Mapping[str, Weights], spec: OpenVLASpec) -> Weights:
    """Canonical name -> tensor; every shape and dtype checked against the spec, nothing read.

    Raises CheckpointError for a tensor that is missing, has another shape, is no float, or that nobody knows.
    """
    used: set[str] = set()
    found = dict(_text(tensors, spec, used))
    for i, tower in enumerate(spec.towers):
        found.update(_tower(tensors, tower, i, used))
    for i in (1, 2, 3) if spec.fused else (1, 2):
        found.update(_linear(tensors, f"projector.fc{i}", f"connector.fc{i}", used))
    if spec.proprio_dim:
        for i in (1, 2):
            found.update(_linear(side["proprio_projector"], f"fc{i}", f"state_proj.fc{i}", set()))
    if spec.head_blocks >= 0:
        found.update(_head(side["action_head"], spec.head_blocks))
    for name, shape in shapes(spec).items():
        tensor = found[name]
        if tensor.shape != shape or tensor.dtype.upper() not in FLOATS:
            raise CheckpointError(
                f"{tensor.source}: {tensor.dtype.upper()} {list(tensor.shape)} where the network has {list(shape)}",
                remedy="config.json belongs to another checkpoint, or a size needs --spec",
            )
    depths = [t.num_hidden_layers for t in spec.towers]
    dead = (*SKIPPED, *(f"*.{'fused_' if i else ''}featurizer.blocks.{n}.*" for i, n in enumerate(depths)))
    extra = [n for n in tensors if n not in used and not any(fnmatchcase(n, p) for p in dead)]
    if extra:
        raise CheckpointError(f"{len(extra)} tensors that the network does not have: {', '.join(extra[:6])}")
    return Weights({name: found[name] for name in shapes(spec)})


Pairs = Iterator[tuple[str, LazyTensor]]


def _linear(tensors: Weights, theirs: str, ours: str, used: set[str]) -> Pairs:
    for part in ("weight", "bias"):
        used.add(f"{theirs}.{part}")
        yield f"{ours}.{part}", tensors[f"{theirs}.{part}"]


def _text(tensors: Weights, spec: OpenVLASpec, used: set[str]) -> Pairs:
    for name in shapes(spec):
        if not name.startswith("text."):
            continue
        head = name == "text.lm_head.weight"
        source = "language_model.lm_head.weight" if head else LLAMA + name.removeprefix("text.")
        used.add(source)
        tensor = tensors[source]
        if head and spec.bins.restricted:
            rows = list(spec.bins.rows)
            tensor = tensor.map(lambda w, rows=rows: w[rows], (len(rows), *tensor.shape[1:]))  # type: ignore[misc]
        yield name, tensor


def _tower(tensors: Weights, spec: TowerSpec, index: int, used: set[str]) -> Pairs:
    theirs, ours = f"vision_backbone.{'fused_' if index else ''}featurizer", f"vision.towers.{index}"

    def take(name: str) -> LazyTensor:
        used.add(f"{theirs}.{name}")
        return tensors[f"{theirs}.{name}"]

    d = spec.hidden_size
    patch = take("patch_embed.proj.weight")
    flat = (patch.shape[0], int(np.prod(patch.shape[1:])))
    yield f"{ours}.patch_embedding.weight", patch.map(lambda w: w.reshape(flat), flat)
    yield f"{ours}.patch_embedding.bias", take("patch_embed.proj.bias")
    yield f"{ours}.position_embedding", _rows(take("pos_embed"))
    if spec.prefix_tokens:
        names = [n for n in ("cls_token", "reg_token") if f"{theirs}.{n}" in tensors]
        yield f"{ours}.prefix", LazyTensor.concat([_rows(take(n)) for n in names])
    for i in range(spec.num_hidden_layers):
        block, layer = f"blocks.{i}", f"{ours}.layers.{i}"
        for part in ("weight", "bias"):
            for n in (1, 2):
                yield f"{layer}.layer_norm{n}.{part}", take(f"{block}.norm{n}.{part}")
            joined = take(f"{block}.attn.qkv.{part}")
            if joined.shape[0] != 3 * d:
                raise CheckpointError(f"{joined.source}: {list(joined.shape)}, expected {3 * d} rows: q, k, v")
            for j, name in enumerate("qkv"):
                yield f"{layer}.self_attn.{name}_proj.{part}", _third(joined, j, d)
            yield f"{layer}.mlp.fc1.{part}", take(f"{block}.mlp.fc1.{part}")
            yield f"{layer}.self_attn.out_proj.{part}", take(f"{block}.attn.proj.{part}")
            yield f"{layer}.mlp.fc2.{part}", take(f"{block}.mlp.fc2.{part}")
        for n in (1, 2) if spec.layer_scale else ():
            names = [f"{block}.ls{n}.{name}" for name in LAYER_SCALES]
            found = next((name for name in names if f"{theirs}.{name}" in tensors), names[0])
            yield f"{layer}.layer_scale{n}", take(found)


def _rows(t: LazyTensor) -> LazyTensor:
    """[1, n, d] as [n, d]."""
    shape = t.shape[-2:]
    return t.map(lambda w: w.reshape(shape), shape)


def _third(t: LazyTensor, j: int, rows: int) -> LazyTensor:
    return t.map(lambda w: w[j * rows : (j + 1) * rows], (rows, *t.shape[1:]))


def _head(tensors: Weights, blocks: int) -> Pairs:
    yield from _linear(tensors, "model.layer_norm1", "head.norm1", set())
    yield from _linear(tensors, "model.fc1", "head.fc1", set())
    for i in range(blocks):
        for part, name in ((0, "norm"), (1, "fc")):
            theirs = f"model.mlp_resnet_blocks.{i}.ffn.{part}"
            yield from _linear(tensors, theirs, f"head.blocks.{i}.{name}", set())
    yield from _linear(tensors, "model.layer_norm2", "head.norm2", set())
    yield from _linear(tensors, "model.fc2", "head.fc2", set())


def open_side_file(path: Path, inside: str = "") -> Weights:
    """A torch state dict, mapped and lazy; "module." of data-parallel training is dropped. `inside`: the entry of a
    trainer's checkpoint that holds it.

    Only tensors are unpickled (weights_only): a file with anything else is refused, and no code of it runs.
    """
    try:
        import torch
    except ImportError:
        raise VlacError(f"{path}: reading it needs torch", remedy="pip install torch") from None
    try:
        table = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:  # pickle's, zipfile's and torch's own: all mean that it holds no plain state dict
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise CheckpointError(f"{path}: not a torch state dict of tensors: {reason}") from None
    if inside and isinstance(table, dict):
        table = table.get(inside)
    if not isinstance(table, dict) or not all(isinstance(v, torch.Tensor) for v in table.values()):
        raise CheckpointError(f"{path}: not a torch state dict of tensors")
    kinds = {torch.float64: "f64", torch.float32: "f32", torch.float16: "f16", torch.bfloat16: "bf16"}

    def lazy(name: str, tensor: Any) -> LazyTensor:
        return LazyTensor(
            tuple(tensor.shape),
            lambda: np.ascontiguousarray(tensor.to(torch.float32).numpy()),
            kinds.get(tensor.dtype, str(tensor.dtype)),
            f"{path.name}: {name}",
        )

    return Weights({re.sub(r"^module\.", "", str(name)): lazy(str(name), t) for name, t in table.items()})
