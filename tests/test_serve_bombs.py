"""Messages that are small on the wire and large in memory, clients that are slow on purpose, several tasks at once: a
named refusal or the right answer, and the server goes on."""

# ruff: noqa: E402
from __future__ import annotations

import contextlib
import json
import pickle
import socket
import struct
import threading
import time
import tracemalloc
from collections.abc import Callable
from typing import Any

import msgpack
import numpy as np
import pytest

for module in ("fastapi", "uvicorn", "websockets", "msgpack", "grpc"):
    pytest.importorskip(module)

from serving import Toy, direct, observation, running
from test_serve import as_json, client, post
from test_serve_faults import PROTOCOLS, of, received, said_by, still_serves, task
from test_serve_lerobot import Stub, TimedObservation, as_lerobot, raw, refused  # noqa: F401  (as_lerobot is a fixture)
from websockets.exceptions import ConnectionClosed
from websockets.sync.client import connect

from vlac.serve import web
from vlac.serve.lerobot import fields
from vlac.serve.observation import numbers
from vlac.serve.refusal import Refused
from vlac.serve.wire import MAX_ITEMS, check_items, pack, unpack

pytestmark = pytest.mark.usefixtures("as_lerobot")
MANY = 2_000_000


def peak_mb(call: Callable[[], Any]) -> float:
    """Memory that a refused call takes at most, in MB beyond what it was given."""
    tracemalloc.start()
    try:
        with pytest.raises(Refused) as error:
            call()
        assert error.value.code in ("malformed", "input"), error.value
        return tracemalloc.get_traced_memory()[1] / 2**20
    finally:
        tracemalloc.stop()


BOMBS = {
    "empty lists": b"\xdd" + struct.pack(">I", MANY) + b"\x90" * MANY,
    "empty maps": b"\xdd" + struct.pack(">I", MANY) + b"\x80" * MANY,
    "lists in a map": b"\x81\xa5state\xdd" + struct.pack(">I", MANY) + b"\x90" * MANY,
    "lists of lists": (b"\xdc\xff\xff" + b"\x90" * 65535) * 30,
    "empty texts": b"\xdd" + struct.pack(">I", MANY) + b"\xa0" * MANY,
    "small extensions": b"\xdd" + struct.pack(">I", MANY // 4) + b"\xd4\x05\0" * (MANY // 4),
}


@pytest.mark.parametrize("name", BOMBS)
def test_msgpack_of_very_many_values_takes_no_memory(name: str) -> None:
    assert peak_mb(lambda: unpack(BOMBS[name])) < 1


@pytest.mark.parametrize("part", [b"[]", b"{}", b"0", b'""', b"[[[]]]"])
def test_json_of_very_many_values_takes_no_memory(part: bytes) -> None:
    reader = web.Web(None, None, None, 1 << 30)  # type: ignore[arg-type]
    body = b'{"state": [' + b",".join([part] * (MANY // 4)) + b"]}"
    assert peak_mb(lambda: reader._read(body)) < 1


def test_the_count_follows_msgpack_through_every_kind() -> None:
    """A message of every kind is walked to its very end: one more value behind it would not be seen otherwise."""
    kinds = [None, True, False, 0, 200, 70_000, 2**40, -1, -100, -1000, -70_000, -(2**40), 1.5, "", "a" * 20, "a" * 200,
             "a" * 300, "a" * 70_000, b"", b"b" * 300, b"b" * 70_000, [], [1] * 20, [1] * 700, {}, {"k": 1},
             {f"k{i}": i for i in range(20)}, msgpack.Timestamp(0), *(msgpack.ExtType(5, b"x" * n) for n in
             (0, 1, 2, 3, 4, 8, 16, 17, 300, 70_000))]  # fmt: skip
    for kind in kinds:
        for one in (msgpack.packb(kind), msgpack.packb({"a": [kind, kind]}), struct.pack(">Bf", 0xCA, 1.0)):
            some = MAX_ITEMS - 2000
            many = b"\xdd" + struct.pack(">I", some) + one + b"\xc0" * (some - 1)
            check_items(many)
            too_many = b"\xdd" + struct.pack(">I", MAX_ITEMS + 1) + one + b"\xc0" * MAX_ITEMS
            with pytest.raises(Refused, match="more than"):
                check_items(too_many)


def test_numbers_that_are_texts_are_not_padded_to_the_longest() -> None:
    values = ["a" * 1_000_000, *["b"] * 50_000]
    assert peak_mb(lambda: numbers("state", values)) < 1
    for wrong in ([True, 1.0], [[1.0], ["a"]], [{}], [None], [[[[[1.0]]]]], [b"a"]):
        with pytest.raises(Refused):
            numbers("state", wrong)
    for fine in ([1, 2.5], [[1.0, 2.0]], (1, 2), [np.float32(1), np.array(2.0)]):
        assert numbers("state", fine).size == 2


def test_protobuf_of_very_many_fields_is_refused_at_once() -> None:
    data = b"\x08\x01" * 1_000_000
    began = time.process_time()
    assert peak_mb(lambda: fields(data)) < 1
    assert time.process_time() - began < 0.5
    assert fields(b"\x08\x01" * 64) == {1: 1}


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_bombs_over_the_wire(protocol: str) -> None:
    values: list[Any] = [[[]] * 60_000, ["a" * 200_000, *["b"] * 15_000], [{}] * 60_000]
    with running(protocol) as server:
        for value in values:
            changes = {"a": value} if protocol == "lerobot" else {"observation/state": value}
            said = said_by(protocol, server.port, of(protocol, **changes))
            assert said.split(":")[0] in ("malformed", "input"), said[:200]
        if protocol == "lerobot":
            stub = Stub(server.port).begin()
            stream = stub.channel.stream_unary("/transport.AsyncInference/SendObservations")
            code, said = refused(lambda: stream(iter([b"\x08\x01" * 1_000_000]), timeout=20))
            assert code == "INVALID_ARGUMENT" and "more than 64 fields" in said
        still_serves(protocol, server)


def test_a_message_in_endless_empty_frames_ends_its_connection_only() -> None:
    with running("openpi") as server:
        other = client(server.port)
        with connect(f"ws://127.0.0.1:{server.port}", compression=None) as socket_:
            socket_.recv()
            try:
                socket_.socket.sendall(b"\x02\x80\0\0\0\0")
                for _ in range(200):
                    socket_.socket.sendall(b"\x00\x80\0\0\0\0" * 100)
            except OSError:
                pass  # it was closed meanwhile
            with pytest.raises(ConnectionClosed) as closed:
                socket_.recv(timeout=20)
            if closed.value.rcvd is not None:
                assert closed.value.rcvd.code == 1009 and closed.value.rcvd.reason.startswith("too_large: a message of")
        np.testing.assert_array_equal(other.infer(observation(2))["actions"], direct(2))
        assert server.served.watch.page()["counts"]["too_large"] == 1
        still_serves("openpi", server)


def test_a_message_in_several_frames_is_a_message() -> None:
    data = pack(observation(3))
    with running("openpi") as server, connect(f"ws://127.0.0.1:{server.port}", compression=None) as socket_:
        socket_.recv()
        socket_.send([data[:100], b"", data[100:5000], data[5000:]])
        np.testing.assert_array_equal(unpack(socket_.recv(timeout=20))["actions"], direct(3))
        socket_.send(["te", "xt"])
        assert socket_.recv(timeout=20).startswith("malformed: a text message")


def test_half_a_frame_and_nothing_more_leaves_the_others_served() -> None:
    data = pack(observation(1))
    with running("openpi") as server:
        halves = []
        for n in (1, 3, 8, 200):
            socket_ = connect(f"ws://127.0.0.1:{server.port}", compression=None)
            socket_.recv()
            frame = b"\x82\xff" + struct.pack(">Q", len(data)) + b"\0\0\0\0" + data
            socket_.socket.sendall(frame[:n])
            halves.append(socket_)
        for socket_ in halves[:2]:  # and two of them die
            socket_.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
            socket_.socket.close()
        still_serves("openpi", server)
        for socket_ in halves[2:]:
            socket_.socket.close()


def test_headers_that_never_end_do_not_take_the_others_places(monkeypatch: pytest.MonkeyPatch) -> None:
    """Slow headers in as many connections as the server carries, each kept alive by a byte now and then."""
    monkeypatch.setattr(web, "HEAD_S", 1.0)
    with running("http", max_clients=4) as server:
        slow = [socket.create_connection(("127.0.0.1", server.port), 20) for _ in range(16)]
        for n, raw_ in enumerate(slow):
            raw_.sendall((b"POST /act HTTP/1.1\r\nHost: a\r\nX-A: ", b"G", b"")[n % 3])
        for _ in range(9):
            time.sleep(0.2)
            for raw_ in slow:
                with contextlib.suppress(OSError):  # it was closed
                    raw_.sendall(b"a")
        for n, raw_ in enumerate(slow):
            said = received(raw_)
            assert said.startswith(b"HTTP/1.1 400") or not said, said[:200]
            assert n % 3 or b"malformed: the request's headers did not arrive within 1 s" in said
        assert server.served.watch.page()["counts"]["malformed"] == 16
        still_serves("http", server)


def test_a_kept_connection_is_not_cut_between_its_requests(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(web, "HEAD_S", 1.0)
    import http.client

    with running("http") as server:
        connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=20)
        for _ in range(2):
            body = json.dumps(as_json(observation(1)))
            connection.request("POST", "/act", body, {"Content-Type": "application/json"})
            assert connection.getresponse().read()
            time.sleep(1.3)
        server.toy.go.clear()  # and not while it waits for its answer
        connection.request("POST", "/act", body, {"Content-Type": "application/json"})
        time.sleep(1.3)
        server.toy.go.set()
        assert connection.getresponse().status == 200
        connection.sock.sendall(b"POST /act HT")  # but a second request must get to its end as the first
        time.sleep(1.3)
        assert b"headers did not arrive" in received(connection.sock)


def test_a_client_that_does_not_read_its_answers_over_http() -> None:
    body = json.dumps(as_json(observation(1))).encode()
    head = f"POST /act HTTP/1.1\r\nHost: a\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
    with running("http") as server:
        lazy = socket.socket()
        lazy.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2048)
        lazy.connect(("127.0.0.1", server.port))
        lazy.settimeout(0.5)
        try:
            for _ in range(200):
                lazy.sendall(head.encode() + body)
        except OSError:
            pass  # its own sending stalls, for the server has stopped reading from it
        still_serves("http", server)
        lazy.close()


TEXTS = (
    "推红色方块向左", "дави красный куб", "\u202eright to left\u202c", "e\u0301\u0301\u0301" * 50, "🤖🟥⬅️",
    "\ufeff push",
    "\u0000".replace("\0", "\u2028"), "ﷺ" * 100, "a\u200db", "\x7f\x80\x9f", "\U0010ffff", "", " " * 4000, "\n\t\r",
)  # fmt: skip


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_instructions_in_every_script(protocol: str) -> None:
    """Answered as the policy answers alone, or refused as input."""
    toy = Toy()
    with running(protocol) as server:
        answered = 0
        for text in TEXTS:
            said = said_by(protocol, server.port, of(protocol, **{task(protocol): text}))
            assert said == "answered" or said.split(":")[0] == "input", (text, said)
            answered += said == "answered"
        assert answered >= len(TEXTS) - 2
        said = said_by(protocol, server.port, of(protocol, **{task(protocol): "é" * 100_000}))
        assert said.startswith("input: ") and "100000 characters, expected at most 4096" in said
        still_serves(protocol, server)
    toy.close()


WORDS = ("pick up the red cube", "push the blue cube", "open the drawer", "stack everything")


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_clients_with_tasks_of_their_own_do_not_cross(protocol: str) -> None:
    """Same pictures and states, other instructions, all at once: prompts and prefixes are kept by what they are."""
    toy, wanted = Toy(), {}
    for n, text in enumerate(WORDS):
        seen = {**observation(1), "prompt": text}
        pictures = {"top": seen["observation/images/top"], "wrist": seen["images"]["wrist"]}
        state = seen["observation/state"]
        wanted[n] = toy.act({"images": pictures, "state": state, "task": text, "moment": (1, 0)})
    assert len({w.tobytes() for w in wanted.values()}) == len(WORDS), "the instruction must matter"
    wrong: list[Any] = []

    def drive(port: int, n: int) -> None:
        try:
            policy = client(port) if protocol == "openpi" else None
            stub = Stub(port).begin() if protocol == "lerobot" else None
            for step in range(12):
                if policy is not None:
                    got = policy.infer({**observation(1), "prompt": WORDS[n]})["actions"]
                elif stub is not None:
                    stub.observe(pickle.dumps(TimedObservation(1.0, step, raw(1, task=WORDS[n]), True)))
                    got = np.array([a.action for a in stub.actions()])
                else:
                    body = as_json({**observation(1), "prompt": WORDS[n]})
                    got = np.asarray(post(port, body, X_Client=f"c{n}")[1]["actions"], np.float32)
                if not np.array_equal(got, wanted[n][: len(got)]):
                    wrong.append((n, step))
        except Exception as error:
            wrong.append(repr(error))

    with running(protocol) as server:
        threads = [threading.Thread(target=drive, args=(server.port, n)) for n in range(len(WORDS))]
        for t in threads:
            t.start()
        for t in threads:
            t.join(60)
    assert not wrong, wrong[:3]


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_what_a_reader_does_not_foresee_is_a_refusal(protocol: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever reading a message raises, its connection goes on."""
    with running(protocol) as server:
        reader = server.served.protocol.reader
        read = reader.read

        def broken(found: Any) -> Any:
            if isinstance(found, dict) and found.get("prompt", found.get("task")) == "break":
                raise MemoryError("no more")
            return read(found)

        monkeypatch.setattr(reader, "read", broken)
        said = said_by(protocol, server.port, of(protocol, **{task(protocol): "break"}))
        assert said.startswith("failed: MemoryError: no more")
        assert server.served.watch.page()["counts"]["failed"] == 1
        assert said_by(protocol, server.port, of(protocol)) == "answered"


@pytest.mark.parametrize("protocol", ["openpi", "http"])
def test_what_is_said_twice_is_not_guessed(protocol: str) -> None:
    """One would win silently, by the order of the keys."""
    seen = observation(1)
    with running(protocol) as server:
        for more, said in (
            ({"task": "another"}, "input: the instruction is given twice, the second time as 'task'"),
            ({"agent_pos": seen["observation/state"] + 1}, "input: the state is given twice"),
            ({"top": seen["observation/images/top"]}, "input: camera observation.images.top is given twice"),
        ):
            assert said_by(protocol, server.port, {**seen, **more}).startswith(said)
        still_serves(protocol, server)


def test_http_requests_of_the_rarer_kinds() -> None:
    """Each is answered with a status; none above 500 but 501."""
    body = json.dumps(as_json(observation(1))).encode()
    n, base = len(body), "Host: a\r\nContent-Type: application/json\r\nConnection: close\r\n"
    requests = [
        (f"POST /act HTTP/1.1\r\n{base}Content-Length: {n}\r\nExpect: 100-continue", body, (100, 200)),
        (f"POST /act HTTP/1.1\r\n{base}Content-Length: {n}\r\nExpect: miracles", body, (200, 417)),
        (f"POST /act HTTP/1.1\r\n{base}Content-Length: {'9' * 5000}", body, (400, 413)),
        (f"POST /act HTTP/1.1\r\n{base}Content-Length: +{n}", body, (400,)),
        (f"POST /act HTTP/1.1\r\n{base}Content-Length: {n}\r\nTransfer-Encoding: chunked", body, (400,)),
        (f"POST /act HTTP/1.1\r\n{base}Content-Length: {n}\r\nContent-Encoding: gzip", body, (200, 400, 415)),
        (f"HEAD /act HTTP/1.1\r\n{base}", b"", (405,)),
        (f"OPTIONS /act HTTP/1.1\r\n{base}", b"", (405,)),
        (f"CONNECT a:1 HTTP/1.1\r\n{base}", b"", (400, 404, 405)),
        (f"GET /dashboard HTTP/1.1\r\n{base}Upgrade: websocket", b"", (200, 404, 426)),
        ("GET /healthz HTTP/1.1\r\nHost: a\r\nX: " + "a" * 70_000, b"", (200, 400, 431)),
        ("GET /healthz HTTP/1.1\r\nHost: a\r\n" + "X: a\r\n" * 5000, b"", (200, 400, 431)),
    ]
    with running("http") as server:
        for head, more, statuses in requests:
            with socket.create_connection(("127.0.0.1", server.port), 20) as raw_:
                with contextlib.suppress(OSError):
                    raw_.sendall(head.rstrip().encode() + b"\r\n\r\n" + more)
                said = received(raw_)
            assert not said or int(said.split()[1]) in statuses, (head[:200], said[:200])
        still_serves("http", server)
