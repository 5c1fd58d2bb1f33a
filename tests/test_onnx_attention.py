"""Long attention for ONNX Runtime, on integers or as one op: close to float32, and only where it may be."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from onnx_artifacts import program_of, weights_of, write_unchecked

from vlac.engines.base import get_engine
from vlac.engines.numpy_engine import NumpySession
from vlac.errors import EngineError
from vlac.graph import Program, StageBuilder
from vlac.targets.onnx import forms

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")

WIDTH = 48


def program(
    rows: int = 256,
    keys: int | None = None,
    kv_heads: int = 3,
    masked: bool = False,
    heads: int = 3,
    int8: bool = True,
) -> Program:
    """A linear, int8 so that there is an integer form, then attention."""
    b = StageBuilder("vision")
    x = b.input("state", "f32", rows, WIDTH)
    memory = b.input("noise", "f32", keys, WIDTH) if keys else x
    width = WIDTH // heads * kv_heads
    q, k, v = b.linear(x, "@q"), b.linear(memory, "@k"), b.linear(memory, "@v")
    mask = []
    if masked:
        ones = b.full(shape=(rows,), value=1.0, dtype="i32")
        mask.append(b.attention_mask(ones, ones, b.full(shape=(rows,), value=1.0, dtype="bool")))
    b.output(b.op("attention", q, k, v, *mask, name="y", heads=heads, kv_heads=kv_heads, scale=0.25))
    shapes = {"q": (WIDTH, WIDTH), "k": (width, WIDTH), "v": (width, WIDTH)}
    return program_of(b, weights=weights_of(shapes), formats={"q": "int8"} if int8 else {})


def inputs_of(given: Program, spread: float = 1.0) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(1)
    made = {}
    for name, kind in given.stages[0].inputs:
        x = rng.standard_normal([int(str(d)) for d in kind.shape]).astype(np.float32)
        x[:, ::7] *= spread
        made[name] = x
    return made


def error(given: Program, folder: Path, spread: float = 1.0, **options: str) -> float:
    """Relative L2 against the numpy reference of the same artifact (int8 weights in both)."""
    artifact = write_unchecked(given, folder)
    inputs = inputs_of(given, spread)
    found = get_engine("onnxruntime").open(artifact, threads=1, options=options).run("vision", inputs, {})["y"]
    weight = {name: t.decode() for name, t in artifact.tensors.items()}
    expected = NumpySession(given, weight.__getitem__).run("vision", inputs, {})["y"]
    return float(np.linalg.norm(found - expected) / np.linalg.norm(expected))


@pytest.mark.parametrize(
    ("given", "integer"),
    [
        (program(), True),
        (program(rows=300, keys=257), True),
        (program(heads=1, kv_heads=1), True),
        (program(rows=255), False),
        (program(rows=300, keys=255), False),
        (program(kv_heads=1), False),
        (program(masked=True), False),
    ],
    ids=["long", "cross", "one head", "few queries", "few keys", "grouped", "masked"],
)
def test_where_it_is_used_and_how_close_it_is(given: Program, integer: bool, tmp_path: Path) -> None:
    assert forms(given) == (("integer", "linears", "portable") if integer else ("integer", "portable"))
    whole, linears = (error(given, tmp_path, int8=how) for how in ("integer", "linears"))
    assert linears < 0.02
    assert (linears < whole < 0.03) if integer else whole == linears


def test_channels_of_different_size_and_heads_of_zeros(tmp_path: Path) -> None:
    assert error(program(), tmp_path, spread=20.0, int8="integer") < 0.1
    given = program()
    session = get_engine("onnxruntime").open(write_unchecked(given, tmp_path), threads=1, options={"int8": "integer"})
    zeros = {"state": np.zeros((256, WIDTH), np.float32)}
    assert np.array_equal(session.run("vision", zeros, {})["y"], np.zeros((256, WIDTH), np.float32))


@pytest.mark.parametrize(
    ("given", "fused"),
    [
        (program(int8=False), True),
        (program(rows=300, keys=257, int8=False), True),
        (program(rows=255, int8=False), False),
        (program(kv_heads=1, int8=False), False),
        (program(masked=True, int8=False), False),
    ],
    ids=["long", "cross", "few queries", "grouped", "masked"],
)
def test_floats_are_one_op_where_it_is_long(given: Program, fused: bool, tmp_path: Path) -> None:
    assert forms(given) == (("portable", "fused") if fused else ("portable",))
    assert error(given, tmp_path) < 1e-6
    graphs = write_unchecked(given, tmp_path).manifest["onnx"]["vision"]
    ops = {form: {n.op_type for n in onnx.load(tmp_path / name).graph.node} for form, name in graphs.items()}
    assert {form: "MultiHeadAttention" in found for form, found in ops.items()} == {
        "portable": False,
        **({"fused": True} if fused else {}),
    }


def test_the_ways_are_named(tmp_path: Path) -> None:
    artifact = write_unchecked(program(), tmp_path)
    assert artifact.manifest["onnx"]["vision"] == {
        "integer": "vision.onnx",
        "linears": "vision.linears.onnx",
        "portable": "vision.portable.onnx",
    }
    with pytest.raises(EngineError, match="int8='fast'; there are: integer, linears, float"):
        get_engine("onnxruntime").open(artifact, options={"int8": "fast"})


def test_an_artifact_without_that_form_runs_with_its_nearest(tmp_path: Path) -> None:
    assert error(program(rows=8), tmp_path, int8="linears") == error(program(rows=8), tmp_path, int8="integer")
