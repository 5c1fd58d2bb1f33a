"""Fixed scales of activations: integers in ONNX Runtime without a look at the rows, only where no channel towers."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import vlac
from vlac.artifact import open_artifact
from vlac.registry import passes

onnx = pytest.importorskip("onnx")
pytestmark = pytest.mark.filterwarnings("ignore:the task is longer")
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "benchmarks"))
import outliers  # noqa: E402

STATIC = "quantize-weights:bits=8,group=channel,act=int8-tensor,samples=2"


@pytest.fixture(scope="module", autouse=True)
def the_pass() -> Iterator[None]:
    outliers.register(25.0, 6)
    yield
    del passes._entries["outliers"]


def last(path: Path) -> dict[str, Any]:
    history: list[dict[str, Any]] = open_artifact(path).manifest["history"]
    return history[-1]


@pytest.mark.parametrize(("target", "engine"), [("onnx-int8", "onnxruntime"), ("openvino-int8", "openvino")])
def test_fixed_scales(target: str, engine: str, golden: Callable[[str], Any], tmp_path: Path) -> None:
    pytest.importorskip(engine)
    vlac.compile(golden("smolvla_tiny").checkpoint, target, tmp_path / "out", passes=[STATIC], goldens=2)
    assert last(tmp_path / "out")["figures"]["activations_by_row"] == []
    assert outliers.drift(tmp_path / "out", engine) <= outliers.LIMIT
    if target == "onnx-int8":
        nodes = onnx.load(str(tmp_path / "out" / "flow.onnx"), load_external_data=False).graph.node
        ops = [n.op_type for n in nodes]
        assert ops.count("MatMulIntegerToFloat") > 4
        assert not {"ReduceMax", "Clip", "DequantizeLinear"} & set(ops)


def test_smoothing_comes_before_scales_are_fixed(golden: Callable[[str], Any], tmp_path: Path) -> None:
    """Fixed where smoothing has done its work, and refused by name where it has not been asked for."""
    checkpoint = golden("smolvla_tiny").checkpoint
    smooth = ["outliers", "smooth-norms", STATIC]
    vlac.compile(checkpoint, "onnx-int8", tmp_path / "smooth", passes=smooth, goldens=2)
    assert last(tmp_path / "smooth")["figures"]["activations_by_row"] == []
    assert outliers.drift(tmp_path / "smooth", "onnxruntime") <= outliers.LIMIT
    vlac.compile(checkpoint, "onnx-int8", tmp_path / "rough", passes=["outliers", STATIC], goldens=2)
    found = last(tmp_path / "rough")
    assert found["name"] == "quantize-weights"
    assert any("fc1" in w for w in found["figures"]["activations_by_row"])
    rounded = {
        n.attr["form"]
        for s in open_artifact(tmp_path / "rough").program.stages
        for n in s.nodes
        if n.op == "round_int8"
    }
    assert rounded == {"tensor", "token"}
    assert np.isfinite(outliers.drift(tmp_path / "rough", "onnxruntime"))
