"""Outlier channels: the int8 targets smooth norms by themselves where the check says so, and leave others untouched."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import vlac
from vlac.artifact import open_artifact
from vlac.engines.base import get_engine
from vlac.registry import passes, targets

pytest.importorskip("onnx")
pytestmark = pytest.mark.filterwarnings("ignore:the task is longer")
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "benchmarks"))
import outliers  # noqa: E402


@pytest.fixture(scope="module", autouse=True)
def the_pass() -> Iterator[None]:
    outliers.register(25.0, 6)
    yield
    del passes._entries["outliers"]


@pytest.mark.parametrize(("target", "engine", "fixed"), outliers.FORMS)
def test_shipped_forms_stand_outliers(
    target: str, engine: str, fixed: str, golden: Callable[[str], Any], tmp_path: Path
) -> None:
    if why := get_engine(engine).missing():
        pytest.skip(why)
    recipe = ["outliers", "smooth-norms", fixed] if fixed else ["outliers"]
    vlac.compile(golden("smolvla_tiny").checkpoint, target, tmp_path / "out", passes=recipe, goldens=2)
    # bfloat16 moves a network this small by a third of what int8 does
    exact = {"precision": "f32"} if engine == "openvino" else {}
    assert outliers.drift(tmp_path / "out", engine, **exact) <= outliers.LIMIT
    applied = open_artifact(tmp_path / "out").manifest["history"]
    assert [p["name"] for p in applied][:2] == ["outliers", "smooth-norms"]
    assert applied[1]["figures"]["smoothed"] > 0


def test_without_smoothing_they_do_not(
    golden: Callable[[str], Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import dataclasses

    monkeypatch.setitem(targets._entries, "gguf-q8", dataclasses.replace(targets.get("gguf-q8"), passes=()))
    vlac.compile(golden("smolvla_tiny").checkpoint, "gguf-q8", tmp_path / "out", passes=["outliers"], goldens=2)
    assert outliers.drift(tmp_path / "out", "ggml") > outliers.LIMIT


def test_a_network_without_outliers_is_left_alone(golden: Callable[[str], Any], tmp_path: Path) -> None:
    done = vlac.compile(golden("smolvla_tiny").checkpoint, "onnx-int8", tmp_path / "out", goldens=1)
    assert done.manifest["history"] == []
