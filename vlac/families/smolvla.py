"""SmolVLA (Shukor et al. 2025, arXiv 2506.01844): SmolVLM2 backbone, flow-matching action expert with cross-attention.

Spec, shapes and drawing; formulas are LeRobot 0.6's inference path in float32. How a checkpoint becomes the spec
is in vlac/readers/lerobot_smolvla.py.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from vlac import blocks
from vlac.blocks import Shapes
from vlac.dims import Dim, symbol
from vlac.graph import Program, Stage, StageBuilder
from vlac.policy import Policy
from vlac.registry import Family, families
from vlac.spec import DecoderSpec, FlowSpec, VisionSpec

if TYPE_CHECKING:
    from vlac.readers.lerobot import LeRobotCheckpoint


@dataclass(frozen=True)
class SmolVLASpec:
    """Dimensions under LeRobot's and Hugging Face's own names.

    `text` counts the kept VLM layers; `expert` has the same heads and head_dim. Layer i of the expert is a self layer
    (joint attention with the prefix) where `is_self_layer(i)`, else it cross-attends to layer i's keys and values.
    `expert_pairs` says it for each expert layer instead, (VLM layer, "self" or "cross"), when passes have taken layers
    out; `kv_taps` are VLM layers of which only the keys and values are left.
    token_pool, token_weight, token_centres: see blocks_gemma.PaliGemmaSpec.
    Token ids are those of `<fake_token_around_image>` and `<global-img>`, read only with add_image_special_tokens.
    """

    vision: VisionSpec
    text: DecoderSpec
    expert: DecoderSpec
    scale_factor: int
    chunk_size: int
    max_action_dim: int
    max_state_dim: int
    tokenizer_max_length: int
    attention_mode: str = "cross_attn"
    self_attn_every_n_layers: int = 2
    prefix_length: int = -1
    add_image_special_tokens: bool = False
    fake_image_token_id: int = -1
    global_image_token_id: int = -1
    token_pool: int = 1
    token_weight: int = 1
    token_centres: int = 1
    kv_taps: tuple[int, ...] = ()
    expert_pairs: tuple[tuple[int, str], ...] = ()

    @property
    def tokens_per_camera(self) -> int:
        """Image rows of the prefix per camera: what the connector gives, averaged over token_pool x token_pool."""
        return (self.vision.grid // self.scale_factor // self.token_pool) ** 2

    @property
    def prefix_rows(self) -> Dim:
        """Rows of all cameras, the prompt and the state."""
        return symbol("C") * (self.tokens_per_camera + 3 * self.add_image_special_tokens) + symbol("T") + 1

    @property
    def expert_every(self) -> int:
        """The expert has a layer at every VLM layer i that this divides."""
        return self.text.num_hidden_layers // self.expert.num_hidden_layers

    def is_self_layer(self, i: int) -> bool:
        if "cross" not in self.attention_mode:
            return True
        return self.self_attn_every_n_layers > 0 and i % self.self_attn_every_n_layers == 0

    @property
    def pairs(self) -> tuple[tuple[int, str], ...]:
        """For each expert layer the VLM layer whose keys and values it reads, and how: "self" or "cross"."""
        read = range(0, self.text.num_hidden_layers, self.expert_every)
        return self.expert_pairs or tuple((i, "self" if self.is_self_layer(i) else "cross") for i in read)


# --- weights ---------------------------------------------------------------------------------------------------


def shapes(spec: SmolVLASpec) -> Shapes:
    """Shape of every weight the program reads."""
    text, expert, vision = spec.text, spec.expert, spec.vision
    result = blocks.vit_shapes(vision)
    result["connector.proj.weight"] = (text.hidden_size, vision.hidden_size * spec.scale_factor**2)
    result["text.embed_tokens.weight"] = (text.vocab_size, text.hidden_size)
    for i in range(text.num_hidden_layers):
        of_layer = blocks.kv_tap_shapes if i in spec.kv_taps else blocks.decoder_layer_shapes
        result |= of_layer(text, f"text.layers.{i}")
    memory = text.num_key_value_heads * text.head_dim
    for j, (_, kind) in enumerate(spec.pairs):
        width = None if kind == "self" else memory
        result |= blocks.decoder_layer_shapes(expert, f"expert.layers.{j}", width)
    result["expert.norm.weight"] = (expert.hidden_size,)
    result["state_proj.weight"] = (text.hidden_size, spec.max_state_dim)
    result["state_proj.bias"] = (text.hidden_size,)
    return result | blocks.action_shapes(spec.max_action_dim, expert.hidden_size)


# --- drawing ---------------------------------------------------------------------------------------------------


def build(policy: Policy) -> Program:
    """The program: `vision` per camera, `prefix` once, `flow` once per Euler step.

    Symbols: T prompt tokens, C camera slots that take part. Result: x f32 [chunk_size, max_action_dim].
    """
    spec, flow = policy.spec, policy.flow
    assert isinstance(spec, SmolVLASpec) and flow is not None
    return blocks.flow_program(policy, flow, (_vision(spec), _prefix(spec)), *_flow(spec, flow))


def _vision(spec: SmolVLASpec) -> Stage:
    """One camera's pixels -> its tokens, before any scaling."""
    b = StageBuilder("vision")
    side = spec.vision.image_size
    pixels = b.input("pixels", "f32", spec.vision.num_channels, side, side)
    x = blocks.vit_tower(b, pixels, spec.vision)
    pool = spec.token_pool
    x = blocks.shuffle_connector(b, x, spec.scale_factor, as_="image_tokens" if pool == 1 else "")
    b.output(x if pool == 1 else blocks.mean_tokens(b, x, pool, spec.text.hidden_size, as_="image_tokens"))
    return b.build()


def _images(b: StageBuilder, spec: SmolVLASpec) -> tuple[str, str, Dim]:
    """Image part of the prefix: (embeddings, validity, rows). Special tokens count even where a camera is absent."""
    n, d, cameras = spec.tokens_per_camera, spec.text.hidden_size, symbol("C")
    tokens = b.op("scale", b.input("image_tokens", "f32", cameras * n, d), factor=d**0.5)
    given = b.input("image_valid", "bool", cameras)
    valid = b.op("repeat_each", given, times=n)
    if not spec.add_image_special_tokens:
        return tokens, valid, cameras * n

    def special(token_id: int) -> str:  # not scaled by sqrt(d), unlike the prompt
        ids = b.op("full", shape=(1,), value=float(token_id), dtype="i32")
        return b.op("tile", b.op("embed", ids, "@text.embed_tokens.weight"), rows=cameras)

    fake, start = special(spec.fake_image_token_id), special(spec.global_image_token_id)
    images = b.op("reshape", tokens, shape=(cameras, n * d))
    rows = b.op("concat", fake, start, images, fake, axis=1)
    slot = b.op("reshape", b.input("camera_valid", "bool", cameras), shape=(cameras, 1))
    columns = b.op("concat", slot, slot, b.op("reshape", valid, shape=(cameras, n)), slot, axis=1)
    total = cameras * (n + 3)
    return b.op("reshape", rows, shape=(total, d)), b.op("reshape", columns, shape=(total,)), total


def _weigh(b: StageBuilder, mask: str, spec: SmolVLASpec, behind: Dim) -> str:
    """The mask, with the weight of image tokens that stand for several; `behind`: rows after the images."""
    n, cameras, weight = spec.tokens_per_camera, symbol("C"), spec.token_weight
    if weight == 1 or not spec.add_image_special_tokens:
        return blocks.weigh(b, mask, (cameras * n, weight), (behind, 1))
    one = b.op("reshape", blocks.block_ids(b, (2, 1), (n, weight), (1, 1)), shape=(1, n + 3))
    images = b.op("reshape", b.op("tile", one, rows=cameras), shape=(cameras * (n + 3),))
    return b.op("weighted_mask", mask, b.op("concat", images, blocks.block_ids(b, (behind, 1)), axis=0))


def _prefix(spec: SmolVLASpec) -> Stage:
    """Images, prompt and state through the VLM; leaves each layer's rotated keys and values.

    Padding up to `prefix_length` is not drawn: padded rows are masked, come last and do not advance positions, so
    nothing that is read depends on them.
    """
    b = StageBuilder("prefix")
    text, count, rows = spec.text, symbol("T"), spec.prefix_rows
    images, images_valid, image_rows = _images(b, spec)
    tokens = b.input("tokens", "i32", count)
    tokens_valid = b.input("token_valid", "bool", count)
    prompt = b.op("scale", b.op("embed", tokens, "@text.embed_tokens.weight"), factor=text.hidden_size**0.5)
    state = blocks.linear(b, b.input("state", "f32", 1, spec.max_state_dim), "state_proj", bias=True)
    x = b.op("concat", images, prompt, state, axis=0, name="prefix_embeddings")
    one = b.op("full", shape=(1,), value=1.0, dtype="bool")
    valid = b.op("concat", images_valid, tokens_valid, one, axis=0, name="prefix_valid")
    # images and prompt (block 0) do not see the state (block 1); the state sees all
    block = blocks.block_ids(b, (image_rows + count, 0), (1, 1))
    mask = _weigh(b, b.op("attention_mask", block, block, valid), spec, count + 1)
    if spec.token_centres > 1:
        rest = b.op("slice", valid, axis=0, start=image_rows, stop=rows)
        grid = math.isqrt(spec.tokens_per_camera) * spec.token_centres, spec.token_centres
        positions, filled = blocks.centred_positions(b, ("image_valid", symbol("C")), grid, rest)
    else:
        positions, filled = blocks.positions_of(b, valid), blocks.count_valid(b, valid)
    b.output(valid, filled)
    for i in range(text.num_hidden_layers):
        names = (f"prefix_k.{i}", f"prefix_v.{i}")
        if i in spec.kv_taps:
            k, v = blocks.kv_tap(b, x, text, f"text.layers.{i}", positions, names)
        else:
            x, k, v = blocks.decoder_layer(b, x, text, f"text.layers.{i}", positions, mask, kv_names=names)
        b.output(k, v)
    return b.build()


def _flow(spec: SmolVLASpec, flow: FlowSpec) -> tuple[Stage, tuple[tuple[str, str, str], ...]]:
    """One solver step, x at time times[step] -> x_next, and its carries. Actions are causal in self layers."""
    b = StageBuilder("flow")
    text, expert, n = spec.text, spec.expert, spec.chunk_size
    rows = spec.prefix_rows
    kv = text.num_key_value_heads * text.head_dim
    step = b.input("step", "i32", 1)
    x = b.input("x", "f32", n, spec.max_action_dim)
    valid = b.input("prefix_valid", "bool", rows)
    prefix_count = b.input("prefix_count", "i32", 1)
    read = dict.fromkeys(i for i, _ in spec.pairs)
    past = {i: (b.input(f"prefix_k.{i}", "f32", rows, kv), b.input(f"prefix_v.{i}", "f32", rows, kv)) for i in read}
    t = b.op("embed", step, "@flow.times")
    h = blocks.action_time_tokens(b, x, t, n, expert.hidden_size, (flow.min_period, flow.max_period))
    own = b.op("arange", start=0, stop=n)
    causal = b.op("arange", start=1, stop=n + 1)
    prefix_block = blocks.block_ids(b, (rows, 0))
    keys_block = b.op("concat", prefix_block, causal, axis=0)
    keys_valid = b.op("concat", valid, b.op("full", shape=(n,), value=1.0, dtype="bool"), axis=0)
    self_mask = b.op("attention_mask", causal, keys_block, keys_valid, name="self_mask")
    cross_mask = b.op("attention_mask", causal, prefix_block, valid, name="cross_mask")
    self_mask = _weigh(b, self_mask, spec, symbol("T") + 1 + n)
    cross_mask = _weigh(b, cross_mask, spec, symbol("T") + 1)
    behind = b.op("add", own, prefix_count)
    for j, (i, kind) in enumerate(spec.pairs):
        name = f"expert.layers.{j}"
        if kind == "self":
            h, _, _ = blocks.decoder_layer(b, h, expert, name, behind, self_mask, past[i])
        else:
            h = blocks.cross_layer(b, h, expert, name, own, cross_mask, past[i])
    h = blocks.rms_norm(b, h, expert, "expert.norm")
    velocity = blocks.linear(b, h, "action_out_proj", bias=True, as_="velocity")
    carry = blocks.sampler_step(b, x, velocity, step, flow, (n, spec.max_action_dim))
    return b.build(), carry


def from_lerobot(checkpoint: LeRobotCheckpoint) -> Policy:
    """The Policy of an opened LeRobot checkpoint of type "smolvla"."""
    from vlac.readers.lerobot_smolvla import read_policy  # it reads the spec and the shapes above

    return read_policy(checkpoint)


FAMILY = families.add(
    Family("smolvla", build, from_lerobot, "SmolVLM2 with a flow-matching action expert", "SmolVLA", SmolVLASpec)
)
