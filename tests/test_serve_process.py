"""`vlac serve` as a process of its own: killed while it records, with a wrong shadow, with limits that do not hold."""

# ruff: noqa: E402
from __future__ import annotations

import os
import pickle
import shutil
import signal
import subprocess
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

for module in ("fastapi", "uvicorn", "websockets", "msgpack", "grpc", "gymnasium", "pymunk", "onnx", "onnxruntime"):
    pytest.importorskip(module)
pytest.importorskip("torch")
pytest.importorskip("pyarrow")

from checkpoint_files import edit_tensors
from conftest import ROOT
from test_serve import Remote, Server, as_json, client, cubes, get, post  # noqa: F401  (cubes is a fixture)
from test_serve_lerobot import RemotePolicyConfig, Stub, TimedObservation, as_lerobot  # noqa: F401
from websockets.exceptions import ConnectionClosed

from vlac.datasets import open_dataset
from vlac.drivers import open_driver
from vlac.environments import PUSH_CUBES, open_world

ZOO = ROOT / "vlac" / "zoo" / "push_cubes"
LEROBOT = ROOT / ".venv-lerobot" / "bin" / "python"
Seen = dict[str, Any]


@pytest.fixture(scope="module")
def wild(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """push-cubes with eight times the actions: far from the reference, and out of the joints' range."""
    from vlac.api import compile

    def louder(tensors: dict[str, Any]) -> None:
        for name in ("model.action_out_proj.weight", "model.action_out_proj.bias"):
            tensors[name] = (tensors[name] * 8).astype(tensors[name].dtype)

    folder = tmp_path_factory.mktemp("wild")
    shutil.copytree(ZOO, folder / "ckpt")
    edit_tensors(folder / "ckpt" / "model.safetensors", louder)
    compile(str(folder / "ckpt"), target="onnx-int4", out=folder / "out")
    return folder / "out"


@pytest.fixture(scope="module")
def seen() -> list[Seen]:
    world = open_world(PUSH_CUBES)
    try:
        return [{**world.reset(3), "moment": (3, 0)}, {**world.reset(4), "moment": (4, 0)}]
    finally:
        world.close()


def message(o: Seen) -> dict[str, Any]:
    return {"images": o["images"], "observation/state": o["state"], "prompt": o["task"], "moment": list(o["moment"])}


def metric(port: int, name: str) -> float:
    found = [line for line in get(port, "/metrics")[1].splitlines() if line.startswith(name + " ")]
    return float(found[0].split()[-1]) if found else 0.0


def until(what: Any) -> None:
    deadline = time.monotonic() + 60
    while not what():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def killed_while_recording(cubes: Path, seen: list[Seen], out: Path) -> list[tuple[int, np.ndarray]]:  # noqa: F811
    """Two episodes to their end and a third that is open; (seed, first row) of every step of the two."""
    steps = []
    with Server(cubes, "--protocol", "openpi", "--record", out) as server:
        remote = Remote(server.port)
        for seed in (11, 12):
            for n in range(4):
                steps.append((seed, remote.act({**seen[n % 2], "moment": (seed, n)})[0]))
        remote.act({**seen[0], "moment": (13, 0)})
        until(lambda: metric(server.port, "vlac_record_recorded") == 8)

        def drive() -> None:
            try:
                for n in range(1, 100_000):
                    remote.act({**seen[n % 2], "moment": (13, n)})
            except (ConnectionClosed, OSError):
                return

        thread = threading.Thread(target=drive, daemon=True)
        thread.start()
        until(lambda: metric(server.port, "vlac_record_steps") >= 12)
        os.kill(server.process.pid, signal.SIGKILL)
        thread.join(20)
        assert not thread.is_alive() and server.process.wait(20) == -signal.SIGKILL
    return steps


def test_kill_9_while_recording_loses_the_open_episode_only(cubes: Path, seen: list[Seen], tmp_path: Path) -> None:  # noqa: F811
    out = tmp_path / "r"
    steps = killed_while_recording(cubes, seen, out)
    with open_dataset(out) as data:
        assert [e.length for e in data.episodes] == [4, 4]
        for got, (_, action) in zip(data.frames(range(8)), steps, strict=True):
            np.testing.assert_array_equal(got["action"], action)
    with Server(cubes, "--protocol", "openpi", "--record", out) as server:  # and the next run goes on with it
        Remote(server.port).act({**seen[0], "moment": (14, 0)})
        assert server.end()[0] == 0
    with open_dataset(out) as data:
        assert [e.length for e in data.episodes] == [4, 4, 1]


@pytest.mark.lerobot
@pytest.mark.skipif(not LEROBOT.exists(), reason="no .venv-lerobot; scripts/peers/lerobot.sh sets it up")
def test_what_kill_9_left_loads_in_lerobot(cubes: Path, seen: list[Seen], tmp_path: Path) -> None:  # noqa: F811
    steps = killed_while_recording(cubes, seen, tmp_path / "r")
    command = [LEROBOT, ROOT / "tests" / "lerobot_dataset_peer.py", "read", tmp_path / "r", tmp_path / "said.npz"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "hf")}
    done = subprocess.run(command, capture_output=True, text=True, timeout=280, env=environment)
    assert done.returncode == 0, done.stderr[-2000:]
    said = np.load(tmp_path / "said.npz")
    assert (int(said["length"]), int(said["episodes"])) == (8, 2)
    for i, (_, action) in enumerate(steps):
        np.testing.assert_array_equal(said[f"{i}/action"], action)
        np.testing.assert_array_equal(
            said[f"{i}/observation.images.top"], seen[i % 2]["images"]["observation.images.top"]
        )


def test_a_wrong_shadow_exceeds_the_drift_and_the_last_action_is_held(
    cubes: Path,  # noqa: F811
    wild: Path,
    seen: list[Seen],
) -> None:
    driver = open_driver(cubes, threads=1)
    good = driver.act(seen[0])
    driver.close()
    args = ("--protocol", "openpi", "--shadow", wild, "--shadow-every", 1, "--limit", "drift<=0.05", "--hold", "last")
    with Server(cubes, *args) as server:
        policy = client(server.port)
        first = policy.infer(message(seen[0]))
        np.testing.assert_array_equal(first["actions"], good)
        assert not first["held"] and not first["limits"]
        until(lambda: metric(server.port, "vlac_drift") > 0.05)
        second = policy.infer(message(seen[1]))
        assert second["held"] and second["limits"][0].startswith("drift<=0.05 does not hold: ")
        np.testing.assert_array_equal(second["actions"], np.tile(good[4], (10, 1)))  # the 5th of 5 that are executed
        text = get(server.port, "/metrics")[1]
        stranger = client(server.port)
        with pytest.raises(RuntimeError, match=r"limit: drift<=0.05 does not hold.*no earlier action to hold"):
            stranger.infer(message(seen[0]))
        code, said = server.end()
    assert 'vlac_events_total{kind="limit",name="drift<=0.05"} 1' in text and 'kind="held",name="last"} 1' in text
    assert code == 0 and "drift<=0.05 does not hold" in said


def test_without_hold_a_limit_only_says_so(cubes: Path, wild: Path, seen: list[Seen]) -> None:  # noqa: F811
    with Server(cubes, "--protocol", "http", "--shadow", wild, "--shadow-every", 1, "--limit", "drift<=0.05") as server:
        body = as_json(message(seen[0]))
        _, first = post(server.port, body)
        until(lambda: metric(server.port, "vlac_drift") > 0.05)
        _, second = post(server.port, body)
        assert second["actions"] == first["actions"] and not second["held"]
        assert second["limits"][0].startswith("drift<=0.05 does not hold")
        assert "drift<=0.05" in server.end()[1]


@pytest.mark.usefixtures("as_lerobot")
@pytest.mark.parametrize("protocol", ["openpi", "http", "lerobot"])
def test_actions_out_of_range_and_jerky_ones_are_held_in_every_protocol(
    protocol: str, wild: Path, seen: list[Seen]
) -> None:
    limits = ("--limit", "range<=0.05", "--limit", "jerk<=1e-6")
    with Server(wild, "--protocol", protocol, *limits, "--hold", "zero") as server:
        if protocol == "lerobot":
            names = [f"m{i}" for i in range(4)]
            stub = Stub(server.port)
            stub.call("Ready")
            features = {"observation.state": {"dtype": "float32", "shape": (4,), "names": names}}
            stub.call("SendPolicyInstructions", pickled_message(RemotePolicyConfig("smolvla", "x", features, 10)))
            motors = dict(zip(names, map(float, seen[0]["state"]), strict=True))
            pictures = {k.rsplit(".", 1)[-1]: v for k, v in seen[0]["images"].items()}
            stub.observe(pickle.dumps(TimedObservation(0.0, 0, {**motors, **pictures, "task": seen[0]["task"]})))
            call = stub.channel.unary_unary("/transport.AsyncInference/GetActions").with_call
            answer, said_by = call(b"", timeout=20)
            told = dict(said_by.trailing_metadata())
            limits_said, held = told["vlac-limits"], told["vlac-held"] == "True"
            from vlac.serve.lerobot import fields

            actions = [a.action for a in pickle.loads(fields(answer)[1])]  # noqa: S301  (of our own server)
        elif protocol == "http":
            _, found = post(server.port, as_json(message(seen[0])))
            actions, limits_said, held = found["actions"], "; ".join(found["limits"]), found["held"]
        else:
            found = client(server.port).infer(message(seen[0]))
            actions, limits_said, held = found["actions"], "; ".join(found["limits"]), found["held"]
        code, said = server.end()
    assert held and not np.any(actions)
    assert "range<=0.05 does not hold" in limits_said and "jerk<=1e-06 does not hold" in limits_said
    assert code == 0 and "range<=0.05 does not hold" in said


def pickled_message(value: Any) -> bytes:
    from vlac.serve.lerobot import message as wrapped

    return wrapped(pickle.dumps(value))


@pytest.mark.usefixtures("as_lerobot")
@pytest.mark.parametrize("protocol", ["http", "lerobot"])
def test_sigterm_while_clients_ask_ends_with_named_refusals(protocol: str, wild: Path, seen: list[Seen]) -> None:
    """Each client is answered until it is told that the server ends, or finds it gone; never anything else."""
    import grpc

    outcomes: list[str] = []
    began = threading.Barrier(4)

    def http(port: int, n: int) -> None:
        for i in range(100_000):
            try:
                status, said = post(port, as_json(message({**seen[0], "moment": (n, i)})), X_Client=f"c{n}")
            except OSError:  # refused or closed: it has ended
                outcomes.append("gone")
                return
            if status != 200:
                outcomes.append(said["error"])
                return
            if i == 0:
                began.wait(60)

    def robot(port: int, n: int) -> None:
        names = [f"m{i}" for i in range(4)]
        features = {"observation.state": {"dtype": "float32", "shape": (4,), "names": names}}
        motors = dict(zip(names, map(float, seen[0]["state"]), strict=True))
        pictures = {k.rsplit(".", 1)[-1]: v for k, v in seen[0]["images"].items()}
        raw = {**motors, **pictures, "task": seen[0]["task"]}
        stub = Stub(port)
        try:
            stub.call("Ready")
            stub.call("SendPolicyInstructions", pickled_message(RemotePolicyConfig("smolvla", "x", features, 10)))
            for i in range(100_000):
                stub.observe(pickle.dumps(TimedObservation(0.0, i, raw)))
                assert len(stub.actions()) == 10
                if i == 0:
                    began.wait(60)
        except grpc.RpcError as error:
            gone = error.code().name == "UNAVAILABLE" or "GOAWAY" in str(error.details())
            outcomes.append("gone" if gone else str(error.details()).split(":")[0])

    with Server(wild, "--protocol", protocol) as server:
        drive = http if protocol == "http" else robot
        threads = [threading.Thread(target=drive, args=(server.port, n), daemon=True) for n in range(3)]
        for t in threads:
            t.start()
        began.wait(60)
        code, said = server.end()
        for t in threads:
            t.join(30)
    assert code == 0 and "everything that waited was answered" in said, said
    assert len(outcomes) == 3 and set(outcomes) <= {"draining", "gone"}, outcomes
