"""The server: its core, openpi's and HTTP's protocols with real clients, and every fault a named refusal."""

# ruff: noqa: E402
from __future__ import annotations

import base64
import io
import json
import os
import pickle
import random
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

import numpy as np
import pytest

for module in ("fastapi", "uvicorn", "websockets", "msgpack"):
    pytest.importorskip(module)

from conftest import ROOT
from serving import TASK, Toy, direct, observation, running
from websockets.exceptions import ConnectionClosed
from websockets.sync.client import connect

from vlac.drivers import open_driver
from vlac.environments import PUSH_CUBES, open_world, opener
from vlac.errors import InputError
from vlac.evaluate import rollout
from vlac.metrics import Joint
from vlac.serve.core import Answer, Core
from vlac.serve.guard import Guard, parse_bound
from vlac.serve.observation import ObservationReader
from vlac.serve.refusal import Refused
from vlac.serve.watch import Watch
from vlac.serve.wire import npy, npy_bytes, pack, unpack

openpi = pytest.importorskip("openpi_client.websocket_client_policy")


def client(port: int, **options: Any) -> Any:
    return openpi.WebsocketClientPolicy("127.0.0.1", port, **options)


def post(port: int, body: Any, path: str = "/act", **headers: str) -> tuple[int, Any]:
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    headers = {"Content-Type": "application/json", **{k.replace("_", "-"): v for k, v in headers.items()}}
    request = urllib.request.Request(f"http://127.0.0.1:{port}{path}", data, headers)
    try:
        with urllib.request.urlopen(request, timeout=20) as response:
            body = response.read()
            return response.status, body if "npy" in response.headers["Content-Type"] else json.loads(body)
    except urllib.error.HTTPError as error:
        return error.code, json.loads(error.read())


def get(port: int, path: str) -> tuple[int, str]:
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}{path}", timeout=20) as response:
            return response.status, response.read().decode()
    except urllib.error.HTTPError as error:
        return error.code, error.read().decode()


def as_json(seen: dict[str, Any]) -> dict[str, Any]:
    def plain(value: Any) -> Any:
        if isinstance(value, dict):
            return {k: plain(v) for k, v in value.items()}
        if isinstance(value, np.ndarray) and value.ndim == 3:
            return {"npy": base64.b64encode(npy_bytes(value)).decode()}
        return value.tolist() if isinstance(value, np.ndarray) else value

    return plain(seen)


# --- answers -------------------------------------------------------------------------------------------------------


def test_openpi_client_gets_what_the_policy_answers() -> None:
    with running("openpi") as server:
        policy = client(server.port)
        assert policy.get_server_metadata()["action_dim"] == 4
        for seed in range(3):
            answer = policy.infer(observation(seed))
            assert answer["actions"].dtype == np.float32
            np.testing.assert_array_equal(answer["actions"], direct(seed))
        assert answer["server_timing"]["infer_ms"] > 0


def test_openpi_action_chunk_broker_runs_on_it() -> None:
    from openpi_client.action_chunk_broker import ActionChunkBroker

    with running("openpi") as server:
        broker = ActionChunkBroker(client(server.port), action_horizon=3)
        rows = [broker.infer(observation(1))["actions"] for _ in range(3)]
    np.testing.assert_array_equal(rows, direct(1)[:3])


def test_http_answers_json_and_npy() -> None:
    with running("http") as server:
        status, answer = post(server.port, as_json(observation(2)))
        assert status == 200
        np.testing.assert_array_equal(np.asarray(answer["actions"], np.float32), direct(2))
        status, body = post(server.port, as_json(observation(2)), Accept="application/x-npy")
        np.testing.assert_array_equal(npy(body), direct(2))


def test_http_takes_png() -> None:
    from PIL import Image

    seen = observation(2)
    stream = io.BytesIO()
    Image.fromarray(seen["images"]["wrist"]).save(stream, "png")
    body = as_json(seen) | {"images": {"wrist": {"png": base64.b64encode(stream.getvalue()).decode()}}}
    with running("http") as server:
        np.testing.assert_array_equal(np.asarray(post(server.port, body)[1]["actions"], np.float32), direct(2))


def test_http_describes_itself_without_loading_anything() -> None:
    with running("http") as server:
        schema = json.loads(get(server.port, "/openapi.json")[1])
        assert {"/act", "/healthz", "/metrics"} <= set(schema["paths"])
        status, page = get(server.port, "/docs")
        assert status == 200 and "POST /act" in page and "http://" not in page and "https://" not in page


def test_clients_get_their_own_answers() -> None:
    wanted = {seed: direct(seed) for seed in range(8)}
    wrong: list[int] = []

    def drive(port: int, seed: int) -> None:
        policy = client(port)
        for _ in range(6):
            if not np.array_equal(policy.infer(observation(seed))["actions"], wanted[seed]):
                wrong.append(seed)

    with running("openpi") as server:
        threads = [threading.Thread(target=drive, args=(server.port, s)) for s in wanted]
        for t in threads:
            t.start()
        for t in threads:
            t.join(60)
        assert not wrong and server.served.watch.page()["counts"]["chunks"] == 48


# --- the core ------------------------------------------------------------------------------------------------------


class Slow:
    def __init__(self) -> None:
        self.go, self.seen = threading.Event(), []

    def act(self, observation: dict[str, Any]) -> np.ndarray:
        self.seen.append(observation["n"])
        assert self.go.wait(10)
        if observation["n"] < 0:
            raise ZeroDivisionError("boom")
        return np.full((2, 1), observation["n"], np.float32)


def test_the_newest_observation_wins_and_the_other_is_told() -> None:
    policy = Slow()
    core = Core(policy)
    core.connect("a")
    core.connect("b")
    first = core.submit("a", {"n": 0})
    while not policy.seen:
        time.sleep(0.001)
    old = core.submit("a", {"n": 1})
    other = core.submit("b", {"n": 2})
    newest = core.submit("a", {"n": 3})
    with pytest.raises(Refused, match="newer") as refused:
        old.result(1)
    assert refused.value.code == "superseded"
    policy.go.set()
    assert [f.result(5).chunk[0, 0] for f in (first, newest, other)] == [0, 3, 2]
    assert policy.seen == [0, 3, 2]  # a's turn was before b's
    assert core.close(5)


def test_a_broken_request_is_the_only_one_that_breaks() -> None:
    policy = Slow()
    policy.go.set()
    core = Core(policy)
    core.connect("a")
    with pytest.raises(Refused, match="boom") as refused:
        core.submit("a", {"n": -1}).result(5)
    assert refused.value.code == "failed"
    assert core.submit("a", {"n": 4}).result(5).chunk[0, 0] == 4
    core.close(5)


def test_drain_answers_what_waits_and_refuses_what_comes() -> None:
    policy = Slow()
    core = Core(policy)
    core.connect("a")
    core.connect("b")
    futures = [core.submit("a", {"n": 1}), core.submit("b", {"n": 2})]
    core.drain()
    with pytest.raises(Refused) as refused:
        core.submit("a", {"n": 3})
    assert refused.value.code == "draining"
    threading.Timer(0.1, policy.go.set).start()
    assert core.close(5)
    assert [f.result(0).chunk[0, 0] for f in futures] == [1, 2]


def test_a_client_that_went_away_is_not_computed() -> None:
    policy = Slow()
    core = Core(policy)
    core.connect("a")
    core.connect("b")
    core.submit("a", {"n": 1})
    while not policy.seen:
        time.sleep(0.001)
    core.submit("b", {"n": 2})
    core.disconnect("b")
    policy.go.set()
    core.close(5)
    assert policy.seen == [1]


def test_clients_are_bounded() -> None:
    core = Core(Slow(), max_clients=1)
    core.connect("a")
    with pytest.raises(Refused) as refused:
        core.connect("b")
    assert refused.value.code == "too_many_clients"
    core.close(1)


# --- faults --------------------------------------------------------------------------------------------------------

BAD_OBSERVATIONS = {
    "no camera": (lambda o: o.update({"images": {"writs": o["images"]["wrist"]}}), "writs"),
    "grey": (lambda o: o.update({"observation/images/top": np.zeros((8, 8), np.uint8)}), "images/top has shape"),
    "int16": (lambda o: o.update({"observation/images/top": np.zeros((8, 8, 3), np.int16)}), "int16"),
    "above 1": (lambda o: o.update({"observation/images/top": np.full((8, 8, 3), 2.0)}), "expected 0 to 1"),
    "NaN picture": (lambda o: o.update({"observation/images/top": np.full((8, 8, 3), np.nan)}), "NaN"),
    "empty": (lambda o: o.update({"observation/images/top": np.zeros((0, 8, 3), np.uint8)}), "shape"),
    "NaN state": (lambda o: o.update({"observation/state": np.array([1, np.nan, 2])}), "NaN"),
    "Inf state": (lambda o: o.update({"observation/state": np.array([1, 1e300, 2])}), "Inf"),
    "long state": (lambda o: o.update({"observation/state": np.zeros(4)}), "4 numbers"),
    "text state": (lambda o: o.update({"observation/state": "rest"}), "expected numbers"),
    "no state": (lambda o: o.pop("observation/state"), "no state"),
    "no task": (lambda o: o.pop("prompt"), "no instruction"),
    "number as task": (lambda o: o.update({"prompt": 3}), "expected text"),
    "long task": (lambda o: o.update({"prompt": "a" * 5000}), "5000"),
    "moment": (lambda o: o.update({"moment": [-1, 0]}), "moment"),
    "unknown": (lambda o: o.update({"observation/stat": 0}), "unknown key"),
}


@pytest.mark.parametrize("name", BAD_OBSERVATIONS)
def test_an_observation_that_does_not_fit_is_refused_by_name(name: str) -> None:
    change, text = BAD_OBSERVATIONS[name]
    seen = observation()
    change(seen)
    with pytest.raises(Refused, match=text) as refused:
        ObservationReader(Toy().io).read(unpack(pack(seen)))
    assert refused.value.code == "input"


@pytest.mark.parametrize("protocol", ["openpi", "http"])
def test_refusals_reach_the_client_and_it_goes_on(protocol: str) -> None:
    bad = observation(1, **{"observation/state": np.array([1, 2], np.float32)})
    with running(protocol) as server:
        if protocol == "http":
            status, said = post(server.port, as_json(bad))
            assert (status, said["error"]) == (422, "input") and "2 numbers" in said["message"]
            assert post(server.port, as_json(observation(1)))[0] == 200
        else:
            policy = client(server.port)
            with pytest.raises(RuntimeError, match="input: observation/state has 2 numbers"):
                policy.infer(bad)
            np.testing.assert_array_equal(policy.infer(observation(1))["actions"], direct(1))
        assert server.served.watch.page()["counts"]["input"] == 1


class Gadget:
    def __reduce__(self) -> Any:
        return os.mkdir, ("gadget-ran",)


def test_pickles_and_noise_are_malformed_messages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    good = pack(observation())
    rng = random.Random(5)
    bad = [b"", pickle.dumps(Gadget()), pickle.dumps(observation()), b"\xdd\xff\xff\xff\xff", b"\x91" * 5000, good[:-9]]
    bad += [rng.randbytes(rng.randrange(1, 200)) for _ in range(60)]
    for _ in range(60):
        broken = bytearray(good)
        for _ in range(rng.randrange(1, 6)):
            broken[rng.randrange(200)] = rng.randrange(256)
        bad.append(bytes(broken))
    with running("openpi", max_bytes=1 << 20) as server:
        with connect(f"ws://127.0.0.1:{server.port}", compression=None) as socket_:
            socket_.recv()
            for message in bad:
                socket_.send(message)
                said = socket_.recv(timeout=10)
                assert isinstance(said, bytes) or said.split(":")[0] in ("malformed", "input"), said
            socket_.send("text")
            assert socket_.recv(timeout=10).startswith("malformed")
            socket_.send(good)
            np.testing.assert_array_equal(unpack(socket_.recv(timeout=10))["actions"], direct())
        assert server.served.watch.page()["counts"]["failed"] == 0
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("dtype", ["|O", "|V8", "<c8", "object", "<M8[ns]", "|S4"])
def test_arrays_of_other_types_are_refused(dtype: str) -> None:
    import msgpack

    message = msgpack.packb({"a": {b"__ndarray__": True, b"data": b"\0" * 8, b"dtype": dtype, b"shape": [1]}})
    with pytest.raises(Refused, match="of type"):
        unpack(message)


def test_an_array_that_lies_about_its_size_is_refused() -> None:
    import msgpack

    for shape in ([2**30, 2**20], [-1], [3], [1] * 40, [True], "ab"):
        message = msgpack.packb({"a": {b"__ndarray__": True, b"data": b"\0" * 8, b"dtype": "<f4", b"shape": shape}})
        with pytest.raises(Refused) as refused:
            unpack(message)
        assert refused.value.code == "malformed"
    stream = io.BytesIO()
    np.save(stream, np.zeros(3))
    with pytest.raises(Refused):
        npy(stream.getvalue().replace(b"(3,)", b"(9,)"))
    stream = io.BytesIO()
    np.save(stream, np.array([Gadget()], dtype=object), allow_pickle=True)
    with pytest.raises(Refused, match="of type"):
        npy(stream.getvalue())


def test_http_names_every_malformed_body() -> None:
    with running("http", max_bytes=4096) as server:
        cases: list[tuple[bytes, dict[str, str], int, str]] = [
            (b"{", {}, 400, "malformed"),
            (b"[" * 4000, {}, 400, "malformed"),
            (pickle.dumps(Gadget()), {}, 400, "malformed"),
            (b"{}", {"Content_Type": "text/plain"}, 400, "malformed"),
            (b" " * 5000, {}, 413, "too_large"),
            (b'{"top": {"npy": "%%%"}}', {}, 400, "malformed"),
            (b'{"top": {"npy": "AAAA"}}', {}, 400, "malformed"),
            (b'{"top": {"png": "AAAA"}}', {}, 400, "malformed"),
            (b'{"state": [NaN, 1, 2]}', {}, 422, "input"),
            (b'{"state": [1e999, 1, 2]}', {}, 422, "input"),
        ]
        for body, headers, status, code in cases:
            got, said = post(server.port, body, **headers)
            assert (got, said["error"]) == (status, code), (body, said)
        assert get(server.port, "/healthz")[0] == 200


def test_oversized_messages_close_their_connection_only() -> None:
    from websockets.exceptions import ConnectionClosed

    with running("openpi", max_bytes=8192) as server:
        other = client(server.port)
        with connect(f"ws://127.0.0.1:{server.port}", compression=None) as socket_:
            socket_.recv()
            socket_.send(b"\0" * 10_000)
            with pytest.raises(ConnectionClosed) as closed:
                socket_.recv(timeout=10)
            assert closed.value.rcvd is not None and closed.value.rcvd.code == 1009
        np.testing.assert_array_equal(other.infer(observation())["actions"], direct())


@pytest.mark.parametrize("protocol", ["openpi", "http"])
def test_a_client_killed_in_the_middle_of_a_message(protocol: str) -> None:
    with running(protocol) as server:
        for part in (b"", b"GE", b"POST /act HTTP/1.1\r\nHost: a\r\nContent-Type: application/json\r\n"
                     b"Content-Length: 900\r\n\r\n{\"st"):  # fmt: skip
            with socket.create_connection(("127.0.0.1", server.port)) as raw:
                raw.sendall(part)
                raw.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")  # a reset, as of a kill
        if protocol == "openpi":
            half = connect(f"ws://127.0.0.1:{server.port}", compression=None)
            half.recv()
            half.socket.sendall(b"\x82\xfe\x7f\xff\0\0\0\0only a part")
            half.socket.shutdown(socket.SHUT_RDWR)
            policy = client(server.port)
            np.testing.assert_array_equal(policy.infer(observation())["actions"], direct())
        else:
            assert post(server.port, as_json(observation()))[0] == 200


def test_a_client_that_reads_slowly_holds_up_nobody() -> None:
    with running("openpi") as server:
        slow = connect(f"ws://127.0.0.1:{server.port}", compression=None)
        slow.recv()
        message = pack(observation())
        stopped = threading.Event()

        def flood() -> None:
            try:
                for _ in range(2000):
                    slow.send(message)
            except (ConnectionClosed, OSError):
                stopped.set()

        thread = threading.Thread(target=flood, daemon=True)
        thread.start()
        policy = client(server.port)
        for seed in range(5):
            np.testing.assert_array_equal(policy.infer(observation(seed))["actions"], direct(seed))
        assert server.served.core.load()["waiting"] <= 2
        slow.socket.shutdown(socket.SHUT_RDWR)
        thread.join(10)


def test_the_token_is_wanted_everywhere_but_for_health() -> None:
    from websockets.exceptions import InvalidStatus

    with running("openpi", token="secret", dashboard=True) as server:
        for key in (None, "wrong", "sécret"):
            with pytest.raises((InvalidStatus, UnicodeEncodeError)):
                client(server.port, api_key=key)
        np.testing.assert_array_equal(client(server.port, api_key="secret").infer(observation())["actions"], direct())
        assert get(server.port, "/healthz")[0] == 200
        assert get(server.port, "/metrics")[0] == 401 and get(server.port, "/metrics?token=secret")[0] == 200
        assert get(server.port, "/dashboard")[0] == 401
    with running("http", token="secret") as server:
        assert post(server.port, as_json(observation()))[0] == 401
        assert post(server.port, as_json(observation()), Authorization="Bearer secret")[0] == 200


def test_a_page_in_a_browser_cannot_connect() -> None:
    from websockets.exceptions import InvalidStatus

    with running("openpi") as server, pytest.raises(InvalidStatus, match="403"):
        connect(f"ws://127.0.0.1:{server.port}", origin="http://evil.example")


# --- watching ------------------------------------------------------------------------------------------------------


def test_metrics_count_and_the_dashboard_tells() -> None:
    with running("http", dashboard=True) as server:
        for n in range(3):
            post(server.port, as_json(observation(1, moment=[1, 2 * n])), X_Client="arm")
        post(server.port, b"{")
        text = get(server.port, "/metrics")[1]
        assert 'vlac_requests_total{outcome="chunks"} 3' in text
        assert 'vlac_requests_total{outcome="malformed"} 1' in text
        assert 'vlac_latency_ms_count{stage="flow"} 3' in text and 'le="+Inf"} 3' in text
        page = json.loads(get(server.port, "/dashboard.json")[1])
        assert [c["n"] for c in page["chunks"]] == [1, 2, 3]
        a, b = direct_at(1, 0), direct_at(1, 2)
        spans = np.array([j["high"] - j["low"] or 1 for j in page["joints"]])
        assert page["chunks"][0]["handover"] is None
        assert page["chunks"][1]["handover"] == pytest.approx(np.max(np.abs(b[0] - a[2]) / spans), rel=1e-5)
        assert json.loads(get(server.port, "/dashboard.json?after=2")[1])["chunks"][0]["n"] == 3
        status, html = get(server.port, "/dashboard")
        assert status == 200 and "https://" not in html


def direct_at(seed: int, step: int) -> np.ndarray:
    toy = Toy()
    return toy.act(ObservationReader(toy.io).read(observation(seed)) | {"moment": (seed, step)})


def judge(limits: list[str], hold: str | None, chunks: list[np.ndarray], drift: float | None = None) -> list[Answer]:
    class Asks:
        client = "a"

    watch = Watch((Joint("a", -1.0, 1.0), Joint("b", 0.0, 1.0)), 2, 100.0)
    guard = Guard(tuple(map(parse_bound, limits)), hold, watch)
    guard.drift = drift
    return [guard.chunk(Asks(), Answer(c, {})) for c in chunks]  # type: ignore[arg-type]


GOOD = np.tile(np.array([[0.5, 0.25]], np.float32), (6, 1))
FAR = GOOD + np.array([1.5, 0], np.float32)


def test_limits_say_so_and_hold_if_asked() -> None:
    good, far = judge(["range<=0.4"], None, [GOOD, FAR])
    assert not good.said and "range<=0.4 does not hold: 0.5" in far.said and not far.held
    np.testing.assert_array_equal(far.chunk, FAR)
    assert judge(["range<=0.6"], None, [FAR])[0].said == ()
    held = judge(["range<=0.4"], "last", [GOOD, FAR])[1]
    assert held.held
    np.testing.assert_array_equal(held.chunk, GOOD)
    np.testing.assert_array_equal(judge(["range<=0.4"], "zero", [FAR])[0].chunk, np.zeros_like(FAR))
    with pytest.raises(Refused, match="no earlier action") as refused:
        judge(["range<=0.4"], "last", [FAR])
    assert refused.value.code == "limit"
    jerky = GOOD * np.array([1, -1, 1, -1, 1, -1], np.float32)[:, None]
    assert judge(["jerk<=1"], None, [jerky])[0].said and not judge(["jerk<=1"], None, [GOOD])[0].said
    assert judge(["drift<=0.1"], None, [GOOD], drift=0.2)[0].said and not judge(["drift<=0.1"], None, [GOOD])[0].said


@pytest.mark.parametrize("text", ["range", "range>=1", "speed<=1", "range<=nan", "jerk<=-1", "drift<=x"])
def test_a_limit_that_is_none_is_refused(text: str) -> None:
    with pytest.raises(InputError, match="--limit"):
        parse_bound(text)


def test_what_was_served_is_recorded(tmp_path: Path) -> None:
    pytest.importorskip("pyarrow")
    from vlac.datasets import open_dataset

    with running("openpi", record=tmp_path / "r") as server:
        policy = client(server.port)
        for seed, step in ((1, 0), (1, 3), (2, 0)):
            policy.infer(observation(seed, moment=[seed, step]))
    data = open_dataset(tmp_path / "r")
    assert len(data.episodes) == 2 and len(data) == 3
    frame = next(iter(data.frames([2])))
    np.testing.assert_array_equal(frame["action"], direct(2)[0])
    np.testing.assert_array_equal(frame["images"]["observation.images.wrist"], observation(2)["images"]["wrist"])
    assert frame["task"] == TASK


# --- the command, and push-cubes -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def cubes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    for module in ("gymnasium", "pymunk", "onnx", "onnxruntime", "torch"):
        pytest.importorskip(module)
    from vlac.api import compile

    out = tmp_path_factory.mktemp("cubes") / "out"
    compile(str(ROOT / "vlac" / "zoo" / "push_cubes"), target="onnx-fp32", out=out)
    return out


class Server:
    """`vlac serve` in its own process."""

    def __init__(self, *args: Any) -> None:
        command = [sys.executable, "-m", "vlac.cli", "serve", *map(str, args), "--port", "0", "--threads", "1"]
        self.process = subprocess.Popen(
            [sys.executable, "-c", "from vlac.cli import main; main()", *command[3:]],
            stderr=subprocess.PIPE, text=True, cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"},
        )  # fmt: skip
        assert self.process.stderr is not None
        self.said = [self.process.stderr.readline()]
        assert "serving" in self.said[0], self.said[0] + self.process.stderr.read()
        self.port = int(self.said[0].rsplit(":", 1)[1])

    def end(self, number: int = signal.SIGTERM) -> tuple[int, str]:
        self.process.send_signal(number)
        _, said = self.process.communicate(timeout=30)
        return self.process.returncode, said

    def __enter__(self) -> Server:
        return self

    def __exit__(self, *_: Any) -> None:
        if self.process.poll() is None:
            self.process.kill()
            self.process.communicate()


class Remote:
    """An openpi client as a policy of vlac's evaluation."""

    def __init__(self, port: int) -> None:
        self.client = client(port)

    def act(self, seen: dict[str, Any]) -> np.ndarray:
        return self.client.infer(
            {
                "images": {k.rsplit(".", 1)[-1]: v for k, v in seen["images"].items()},
                "observation/state": seen["state"],
                "prompt": seen["task"],
                "moment": list(seen["moment"]),
            }
        )["actions"]


def test_push_cubes_through_the_server_is_push_cubes_on_the_artifact(cubes: Path, tmp_path: Path) -> None:
    seeds = [0, 1]
    driver = open_driver(cubes, threads=1)
    local = rollout(driver, opener(PUSH_CUBES), seeds, 5)
    driver.close()
    args = ("--protocol", "openpi", "--shadow", cubes, "--shadow-every", 3, "--limit", "drift<=1e-5")
    with Server(cubes, *args, "--record", tmp_path / "r") as server:
        served = rollout(Remote(server.port), opener(PUSH_CUBES), seeds, 5)
        asked = sum(len(e.act_ms) for e in served)
        text = get(server.port, "/metrics")[1]
        code, said = server.end()
    assert [(e.success, e.steps, e.jerk) for e in served] == [(e.success, e.steps, e.jerk) for e in local]
    assert f'outcome="chunks"}} {asked}' in text
    assert 'kind="shadow",name="compared"' in text and 'kind="limit"' not in text
    assert code == 0 and "everything that waited was answered" in said
    from vlac.datasets import open_dataset

    assert len(open_dataset(tmp_path / "r")) == asked


def test_sigterm_in_the_middle_of_inferences_answers_them(cubes: Path) -> None:
    world = open_world(PUSH_CUBES)
    seen = world.reset(3)
    world.close()
    with Server(cubes, "--protocol", "openpi") as server:
        remotes = [Remote(server.port) for _ in range(4)]
        outcomes: list[str] = []

        def drive(i: int) -> None:
            from websockets.exceptions import ConnectionClosed

            try:
                for n in range(100_000):
                    remotes[i].act({**seen, "moment": (i, n)})
            except RuntimeError as error:
                outcomes.append(str(error))
            except ConnectionClosed as error:
                outcomes.append(f"closed {error.rcvd.code if error.rcvd else None}")

        threads = [threading.Thread(target=drive, args=(i,), daemon=True) for i in range(4)]
        for t in threads:
            t.start()
        time.sleep(0.5)
        code, said = server.end()
        for t in threads:
            t.join(10)
    assert code == 0 and "everything that waited was answered" in said, said
    assert len(outcomes) == 4 and all("draining" in o or o == "closed 1001" for o in outcomes), outcomes


@pytest.mark.parametrize(
    ("args", "text"),
    [
        (["--protocol", "grpc"], "--protocol"),
        (["--limit", "drift<=1"], "--shadow"),
        (["--limit", "speed<=1"], "--limit"),
        (["--hold", "stop", "--limit", "jerk<=1"], "--hold"),
    ],
)
def test_options_that_do_not_fit_are_refused(args: list[str], text: str, cubes: Path) -> None:
    from typer.testing import CliRunner

    from vlac.cli import app

    result = CliRunner().invoke(app, ["serve", str(cubes), "--port", "0", *args])
    assert result.exit_code == 2 and text in result.output
