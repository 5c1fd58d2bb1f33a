"""The targets for OpenVINO: what their folders hold, and how the engine chooses its groups of activations."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from onnx_artifacts import program_of, relative_max, weights_of

import vlac
from vlac.artifact import open_artifact
from vlac.engines.openvino_engine import _groups
from vlac.graph import Program, StageBuilder

pytest.importorskip("onnx")
pytest.importorskip("openvino")
pytestmark = pytest.mark.filterwarnings("ignore:the task is longer")

# target -> formats of linears and embeddings, largest |chunk - LeRobot's| over the chunk's largest value; measured
# 2.6e-2 and 7.2e-3
TARGETS = {"openvino-int8": ("int8", 5e-2), "openvino-bf16": ("bf16", 2e-2)}


@pytest.mark.parametrize("target", TARGETS)
def test_artifact_for_openvino(target: str, golden: Callable[[str], Any], tmp_path: Path) -> None:
    g, (form, bound) = golden("smolvla_tiny"), TARGETS[target]
    vlac.compile(g.checkpoint, target, tmp_path / "out", goldens=1)
    artifact = open_artifact(tmp_path / "out")
    assert {p.format for p in artifact.program.params.values()} == {"f32", form}
    assert all(set(row) == {"portable"} for row in artifact.manifest["onnx"].values())
    for engine in ("openvino", "onnxruntime"):
        with vlac.load(tmp_path / "out", engine=engine, threads=1) as policy:
            assert relative_max(policy.act(**g.observation(0)), g.chunk(0)) <= bound
    with vlac.load(tmp_path / "out", threads=1) as policy:
        assert policy.info["engine"] == "openvino"


def linears(form: str, *widths: tuple[int, int]) -> Program:
    """A stage of one linear for each (rows of the weight, its width)."""
    b = StageBuilder("s")
    for i, (_, width) in enumerate(widths):
        b.output(b.linear(b.input(f"x{i}", "f32", 16, width), f"@w{i}"))
    weights = weights_of({f"w{i}": shape for i, shape in enumerate(widths)})
    return program_of(b, weights=weights, formats=dict.fromkeys(weights, form))


@pytest.mark.parametrize(
    ("form", "widths", "group"),
    [
        ("int8", [(3072, 768), (768, 3072)], 384),
        ("int8", [(960, 720), (4096, 720), (720, 960), (720, 2048)], 240),
        ("int8", [(1600, 960), (960, 2560), (320, 320)], 320),
        ("int8", [(64, 2048), (64, 16384)], 256),
        ("int8", [(24, 24)], 16),
        ("int8", [(24, 8)], 0),
        ("int4", [(64, 960)], 32),
        ("f32", [(64, 960)], 0),
    ],
)
def test_groups_divide_most_of_the_work(form: str, widths: list[tuple[int, int]], group: int, monkeypatch: Any) -> None:
    monkeypatch.setattr("onnx_artifacts.check", lambda program: program)  # inputs that no runtime gives
    chosen = _groups(linears(form, *widths), "s", "CPU")
    assert chosen == {"DYNAMIC_QUANTIZATION_GROUP_SIZE": group}
    assert _groups(linears(form, *widths), "s", "GPU") == {}
