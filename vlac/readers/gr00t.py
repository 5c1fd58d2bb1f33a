"""GR00T N1.7 folders, NVIDIA's and LeRobot's -> Policy, for one embodiment.

NVIDIA's: config.json, shards, processor_config.json, statistics.json and embodiment_id.json; LeRobot's: see
gr00t_lerobot.py. The VLM's own config and tokenizer are not in a release: its sizes come from the folder that
`model_name` names, if it lies inside the checkpoint, else from the table here; the tokenizer from there or from
--tokenizer. N1.5 and N1.6 have another VLM and are refused.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from vlac.blocks_groot import DiTSpec, QwenVisionSpec
from vlac.errors import CheckpointError, Unsupported
from vlac.families.groot import GrootSpec
from vlac.io import IO
from vlac.policy import Policy, Source
from vlac.readers import gr00t_lerobot
from vlac.readers.gr00t_processor import Embodiment, image_steps, make_io, picture_limits, read_embodiment
from vlac.readers.gr00t_weights import canonical_weights, plain_names
from vlac.readers.hub import local_companion
from vlac.readers.lerobot import Config
from vlac.readers.safetensors_file import open_folder, read_json
from vlac.readers.tokenizer_file import given_tokenizer, read_tokenizer
from vlac.registry import Reader, ReadOptions, readers
from vlac.spec import DecoderSpec, EncoderSpec, FlowSpec, override
from vlac.weights import Weights

COSMOS_REASON2_2B: Mapping[str, Any] = {
    "model_type": "qwen3_vl",
    "text_config": {
        "num_attention_heads": 16,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "rms_norm_eps": 1e-6,
        "rope_theta": 5000000,
        "rope_scaling": {"mrope_interleaved": True, "mrope_section": [24, 20, 20]},
    },
    "vision_config": {"num_heads": 16, "patch_size": 16, "deepstack_visual_indexes": [5, 11, 17]},
}
"""What the release's VLM has and no tensor tells, in the keys of its own config."""

BACKBONES = {"Cosmos-Reason2-2B": COSMOS_REASON2_2B}
"""Last part of `model_name` -> sizes."""

OTHERS = {
    "gr00t_n1_5": "N1.5", "gr00tn1d5": "N1.5", "gr00tn15": "N1.5", "gr00t_n1_6": "N1.6", "gr00tn1d6": "N1.6",
    "gr00tn16": "N1.6", "gr00t_n1": "N1", "gr00tn1": "N1",
}  # fmt: skip
"""model_type or class, lower-case -> version."""

TEXT_TOKENS = 96
"""Longest instruction, with what the chat template puts behind it. The original has no limit."""

HEAD, OPEN, PAD, CLOSE, TAIL = (
    "<|im_start|>user\n",
    "<|vision_start|>",
    "<|image_pad|>",
    "<|vision_end|>",
    "<|im_end|>\n",
)


def version(table: Mapping[str, Any]) -> str:
    """ "N1.7", "N1.6", "N1.5", "N1", or "" for what is no GR00T."""
    kinds = [table.get("model_type"), *(table.get("architectures") or [])]
    names = [str(k).lower() for k in kinds if k]
    if any(n in ("gr00tn1d7", "gr00tn17", "gr00t_n1_7") for n in names):
        return "N1.7"
    found = [OTHERS[n] for n in names if n in OTHERS]
    backbone = table.get("backbone_cfg")
    older = isinstance(backbone, dict) and "eagle_path" in backbone
    # LeRobot's folders of that time name a tokenizer
    older = older or (table.get("type") == "groot" and table.get("tokenizer_assets_repo") is not None)
    if not found and table.get("type") == "groot":
        return "N1.5" if older else gr00t_lerobot.version(table)
    return found[0] if found else "N1.5" if older else ""


# --- dimensions ------------------------------------------------------------------------------------------------


def _backbone(folder: Path, name: str) -> Config:
    """The VLM's config: from the checkpoint's own folder of that name, else from the table."""
    found = local_companion(folder, name, "config.json")
    if found is not None:
        return Config(found, read_json(found))
    tail = name.rstrip("/").split("/")[-1]
    if tail not in BACKBONES:
        raise CheckpointError(
            f"{folder}: model_name {name!r}: no folder {tail!r} with its config.json, and not in vlac's table "
            f"({', '.join(BACKBONES)})",
            remedy=f"place a folder {tail!r} with the VLM's config.json and tokenizer.json into the checkpoint",
        )
    return Config(folder / tail, BACKBONES[tail])


def _shape(tensors: Weights, name: str, rank: int) -> tuple[int, ...]:
    shape = tensors[name].shape
    if len(shape) != rank or 0 in shape:
        raise CheckpointError(f"{tensors[name].source}: shape {list(shape)}, expected {rank} axes")
    return shape


def _depth(tensors: Weights, name: str) -> int:
    """Layers 0, 1, ... under a name."""
    found = {int(m[1]) for n in tensors if (m := re.match(rf"{re.escape(name)}\.(\d+)\.", n))}
    if not found or found != set(range(len(found))):
        raise CheckpointError(f"{name}: layers {sorted(found)}, expected 0, 1, ...")
    return len(found)


def _vision(tensors: Weights, config: Config, image: int) -> QwenVisionSpec:
    vision = Config(config.path, config.table("vision_config"))
    width, channels, frames, patch, _ = _shape(tensors, "visual.patch_embed.proj.weight", 5)
    merge = vision.size("spatial_merge_size", 2)
    indexes = vision.raw("deepstack_visual_indexes", [])
    depth = _depth(tensors, "visual.blocks")
    ascending = isinstance(indexes, list) and all(type(i) is int and 0 <= i < depth for i in indexes)
    if not ascending or sorted(set(indexes)) != indexes:
        raise CheckpointError(f"{config.path}: deepstack_visual_indexes {indexes!r} of {depth} layers")
    if (
        frames != vision.size("temporal_patch_size", 2)
        or patch != vision.size("patch_size", patch)
        or image % (patch * merge)
    ):
        raise CheckpointError(
            f"{config.path}: patches {frames}x{patch}x{patch} of pictures of {image}, merged by {merge}"
        )
    return QwenVisionSpec(
        hidden_size=width,
        intermediate_size=_shape(tensors, "visual.blocks.0.mlp.linear_fc1.weight", 2)[0],
        num_hidden_layers=depth,
        num_attention_heads=vision.size("num_heads", 16),
        image_size=image,
        patch_size=patch,
        num_channels=channels,
        hidden_act=vision.take("hidden_act", "gelu_pytorch_tanh"),
        merge=merge,
        deepstack=tuple(indexes),
    )


def _text(tensors: Weights, config: Config, layers: int) -> DecoderSpec:
    if config.raw("model_type") != "qwen3_vl":
        raise Unsupported(f"{config.path}: model_type {config.raw('model_type')!r}; GR00T N1.7's VLM is a qwen3_vl")
    text = Config(config.path, config.table("text_config"))
    text.refuse("attention_bias", False, None, why="not implemented")
    vocab, width = _shape(tensors, "language_model.embed_tokens.weight", 2)
    there = _depth(tensors, "language_model.layers")
    if there < layers:
        raise CheckpointError(f"{config.path.parent}: select_layer {layers}, the checkpoint has {there} layers")
    return DecoderSpec(
        hidden_size=width,
        intermediate_size=_shape(tensors, "language_model.layers.0.mlp.gate_proj.weight", 2)[0],
        num_hidden_layers=layers,
        num_attention_heads=text.size("num_attention_heads", 16),
        num_key_value_heads=text.size("num_key_value_heads", 8),
        head_dim=text.size("head_dim", _shape(tensors, "language_model.layers.0.self_attn.q_norm.weight", 1)[0]),
        vocab_size=vocab,
        rms_norm_eps=text.take("rms_norm_eps", 1e-6),
        rope_theta=_theta(text),
        hidden_act=text.take("hidden_act", "silu"),
    )


def _theta(text: Config) -> float:
    newer = text.table("rope_parameters")
    value = newer.get("rope_theta", text.raw("rope_theta", 5000000.0))
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value) or value <= 1:
        raise CheckpointError(f"{text.path}: rope_theta {value!r}")
    return float(value)


def _sections(config: Config, half: int) -> tuple[int, int, int]:
    """How many rotations turn by time, height and width."""
    text = Config(config.path, config.table("text_config"))
    table = text.table("rope_scaling") or text.table("rope_parameters")
    found = table.get("mrope_section", [24, 20, 20])
    if not table.get("mrope_interleaved", True):
        raise Unsupported(f"{config.path}: M-RoPE that is not interleaved")
    whole = isinstance(found, list) and len(found) == 3 and all(type(v) is int and v >= 0 for v in found)
    if not whole or sum(found) != half:
        raise CheckpointError(f"{config.path}: mrope_section {found!r}, expected three numbers with sum {half}")
    return found[0], found[1], found[2]


def _mixer(tensors: Weights, config: Config, width: int) -> EncoderSpec:
    table = Config(config.path, config.table("vl_self_attention_cfg"))
    table.refuse("positional_embeddings", None, why="not implemented")
    heads = table.size("num_attention_heads", 32)
    if heads * table.size("attention_head_dim", 64) != width:
        raise CheckpointError(f"{config.path}: vl_self_attention_cfg: {heads} heads for width {width}")
    name = "action_head.vl_self_attention.transformer_blocks"
    return EncoderSpec(
        hidden_size=width,
        intermediate_size=_shape(tensors, f"{name}.0.ff.net.0.proj.weight", 2)[0],
        num_hidden_layers=_depth(tensors, name),
        num_attention_heads=heads,
        hidden_act="gelu_pytorch_tanh",
    )


def _dit(tensors: Weights, config: Config, memory: int) -> DiTSpec:
    table = Config(config.path, config.table("diffusion_model_cfg"))
    table.refuse("norm_type", "ada_norm", why="not implemented")
    table.refuse("interleave_self_attention", True, why="not implemented")
    table.refuse("positional_embeddings", None, why="not implemented")
    config.refuse("use_alternate_vl_dit", True, why="not implemented")
    config.refuse("add_pos_embed", True, why="not implemented")
    name = "action_head.model"
    width, times = _shape(tensors, f"{name}.timestep_encoder.timestep_embedder.linear_1.weight", 2)
    heads = table.size("num_attention_heads", 32)
    if heads * table.size("attention_head_dim", 48) != width or width % 2 or times % 2:
        raise CheckpointError(f"{config.path}: diffusion_model_cfg: {heads} heads for width {width}, times of {times}")
    return DiTSpec(
        hidden_size=width,
        intermediate_size=_shape(tensors, f"{name}.transformer_blocks.0.ff.net.0.proj.weight", 2)[0],
        num_hidden_layers=_depth(tensors, f"{name}.transformer_blocks"),
        num_attention_heads=heads,
        memory_size=memory,
        output_size=_shape(tensors, f"{name}.proj_out_2.weight", 2)[0],
        time_size=times,
        text_every=config.size("attend_text_every_n_blocks", 2),
    )


def _spec(tensors: Weights, config: Config, backbone: Config, robot: Embodiment, image: int, start: int) -> GrootSpec:
    for key, neutral in (("use_vlln", True), ("state_history_length", 1), ("apply_sincos_state_encoding", False)):
        config.refuse(key, neutral, None, why="not implemented")
    text = _text(tensors, backbone, config.size("select_layer", 16))
    dit = _dit(tensors, config, text.hidden_size)
    spec = GrootSpec(
        vision=_vision(tensors, backbone, image),
        text=text,
        mixer=_mixer(tensors, config, text.hidden_size),
        dit=dit,
        cameras=len(robot.cameras),
        prompt_start=start,
        text_tokens=TEXT_TOKENS,
        chunk_size=config.size("action_horizon", 40),
        max_state_dim=config.size("max_state_dim", 132),
        max_action_dim=config.size("max_action_dim", 132),
        time_buckets=config.size("num_timestep_buckets", 1000),
    )
    stated = {
        "backbone_embedding_dim": text.hidden_size,
        "input_embedding_dim": dit.hidden_size,
        "hidden_size": dit.output_size,
    }
    wrong = [f"{k} is {config.raw(k)}, tensors say {v}" for k, v in stated.items() if config.raw(k, v) != v]
    if wrong:
        raise CheckpointError(f"{config.path}: {'; '.join(wrong)}", remedy="config.json belongs to another checkpoint")
    for heads, width, who in (
        (spec.vision.num_attention_heads, spec.vision.hidden_size, "vision"),
        (text.num_attention_heads, text.num_attention_heads * text.head_dim, "text"),
    ):
        if width % heads or width // heads % (4 if who == "vision" else 2):
            raise CheckpointError(f"{backbone.path}: {heads} {who} heads for width {width}")
    return spec


# --- the policy ------------------------------------------------------------------------------------------------


def _tokenizer(folder: Path, name: str, options: ReadOptions, warnings: list[str]) -> bytes | None:
    if options.tokenizer is not None:
        return given_tokenizer(options.tokenizer)
    found = local_companion(folder, name, "tokenizer.json")
    if found is None and (folder / "tokenizer.json").is_file():
        found = folder / "tokenizer.json"
    if found is not None:
        return read_tokenizer(found)
    error = CheckpointError(f"{folder}: no tokenizer", remedy=f"give that of {name}: --tokenizer FOLDER")
    if not options.headers_only:
        raise error
    warnings.append(str(error))
    return None


def prompt_start(data: bytes | None, where: Path) -> int:
    """Tokens before the first picture's opening token; CheckpointError when the tokenizer is not Qwen's."""
    if data is None:
        return 3
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_str(data.decode("utf-8"))
    wanted = [tokenizer.token_to_id(t) for t in (OPEN, PAD, CLOSE)]
    ids = tokenizer.encode(HEAD + OPEN + PAD + CLOSE, add_special_tokens=False).ids
    if None in wanted or ids[-3:] != wanted:
        raise CheckpointError(f"{where}: the tokenizer does not know {OPEN}, {PAD} and {CLOSE}: it is not Qwen3-VL's")
    return len(ids) - 3


def picture_prompt(spec: GrootSpec) -> tuple[str, str]:
    """What stands before and behind the instruction."""
    return HEAD + (OPEN + PAD * spec.vision.rows + CLOSE) * spec.cameras, TAIL


def read(folder: Path, options: ReadOptions) -> Policy:
    """The Policy of a folder. Raises CheckpointError and Unsupported as in vlac.errors."""
    table = read_json(folder / "config.json")
    found = version(table)
    if found != "N1.7":
        raise Unsupported(
            f"{folder}: GR00T {found}: its VLM is an Eagle, only N1.7 (Qwen3-VL) is implemented",
            remedy="LeRobot 0.5.1 and Isaac-GR00T run it",
        )
    config, tensors = Config(folder / "config.json", table), plain_names(open_folder(folder))
    warnings: list[str] = []
    if table.get("type") == "groot":
        config, robot, rename = gr00t_lerobot.read_robot(folder, config, tensors, options, warnings)
    else:
        robot, rename = read_embodiment(folder, config, options), {}
    config.refuse("backbone_model_type", "qwen", why="not implemented")
    name = config.take("model_name", "nvidia/Cosmos-Reason2-2B")
    backbone = _backbone(folder, name)
    limits, normal = picture_limits(local_companion(folder, name, "preprocessor_config.json"))
    patch = _shape(tensors, "visual.patch_embed.proj.weight", 5)[-1]
    pictures, image = image_steps(robot.processor, config, patch * 2, limits, normal)
    tokenizer = _tokenizer(folder, name, options, warnings)
    spec = _spec(tensors, config, backbone, robot, image, prompt_start(tokenizer, folder))
    spec = override(spec, options.spec)
    if (spec.vision.image_size, spec.cameras) != (image, len(robot.cameras)):
        raise Unsupported("--spec: pictures' size and number come from processor_config.json")
    sections = _sections(backbone, spec.text.head_dim // 2)
    io: IO = replace(make_io(spec, robot, pictures, picture_prompt(spec), options), rename=rename)
    if robot.tag == "libero_sim":
        warnings.append(
            "libero_sim: the environment wants the gripper as -sign(2g - 1); actions here are the network's"
        )
    return Policy(
        family="groot",
        name=folder.resolve().name,
        spec=spec,
        weights=canonical_weights(tensors, spec, sections, robot.index),
        io=io,
        source=Source(str(folder)),
        tokenizer=tokenizer,
        flow=FlowSpec.euler(config.size("num_inference_timesteps", 4, most=1000)),
        warnings=tuple(warnings),
        parameters=sum(math.prod(t.shape) for t in tensors.values()),
    )


def detect(path: Path) -> bool:
    """A folder whose config.json is a GR00T's of any version."""
    config = path / "config.json"
    table = read_json(config) if config.is_file() else None
    return isinstance(table, dict) and (table.get("type") == "groot" or ("type" not in table and version(table) != ""))


READER = readers.add(Reader("gr00t", detect, read, doc="GR00T N1.7, NVIDIA's folders and LeRobot's"))
