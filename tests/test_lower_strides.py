"""MLPs of whole pages of hidden units get a few more, all zero."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT
from lower_toys import program_of, rewrite, run, same

import vlac
from vlac.artifact import open_artifact
from vlac.graph import Param, Program, StageBuilder, check
from vlac.rewrites import strides
from vlac.rewrites.parts import part_projections
from vlac.rewrites.strides import pad_hidden_units

HELD = ("f32",)


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(strides, "ALIASED", 32)


def mlp(kind: str, hidden: int = 64, spoil: str = "") -> Program:
    """Two MLPs that share their weights: "plain", "gated" (two linears), "fused" (one) or "rounded"."""
    b = StageBuilder("one")
    x = b.input("state", "f32", 5, 6)
    out = []
    for read in (x, b.op("slice", x, axis=0, start=0, stop=1)):
        up = b.linear(read, "@m.up_proj.weight", "@m.up_proj.bias")
        if kind in ("gated", "fused"):
            made = b.mul(b.op("silu", b.linear(read, "@m.gate_proj.weight")), up)
        else:
            made = b.op("gelu", up, approximate="tanh")
        if kind == "rounded":
            made = b.op("round_int8", made, form="token", largest=0.0)
        made = b.add(made, up) if spoil == "read" else made
        made = b.op("tanh", made) if spoil == "op" else made
        out.append(b.linear(made, "@m.down_proj.weight", "@m.down_proj.bias"))
    if spoil == "weight":
        out.append(b.slice(b.linear(x, "@m.up_proj.weight"), axis=1, start=0, stop=6))
    b.output(b.op("concat", *out, axis=0, name="out"))
    shapes = {"m.up_proj.weight": (hidden, 6), "m.up_proj.bias": (hidden,), "m.gate_proj.weight": (hidden, 6)}
    shapes |= {"m.down_proj.weight": (6, hidden), "m.down_proj.bias": (6,)}
    program = program_of(b, shapes={k: v for k, v in shapes.items() if kind in ("gated", "fused") or "gate" not in k})
    return rewrite("fuse_projections")(program) if kind == "fused" else program


SEEN = {"state": np.random.default_rng(0).normal(size=(5, 6)).astype(np.float32)}


@pytest.mark.parametrize("kind", ["plain", "gated", "fused", "rounded"])
def test_units_that_are_added_change_nothing(kind: str) -> None:
    program = mlp(kind)
    done = check(pad_hidden_units(program, HELD))
    widths = {n: p.shape for n, p in done.params.items()}
    assert widths["m.down_proj.weight"] == (6, 80) and widths["m.down_proj.bias"] == (6,)
    rows = sum(shape[0] for n, shape in widths.items() if "down" not in n and "weight" in n)
    assert rows == (160 if kind in ("gated", "fused") else 80)
    assert same(run(program, SEEN), run(done, SEEN))
    if kind == "fused":
        assert same(run(program, SEEN), run(part_projections(done, HELD, lambda *_: True), SEEN))


def test_rows_are_read_without_the_rest() -> None:
    lazy = pad_hidden_units(mlp("plain"), HELD).weights["m.down_proj.weight"]
    assert lazy.load().shape == (6, 80) and not lazy.load()[:, 64:].any()


@pytest.mark.parametrize("why", ["width", "format", "read", "op", "weight"])
def test_others_stay(why: str) -> None:
    program = mlp("plain", 48 if why == "width" else 64, why)
    if why == "format":
        program = program.replace(params={n: Param(p.shape, "int4") for n, p in program.params.items()})
    assert pad_hidden_units(program, HELD) == program


@pytest.mark.parametrize(("target", "units"), [("onnx-fp32", 16), ("gguf-bf16", 32), ("onnx-int8", 0)])
def test_targets_that_gain_have_it(target: str, units: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("onnx")
    monkeypatch.setattr(strides, "ALIASED", 80)  # hidden units of the tiny vision tower
    checkpoint = ROOT / "tests" / "golden" / "smolvla_tiny" / "checkpoint"
    made = vlac.compile(checkpoint, target, tmp_path / "out", goldens=0)
    assert made.path is not None
    params, names = open_artifact(made.path).program.params, ("fc2.weight", "v.blk.0.ffn_down.weight")
    hidden = {p.shape[1] for n, p in params.items() if n.endswith(names)}
    assert hidden == {80 + units}
