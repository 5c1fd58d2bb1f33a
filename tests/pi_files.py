"""pi0 and pi0.5 checkpoints of one layer each, in widths that other engines take."""

from __future__ import annotations

import json
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "scripts"))

import smolvla_checkpoint as maker  # noqa: E402

GOLDEN = ROOT / "tests" / "golden"


@dataclass(frozen=True)
class Widths:
    """Widths of SigLIP, PaliGemma and the expert, and the heads' size; one key/value head."""

    vision: int = 1152
    text: int = 2048
    expert: int = 1024
    head_dim: int = 256
    heads: int = 8


PUBLISHED = Widths()
"""What QVAC's engine has in its code."""

NARROW = Widths(vision=32, text=64, expert=32, head_dim=16, heads=2)
"""vla.cpp's engine reads widths from the file."""


def tensors(kind: str, w: Widths, vocab: int, patches: int, actions: int, states: int) -> dict[str, tuple[int, ...]]:
    """Name -> shape of a checkpoint with one layer each."""
    p = "model.paligemma_with_expert.paligemma.model."
    x = "model.paligemma_with_expert.gemma_expert.model."
    v, t = p + "vision_tower.vision_model.", p + "language_model."
    table: dict[str, tuple[int, ...]] = {
        v + "embeddings.patch_embedding.weight": (w.vision, 3, 14, 14),
        v + "embeddings.patch_embedding.bias": (w.vision,),
        v + "embeddings.position_embedding.weight": (patches, w.vision),
        p + "multi_modal_projector.linear.weight": (w.text, w.vision),
        p + "multi_modal_projector.linear.bias": (w.text,),
        t + "embed_tokens.weight": (vocab, w.text),
    }
    layer = v + "encoder.layers.0."
    linears = {f"{layer}self_attn.{n}_proj": (w.vision, w.vision) for n in ("q", "k", "v", "out")}
    linears |= {f"{layer}mlp.fc1": (64, w.vision), f"{layer}mlp.fc2": (w.vision, 64)}
    for name in (f"{layer}layer_norm1", f"{layer}layer_norm2", f"{v}post_layernorm"):
        table[f"{name}.weight"] = table[f"{name}.bias"] = (w.vision,)
    q, kv = w.heads * w.head_dim, w.head_dim
    for pre, d, ffn in ((t, w.text, 128), (x, w.expert, 96)):
        layer = pre + "layers.0."
        table |= {f"{layer}self_attn.q_proj.weight": (q, d), f"{layer}self_attn.o_proj.weight": (d, q)}
        table |= {f"{layer}self_attn.{n}_proj.weight": (kv, d) for n in "kv"}
        table |= {f"{layer}mlp.{n}_proj.weight": (ffn, d) for n in ("gate", "up")}
        table[f"{layer}mlp.down_proj.weight"] = (d, ffn)
        for name in (f"{layer}input_layernorm", f"{layer}post_attention_layernorm", f"{pre}norm"):
            if pre == x and kind == "pi05":
                linears[f"{name}.dense"] = (3 * d, d)
            else:
                table[f"{name}.weight"] = (d,)
    d = w.expert
    linears |= {"model.action_in_proj": (d, actions), "model.action_out_proj": (actions, d)}
    if kind == "pi05":
        linears |= {"model.time_mlp_in": (d, d), "model.time_mlp_out": (d, d)}
    else:
        linears |= {"model.state_proj": (d, states), "model.action_time_mlp_in": (d, 2 * d)}
        linears |= {"model.action_time_mlp_out": (d, d)}
    for name, shape in linears.items():
        table[f"{name}.weight"], table[f"{name}.bias"] = shape, shape[:1]
    return dict(sorted(table.items()))


def write(
    folder: Path, kind: str = "pi05", widths: Widths = PUBLISHED, seed: int = 1, size: int = 28, **config: Any
) -> Path:
    """A checkpoint of `kind` with seeded weights: the golden one's processors and tokenizer, other tensors."""
    shutil.copytree(GOLDEN / f"{kind}_tiny" / "checkpoint", folder)
    table = json.loads((folder / "config.json").read_text())
    table |= {"image_resolution": [size, size], **config}
    (folder / "config.json").write_text(json.dumps(table))
    vocab = 1 + max(json.loads((folder / "tokenizer" / "tokenizer.json").read_text())["model"]["vocab"].values())
    shapes = tensors(kind, widths, max(vocab, 400), (size // 14) ** 2, table["max_action_dim"], table["max_state_dim"])
    plain = maker.drawn(seed)

    def draw(name: str, shape: tuple[int, ...]) -> Any:
        values = plain(name, shape)
        if "dense" in name:
            return values * 0.3
        if name.endswith("norm.weight") and "vision" not in name:
            return values - 1  # Gemma keeps its norms around zero
        return values * 0.3 if "embed_tokens" in name else values

    maker.write_safetensors(folder / "model.safetensors", shapes, draw)
    return folder
