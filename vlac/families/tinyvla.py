"""TinyVLA (the 13-17M toy of alexansari101/TinyVLA): a ViT, a bidirectional text encoder, and one linear head.

One pass, no sampling, no state. Layout v1 adds the picture's CLS row to the mean of the words; v2 and v3 let the
sentence's CLS word attend to the patches. v3's text decoder does not act on the action and is not compiled.
"""

from __future__ import annotations

from dataclasses import dataclass

from vlac import blocks
from vlac.blocks import Shapes, linear
from vlac.dims import symbol
from vlac.graph import Call, Param, Program, Schedule, Stage, StageBuilder, Symbol, check
from vlac.policy import Policy
from vlac.registry import Family, families
from vlac.spec import EncoderSpec, VisionSpec
from vlac.weights import Weights

NORM_EPS = 1e-5


@dataclass(frozen=True)
class TinyVLASpec:
    """Dimensions. `pooled`: layout v1. `head_hidden`: width between v1's two head layers, else 0."""

    vision: VisionSpec
    language: EncoderSpec
    vocab_size: int
    max_seq_len: int
    tokenizer_max_length: int
    action_dim: int
    pooled: bool = False
    head_hidden: int = 0


def _linear(name: str, rows: int, columns: int) -> Shapes:
    return {f"{name}.weight": (rows, columns), f"{name}.bias": (rows,)}


def _norm(name: str, width: int) -> Shapes:
    return {f"{name}.weight": (width,), f"{name}.bias": (width,)}


def shapes(spec: TinyVLASpec) -> Shapes:
    """Shape of every weight the program reads."""
    v, d = spec.vision, spec.language.hidden_size
    result = _linear("vision.patch_embedding", v.hidden_size, v.num_channels * v.patch_size**2)
    # the class row stands first and has its position in it
    result |= {"vision.class_embedding": (1, v.hidden_size), "vision.position_embedding": (v.grid**2, v.hidden_size)}
    result |= blocks.vit_layers_shapes(v, "vision") | _norm("vision.post_layernorm", v.hidden_size)
    result |= {"text.embed_tokens.weight": (spec.vocab_size, d), "text.position_embedding": (spec.max_seq_len, d)}
    result |= blocks.vit_layers_shapes(spec.language, "text") | _norm("text.norm", d)
    if spec.pooled:
        result |= _linear("connector.fc1", d, v.hidden_size) | _linear("connector.fc2", d, d)
        return (
            result | _linear("head.fc1", spec.head_hidden, d) | _linear("head.fc2", spec.action_dim, spec.head_hidden)
        )
    result |= _linear("connector.proj", d, v.hidden_size) | _norm("connector.norm", d)
    for part in ("q", "k", "v", "out"):
        result |= _linear(f"fusion.{part}_proj", d, d)
    return result | _norm("fusion.norm", d) | _linear("head.fc1", spec.action_dim, d)


def build(policy: Policy) -> Program:
    """`vision` and `policy`, once each. Symbol T: prompt tokens. Result: `actions` f32 [1, action_dim]."""
    spec = policy.spec
    assert isinstance(spec, TinyVLASpec)
    known = shapes(spec)
    return check(
        Program(
            name=policy.family,
            symbols=(Symbol("T", blocks.token_buckets(spec.tokenizer_max_length)),),
            stages=(_vision(spec), _policy(spec)),
            params={name: Param(shape) for name, shape in known.items()},
            schedule=Schedule((Call("vision", each="camera"), Call("policy")), "actions"),
            weights=Weights({name: policy.weights[name] for name in known}),
        )
    )


def _layer_norm(b: StageBuilder, x: str, name: str, as_: str = "") -> str:
    return b.op("layer_norm", x, f"@{name}.weight", f"@{name}.bias", eps=NORM_EPS, name=as_)


def _vision(spec: TinyVLASpec) -> Stage:
    """A picture -> `image_tokens`: what the fusion reads of it, the class row (v1) or every patch."""
    b = StageBuilder("vision")
    v = spec.vision
    pixels = b.input("pixels", "f32", v.num_channels, v.image_size, v.image_size)
    x = linear(b, b.op("patchify", pixels, patch=v.patch_size, block=1), "vision.patch_embedding", bias=True)
    x = b.op("add", x, "@vision.position_embedding")
    x = blocks.vit_layers(b, b.op("concat", "@vision.class_embedding", x, axis=0), v, "vision")
    x = _layer_norm(b, x, "vision.post_layernorm", "vision_features")
    if spec.pooled:
        x = b.op("slice", x, axis=0, start=0, stop=1)
        x = b.op("gelu", linear(b, x, "connector.fc1", bias=True), approximate="none")
        b.output(linear(b, x, "connector.fc2", bias=True, as_="image_tokens"))
        return b.build()
    x = b.op("slice", x, axis=0, start=1, stop=1 + v.grid**2)
    b.output(_layer_norm(b, linear(b, x, "connector.proj", bias=True), "connector.norm", "image_tokens"))
    return b.build()


def _policy(spec: TinyVLASpec) -> Stage:
    """Picture and sentence -> `actions`. Padding is never attended to: the original's single calls have none."""
    b = StageBuilder("policy")
    d, count = spec.language.hidden_size, symbol("T")
    rows = 1 if spec.pooled else spec.vision.grid**2
    tokens, valid = b.input("tokens", "i32", count), b.input("token_valid", "bool", count)
    images = b.input("image_tokens", "f32", rows, d)
    places = b.op("embed", b.op("arange", start=0, stop=count), "@text.position_embedding")
    x = b.op("add", b.op("embed", tokens, "@text.embed_tokens.weight"), places)
    block = blocks.block_ids(b, (count, 0))
    x = blocks.vit_layers(b, x, spec.language, "text", b.op("attention_mask", block, block, valid))
    x = _layer_norm(b, x, "text.norm", "lang_features")
    if spec.pooled:
        fused = b.op("add", _mean(b, x, valid, d), images, name="fused")
        x = b.op("relu", linear(b, fused, "head.fc1", bias=True))
        b.output(linear(b, x, "head.fc2", bias=True, as_="actions"))
        return b.build()
    first = b.op("slice", x, axis=0, start=0, stop=1)
    q = linear(b, first, "fusion.q_proj", bias=True)
    k, v = (linear(b, images, f"fusion.{part}_proj", bias=True) for part in "kv")
    heads = spec.language.num_attention_heads
    h = b.op("attention", q, k, v, heads=heads, kv_heads=heads, scale=(d // heads) ** -0.5)
    fused = b.op("add", first, linear(b, h, "fusion.out_proj", bias=True))
    b.output(linear(b, _layer_norm(b, fused, "fusion.norm", "fused_norm"), "head.fc1", bias=True, as_="actions"))
    return b.build()


def _mean(b: StageBuilder, x: str, valid: str, width: int) -> str:
    """Mean of the valid rows of x [T, width] -> [1, width]: what a query of zeros attends to."""
    nobody = b.op("full", shape=(1, width), value=0.0, dtype="f32")
    one = blocks.block_ids(b, (1, 0))
    mask = b.op("attention_mask", one, blocks.block_ids(b, (symbol("T"), 0)), valid)
    return b.op("attention", nobody, x, x, mask, heads=1, kv_heads=1, scale=1.0)


FAMILY = families.add(
    Family("tinyvla", build, doc="a ViT, a text encoder and one linear head", title="TinyVLA", spec=TinyVLASpec)
)
