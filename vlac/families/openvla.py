"""OpenVLA (Kim et al. 2024, arXiv 2406.09246): fused DINOv2 and SigLIP towers, Llama decoder, actions as greedy tokens.

OpenVLA-OFT (Kim et al. 2025, arXiv 2502.19645) is the same network read once, bidirectionally, with an L1 head or the
argmax of every action's position. How tokens become numbers is a step of the runtime (`token_bins`), so other
discretised decoders (RT-2's cells, any table of ids, argmax over the bins only) are `BinsSpec` options.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass, field

from vlac import blocks, blocks_decode, blocks_heads, blocks_timm
from vlac.blocks import Shapes, linear
from vlac.blocks_decode import BinsSpec
from vlac.blocks_timm import TowerSpec, linear_shapes
from vlac.dims import Dim, symbol
from vlac.graph import Call, Param, Program, Repeat, Schedule, Stage, StageBuilder, Symbol, check
from vlac.policy import Policy
from vlac.registry import Family, families
from vlac.spec import DecoderSpec
from vlac.weights import Weights


@dataclass(frozen=True)
class OpenVLASpec:
    """Dimensions. `fused` is the second tower, if there is one; both see the same picture and have one patch grid.

    parallel: OpenVLA-OFT. `proprio_dim` 0 = the network reads no state; `head_blocks` -1 = no L1 head, else its
    residual blocks. token_pool, token_weight, token_centres: see blocks_gemma.PaliGemmaSpec.
    """

    vision: TowerSpec
    fused: TowerSpec | None
    text: DecoderSpec
    action_dim: int
    bins: BinsSpec = field(default_factory=BinsSpec)
    tokenizer_max_length: int = 64
    end_token_id: int = 2
    parallel: bool = False
    chunk_size: int = 1
    num_images_in_input: int = 1
    proprio_dim: int = 0
    head_blocks: int = -1
    action_bounds: str = "q99"
    token_pool: int = 1
    token_weight: int = 1
    token_centres: int = 1

    @property
    def towers(self) -> tuple[TowerSpec, ...]:
        return (self.vision,) if self.fused is None else (self.vision, self.fused)

    @property
    def image_rows(self) -> int:
        """Rows that all pictures together give the decoder."""
        return self.num_images_in_input * self.tokens_per_camera

    @property
    def tokens_per_camera(self) -> int:
        """Rows of one picture."""
        return (self.vision.grid // self.token_pool) ** 2

    def key_counts(self, rows: Dim) -> tuple[tuple[Dim, int], ...]:
        """How many keys each of `rows` rows stands for: the first token, pictures, the others."""
        return (1, 1), (self.image_rows, self.token_weight), (rows - self.image_rows - 1, 1)

    @property
    def missing_rows(self) -> int:
        """Positions that pooling leaves out."""
        return self.image_rows * (self.token_centres**2 - 1)

    @property
    def prompt_rows(self) -> Dim:
        """Pictures and prompt tokens."""
        return symbol("T") + self.image_rows


# --- weights ---------------------------------------------------------------------------------------------------


def shapes(spec: OpenVLASpec) -> Shapes:
    """Shape of every weight the program reads."""
    d, width = spec.text.hidden_size, sum(t.hidden_size for t in spec.towers)
    result = blocks_timm.towers_shapes(spec.towers, "vision.towers")
    hidden = [width, 4 * width, d, d] if spec.fused else [width, d, d]
    for i, (columns, rows) in enumerate(itertools.pairwise(hidden), 1):
        result |= linear_shapes(f"connector.fc{i}", rows, columns)
    result["text.embed_tokens.weight"] = (spec.text.vocab_size, d)
    for i in range(spec.text.num_hidden_layers):
        result |= blocks.decoder_layer_shapes(spec.text, f"text.layers.{i}")
    result["text.norm.weight"] = (d,)
    if spec.proprio_dim:
        result |= blocks_heads.state_token_shapes(spec.proprio_dim, d)
    if spec.head_blocks < 0:
        result["text.lm_head.weight"] = (spec.bins.count if spec.bins.restricted else spec.text.vocab_size, d)
        return result
    return result | blocks_heads.l1_head_shapes(spec.action_dim, d, spec.head_blocks)


# --- drawing ---------------------------------------------------------------------------------------------------


def build(policy: Policy) -> Program:
    """`vision` per picture; then `prefill` once and `decode` per token, or `policy` once (OpenVLA-OFT).

    Symbol T: prompt tokens. Result: `action_tokens` i32, or `actions` f32 [chunk_size, action_dim].
    """
    spec = policy.spec
    assert isinstance(spec, OpenVLASpec)
    if spec.parallel:
        stages: tuple[Stage, ...] = (_vision(spec), _policy(spec))
        steps: tuple[Call | Repeat, ...] = (Call("vision", each="camera"), Call("policy"))
    else:
        stages = (_vision(spec), _prefill(spec), _decode(spec))
        turns = spec.chunk_size * spec.action_dim
        loop = blocks_decode.decoding_loop(turns, spec.text.num_hidden_layers, collect=(("logits", "step_logits"),))
        steps = (Call("vision", each="camera"), Call("prefill"), loop)
    known = shapes(spec)
    return check(
        Program(
            name=policy.family,
            symbols=(Symbol("T", blocks.token_buckets(spec.tokenizer_max_length)),),
            stages=stages,
            params={name: Param(shape) for name, shape in known.items()},
            schedule=Schedule(steps, "actions" if spec.head_blocks >= 0 else "action_tokens"),
            weights=Weights({name: policy.weights[name] for name in known}),
        )
    )


def _vision(spec: OpenVLASpec) -> Stage:
    """One picture, normalised for each tower (channels 3i to 3i+2 for tower i) -> its rows for the decoder."""
    b = StageBuilder("vision")
    side = spec.vision.image_size
    pixels = b.input("pixels", "f32", spec.vision.num_channels * len(spec.towers), side, side)
    x = blocks_timm.towers(b, pixels, spec.towers, "vision.towers")
    last = 3 if spec.fused else 2
    for i in range(1, last):
        x = b.op("gelu", linear(b, x, f"connector.fc{i}", bias=True), approximate="none")
    pool = spec.token_pool
    x = linear(b, x, f"connector.fc{last}", bias=True, as_="image_tokens" if pool == 1 else "")
    b.output(x if pool == 1 else blocks.mean_tokens(b, x, pool, spec.text.hidden_size, as_="image_tokens"))
    return b.build()


def _centred(b: StageBuilder, positions: str, rows: Dim, spec: OpenVLASpec) -> str:
    """Positions as they were before pooling, if the policy keeps them: a block has that of its middle."""
    if spec.token_centres == 1:
        return positions

    def plus(value: str, by: int) -> str:
        return b.op("add", value, b.op("full", shape=(1,), value=float(by), dtype="i32"))

    side = math.isqrt(spec.tokens_per_camera) * spec.token_centres
    table = blocks.block_centres(b, side, spec.token_centres)
    pictures = [plus(table, 1 + i * side**2) for i in range(spec.num_images_in_input)]
    end = 1 + spec.image_rows
    first, rest = (b.op("slice", positions, axis=0, start=i, stop=j) for i, j in ((0, 1), (end, rows)))
    return b.op("concat", first, *pictures, plus(rest, spec.missing_rows), axis=0)


def _prompt(b: StageBuilder, spec: OpenVLASpec, more: tuple[str, ...] = ()) -> tuple[str, str, str, str]:
    """(tokens, their validity, embeddings, validity of those): the first token, pictures, `more`, the other tokens."""
    count = symbol("T")
    tokens, valid = b.input("tokens", "i32", count), b.input("token_valid", "bool", count)
    images = b.input("image_tokens", "f32", spec.image_rows, spec.text.hidden_size)
    embedded = b.op("embed", tokens, "@text.embed_tokens.weight")
    first, rest = (b.op("slice", embedded, axis=0, start=i, stop=j) for i, j in ((0, 1), (1, count)))
    x = b.op("concat", first, images, *more, rest, axis=0, name="prompt_embeddings")
    return tokens, valid, x, b.op("full", shape=(1 + spec.image_rows + len(more),), value=1.0, dtype="bool")


def _prefill(spec: OpenVLASpec) -> Stage:
    """Pictures and prompt through the decoder, causally; leaves keys and values, and where decoding starts."""
    b = StageBuilder("prefill")
    tokens, valid, x, front = _prompt(b, spec)
    count, rows = symbol("T"), spec.prompt_rows
    order = b.op("arange", start=0, stop=rows)
    real = b.op("concat", front, b.op("slice", valid, axis=0, start=1, stop=count), axis=0)
    mask = blocks.weigh(b, b.op("attention_mask", order, order, real), *spec.key_counts(rows))
    order = _centred(b, order, rows, spec)
    b.output(*blocks_decode.last_token(b, tokens, valid, before=spec.image_rows + spec.missing_rows))
    b.output(b.op("concat", front, blocks_decode.without_last(b, valid, 1, count), axis=0, name="prompt_valid"))
    b.output(blocks_decode.empty_cache(b, spec.chunk_size * spec.action_dim, spec.text))
    for i in range(spec.text.num_hidden_layers):
        names = (f"prefix_k.{i}", f"prefix_v.{i}")
        x, *_ = blocks.decoder_layer(b, x, spec.text, f"text.layers.{i}", order, mask, kv_names=names)
        b.output(*names)
    return b.build()


def _decode(spec: OpenVLASpec) -> Stage:
    """One token in, the next one and its logits out."""
    b = StageBuilder("decode")
    turn, token = b.input("turn", "i32", 1), b.input("token", "i32", 1)
    x = b.op("embed", token, "@text.embed_tokens.weight")
    turns = spec.chunk_size * spec.action_dim
    rows = spec.prompt_rows
    x = blocks_decode.decoder_turn(b, x, turn, turns, rows, spec.text, "text", spec.key_counts(rows))
    b.output(blocks_decode.choose(b, x, 1, spec.text, spec.bins, "next_token"), "logits")
    return b.build()


def _policy(spec: OpenVLASpec) -> Stage:
    """OpenVLA-OFT: one bidirectional pass; row i of the actions is read where token i - 1 stands.

    Sequence: prompt with pictures (and state), zeros in place of the action tokens, the end token. The prompt's last
    token is put behind the padding, so that its row has a fixed place; rows know their order by position only.
    """
    b = StageBuilder("policy")
    d, count, actions = spec.text.hidden_size, symbol("T"), spec.chunk_size * spec.action_dim
    more = (blocks_heads.state_token(b, spec.proprio_dim),) if spec.proprio_dim else ()
    tokens, valid, prompt, front = _prompt(b, spec, more)
    token, _ = blocks_decode.last_token(b, tokens, valid)
    last = b.op("embed", token, "@text.embed_tokens.weight")
    zeros = b.op("full", shape=(actions, d), value=0.0, dtype="f32")
    end = b.op("full", shape=(1,), value=float(spec.end_token_id), dtype="i32")
    x = b.op("concat", prompt, last, zeros, b.op("embed", end, "@text.embed_tokens.weight"), axis=0)
    behind = b.op("full", shape=(actions + 2,), value=1.0, dtype="bool")
    real = b.op("concat", front, blocks_decode.without_last(b, valid, 1, count), behind, axis=0)
    start = spec.prompt_rows + len(more)
    block = blocks.block_ids(b, (start + actions + 2, 0))
    total = start + actions + 2
    mask = blocks.weigh(b, b.op("attention_mask", block, block, real), *spec.key_counts(total))
    positions = _centred(b, blocks.positions_of(b, real), total, spec)
    for i in range(spec.text.num_hidden_layers):
        x, *_ = blocks.decoder_layer(b, x, spec.text, f"text.layers.{i}", positions, mask)
    x = b.op("slice", x, axis=0, start=start, stop=start + actions, name="action_hidden")
    if spec.head_blocks < 0:
        b.output(blocks_decode.choose(b, x, actions, spec.text, spec.bins, "action_tokens"))
    else:
        x = blocks.rms_norm(b, x, spec.text, "text.norm")
        b.output(blocks_heads.l1_head(b, x, spec.chunk_size, spec.action_dim, d, spec.head_blocks))
    return b.build()


FAMILY = families.add(
    Family("openvla", build, doc="fused towers and a Llama decoder; action tokens, or OFT", title="OpenVLA")
)
