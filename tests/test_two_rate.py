"""Frames at one rate, states at another: the same chunks as `act` with everything, whatever the threads do."""

from __future__ import annotations

import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import open_golden
from runtime_toy import artifact, observation

import vlac
from vlac.engines.base import get_engine
from vlac.errors import EngineError, InputError
from vlac.runtime.session import Session
from vlac.runtime.two_rate import Gate

SCENE, REST = ("images", "task"), ("state", "seed")


def frames(seed: int) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    return {"top": rng.integers(0, 256, (20, 30, 3), np.uint8), "wrist": rng.integers(0, 256, (12, 12, 3), np.uint8)}


def part(given: Mapping[str, Any], names: tuple[str, ...]) -> dict[str, Any]:
    return {k: v for k, v in given.items() if k in names}


@pytest.mark.parametrize("reuse", [True, False])
def test_observe_then_act_is_act(reuse: bool) -> None:
    given = observation()
    with Session(artifact(), options={"reuse": reuse}) as policy, Session(artifact()) as plain:
        for n, (seed, state) in enumerate([(0, 1.0), (0, 2.0), (1, 2.0)], 1):
            scene = {**part(given, SCENE), "images": frames(seed)}
            assert policy.observe(**scene) == n
            for s in (state, state + 1):
                chunk = policy.act(state=[s] * 3, seed=0)
                assert policy.stats["observation"] == n and policy.stats["observation_age_ms"] >= 0
                assert "vision_ms" not in policy.stats
                assert np.array_equal(chunk, plain.act(**scene, state=[s] * 3, seed=0, reuse=False))


TARGETS = [("onnx-int8", "onnxruntime"), ("onnx-fp32", "openvino"), ("gguf-q8", "ggml"), ("gguf-f32", "torch")]


@pytest.mark.filterwarnings("ignore::vlac.errors.VlacWarning")
@pytest.mark.parametrize(("target", "engine"), TARGETS)
def test_in_every_engine(target: str, engine: str, golden: Any, tmp_path: Path) -> None:
    if why := get_engine(engine).missing():
        pytest.skip(why)
    folder = golden("smolvla_tiny")
    vlac.compile(folder.checkpoint, target, tmp_path / "out", goldens=1)
    with vlac.load(tmp_path / "out", engine=engine, threads=1) as policy:
        given = folder.observation(0)
        want = policy.act(**given, reuse=False)
        policy.observe(given["images"], given["task"])
        assert np.array_equal(policy.act(state=given["state"], noise=given["noise"]), want)
        assert {k for k in policy.stats if k.endswith("_ms")} >= {"prefix_state_ms", "flow_ms", "observation_age_ms"}
        assert not {"vision_ms", "prefix_ms"} & set(policy.stats)
        few = policy.act(state=given["state"], noise=given["noise"], n_actions=2)
        assert np.array_equal(few, policy.act(**given, n_actions=2, reuse=False))


@pytest.mark.filterwarnings("ignore::vlac.errors.VlacWarning")
def test_a_prompt_that_holds_the_state_is_made_by_act(tmp_path: Path) -> None:
    """pi0.5 writes the state into the prompt: only the cameras can be observed."""
    from test_pi0 import HEADS
    from test_pi0 import observation as of_golden

    folder = open_golden(Path(__file__).parent / "golden" / "pi05_tiny")
    vlac.compile(folder.checkpoint, "gguf-f32", tmp_path / "out", spec=HEADS, goldens=1)
    with vlac.load(tmp_path / "out", engine="torch") as policy:
        given = of_golden(folder, 0)
        want = policy.act(**given, reuse=False)
        policy.observe(given["images"], given["task"])
        assert np.array_equal(policy.act(state=given["state"], noise=given["noise"]), want)
        assert "prefix_ms" in policy.stats and "vision_ms" not in policy.stats


def test_what_observe_refuses() -> None:
    with Session(artifact()) as policy:
        with pytest.raises(InputError, match="no camera is given"):
            policy.act(**part(observation(), REST))
        policy.observe(frames(0), "pick up the cube")
        want = policy.act(**part(observation(), REST))
        with pytest.raises(InputError, match="no instruction"):
            policy.observe(frames(1))
        with pytest.raises(InputError, match="camera"):
            policy.observe({"nobody": frames(1)["top"]}, "pick up the cube")
        assert np.array_equal(policy.act(**part(observation(), REST)), want)  # the observation before stays
        with pytest.raises(InputError, match="the instruction belongs to observe"):
            policy.act(task="pick up the cube", **part(observation(), REST))
        assert policy.stats["observation"] == 1
    for call in (lambda: policy.observe(frames(0), "go"), lambda: policy.act(**part(observation(), REST))):
        with pytest.raises(EngineError, match="closed"):
            call()


def test_frames_may_be_overwritten() -> None:
    with Session(artifact()) as policy:
        pictures = frames(0)
        policy.observe(pictures, "pick up the cube")
        want = policy.act(**part(observation(), REST))
        for picture in pictures.values():
            picture += 1
        assert np.array_equal(policy.act(**part(observation(), REST), reuse=False), want)


def test_frames_that_arrive_while_act_runs_are_for_the_next(monkeypatch: pytest.MonkeyPatch) -> None:
    with Session(artifact()) as policy, Session(artifact()) as plain:
        policy.observe(frames(0), "pick up the cube")
        engine = policy._engine
        assert engine is not None
        repeat = engine.repeat
        started, seen = threading.Event(), threading.Event()

        def slow(*args: Any) -> Any:
            started.set()
            assert not seen.wait(0.2)  # an observe cannot finish in the middle of a run of the engine
            return repeat(*args)

        monkeypatch.setattr(engine, "repeat", slow)

        def camera() -> None:
            started.wait()
            policy.observe(frames(1), "pick up the cube")
            seen.set()

        thread = threading.Thread(target=camera)
        thread.start()
        for seed in (0, 1):
            chunk = policy.act(**part(observation(), REST))
            assert policy.stats["observation"] == seed + 1
            assert np.array_equal(
                chunk, plain.act(**{**observation(), "images": frames(seed), "task": "pick up the cube"})
            )
            monkeypatch.setattr(engine, "repeat", repeat)
            thread.join()


def test_two_threads_never_mix_observations() -> None:
    wanted = {}
    with Session(artifact()) as plain:
        for seed in range(3):
            chunk = plain.act(images=frames(seed), task="pick up the cube", state=[1.0] * 3, seed=0)
            wanted[seed] = chunk
    with Session(artifact()) as policy:
        policy.observe(frames(0), "pick up the cube")
        stop = threading.Event()
        made: list[int] = []
        failed: list[BaseException] = []

        def camera() -> None:
            try:
                while not stop.is_set():
                    made.append(policy.observe(frames((len(made) + 1) % 3), "pick up the cube"))
            except BaseException as error:
                failed.append(error)

        thread = threading.Thread(target=camera)
        thread.start()
        used = []
        try:
            while len(set(used)) < 8 and not failed:
                chunk = policy.act(state=[1.0] * 3, seed=0)
                used.append(policy.stats["observation"])
                assert np.array_equal(chunk, wanted[(used[-1] - 1) % 3])
        finally:
            stop.set()
            thread.join()
        assert not failed and used == sorted(used)


def test_the_gate_lets_act_first_and_starves_nobody() -> None:
    gate, order = Gate(), []
    inside = threading.Event()
    go = threading.Event()

    def stages() -> None:
        for i in range(3):
            with gate.stage():
                inside.set()
                go.wait()
                order.append(f"stage{i}")

    def acts() -> None:
        for i in range(6):
            with gate.act():
                order.append(f"act{i}")

    threads = [threading.Thread(target=stages)]
    threads[0].start()
    inside.wait()
    threads += [threading.Thread(target=acts)]
    threads[1].start()
    while gate._acts == 0:
        pass
    go.set()
    for thread in threads:
        thread.join(10)
    assert order[:2] == ["stage0", "act0"] and sorted(order) == sorted(
        [*(f"act{i}" for i in range(6)), *(f"stage{i}" for i in range(3))]
    )
