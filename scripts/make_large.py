"""Writes checkpoints with the tensors of published large policies and seeded random bf16 weights, shard by shard.

python scripts/make_large.py openvla|pi0 OUT [--layers N]

openvla: OpenVLA-7B's files (7.54e9 parameters, 15.1 GB in shards); pi0: LeRobot's pi0_base (one file, 7.0 GB with the
unused head of the expert). --layers keeps that many layers of every tower and decoder, for a trial. Small files
(tokenizer, statistics, processors) are taken from tests/golden with the sizes set. Memory: one tensor. The folder does
not belong in git.
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
import sys
import time
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent))
from smolvla_checkpoint import write_safetensors

ROOT = Path(__file__).resolve().parents[1]
Shapes = dict[str, tuple[int, ...]]
Array = np.ndarray[Any, Any]
SHARD_BYTES = 5_000_000_000
POOL = 1 << 22
"""Normal numbers that every tensor is filled from, each from another place: drawing billions would take longer than
compiling them."""


def drawn(name: str, shape: tuple[int, ...], pool: Array) -> Array:
    """N(0, 1/fan_in) for matrices, 1 + N(0, 0.1^2) for norms, N(0, 0.05^2) for biases."""
    values = np.resize(np.roll(pool, zlib.crc32(name.encode()) % POOL), shape)
    if name.endswith("bias"):
        return values * np.float32(0.05)
    if len(shape) == 1:
        return np.float32(1) + values * np.float32(0.1)
    values *= np.float32(1 / math.sqrt(math.prod(shape[1:])))
    return values


def write_shards(folder: Path, tensors: Mapping[str, tuple[int, ...]], single: bool) -> int:
    """model.safetensors, or shards with their index; returns the number of parameters."""
    pool = np.random.default_rng(0).standard_normal(POOL, dtype=np.float32)
    shards: list[Shapes] = [{}]
    for name, shape in tensors.items():
        if not single and 2 * sum(map(math.prod, shards[-1].values())) + 2 * math.prod(shape) > SHARD_BYTES:
            shards.append({})
        shards[-1][name] = shape
    names = [f"model-{i:05}-of-{len(shards):05}.safetensors" for i in range(1, len(shards) + 1)]
    names = ["model.safetensors"] if single else names
    started = time.perf_counter()
    for file, shard in zip(names, shards, strict=True):
        write_safetensors(folder / file, shard, lambda n, s: drawn(n, s, pool), lambda n: "BF16")
        print(f"{file}: {len(shard)} tensors, {time.perf_counter() - started:.0f} s", file=sys.stderr)
    total = sum(map(math.prod, tensors.values()))
    if not single:
        where = {name: file for file, shard in zip(names, shards, strict=True) for name in shard}
        index = {"metadata": {"total_size": 2 * total}, "weight_map": where}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")
    return total


# --- OpenVLA-7B ------------------------------------------------------------------------------------------------


def timm_tower(prefix: str, width: int, hidden: int, depth: int, grid: int, registers: int) -> Iterator[Any]:
    yield f"{prefix}.patch_embed.proj.weight", (width, 3, 14, 14)
    yield f"{prefix}.patch_embed.proj.bias", (width,)
    yield f"{prefix}.pos_embed", (1, grid * grid, width)
    if registers:
        yield f"{prefix}.cls_token", (1, 1, width)
        yield f"{prefix}.reg_token", (1, registers, width)
    for i in range(depth):
        block = f"{prefix}.blocks.{i}"
        for name, rows, columns in (
            ("attn.qkv", 3 * width, width),
            ("attn.proj", width, width),
            ("mlp.fc1", hidden, width),
            ("mlp.fc2", width, hidden),
        ):
            yield f"{block}.{name}.weight", (rows, columns)
            yield f"{block}.{name}.bias", (rows,)
        for norm in ("norm1", "norm2"):
            yield f"{block}.{norm}.weight", (width,)
            yield f"{block}.{norm}.bias", (width,)
        if registers:
            yield f"{block}.ls1.scale_factor", (width,)
            yield f"{block}.ls2.scale_factor", (width,)
    yield f"{prefix}.norm.weight", (width,)
    yield f"{prefix}.norm.bias", (width,)


def attention_pool(prefix: str, width: int, hidden: int) -> Iterator[Any]:
    """What SigLIP's files hold besides and OpenVLA never reads."""
    yield f"{prefix}.latent", (1, 1, width)
    for name, rows, columns in (
        ("q", width, width),
        ("kv", 2 * width, width),
        ("proj", width, width),
        ("mlp.fc1", hidden, width),
        ("mlp.fc2", width, hidden),
    ):
        yield f"{prefix}.{name}.weight", (rows, columns)
        yield f"{prefix}.{name}.bias", (rows,)
    yield f"{prefix}.norm.weight", (width,)
    yield f"{prefix}.norm.bias", (width,)


def decoder(prefix: str, width: int, ffn: int, queries: int, keys: int, layers: int) -> Iterator[Any]:
    for i in range(layers):
        layer = f"{prefix}.{i}"
        for name, rows, columns in (
            ("self_attn.q_proj", queries, width),
            ("self_attn.k_proj", keys, width),
            ("self_attn.v_proj", keys, width),
            ("self_attn.o_proj", width, queries),
            ("mlp.gate_proj", ffn, width),
            ("mlp.up_proj", ffn, width),
            ("mlp.down_proj", width, ffn),
        ):
            yield f"{layer}.{name}.weight", (rows, columns)
        yield f"{layer}.input_layernorm.weight", (width,)
        yield f"{layer}.post_attention_layernorm.weight", (width,)


def openvla_tensors(layers: int) -> Iterator[Any]:
    at = "vision_backbone"
    yield from timm_tower(f"{at}.featurizer", 1024, 4096, min(24, layers), 16, 4)
    yield from timm_tower(f"{at}.fused_featurizer", 1152, 4304, min(27, layers), 16, 0)
    yield from attention_pool(f"{at}.fused_featurizer.attn_pool", 1152, 4304)
    for name, rows, columns in (("fc1", 8704, 2176), ("fc2", 4096, 8704), ("fc3", 4096, 4096)):
        yield f"projector.{name}.weight", (rows, columns)
        yield f"projector.{name}.bias", (rows,)
    yield "language_model.model.embed_tokens.weight", (32064, 4096)
    yield from decoder("language_model.model.layers", 4096, 11008, 4096, 4096, min(32, layers))
    yield "language_model.model.norm.weight", (4096,)
    yield "language_model.lm_head.weight", (32064, 4096)


def write_openvla(folder: Path, layers: int) -> int:
    template = ROOT / "tests" / "golden" / "openvla_tiny" / "checkpoint"
    folder.mkdir(parents=True, exist_ok=True)
    for name in ("tokenizer.json", "generation_config.json"):
        shutil.copyfile(template / name, folder / name)
    config = json.loads((template / "config.json").read_text(encoding="utf-8"))
    for key in ("timm_model_kwargs", "pad_token_id"):
        del config[key]
    config["image_sizes"] = [224, 224]
    config["text_config"] = {"model_type": "llama", "vocab_size": 32064, "torch_dtype": "bfloat16"}
    if layers < 32:
        config["text_config"]["num_hidden_layers"] = layers
    (folder / "config.json").write_text(json.dumps(config, indent=1), encoding="utf-8")
    pictures = json.loads((template / "preprocessor_config.json").read_text(encoding="utf-8"))
    pictures["input_sizes"] = [[3, 224, 224]] * 2
    for crop, resize in zip(pictures["tvf_crop_params"], pictures["tvf_resize_params"], strict=True):
        crop["output_size"] = resize["size"] = [224, 224]
    (folder / "preprocessor_config.json").write_text(json.dumps(pictures, indent=1), encoding="utf-8")
    return write_shards(folder, dict(openvla_tensors(layers)), single=False)


# --- pi0 -------------------------------------------------------------------------------------------------------


def pi0_tensors(layers: int) -> Iterator[Any]:
    model = "paligemma_with_expert.paligemma.model"
    vision, width = f"{model}.vision_tower.vision_model", 1152
    yield f"{vision}.embeddings.patch_embedding.weight", (width, 3, 14, 14)
    yield f"{vision}.embeddings.patch_embedding.bias", (width,)
    yield f"{vision}.embeddings.position_embedding.weight", (256, width)
    for i in range(min(27, layers)):
        layer = f"{vision}.encoder.layers.{i}"
        for name in ("q_proj", "k_proj", "v_proj", "out_proj"):
            yield f"{layer}.self_attn.{name}.weight", (width, width)
            yield f"{layer}.self_attn.{name}.bias", (width,)
        for name, rows, columns in (("fc1", 4304, width), ("fc2", width, 4304)):
            yield f"{layer}.mlp.{name}.weight", (rows, columns)
            yield f"{layer}.mlp.{name}.bias", (rows,)
        for name in ("layer_norm1", "layer_norm2"):
            yield f"{layer}.{name}.weight", (width,)
            yield f"{layer}.{name}.bias", (width,)
    yield f"{vision}.post_layernorm.weight", (width,)
    yield f"{vision}.post_layernorm.bias", (width,)
    yield f"{model}.multi_modal_projector.linear.weight", (2048, width)
    yield f"{model}.multi_modal_projector.linear.bias", (2048,)
    yield from decoder(f"{model}.language_model.layers", 2048, 16384, 2048, 256, min(18, layers))
    yield f"{model}.language_model.norm.weight", (2048,)
    yield "paligemma_with_expert.paligemma.lm_head.weight", (257152, 2048)  # the embedding: released files tie them
    expert = "paligemma_with_expert.gemma_expert"
    yield from decoder(f"{expert}.model.layers", 1024, 4096, 2048, 256, min(18, layers))
    yield f"{expert}.model.norm.weight", (1024,)
    yield f"{expert}.lm_head.weight", (257152, 1024)
    for name, rows, columns in (
        ("state_proj", 1024, 32),
        ("action_in_proj", 1024, 32),
        ("action_out_proj", 32, 1024),
        ("action_time_mlp_in", 1024, 2048),
        ("action_time_mlp_out", 1024, 1024),
    ):
        yield f"{name}.weight", (rows, columns)
        yield f"{name}.bias", (rows,)


def write_pi0(folder: Path, layers: int) -> int:
    template = ROOT / "tests" / "golden" / "pi0_tiny" / "checkpoint"
    folder.mkdir(parents=True, exist_ok=True)
    for path in template.rglob("*"):
        if path.is_file() and path.name != "model.safetensors":
            target = folder / path.relative_to(template)
            target.parent.mkdir(exist_ok=True)
            target.write_bytes(path.read_bytes())
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    config.update(
        chunk_size=50, n_action_steps=50, max_state_dim=32, max_action_dim=32, image_resolution=[224, 224],
        tokenizer_max_length=48, dtype="bfloat16",
    )  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config, indent=1), encoding="utf-8")
    steps = json.loads((folder / "policy_preprocessor.json").read_text(encoding="utf-8"))
    next(s for s in steps["steps"] if s["registry_name"] == "tokenizer_processor")["config"]["max_length"] = 48
    (folder / "policy_preprocessor.json").write_text(json.dumps(steps, indent=1), encoding="utf-8")
    return write_shards(folder, dict(pi0_tensors(layers)), single=True)


WRITERS = {"openvla": write_openvla, "pi0": write_pi0}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("family", choices=WRITERS)
    parser.add_argument("out", type=Path)
    parser.add_argument("--layers", type=int, default=99)
    args = parser.parse_args()
    total = WRITERS[args.family](args.out, args.layers)
    size = sum(f.stat().st_size for f in args.out.rglob("*") if f.is_file())
    print(f"{args.out}: {total / 1e6:.1f}M parameters, {size / 1e9:.2f} GB")


if __name__ == "__main__":
    main()
