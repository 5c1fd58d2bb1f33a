"""Gated MLPs in parts of their hidden units."""

from __future__ import annotations

import numpy as np
import pytest
from lower_toys import ops, program_of, rewrite, run, same

from vlac.dims import symbol
from vlac.graph import Param, Program, StageBuilder, Symbol, check
from vlac.rewrites import gates
from vlac.rewrites.gates import part_gates
from vlac.rewrites.parts import part_projections

ALWAYS = ("f32",)


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Weights of toys are large ones, their rows many."""
    monkeypatch.setattr(gates, "LARGEST", 200)
    monkeypatch.setattr(gates, "MANY_ROWS", 4)


def mlp(hidden: int = 64, activation: str = "silu", spoil: str = "", swap: bool = False, rows: int = 5) -> Program:
    """A gated MLP of 6 channels, gate and up fused; the state reads the same weight in a row of its own."""
    b = StageBuilder("one")
    x = b.input("state", "f32", symbol("T"), 6)
    attrs = {"approximate": "tanh"} if activation == "gelu" else {}
    out = []
    for read in (x, b.op("slice", x, axis=0, start=0, stop=1)):
        gate, up = b.linear(read, "@m.gate_proj.weight"), b.linear(read, "@m.up_proj.weight")
        act = b.op(activation, gate, **attrs)
        made = b.mul(up, act) if swap else b.mul(act, up)
        made = b.add(made, up) if spoil == "read" else made
        out.append(b.linear(made, "@m.down_proj.weight"))
    b.output(b.op("concat", *out, axis=0, name="out"))
    shapes = {"m.gate_proj.weight": (hidden, 6), "m.up_proj.weight": (hidden, 6), "m.down_proj.weight": (6, hidden)}
    program = program_of(b, shapes=shapes, symbols=(Symbol("T", (2, rows)),))
    return rewrite("fuse_projections")(program)


def seen(rows: int) -> dict[str, np.ndarray]:
    return {"state": np.random.default_rng(rows).normal(size=(rows, 6)).astype(np.float32)}


@pytest.mark.parametrize("activation", ["silu", "gelu"])
@pytest.mark.parametrize("swap", [False, True])
@pytest.mark.parametrize(("hidden", "parts"), [(64, 2), (96, 3), (320, 4), (80, 3)])
def test_parts_are_the_whole(hidden: int, parts: int, activation: str, swap: bool) -> None:
    program = mlp(hidden, activation, swap=swap)
    done = check(part_gates(program, ALWAYS))
    assert ops(done).count(activation) == 2 * parts
    apart = check(part_projections(done, ALWAYS, lambda *_: True))
    assert ops(apart).count("linear") == 2 * (2 * parts + 1)
    assert sum(p.shape[0] for p in apart.params.values()) == 2 * hidden + 6
    for rows in (2, 5):
        want = run(program, seen(rows), t=rows)
        assert same(want, run(done, seen(rows), t=rows)) and same(want, run(apart, seen(rows), t=rows))


def test_parts_begin_at_whole_blocks() -> None:
    done = part_projections(part_gates(mlp(80), ALWAYS), ALWAYS, lambda *_: True)
    held = sorted(p.shape[0] for n, p in done.params.items() if "down" not in n)
    assert held == [16, 16, 32, 32, 32, 32]


@pytest.mark.parametrize("why", ["few rows", "small", "format", "read elsewhere"])
def test_gates_stay_whole(why: str, monkeypatch: pytest.MonkeyPatch) -> None:
    program = mlp(spoil="read" if why == "read elsewhere" else "", rows=3 if why == "few rows" else 5)
    if why == "small":
        monkeypatch.setattr(gates, "LARGEST", 1000)
    if why == "format":
        params = {n: Param(p.shape, "int4") for n, p in program.params.items()}
        program = program.replace(params=params)
    assert part_gates(program, ALWAYS) == program
