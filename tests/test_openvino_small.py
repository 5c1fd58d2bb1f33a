"""OpenVINO on stages with very few rows, which its generated kernels do not survive; in a process that may die."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from onnx_artifacts import program_of, relative_max, weights_of, write_unchecked

from vlac.engines import openvino_engine
from vlac.engines.base import get_engine
from vlac.engines.numpy_engine import NumpySession
from vlac.graph import Program, StageBuilder

pytest.importorskip("onnx")
pytest.importorskip("openvino")

VISION = [1, 4, 9]
CHUNKS = [1, 2, 9]


def vision_program(patches: int) -> Program:
    """One layer of a vision tower over that many patches, with no mask."""
    b = StageBuilder("vision")
    x = b.add(b.linear(b.input("state", "f32", patches, 48), "@patch"), "@position")
    h = b.layer_norm(x, "@ln", "@ln.bias", eps=1e-6)
    q, k, v = (b.linear(h, f"@{n}") for n in "qkv")
    x = b.add(x, b.linear(b.attention(q, k, v, heads=3, kv_heads=3, scale=0.3), "@o", "@o.bias"))
    h = b.layer_norm(x, "@ln", "@ln.bias", eps=1e-6)
    h = b.gelu(b.linear(h, "@up", "@up.bias"), approximate="tanh")
    b.output(b.op("add", x, b.linear(h, "@down", "@down.bias"), name="y"))
    shapes = {"patch": (24, 48), "position": (patches, 24), "ln": (24,), "ln.bias": (24,), "o.bias": (24,)}
    shapes |= {"up": (32, 24), "up.bias": (32,), "down": (24, 32), "down.bias": (24,)}
    return program_of(b, weights=weights_of(shapes | dict.fromkeys("qkvo", (24, 24))))


def decoder_program(rows: int) -> Program:
    """Grouped heads under a mask that is made in the graph, as a chunk of that many actions attends."""
    b = StageBuilder("flow")
    x, valid = b.input("state", "f32", rows, 24), b.input("token_valid", "bool", rows + 6)
    past = b.input("noise", "f32", 6, 16)
    keys = b.concat(b.full(shape=(6,), value=0.0, dtype="i32"), b.arange(start=1, stop=rows + 1), axis=0)
    mask = b.attention_mask(b.arange(start=1, stop=rows + 1), keys, valid)
    k, v = (b.concat(past, b.linear(x, f"@{n}"), axis=0) for n in "kv")
    b.output(b.op("attention", b.linear(x, "@q"), k, v, mask, name="y", heads=3, kv_heads=1, scale=0.25))
    return program_of(b, weights=weights_of({"q": (48, 24), "k": (16, 24), "v": (16, 24)}))


def inputs_of(program: Program) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    made = {}
    for name, kind in program.stages[0].inputs:
        shape = tuple(int(str(d)) for d in kind.shape)
        made[name] = np.ones(shape, bool) if kind.dtype == "bool" else rng.standard_normal(shape).astype(np.float32)
    return made


def worst(program: Program, folder: Path) -> float:
    """Largest difference from the numpy reference, relative."""
    given = inputs_of(program)
    name = program.stages[0].name
    session = get_engine("openvino").open(write_unchecked(program, folder), threads=1)
    found = session.run(name, given, {})
    expected = NumpySession(program, lambda w: program.weights[w].load()).run(name, given, {})
    return relative_max(found["y"], expected["y"])


ALONE = """
import sys
from pathlib import Path
import test_openvino_small as t
for rows in t.VISION:
    assert t.worst(t.vision_program(rows), Path(sys.argv[1])) < 1e-5, rows
for rows in t.CHUNKS:
    assert t.worst(t.decoder_program(rows), Path(sys.argv[1])) < 1e-5, rows
print("survived")
"""


def test_few_rows_neither_crash_nor_differ(tmp_path: Path) -> None:
    path = f"{Path(__file__).parent}:{Path(__file__).parents[1]}"
    run = subprocess.run(
        [sys.executable, "-c", ALONE, str(tmp_path)], capture_output=True, text=True, env={"PYTHONPATH": path}
    )
    assert run.stdout.strip() == "survived", f"exit {run.returncode}: {run.stderr[-2000:]}"


def test_a_single_row_beside_many_is_no_reason() -> None:
    """A state of one row goes through one linear in every prefix."""
    b = StageBuilder("prefix")
    x = b.concat(b.input("noise", "f32", 64, 24), b.linear(b.input("state", "f32", 1, 8), "@state"), axis=0)
    b.output(b.op("linear", b.relu(b.linear(x, "@q")), "@o", name="y"))
    weights = weights_of({"state": (24, 8), "q": (24, 24), "o": (24, 24)})
    assert openvino_engine._snippets(program_of(b, weights=weights), "prefix", "CPU") == {}


@pytest.mark.parametrize(("rows", "off"), [(1, True), (4, True), (8, True), (9, False), (1024, False)])
def test_only_small_stages_lose_generated_kernels(rows: int, off: bool) -> None:
    for program in (vision_program(rows), decoder_program(rows)):
        name = program.stages[0].name
        expected = {"SNIPPETS_MODE": "DISABLE"} if off else {}
        assert openvino_engine._snippets(program, name, "CPU") == expected
        assert openvino_engine._snippets(program, openvino_engine.SINGLE, "CPU") == expected
        assert openvino_engine._snippets(program, name, "GPU") == {}
