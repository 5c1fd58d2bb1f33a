"""What policies on PaliGemma share: vision stage, prefix stage, joint and adaRMS expert layers.

Weights are named vision.*, connector.proj.*, text.*, expert.*; blocks.py has the layers below these. Gemma's RMSNorm
multiplies by 1 + w: that sum is made when the checkpoint is read, so norms here are plain.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

from vlac import blocks
from vlac.blocks import Shapes, linear
from vlac.dims import Dim, symbol
from vlac.graph import Stage, StageBuilder
from vlac.spec import DecoderSpec, VisionSpec

Carry = tuple[tuple[str, str, str], ...]


@dataclass(frozen=True, kw_only=True)
class PaliGemmaSpec:
    """Dimensions of the part that every policy on PaliGemma has.

    token_pool: image tokens are averaged over token_pool x token_pool; each weighs token_weight keys in attention;
    with token_centres r > 1 it has the position of the middle of r x r older ones. kv_taps: layers of which only keys
    and values are left, for an expert that reads them. All of these are what passes change.
    """

    vision: VisionSpec
    text: DecoderSpec
    tokenizer_max_length: int
    token_pool: int = 1
    token_weight: int = 1
    token_centres: int = 1
    kv_taps: tuple[int, ...] = ()

    @property
    def tokens_per_camera(self) -> int:
        """Image rows of the prefix per camera."""
        return (self.vision.grid // self.token_pool) ** 2

    @property
    def prefix_rows(self) -> Dim:
        """Rows of all cameras and the prompt."""
        return symbol("C") * self.tokens_per_camera + symbol("T")

    def key_counts(self, rows: Dim) -> tuple[tuple[Dim, int], ...]:
        """How many keys each of `rows` rows stands for, images first: runs for `blocks.weigh`."""
        images = symbol("C") * self.tokens_per_camera
        return (images, self.token_weight), (rows - images, 1)


@dataclass(frozen=True, kw_only=True)
class FlowExpertSpec(PaliGemmaSpec):
    """PaliGemma with an expert that has its layers, heads and head_dim; only the widths differ. chunk_size actions of
    max_action_dim numbers."""

    expert: DecoderSpec
    chunk_size: int
    max_action_dim: int

    @property
    def pairs(self) -> tuple[tuple[int, str], ...]:
        """For each expert layer the PaliGemma layer whose keys and values it reads, beside its own."""
        return tuple((i, "self") for i in range(self.expert.num_hidden_layers))


def paligemma_shapes(spec: PaliGemmaSpec) -> Shapes:
    """Weights of the tower, the projector, the embedding and the decoder's layers."""
    vision, text = spec.vision, spec.text
    result = blocks.vit_shapes(vision)
    result["connector.proj.weight"] = (text.hidden_size, vision.hidden_size)
    result["connector.proj.bias"] = (text.hidden_size,)
    result["text.embed_tokens.weight"] = (text.vocab_size, text.hidden_size)
    for i in range(text.num_hidden_layers):
        of_layer = blocks.kv_tap_shapes if i in spec.kv_taps else blocks.decoder_layer_shapes
        result |= of_layer(text, f"text.layers.{i}")
    return result


def vision_stage(spec: PaliGemmaSpec) -> Stage:
    """One camera's pixels -> its tokens [tokens_per_camera, text width]; not scaled, unlike the prompt's."""
    b = StageBuilder("vision")
    vision, pool = spec.vision, spec.token_pool
    x = blocks.vit_tower(b, b.input("pixels", "f32", vision.num_channels, *[vision.image_size] * 2), vision)
    x = linear(b, x, "connector.proj", bias=True, as_="image_tokens" if pool == 1 else "")
    b.output(x if pool == 1 else blocks.mean_tokens(b, x, pool, spec.text.hidden_size, as_="image_tokens"))
    return b.build()


def scaled_embedding(b: StageBuilder, tokens: str, text: DecoderSpec) -> str:
    """Gemma's token embedding: rows of the table times sqrt(hidden_size)."""
    return b.op("scale", b.op("embed", tokens, "@text.embed_tokens.weight"), factor=text.hidden_size**0.5)


def image_and_prompt(b: StageBuilder, spec: PaliGemmaSpec, more: tuple[tuple[str, str], ...] = ()) -> tuple[str, str]:
    """(embeddings, validity) of all cameras' tokens, then the prompt's, then `more`; adds the stage's inputs."""
    n, cameras, count = spec.tokens_per_camera, symbol("C"), symbol("T")
    images = b.input("image_tokens", "f32", cameras * n, spec.text.hidden_size)
    images_valid = b.op("repeat_each", b.input("image_valid", "bool", cameras), times=n)
    prompt = scaled_embedding(b, b.input("tokens", "i32", count), spec.text)
    prompt_valid = b.input("token_valid", "bool", count)
    x = b.op("concat", images, prompt, *(row for row, _ in more), axis=0, name="prefix_embeddings")
    return x, b.op("concat", images_valid, prompt_valid, *(v for _, v in more), axis=0, name="prefix_valid")


def places(b: StageBuilder, valid: str, rows: Dim, spec: PaliGemmaSpec) -> tuple[str, str]:
    """(positions of the prefix's rows, how many positions there are)."""
    if spec.token_centres == 1:
        return blocks.positions_of(b, valid), blocks.count_valid(b, valid)
    images = symbol("C") * spec.tokens_per_camera
    rest = b.op("slice", valid, axis=0, start=images, stop=rows)
    side = math.isqrt(spec.tokens_per_camera) * spec.token_centres
    cameras = ("image_valid", symbol("C"))
    return blocks.centred_positions(b, cameras, (side, spec.token_centres), rest)


def prefix_layers(b: StageBuilder, x: str, valid: str, rows: Dim, spec: PaliGemmaSpec, positions: str) -> str:
    """PaliGemma's layers on rows that all see all; each layer's rotated keys and values leave the stage."""
    block = blocks.block_ids(b, (rows, 0))
    mask = blocks.weigh(b, b.op("attention_mask", block, block, valid), *spec.key_counts(rows))
    for i in range(spec.text.num_hidden_layers):
        name, names = f"text.layers.{i}", (f"prefix_k.{i}", f"prefix_v.{i}")
        if i in spec.kv_taps:
            k, v = blocks.kv_tap(b, x, spec.text, name, positions, names)
        else:
            x, k, v = blocks.decoder_layer(b, x, spec.text, name, positions, mask, kv_names=names)
        b.output(k, v)
    return x


def prefix_stage(spec: PaliGemmaSpec) -> Stage:
    """Images and prompt through PaliGemma, for an expert that reads its keys and values."""
    b = StageBuilder("prefix")
    x, valid = image_and_prompt(b, spec)
    positions, count = places(b, valid, spec.prefix_rows, spec)
    b.output(valid, count)
    prefix_layers(b, x, valid, spec.prefix_rows, spec, positions)
    return b.build()


def flow_stages(spec: PaliGemmaSpec) -> tuple[Stage, Stage]:
    """The stages before a flow: vision and prefix."""
    return vision_stage(spec), prefix_stage(spec)


@dataclass(frozen=True)
class Past:
    """What a stage after the prefix reads of it: each layer's keys and values, and how many rows are valid."""

    layers: tuple[tuple[str, str], ...]
    valid: str
    count: str
    rows: Dim
    key_counts: tuple[tuple[Dim, int], ...]

    @staticmethod
    def of(b: StageBuilder, spec: FlowExpertSpec) -> Past:
        """Adds the inputs prefix_valid, prefix_count, prefix_k.{i}, prefix_v.{i}."""
        rows, width = spec.prefix_rows, spec.text.num_key_value_heads * spec.text.head_dim
        valid, count = b.input("prefix_valid", "bool", rows), b.input("prefix_count", "i32", 1)
        layers = tuple(
            (b.input(f"prefix_k.{i}", "f32", rows, width), b.input(f"prefix_v.{i}", "f32", rows, width))
            for i, _ in spec.pairs
        )
        return Past(layers, valid, count, rows, spec.key_counts(rows))

    def joined(self, b: StageBuilder, runs: Iterable[tuple[int, int]]) -> tuple[str, str]:
        """(positions, mask) of rows behind the prefix, given as (rows, block) runs; a row sees blocks up to its own."""
        runs = tuple(runs)
        own, n = blocks.block_ids(b, *runs), sum(rows for rows, _ in runs)
        keys = b.op("concat", blocks.block_ids(b, (self.rows, 0)), own, axis=0)
        valid = b.op("concat", self.valid, b.op("full", shape=(n,), value=1.0, dtype="bool"), axis=0)
        mask = b.op("attention_mask", own, keys, valid, name="joint_mask")
        mask = blocks.weigh(b, mask, *self.key_counts, (n, 1))
        return b.op("add", b.op("arange", start=0, stop=n), self.count, name="behind"), mask


# --- adaRMS ----------------------------------------------------------------------------------------------------


def ada_rms_norm(b: StageBuilder, x: str, condition: str, spec: DecoderSpec, name: str) -> tuple[str, str]:
    """(rms(x) * (1 + scale) + shift, gate); scale, shift, gate [1, D] are thirds of `{name}.dense` of the condition."""
    d = spec.hidden_size
    both = linear(b, condition, f"{name}.dense", bias=True)
    scale, shift, gate = (
        b.op("slice", both, axis=1, start=i * d, stop=(i + 1) * d, name=f"{name}.{part}")
        for i, part in enumerate(("scale", "shift", "gate"))
    )
    one = b.op("full", shape=(1, d), value=1.0, dtype="f32")
    factor = b.op("add", scale, one, name=f"{name}.factor")
    x = b.op("mul", b.op("rms_norm", x, eps=spec.rms_norm_eps), factor)
    return b.op("add", x, shift), gate


def ada_layer(
    b: StageBuilder,
    x: str,
    condition: str,
    spec: DecoderSpec,
    name: str,
    positions: str,
    mask: str,
    past: tuple[str, str],
) -> str:
    """A decoder layer with adaRMS norms: each half adds gate * sublayer(norm(x))."""
    h, gate = ada_rms_norm(b, x, condition, spec, f"{name}.input_layernorm")
    q, k = (blocks.rotary(b, linear(b, h, f"{name}.self_attn.{p}_proj"), positions, spec) for p in "qk")
    v = linear(b, h, f"{name}.self_attn.v_proj")
    keys, values = (b.op("concat", before, own, axis=0) for before, own in zip(past, (k, v), strict=True))
    h = linear(b, blocks.attend(b, q, keys, values, mask, spec), f"{name}.self_attn.o_proj")
    x = b.op("add", x, b.op("mul", h, gate))
    h, gate = ada_rms_norm(b, x, condition, spec, f"{name}.post_attention_layernorm")
    return b.op("add", x, b.op("mul", blocks.gated_mlp(b, h, spec, f"{name}.mlp"), gate), name=f"{name}.hidden")


def ada_layer_shapes(spec: DecoderSpec, name: str) -> Shapes:
    """Weights of `ada_layer`."""
    result = blocks.decoder_layer_shapes(spec, name)
    for norm in ("input_layernorm", "post_attention_layernorm"):
        del result[f"{name}.{norm}.weight"]
        result |= ada_norm_shapes(spec, f"{name}.{norm}")
    return result


def ada_norm_shapes(spec: DecoderSpec, name: str) -> Shapes:
    """Weights of `ada_rms_norm`."""
    return {
        f"{name}.dense.weight": (3 * spec.hidden_size, spec.hidden_size),
        f"{name}.dense.bias": (3 * spec.hidden_size,),
    }
