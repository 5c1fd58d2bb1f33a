"""Every op of the table, written as ONNX and run by ONNX Runtime and OpenVINO, against the numpy reference."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from onnx_artifacts import relative_max, weights_of, write_unchecked

from vlac.engines import onnxruntime_engine, openvino_engine
from vlac.engines.base import get_engine
from vlac.engines.numpy_engine import run_stage
from vlac.errors import EngineError, Unsupported
from vlac.graph import Call, Param, Program, Schedule, StageBuilder
from vlac.ops import OPS
from vlac.targets import _onnx_codes as _onnx_codes  # what writes ops joins the emitter's table
from vlac.targets import _onnx_ops as _onnx_ops
from vlac.targets._onnx_emitter import EMITTERS

pytest.importorskip("onnx")
ENGINES = ("onnxruntime", "openvino")


def rows(n: int, k: int, scale: float = 1.0) -> np.ndarray:
    return (np.random.default_rng(n * 100 + k).standard_normal((n, k)) * scale).astype(np.float32)


def ints(*values: int) -> np.ndarray:
    return np.array(values, np.int32)


def bools(*values: int) -> np.ndarray:
    return np.array(values, np.bool_)


VALID = bools(1, 1, 0, 1, 1, 0, 1)
# op, inputs (arrays; strings are parameters "name:shape"), attributes
CASES: list[tuple[str, tuple[Any, ...], dict[str, Any]]] = [
    ("arange", (), {"start": 3, "stop": 9}),
    ("arange", (), {"start": 0, "stop": 300_000}),
    ("full", (), {"shape": (2, 3), "value": 1.5, "dtype": "f32"}),
    ("full", (), {"shape": (4,), "value": -2.0, "dtype": "i32"}),
    ("full", (), {"shape": (3,), "value": 1.0, "dtype": "bool"}),
    ("cast", (VALID,), {"dtype": "i32"}),
    ("cast", (VALID,), {"dtype": "f32"}),
    ("cast", (ints(0, 1, -3),), {"dtype": "bool"}),
    ("cast", (np.array([1.9, -1.9, 0.0], np.float32),), {"dtype": "i32"}),
    ("cast", (np.array([0.25, -0.5, 0.0], np.float32),), {"dtype": "bool"}),
    ("cumsum", (ints(1, 0, 2, -5, 1),), {}),
    ("reduce_sum", (ints(1, 0, 2, -5, 1),), {}),
    ("repeat_each", (ints(4, -1, 7),), {"times": 3}),
    ("repeat_each", (bools(1, 0),), {"times": 5}),
    ("attention_mask", (ints(0, 0, 1), ints(0, 0, 0, 1, 1, 2, 0), VALID), {}),
    ("argmax", (rows(5, 40),), {}),
    ("argmax", (np.array([[1, 3, 3, 0], [2, 2, 2, 2], [-4, -3, -9, -3]], np.float32),), {}),
    ("pick", (ints(4, -1, 7), ints(2)), {}),
    ("pick", (VALID, ints(0)), {}),
    ("write_rows", (rows(6, 4), rows(1, 4), ints(5)), {}),
    ("write_rows", (rows(6, 4), rows(3, 4), ints(2)), {}),
    ("concat", (rows(2, 3), rows(1, 3)), {"axis": 0}),
    ("concat", (VALID, VALID), {"axis": 0}),
    ("concat", (ints(1, 2), ints(3)), {"axis": 0}),
    ("concat", (rows(2, 3), rows(2, 1), rows(2, 4)), {"axis": 1}),
    ("slice", (rows(5, 7),), {"axis": 1, "start": 2, "stop": 6}),
    ("slice", (VALID,), {"axis": 0, "start": 1, "stop": 7}),
    ("slice", (ints(1, 2, 3),), {"axis": 0, "start": 2, "stop": 3}),
    ("reshape", (rows(4, 6),), {"shape": (3, 8)}),
    ("reshape", (VALID,), {"shape": (1, 7)}),
    ("transpose", (rows(4, 6),), {"perm": (1, 0)}),
    ("transpose", (rows(4, 6).reshape(2, 2, 3, 2),), {"perm": (2, 0, 3, 1)}),
    ("pad", (rows(3, 5),), {"size": 8}),
    ("pad", (rows(3, 5),), {"size": 5}),
    ("pad", (ints(1, 2, 3),), {"size": 5}),
    ("pad", (bools(1, 0, 1)[None],), {"size": 4}),
    ("tile", (rows(1, 5),), {"rows": 4}),
    ("tile", (VALID[None],), {"rows": 3}),
    ("patchify", (rows(3, 144).reshape(3, 12, 12),), {"patch": 3, "block": 1}),
    ("patchify", (rows(3, 144).reshape(3, 12, 12),), {"patch": 3, "block": 2}),
    ("pixel_shuffle", (rows(36, 5),), {"factor": 3}),
    ("add", (rows(3, 4), rows(3, 4)), {}),
    ("add", (rows(3, 4), rows(1, 4)), {}),
    ("add", (rows(3, 4), "w:4"), {}),
    ("add", (ints(1, 2), ints(3)), {}),
    ("sub", (rows(3, 4), rows(3, 1)), {}),
    ("sub", (ints(1, 2), ints(3, 5)), {}),
    ("mul", (rows(3, 4), "w:3,4"), {}),
    ("mul", (ints(4, 2), ints(3, 5)), {}),
    ("scale", (rows(3, 4),), {"factor": 0.1}),
    ("linear", (rows(3, 40), "w:7,40"), {}),
    ("linear", (rows(3, 40), "w:7,40", "b:7"), {}),
    ("linear", (rows(1, 33), "w:5,33", rows(1, 5)[0]), {}),
    ("linear", (rows(3, 40), rows(7, 40)), {}),
    ("embed", (ints(3, 0, 8, 3), "w:9,12"), {}),
    ("embed", (ints(1, 0), rows(2, 6)), {}),
    ("layer_norm", (rows(4, 24, 5.0),), {"eps": 1e-6}),
    ("layer_norm", (rows(4, 24, 5.0), "w:24"), {"eps": 1e-6}),
    ("layer_norm", (rows(4, 24, 5.0), "w:24", "b:24"), {"eps": 1e-5}),
    ("rms_norm", (rows(4, 24, 0.01),), {"eps": 1e-5}),
    ("rms_norm", (rows(4, 24, 1000.0), "w:24"), {"eps": 1e-6}),
    ("silu", (rows(4, 24, 8.0),), {}),
    ("sigmoid", (rows(4, 24, 8.0),), {}),
    ("tanh", (rows(4, 24, 3.0),), {}),
    ("relu", (rows(4, 24),), {}),
    ("gelu", (rows(4, 24, 3.0),), {"approximate": "tanh"}),
    ("gelu", (rows(4, 24, 3.0),), {"approximate": "none"}),
    ("gelu", (rows(4, 24, 3.0),), {"approximate": "quick"}),
    ("softmax", (rows(4, 24, 10.0),), {}),
    ("attention", (rows(5, 24), rows(7, 24), rows(7, 24)), {"heads": 2, "kv_heads": 2, "scale": 0.3}),
    ("attention", (rows(5, 48), rows(7, 16), rows(7, 24)), {"heads": 6, "kv_heads": 2, "scale": 1.0}),
    (
        "attention",
        (rows(5, 48), rows(7, 16), rows(7, 16), np.array([VALID, ~VALID, VALID & 0 == 1, VALID | 1 == 1, VALID])),
        {"heads": 6, "kv_heads": 2, "scale": 0.25},
    ),
    (
        "attention",
        (rows(3, 60, 4.0), rows(7, 12, 4.0), rows(7, 12), np.array([VALID] * 3)),
        {"heads": 5, "kv_heads": 1, "scale": 0.3},
    ),
    (
        "time_embedding",
        (np.array([[1.0], [0.3], [0.05]], np.float32),),
        {"dim": 16, "min_period": 4e-3, "max_period": 4.0},
    ),
]


def _draw(op: str, operands: tuple[Any, ...], attrs: dict[str, Any]) -> tuple[Program, dict[str, np.ndarray]]:
    """A program of that one node. Arrays are inputs, "name:shape" parameters."""
    stage = StageBuilder("one")
    shapes, values, names = {}, {}, []
    for i, operand in enumerate(operands):
        if isinstance(operand, str):
            name, _, shape = operand.partition(":")
            shapes[name] = tuple(int(d) for d in shape.split(","))
            names.append("@" + name)
        else:
            kind = {"f": "f32", "i": "i32", "b": "bool"}[operand.dtype.kind]
            names.append(stage.input(f"in{i}", kind, *operand.shape))
            values[f"in{i}"] = operand
    stage.output(stage.op(op, *names, name="out", **attrs))
    weights = weights_of(shapes)
    params = {k: Param(w.shape) for k, w in weights.items()}
    return Program("one", (), (stage.build(),), params, Schedule((Call("one"),), "out"), weights), values


def _runs_like_the_reference(program: Program, values: dict[str, np.ndarray], folder: Path, tolerance: float) -> None:
    want = run_stage(program, "one", values, lambda n: program.weights[n].load())["out"]
    artifact = write_unchecked(program, folder)
    for engine in ENGINES:
        if engine in artifact.manifest.get("declined", {}):
            with pytest.raises(EngineError, match=f"{engine} cannot run .*{program.stages[0].nodes[0].op}: "):
                get_engine(engine).open(artifact)
            assert engine not in artifact.engines
            continue
        session = get_engine(engine).open(artifact, threads=1)
        got = session.run("one", values, {})["out"]
        assert got.dtype == want.dtype and got.shape == want.shape, engine
        if want.dtype == np.float32:
            assert np.abs(got - want).max() <= tolerance * max(1.0, float(np.abs(want).max())), engine
        else:
            assert np.array_equal(got, want), engine


def _name(case: tuple[str, tuple[Any, ...], dict[str, Any]]) -> str:
    operands = [o if isinstance(o, str) else f"{o.dtype}{list(o.shape)}" for o in case[1]]
    return f"{case[0]}({', '.join(operands)}){list(case[2].values())}"


@pytest.mark.parametrize("case", CASES, ids=_name)
def test_op(case: tuple[str, tuple[Any, ...], dict[str, Any]], tmp_path: Path) -> None:
    program, values = _draw(*case)
    _runs_like_the_reference(program, values, tmp_path, 2e-6)


def test_every_op_of_the_table_is_written_and_tested() -> None:
    declined = set(onnxruntime_engine.DECLINES) & set(openvino_engine.DECLINES)  # by both: nothing is written for these
    assert set(EMITTERS) | declined == set(OPS) and not set(EMITTERS) & declined
    elsewhere = {
        "rope",
        "column_mean",
        "pack_codes",
        "unpack_codes",
        "round_f16",
        "round_fp8",
        "round_int8",
        "weighted_mask",
    }  # tests/test_ops.py
    assert {c[0] for c in CASES} | elsewhere == set(EMITTERS)


def _rope(positions: Callable[[StageBuilder], str], n: int) -> tuple[Program, dict[str, np.ndarray]]:
    s = StageBuilder("one")
    x = s.input("x", "f32", n, 24)
    valid = s.input("valid", "bool", n)
    s.op("cumsum", s.cast(valid, dtype="i32"), name="unused")
    s.output(s.op("rope", x, positions(s), name="out", head_dim=8, base=10000.0))
    program = Program("one", (), (s.build(),), {}, Schedule((Call("one"),), "out"), weights_of({}))
    return program, {"x": rows(n, 24), "valid": VALID[:n]}


@pytest.mark.parametrize(
    "positions",
    [
        lambda s: s.arange(start=0, stop=7),
        lambda s: s.sub(s.cumsum(s.cast("valid", dtype="i32")), s.full(shape=(1,), value=1.0, dtype="i32")),
        lambda s: s.add(s.arange(start=0, stop=7), s.reduce_sum(s.cast("valid", dtype="i32"))),
        lambda s: s.concat(
            s.arange(start=500, stop=503), s.cast(s.slice("valid", axis=0, start=0, stop=4), dtype="i32"), axis=0
        ),
    ],
    ids=["constant", "running count", "offset", "mixed"],
)
def test_rope(positions: Callable[[StageBuilder], str], tmp_path: Path) -> None:
    _runs_like_the_reference(*_rope(positions, 7), tmp_path, 2e-6)


def test_rope_with_unbounded_positions_is_refused(tmp_path: Path) -> None:
    program, _ = _rope(lambda s: s.input("tokens", "i32", 7), 7)
    with pytest.raises(Unsupported, match="stage one, out = rope: positions tokens have no known bound"):
        write_unchecked(program, tmp_path)


@pytest.mark.parametrize("format", ["f16", "bf16", "int8", "int4"])
def test_linear_and_embedding_in_every_format(format: str, tmp_path: Path) -> None:
    """The same table read by an embedding and a linear is stored once; integers, too."""
    s = StageBuilder("one")
    h = s.embed(s.input("tokens", "i32", 3), "@table")
    y = s.linear(h, "@w", "@b")
    s.output(s.op("add", s.linear(y, "@table"), s.full(shape=(1, 1), value=0.0, dtype="f32"), name="out"))
    weights = weights_of({"table": (40, 64), "w": (64, 64), "b": (64,)})
    table = "int8" if format == "int4" else format
    params = {"table": Param((40, 64), table), "w": Param((64, 64), format), "b": Param((64,))}
    program = Program("one", (), (s.build(),), params, Schedule((Call("one"),), "out"), weights)
    artifact = write_unchecked(program, tmp_path)
    decoded = {n: t.decode() for n, t in artifact.tensors.items()}
    values = {"tokens": ints(3, 39, 0)}
    want = run_stage(program, "one", values, decoded.__getitem__)["out"]
    plain = run_stage(program, "one", values, lambda n: weights[n].load())["out"]
    assert relative_max(want, plain) < {"f16": 1e-3, "bf16": 1e-2, "int8": 2e-2, "int4": 2e-1}[format]
    # integer kernels quantise activations to 8 bit as well
    bound = 2e-2 if format in ("int8", "int4") else 2e-6
    for engine in ENGINES:
        got = get_engine(engine).open(artifact, threads=1).run("one", values, {})["out"]
        assert relative_max(got, want) < (1e-2 if (engine, format) == ("openvino", "bf16") else bound), engine
    assert sum(len(row["parts"]) for row in artifact.manifest["tensors"].values()) == len(decoded) + len(
        [p for p in params.values() if p.format.startswith("int")]
    )


@pytest.mark.parametrize(("format", "op"), [("int8", "add"), ("int4", "embed"), ("q8_0", "linear")])
def test_formats_that_an_op_cannot_read_are_refused(format: str, op: str, tmp_path: Path) -> None:
    s = StageBuilder("one")
    x = s.input("tokens", "i32", 3) if op == "embed" else s.input("x", "f32", 3, 32)
    s.output(s.op(op, x, "@w", name="out"))
    weights = weights_of({"w": (3, 32)})
    program = Program("one", (), (s.build(),), {"w": Param((3, 32), format)}, Schedule((Call("one"),), "out"), weights)
    with pytest.raises(Unsupported, match=f"tensor w .*{format}"):
        write_unchecked(program, tmp_path)
