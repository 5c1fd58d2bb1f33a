"""The targets for OpenVINO: what their folders hold, and how the engine chooses its groups of activations."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from family_cases import CASES
from onnx_artifacts import program_of, relative_max, weights_of, write_unchecked

import vlac
from vlac.artifact import open_artifact
from vlac.engines.base import get_engine
from vlac.engines.openvino_engine import _gains, _groups
from vlac.graph import Program, StageBuilder
from vlac.parity import parity

pytest.importorskip("onnx")
pytest.importorskip("openvino")
pytestmark = pytest.mark.filterwarnings("ignore:the task is longer")

# target -> formats of linears and embeddings, largest |chunk - LeRobot's| over the chunk's largest value; measured
# 2.6e-2 and 7.2e-3
TARGETS = {"openvino-int8": ("int8", 5e-2), "openvino-bf16": ("bf16", 2e-2)}
PRECISIONS: tuple[dict[str, str], ...] = ({}, {"precision": "bf16"})


@pytest.mark.parametrize("target", TARGETS)
def test_artifact_for_openvino(target: str, golden: Callable[[str], Any], tmp_path: Path) -> None:
    g, (form, bound) = golden("smolvla_tiny"), TARGETS[target]
    vlac.compile(g.checkpoint, target, tmp_path / "out", goldens=1)
    artifact = open_artifact(tmp_path / "out")
    assert {p.format for p in artifact.program.params.values()} == {"f32", form}
    assert all(set(row) == {"portable"} for row in artifact.manifest["onnx"].values())
    with vlac.load(tmp_path / "out", engine="onnxruntime", threads=1) as policy:
        assert relative_max(policy.act(**g.observation(0)), g.chunk(0)) <= bound
    for options in PRECISIONS:
        with vlac.load(tmp_path / "out", threads=1, options=options) as policy:
            assert policy.info["engine"] == "openvino"
            assert relative_max(policy.act(**g.observation(0)), g.chunk(0)) <= bound
            for i in range(2):
                whole = policy.act(**g.observation(i))
                few = policy.act(**g.observation(i), n_actions=4, reuse=False)
                assert np.abs(few - whole[:4]).max() <= 1e-5 * np.abs(whole).max()


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("family", ["smolvla_tiny", "pi05_tiny", "groot_n17_tiny"])
def test_the_compiler_is_right_in_bfloat16_too(family: str, target: str, tmp_path: Path) -> None:
    """These networks are too small to be computed in bfloat16 unasked; the large ones that are do not fit here."""
    case = CASES[family]
    vlac.compile(case.checkpoint, target, tmp_path / "out", goldens=1, **case.options)
    for options in PRECISIONS:
        report = parity(tmp_path / "out", engine="openvino", options=options)
        assert report["compiler"]["ok"], report["compiler"]


def test_bfloat16_only_where_it_saves_time(tmp_path: Path) -> None:
    def one(form: str, rows: int) -> Program:
        b = StageBuilder("s")
        b.output(b.linear(b.input("state", "f32", rows, 128), "@w"))
        return program_of(b, weights=weights_of({"w": (128, 128)}), formats={"w": form})

    assert [_gains(one("bf16", rows))["s"] for rows in (8, 480, 512)] == [False, False, True]
    assert [_gains(one("int8", rows))["s"] for rows in (512, 7680, 8192)] == [False, False, True]
    session = get_engine("openvino").open(write_unchecked(one("int8", 512), tmp_path), threads=1)
    assert session.info["precision"] == {"s": "f32"}


def test_models_for_fewer_actions_are_made_when_asked_for(golden: Callable[[str], Any], tmp_path: Path) -> None:
    g = golden("smolvla_tiny")
    vlac.compile(g.checkpoint, "onnx-fp32", tmp_path / "out", goldens=0)
    with vlac.load(tmp_path / "out", engine="openvino", threads=1) as policy:
        given, session = g.observation(0), policy._engine
        whole = policy.act(**given)
        opened = lambda: sorted(rows for stage, rows in session._open_now if stage == "flow")  # noqa: E731
        assert opened() == [len(whole)]
        for n, rows in ((4, 4), (2, 2), (len(whole), 2)):
            assert np.abs(policy.act(**given, n_actions=n, reuse=False) - whole[:n]).max() <= 1e-5 * np.abs(whole).max()
            assert opened() == sorted({rows, len(whole)})
        assert np.array_equal(policy.act(**given, reuse=False), whole)


def test_inputs_are_read_anew_and_need_not_be_writable(tmp_path: Path) -> None:
    b = StageBuilder("s")
    b.output(b.op("linear", b.input("state", "f32", 16, 16), "@w", name="y"))
    weights = weights_of({"w": (8, 16)})
    given, weight = program_of(b, weights=weights), weights["w"].load()
    session = get_engine("openvino").open(write_unchecked(given, tmp_path), threads=1)
    x = np.ones((16, 16), np.float32)
    for scale in (1.0, 2.0):
        x[:] = scale
        assert np.allclose(session.run("s", {"state": x}, {})["y"], scale * weight.sum(1), atol=1e-5)
    x.flags.writeable = False
    assert np.allclose(session.run("s", {"state": x}, {})["y"], 2 * weight.sum(1), atol=1e-5)
    assert np.allclose(session.run("s", {"state": x[:, ::-1]}, {})["y"], 2 * weight.sum(1), atol=1e-5)


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
