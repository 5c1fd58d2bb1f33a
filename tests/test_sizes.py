"""Checkpoints of sizes nobody chose: seeded random widths, depths, heads, pictures, cameras and prompts of every family
whose files can be written here. The reader must find the sizes that were meant, every target must compile them, and
every engine must compute what the reference computes."""

from __future__ import annotations

import dataclasses
import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from checkpoint_files import GOLDEN, edit_json, edit_step, write_tensors
from conftest import ROOT

import vlac
from vlac.checkpoint import read_policy
from vlac.engines.base import get_engine
from vlac.families import pi0, pi0_fast, pi05
from vlac.parity import parity
from vlac.readers.paligemma import disk_name
from vlac.registry import ReadOptions
from vlac.spec import DecoderSpec, VisionSpec

sys.path.insert(0, str(ROOT / "scripts"))
from make_large import decoder, drawn, timm_tower
from smolvla_checkpoint import Shape, write_checkpoint

pytest.importorskip("torch")
pytestmark = pytest.mark.filterwarnings("ignore::vlac.errors.VlacWarning")

Rng = np.random.Generator
Made = tuple[Path, dict[str, Any], dict[str, Any]]
"""(folder, options of vlac.compile, dotted sizes that the reader must find)."""

POOL = np.random.default_rng(5).standard_normal(1 << 22, dtype=np.float32)
RUNS = (
    ("gguf-f32", "ggml"),
    ("onnx-fp32", "onnxruntime"),
    ("onnx-fp32", "openvino"),
    ("gguf-q4", "ggml"),
    ("onnx-int4", "onnxruntime"),
)

EXACT, ROUNDED = ("compiler.max<=1e-4", "max<=2e-4"), ("compiler.rel_l2<=0.25", "cos>=-1")
LIMITS = {"gguf-f32": EXACT, "onnx-fp32": EXACT, "gguf-q4": ROUNDED, "onnx-int4": ROUNDED}
"""Wider than parity's own: weights drawn without care amplify what a turn of the sampler rounds."""


def any_of(rng: Rng, *values: Any) -> Any:
    return values[int(rng.integers(len(values)))]


def write_drawn(path: Path, shapes: dict[str, tuple[int, ...]]) -> None:
    """Weights as scripts/make_large.py draws them, but a velocity that does not throw the sampler far off."""
    path.unlink(missing_ok=True)
    tensors = {n: np.asarray(drawn(n, s, POOL)).reshape(s) for n, s in shapes.items()}
    write_tensors(path, {n: t * np.float32(0.2 if "action_out_proj" in n else 1) for n, t in tensors.items()})


def text_spec(rng: Rng, vocabulary: int) -> DecoderSpec:
    heads, groups = any_of(rng, (1, 1), (3, 1), (4, 2), (8, 1))
    return DecoderSpec(
        hidden_size=any_of(rng, 20, 44, 96, 256),
        intermediate_size=any_of(rng, 24, 72, 256),
        num_hidden_layers=int(rng.integers(1, 4)),
        num_attention_heads=heads,
        num_key_value_heads=groups,
        head_dim=any_of(rng, 6, 8, 16, 32),
        vocab_size=vocabulary,
        rms_norm_eps=1e-6,
        hidden_act="gelu_pytorch_tanh",
    )


def vision_spec(rng: Rng) -> VisionSpec:
    heads, patch = any_of(rng, 1, 3, 4), any_of(rng, 7, 14, 16)
    return VisionSpec(
        hidden_size=heads * any_of(rng, 8, 12, 20),
        intermediate_size=any_of(rng, 18, 50, 96),
        num_hidden_layers=int(rng.integers(1, 4)),
        num_attention_heads=heads,
        image_size=patch * int(rng.integers(1, 6)),
        patch_size=patch,
    )


def dims_of(spec: Any, name: str) -> dict[str, Any]:
    return {f"{name}.{f.name}": getattr(spec, f.name) for f in dataclasses.fields(spec)}


def paligemma(kind: str, rng: Rng, to: Path) -> Made:
    """pi0, pi0.5 or pi0-FAST: the golden's small files with other sizes."""
    module, golden = {
        "pi0": (pi0, "pi0_tiny"),
        "pi05": (pi05, "pi05_tiny"),
        "pi0_fast": (pi0_fast, "pi0fast_tiny"),
    }[kind]
    folder = to / kind
    shutil.copytree(GOLDEN / golden / "checkpoint", folder)
    for path in folder.rglob("*"):
        path.chmod(0o755 if path.is_dir() else 0o644)
    text, vision = text_spec(rng, int(rng.integers(400, 500))), vision_spec(rng)
    limits = {"tokenizer_max_length": int(rng.integers(9, 90)), "max_action_dim": int(rng.integers(6, 14))}
    config: dict[str, Any] = {"image_resolution": [vision.image_size] * 2}
    if kind == "pi0_fast":
        turns = int(rng.integers(1, 9))
        spec = pi0_fast.Pi0FastSpec(
            vision=vision, text=text, max_decoding_steps=turns, bos_token_id=0,
            tokenizer_max_length=limits["tokenizer_max_length"],
        )  # fmt: skip
        config["max_decoding_steps"] = turns
    else:
        expert = dataclasses.replace(
            text, hidden_size=any_of(rng, 12, 36, 256), intermediate_size=any_of(rng, 20, 64), vocab_size=0
        )
        chunk = int(rng.integers(1, 20))
        more = {"max_state_dim": int(rng.integers(7, 12))} if kind == "pi0" else {}
        spec = module.__dict__[{"pi0": "Pi0Spec", "pi05": "Pi05Spec"}[kind]](
            vision=vision, text=text, expert=expert, chunk_size=chunk, **limits, **more
        )
        config |= {"chunk_size": chunk, "n_action_steps": chunk, "max_action_dim": limits["max_action_dim"], **more}
        config["num_inference_steps"] = int(rng.integers(1, 6))
    shapes = {disk_name(n): s for n, s in module.shapes(spec).items()}
    patch = disk_name("vision.patch_embedding.weight")
    shapes[patch] = (vision.hidden_size, 3, vision.patch_size, vision.patch_size)
    write_drawn(folder / "model.safetensors", shapes)
    cameras = {
        f"observation.images.c{i}": {"type": "VISUAL", "shape": [3, int(rng.integers(8, 99)), int(rng.integers(8, 99))]}
        for i in range(int(rng.integers(1, 5)))
    }

    def edit(table: dict[str, Any]) -> None:
        rest = {k: v for k, v in table["input_features"].items() if v["type"] != "VISUAL"}
        table.update(config, input_features={**cameras, **rest}, tokenizer_max_length=limits["tokenizer_max_length"])

    edit_json(folder / "config.json", edit)
    edit_step(
        folder,
        "policy_preprocessor.json",
        "tokenizer_processor",
        lambda s: s["config"].update(
            max_length=limits["tokenizer_max_length"], padding=any_of(rng, "longest", "max_length")
        ),
    )
    told = {
        "vision.num_attention_heads": vision.num_attention_heads,
        "text.num_key_value_heads": text.num_key_value_heads,
        "text.head_dim": text.head_dim,
    }
    meant = dims_of(text, "text") | dims_of(vision, "vision") | {"tokenizer_max_length": limits["tokenizer_max_length"]}
    return folder, {"spec": told}, meant


def smolvla(rng: Rng, to: Path) -> Made:
    heads, groups = any_of(rng, (2, 1), (4, 2), (3, 3))
    factor, patch = any_of(rng, 1, 2, 3), any_of(rng, 4, 6)
    size = patch * factor * int(rng.integers(1, 4))
    vision_heads = any_of(rng, 1, 2, 4)
    text = {
        "hidden_size": any_of(rng, 24, 40, 64), "intermediate_size": any_of(rng, 48, 88),
        "num_hidden_layers": int(rng.integers(2, 5)), "num_attention_heads": heads, "num_key_value_heads": groups,
        "head_dim": any_of(rng, 8, 12, 20),
    }  # fmt: skip
    vision = {
        "hidden_size": vision_heads * 12, "intermediate_size": any_of(rng, 30, 64),
        "num_hidden_layers": int(rng.integers(1, 3)), "num_attention_heads": vision_heads, "image_size": size,
        "patch_size": patch,
    }  # fmt: skip
    cameras = {f"c{i}": (int(rng.integers(20, 90)), int(rng.integers(20, 90))) for i in range(int(rng.integers(1, 5)))}
    policy = {
        "chunk_size": int(rng.integers(2, 14)), "max_state_dim": int(rng.integers(6, 12)),
        "max_action_dim": int(rng.integers(6, 12)), "tokenizer_max_length": int(rng.integers(9, 60)),
        "resize_imgs_with_padding": [size, size], "num_steps": int(rng.integers(1, 6)),
        "self_attn_every_n_layers": any_of(rng, -1, 1, 2), "attention_mode": any_of(rng, "cross_attn", "self_attn"),
    }  # fmt: skip
    policy["n_action_steps"] = policy["chunk_size"]
    shape = Shape(text=text, vision=vision, cameras=cameras, scale_factor=factor, policy=policy)
    write_checkpoint(to / "smolvla", shape, int(rng.integers(1000)))
    meant = {f"text.{k}": v for k, v in text.items()} | {f"vision.{k}": v for k, v in vision.items()}
    return to / "smolvla", {}, meant | {"scale_factor": factor, "chunk_size": policy["chunk_size"]}


def openvla(rng: Rng, to: Path) -> Made:
    folder, fused = to / "openvla", bool(rng.integers(2))
    shutil.copytree(GOLDEN / "openvla_tiny" / "checkpoint", folder)
    for path in folder.glob("model*"):
        path.unlink()
    (folder / "dataset_statistics.json").unlink()
    grid, vocabulary = int(rng.integers(1, 5)), 64 + int(rng.integers(800, 900))
    towers = [
        (any_of(rng, 1, 3) * any_of(rng, 8, 12), any_of(rng, 20, 60), int(rng.integers(2, 4)), registers)
        for registers in ((4, 0) if fused else (any_of(rng, 0, 4),))
    ]
    heads, hd = any_of(rng, 2, 4), any_of(rng, 6, 16)
    width, ffn, layers = any_of(rng, 32, 48, 256), any_of(rng, 40, 256), int(rng.integers(1, 4))
    shapes: dict[str, tuple[int, ...]] = {}
    for i, (w, f, depth, registers) in enumerate(towers):
        shapes |= dict(timm_tower(f"vision_backbone.{'fused_' if i else ''}featurizer", w, f, depth, grid, registers))
    both = sum(t[0] for t in towers)
    for n, (rows, columns) in enumerate(
        ((4 * both, both), (width, 4 * both), (width, width)) if fused else ((width, both), (width, width)), 1
    ):
        shapes |= {f"projector.fc{n}.weight": (rows, columns), f"projector.fc{n}.bias": (rows,)}
    shapes["language_model.model.embed_tokens.weight"] = shapes["language_model.lm_head.weight"] = (vocabulary, width)
    shapes |= dict(decoder("language_model.model.layers", width, ffn, heads * hd, heads * hd, layers))
    shapes["language_model.model.norm.weight"] = (width,)
    write_drawn(folder / "model.safetensors", shapes)
    size, ids = 14 * grid, ["vit_large_patch14_reg4_dinov2.lvd142m", "vit_so400m_patch14_siglip_224"]
    name = "dinosiglip-vit-so-224px" if fused else "siglip-vit-so400m"

    def config(table: dict[str, Any]) -> None:
        kwargs = [{"num_heads": 1 if t[0] % 3 else 3} for t in towers]
        table.update(
            vision_backbone_id=name, use_fused_vision_backbone=fused, image_sizes=[size] * len(towers),
            timm_model_ids=ids if fused else ids[1:], timm_override_act_layers=[None] * len(towers),
            timm_model_kwargs=kwargs,
        )  # fmt: skip
        table["text_config"] = {
            "model_type": "llama", "vocab_size": vocabulary, "hidden_size": width, "intermediate_size": ffn,
            "num_hidden_layers": layers, "num_attention_heads": heads, "num_key_value_heads": heads,
        }  # fmt: skip

    def pictures(table: dict[str, Any]) -> None:
        for key in ("tvf_resize_params", "tvf_crop_params", "tvf_normalize_params"):
            table[key] = table[key][: len(towers)]
        for crop, resize in zip(table["tvf_crop_params"], table["tvf_resize_params"], strict=True):
            crop["output_size"] = resize["size"] = [size, size]

    edit_json(folder / "config.json", config)
    edit_json(folder / "preprocessor_config.json", pictures)
    meant = {
        "text.hidden_size": width, "text.num_attention_heads": heads, "text.head_dim": hd,
        "text.num_hidden_layers": layers, "vision.hidden_size": towers[0][0],
        "vision.prefix_tokens": _prefix(towers[0]),
        "vision.image_size": size,
    }  # fmt: skip
    return folder, {"unnorm_key": any_of(rng, "bridge_orig", "toy_arm")}, meant


def _prefix(tower: tuple[int, int, int, int]) -> int:
    return tower[3] + 1 if tower[3] else 0


MAKERS: dict[str, Callable[[Rng, Path], Made]] = {
    "smolvla": smolvla,
    "pi0": lambda rng, to: paligemma("pi0", rng, to),
    "pi05": lambda rng, to: paligemma("pi05", rng, to),
    "pi0_fast": lambda rng, to: paligemma("pi0_fast", rng, to),
    "openvla": openvla,
}


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("family", MAKERS)
def test_sizes_are_found_and_computed(family: str, seed: int, tmp_path: Path) -> None:
    folder, options, meant = MAKERS[family](np.random.default_rng([seed, len(family)]), tmp_path)
    policy = read_policy(str(folder), ReadOptions(**options))
    found = {name: _field(policy.spec, name) for name in meant}
    assert found == meant
    for target, engine in RUNS:
        if get_engine(engine).missing():
            continue
        made = vlac.compile(folder, target, tmp_path / target, goldens=1, **options).path
        assert made is not None
        report = parity(made, engine=engine, threads=1, limits=LIMITS[target])
        assert report["ok"], (target, engine, json.dumps(meant), report["compiler"], report["cost"])


def _field(spec: Any, dotted: str) -> Any:
    for part in dotted.split("."):
        spec = getattr(spec, part)
    return spec
