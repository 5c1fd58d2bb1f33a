"""Toy programs for the tests of lowering, and how they are run."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from hypothesis import strategies as st

from vlac.dims import symbol
from vlac.engines.numpy_engine import NumpySession
from vlac.graph import Call, Param, Program, Repeat, Schedule, StageBuilder, Symbol, check
from vlac.lower import REWRITES
from vlac.weights import LazyTensor, Weights

NpArray = np.ndarray[Any, Any]
T = symbol("T")


def program_of(
    *stages: StageBuilder,
    shapes: Mapping[str, tuple[int, ...]],
    steps: tuple[Call | Repeat, ...] = (),
    result: str = "",
    symbols: tuple[Symbol, ...] = (),
) -> Program:
    """Stages with Gaussian weights under the given names; by default each is called once."""
    built = tuple(s.build() for s in stages)
    read = {i[1:] for s in built for n in s.nodes for i in n.inputs}
    shapes = {n: s for n, s in shapes.items() if n in read}
    rng = np.random.default_rng(0)
    weights = {
        n: LazyTensor.of(rng.normal(size=s) * s[-1] ** -0.5 if len(s) > 1 else rng.normal(size=s), n)
        for n, s in shapes.items()
    }
    symbols = symbols or ((Symbol("T", (4, 7)),) if "T" in str([s.inputs for s in built]) else ())
    params = {n: Param(s) for n, s in shapes.items()}
    schedule = Schedule(steps or tuple(Call(s.name) for s in built), result or built[-1].outputs[0])
    return check(Program("toy", symbols, built, params, schedule, Weights(weights)))


def run(program: Program, given: Mapping[str, NpArray], t: int = 4) -> NpArray:
    """The result of the schedule, by the numpy references."""
    session = NumpySession(program, lambda name: program.weights[name].load())
    symbols = {**program.max_symbols(), "T": t}
    env = dict(given)
    for step in program.schedule.steps:
        env |= session.repeat(step, env, symbols) if isinstance(step, Repeat) else session.run(step.stage, env, symbols)
    return env[program.schedule.result]


def same(a: NpArray, b: NpArray, tolerance: float = 2e-6) -> bool:
    return bool(np.abs(a - b).max() <= tolerance * np.abs(a).max())


def ops(program: Program, stage: str = "") -> list[str]:
    return [n.op for s in program.stages for n in s.nodes if stage in ("", s.name)]


def rows(n: int, k: int) -> NpArray:
    return np.random.default_rng(n * 100 + k).standard_normal((n, k)).astype(np.float32)


# --- a program with everything ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class Dims:
    """Sizes of the toy policy; widths are heads * head_dim on purpose nowhere."""

    patch: int = 2
    factor: int = 2
    blocks: int = 2
    vision: int = 6
    width: int = 10
    heads: int = 2
    groups: int = 1
    head_dim: int = 4
    chunk: int = 3
    actions: int = 5
    steps: int = 4

    @property
    def grid(self) -> int:
        return self.factor * self.blocks

    @property
    def image(self) -> tuple[int, int, int]:
        return (3, self.grid * self.patch, self.grid * self.patch)


def _vision(d: Dims, shapes: dict[str, tuple[int, ...]]) -> StageBuilder:
    b = StageBuilder("vision")
    x = b.patchify(b.input("pixels", "f32", *d.image), patch=d.patch, block=1)
    x = b.linear(x, "@patch.weight", "@patch.bias")
    x = b.add(x, b.embed(b.arange(start=0, stop=d.grid**2), "@positions"))
    h = b.layer_norm(x, "@norm.weight", "@norm.bias", eps=1e-6)
    q, k, v = (b.linear(h, f"@vit.{p}_proj.weight", f"@vit.{p}_proj.bias") for p in "qkv")
    h = b.attention(q, k, v, heads=1, kv_heads=1, scale=d.vision**-0.5)
    x = b.add(x, b.linear(h, "@vit.o_proj.weight", "@vit.o_proj.bias"))
    x = b.pixel_shuffle(b.gelu(x, approximate="tanh"), factor=d.factor)
    b.output(b.scale(b.linear(x, "@connector.weight"), factor=d.width**0.5, name="image_tokens"))
    shapes |= {"patch.weight": (d.vision, 3 * d.patch**2), "positions": (d.grid**2, d.vision)}
    shapes |= {"connector.weight": (d.width, d.vision * d.factor**2)}
    shapes |= {f"vit.{p}_proj.weight": (d.vision, d.vision) for p in "qkvo"}
    shapes |= dict.fromkeys(
        ("patch.bias", "norm.weight", "norm.bias", *(f"vit.{p}_proj.bias" for p in "qkvo")), (d.vision,)
    )
    return b


def _prefix(d: Dims, shapes: dict[str, tuple[int, ...]]) -> StageBuilder:
    b = StageBuilder("prefix")
    image = b.input("image_tokens", "f32", d.blocks**2, d.width)
    tokens, valid = b.input("tokens", "i32", T), b.input("token_valid", "bool", T)
    words = b.scale(b.embed(tokens, "@words.weight"), factor=d.width**0.5)
    mark = b.embed(b.full(shape=(1,), value=3.0, dtype="i32"), "@words.weight")
    state = b.linear(b.input("state", "f32", 1, 7), "@state.weight", "@state.bias")
    x = b.concat(mark, image, words, state, axis=0)
    all_valid = b.concat(
        b.full(shape=(d.blocks**2 + 1,), value=1.0, dtype="bool"),
        valid,
        b.full(shape=(1,), value=1.0, dtype="bool"),
        axis=0,
        name="valid",
    )
    positions = b.cumsum(b.cast(all_valid, dtype="i32"))
    b.output(all_valid)
    for i in range(2):
        h = b.rms_norm(x, f"@text.{i}.norm.weight", eps=1e-5)
        q = b.rope(b.linear(h, f"@text.{i}.q_proj.weight"), positions, head_dim=d.head_dim, base=100.0)
        k = b.rope(b.linear(h, f"@text.{i}.k_proj.weight"), positions, head_dim=d.head_dim, base=100.0, name=f"k.{i}")
        v = b.linear(h, f"@text.{i}.v_proj.weight", name=f"v.{i}")
        b.output(k, v)
        block = b.full(shape=(T + d.blocks**2 + 2,), value=0.0, dtype="i32")
        mask = b.attention_mask(block, block, all_valid)
        h = b.attention(q, k, v, mask, heads=d.heads, kv_heads=d.groups, scale=d.head_dim**-0.5)
        x = b.add(x, b.linear(h, f"@text.{i}.o_proj.weight"))
        gate, up = (b.linear(x, f"@text.{i}.{p}_proj.weight") for p in ("gate", "up"))
        x = b.add(x, b.linear(b.mul(b.silu(gate), up), f"@text.{i}.down_proj.weight"))
        hd, gd = d.heads * d.head_dim, d.groups * d.head_dim
        shapes |= {
            f"text.{i}.{p}_proj.weight": (n, d.width)
            for p, n in (("q", hd), ("k", gd), ("v", gd), ("gate", 12), ("up", 12))
        }
        shapes |= {f"text.{i}.o_proj.weight": (d.width, hd), f"text.{i}.down_proj.weight": (d.width, 12)}
        shapes[f"text.{i}.norm.weight"] = (d.width,)
    shapes |= {"words.weight": (11, d.width), "state.weight": (d.width, 7), "state.bias": (d.width,)}
    return b


def _flow(d: Dims, shapes: dict[str, tuple[int, ...]]) -> StageBuilder:
    b = StageBuilder("flow")
    hd, gd, w, count = d.heads * d.head_dim, d.groups * d.head_dim, 8, T + d.blocks**2 + 2
    step, x = b.input("step", "i32", 1), b.input("x", "f32", d.chunk, d.actions)
    valid = b.input("valid", "bool", count)
    past = [(b.input(f"k.{i}", "f32", count, gd), b.input(f"v.{i}", "f32", count, gd)) for i in range(2)]
    time = b.time_embedding(b.embed(step, "@times"), dim=w, min_period=4e-3, max_period=4.0)
    action = b.linear(x, "@action_in.weight", "@action_in.bias")
    h = b.linear(b.concat(action, b.tile(time, rows=d.chunk), axis=1), "@mix_in.weight", "@mix_in.bias")
    h = b.linear(b.silu(h), "@mix_out.weight", "@mix_out.bias")
    modulation = b.linear(b.silu(time), "@modulation.weight")
    h = b.mul(h, b.slice(modulation, axis=1, start=0, stop=w))
    h = b.add(h, b.tile(b.slice(modulation, axis=1, start=w, stop=2 * w), rows=d.chunk))
    ones = b.full(shape=(d.chunk,), value=1.0, dtype="i32")
    mask = b.attention_mask(ones, b.full(shape=(count,), value=0.0, dtype="i32"), valid)
    for i, (k, v) in enumerate(past):
        q = b.linear(b.rms_norm(h, eps=1e-5), f"@expert.{i}.q_proj.weight")
        if i:  # a cross layer: projects what it attends to
            k, v = b.linear(k, "@expert.1.k_proj.weight"), b.linear(v, "@expert.1.v_proj.weight")
        y = b.attention(q, k, v, mask, heads=d.heads, kv_heads=d.groups, scale=d.head_dim**-0.5)
        h = b.add(h, b.linear(y, f"@expert.{i}.o_proj.weight"))
    velocity = b.linear(h, "@action_out.weight", "@action_out.bias", name="velocity")
    b.output(b.add(x, b.mul(velocity, b.embed(step, "@dts")), name="x_next"))
    shapes |= {"times": (d.steps, 1), "dts": (d.steps, 1), "action_in.weight": (w, d.actions), "action_in.bias": (w,)}
    shapes |= {"mix_in.weight": (w, 2 * w), "mix_in.bias": (w,), "mix_out.weight": (w, w), "mix_out.bias": (w,)}
    shapes |= {"modulation.weight": (2 * w, w), "action_out.weight": (d.actions, w), "action_out.bias": (d.actions,)}
    shapes |= {f"expert.{i}.q_proj.weight": (hd, w) for i in range(2)} | {
        f"expert.{i}.o_proj.weight": (w, hd) for i in range(2)
    }
    shapes |= {"expert.1.k_proj.weight": (gd, gd), "expert.1.v_proj.weight": (gd, gd)}
    return b


def toy(d: Dims) -> Program:
    """Vision, prefix and flow, drawn naively: what lowering is for, in small."""
    shapes: dict[str, tuple[int, ...]] = {}
    stages = _vision(d, shapes), _prefix(d, shapes), _flow(d, shapes)
    steps = (Call("vision"), Call("prefix"), Repeat("flow", d.steps, "step", (("x_next", "x", "noise"),)))
    return program_of(*stages, shapes=shapes, steps=steps, result="x_next")


def observation(d: Dims, t: int, valid: int) -> dict[str, NpArray]:
    rng = np.random.default_rng(t)
    return {
        "pixels": rng.uniform(-1, 1, d.image).astype(np.float32),
        "tokens": rng.integers(0, 11, t).astype(np.int32),
        "token_valid": np.arange(t) < valid,
        "state": rows(1, 7),
        "noise": rows(d.chunk, d.actions),
    }


DIMS = st.builds(
    Dims,
    patch=st.integers(1, 3),
    factor=st.integers(1, 3),
    blocks=st.integers(1, 3),
    vision=st.integers(1, 9),
    width=st.integers(2, 12),
    head_dim=st.sampled_from([2, 4, 6]),
    chunk=st.integers(1, 5),
    actions=st.integers(1, 9),
    steps=st.integers(1, 4),
).flatmap(
    lambda d: st.sampled_from([(1, 1), (2, 1), (2, 2), (3, 1)]).map(
        lambda hg: Dims(**{**d.__dict__, "heads": hg[0], "groups": hg[1]})
    )
)


def one(draw: Callable[[StageBuilder], str], **shapes: tuple[int, ...]) -> Program:
    """A stage `s` whose only output is what `draw` returns; weights by keyword, "__" for "."."""
    b = StageBuilder("s")
    b.output(draw(b))
    return program_of(b, shapes={n.replace("__", "."): s for n, s in shapes.items()})


def rewrite(name: str) -> Callable[[Program], Program]:
    return next(r.fn for r in REWRITES if r.name == name)


def loop(draw: Callable[[StageBuilder, str, str], str], **shapes: tuple[int, ...]) -> Program:
    """A repeated stage with x [3, 4], step, and `memory` [T, 4] of a first stage; adds what `draw` returns to x."""
    p = StageBuilder("first")
    p.output(p.silu(p.embed(p.input("tokens", "i32", T), "@table"), name="memory"))
    b = StageBuilder("loop")
    x, step = b.input("x", "f32", 3, 4), b.input("step", "i32", 1)
    b.input("memory", "f32", T, 4)
    b.output(b.add(x, draw(b, x, step), name="x_next"))
    steps = (Call("first"), Repeat("loop", 3, "step", (("x_next", "x", "noise"),)))
    return program_of(p, b, shapes={"table": (9, 4), **shapes}, steps=steps, result="x_next")


LOOP_GIVEN = {
    "tokens": np.array([8, 0, 3, 3], np.int32),
    "noise": rows(3, 4),
    "token_valid": np.array([1, 1, 0, 1], bool),
}
