"""Qwen3-VL's towers and the DiT flow head, drawn with ops that exist: tables of rotations, modulated norms.

Rotations by several coordinates (rows and columns of a picture; time, height and width of a token) depend on nothing
but the row, so they are tables `{name}.cos` and `{name}.sin` [rows, head_dim / 2], made when the checkpoint is read.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from vlac import blocks
from vlac.blocks import Shapes, linear
from vlac.dims import Dim
from vlac.graph import StageBuilder
from vlac.spec import DecoderSpec, EncoderSpec, VisionSpec
from vlac.weights import Array


@dataclass(frozen=True)
class QwenVisionSpec(VisionSpec):
    """Qwen3-VL's ViT: 2 x 2 patches become one row; `deepstack` names layers whose output is merged as well.

    position_rule "merged": positions and rotations are tables of this grid, block of merged patches by block.
    """

    position_rule: str = "merged"
    merge: int = 2
    deepstack: tuple[int, ...] = ()

    @property
    def rows(self) -> int:
        """Rows that one picture gives the language model."""
        return (self.grid // self.merge) ** 2


@dataclass(frozen=True)
class DiTSpec:
    """Transformer blocks whose norms are modulated by the time; even ones attend to the VLM, odd ones to themselves.

    Of the even ones every `text_every`-th attends to words, the others to pictures.
    """

    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    memory_size: int
    output_size: int
    time_size: int
    text_every: int = 2


def norm_shapes(name: str, width: int) -> Shapes:
    """Weight and bias of a LayerNorm."""
    return {f"{name}.weight": (width,), f"{name}.bias": (width,)}


def linear_shapes(name: str, rows: int, columns: int, bias: bool = True) -> Shapes:
    """Weight of a linear layer, and its bias."""
    return {f"{name}.weight": (rows, columns)} | ({f"{name}.bias": (rows,)} if bias else {})


# --- rotations -------------------------------------------------------------------------------------------------


def frequencies(size: int, base: float) -> Array:
    """base^(-2k/size), k = 0 .. size/2 - 1, rounded to float32 where the original rounds."""
    exponent = np.arange(0, size, 2, dtype=np.float32) / np.float32(size)
    return np.asarray(1.0 / np.power(np.float32(base), exponent, dtype=np.float32), dtype=np.float32)


def rotate(b: StageBuilder, x: str, rows: Dim, heads: int, head_dim: int, table: str) -> str:
    """Half-split rotation by `table` of x [rows * heads, head_dim], one head per row -> [rows, heads * head_dim]."""
    half = head_dim // 2
    index = b.op("repeat_each", b.op("arange", start=0, stop=rows), times=heads)
    cos, sin = (b.op("embed", index, f"@{table}.{part}") for part in ("cos", "sin"))
    x1, x2 = (b.op("slice", x, axis=1, start=i * half, stop=(i + 1) * half) for i in (0, 1))
    first = b.op("sub", b.op("mul", x1, cos), b.op("mul", x2, sin))
    second = b.op("add", b.op("mul", x2, cos), b.op("mul", x1, sin))
    return b.op("reshape", b.op("concat", first, second, axis=1), shape=(rows, heads * head_dim))


def heads_as_rows(b: StageBuilder, x: str, rows: Dim, heads: int, head_dim: int) -> str:
    """[rows, heads * head_dim] -> [rows * heads, head_dim]."""
    return b.op("reshape", x, shape=(rows * heads, head_dim))


# --- vision ----------------------------------------------------------------------------------------------------


def _norm(b: StageBuilder, x: str, name: str, eps: float) -> str:
    return b.op("layer_norm", x, f"@{name}.weight", f"@{name}.bias", eps=eps)


def vision_tower(b: StageBuilder, pixels: str, spec: QwenVisionSpec, name: str = "vision") -> tuple[str, ...]:
    """A picture -> (`image_tokens`, `deepstack.0`, ...), each [spec.rows, width of the language model]."""
    x = linear(
        b, b.op("patchify", pixels, patch=spec.patch_size, block=spec.merge), f"{name}.patch_embedding", bias=True
    )
    x = b.op("add", x, f"@{name}.position_embedding")
    rows, heads = spec.grid**2, spec.num_attention_heads
    d = spec.hidden_size // heads
    features = []
    for i in range(spec.num_hidden_layers):
        layer = f"{name}.layers.{i}"
        h = _norm(b, x, f"{layer}.layer_norm1", spec.layer_norm_eps)
        q, k, v = (linear(b, h, f"{layer}.self_attn.{p}_proj", bias=True) for p in "qkv")
        q, k = (rotate(b, heads_as_rows(b, t, rows, heads, d), rows, heads, d, f"{name}.rotation") for t in (q, k))
        h = b.op("attention", q, k, v, heads=heads, kv_heads=heads, scale=d**-0.5, name=f"{layer}.attended")
        x = b.op("add", x, linear(b, h, f"{layer}.self_attn.out_proj", bias=True))
        h = linear(b, _norm(b, x, f"{layer}.layer_norm2", spec.layer_norm_eps), f"{layer}.mlp.fc1", bias=True)
        h = linear(b, blocks.activation(b, h, spec.hidden_act), f"{layer}.mlp.fc2", bias=True)
        x = b.op("add", x, h, name=f"{layer}.hidden")
        if i in spec.deepstack:
            j = spec.deepstack.index(i)
            h = b.op("reshape", x, shape=(spec.rows, spec.merge**2 * spec.hidden_size))
            h = _norm(b, h, f"connector.deepstack.{j}.norm", spec.layer_norm_eps)
            features.append(_merged(b, h, f"connector.deepstack.{j}", f"deepstack.{j}"))
    h = _norm(b, x, "connector.norm", spec.layer_norm_eps)
    h = b.op("reshape", h, shape=(spec.rows, spec.merge**2 * spec.hidden_size))
    return (_merged(b, h, "connector", "image_tokens"), *features)


def _merged(b: StageBuilder, x: str, name: str, as_: str) -> str:
    x = b.op("gelu", linear(b, x, f"{name}.fc1", bias=True), approximate="none")
    return linear(b, x, f"{name}.fc2", bias=True, as_=as_)


def vision_shapes(spec: QwenVisionSpec, width: int, name: str = "vision") -> Shapes:
    """Weights of `vision_tower`; `width` is the language model's."""
    d, rows = spec.hidden_size, spec.grid**2
    merged = spec.merge**2 * d
    result = linear_shapes(f"{name}.patch_embedding", d, spec.num_channels * spec.patch_size**2)
    result |= {f"{name}.position_embedding": (rows, d)} | blocks.vit_layers_shapes(spec, name)
    for part in ("cos", "sin"):
        result[f"{name}.rotation.{part}"] = (rows, d // spec.num_attention_heads // 2)
    for merger, normed in (
        ("connector", d),
        *((f"connector.deepstack.{j}", merged) for j in range(len(spec.deepstack))),
    ):
        result |= norm_shapes(f"{merger}.norm", normed) | linear_shapes(f"{merger}.fc1", merged, merged)
        result |= linear_shapes(f"{merger}.fc2", width, merged)
    return result


# --- language --------------------------------------------------------------------------------------------------


def text_layer(b: StageBuilder, x: str, spec: DecoderSpec, name: str, rows: Dim, mask: str) -> str:
    """Qwen3's decoder layer: queries and keys are normalised per head, then rotated by table `text.rotation`."""
    h = blocks.rms_norm(b, x, spec, f"{name}.input_layernorm")
    turned = []
    for part, heads in (("q", spec.num_attention_heads), ("k", spec.num_key_value_heads)):
        t = heads_as_rows(b, linear(b, h, f"{name}.self_attn.{part}_proj"), rows, heads, spec.head_dim)
        t = blocks.rms_norm(b, t, spec, f"{name}.self_attn.{part}_norm")
        turned.append(rotate(b, t, rows, heads, spec.head_dim, "text.rotation"))
    h = blocks.attend(b, turned[0], turned[1], linear(b, h, f"{name}.self_attn.v_proj"), mask, spec)
    x = b.op("add", x, linear(b, h, f"{name}.self_attn.o_proj"))
    h = blocks.gated_mlp(b, blocks.rms_norm(b, x, spec, f"{name}.post_attention_layernorm"), spec, f"{name}.mlp")
    return b.op("add", x, h, name=f"{name}.hidden")


def text_layer_shapes(spec: DecoderSpec, name: str) -> Shapes:
    """Weights of `text_layer`, but the rotation's."""
    per_head = {f"{name}.self_attn.{part}_norm.weight": (spec.head_dim,) for part in "qk"}
    return blocks.decoder_layer_shapes(spec, name) | per_head


# --- DiT -------------------------------------------------------------------------------------------------------


def _modulated(
    b: StageBuilder, x: str, condition: str, name: str, width: int, order: tuple[int, int], eps: float
) -> str:
    """norm(x) * (1 + scale) + shift; `order`: which halves of `{name}` of the condition are scale and shift."""
    both = linear(b, condition, name, bias=True)
    scale, shift = (b.op("slice", both, axis=1, start=i * width, stop=(i + 1) * width) for i in order)
    factor = b.op("add", scale, b.op("full", shape=(1, width), value=1.0, dtype="f32"))
    return b.op("add", b.op("mul", b.op("layer_norm", x, eps=eps), factor), shift)


def dit(b: StageBuilder, x: str, time: str, memory: str, masks: tuple[str, str], spec: DiTSpec, name: str) -> str:
    """x [rows, hidden] -> [rows, output_size]. time [1, time_size]: sinusoids of this step; masks: [rows, memory rows]
    of words and of pictures."""
    width, heads = spec.hidden_size, spec.num_attention_heads
    hidden = b.op("silu", linear(b, time, f"{name}.time.fc1", bias=True))
    condition = b.op("silu", linear(b, hidden, f"{name}.time.fc2", bias=True))
    for i in range(spec.num_hidden_layers):
        layer = f"{name}.layers.{i}"
        h = _modulated(b, x, condition, f"{layer}.modulation", width, (0, 1), 1e-5)
        source = h if i % 2 else memory
        q = linear(b, h, f"{layer}.self_attn.q_proj", bias=True)
        k, v = (linear(b, source, f"{layer}.self_attn.{p}_proj", bias=True) for p in "kv")
        mask = () if i % 2 else (masks[0 if i % (2 * spec.text_every) == 0 else 1],)
        h = b.op("attention", q, k, v, *mask, heads=heads, kv_heads=heads, scale=(width // heads) ** -0.5)
        x = b.op("add", x, linear(b, h, f"{layer}.self_attn.out_proj", bias=True))
        h = linear(b, b.op("layer_norm", x, eps=1e-5), f"{layer}.mlp.fc1", bias=True)
        h = linear(b, b.op("gelu", h, approximate="tanh"), f"{layer}.mlp.fc2", bias=True)
        x = b.op("add", x, h, name=f"{layer}.hidden")
    x = _modulated(b, x, condition, f"{name}.out_modulation", width, (1, 0), 1e-6)
    return linear(b, x, f"{name}.out_proj", bias=True)


def dit_shapes(spec: DiTSpec, name: str) -> Shapes:
    """Weights of `dit`."""
    d, encoder = spec.hidden_size, EncoderSpec(spec.hidden_size, spec.intermediate_size, 1, spec.num_attention_heads)
    result = linear_shapes(f"{name}.time.fc1", d, spec.time_size) | linear_shapes(f"{name}.time.fc2", d, d)
    for i in range(spec.num_hidden_layers):
        layer = f"{name}.layers.{i}"
        plain = blocks.vit_layers_shapes(encoder, "")
        result |= {f"{layer}{n.removeprefix('.layers.0')}": s for n, s in plain.items() if "layer_norm" not in n}
        result |= linear_shapes(f"{layer}.modulation", 2 * d, d)
        for part in "kv" if i % 2 == 0 else "":
            result[f"{layer}.self_attn.{part}_proj.weight"] = (d, spec.memory_size)
    result |= linear_shapes(f"{name}.out_modulation", 2 * d, d)
    return result | linear_shapes(f"{name}.out_proj", spec.output_size, d)
