"""Frames at one rate, states at another, through the server: every answer is of frames that its own client sent."""

# ruff: noqa: E402
from __future__ import annotations

import json
import random
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest

for module in ("fastapi", "uvicorn", "websockets", "msgpack"):
    pytest.importorskip(module)

from serving import TASK, Toy, observation, running
from test_serve import as_json, client, get, post

from vlac.drivers import noise_at

Arrays = dict[str, np.ndarray]


def frames(client_: int, n: int) -> Arrays:
    rng = np.random.Generator(np.random.PCG64([client_, n]))
    return {"top": rng.integers(0, 256, (20, 30, 3), np.uint8), "wrist": rng.integers(0, 256, (12, 12, 3), np.uint8)}


def look(client_: int, n: int) -> dict[str, Any]:
    return {"images": frames(client_, n), "prompt": TASK, "observe": True}


def state(client_: int, n: int) -> dict[str, Any]:
    return {"observation/state": np.array([client_, n, 0.5], np.float32), "moment": [client_, n]}


def wanted(toy: Toy, client_: int, seen: int, n: int) -> np.ndarray:
    given = {"images": frames(client_, seen), "state": state(client_, n)["observation/state"], "task": TASK}
    return toy.session.act(**given, noise=noise_at((client_, n), toy.io.noise_shape), reuse=False)


def test_states_are_answered_by_the_frames_that_came_before() -> None:
    toy = Toy()
    with running("openpi") as server:
        a, b = client(server.port), client(server.port)
        with pytest.raises(RuntimeError, match="input: no camera is given"):
            a.infer(state(1, 0))
        for n in range(3):
            assert a.infer(look(1, n))["observed"] == n + 1 == b.infer(look(2, n))["observed"]
            for policy, c in ((a, 1), (b, 2), (a, 1)):
                answer = policy.infer(state(c, n))
                assert answer["observed"] == n + 1
                np.testing.assert_array_equal(answer["actions"], wanted(toy, c, n, n))
        full = a.infer(observation(5))  # everything at once goes on as before, and changes nothing
        assert "observed" not in full
        assert a.infer(state(1, 9))["observed"] == 3
        with pytest.raises(RuntimeError, match="no camera is given"):
            client(server.port).infer(state(1, 0))  # another connection sees nothing
        assert 'outcome="frames"} 6' in get(server.port, "/metrics")[1]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"observation/state": [1.0, 2.0, 3.0]}, "without a state"),
        ({"images": {"elbow": np.zeros((4, 4, 3), np.uint8)}}, "unknown key"),
        ({"images": {}}, "camera"),
        ({"prompt": None}, "prompt"),
        ({"observe": "yes"}, "expected true"),
        ({"observe": 1}, "expected true"),
    ],
)
def test_frames_that_do_not_fit_are_refused_and_those_before_stay(change: dict[str, Any], said: str) -> None:
    with running("openpi") as server:
        policy = client(server.port)
        policy.infer(look(1, 0))
        with pytest.raises(RuntimeError, match=f"input: .*{said}"):
            policy.infer(look(1, 1) | change)
        answer = policy.infer(state(1, 4))
        assert answer["observed"] == 1
        np.testing.assert_array_equal(answer["actions"], wanted(Toy(), 1, 0, 4))


def test_cameras_and_controllers_in_threads_of_their_own() -> None:
    """Three robots, each with a camera and a controller that know nothing of one another, at random moments."""
    wrong: list[Any] = []

    def camera(port: int, c: int) -> None:
        rng = random.Random(c)
        try:
            for n in range(1, 12):
                threading.Event().wait(rng.random() * 0.02)
                status, said = post(port, as_json(look(c, n)), X_Client=f"robot {c}")
                if status != 200 or said["observed"] != n + 1:
                    wrong.append(said)
        except Exception as error:
            wrong.append(repr(error))

    def controller(port: int, c: int) -> None:
        rng, toy, before = random.Random(-c), Toy(), 0
        try:
            for n in range(20):
                threading.Event().wait(rng.random() * 0.01)
                status, said = post(port, as_json(state(c, n)), X_Client=f"robot {c}")
                if status != 200 or said["observed"] < before:
                    wrong.append(said)
                before = said["observed"]
                want = wanted(toy, c, before - 1, n)
                if not np.array_equal(np.asarray(said["actions"], np.float32), want):
                    wrong.append((c, n, before))
        except Exception as error:
            wrong.append(repr(error))

    with running("http") as server:
        for c in range(3):
            assert post(server.port, as_json(look(c, 0)), X_Client=f"robot {c}")[1]["observed"] == 1
        threads = [threading.Thread(target=f, args=(server.port, c)) for c in range(3) for f in (camera, controller)]
        for t in threads:
            t.start()
        for t in threads:
            t.join(60)
        assert not wrong, wrong[:3]
        assert json.loads(get(server.port, "/healthz")[1])["chunks"] == 60


def test_what_is_recorded_and_compared_has_the_frames(tmp_path: Path) -> None:
    pytest.importorskip("pyarrow")
    from vlac.datasets import open_dataset

    with running("openpi", record=tmp_path / "r") as server:
        policy = client(server.port)
        for n in range(2):
            policy.infer(look(1, n))
            for step in range(2):
                policy.infer(state(1, 2 * n + step))
    with open_dataset(tmp_path / "r") as data:
        got = list(data.frames(range(4)))
    for i, frame in enumerate(got):
        np.testing.assert_array_equal(frame["images"]["observation.images.top"], frames(1, i // 2)["top"])
        assert frame["task"] == TASK
