"""OpenVLA checkpoints in Hugging Face form -> Policy: config.json, safetensors shards, statistics, tokenizer.

The folder's own Python files are never run. OpenVLA-OFT is known by its side files (`action_head--*_checkpoint.pt`),
which torch reads with weights_only. What a checkpoint does not state is written down in the tables here; --spec names
it otherwise (`--spec vision.num_attention_heads=16`).
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeVar

from vlac.blocks_decode import BinsSpec
from vlac.blocks_timm import TowerSpec
from vlac.errors import CheckpointError, Unsupported, VlacError
from vlac.families.openvla import OpenVLASpec
from vlac.io import IO, Camera, Step
from vlac.policy import Policy, Source
from vlac.readers.lerobot import Config
from vlac.readers.prismatic_images import read_preprocessing
from vlac.readers.prismatic_weights import LAYER_SCALES, canonical_weights, open_side_file
from vlac.readers.safetensors_file import open_folder, read_json
from vlac.readers.tokenizer_file import read_tokenizer, token_id
from vlac.registry import Reader, ReadOptions, readers
from vlac.spec import DecoderSpec, override
from vlac.weights import Weights

V = TypeVar("V", int, str)

BACKBONES: Mapping[str, tuple[tuple[str, ...], int]] = {
    "siglip-vit-so400m": (("vit_so400m_patch14_siglip_224",), 224),
    "siglip-vit-so400m-384px": (("vit_so400m_patch14_siglip_384",), 384),
    "dinov2-vit-l": (("vit_large_patch14_reg4_dinov2.lvd142m",), 224),
    "dinosiglip-vit-so-224px": (("vit_large_patch14_reg4_dinov2.lvd142m", "vit_so400m_patch14_siglip_224"), 224),
    "dinosiglip-vit-so-384px": (("vit_large_patch14_reg4_dinov2.lvd142m", "vit_so400m_patch14_siglip_384"), 384),
}
"""vision_backbone_id -> (timm ids, image size); config.json's own timm_model_ids and image_sizes win."""

HEADS = {
    "vit_so400m_patch14_siglip_224": 16,
    "vit_so400m_patch14_siglip_384": 16,
    "vit_large_patch14_reg4_dinov2.lvd142m": 16,
}
"""timm id -> attention heads, which no tensor tells."""

CHUNKS = {(7, 8): (8, 2, "q99"), (14, 14): (25, 3, "min_max"), (7, 7): (5, 1, "q99")}
"""OpenVLA-OFT, (action size, proprio size) -> (chunk, pictures, bounds): its constants for LIBERO, ALOHA and BRIDGE."""

BOUNDS = {"q99": ("q01", "q99", "QUANTILES"), "min_max": ("min", "max", "MIN_MAX")}

PROMPTS = {
    "openvla": ("In: What action should the robot take to ", "?\nOut:"),
    "openvla-v01": (
        "A chat between a curious user and an artificial intelligence assistant. The assistant gives helpful, "
        "detailed, and polite answers to the user's questions. USER: What action should the robot take to ",
        "? ASSISTANT:",
    ),
}

NOT_READ = (
    "arch_specifier", "architectures", "auto_map", "hf_llm_id", "llm_backbone_id", "llm_max_length", "torch_dtype",
    "transformers_version", "image_resize_strategy", "output_projector_states", "use_cache", "pad_token_id",
    "_name_or_path", "return_dict",
)  # fmt: skip
"""Config keys that do not act on inference in float32, or act through preprocessor_config.json."""


@dataclass
class Opened:
    """A checkpoint folder, opened; `problem` raises, or notes what a person should know when only headers are read."""

    folder: Path
    options: ReadOptions
    config: Config
    tensors: Weights
    side: dict[str, Weights]
    warnings: list[str] = field(default_factory=list)

    def problem(self, error: VlacError) -> None:
        if not self.options.headers_only:
            raise error
        self.warnings.append(str(error))

    def given(self, name: str, default: V) -> V:
        """A dimension from --spec, else the default."""
        value = self.options.spec.get(name, default)
        try:
            return type(default)(value)
        except (TypeError, ValueError):
            raise Unsupported(f"--spec {name}={value!r}: expected {type(default).__name__}") from None

    def shape(self, name: str, rank: int) -> tuple[int, ...]:
        """Shape of a tensor that must be there with that many axes."""
        shape = self.tensors[name].shape
        if len(shape) != rank:
            raise CheckpointError(f"tensor {name} has shape {list(shape)}, expected {rank} axes")
        return shape


# --- dimensions ------------------------------------------------------------------------------------------------


def _tower(opened: Opened, index: int, timm_id: str, image: int, kwargs: Mapping[str, Any]) -> TowerSpec:
    prefix = f"vision_backbone.{'fused_' if index else ''}featurizer"
    patch = opened.shape(f"{prefix}.patch_embed.proj.weight", 4)
    found = {int(m[1]) for m in (re.match(rf"{prefix}\.blocks\.(\d+)\.", n) for n in opened.tensors) if m}
    extra = [opened.tensors[n].shape[-2] for n in (f"{prefix}.cls_token", f"{prefix}.reg_token") if n in opened.tensors]
    field_name = f"{'fused' if index else 'vision'}.num_attention_heads"
    heads = opened.given(field_name, int(kwargs.get("num_heads", HEADS.get(timm_id, 0))))
    if heads < 1 or patch[0] % heads:
        raise CheckpointError(
            f"{opened.config.path}: tower {timm_id} of width {patch[0]} with {heads or 'an unknown number of'} heads",
            remedy=f"say how many it has: --spec {field_name}=16",
        )
    tower = TowerSpec(
        hidden_size=patch[0],
        intermediate_size=opened.shape(f"{prefix}.blocks.0.mlp.fc1.weight", 2)[0],
        num_hidden_layers=max(found),  # of max + 1: the features are those before the last one
        num_attention_heads=heads,
        image_size=image // patch[-1] * patch[-1],  # the convolution drops a remainder; here the picture is cut
        patch_size=patch[-1],
        num_channels=patch[1],
        layer_norm_eps=1e-6,
        hidden_act="gelu",
        prefix_tokens=sum(extra),
        layer_scale=any(f"{prefix}.blocks.0.ls1.{name}" in opened.tensors for name in LAYER_SCALES),
    )
    positions = opened.shape(f"{prefix}.pos_embed", 3)[1]
    if tower.grid**2 != positions:
        raise CheckpointError(
            f"{opened.config.path}: images of {image}x{image} give {tower.grid**2} patches, {prefix}.pos_embed has "
            f"{positions}"
        )
    return tower


def _towers(opened: Opened) -> tuple[TowerSpec, ...]:
    config = opened.config
    name = config.take("vision_backbone_id", "siglip-vit-so400m")
    if name not in BACKBONES:
        raise Unsupported(f"{config.path}: vision_backbone_id {name!r}; implemented: {', '.join(BACKBONES)}")
    ids = config.raw("timm_model_ids") or list(BACKBONES[name][0])
    sizes = config.raw("image_sizes") or [BACKBONES[name][1]] * len(ids)
    kwargs = config.raw("timm_model_kwargs") or [{}] * len(ids)
    fused = config.raw("use_fused_vision_backbone", len(ids) == 2)
    if any(config.raw("timm_override_act_layers") or ()):
        raise Unsupported(
            f"{config.path}: timm_override_act_layers (towers with another activation) is not implemented"
        )
    if not (1 <= len(ids) == len(sizes) == len(kwargs) <= 2) or fused != (len(ids) == 2):
        raise CheckpointError(f"{config.path}: {len(ids)} vision towers, sizes {sizes}, fused {fused}")
    if len(set(sizes)) != 1 or not all(isinstance(s, int) and 0 < s < 8192 for s in sizes):
        raise Unsupported(f"{config.path}: image_sizes {sizes}: all towers must see one size")
    return tuple(_tower(opened, i, str(t), sizes[0], dict(kwargs[i] or {})) for i, t in enumerate(ids))


def _text(opened: Opened) -> DecoderSpec:
    """Absent keys have LlamaConfig's defaults, for that is how the checkpoint was written."""
    table = opened.config.table("text_config")
    text, where = Config(opened.config.path, table), f"{opened.config.path}: text_config"
    if text.take("model_type", "llama") != "llama":
        raise Unsupported(f"{where}.model_type {table['model_type']!r}; only llama is implemented")
    for key in ("attention_bias", "mlp_bias", "rope_scaling"):
        text.refuse(key, None, False, why="not implemented")
    vocab, width = opened.shape("language_model.model.embed_tokens.weight", 2)
    heads = opened.given("text.num_attention_heads", text.size("num_attention_heads", 32))
    groups = text.raw("num_key_value_heads")
    groups = heads if groups is None else int(groups)
    rows, kv = (opened.shape(f"language_model.model.layers.0.self_attn.{p}_proj.weight", 2)[0] for p in "qk")
    layers = {int(m[1]) for m in (re.match(r"language_model\.model\.layers\.(\d+)\.", n) for n in opened.tensors) if m}
    spec = DecoderSpec(
        hidden_size=width,
        intermediate_size=opened.shape("language_model.model.layers.0.mlp.gate_proj.weight", 2)[0],
        num_hidden_layers=max(layers) + 1,
        num_attention_heads=heads,
        num_key_value_heads=groups,
        head_dim=opened.given("text.head_dim", rows // heads),
        vocab_size=vocab,
        rms_norm_eps=text.take("rms_norm_eps", 1e-6),
        rope_theta=text.take("rope_theta", 10000.0),
        hidden_act=text.take("hidden_act", "silu"),
    )
    stated = {
        "vocab_size": vocab,
        "hidden_size": width,
        "num_hidden_layers": spec.num_hidden_layers,
        "intermediate_size": spec.intermediate_size,
    }
    wrong = [f"{k} {table[k]}, tensors say {v}" for k, v in stated.items() if k in table and table[k] != v]
    if wrong or rows != heads * spec.head_dim or kv != groups * spec.head_dim:
        raise CheckpointError(
            f"{where}: {'; '.join(wrong) or f'{heads} heads, {groups} for keys: q and k have {rows} and {kv} rows'}",
            remedy="config.json belongs to another checkpoint",
        )
    return spec


# --- statistics ------------------------------------------------------------------------------------------------


def _statistics(opened: Opened) -> dict[str, Mapping[str, Any]]:
    """Those of the datasets that --unnorm-key names, from dataset_statistics.json if there is one, else config.json."""
    path = opened.folder / "dataset_statistics.json"
    table = opened.config.raw("norm_stats")
    where = str(opened.config.path)
    if path.is_file():
        table, where = read_json(path), str(path)
    if not isinstance(table, dict) or not table:
        raise CheckpointError(
            f"{where}: no norm_stats, which say how many numbers an action has",
            remedy="fine-tuned checkpoints have dataset_statistics.json; copy it into the folder",
        )
    named = opened.options.unnorm_key or opened.options.stats_key
    there = f"{', '.join(sorted(table)[:12])}{', ...' if len(table) > 12 else ''}"
    if named is None and len(table) > 1:
        opened.problem(
            CheckpointError(
                f"{where}: statistics of {len(table)} datasets: {there}",
                remedy="choose one with --unnorm-key, or several with commas: act(unnorm_key=) then chooses",
            )
        )
    keys = [k.strip() for k in named.split(",")] if named and named not in table else [named or next(iter(table))]
    for key in keys:
        if not isinstance(table.get(key), dict):
            raise CheckpointError(f"{where}: no statistics under {key!r}; there are: {there}")
    return {key: table[key] for key in keys}


def _bounds(statistics: Mapping[str, Any], group: str, kind: str, where: str) -> tuple[str, dict[str, list[float]]]:
    """(mode, its two statistics) of "action" or "proprio"; a dimension that the mask leaves alone gets -1 to 1."""
    low_name, high_name, mode = BOUNDS[kind]
    table = statistics.get(group)
    low, high = (table.get(n) if isinstance(table, dict) else None for n in (low_name, high_name))
    sizes = {len(v) if isinstance(v, list) else 0 for v in (low, high)}
    mask = table.get("mask", [True] * max(sizes)) if isinstance(table, dict) else []
    numbers = all(type(v) in (int, float) and math.isfinite(v) for v in [*(low or []), *(high or [])])
    if len(sizes) != 1 or 0 in sizes or len(mask) not in sizes or not numbers:
        raise CheckpointError(f"{where}: {group} needs {low_name} and {high_name} of one length, and a mask like them")
    assert low is not None and high is not None
    return mode, {
        low_name: [float(v) if m else -1.0 for v, m in zip(low, mask, strict=True)],
        high_name: [float(v) if m else 1.0 for v, m in zip(high, mask, strict=True)],
    }


# --- the policy ------------------------------------------------------------------------------------------------


def _spec(opened: Opened, statistics: Mapping[str, Any]) -> OpenVLASpec:
    config, towers, text = opened.config, _towers(opened), _text(opened)
    kinds = opened.given("action_bounds", "q99")
    _, bounds = _bounds(statistics, "action", kinds if kinds in BOUNDS else "q99", str(config.path))
    size = len(next(iter(bounds.values())))
    bins = config.size("n_action_bins", 256)
    first = text.vocab_size - config.size("pad_to_multiple_of", 64, least=0) - 1
    spec = OpenVLASpec(
        vision=towers[0],
        fused=towers[1] if len(towers) == 2 else None,
        text=text,
        action_dim=size,
        bins=BinsSpec(count=bins, first=first),
        end_token_id=_end_token(opened),
    )
    if opened.side or opened.given("parallel", "") in ("1", "true", "True"):
        spec = _oft(opened, spec)
    taken = ("vision.num_attention_heads", "fused.num_attention_heads", "text.num_attention_heads", "text.head_dim")
    given = {k: v for k, v in opened.options.spec.items() if k not in taken}
    if "bins.ids" in given:
        ids = read_ids(given.pop("bins.ids"))
        spec = replace(spec, bins=replace(spec.bins, ids=ids, count=len(ids)))
    spec = override(spec, given)
    if (
        spec.action_bounds not in BOUNDS
        or spec.bins.kind not in ("edges", "cells")
        or spec.bins.direction not in (1, -1)
    ):
        raise Unsupported(
            f"action_bounds {spec.action_bounds!r}, bins.kind {spec.bins.kind!r}, bins.direction "
            f"{spec.bins.direction}; known: {', '.join(BOUNDS)}; edges, cells; 1, -1"
        )
    ids = spec.bins.rows
    if len(ids) != spec.bins.count or len(set(ids)) < len(ids) or len(ids) < 2:
        raise CheckpointError(
            f"bins.ids: {len(set(ids))} ids for {spec.bins.count} bins; each bin needs one of its own"
        )
    if min(ids) < 0 or max(ids) >= text.vocab_size:
        raise CheckpointError(f"{config.path}: {len(ids)} bins with ids {min(ids)}..{max(ids)}, of {text.vocab_size}")
    return spec


def read_ids(given: Any) -> tuple[int, ...]:
    """Ids of the bins in order, as --spec has them: a list of numbers, or text such as 300-555 or 12+7+1000-1253."""
    parts = [str(part) for part in given] if isinstance(given, (list, tuple)) else str(given).split("+")
    found: list[int] = []
    for part in parts:
        m = re.fullmatch(r"(\d+)(?:-(\d+))?", part.strip())
        if m is None or len(found) > 65536:
            raise Unsupported(f"--spec bins.ids={part!r}: expected ids and ranges such as 12+7+1000-1253")
        first, last = int(m[1]), int(m[2] or m[1])
        found += range(first, last + 1) if last >= first else range(first, last - 1, -1)
    return tuple(found)


def _end_token(opened: Opened) -> int:
    path = opened.folder / "generation_config.json"
    table = read_json(path) if path.is_file() else {}
    value = table.get("eos_token_id", 2) if isinstance(table, dict) else 2
    return int(value) if isinstance(value, int) else 2


def _oft(opened: Opened, spec: OpenVLASpec) -> OpenVLASpec:
    head, proprio = opened.side.get("action_head"), opened.side.get("proprio_projector")
    state = proprio["fc1.weight"].shape[1] if proprio is not None else 0
    chunk, pictures, bounds = CHUNKS.get((spec.action_dim, state), (8, 1, "q99"))
    if (spec.action_dim, state) not in CHUNKS and "chunk_size" not in opened.options.spec:
        opened.problem(
            CheckpointError(
                f"{opened.folder}: OpenVLA-OFT with actions of {spec.action_dim} and states of {state}: no checkpoint "
                "says how many steps a chunk has",
                remedy="say it: --spec chunk_size=8 (and --spec num_images_in_input=2)",
            )
        )
    blocks = (
        -1
        if head is None
        else len([n for n in head if re.fullmatch(r"model\.mlp_resnet_blocks\.\d+\.ffn\.1\.weight", n)])
    )
    return override(
        spec,
        {
            "parallel": True,
            "chunk_size": chunk,
            "num_images_in_input": pictures,
            "proprio_dim": state,
            "head_blocks": blocks,
            "action_bounds": bounds,
        },
    )


def _decoded(spec: OpenVLASpec) -> tuple[Step, ...]:
    """From tokens to bin centres, where the network gives tokens."""
    bins: dict[str, Any] = {
        "bins": spec.bins.count,
        "kind": spec.bins.kind,
        "first": spec.bins.first,
        "direction": spec.bins.direction,
    }
    bins |= {"ids": list(spec.bins.ids)} if spec.bins.ids else {}
    step = Step("token_bins", {**bins, "columns": spec.action_dim, "end": spec.end_token_id})
    return () if spec.head_blocks >= 0 else (step,)


def _numbers(opened: Opened, spec: OpenVLASpec, key: str, table: Mapping[str, Any]) -> dict[str, tuple[Step, ...]]:
    """State and action steps under the statistics of one dataset."""
    where, known = f"{opened.config.path}: norm_stats.{key}", not opened.options.no_stats
    mode, bounds = _bounds(table, "action", spec.action_bounds, where)
    steps: dict[str, tuple[Step, ...]] = {"state_steps": ()}
    steps["action_steps"] = (*_decoded(spec), Step("unnormalise", {"mode": mode, **bounds}))
    found = [(spec.action_dim, bounds)]
    if spec.proprio_dim:
        mode, state = _bounds(table, "proprio", spec.action_bounds, where)
        found.append((spec.proprio_dim, state))
        steps["state_steps"] = (Step("normalise", {"mode": mode, **state}), Step("clamp", {"low": -1.0, "high": 1.0}))
    for size, part in found:
        if any(len(v) != size for v in part.values()):
            raise CheckpointError(
                f"{where}: statistics of {len(next(iter(part.values())))} numbers, the network has {size}",
                remedy="datasets of other sizes go into other artifacts",
            )
    if known:
        return steps
    return {name: tuple(s for s in part if s.step not in ("normalise", "unnormalise")) for name, part in steps.items()}


def _io(
    opened: Opened, spec: OpenVLASpec, pictures: tuple[Step, ...], statistics: Mapping[str, Any], final_id: int
) -> IO:
    choices = {key: _numbers(opened, spec, key, table) for key, table in statistics.items()}
    first = next(iter(choices.values()))
    names = ["image", "wrist_image", *(f"wrist_image{i}" for i in range(2, spec.num_images_in_input))]
    before, after = PROMPTS["openvla-v01" if "v01" in opened.folder.name else "openvla"]
    side = spec.vision.image_size
    tokenise = {"max_length": spec.tokenizer_max_length, "padding": "longest", "truncation": False}
    return IO(
        cameras=tuple(Camera(f"observation.images.{n}", (3, side, side)) for n in names[: spec.num_images_in_input]),
        image_steps=pictures,
        state_key="observation.state" if spec.proprio_dim else "",
        state_dim=spec.proprio_dim,
        text_steps=(
            Step("lowercase"),
            Step("surround", {"before": before, "after": after}),
            Step("tokenise", {**tokenise, "add_special_tokens": True, "final_id": final_id}),
        ),
        action_key="action",
        action_dim=spec.action_dim,
        max_action_dim=spec.action_dim,
        chunk_size=spec.chunk_size,
        n_action_steps=spec.chunk_size,
        normalised_action_steps=_decoded(spec),
        image_size=side,
        vocab_size=spec.text.vocab_size,
        units="normalized" if opened.options.no_stats else "robot",
        choices=choices if len(choices) > 1 else {},
        state_steps=first["state_steps"],
        action_steps=first["action_steps"],
    )


def _open(folder: Path, options: ReadOptions) -> Opened:
    config = folder / "config.json"
    if not (folder / "model.safetensors").is_file() and (folder / "adapter_config.json").is_file():
        raise CheckpointError(
            f"{folder}: only an adapter (adapter_config.json), not a whole model",
            remedy="merge it into its base model first (peft: merge_and_unload, save_pretrained)",
        )
    side: dict[str, Weights] = {}
    for kind in ("action_head", "proprio_projector", "noisy_action_projector", "vision_backbone"):
        files = sorted(p for p in folder.glob("*_checkpoint.pt") if p.name.startswith(f"{kind}--"))
        if files and kind in ("noisy_action_projector", "vision_backbone"):
            raise Unsupported(f"{files[0]}: OpenVLA-OFT's diffusion head and FiLM are not implemented")
        if len(files) > 1:
            raise CheckpointError(f"{folder}: {len(files)} files {kind}--*_checkpoint.pt", remedy="keep one of them")
        if files:
            side[kind] = open_side_file(files[0])
    return Opened(folder, options, Config(config, read_json(config)), open_folder(folder), side)


def _tokenizer(opened: Opened) -> bytes | None:
    path = opened.folder / "tokenizer.json"
    if opened.options.tokenizer is not None:
        given = Path(opened.options.tokenizer)
        path = given / "tokenizer.json" if given.is_dir() else given
    if path.is_file():
        return read_tokenizer(path)
    opened.problem(CheckpointError(f"{path}: no tokenizer", remedy="give one: --tokenizer FOLDER"))
    return None


def read(folder: Path, options: ReadOptions) -> Policy:
    """The Policy of a folder. Raises CheckpointError and Unsupported as in vlac.errors."""
    opened = _open(folder, options)
    opened.config.raw("model_type")
    statistics = _statistics(opened)
    spec = _spec(opened, next(iter(statistics.values())))
    tokenizer = _tokenizer(opened)
    final = token_id(tokenizer, "\N{LOWER ONE EIGHTH BLOCK}", str(folder)) if tokenizer else 0
    io = _io(opened, spec, read_preprocessing(folder, spec.towers), statistics, final)
    weights = canonical_weights(opened.tensors, opened.side, spec)
    for key in NOT_READ:
        opened.config.raw(key)
    unknown = opened.config.leftover()
    if unknown:
        opened.warnings.append(f"config.json: unknown keys, not used: {', '.join(unknown)}")
    everything = [opened.tensors, *opened.side.values()]
    return Policy(
        family="openvla",
        name=folder.resolve().name,
        spec=spec,
        weights=weights,
        io=io,
        source=Source(str(folder)),
        tokenizer=tokenizer,
        warnings=tuple(opened.warnings),
        parameters=sum(math.prod(t.shape) for w in everything for t in w.values()),
    )


def detect(path: Path) -> bool:
    """A folder whose config.json has model_type "openvla"."""
    config = path / "config.json"
    if not config.is_file():
        return False
    table = read_json(config)
    return isinstance(table, dict) and "type" not in table and table.get("model_type") == "openvla"


READER = readers.add(Reader("prismatic", detect, read, doc="OpenVLA and OpenVLA-OFT folders (Hugging Face form)"))
