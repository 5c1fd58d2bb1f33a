"""LeRobot's answers (tests/golden) against ONNX artifacts in both engines: raw observation in, robot units out."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from onnx_artifacts import relative_max

import vlac

pytest.importorskip("onnx")
pytestmark = pytest.mark.filterwarnings("ignore:the task is longer")

GOLDENS = ("smolvla_tiny", "smolvla_letterbox")
# target -> largest |chunk - LeRobot's| over the chunk's largest value, both engines, both goldens; measured on AVX512:
# fp32 1.7e-6, fp16 8.3e-4, int8 2.7e-2, int4 2.7e-1 (Gaussian weights: a hard case for 4 bit)
BOUNDS = {"onnx-fp32": 2e-5, "onnx-fp16": 2e-3, "onnx-int8": 5e-2, "onnx-int4": 0.4}


@pytest.fixture(scope="module")
def compiled(golden: Callable[[str], Any], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[..., Path]]:
    """compiled(golden name, target, single_file): the artifact, made once."""

    @cache
    def make(name: str, target: str, single_file: bool = False) -> Path:
        out = tmp_path_factory.mktemp("artifact") / "out"
        vlac.compile(golden(name).checkpoint, target=target, out=out, single_file=single_file, goldens=1)
        return out

    yield make


def worst(artifact: Path, engine: str, golden: Any, options: dict[str, str] | None = None) -> float:
    with vlac.load(artifact, engine=engine, threads=1, options=options) as policy:
        return max(relative_max(policy.act(**golden.observation(i)), golden.chunk(i)) for i in range(len(golden.tasks)))


@pytest.mark.parametrize("engine", ["onnxruntime", "openvino"])
@pytest.mark.parametrize("target", BOUNDS)
@pytest.mark.parametrize("name", GOLDENS)
def test_chunks_are_lerobots(
    name: str, target: str, engine: str, golden: Callable[[str], Any], compiled: Callable[..., Path]
) -> None:
    assert worst(compiled(name, target), engine, golden(name)) <= BOUNDS[target]


@pytest.mark.parametrize("engine", ["onnxruntime", "openvino"])
@pytest.mark.parametrize("target", ["onnx-fp32", "onnx-int8"])
@pytest.mark.parametrize("name", GOLDENS)
def test_chunks_of_one_file_are_lerobots(
    name: str, target: str, engine: str, golden: Callable[[str], Any], compiled: Callable[..., Path]
) -> None:
    assert worst(compiled(name, target, True), engine, golden(name)) <= BOUNDS[target]


def test_int8_with_exact_activations_costs_what_the_weights_cost(
    golden: Callable[[str], Any], compiled: Callable[..., Path]
) -> None:
    """numpy with the decoded weights against OpenVINO in f32: the difference is the rounding of activations only."""
    g, artifact = golden("smolvla_tiny"), compiled("smolvla_tiny", "onnx-int8")
    with vlac.load(artifact, engine="numpy") as policy:
        decoded = policy.act(**g.observation(0))
    with vlac.load(artifact, engine="openvino", threads=1, options={"precision": "f32"}) as policy:
        assert relative_max(policy.act(**g.observation(0)), decoded) <= 1.5e-2
    with vlac.load(artifact, engine="onnxruntime", threads=1) as policy:
        assert relative_max(policy.act(**g.observation(0)), decoded) <= 3e-2


@pytest.mark.parametrize("target", BOUNDS)
def test_the_census_realises_what_was_asked(target: str, compiled: Callable[..., Path]) -> None:
    from vlac.artifact import open_artifact

    artifact = open_artifact(compiled("smolvla_tiny", target))
    linear, embed = {
        "onnx-fp32": ("f32", "f32"),
        "onnx-fp16": ("f16", "f16"),
        "onnx-int8": ("int8", "int8"),
        "onnx-int4": ("int4", "int8"),
    }[target]
    formats = {n: p.format for n, p in artifact.program.params.items()}
    assert set(formats.values()) == {"f32", linear, embed}
    ids = [n.inputs[1][1:] for s in artifact.program.stages for n in s.nodes if n.op == "embed"]
    assert embed in {formats[i] for i in ids}
    heads = [n.inputs[1][1:] for s in artifact.program.stages for n in s.nodes if n.inputs[:1] == ("x",)]
    assert heads and all(formats[h] == "f32" for h in heads if h in formats)


def test_artifacts_hold_every_weight_once(compiled: Callable[..., Path]) -> None:
    sizes = {t: sum(f.stat().st_size for f in compiled("smolvla_tiny", t).glob("*.data")) for t in BOUNDS}
    assert sizes["onnx-fp32"] > sizes["onnx-fp16"] > sizes["onnx-int8"]
    assert np.isclose(sizes["onnx-fp32"] / sizes["onnx-fp16"], 2, atol=0.4)
