"""Greedy decoding with a key/value cache, for any decoder: where the prompt ends, one turn of the loop, the loop.

The prompt is read once by a stage that leaves `prefix_k.{i}` and `prefix_v.{i}` [rows, kv] of every layer. Its last
token is read again in the first turn, so that every turn is alike: token in, next token out. A turn writes its own keys
and values into a small cache with one row per turn, allocated before the first; the prompt's are never copied.
"""

from __future__ import annotations

from dataclasses import dataclass

from vlac import blocks
from vlac.dims import Dim
from vlac.graph import Repeat, StageBuilder
from vlac.spec import DecoderSpec


@dataclass(frozen=True)
class BinsSpec:
    """Which ids mean which bins of [-1, 1]: bin i has the id first + direction * i, or ids[i] where a table is given
    (vlac.runtime.token_bins).

    `restricted`: only the bins' ids compete in the argmax; OpenVLA's own decoding takes the whole vocabulary.
    """

    count: int = 256
    kind: str = "edges"
    first: int = 0
    direction: int = -1
    restricted: bool = False
    ids: tuple[int, ...] = ()

    @property
    def rows(self) -> tuple[int, ...]:
        """The ids that compete where the argmax is restricted: those of a table in its order, others ascending."""
        return self.ids or tuple(sorted(self.first + self.direction * i for i in range(self.count)))


def choose(b: StageBuilder, x: str, rows: int, text: DecoderSpec, bins: BinsSpec, name: str) -> str:
    """The likeliest id of each of `rows` hidden states; its `logits` are over the bins' ids only where the argmax is
    restricted to them: `text.lm_head` has their rows only, then."""
    logits = blocks.linear(b, blocks.rms_norm(b, x, text, "text.norm"), "text.lm_head", as_="logits")
    if not bins.restricted:
        return b.op("argmax", logits, name=name)
    places = b.op("argmax", logits)
    if not bins.ids:
        lowest = b.op("full", shape=(1,), value=float(bins.rows[0]), dtype="i32")
        return b.op("add", places, lowest, name=name)
    table = _constant(b, bins.ids)
    one_by_one = [places] if rows == 1 else [b.op("slice", places, axis=0, start=i, stop=i + 1) for i in range(rows)]
    picked = [b.op("pick", table, place, name=name if rows == 1 else "") for place in one_by_one]
    return picked[0] if rows == 1 else b.op("concat", *picked, axis=0, name=name)


def _constant(b: StageBuilder, ids: tuple[int, ...]) -> str:
    """i32 [len(ids)], drawn as runs of ascending numbers."""
    starts = [i for i in range(len(ids)) if i == 0 or ids[i] != ids[i - 1] + 1]
    stops = [*starts[1:], len(ids)]
    runs = [b.op("arange", start=ids[i], stop=ids[i] + j - i) for i, j in zip(starts, stops, strict=True)]
    return runs[0] if len(runs) == 1 else b.op("concat", *runs, axis=0)


def last_token(b: StageBuilder, tokens: str, valid: str, before: int = 0) -> tuple[str, str]:
    """(`start_token` i32 [1], `start` i32 [1]): the last valid one of tokens i32 [T], and its index plus `before`,
    which is its position if `before` other rows stand in front. Valid tokens come first."""
    count = b.op("reduce_sum", b.op("cast", valid, dtype="i32"))
    index = b.op("sub", count, b.op("full", shape=(1,), value=1.0, dtype="i32"))
    token = b.op("pick", tokens, index, name="start_token")
    return token, b.op("add", index, b.op("full", shape=(1,), value=float(before), dtype="i32"), name="start")


def without_last(b: StageBuilder, valid: str, start: int, stop: Dim) -> str:
    """valid[start:stop] with the last true entry made false; true entries come first."""
    later = b.op("slice", valid, axis=0, start=start + 1, stop=stop)
    return b.op("concat", later, b.op("full", shape=(1,), value=0.0, dtype="bool"), axis=0)


def empty_cache(b: StageBuilder, turns: int, text: DecoderSpec) -> str:
    """`no_rows` f32 [turns, kv], what every cache starts from."""
    return b.op("full", shape=(turns, text.num_key_value_heads * text.head_dim), value=0.0, dtype="f32", name="no_rows")


def decoder_turn(
    b: StageBuilder,
    x: str,
    turn: str,
    turns: int,
    rows: Dim,
    text: DecoderSpec,
    name: str,
    counts: tuple[tuple[Dim, int], ...] = (),
) -> str:
    """Layers `{name}.layers.{i}` on the embedding x [1, width] of one token -> its last hidden state, before the norm.

    Adds the stage's inputs: `start` i32 [1] (position of the first turn's token), `prompt_valid` bool [rows] (which
    rows of the prompt may be attended to, without the one that the first turn reads anew), `prefix_k.{i}` and
    `prefix_v.{i}` [rows, kv], the caches `own_k.{i}` and `own_v.{i}` [turns, kv]; and its outputs `next_k.{i}`, ...
    counts: how many keys the prompt's rows stand for, as runs; without it, one each.
    """
    kv = text.num_key_value_heads * text.head_dim
    positions = b.op("add", b.input("start", "i32", 1), turn)
    valid = b.op(
        "concat",
        b.input("prompt_valid", "bool", rows),
        b.op("full", shape=(turns,), value=1.0, dtype="bool"),
        axis=0,
    )
    # the prompt is block 0, row i of the cache is block i + 1, and turn i sees up to block i + 1
    own = b.op("arange", start=1, stop=turns + 1)
    seen = b.op("add", turn, b.op("full", shape=(1,), value=1.0, dtype="i32"))
    mask = b.op("attention_mask", seen, b.op("concat", blocks.block_ids(b, (rows, 0)), own, axis=0), valid)
    mask = blocks.weigh(b, mask, *counts, (turns, 1))
    for i in range(text.num_hidden_layers):
        past = (b.input(f"prefix_k.{i}", "f32", rows, kv), b.input(f"prefix_v.{i}", "f32", rows, kv))
        cache = (b.input(f"own_k.{i}", "f32", turns, kv), b.input(f"own_v.{i}", "f32", turns, kv), turn)
        names = (f"next_k.{i}", f"next_v.{i}")
        x, *_ = blocks.decoder_layer(b, x, text, f"{name}.layers.{i}", positions, mask, past, names, cache)
        b.output(*names)
    return x


def decoding_loop(
    turns: int, layers: int, stop: tuple[int, ...] = (), collect: tuple[tuple[str, str], ...] = ()
) -> Repeat:
    """Repeats stage `decode` (index "turn", reads `token`, gives `next_token`); the value `action_tokens` i32 [turns]
    holds what it generated, zeros after one of `stop`. `collect`: more outputs to gather."""
    caches = ((f"next_{n}.{i}", f"own_{n}.{i}", "no_rows") for i in range(layers) for n in "kv")
    return Repeat(
        "decode",
        turns,
        "turn",
        (("next_token", "token", "start_token"), *caches),
        (("next_token", "action_tokens"), *collect),
        "next_token" if stop else "",
        stop,
    )
