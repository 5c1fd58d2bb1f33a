"""Real-time chunking through the server: over the wire as in one process, and no client meets another's chunks."""

# ruff: noqa: E402
from __future__ import annotations

import pickle
import random
import threading
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

for module in ("fastapi", "uvicorn", "websockets", "msgpack", "grpc"):
    pytest.importorskip(module)

import test_serve_lerobot
from serving import TASK, Toy, observation, running
from test_serve import Remote, Server, as_json, client, cubes, post  # noqa: F401  (cubes is a fixture)
from test_serve_lerobot import Stub, TimedObservation, as_lerobot, raw  # noqa: F401  (as_lerobot is a fixture)

from vlac.drivers import noise_at, open_driver
from vlac.environments import PUSH_CUBES, open_world
from vlac.errors import InputError
from vlac.evaluate import Plan, run_episode
from vlac.runtime.rtc import STEADY, closed_loop
from vlac.serve.chunking import Chunking, Rtc, rtc_of
from vlac.serve.core import Answer, Asked
from vlac.serve.observation import ObservationReader
from vlac.serve.run import Options, build

PROTOCOLS = ("openpi", "http", "lerobot")
Ask = Callable[..., np.ndarray]


class Alone:
    """One client's chunks as a loop in one process makes them."""

    def __init__(self) -> None:
        self.toy, self.step, self.seed = Toy(), -1, -1
        self.rows: np.ndarray | None = None

    def ask(self, seed: int, step: int, done: int | None = None, **rtc: Any) -> np.ndarray:
        seen = ObservationReader(self.toy.io).read(observation(seed))
        if done is None:
            done = step - self.step if seed == self.seed and step > self.step else 99
        left = None if self.rows is None else self.rows[done:]
        noise = noise_at((seed, step), self.toy.io.noise_shape)
        rtc = closed_loop(rtc.get("inference_delay", 0)) | rtc
        chunk = self.toy.session.act(seen["images"], seen["state"], TASK, noise=noise, prev_chunk=left, **rtc)
        self.rows, self.step, self.seed = self.toy.session.normalised, step, seed
        return chunk


def asking(protocol: str, port: int) -> Ask:
    """ask(seed, step, **rtc) of a new client."""
    if protocol == "openpi":
        policy = client(port)
        return lambda seed, step, **rtc: policy.infer(observation(seed, moment=[seed, step], **as_message(rtc)))[
            "actions"
        ]
    if protocol == "http":
        name = f"arm{random.random()}"

        def ask(seed: int, step: int, **rtc: Any) -> np.ndarray:
            seen = observation(seed, moment=[seed, step], **as_message(rtc))
            status, answer = post(port, as_json(seen), X_Client=name)
            assert status == 200, answer
            return np.asarray(answer["actions"], np.float32)

        return ask
    stub = Stub(port).begin()

    def timed(seed: int, step: int, **rtc: Any) -> np.ndarray:
        more = {"rtc": rtc} if rtc else {}
        sent = TimedObservation(1.0, step, raw(seed, moment=[seed, step], **more), must_go=True)
        stub.observe(pickle.dumps(sent))
        return np.array([a.action for a in stub.actions()])

    return timed


def as_message(rtc: dict[str, Any]) -> dict[str, Any]:
    return {f"rtc/{k}": v for k, v in rtc.items()}


GIVEN = {"execution_horizon": 4, "schedule": "exp", "max_guidance_weight": 5.0}


@pytest.mark.usefixtures("as_lerobot")
@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_the_answer_over_the_wire_is_the_one_in_process(protocol: str) -> None:
    with running(protocol, rtc=Rtc(delay=1)) as server:
        a, b, mine, other = asking(protocol, server.port), asking(protocol, server.port), Alone(), Alone()
        keep = 4 if protocol == "lerobot" else 5  # what the stub's instructions ask for
        for seed, step, more in ((1, 0, {}), (1, 2, {}), (1, 3, GIVEN), (1, 4, {"inference_delay": 0}), (2, 0, {})):
            want = mine.ask(seed, step, **{"inference_delay": 1, **more})
            np.testing.assert_array_equal(a(seed, step, **more), want[:keep])
            np.testing.assert_array_equal(b(7, 2 * step), other.ask(7, 2 * step, inference_delay=1)[:keep])
        plain = Alone().ask(1, 2)
        assert np.abs(plain - asked_twice(asking(protocol, server.port))).max() > 1e-3, "guidance changes a chunk"


def asked_twice(ask: Ask) -> np.ndarray:
    ask(1, 0)
    answer = ask(1, 2)
    return np.concatenate([answer, np.zeros((5 - len(answer), 4), np.float32)])


@pytest.mark.parametrize("protocol", ["openpi", "http"])
def test_clients_without_steps_say_what_they_executed(protocol: str) -> None:
    with running(protocol, rtc=Rtc(delay=0)) as server:
        ask, alone = asking(protocol, server.port), Alone()
        for step, done in ((5, 0), (5, 2), (3, 1), (4, 5)):
            want = alone.ask(1, step, done, inference_delay=0)
            np.testing.assert_array_equal(ask(1, step, executed=done), want)


def test_an_episode_begins_without_the_one_before() -> None:
    with running("openpi", rtc=Rtc(delay=1)) as server:
        policy, plain = client(server.port), Alone()

        def ask(seed: int, step: int, **rtc: Any) -> dict[str, Any]:
            return policy.infer(observation(seed, moment=[seed, step], **as_message(rtc)))

        def fresh(seed: int, step: int) -> np.ndarray:
            plain.rows = None
            return plain.ask(seed, step)

        assert ask(1, 0)["guided"] == 0 and ask(1, 2)["guided"] == 1
        for seed, step, more in ((2, 4, {}), (2, 4, {}), (2, 3, {}), (2, 4, {"reset": True}), (2, 99, {}), (3, 0, {})):
            answer = ask(seed, step, **more)
            assert answer["guided"] == 0
            np.testing.assert_array_equal(answer["actions"], fresh(seed, step))
            ask(2, 200 + step)
        ask(2, 1)
        policy = client(server.port)
        assert ask(2, 2)["guided"] == 0, "another connection is another client"


def test_held_robots_go_on_from_nothing() -> None:
    with running("openpi", rtc=Rtc(delay=1), limits=("range<=0",), hold="zero") as server:
        policy = client(server.port)
        for step in (0, 2):
            answer = policy.infer(observation(1, moment=[1, step]))
            assert answer["held"] and answer["guided"] == 0


@pytest.mark.usefixtures("as_lerobot")
@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_no_client_meets_anothers_chunks(protocol: str) -> None:
    """Clients in threads, each with its own episodes, seeds and options, all at once."""
    wrong: list[str] = []

    def drive(port: int, n: int) -> None:
        rng, step = random.Random(n), 0
        try:
            ask, alone = asking(protocol, port), Alone()
            for _ in range(8):
                step = rng.choice((0, step + 1, step + 2, step + 4))
                more = rng.choice(({}, {"inference_delay": rng.randrange(3)}, GIVEN))
                got, want = ask(n, step, **more), alone.ask(n, step, **{"inference_delay": 1, **more})
                if not np.array_equal(got, want[: len(got)]):
                    wrong.append(f"client {n} at {step}")
        except Exception as error:
            wrong.append(repr(error))

    with running(protocol, rtc=Rtc(delay=1)) as server:
        threads = [threading.Thread(target=drive, args=(server.port, n)) for n in range(4)]
        for t in threads:
            t.start()
        for t in threads:
            t.join(60)
    assert not wrong


WRONG = {
    "negative": ({"rtc/inference_delay": -1}, "rtc/inference_delay is '-1', expected a number of control steps"),
    "fraction": ({"rtc/executed": 1.5}, "rtc/executed is '1.5'"),
    "true": ({"rtc/execution_horizon": True}, "rtc/execution_horizon is 'True'"),
    "huge": ({"rtc/inference_delay": 2**40}, "rtc/inference_delay"),
    "text": ({"rtc/executed": "2"}, "rtc/executed"),
    "array": ({"rtc/executed": np.arange(3)}, "rtc/executed"),
    "schedule": ({"rtc/schedule": "cosine"}, "expected one of zeros, ones, linear, exp"),
    "no text": ({"rtc/schedule": 3}, "rtc/schedule"),
    "weight": ({"rtc/max_guidance_weight": 0.0}, "expected a number above 0"),
    "NaN": ({"rtc/max_guidance_weight": float("nan")}, "expected a number above 0"),
    "too hard": ({"rtc/max_guidance_weight": 1e30}, "expected a number above 0, at most 1000"),
    "Inf": ({"rtc/max_guidance_weight": float("inf")}, "expected a number above 0"),
    "reset": ({"rtc/reset": 1}, "expected true or false"),
    "unknown": ({"rtc/prev_chunk": np.zeros((2, 4))}, "unknown key 'rtc/prev_chunk'; there are rtc/inference_delay"),
    "no mapping": ({"rtc": 3}, "unknown key 'rtc'"),
}


def test_wrong_values_are_refused_by_name_and_the_client_goes_on() -> None:
    with running("openpi", rtc=Rtc(delay=1)) as server:
        policy, alone = client(server.port), Alone()
        np.testing.assert_array_equal(policy.infer(observation(1))["actions"], alone.ask(1, 0))
        for name, (change, said) in WRONG.items():
            with pytest.raises(RuntimeError) as error:
                policy.infer(observation(1, moment=[1, 2], **change))
            assert "input: " in str(error.value) and said in str(error.value), name
        got = policy.infer(observation(1, moment=[1, 2], rtc={"inference_delay": np.int64(2), "schedule": "LINEAR"}))
        np.testing.assert_array_equal(got["actions"], alone.ask(1, 2, inference_delay=2))
        bare = {k: v for k, v in observation(1).items() if k != "moment"}
        with pytest.raises(RuntimeError, match="how many actions were executed"):
            policy.infer(bare)
    with running("openpi") as server, pytest.raises(RuntimeError, match="start it with --rtc"):
        client(server.port).infer(observation(1, **{"rtc/inference_delay": 1}))


def test_executed_stands_for_clients_that_do_not_say() -> None:
    with running("openpi", rtc=Rtc(delay=1, executed=3)) as server:
        policy = client(server.port)
        bare = {k: v for k, v in observation(1).items() if k != "moment"}
        assert [policy.infer(bare)["guided"] for _ in range(3)] == [0, 1, 1]


def test_the_delay_is_the_slowest_of_the_clients_last_chunks() -> None:
    chunking = Chunking(Toy().session, Rtc(), fps=10)
    seen = {"moment": (1, 0), "rtc": {"executed": 1}}
    chunking.session.act(
        **{
            k: v
            for k, v in ObservationReader(Toy().io).read(observation(1)).items()
            if k in ("images", "state", "task")
        }
    )

    def asked(client: str) -> Asked:
        return Asked(client, seen, None, 0.0, None)  # type: ignore[arg-type]

    for ms, delay in ((20.0, 0), (310.0, 1), (20.0, 4), (20.0, 4)):
        rtc = chunking.before(asked("a"))["rtc"]
        assert rtc.get("inference_delay", 0) == delay
        chunking.chunk(asked("a"), Answer(np.zeros((5, 4)), {"total_ms": ms}))
    chunking.chunk(asked("b"), Answer(np.zeros((5, 4)), {"total_ms": 5.0}))
    assert chunking.before(asked("b"))["rtc"]["inference_delay"] == 1
    chunking.gone("a")
    assert chunking.before(asked("a"))["rtc"] == {}


def test_displacements_are_handed_over_instead_of_guided() -> None:
    with running("openpi", rtc=Rtc(delay=2, displacements=(0, 1))) as server:
        policy, toy, rows = client(server.port), Toy(), None
        for step, done, more in ((0, None, {}), (1, 1, {}), (3, 2, {"execution_horizon": 3}), (9, 6, {}), (10, 1, {})):
            answer = policy.infer(observation(1, moment=[1, step], **as_message(more)))
            left = None if rows is None else rows[done:]
            seen = ObservationReader(toy.io).read(observation(1))
            rtc = closed_loop(2, (0, 1)) | {"max_guidance_weight": STEADY} | more
            noise = noise_at((1, step), toy.io.noise_shape)
            chunk = toy.session.act(seen["images"], seen["state"], TASK, noise=noise, prev_chunk=left, **rtc)
            rows = toy.session.normalised
            np.testing.assert_array_equal(answer["actions"], chunk)
            assert answer["guided"] == more.get("execution_horizon", 0)


def test_displacements_need_no_loop_that_can_be_guided() -> None:
    toy = Toy()
    toy.session.artifact.manifest["single_file"] = True
    build(toy, Options(rtc=Rtc(displacements=(0,)))).close()
    with pytest.raises(InputError, match="one graph"):
        build(toy, Options(rtc=Rtc(displacements=(0,), horizon=2)))
    with pytest.raises(InputError, match=r"displacements \[4\], expected columns of an action, 0 to 3"):
        build(Toy(), Options(rtc=Rtc(displacements=(4,))))


def test_options_that_do_not_fit_are_refused() -> None:
    assert rtc_of(False, {"horizon": None}) is None and rtc_of(True, {"horizon": 3, "delay": None}) == Rtc(3)
    with pytest.raises(InputError, match="--execution-horizon belongs to --rtc"):
        rtc_of(False, {"horizon": 3})
    for wrong in (
        {"horizon": -1},
        {"schedule": "cosine"},
        {"most": 0.0},
        {"most": 1e30},
        {"delay": -1},
        {"executed": 0},
    ):
        with pytest.raises(InputError):
            Rtc(**wrong)
    with pytest.raises(InputError, match="only artifacts are guided"):
        build(types.SimpleNamespace(io=Toy().io, facts=Toy().facts), Options(rtc=Rtc()))  # type: ignore[arg-type]
    toy = Toy()
    toy.session.artifact.manifest["single_file"] = True
    with pytest.raises(InputError, match="one graph"):
        build(toy, Options(rtc=Rtc()))
    with pytest.raises(InputError, match="is a checkpoint"):
        build(Toy(), Options(rtc=Rtc(), shadow="no/such/folder"))


class Guided(Remote):
    """As vlac's evaluation asks, with --rtc."""

    def act(self, seen: dict[str, Any]) -> np.ndarray:
        done, delay = seen.get("replayed", (0, 0))
        message = {
            "images": {k.rsplit(".", 1)[-1]: v for k, v in seen["images"].items()},
            "observation/state": seen["state"],
            "prompt": seen["task"],
            "moment": list(seen["moment"]),
            "rtc": {"inference_delay": delay} | ({"executed": done} if "replayed" in seen else {"reset": True}),
        }
        return np.asarray(self.client.infer(message)["actions"])


@pytest.mark.parametrize("columns", [(), (0, 1)])
def test_push_cubes_through_the_server_is_eval_with_rtc(columns: tuple[int, ...], cubes: Path) -> None:  # noqa: F811
    seeds, plan = [0, 1], Plan(2, delay=2, rtc=True, guidance={"displacements": columns} if columns else {})
    options = ("--displacements", "0,1") if columns else ()
    driver, world = open_driver(cubes, threads=1), open_world(PUSH_CUBES)
    local = [run_episode(driver, world, s, plan) for s in seeds]
    driver.close()
    with Server(cubes, "--protocol", "openpi", "--rtc", *options, "--shadow", cubes, "--shadow-every", 1) as server:
        served = [run_episode(Guided(server.port), world, s, plan) for s in seeds]
        code, said = server.end()
    world.close()
    assert [(e.success, e.steps, e.jerk) for e in served] == [(e.success, e.steps, e.jerk) for e in local]
    assert code == 0, said


assert test_serve_lerobot  # its fixtures and stub
