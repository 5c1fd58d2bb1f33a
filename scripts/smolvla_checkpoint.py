"""Writes SmolVLA checkpoints in LeRobot's layout with numpy alone: any dimensions, seeded weights, streamed to disk.

Used by make_full_size.py and make_real_backbone.py, and by the LeRobot reference for the folder that stands in for the
VLM's hub repository. Weights are drawn so that the policy reacts to its image, its instruction and its state: plain
N(0, 0.02) weights would give chunks that hardly depend on what the camera sees.
"""

from __future__ import annotations

import json
import math
import struct
import zlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

Array = np.ndarray[Any, Any]
Draw = Callable[[str, tuple[int, ...]], Array]

TASKS = (
    "pick up the red cube and place it in the box",
    "put the lego brick into the transparent box",
    "push the green block to the left of the yellow bowl",
    "open the top drawer slowly, then close the gripper",
    "stack the blue cup on the plate",
)
SPECIAL = (
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<fake_token_around_image>",
    "<global-img>",
    "<image>",
    "<end_of_utterance>",
)


@dataclass(frozen=True)
class Shape:
    """Dimensions of the VLM (its config.json) and of the policy around it (the keys of LeRobot's config.json)."""

    text: Mapping[str, int]
    vision: Mapping[str, int]
    cameras: Mapping[str, tuple[int, int]]
    scale_factor: int = 4
    vocab: int = 272
    tokenizer_entries: int = 600
    state_dim: int = 6
    action_dim: int = 6
    policy: Mapping[str, Any] = field(default_factory=dict)
    normalisation: Mapping[str, str] = field(
        default_factory=lambda: {"VISUAL": "IDENTITY", "STATE": "MEAN_STD", "ACTION": "MEAN_STD"}
    )

    @staticmethod
    def from_json(d: Mapping[str, Any]) -> Shape:
        cameras = {k: (int(v[0]), int(v[1])) for k, v in d["cameras"].items()}
        return Shape(**{**d, "cameras": cameras})


FULL_SIZE = Shape(
    text={
        "hidden_size": 960,
        "intermediate_size": 2560,
        "num_hidden_layers": 16,
        "num_attention_heads": 15,
        "num_key_value_heads": 5,
        "head_dim": 64,
    },
    vision={
        "hidden_size": 768,
        "intermediate_size": 3072,
        "num_hidden_layers": 12,
        "num_attention_heads": 12,
        "image_size": 512,
        "patch_size": 16,
    },
    cameras={"top": (480, 640), "wrist": (480, 640)},
    vocab=49280,
    policy={"pad_language_to": "max_length", "num_vlm_layers": 16},
)
"""SmolVLM2-500M with its first 16 text layers and LeRobot's expert: 450.0M parameters in 500 tensors."""


def policy_config(shape: Shape) -> dict[str, Any]:
    """config.json as LeRobot writes it."""
    size = shape.vision["image_size"]
    features: dict[str, Any] = {
        f"observation.images.{name}": {"type": "VISUAL", "shape": [3, h, w]} for name, (h, w) in shape.cameras.items()
    }
    features["observation.state"] = {"type": "STATE", "shape": [shape.state_dim]}
    config = {
        "type": "smolvla",
        "n_obs_steps": 1,
        "input_features": features,
        "output_features": {"action": {"type": "ACTION", "shape": [shape.action_dim]}},
        "device": "cpu",
        "use_amp": False,
        "use_peft": False,
        "push_to_hub": False,
        "repo_id": None,
        "chunk_size": 50,
        "n_action_steps": 50,
        "normalization_mapping": dict(shape.normalisation),
        "max_state_dim": 32,
        "max_action_dim": 32,
        "resize_imgs_with_padding": [size, size],
        "empty_cameras": 0,
        "adapt_to_pi_aloha": False,
        "use_delta_joint_actions_aloha": False,
        "tokenizer_max_length": 48,
        "num_steps": 10,
        "use_cache": True,
        "freeze_vision_encoder": True,
        "train_expert_only": True,
        "train_state_proj": True,
        "vlm_model_name": "vlm",
        "load_vlm_weights": False,
        "add_image_special_tokens": False,
        "attention_mode": "cross_attn",
        "prefix_length": -1,
        "pad_language_to": "longest",
        "num_expert_layers": -1,
        "num_vlm_layers": shape.text["num_hidden_layers"],
        "self_attn_every_n_layers": 2,
        "expert_width_multiplier": 0.75,
        "min_period": 4e-3,
        "max_period": 4.0,
        "rtc_config": None,
        "compile_model": False,
        "compile_mode": "max-autotune",
    }
    unknown = set(shape.policy) - set(config)
    assert not unknown, f"not keys of SmolVLA's config: {unknown}"
    return {**config, **shape.policy}


def vlm_config(shape: Shape) -> dict[str, Any]:
    """config.json of the VLM that vlm_model_name points to."""
    return {
        "architectures": ["SmolVLMForConditionalGeneration"],
        "model_type": "smolvlm",
        "image_token_id": SPECIAL.index("<image>"),
        "pad_token_id": SPECIAL.index("<|im_end|>"),
        "scale_factor": shape.scale_factor,
        "tie_word_embeddings": False,
        "vocab_size": shape.vocab,
        "text_config": {
            "model_type": "llama",
            "vocab_size": shape.vocab,
            "pad_token_id": 2,
            "bos_token_id": 1,
            "eos_token_id": 2,
            "hidden_act": "silu",
            "attention_bias": False,
            "mlp_bias": False,
            "tie_word_embeddings": False,
            "max_position_embeddings": 8192,
            "rms_norm_eps": 1e-5,
            "rope_theta": 100000.0,
            **shape.text,
        },
        "vision_config": {
            "model_type": "smolvlm_vision",
            "hidden_act": "gelu_pytorch_tanh",
            "layer_norm_eps": 1e-6,
            "num_channels": 3,
            **shape.vision,
        },
    }


def write_vlm(folder: Path, shape: Shape, tokenizer: str | None = None) -> None:
    """The local stand-in for the VLM's hub repository; `tokenizer` is the text of a tokenizer.json to use instead."""
    folder.mkdir(parents=True, exist_ok=True)
    size = shape.vision["image_size"]
    _json(folder / "config.json", vlm_config(shape))
    text = tokenizer or train_tokenizer(min(shape.tokenizer_entries, shape.vocab))
    (folder / "tokenizer.json").write_text(text, encoding="utf-8")
    _json(
        folder / "tokenizer_config.json",
        {
            "bos_token": "<|im_start|>",
            "eos_token": "<end_of_utterance>",
            "pad_token": "<|im_end|>",
            "unk_token": "<|endoftext|>",
            "end_of_utterance_token": "<end_of_utterance>",
            "fake_image_token": "<fake_token_around_image>",
            "global_image_token": "<global-img>",
            "image_token": "<image>",
            "tokenizer_class": "PreTrainedTokenizerFast",
        },
    )
    _json(
        folder / "preprocessor_config.json",
        {
            "image_processor_type": "SmolVLMImageProcessor",
            "do_image_splitting": False,
            "image_mean": [0.5, 0.5, 0.5],
            "image_std": [0.5, 0.5, 0.5],
            "max_image_size": {"longest_edge": size},
            "size": {"longest_edge": size},
        },
    )
    per_image = (size // shape.vision["patch_size"] // shape.scale_factor) ** 2
    _json(folder / "processor_config.json", {"processor_class": "SmolVLMProcessor", "image_seq_len": per_image})


def train_tokenizer(entries: int) -> str:
    """A byte-level BPE over the example instructions, without BOS and EOS: text of a tokenizer.json."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=entries,
        special_tokens=[AddedToken(t, special=True, normalized=False) for t in SPECIAL],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(TASKS, trainer)
    return str(tokenizer.to_str(pretty=False))


def expert_sizes(shape: Shape) -> tuple[int, int]:
    """(width, ffn) of the action expert."""
    width = int(shape.text["hidden_size"] * policy_config(shape)["expert_width_multiplier"])
    ffn = int(4 * int(2 * width / 3))
    return width, 256 * ((ffn + 255) // 256)


def tensors(shape: Shape) -> dict[str, tuple[int, ...]]:
    """Name -> shape of every tensor in model.safetensors."""
    return dict(sorted([*_vision(shape), *_text(shape), *_expert(shape), *_heads(shape)]))


def _vision(shape: Shape) -> Iterator[tuple[str, tuple[int, ...]]]:
    v, pre = shape.vision, "model.vlm_with_expert.vlm.model.vision_model."
    d, ffn, patch = v["hidden_size"], v["intermediate_size"], v["patch_size"]
    yield pre + "embeddings.patch_embedding.weight", (d, 3, patch, patch)
    yield pre + "embeddings.patch_embedding.bias", (d,)
    yield pre + "embeddings.position_embedding.weight", ((v["image_size"] // patch) ** 2, d)
    linears = {f"self_attn.{n}_proj": (d, d) for n in ("q", "k", "v", "out")}
    linears |= {"mlp.fc1": (ffn, d), "mlp.fc2": (d, ffn)}
    for i in range(v["num_hidden_layers"]):
        for name, (rows, columns) in linears.items():
            yield f"{pre}encoder.layers.{i}.{name}.weight", (rows, columns)
            yield f"{pre}encoder.layers.{i}.{name}.bias", (rows,)
        for norm in ("layer_norm1", "layer_norm2"):
            yield f"{pre}encoder.layers.{i}.{norm}.weight", (d,)
            yield f"{pre}encoder.layers.{i}.{norm}.bias", (d,)
    yield pre + "post_layernorm.weight", (d,)
    yield pre + "post_layernorm.bias", (d,)


def _llama_layer(
    pre: str, width: int, ffn: int, heads: int, kv: int, kv_in: int
) -> Iterator[tuple[str, tuple[int, ...]]]:
    yield pre + "input_layernorm.weight", (width,)
    yield pre + "post_attention_layernorm.weight", (width,)
    yield pre + "self_attn.q_proj.weight", (heads, width)
    yield pre + "self_attn.k_proj.weight", (kv, kv_in)
    yield pre + "self_attn.v_proj.weight", (kv, kv_in)
    yield pre + "self_attn.o_proj.weight", (width, heads)
    yield pre + "mlp.gate_proj.weight", (ffn, width)
    yield pre + "mlp.up_proj.weight", (ffn, width)
    yield pre + "mlp.down_proj.weight", (width, ffn)


def _text(shape: Shape) -> Iterator[tuple[str, tuple[int, ...]]]:
    t, pre = shape.text, "model.vlm_with_expert.vlm."
    d, heads, kv = t["hidden_size"], t["num_attention_heads"], t["num_key_value_heads"]
    merged = shape.vision["hidden_size"] * shape.scale_factor**2
    yield pre + "model.connector.modality_projection.proj.weight", (d, merged)
    yield pre + "model.text_model.embed_tokens.weight", (shape.vocab, d)
    yield pre + "model.text_model.norm.weight", (d,)
    yield pre + "lm_head.weight", (shape.vocab, d)
    size = t["head_dim"]
    for i in range(_vlm_layers(shape)):
        layer = f"{pre}model.text_model.layers.{i}."
        yield from _llama_layer(layer, d, t["intermediate_size"], heads * size, kv * size, d)


def _vlm_layers(shape: Shape) -> int:
    kept = policy_config(shape)["num_vlm_layers"]
    return int(kept) if kept > 0 else shape.text["num_hidden_layers"]


def _expert(shape: Shape) -> Iterator[tuple[str, tuple[int, ...]]]:
    t, config = shape.text, policy_config(shape)
    width, ffn = expert_sizes(shape)
    heads, kv = t["num_attention_heads"] * t["head_dim"], t["num_key_value_heads"] * t["head_dim"]
    every, cross = config["self_attn_every_n_layers"], "cross" in config["attention_mode"]
    layers = config["num_expert_layers"] if config["num_expert_layers"] > 0 else _vlm_layers(shape)
    pre = "model.vlm_with_expert.lm_expert."
    for i in range(layers):
        own = not cross or (every > 0 and i % every == 0)
        yield from _llama_layer(f"{pre}layers.{i}.", width, ffn, heads, kv, width if own else kv)
    yield pre + "norm.weight", (width,)


def _heads(shape: Shape) -> Iterator[tuple[str, tuple[int, ...]]]:
    config, d = policy_config(shape), shape.text["hidden_size"]
    width, actions = expert_sizes(shape)[0], config["max_action_dim"]
    for name, rows, columns in (
        ("state_proj", d, config["max_state_dim"]),
        ("action_in_proj", width, actions),
        ("action_out_proj", actions, width),
        ("action_time_mlp_in", width, 2 * width),
        ("action_time_mlp_out", width, width),
    ):
        yield f"model.{name}.weight", (rows, columns)
        yield f"model.{name}.bias", (rows,)


def drawn(seed: int) -> Draw:
    """Seeded weights; each tensor has its own stream, so that a tensor's values do not depend on the others."""

    def draw(name: str, shape: tuple[int, ...]) -> Array:
        rng = np.random.default_rng([seed, zlib.crc32(name.encode())])
        values = rng.standard_normal(shape, dtype=np.float32)
        if name.endswith(".bias"):
            return values * np.float32(0.05)
        if len(shape) == 1:
            return np.float32(1) + values * np.float32(0.1)
        values *= np.float32(_scale(name, shape))
        return values

    return draw


def _scale(name: str, shape: tuple[int, ...]) -> float:
    """Standard deviation of a matrix."""
    fan_in = math.prod(shape[1:])
    if name.endswith("position_embedding.weight"):
        return 0.3
    factors = {
        "q_proj.weight": 2.0,
        "o_proj.weight": 1.5,
        "patch_embedding.weight": 3.0,
        "modality_projection.proj.weight": 1.5 / math.sqrt(shape[0]),
        "state_proj.weight": 6.0,
        "lm_head.weight": 0.1,
    }
    factor = next((f for end, f in factors.items() if name.endswith(end)), 1.0)
    return factor / math.sqrt(fan_in)


def write_safetensors(
    path: Path,
    table: Mapping[str, tuple[int, ...]],
    draw: Draw,
    dtype: Callable[[str], str] = lambda name: "F32",
    progress: Callable[[str, int, int], None] | None = None,
) -> None:
    """Streams the tensors of `table` into a .safetensors file, one at a time. dtype(name): "F32" or "BF16"."""
    width = {"F32": 4, "BF16": 2}
    header: dict[str, Any] = {}
    end = 0
    for name, shape in table.items():
        start, end = end, end + math.prod(shape) * width[dtype(name)]
        header[name] = {"dtype": dtype(name), "shape": list(shape), "data_offsets": [start, end]}
    head = json.dumps(header, separators=(",", ":")).encode()
    head += b" " * (-len(head) % 8)
    partial = path.with_suffix(".partial")
    with partial.open("wb") as f:
        f.write(struct.pack("<Q", len(head)) + head)
        for i, (name, shape) in enumerate(table.items()):
            values = np.ascontiguousarray(draw(name, shape), dtype="<f4")
            assert values.shape == shape, (name, values.shape, shape)
            f.write(values.data if dtype(name) == "F32" else to_bf16(values).data)
            if progress is not None:
                progress(name, i + 1, len(table))
    partial.replace(path)


def to_bf16(values: Array) -> Array:
    """float32 -> the upper 16 bits, rounded to nearest even."""
    bits = values.view(np.uint32)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype("<u2")


def statistics(shape: Shape, seed: int) -> dict[str, Array]:
    """`feature.stat` -> float32, with every statistic that LeRobot stores."""
    rng = np.random.default_rng([seed, 7])
    result: dict[str, Array] = {}
    for feature, dim in (("action", shape.action_dim), ("observation.state", shape.state_dim)):
        mean, std = rng.uniform(-20, 20, dim), rng.uniform(2, 30, dim)
        stats = {"mean": mean, "std": std, "min": mean - 3 * std, "max": mean + 3.2 * std}
        stats |= {"q01": mean - 2.3 * std, "q10": mean - 1.3 * std, "q90": mean + 1.2 * std, "q99": mean + 2.4 * std}
        result |= {f"{feature}.{k}": v.astype(np.float32) for k, v in stats.items()}
    return result


def write_processors(folder: Path, shape: Shape, stats: Mapping[str, Array]) -> None:
    """policy_preprocessor.json, policy_postprocessor.json and their state files, as LeRobot 0.6 saves them."""
    config = policy_config(shape)
    action, inputs = config["output_features"], {**config["input_features"], **config["output_features"]}
    normaliser = {"eps": 1e-8, "norm_map": config["normalization_mapping"]}
    device = {"registry_name": "device_processor", "config": {"device": "cpu", "float_dtype": None}}
    tokenizer = {
        "max_length": config["tokenizer_max_length"],
        "task_key": "task",
        "padding_side": "right",
        "padding": config["pad_language_to"],
        "truncation": True,
        "tokenizer_name": config["vlm_model_name"],
    }
    before = "policy_preprocessor_step_5_normalizer_processor.safetensors"
    after = "policy_postprocessor_step_0_unnormalizer_processor.safetensors"
    pre_steps = [
        {"registry_name": "rename_observations_processor", "config": {"rename_map": {}}},
        {"registry_name": "to_batch_processor", "config": {}},
        {"registry_name": "smolvla_new_line_processor", "config": {}},
        {"registry_name": "tokenizer_processor", "config": tokenizer},
        device,
        {"registry_name": "normalizer_processor", "config": {**normaliser, "features": inputs}, "state_file": before},
    ]
    post_steps = [
        {"registry_name": "unnormalizer_processor", "config": {**normaliser, "features": action}, "state_file": after},
        device,
    ]
    _json(folder / "policy_preprocessor.json", {"name": "policy_preprocessor", "steps": pre_steps})
    _json(folder / "policy_postprocessor.json", {"name": "policy_postprocessor", "steps": post_steps})
    shapes = {k: v.shape for k, v in sorted(stats.items())}
    for name in (before, after):
        write_safetensors(folder / name, shapes, lambda key, _: stats[key])


def write_checkpoint(
    folder: Path,
    shape: Shape,
    seed: int,
    draw: Draw | None = None,
    tokenizer: str | None = None,
    bf16: bool = False,
    progress: Callable[[str, int, int], None] | None = None,
) -> int:
    """A whole checkpoint; returns its number of parameters. bf16: as LeRobot mixes them (VLM and expert bf16, the five
    heads and the expert's cross k/v projections float32)."""
    folder.mkdir(parents=True, exist_ok=True)
    table = tensors(shape)
    width = expert_sizes(shape)[0]

    def dtype(name: str) -> str:
        cross = ".lm_expert." in name and name.endswith(("k_proj.weight", "v_proj.weight")) and table[name][1] != width
        return "BF16" if bf16 and ".vlm_with_expert." in name and not cross else "F32"

    write_vlm(folder / "vlm", shape, tokenizer)
    _json(folder / "config.json", policy_config(shape))
    write_processors(folder, shape, statistics(shape, seed))
    write_safetensors(folder / "model.safetensors", table, draw or drawn(seed), dtype, progress)
    return sum(math.prod(s) for s in table.values())


def _json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
