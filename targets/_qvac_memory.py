"""Whether QVAC's engine overwrites what it uploads once: its allocator's plan for one flow step of SmolVLA, worked out.

The engine (0.27) builds the graph of a flow step once and runs it for every step. Actions, time and keys and values are
uploaded before each; positions and masks only before the first. ggml's graph allocator gives a tensor's memory away
after its last use, so whether a later tensor of the step lands on a mask is a matter of sizes, the prompt's length
among them: then every answer from the second step on is wrong. This module draws the same graph (sizes only) and
allocates it by ggml's rules: best fit, neighbours joined, results in place of operands that nobody else reads. Held
against the engine in tests/test_qvac.py and by benchmarks/qvac_dims.py.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache

ALIGNMENT = 32
"""Bytes that ggml's CPU buffers align tensors to."""

IN_PLACE = ("add", "mul", "silu", "rms_norm", "soft_max")
"""Operations whose result takes an operand's memory in this version of ggml."""


@dataclass(frozen=True)
class Sizes:
    """What the graph of a flow step depends on: the expert, its chunk and its columns of actions."""

    layers: int
    every: int
    heads: int
    kv_heads: int
    head_dim: int
    width: int
    ffn: int
    chunk: int
    actions: int


@dataclass(eq=False)
class _Tensor:
    """`floats` of memory by `op`; `root` of a view is what it looks at. Weights have none."""

    op: str
    floats: int
    sources: tuple[_Tensor, ...] = ()
    root: _Tensor | None = None
    layout: tuple[int, ...] = ()
    children: int = 0
    views: int = 0
    at: int = -1
    size: int = 0
    allocated: bool = False
    once: bool = False


def _weight() -> _Tensor:
    return _Tensor("weight", 0)


class _Graph:
    """Draws the step's tensors."""

    def __init__(self, s: Sizes, prefix: int) -> None:
        self.s, self.prefix = s, prefix

    def new(self, op: str, shape: Sequence[int], *sources: _Tensor) -> _Tensor:
        return _Tensor(op, math.prod(shape), sources, layout=(*shape, 1, 1, 1)[:4])

    def view(self, of: _Tensor, shape: Sequence[int], strided: bool = False) -> _Tensor:
        made = self.new("view", shape, of)
        made.root = of.root or of
        made.layout = (*made.layout, 1) if strided else made.layout
        return made

    def input(self, *shape: int, once: bool = False) -> _Tensor:
        made = self.new("input", shape)
        made.once = once
        return made

    def linear(self, x: _Tensor, out: int, bias: bool = False) -> _Tensor:
        y = self.new("mul_mat", (out, x.layout[1]), _weight(), x)
        return self.new("add", y.layout, y, _weight()) if bias else y

    def norm(self, x: _Tensor) -> _Tensor:
        return self.new("mul", x.layout, self.new("rms_norm", x.layout, x), _weight())

    def repeated(self, x: _Tensor, length: int) -> _Tensor:
        """Keys or values [d, kv, length] for every head."""
        s = self.s
        groups = s.heads // s.kv_heads
        if groups == 1:
            return x
        x = self.view(x, (s.head_dim, 1, s.kv_heads, length))
        x = self.new("repeat", (s.head_dim, groups, s.kv_heads, length), x)
        return self.view(x, (s.head_dim, s.heads, length))

    def attention(self, q: _Tensor, k: _Tensor, v: _Tensor, length: int, mask: _Tensor) -> _Tensor:
        s, d = self.s, self.s.head_dim

        def by_head(x: _Tensor, rows: int) -> _Tensor:
            return self.new("cont", (d, rows, s.heads), self.view(x, (d, rows, s.heads), strided=True))

        q = by_head(q, s.chunk)
        k = by_head(self.repeated(k, length), length)
        v = by_head(self.repeated(v, length), length)
        scores = self.new("mul_mat", (length, s.chunk, s.heads), k, q)
        scores = self.new("soft_max", scores.layout, scores, mask)
        turned = self.new("cont", (length, d, s.heads), self.view(v, (length, d, s.heads), strided=True))
        read = self.new("mul_mat", (d, s.chunk, s.heads), turned, scores)
        read = self.new("cont", (d, s.heads, s.chunk), self.view(read, (d, s.heads, s.chunk), strided=True))
        return self.view(read, (d * s.heads, s.chunk))

    def draw(self) -> _Tensor:
        """The velocity."""
        s, d, n = self.s, self.s.head_dim, self.s.chunk
        x, time = self.input(s.actions, n), self.input(s.width, n)
        own, cross = self.input(n, once=True), self.input(n, once=True)
        own_mask = self.input(self.prefix + n, n, once=True)
        cross_mask = self.input(self.prefix, n, once=True)
        h = self.new("concat", (2 * s.width, n), self.linear(x, s.width, bias=True), time)
        h = self.linear(h, s.width, bias=True)
        h = self.linear(self.new("silu", h.layout, h), s.width, bias=True)
        for i in range(s.layers):
            before, y = h, self.norm(h)
            q = self.view(self.linear(y, d * s.heads), (d, s.heads, n))
            if i % s.every == 0:
                k = self.view(self.linear(y, d * s.kv_heads), (d, s.kv_heads, n))
                v = self.view(self.linear(y, d * s.kv_heads), (d, s.kv_heads, n))
                q, k = (self.new("rope", t.layout, t, own) for t in (q, k))
                length = self.prefix + n
                k, v = (
                    self.new("concat", (d, s.kv_heads, length), self.input(d, s.kv_heads, self.prefix), t)
                    for t in (k, v)
                )
                read = self.attention(q, k, v, length, own_mask)
            else:
                q = self.new("rope", q.layout, q, cross)
                k, v = (
                    self.view(self.input(d * s.kv_heads, self.prefix), (d, s.kv_heads, self.prefix)) for _ in range(2)
                )
                read = self.attention(q, k, v, self.prefix, cross_mask)
            y = self.linear(read, s.width)
            h = self.new("add", y.layout, y, before)
            before, y = h, self.norm(h)
            y = self.new("glu", (s.ffn, n), self.linear(y, s.ffn), self.linear(y, s.ffn))
            y = self.linear(y, s.width)
            h = self.new("add", y.layout, y, before)
        return self.linear(self.norm(h), s.actions, bias=True)


class _Memory:
    """Free blocks [begin, end), rising; the last one has no end."""

    def __init__(self) -> None:
        self.free: list[list[int]] = [[0, 1 << 60]]

    def take(self, size: int) -> int:
        best, smallest = len(self.free) - 1, 1 << 60
        for i, (begin, end) in enumerate(self.free[:-1]):
            if size <= end - begin <= smallest:
                best, smallest = i, end - begin
        block = self.free[best]
        at = block[0]
        block[0] += size
        if block[0] == block[1]:
            del self.free[best]
        return at

    def give(self, at: int, size: int) -> None:
        end = at + size
        i = next(k for k, block in enumerate(self.free) if block[0] >= end)
        if self.free[i][0] == end:
            self.free[i][0] = at
        else:
            self.free.insert(i, [at, end])
        if i and self.free[i - 1][1] == at:
            self.free[i - 1][1] = self.free[i][1]
            del self.free[i]


def _ordered(result: _Tensor) -> tuple[list[_Tensor], list[_Tensor]]:
    """(inputs, nodes) as a graph lists them: operands before what reads them, from left to right."""
    inputs: list[_Tensor] = []
    nodes: list[_Tensor] = []
    seen: set[int] = set()
    stack: list[tuple[_Tensor, bool]] = [(result, False)]
    while stack:
        t, done = stack.pop()
        if done:
            nodes.append(t)
        elif id(t) not in seen:
            seen.add(id(t))
            if t.op == "input":
                inputs.append(t)
            elif t.op != "weight":
                stack.append((t, True))
                stack += [(source, False) for source in reversed(t.sources)]
    return inputs, nodes


class _Plan:
    """ggml's allocation of a graph; `overwritten` are bytes of inputs uploaded once that something else lands on."""

    def __init__(self, result: _Tensor) -> None:
        self.memory, self.result = _Memory(), result
        inputs, nodes = _ordered(result)
        for t in inputs:
            self.place(t)
        kept = [(t.at, t.at + 4 * t.floats) for t in inputs if t.once]
        for node in nodes:
            if node.root is not None:
                node.root.views += 1
            for source in node.sources:
                source.children += 1
        self.overwritten = False
        for node in nodes:
            if node.root is None and self.place(node):
                end = node.at + 4 * node.floats
                self.overwritten |= any(node.at < stop and begin < end for begin, stop in kept)
            for source in node.sources:
                self.read(source)

    def place(self, t: _Tensor) -> bool:
        """Memory for a tensor; whether it is memory that was free."""
        t.allocated, t.size = True, -(-4 * t.floats // ALIGNMENT) * ALIGNMENT
        if t.op in IN_PLACE:
            for source in t.sources:
                if source.op == "weight" or source.layout != t.layout or source.children != 1 or source.views:
                    continue
                owner = source.root or source
                if source.root is not None and (owner.views != 1 or owner.children):
                    continue
                t.at, owner.allocated, source.allocated = owner.at, False, False
                return False
        t.at = self.memory.take(t.size)
        return True

    def read(self, t: _Tensor) -> None:
        """An operand was read; memory that nothing else reads is given back."""
        t.children -= 1
        if t.children or t.views or t.op == "weight":
            return
        if t.root is not None:
            t.root.views -= 1
            t = t.root
            if t.views or t.children:
                return
        if t.allocated:
            self.memory.give(t.at, t.size)
            t.allocated = False


@lru_cache(maxsize=4096)
def overwrites(s: Sizes, prefix: int) -> bool:
    """Whether the engine's answers are wrong from the second step on, for a prefix of so many tokens (images', the
    prompt's with its padding, and the state's)."""
    return _Plan(_Graph(s, prefix).draw()).overwritten


LONGEST = 48
"""Tokens of a prompt that the engine takes, padding included."""

MOST_LAYERS = 64
"""Beyond, a check would take minutes."""


def right_prompts(dims: Mapping[str, object], images: int) -> list[int]:
    """Lengths of prompts, padding included, with which every step is right; `dims` as the layout names them."""

    def n(name: str) -> int:
        return int(str(dims[name]))

    if n("flow.num_steps") == 1:
        return list(range(1, LONGEST + 1))
    s = Sizes(
        layers=n("expert.num_hidden_layers"),
        every=n("self_attn_every_n_layers"),
        heads=n("expert.num_attention_heads"),
        kv_heads=n("expert.num_key_value_heads"),
        head_dim=64,
        width=n("expert.hidden_size"),
        ffn=n("expert.intermediate_size"),
        chunk=n("chunk_size"),
        actions=n("max_action_dim"),
    )
    pictures = images * (n("vision.image_size") // n("vision.patch_size") // n("scale_factor")) ** 2
    return [length for length in range(1, LONGEST + 1) if not overwrites(s, pictures + length + 1)]


def hazards(dims: Mapping[str, object]) -> tuple[list[str], list[str]]:
    """(problems, warnings) in words: with no prompt right, or not with all; for the policy's cameras where `dims` tell
    them ("io.cameras"), else for one, two and three."""
    if int(str(dims["expert.num_hidden_layers"])) > MOST_LAYERS:
        return [], [f"whether its engine overwrites its masks is not worked out beyond {MOST_LAYERS} layers"]
    counts = [int(str(dims["io.cameras"]))] if "io.cameras" in dims else [1, 2, 3]
    found = {images: right_prompts(dims, images) for images in counts}
    why = "its engine (0.27) uploads masks once and overwrites them in each flow step where sizes fall so"
    if not any(found.values()):
        cameras = " or ".join(map(str, counts))
        return [f"with {cameras} images no prompt is answered right from the second flow step on: {why}"], []
    return [], [
        f"with {images} images only prompts of {_ranges(right)} tokens, padding included, are answered right: {why}"
        for images, right in found.items()
        if len(right) < LONGEST
    ]


def _ranges(numbers: Sequence[int]) -> str:
    """[1, 2, 3, 7] -> "1-3, 7"; "no" for none."""
    parts: list[list[int]] = []
    for n in numbers:
        if parts and parts[-1][1] == n - 1:
            parts[-1][1] = n
        else:
            parts.append([n, n])
    return ", ".join(str(a) if a == b else f"{a}-{b}" for a, b in parts) or "no"
