"""`vlac doctor`: every registered engine and target is there, works or says why not; what kills a process is named."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from vlac import doctor, doctor_worker
from vlac.engines.base import NAMES
from vlac.registry import targets


@pytest.fixture(scope="module")
def found() -> dict[str, Any]:
    return doctor.examine()


def test_whatever_is_registered_is_listed(found: dict[str, Any]) -> None:
    assert list(found["engines"]) == list(NAMES)
    assert set(found["targets"]) == {t.name for t in targets.all()}
    for name, t in found["targets"].items():
        assert list(t["engines"]) == list(targets.get(name).engines)
        assert all(t["engines"].values()), name
        assert t["works"] == ("works" in t["engines"].values())
        assert t["written"] or t["says"], name


def test_an_engine_that_is_not_here_says_what_to_do(found: dict[str, Any]) -> None:
    for name, e in found["engines"].items():
        if not e["installed"]:
            assert e["says"] and all(
                state != "works" for t in found["targets"].values() for state in [t["engines"].get(name)]
            )
            assert not e["fix"] or any(e["fix"] in a for a in found["advice"])


def test_the_text_fits_on_a_screen(found: dict[str, Any]) -> None:
    text = doctor.text(found)
    assert len(text.splitlines()) <= 50
    for name in found["engines"]:
        assert name in text
    for family in {n.split("-")[0] for n in found["targets"]}:
        assert family in text
    assert json.loads(json.dumps(found)) == found


def test_a_robot_without_anything(monkeypatch: pytest.MonkeyPatch) -> None:
    from vlac.engines.base import get_engine

    class Gone:
        def __init__(self, name: str) -> None:
            self.name = name

        def missing(self) -> str:
            return f"{self.name} is not installed; pip install 'vlac-compiler[{self.name}]' (or only {self.name})"

    monkeypatch.setattr(doctor, "get_engine", lambda name: get_engine(name) if name == "numpy" else Gone(name))
    monkeypatch.setattr(doctor, "_worker", lambda engine, names: {n: written(n, engine) for n in names})

    def written(name: str, engine: str) -> dict[str, Any]:
        assert engine == "-", "an engine that is missing is not tried"
        return {"target": name, "written": False, "works": False, "says": "onnx is not installed"}

    found = doctor.examine()
    assert "onnxruntime: pip install 'vlac-compiler[onnxruntime]'" in found["advice"]
    assert any("no engine for a robot works here" in a for a in found["advice"])
    assert found["targets"]["gguf-q8"]["engines"]["ggml"].startswith("ggml is not installed")
    assert "cannot be written: onnx is not installed" in doctor.text(found)


def test_what_kills_the_process_is_named_and_the_rest_is_tried(monkeypatch: pytest.MonkeyPatch) -> None:
    def process(command: list[str]) -> subprocess.CompletedProcess[str]:
        names, out = command[4:], ""
        for name in names:
            if name == "bad":
                return subprocess.CompletedProcess(command, -11, out, "")
            out += json.dumps({"target": name, "written": True, "works": True, "says": ""}) + "\n"
        return subprocess.CompletedProcess(command, 0, "noise\n" + out, "")

    monkeypatch.setattr(doctor, "_process", process)
    found = doctor._worker("ggml", ["a", "bad", "b"])
    assert found["a"]["works"] and found["b"]["works"]
    assert found["bad"]["says"] == "the process was killed by signal 11"


@pytest.mark.parametrize(
    ("says", "fix"),
    [
        ("x is not installed; pip install 'vlac-compiler[onnx]' (or only x)", "pip install 'vlac-compiler[onnx]'"),
        ("no GPU here", ""),
    ],
)
def test_the_fix_is_the_engines_own(says: str, fix: str) -> None:
    assert doctor._fix(says) == fix


def test_names_that_begin_alike_are_shortened() -> None:
    assert (
        doctor._shortened(["gguf-q4", "gguf-q8", "onnx-int8", "rt", "rt-int8"]) == "gguf-q4, -q8, onnx-int8, rt, -int8"
    )


# --- one target on one engine ------------------------------------------------------------------------------------


class Session:
    def __init__(self, answer: Callable[[Any], Any]) -> None:
        self.answer = answer

    def run(self, stage: str, inputs: Any, symbols: Any) -> dict[str, Any]:
        return {"y": self.answer(inputs["state"])}

    def close(self) -> None: ...


def wrong(x: Any) -> Any:
    return np.roll(x, 1, axis=1)[:, :64]


def broken(x: Any) -> Any:
    raise ZeroDivisionError("no kernel")


@pytest.mark.parametrize(
    ("answer", "says"),
    [(wrong, "a product of matrices is wrong: cosine"), (broken, "ZeroDivisionError: no kernel")],
)
def test_an_engine_that_computes_nonsense(
    answer: Callable[[Any], Any], says: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Engine:
        def open(self, artifact: Any, threads: int) -> Session:
            return Session(answer)

    monkeypatch.setattr(doctor_worker, "get_engine", lambda name: Engine())
    row = doctor_worker.attempt("gguf-f32", "ggml")
    assert row["written"] and not row["works"] and row["says"].startswith(says)


@pytest.mark.parametrize("name", ["gguf-f32", "gguf-q8"])
def test_a_target_that_works(name: str) -> None:
    pytest.importorskip("torch")
    assert doctor_worker.attempt(name, "torch") == {"target": name, "written": True, "works": True, "says": ""}
