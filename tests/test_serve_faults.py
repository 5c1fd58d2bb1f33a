"""Faults as a network brings them, on every protocol: a named refusal, and the next client is answered as if nothing
had been."""

# ruff: noqa: E402
from __future__ import annotations

import base64
import io
import json
import os
import pickle
import random
import socket
import struct
import threading
import time
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

for module in ("fastapi", "uvicorn", "websockets", "msgpack", "grpc"):
    pytest.importorskip(module)

from serving import Running, direct, observation, running
from test_serve import as_json, client, get, post
from test_serve_lerobot import (
    RemotePolicyConfig,
    Stub,
    TimedObservation,
    as_lerobot,  # noqa: F401  (a fixture)
    raw,
    refused,
)
from websockets.exceptions import ConnectionClosed, InvalidStatus
from websockets.sync.client import connect

from vlac.serve import openpi
from vlac.serve.lerobot import message
from vlac.serve.refusal import CODES, Refused
from vlac.serve.wire import pack

PROTOCOLS = ("openpi", "http", "lerobot")
pytestmark = pytest.mark.usefixtures("as_lerobot")


def said_by(protocol: str, port: int, seen: Any) -> str:
    """What a new client is told about a value in an observation's place: a refusal's text, or "answered"."""
    if protocol == "openpi":
        with connect(f"ws://127.0.0.1:{port}", compression=None) as socket_:
            socket_.recv()
            socket_.send(pack(seen))
            said = socket_.recv(timeout=20)
            return said if isinstance(said, str) else "answered"
    if protocol == "http":
        status, said = post(port, as_json(seen) if isinstance(seen, dict) else json.dumps(seen).encode())
        return "answered" if status == 200 else f"{said['error']}: {said['message']}"
    stub = Stub(port).begin()
    import grpc

    try:
        stub.observe(pickle.dumps(TimedObservation(1.0, 0, seen, True)))
        return "answered" if stub.actions() else "nothing"
    except grpc.RpcError as error:
        return str(error.details())


def of(protocol: str, seed: int = 1, **changes: Any) -> dict[str, Any]:
    return raw(seed, **changes) if protocol == "lerobot" else observation(seed, **changes)


def still_serves(protocol: str, server: Running) -> None:
    """A new client gets its own answer, and nothing broke inside."""
    if protocol == "openpi":
        answer = client(server.port).infer(observation(6))["actions"]
    elif protocol == "http":
        answer = np.asarray(post(server.port, as_json(observation(6)))[1]["actions"], np.float32)
    else:
        stub = Stub(server.port).begin()
        stub.observe(pickle.dumps(TimedObservation(1.0, 0, raw(6), True)))
        answer = np.array([a.action for a in stub.actions()])
    np.testing.assert_array_equal(answer, direct(6)[: len(answer)])
    counts = server.served.watch.page()["counts"]
    assert counts["failed"] == 0 and counts["engine"] == 0, counts


PICTURE = np.zeros((4, 5, 3), np.uint8)
CAMERAS = ("images", "observation/images/top", "top", "wrist")
OBSERVATIONS: dict[str, Callable[[str], dict[str, Any]]] = {
    "no cameras": lambda p: {k: v for k, v in of(p).items() if k not in CAMERAS},
    "another camera": lambda p: of(p, elbow=PICTURE),
    "an extra vector": lambda p: of(p, force=np.zeros(6, np.float32)),
    "bool picture": lambda p: of(p, **{top(p): PICTURE.astype(bool)}),
    "four channels": lambda p: of(p, **{top(p): np.zeros((4, 5, 4), np.uint8)}),
    "two pictures in one": lambda p: of(p, **{top(p): np.zeros((2, 4, 5, 3), np.uint8)}),
    "Inf picture": lambda p: of(p, **{top(p): np.full((4, 5, 3), np.inf, np.float32)}),
    "NaN in one pixel": lambda p: of(p, **{top(p): one_nan()}),
    "int picture": lambda p: of(p, **{top(p): PICTURE.astype(np.int64)}),
    "state of text": lambda p: of(p, **state(p, ["a", "b", "c"])),
    "state of nothing": lambda p: of(p, **state(p, [None, 1.0, 2.0])),
    "NaN state": lambda p: of(p, **state(p, [np.nan, 1.0, 2.0])),
    "-Inf state": lambda p: of(p, **state(p, [1.0, -np.inf, 2.0])),
    "beyond float32": lambda p: of(p, **state(p, [1.0, 1e39, 2.0])),
    "a great whole number": lambda p: of(p, **state(p, [1.0, 2**63 - 1, 10**400 if p == "http" else 1e300])),
    "task of bytes": lambda p: of(p, **{task(p): 5}),
    "task with NUL": lambda p: of(p, **{task(p): "push\0"}),
    "task of a megabyte": lambda p: of(p, **{task(p): "a" * 1_000_000}),
    "moment of floats": lambda p: of(p, moment=[0.5, 1.0]),
    "moment of three": lambda p: of(p, moment=[0, 1, 2]),
    "moment beyond": lambda p: of(p, moment=[2**63, 0]),
    "a long key": lambda p: of(p, **{"k" * 100_000: 1.0}),
    "a long known key": lambda p: of(p, **{"k" * 100_000 + "/prompt": 3, **({} if p != "lerobot" else {"task": 3})}),
}  # fmt: skip


def top(protocol: str) -> str:
    return "top" if protocol == "lerobot" else "observation/images/top"


def task(protocol: str) -> str:
    return "task" if protocol == "lerobot" else "prompt"


def state(protocol: str, values: list[Any]) -> dict[str, Any]:
    return dict(zip("abc", values, strict=True)) if protocol == "lerobot" else {"observation/state": values}


def one_nan() -> np.ndarray:
    picture = np.full((4, 5, 3), 0.5, np.float32)
    picture[3, 2, 1] = np.nan
    return picture


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_observations_nobody_trained_for_are_refused_by_name(protocol: str) -> None:
    with running(protocol) as server:
        for name, make in OBSERVATIONS.items():
            if protocol == "lerobot" and name in ("an extra vector", "a long key"):
                continue  # what the instructions do not name and is no picture is not the policy's: left out
            said = said_by(protocol, server.port, make(protocol))
            assert said.split(":")[0] in ("input", "malformed"), (name, said[:200])
            assert len(said) < 1500, (name, len(said))
        still_serves(protocol, server)


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_values_that_are_no_observation(protocol: str) -> None:
    with running(protocol) as server:
        for value in (
            None,
            True,
            3,
            "text",
            [],
            [1, 2],
            [[]],
            {"": 1},
            {"images": 3},
            {"images": {"a": {"b": {"c": {}}}}},
        ):
            said = said_by(protocol, server.port, value)
            assert said.split(":")[0] in ("input", "malformed"), (value, said)
        still_serves(protocol, server)


# --- refusals themselves ---------------------------------------------------------------------------------------------


def test_a_refusal_can_be_sent_whatever_it_tells_of() -> None:
    error = Refused("input", "key \ud800 " + "x" * 10_000, remedy="r")
    assert len(error.text.encode()) < 1500 and "\\ud800" in error.message
    assert set(CODES) >= {"malformed", "input"}


# --- messages, openpi --------------------------------------------------------------------------------------------


def test_msgpack_that_is_none_or_holds_something_else() -> None:
    import msgpack

    nd = {b"__ndarray__": True}
    bad: list[bytes] = [
        b"\xc1", b"\xdf\xff\xff\xff\xff", b"\xc9\xff\xff\xff\xff\x01", b"\x93\x01", b"\xd4\x05\x00", b"\x80\x80",
        msgpack.packb({1: 2}), msgpack.packb({b"top": b"\0" * 60}), msgpack.packb({"a": msgpack.ExtType(5, b"x")}),
        msgpack.packb({"a": msgpack.Timestamp(0)}), msgpack.packb({"a": nd}), msgpack.packb(nd),
        msgpack.packb({"a": {**nd, b"data": b"", b"dtype": "<f4", b"shape": [0] * 7}}),
        msgpack.packb({"a": {**nd, b"data": b"\0" * 4, b"dtype": "<f4", b"shape": [1.0]}}),
        msgpack.packb({"a": {b"__npgeneric__": True, b"data": "text", b"dtype": "<f4"}}),
        b"\x81\xa1\xff\x01", b"\x82\xa1a\x01\xa1a\x02",
    ]  # fmt: skip
    deep: Any = 1
    for _ in range(400):
        deep = {"a": deep}
    bad.append(msgpack.packb(deep))
    with running("openpi") as server:
        with connect(f"ws://127.0.0.1:{server.port}", compression=None) as socket_:
            socket_.recv()
            for data in bad:
                socket_.send(data)
                said = socket_.recv(timeout=20)
                assert isinstance(said, str) and said.split(":")[0] in ("malformed", "input"), (data, said)
        still_serves("openpi", server)


def test_frames_that_break_the_websockets_rules_end_their_connection_only() -> None:
    frames = [
        b"\x82\x05hello",  # not masked
        b"\xf2\x80\0\0\0\0",  # reserved bits
        b"\x8f\x80\0\0\0\0",  # an opcode that is none
        b"\x80\x80\0\0\0\0",  # a continuation of nothing
        b"\x89\xfe\x01\x00\0\0\0\0" + b"\0" * 256,  # a ping of 256 bytes
        b"\x82\xff" + struct.pack(">Q", 2**62) + b"\0\0\0\0",  # four exabytes
        b"\x88\x81\0\0\0\0\0",  # a close of one byte
        b"\x02\x80\0\0\0\0\x82\x80\0\0\0\0",  # a message within a fragmented one
    ]
    with running("openpi") as server:
        other = client(server.port)
        for frame in frames:
            with connect(f"ws://127.0.0.1:{server.port}", compression=None) as socket_:
                socket_.recv()
                socket_.socket.sendall(frame)
                with pytest.raises(ConnectionClosed):
                    while True:
                        socket_.recv(timeout=20)
            np.testing.assert_array_equal(other.infer(observation(2))["actions"], direct(2))
        still_serves("openpi", server)


@pytest.mark.parametrize("protocol", ["openpi", "http"])
def test_requests_for_pages_that_no_browser_sends(protocol: str) -> None:
    """Every answer has a status below 500, and it is an answer."""
    lines = [
        "GET //[ HTTP/1.1", "GET /metrics?token=%ff HTTP/1.1", "GET /dashboard.json?after=" + "9" * 5000 + " HTTP/1.1",
        "GET /dashboard.json?after=\u0663 HTTP/1.1", "GET /" + "a" * 3000 + " HTTP/1.1",
        "GET /../../etc/passwd HTTP/1.1",
        "GET /metrics HTTP/1.1\r\nAuthorization: Bearer a\r\nAuthorization: Bearer b",
        "GET /healthz HTTP/1.1\r\nHost: [",
        "DELETE /act HTTP/1.1", "GET /act HTTP/1.1", "POST /nowhere HTTP/1.1\r\nContent-Length: 0",
        "GET /healthz HTTP/1.1\r\nA: \xff\xfe", "\x16\x03\x01\x02\x00\x01", "GET /healthz HTTP/9.9", "GET", "",
    ]  # fmt: skip
    with running(protocol, dashboard=True) as server:
        for line in lines:
            with socket.create_connection(("127.0.0.1", server.port), 20) as raw_:
                host = "" if "Host:" in line else "Host: a\r\n"
                raw_.sendall(f"{line}\r\n{host}Connection: close\r\n\r\n".encode("latin-1", "replace"))
                raw_.shutdown(socket.SHUT_WR)
                said = received(raw_)
            status = int(said.split()[1]) if said.startswith(b"HTTP/") else 0
            assert 200 <= status < 500 or not said, (line[:60], said[:200])
        assert get(server.port, "/nowhere")[0] == 404
        still_serves(protocol, server)


def received(raw_: socket.socket) -> bytes:
    said = b""
    try:
        while part := raw_.recv(65536):
            said += part
    except OSError:
        pass
    return said


# --- messages, http --------------------------------------------------------------------------------------------------


def sent(port: int, head: str, body: bytes = b"", reset: bool = False) -> tuple[int, bytes]:
    """(status, everything) of a raw request; 0 where there is no answer."""
    with socket.create_connection(("127.0.0.1", port), 30) as raw_:
        raw_.sendall(
            f"POST /act HTTP/1.1\r\nHost: a\r\nContent-Type: application/json\r\n{head}\r\n\r\n".encode() + body
        )
        raw_.settimeout(30)
        said = received(raw_)
    return (int(said.split()[1]) if said.startswith(b"HTTP/") else 0), said


def test_lengths_that_lie_and_chunks_that_are_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vlac.serve.web.READ_S", 0.5)
    good = json.dumps(as_json(observation(1))).encode()
    n = len(good)
    cases = [
        ("Content-Length: ten\r\nConnection: close", good),
        ("Content-Length: -5\r\nConnection: close", good),
        (f"Content-Length: {n}\r\nContent-Length: {n - 1}\r\nConnection: close", good),
        (f"Content-Length: {10**30}\r\nConnection: close", good),
        (f"Content-Length: {n + 50}\r\nConnection: close", good),  # the rest never comes
        (f"Content-Length: {n - 7}\r\nConnection: close", good),  # cut in the middle
        ("Transfer-Encoding: chunked\r\nConnection: close", b"zz\r\n" + good),
        ("Transfer-Encoding: chunked\r\nConnection: close", b"ffffffffffffffffffff\r\n" + good),
        ("Transfer-Encoding: chunked\r\nConnection: close", b'5\r\n{"a": 1}\r\n'),
        ("Transfer-Encoding: gzip\r\nConnection: close", good),
        ("Transfer-Encoding: chunked\r\nConnection: close", b'3\r\n{"a'),
    ]
    with running("http", max_bytes=1 << 20) as server:
        for head, body in cases:
            status, said = sent(server.port, head, body)
            assert 400 <= status < 500 or (status == 501), (head, said[:300])
        # a chunked body that is well formed is a body
        chunked = b"%x\r\n%s\r\n0\r\n\r\n" % (n, good)
        assert sent(server.port, "Transfer-Encoding: chunked\r\nConnection: close", chunked)[0] == 200
        endless = b"%x\r\n" % (4 << 20) + b" " * (2 << 20)
        status, said = sent(server.port, "Transfer-Encoding: chunked\r\nConnection: close", endless)
        assert status in (413, 0), said[:200]  # or a reset, for the client was still sending
        still_serves("http", server)


def test_bodies_that_are_not_what_they_say() -> None:
    from PIL import Image

    def png(size: tuple[int, int], mode: str = "RGB") -> str:
        stream = io.BytesIO()
        Image.new(mode, size).save(stream, "png")
        return base64.b64encode(stream.getvalue()).decode()

    def npy(header: bytes) -> str:
        head = header.ljust(118) + b"\n"
        return base64.b64encode(b"\x93NUMPY\x01\x00" + struct.pack("<H", len(head)) + head + b"\0" * 12).decode()

    bomb = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", struct.pack(">IIBBBBB", 2**31 - 1, 2**31 - 1, 8, 2, 0, 0, 0))
    headers = [
        b"{'descr': '|O', 'fortran_order': False, 'shape': (1,)}",
        b"{'descr': '<f4', 'fortran_order': False, 'shape': (-3,)}",
        b"{'descr': [('a', '<f4')], 'fortran_order': False, 'shape': (3,)}", b"__import__('os').mkdir('gadget')",
        b"{'descr': '<f4', 'fortran_order': False, 'shape': (99999999999,)}", b"{" * 100, b"{'descr': '<f4'}",
        b"{'descr': '<f4', 'fortran_order': 3, 'shape': 3}", b"\xff\xfe",
    ]  # fmt: skip
    pictures: list[Any] = [{"npy": npy(h)} for h in headers]
    pictures += [
        {"png": base64.b64encode(bomb).decode()}, {"png": png((8000, 3000))}, {"png": png((64, 64))[:-60]},
        {"jpeg": png((4, 4))},
        {"npy": base64.b64encode(pickle.dumps(PICTURE)).decode()}, {"gif": "AAAA"}, {"png": 3},
        {"png": "AAAA", "npy": "AAAA"},
        {"png": "\u00e9"}, {"npy": ""}, [[[0]]], "AAAA", 3, True,
    ]  # fmt: skip
    bodies = [json.dumps({**as_json(observation(1)), "observation/images/top": p}).encode() for p in pictures]
    bodies += [
        b"", b"\xff\xfe{\0}\0", b"\xef\xbb\xbf{}", b"nul", b"[" * 900_000, b'{"a":' * 900, b"1" * 10_000,
        b'{"\\ud800/prompt": 3}',
        b'{"\\ud800": 3}', b'{"prompt": "\\ud800"}', b"{}" * 3, b'{"state": [1,2,3],}', zlib.compress(b"{}"),
    ]  # fmt: skip
    with running("http", max_bytes=1 << 20) as server:
        for body in bodies:
            status, said = post(server.port, body)
            assert 400 <= status < 500 and said["error"] in ("malformed", "input", "too_large"), (body[:80], said)
        assert not Path("gadget").exists()
        assert post(server.port, b"{}", path="/nowhere")[1]["error"] == "not_found"
        still_serves("http", server)


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


# --- messages, lerobot -----------------------------------------------------------------------------------------------


class Runs:
    def __reduce__(self) -> Any:
        return os.mkdir, ("gadget",)


def test_calls_that_robot_client_never_makes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with running("lerobot", max_bytes=1 << 20) as server:
        stub = Stub(server.port).begin()
        bad = [b"\x08\x05", b"\xff" * 30, b"", message(b""), message(pickle.dumps(Runs())), message(pickle.dumps(3))]
        for features in ({"observation.state": 3}, [], {"observation.state": {"names": [1]}}):
            bad.append(message(pickle.dumps(RemotePolicyConfig("a", "b", features, 5))))  # type: ignore[arg-type]
        for data in bad:
            code, said = refused(stub.call, "SendPolicyInstructions", data)
            assert code == "INVALID_ARGUMENT" and said.startswith("malformed: "), (data, code, said)
        stream = stub.channel.stream_unary("/transport.AsyncInference/SendObservations")
        for parts in ([], [b""], [b"\x08\x03\x10\x05"], [b"\x0a\x01a"], [b"\x08\x02\x12\x01a"], [b"\xff" * 40]):
            code, said = refused(lambda p=parts: stream(iter(p), timeout=20))
            assert code == "INVALID_ARGUMENT" and said.startswith("malformed: "), (parts, code, said)
        for change in ({"timestep": True}, {"timestep": -1}, {"timestep": 2**40}, {"timestep": 1.0},
                       {"timestamp": "now"}, {"timestamp": float("nan")}, {"timestamp": float("inf")},
                       {"observation": None}):  # fmt: skip
            sent_ = TimedObservation(1.0, 0, raw(1), True)
            for key, value in change.items():
                setattr(sent_, key, value)
            code, said = refused(stub.observe, pickle.dumps(sent_))
            assert code == "INVALID_ARGUMENT" and said.startswith("malformed: "), (change, code, said)
        assert refused(stub.call, "Nonsense")[0] == "UNIMPLEMENTED"
        assert refused(stub.observe, b"\0" * (2 << 20))[0] == "RESOURCE_EXHAUSTED"
        rng = random.Random(11)
        whole = bytes([8, 3, 18]) + message(pickle.dumps(TimedObservation(1.0, 5, raw(2), True)))[1:]
        import grpc

        for _ in range(80):
            data = bytearray(whole)
            for _ in range(rng.randrange(1, 5)):
                data[rng.randrange(min(len(data), 400))] = rng.randrange(256)
            try:
                stream(iter([bytes(data)]), timeout=20)
                stub.call("GetActions")
            except grpc.RpcError as error:
                assert error.code().name in ("INVALID_ARGUMENT", "RESOURCE_EXHAUSTED"), error
                assert error.details().split(":")[0] in ("malformed", "input", "too_large"), error.details()
        assert not list(tmp_path.iterdir())
        still_serves("lerobot", server)


def test_beginning_again_in_the_middle_of_an_inference(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ready while an observation waits: its call is told, the next is answered."""
    monkeypatch.setattr("vlac.serve.lerobot.WAIT_S", 0.2)
    with running("lerobot") as server:
        busy, stub = Stub(server.port).begin(), Stub(server.port).begin()
        server.toy.go.clear()
        busy.observe(pickle.dumps(TimedObservation(1.0, 0, raw(1), True)))
        while not server.toy.seen:
            time.sleep(0.01)
        stub.observe(pickle.dumps(TimedObservation(1.0, 0, raw(2), True)))
        told: list[Any] = []

        def wait() -> None:
            import grpc

            try:
                told.append(stub.actions())
            except grpc.RpcError as error:
                told.append(error.details())

        thread = threading.Thread(target=wait)
        thread.start()
        time.sleep(0.2)
        stub.begin()
        server.toy.go.set()
        thread.join(20)
        assert told == [[]] or "superseded" in str(told[0]), told
        stub.observe(pickle.dumps(TimedObservation(1.0, 0, raw(3), True)))
        np.testing.assert_array_equal([a.action for a in stub.actions()], direct(3)[:4])
        np.testing.assert_array_equal([a.action for a in busy.actions()], direct(1)[:4])
        still_serves("lerobot", server)


@pytest.mark.parametrize(
    "data", [b"", b"GET / HTTP/1.1\r\n\r\n", b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", b"\x16\x03\x01" + b"\0" * 500]
)
def test_something_else_on_lerobots_port(data: bytes) -> None:
    with running("lerobot") as server:
        for _ in range(5):
            with socket.create_connection(("127.0.0.1", server.port)) as raw_:
                raw_.sendall(data)
                raw_.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
        still_serves("lerobot", server)


def test_a_robot_killed_in_the_middle_of_its_observation() -> None:
    with running("lerobot") as server:
        whole = pickle.dumps(TimedObservation(1.0, 0, raw(1), True))
        for _ in range(5):
            stub = Stub(server.port).begin()
            gate = threading.Event()

            def parts(gate: threading.Event = gate) -> Any:
                yield bytes([8, 1, 18]) + message(whole[:100])[1:]
                gate.wait(20)

            stub.channel.stream_unary("/transport.AsyncInference/SendObservations").future(parts(), timeout=20)
            time.sleep(0.05)
            stub.channel.close()
            gate.set()
        still_serves("lerobot", server)


# --- clients ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_one_client_too_many_is_told_and_those_inside_go_on(protocol: str) -> None:
    with running(protocol, max_clients=1) as server:
        if protocol == "openpi":
            inside = client(server.port)
            with connect(f"ws://127.0.0.1:{server.port}", compression=None) as socket_:
                with pytest.raises(ConnectionClosed) as closed:
                    socket_.recv(timeout=10)
                assert closed.value.rcvd is not None and closed.value.rcvd.code == 1013
                assert closed.value.rcvd.reason.startswith("too_many_clients: ")
            np.testing.assert_array_equal(inside.infer(observation(1))["actions"], direct(1))
        elif protocol == "lerobot":
            stub = Stub(server.port).begin()
            code, said = refused(Stub(server.port).call, "Ready")
            assert code == "RESOURCE_EXHAUSTED" and said.startswith("too_many_clients: ")
            stub.observe(pickle.dumps(TimedObservation(1.0, 0, raw(1), True)))
            np.testing.assert_array_equal([a.action for a in stub.actions()], direct(1)[:4])
        else:
            server.toy.go.clear()
            answers: list[Any] = []
            thread = threading.Thread(
                target=lambda: answers.append(post(server.port, as_json(observation(1)), X_Client="a"))
            )
            thread.start()
            while not server.toy.seen:
                time.sleep(0.01)
            status, said = post(server.port, as_json(observation(2)), X_Client="b")
            assert (status, said["error"]) == (503, "too_many_clients")
            server.toy.go.set()
            thread.join(20)
            np.testing.assert_array_equal(np.asarray(answers[0][1]["actions"], np.float32), direct(1))


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_a_wrong_token_learns_nothing(protocol: str) -> None:
    with running(protocol, token="secret") as server:
        for given in (None, "", "Secret", "secret ".strip() + "x", "s\u00e9cret"):
            if protocol == "openpi":
                try:
                    with pytest.raises(InvalidStatus, match="401"):
                        client(server.port, api_key=given)
                except UnicodeEncodeError:
                    continue  # the client's own refusal
            elif protocol == "http":
                headers = {} if given is None else {"Authorization": f"Bearer {given}"}
                status, said = post(server.port, as_json(observation(1)), **headers)
                assert (status, said["error"]) == (401, "unauthorised")
            elif given is None or given.isascii():
                for name in ("Ready", "GetActions", "SendPolicyInstructions"):
                    code, said = refused(Stub(server.port, given).call, name)
                    assert code == "UNAUTHENTICATED" and said.startswith("unauthorised: ")
        assert not server.toy.seen


def test_a_client_that_never_reads_is_disconnected(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(openpi, "SEND_S", 0.5)
    monkeypatch.setattr(openpi, "_reply", big_reply)
    with running("openpi") as server:
        slow = connect(f"ws://127.0.0.1:{server.port}", compression=None, max_queue=1)
        slow.recv()
        try:
            for _ in range(200):
                slow.send(pack(observation()))
        except (ConnectionClosed, OSError):
            pass
        deadline = time.monotonic() + 20
        while server.served.core.load()["clients"] and time.monotonic() < deadline:
            time.sleep(0.05)
        assert server.served.core.load() == {"clients": 0, "waiting": 0}
        slow.socket.close()


async def big_reply(asked: Any) -> bytes:
    await asked
    return b"\0" * (8 << 20)


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_random_mixtures_of_good_and_bad_clients_do_not_cross(protocol: str) -> None:
    wrong: list[Any] = []

    def good(port: int, seed: int) -> None:
        try:
            wanted = direct(seed)
            if protocol == "lerobot":
                stub = Stub(port).begin()
            policy = client(port) if protocol == "openpi" else None
            for n in range(8):
                if protocol == "openpi":
                    got = policy.infer(observation(seed))["actions"]
                elif protocol == "http":
                    got = np.asarray(
                        post(port, as_json(observation(seed)), X_Client=f"c{seed}")[1]["actions"], np.float32
                    )
                else:
                    stub.observe(pickle.dumps(TimedObservation(1.0, n, raw(seed), True)))
                    got = np.array([a.action for a in stub.actions()])
                if not np.array_equal(got, wanted[: len(got)]):
                    wrong.append(seed)
        except Exception as error:
            wrong.append(repr(error))

    def bad(port: int, seed: int) -> None:
        rng = random.Random(seed)
        for _ in range(6):
            made = OBSERVATIONS[rng.choice([k for k in OBSERVATIONS if "long" not in k and k != "an extra vector"])]
            said = said_by(protocol, port, made(protocol))
            if said.split(":")[0] not in ("input", "malformed"):
                wrong.append(said)

    with running(protocol) as server:
        threads = [threading.Thread(target=good if n % 2 else bad, args=(server.port, n)) for n in range(6)]
        for t in threads:
            t.start()
        for t in threads:
            t.join(90)
        assert not wrong, wrong[:3]
        still_serves(protocol, server)
