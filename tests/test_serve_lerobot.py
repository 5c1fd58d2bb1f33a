"""LeRobot's protocol: its messages are read as data, pickles that would run are refused, its client drives."""

# ruff: noqa: E402
from __future__ import annotations

import json
import os
import pickle
import random
import struct
import subprocess
import sys
import types
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest

grpc = pytest.importorskip("grpc")
pytest.importorskip("uvicorn")

from conftest import ROOT
from serving import TASK, Toy, direct, observation, running

from vlac.serve import pickled
from vlac.serve.lerobot import fields, message
from vlac.serve.refusal import Refused

HELPERS = "lerobot.async_inference.helpers"


@dataclass
class TimedObservation:
    timestamp: float
    timestep: int
    observation: dict[str, Any]
    must_go: bool = False


@dataclass
class RemotePolicyConfig:
    policy_type: str
    pretrained_name_or_path: str
    lerobot_features: dict[str, Any]
    actions_per_chunk: int
    device: str = "cpu"
    rename_map: dict[str, str] = field(default_factory=dict)


@dataclass
class TimedAction:
    timestamp: float = 0.0
    timestep: int = 0
    action: Any = None


class Runs:
    def __reduce__(self) -> Any:
        return os.mkdir, ("gadget-ran",)


@pytest.fixture
def as_lerobot(monkeypatch: pytest.MonkeyPatch) -> None:
    """These classes pickle under LeRobot's names, and `torch.tensor` is there to unpickle an answer with."""
    parts = HELPERS.split(".")
    for i in range(1, len(parts) + 1):
        monkeypatch.setitem(sys.modules, ".".join(parts[:i]), types.ModuleType(parts[i - 1]))
    for kind in (TimedObservation, RemotePolicyConfig, TimedAction):
        monkeypatch.setattr(kind, "__module__", HELPERS)
        setattr(sys.modules[HELPERS], kind.__name__, kind)
    torch = types.ModuleType("torch")
    torch.tensor = lambda values: np.array(values, np.float32)  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "torch", torch)


def raw(seed: int = 0, **changes: Any) -> dict[str, Any]:
    seen = observation(seed)
    motors = dict(zip("abc", map(float, seen["observation/state"]), strict=True))
    pictures = {"top": seen["observation/images/top"], **seen["images"]}
    return {**motors, **pictures, "task": TASK, "moment": [seed, 0], **changes}


def instructions(count: int = 4) -> RemotePolicyConfig:
    state = {"dtype": "float32", "shape": (3,), "names": ["a", "b", "c"]}
    return RemotePolicyConfig("smolvla", "x", {"observation.state": state}, count)


@pytest.mark.usefixtures("as_lerobot")
@pytest.mark.parametrize("protocol", [3, 4, 5])
def test_what_lerobot_pickles_is_read(protocol: int) -> None:
    fortran = np.asfortranarray(np.arange(6.0).reshape(2, 3))
    sent = TimedObservation(1.5, 7, raw(2, b=np.float32(2.5), c=-300, big=2**40, fortran=fortran), True)
    found = pickled.read(pickle.dumps(sent, protocol=protocol)).fields
    assert (found["timestamp"], found["timestep"], found["must_go"]) == (1.5, 7, True)
    for key, value in sent.observation.items():
        np.testing.assert_array_equal(found["observation"][key], value)
        if isinstance(value, np.ndarray):
            assert found["observation"][key].dtype == value.dtype
    found = pickled.read(pickle.dumps(instructions(), protocol=protocol)).fields
    assert found["lerobot_features"]["observation.state"]["names"] == ["a", "b", "c"]


@pytest.mark.usefixtures("as_lerobot")
def test_pickles_that_would_run_something_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    system = b"cos\nsystem\n(X\x0c\x00\x00\x00mkdir gadgettR."
    bad = [system, b"\x80\x04\x8c\x02os\x8c\x06system\x93\x8c\x01x\x85R.", b"(S'mkdir gadget'\nios\nsystem\n."]
    for value in (Runs(), [Runs()], {"a": Runs()}, TimedObservation(0.0, 0, {"a": Runs()}), np.array([Runs()])):
        bad += [pickle.dumps(value, protocol=p) for p in range(6)]
    bad += [pickle.dumps(x) for x in (print, Path, {1, 2}, {"a": 1}, complex(1), ValueError("x"), type)]
    reconstruct = b"cnumpy.core.multiarray\n_reconstruct\n"
    bad += [reconstruct + b"R.", reconstruct + b")R.", reconstruct + b")\x81.", b"cnumpy\nndarray\n)R.", b"N}b."]
    for data in bad:
        with pytest.raises(Refused) as refused:
            pickled.read(data)
        assert refused.value.code == "malformed", data
    assert not list(tmp_path.iterdir())


@pytest.mark.usefixtures("as_lerobot")
def test_a_small_pickle_does_not_grow() -> None:
    value: Any = [0.0] * 200
    for _ in range(2):
        value = [value] * 200
    with pytest.raises(Refused, match="too many"):
        pickled.read(pickle.dumps(TimedObservation(0.0, 0, {"a": value})))
    cycle: list[Any] = []
    cycle.append(cycle)
    with pytest.raises(Refused, match="nested"):
        pickled.read(pickle.dumps(TimedObservation(0.0, 0, {"a": cycle})))


@pytest.mark.usefixtures("as_lerobot")
def test_noise_is_refused_or_read_but_never_breaks_the_reader() -> None:
    good = pickle.dumps(TimedObservation(1.5, 7, raw(2, top=np.zeros((2, 2, 3), np.uint8)), True))
    rng = random.Random(7)
    outcomes = {"read": 0, "refused": 0}
    for n in range(1500):
        data = bytearray(good if n % 3 else rng.randbytes(rng.randrange(1, 80)))
        for _ in range(rng.randrange(1, 4)):
            data[rng.randrange(len(data))] = rng.randrange(256)
        if n % 5 == 0:
            del data[rng.randrange(len(data)) :]
        try:
            pickled.read(bytes(data))
            outcomes["read"] += 1
        except Refused as error:
            assert error.code == "malformed"
            outcomes["refused"] += 1
    assert outcomes["refused"] > 500


class Stub:
    """RobotClient's calls, message by message."""

    def __init__(self, port: int, token: str | None = None) -> None:
        self.channel = grpc.insecure_channel(f"127.0.0.1:{port}", (("grpc.use_local_subchannel_pool", 1),))
        self.metadata = (("authorization", f"Bearer {token}"),) if token else None

    def call(self, name: str, data: bytes = b"") -> bytes:
        method = self.channel.unary_unary(f"/transport.AsyncInference/{name}")
        return method(data, timeout=20, metadata=self.metadata)

    def observe(self, data: bytes, states: tuple[int, ...] = (3,)) -> None:
        size = -(-len(data) // len(states))
        parts = [data[i * size : (i + 1) * size] for i in range(len(states))]
        stream = (bytes([8, s, 18]) + message(p)[1:] for s, p in zip(states, parts, strict=True))
        self.channel.stream_unary("/transport.AsyncInference/SendObservations")(
            stream, timeout=20, metadata=self.metadata
        )

    def actions(self) -> list[TimedAction]:
        data = fields(self.call("GetActions")).get(1, b"")
        return pickle.loads(data) if data else []  # noqa: S301  (as LeRobot's client does, of our own server)

    def begin(self) -> Stub:
        self.call("Ready")
        self.call("SendPolicyInstructions", message(pickle.dumps(instructions())))
        return self


def refused(call: Any, *args: Any) -> tuple[str, str]:
    with pytest.raises(grpc.RpcError) as error:
        call(*args)
    return error.value.code().name, error.value.details()


@pytest.mark.usefixtures("as_lerobot")
def test_the_calls_of_robot_client_get_the_policys_actions() -> None:
    with running("lerobot", fps=10) as server:
        a, b = Stub(server.port).begin(), Stub(server.port).begin()
        a.observe(pickle.dumps(TimedObservation(100.0, 7, raw(1))), (1, 2, 3))
        b.observe(pickle.dumps(TimedObservation(200.0, 0, raw(2))))
        for stub, seed, step, at in ((b, 2, 0, 200.0), (a, 1, 7, 100.0)):
            actions = stub.actions()
            np.testing.assert_array_equal([x.action for x in actions], direct(seed)[:4])
            assert [x.timestep for x in actions] == [step + i for i in range(4)]
            assert actions[1].timestamp == pytest.approx(at + 0.1)
        a.observe(pickle.dumps(TimedObservation(101.0, 7, raw(3))))  # answered already
        assert a.actions() == []
        a.observe(pickle.dumps(TimedObservation(101.0, 7, raw(3), must_go=True)))
        np.testing.assert_array_equal(a.actions()[0].action, direct(3)[0])


@pytest.mark.usefixtures("as_lerobot")
def test_refusals_have_names_and_the_server_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with running("lerobot", max_bytes=100_000) as server:
        early, stub = Stub(server.port), Stub(server.port).begin()
        assert "Ready" in refused(early.observe, b"x")[1]
        bad = [
            (pickle.dumps(Runs()), "asks for"),
            (pickle.dumps(TimedObservation(0.0, 0, {"a": Runs()})), "asks for"),
            (b"\x80\x04", "cut off"),
            (pickle.dumps(TimedObservation(0.0, 0, raw(a=np.nan))), "NaN"),
            (pickle.dumps(TimedObservation(0.0, 0, raw(top=np.zeros((4, 4), np.uint8)))), "no camera|top"),
            (pickle.dumps(TimedObservation(0.0, 0, {"a": 1.0, "task": TASK})), "has no 'b'"),
        ]
        for data, text in bad[:4] + bad[5:]:
            code, said = refused(stub.observe, data)
            assert code == "INVALID_ARGUMENT" and text in said, said
        assert "Refused" not in refused(stub.call, "SendPolicyInstructions", message(pickle.dumps(Runs())))[1]
        assert refused(stub.observe, b"x" * 200_000)[0] == "RESOURCE_EXHAUSTED"
        assert refused(stub.observe, b"x", (9,))[0] == "INVALID_ARGUMENT"
        stub.observe(pickle.dumps(TimedObservation(0.0, 0, raw(1))))
        np.testing.assert_array_equal([x.action for x in stub.actions()], direct(1)[:4])
    assert not list(tmp_path.iterdir())


def test_the_token_is_wanted() -> None:
    with running("lerobot", token="secret") as server:
        assert refused(Stub(server.port, "wrong").call, "Ready")[0] == "UNAUTHENTICATED"
        assert Stub(server.port, "secret").call("Ready") == b""


def test_varints() -> None:
    assert message(b"a" * 300)[:3] == b"\x0a\xac\x02" and fields(message(b"a" * 300)) == {1: b"a" * 300}
    for broken in (b"\x0a", b"\x0a\x05abc", b"\xff" * 12, b"\x0d" + struct.pack("<f", 1)):
        with pytest.raises(Refused):
            fields(broken)


@pytest.mark.usefixtures("as_lerobot")
def test_frames_that_did_not_change_are_not_looked_at_again() -> None:
    """The protocol sends every frame with every state; what depends on frames and instruction alone is found again."""
    with running("lerobot") as server:
        stub, reused = Stub(server.port).begin(), []
        for step, change in enumerate(({}, {"a": 2.5}, {"a": 2.5, "top": np.zeros((9, 9, 3), np.uint8)})):
            seen = raw(1, moment=[1, step], **change)
            stub.observe(pickle.dumps(TimedObservation(1.0, step, seen, must_go=step == 1)))
            actions = np.array([a.action for a in stub.actions()])
            reused.append(server.toy.session.stats["reused"])
            pictures = {"top": seen["top"], "wrist": seen["wrist"]}
            state = np.array([seen[k] for k in "abc"], np.float32)
            alone = Toy().act({"images": pictures, "state": state, "task": TASK, "moment": (1, step)})
            np.testing.assert_array_equal(actions, alone[: len(actions)])
        assert reused[0] == ()
        assert {"prompt", "vision[0]", "vision[1]"} <= set(reused[1]), reused
        assert ("vision[0]" in reused[2]) != ("vision[1]" in reused[2]), "one camera is another"


def driven(out: Path, serve: tuple[Any, ...], client: tuple[Any, ...], cwd: Path) -> tuple[list[Any], str]:
    """Episodes that LeRobot's RobotClient drove through `vlac serve`, and the dashboard's data."""
    from test_serve import Server, get

    with Server(out, "--protocol", "lerobot", "--dashboard", *serve) as server:
        assert server.process.stderr is not None
        beside = int(server.process.stderr.readline().rsplit(":", 1)[1])
        done = subprocess.run(
            [str(ROOT / ".venv-lerobot/bin/python"), str(ROOT / "tests/lerobot_client_peer.py"),
             f"127.0.0.1:{server.port}", *map(str, client)],
            capture_output=True, text=True, timeout=280, cwd=cwd, env={**os.environ, "HF_HUB_OFFLINE": "1"},
        )  # fmt: skip
        assert done.returncode == 0, done.stderr[-2000:]
        page = get(beside, "/dashboard.json")[1]
        assert server.end()[0] == 0
    return [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")], page


@pytest.mark.lerobot
def test_robot_client_drives_push_cubes(tmp_path: Path) -> None:
    for module in ("gymnasium", "pymunk", "onnx", "onnxruntime", "torch"):
        pytest.importorskip(module)
    from vlac.api import compile
    from vlac.drivers import open_driver
    from vlac.environments import PUSH_CUBES, opener
    from vlac.evaluate import rollout

    out = tmp_path / "out"
    compile(str(ROOT / "vlac" / "zoo" / "push_cubes"), target="onnx-fp32", out=out)
    driver = open_driver(out, threads=1)
    local = rollout(driver, opener(PUSH_CUBES), [0, 1, 2], 5)
    driver.close()
    episodes, _ = driven(out, (), (0, 3), tmp_path)
    assert [e["success"] for e in episodes] == [e.success for e in local]
    # its next observation goes out while the old chunk is executed; the chunk answers with what will have been
    episodes, page = driven(out, ("--rtc", "--displacements", "0,1", "--fps", 20), (0, 4, 10, 0.7, 20), tmp_path)
    assert sum(e["success"] for e in episodes) >= 3, episodes
    chunks = json.loads(page)["chunks"]
    seams = [c["handover"] for c in chunks if c["handover"] is not None]
    assert len(seams) >= 10 and sum(s < 1e-4 for s in seams) >= 0.8 * len(seams), seams
