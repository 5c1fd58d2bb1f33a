"""Reuse across calls: only what depends on a change is computed, and chunks are the same bits as without it."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from runtime_toy import artifact, observation

import vlac
from vlac.engines.base import get_engine
from vlac.errors import EngineError, InputError
from vlac.graph import Repeat
from vlac.runtime.reuse import MAX_PROMPTS, Reuse, same
from vlac.runtime.session import Session

PICTURES = {"top": "picture observation.images.top", "wrist": "picture observation.images.wrist"}


class Counted:
    """A session that counts which stages its engine runs."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, options: Any = None, **io: Any) -> None:
        self.session = Session(artifact(**io), options=options)
        self.ran: list[str] = []
        engine = self.session._engine
        assert engine is not None
        run, repeat = engine.run, engine.repeat

        def counted_run(stage: str, inputs: Mapping[str, Any], symbols: Mapping[str, int]) -> Any:
            self.ran.append(stage)
            return run(stage, inputs, symbols)

        def counted_repeat(step: Repeat, inputs: Mapping[str, Any], symbols: Mapping[str, int]) -> Any:
            made = repeat(step, inputs, symbols)
            del self.ran[-step.times :]
            self.ran.append(step.stage)
            return made

        monkeypatch.setattr(engine, "run", counted_run)
        monkeypatch.setattr(engine, "repeat", counted_repeat)

    def act(self, **changes: Any) -> tuple[np.ndarray, list[str], set[str]]:
        """(chunk, stages that were run, what was reused)."""
        self.ran.clear()
        chunk = self.session.act(**{**observation(), **changes})
        return chunk, list(self.ran), set(self.session.stats["reused"])


def other(picture: np.ndarray) -> np.ndarray:
    changed = picture.copy()
    changed[0, 0, 0] ^= 1
    return changed


IMAGES = observation()["images"]
CHANGES: dict[str, tuple[dict[str, Any], list[str]]] = {
    "nothing": ({}, []),
    "noise": ({"seed": 1}, ["flow"]),
    "state": ({"state": [0.0, 1.0, 2.0]}, ["prefix", "flow"]),
    "task": ({"task": "pick up the cube"}, ["prefix", "flow"]),
    "top": ({"images": {**IMAGES, "top": other(IMAGES["top"])}}, ["vision", "prefix", "flow"]),
    "wrist": ({"images": {**IMAGES, "wrist": other(IMAGES["wrist"])}}, ["vision", "prefix", "flow"]),
    "both": ({"images": {k: other(v) for k, v in IMAGES.items()}}, ["vision", "vision", "prefix", "flow"]),
    "same bytes elsewhere": ({"images": {k: v.copy(order="F") for k, v in IMAGES.items()}}, []),
    "units": ({"units": "normalized", "state": [0.5, 0.0, -2.0]}, []),
}


@pytest.mark.parametrize("change", CHANGES)
def test_only_what_reads_a_change_is_run_again(change: str, monkeypatch: pytest.MonkeyPatch) -> None:
    given_changes, expected = CHANGES[change]
    counted = Counted(monkeypatch)
    _, ran, reused = counted.act()
    assert ran == ["vision", "vision", "prefix", "flow"] and reused == set()
    chunk, ran, reused = counted.act(**given_changes)
    assert ran == expected
    assert ("prompt" in reused) == ("task" not in given_changes)
    assert {"prefix", "flow"} - reused == set(expected) - {"vision"}
    fresh = Session(artifact()).act(**{**observation(), **given_changes})
    assert np.array_equal(chunk, fresh)


def test_a_camera_is_known_by_its_bytes_not_by_its_array(monkeypatch: pytest.MonkeyPatch) -> None:
    """Cameras write the next frame into the array of the last one."""
    counted = Counted(monkeypatch)
    frame = IMAGES["top"].copy()
    counted.act(images={**IMAGES, "top": frame})
    frame[3, 3] += 1
    chunk, ran, reused = counted.act(images={**IMAGES, "top": frame})
    assert ran == ["vision", "prefix", "flow"]
    assert reused == {"prompt", PICTURES["wrist"], "vision[1]"}
    assert np.array_equal(chunk, Session(artifact()).act(**{**observation(), "images": {**IMAGES, "top": frame}}))


def test_arrays_of_the_caller_may_be_overwritten(monkeypatch: pytest.MonkeyPatch) -> None:
    counted = Counted(monkeypatch)
    state, noise = np.array([1.5, 2.0, -1.0], np.float32), np.zeros((5, 6), np.float32)
    first, *_ = counted.act(state=state, noise=noise, seed=None)
    state += 1
    second, ran, _ = counted.act(state=state, noise=noise, seed=None)
    assert ran == ["prefix", "flow"] and not np.array_equal(first, second)
    noise += 1
    third, ran, _ = counted.act(state=state, noise=noise, seed=None)
    assert ran == ["flow"] and not np.array_equal(second, third)


def test_a_chunk_may_be_overwritten(monkeypatch: pytest.MonkeyPatch) -> None:
    session = Session(artifact(normalised_action_steps=(), action_dim=6, action_steps=()))
    first = session.act(**observation())
    kept = first.copy()
    first[:] = 7
    assert np.array_equal(session.act(**observation()), kept) and "flow" in session.stats["reused"]


@pytest.mark.parametrize("how", ["load", "act"])
def test_reuse_can_be_switched_off(how: str, monkeypatch: pytest.MonkeyPatch) -> None:
    counted = Counted(monkeypatch, {"reuse": False} if how == "load" else None)
    for _ in range(2):
        _, ran, reused = counted.act(**({"reuse": False} if how == "act" else {}))
        assert ran == ["vision", "vision", "prefix", "flow"] and reused == set()
    with pytest.raises(EngineError, match="reuse='no', expected True or False"):
        Session(artifact(), options={"reuse": "no"})


def test_a_camera_that_comes_and_goes(monkeypatch: pytest.MonkeyPatch) -> None:
    counted = Counted(monkeypatch, max_missing_cameras=1)
    counted.act()
    _, ran, _ = counted.act(images={"wrist": IMAGES["wrist"]})
    assert ran == ["prefix", "flow"]  # now in slot 0, but the same pixels
    _, ran, _ = counted.act()
    assert ran == ["prefix", "flow"]


def test_a_failure_leaves_nothing_wrong_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    counted = Counted(monkeypatch)
    with pytest.raises(InputError):
        counted.act(task=5)
    engine = counted.session._engine
    run = engine.run  # type: ignore[union-attr]

    def fails(stage: str, *rest: Any) -> Any:
        if stage == "prefix":
            raise EngineError("out of memory")
        return run(stage, *rest)

    with monkeypatch.context() as patched:
        patched.setattr(engine, "run", fails)
        with pytest.raises(EngineError, match="out of memory"):
            counted.act()
    chunk, ran, _ = counted.act()
    assert ran == ["prefix", "flow"] and np.array_equal(chunk, Session(artifact()).act(**observation()))


OBSERVATIONS = st.fixed_dictionaries(
    {
        "top": st.sampled_from([0, 1, 2]),
        "wrist": st.sampled_from([None, 0, 1]),
        "state": st.sampled_from([0.0, -0.0, 1.0]),
        "task": st.sampled_from(["pick up the cube", "pick up the red cube now"]),
        "seed": st.sampled_from([0, 1]),
    }
)


def drawn(choice: Mapping[str, Any]) -> dict[str, Any]:
    shapes = {"top": (20, 30, 3), "wrist": (12, 12, 3)}
    images = {
        k: np.random.default_rng(choice[k]).integers(0, 256, s, dtype=np.uint8)
        for k, s in shapes.items()
        if choice[k] is not None
    }
    return {"images": images, "state": [choice["state"]] * 3, "task": choice["task"], "seed": choice["seed"]}


@settings(max_examples=30, deadline=None)
@given(st.lists(OBSERVATIONS, min_size=2, max_size=6))
def test_any_sequence_gives_the_same_bits_as_without_reuse(choices: list[dict[str, Any]]) -> None:
    on, off = (Session(artifact(max_missing_cameras=1), options={"reuse": v}) for v in (True, False))
    with on, off, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for choice in choices:
            assert np.array_equal(on.act(**drawn(choice)), off.act(**drawn(choice)))


TARGETS = [("onnx-fp32", "onnxruntime"), ("onnx-int8", "onnxruntime"), ("onnx-int8", "openvino"), ("gguf-q8", "ggml")]


@pytest.mark.filterwarnings("ignore::vlac.errors.VlacWarning")
@pytest.mark.parametrize(("target", "engine"), TARGETS)
def test_the_same_bits_in_every_engine(target: str, engine: str, golden: Any, tmp_path: Path) -> None:
    if why := get_engine(engine).missing():
        pytest.skip(why)
    folder = golden("smolvla_tiny")
    vlac.compile(folder.checkpoint, target, tmp_path / "out")
    with vlac.load(tmp_path / "out", engine=engine, threads=2) as policy:
        base = folder.observation(0)
        name, picture = next(iter(base["images"].items()))
        steps = [
            base,
            base,
            {**base, "state": np.asarray(base["state"]) + 1},
            {**base, "noise": base["noise"] + 1},
            {**base, "images": {**base["images"], name: other(picture)}},
            {**base, "task": "stop"},
        ]
        for step in steps:
            assert np.array_equal(policy.act(**step), policy.act(**step, reuse=False))


@pytest.mark.filterwarnings("ignore::vlac.errors.VlacWarning")
def test_an_artifact_that_is_one_graph(golden: Any, tmp_path: Path) -> None:
    folder = golden("smolvla_tiny")
    vlac.compile(folder.checkpoint, "onnx-fp32", tmp_path / "out", single_file=True)
    with vlac.load(tmp_path / "out", engine="onnxruntime", threads=1) as policy:
        first = policy.act(**folder.observation(0))
        assert np.array_equal(policy.act(**folder.observation(0)), first) and "model" in policy.stats["reused"]
        policy.act(**folder.observation(1))
        assert "model" not in policy.stats["reused"]


def test_bits_are_compared_not_values() -> None:
    zero, minus, nan = (np.array([v], np.float32) for v in (0.0, -0.0, np.nan))
    assert not same(zero, minus) and same(nan, nan.copy()) and not same(zero, zero.astype(np.float64))
    assert same(np.zeros((0, 3), np.int32), np.zeros((0, 3), np.int32)) and not same(zero, zero[None])
    assert same(np.array(True), np.array(True))


def test_old_prompts_make_room() -> None:
    reuse = Reuse()
    for i in (*range(MAX_PROMPTS + 1), 1, 0):
        reuse.prompt(i, lambda i=i: -i)
    assert reuse.used == ["prompt"] and len(reuse._prompts) == MAX_PROMPTS
