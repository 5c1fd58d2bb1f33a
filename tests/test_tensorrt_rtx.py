"""NVIDIA's own parser and builder (TensorRT for RTX, on a CPU) take every graph of every family in every variant.

Shown: the graphs are accepted and compile for GPUs from Ampere on. Nothing is run. scripts/peers/tensorrt_rtx.sh
sets the environment up; without it these tests are skipped.
"""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from checkpoint_files import GOLDEN
from family_cases import CASES
from onnx_artifacts import program_of, weights_of
from test_tensorrt import VARIANTS, emitted

import vlac
from vlac.graph import StageBuilder

ROOT = Path(__file__).resolve().parents[1]
PYTHON = ROOT / ".venv-tensorrt-rtx" / "bin" / "python"
READY = ROOT / ".venv-tensorrt-rtx" / ".vlac-stamp"
pytestmark = [
    pytest.mark.trt,
    pytest.mark.skipif(not READY.is_file(), reason="no .venv-tensorrt-rtx: scripts/peers/tensorrt_rtx.sh sets it up"),
    pytest.mark.filterwarnings("ignore::vlac.errors.VlacWarning"),
]
MADE = [(t, "10.3") for t in VARIANTS] + [("tensorrt-fp16", "10.16"), ("tensorrt-int8", "10.16")]
RECIPES = {
    "quantize-kv": "smolvla_tiny",
    "merge-in-tower:samples=1": "smolvla_tiny",
    "rotate-values": "pi0_tiny",
    "reduce-visual-tokens:factor=2": "pi05_tiny",
}


def built(*paths: Path) -> list[dict[str, Any]]:
    """What the worker says of every graph."""
    command = [str(PYTHON), str(ROOT / "tests" / "tensorrt_rtx_worker.py"), *map(str, paths)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=1200)
    assert done.returncode == 0, done.stderr[-2000:]
    return [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]


@pytest.mark.parametrize("name", CASES)
def test_every_variant_of_a_family_builds(name: str, tmp_path: Path) -> None:
    case, paths, stages = CASES[name], [], 0
    for target, trt in MADE:
        made = vlac.compile(case.checkpoint, target, tmp_path / f"{target}-{trt}", goldens=1, trt=trt, **case.options)
        assert made.path is not None
        paths.append(made.path)
        stages += len(made.manifest["tensorrt"]["inputs"])
    rows = built(*paths)
    assert [r for r in rows if r["error"]] == []
    assert len(rows) == stages and all(r["plan_bytes"] > 1000 for r in rows)


def test_what_passes_leave_builds(tmp_path: Path) -> None:
    """Packed keys and values, weighted masks, rotations."""
    paths = []
    for i, (recipe, name) in enumerate(RECIPES.items()):
        case = CASES[name]
        out = tmp_path / str(i)
        made = vlac.compile(case.checkpoint, "tensorrt-fp16", out, [recipe], goldens=1, **case.options)
        assert made.path is not None
        paths.append(made.path)
    assert [r for r in built(*paths) if r["error"]] == []


@pytest.mark.parametrize("width", [32, 64, 128])
def test_the_attention_operator_builds(width: int, tmp_path: Path) -> None:
    b = StageBuilder("one")
    x = b.input("noise", "f32", 6, 32)
    q = b.op("linear", x, "@q")
    k, v = (b.op("linear", x, f"@{w}") for w in "kv")
    rows = [b.op("arange", start=0, stop=6)] * 2
    q = b.op("rope", b.op("rms_norm", q, eps=1e-6), rows[0], head_dim=width, base=1e4)
    b.output(
        b.op(
            "attention",
            q,
            k,
            v,
            b.op("attention_mask", *rows, b.input("token_valid", "bool", 6)),
            heads=4,
            kv_heads=2,
            scale=0.1,
            name="y",
        )
    )
    shapes = {"q": (4 * width, 32), "k": (2 * width, 32), "v": (2 * width, 32)}
    program = program_of(b, weights=weights_of(shapes), formats=dict.fromkeys(shapes, "f16"))
    path = emitted(program, tmp_path, "f16", "10.16")["one"]
    assert b"Attention" in path.read_bytes()
    assert [r["error"] for r in built(path)] == [""]


def test_one_head_is_spelt_out(tmp_path: Path) -> None:
    """The operator has no kernel for a single head with a mask."""
    b = StageBuilder("one")
    x = b.input("noise", "f32", 6, 32)
    rows = [b.op("arange", start=0, stop=6)] * 2
    mask = b.op("attention_mask", *rows, b.input("token_valid", "bool", 6))
    q, k, v = (b.op("linear", x, f"@{w}") for w in "qkv")
    b.output(b.op("attention", q, k, v, mask, heads=1, kv_heads=1, scale=0.1, name="y"))
    shapes = dict.fromkeys("qkv", (64, 32))
    program = program_of(b, weights=weights_of(shapes), formats=dict.fromkeys(shapes, "f16"))
    path = emitted(program, tmp_path, "f16", "10.16")["one"]
    assert b"Attention" not in path.read_bytes()
    assert [r["error"] for r in built(path)] == [""]


def test_a_graph_that_it_refuses(tmp_path: Path) -> None:
    """The check can fail: a zero point that is not 0."""
    onnx = pytest.importorskip("onnx")
    from onnx import helper, numpy_helper

    constants = {"s": np.float32(1), "z": np.int8(5)}
    nodes = [helper.make_node("QuantizeLinear", ["x", "s", "z"], ["q"])]
    nodes.append(helper.make_node("DequantizeLinear", ["q", "s", "z"], ["y"]))
    ends = [helper.make_tensor_value_info(k, onnx.TensorProto.FLOAT, (2, 3)) for k in "xy"]
    weights = [numpy_helper.from_array(np.asarray(v), k) for k, v in constants.items()]
    graph = helper.make_graph(nodes, "g", ends[:1], ends[1:], weights)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=9)
    onnx.save(model, str(tmp_path / "bad.onnx"))
    (row,) = built(tmp_path / "bad.onnx")
    assert row["error"]


def test_the_golden_folders_are_all_families() -> None:
    assert {p.name for p in GOLDEN.iterdir() if (p / "checkpoint").is_dir()} == set(CASES)
