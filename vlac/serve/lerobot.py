"""LeRobot's async inference over gRPC, as its RobotClient speaks it; nothing that it sends is unpickled.

`vlac.serve.pickled` reads it as data. The policy is the served one: of the instructions only the names of the motors
and actions_per_chunk are used. The newest observation wins; one whose step was answered already is passed over unless
the client says must_go. A client is a connection, so one process with several RobotClients counts as one client (gRPC
joins their connections, and the protocol has no other name). Plain HTTP, with health, metrics and dashboard, is served
beside it on the next port.
"""

from __future__ import annotations

import asyncio
import logging
import math
import time
from collections import deque
from collections.abc import AsyncIterator
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any

from vlac.serve import pickled
from vlac.serve.core import Answer, Core
from vlac.serve.observation import MOMENT, RTC, ObservationReader
from vlac.serve.pages import Pages, same
from vlac.serve.refusal import Refused
from vlac.serve.web import Web
from vlac.serve.wire import need

log = logging.getLogger("vlac.serve")
SERVICE = "transport.AsyncInference"
WAIT_S = 2.0
"""GetActions answers nothing when no observation came for so long; the client asks again."""
READ_S = 20.0
IDLE_S = 60.0
BEGIN, MIDDLE, END = 1, 2, 3
MAX_FIELDS = 64
"""LeRobot's messages have two at most."""
STATUS = {
    "unauthorised": "UNAUTHENTICATED",
    "too_large": "RESOURCE_EXHAUSTED",
    "too_many_clients": "RESOURCE_EXHAUSTED",
    "draining": "CANCELLED",  # not UNAVAILABLE, which LeRobot's client tries again by itself
    "engine": "INTERNAL",
    "failed": "INTERNAL",
    "limit": "FAILED_PRECONDITION",
}


def fields(data: bytes) -> dict[int, Any]:
    """A flat protobuf message of varints and bytes (LeRobot's are), field number -> value; Refused if it is none."""
    found: dict[int, Any] = {}
    at = 0

    def varint(at: int) -> tuple[int, int]:
        value = shift = 0
        while True:
            if at >= len(data) or shift > 63:
                raise Refused("malformed", "no protobuf message")
            byte, at = data[at], at + 1
            value |= (byte & 127) << shift
            shift += 7
            if byte < 128:
                return value, at

    for _ in range(MAX_FIELDS):
        if at >= len(data):
            return found
        tag, at = varint(at)
        value, at = varint(at)
        if tag & 7 == 0:
            found[tag >> 3] = value
        elif tag & 7 == 2 and at + value <= len(data):
            found[tag >> 3] = data[at : at + value]
            at += value
        else:
            raise Refused("malformed", "no protobuf message of LeRobot")
    if at < len(data):
        raise Refused("malformed", f"a protobuf message of more than {MAX_FIELDS} fields")
    return found


def message(data: bytes) -> bytes:
    """A protobuf message with `data` as field 1 (Actions, PolicySetup)."""
    size, out = len(data), bytearray(b"\x0a")
    while size > 127:
        out.append(size & 127 | 128)
        size >>= 7
    return bytes(out) + bytes([size]) + data


@dataclass
class _Client:
    names: list[str] = field(default_factory=list)
    per_chunk: int | None = None
    answered: deque[int] = field(default_factory=lambda: deque(maxlen=1024))
    asked: deque[tuple[int, float, Future[Answer]]] = field(default_factory=lambda: deque(maxlen=4))
    came: asyncio.Event = field(default_factory=asyncio.Event)
    last: float = 0.0


class LeRobot:
    """The protocol on one core; `serve` runs until `stop` is set."""

    name = "lerobot"

    def __init__(self, core: Core, reader: ObservationReader, pages: Pages, max_bytes: int, fps: int) -> None:
        self.core, self.reader, self.pages, self.max_bytes, self.dt = core, reader, pages, max_bytes, 1 / fps
        self.web = Web(core, reader, pages, max_bytes)
        self.web_port: int | None = None
        self._clients: dict[str, _Client] = {}

    async def serve(self, host: str, port: int, stop: asyncio.Event, ready: Any) -> None:
        """Listens; calls ready(port) once it does."""
        grpc = need("grpc")
        aio = need("grpc.aio")
        server = aio.server(
            options=(("grpc.max_receive_message_length", 4 << 20), ("grpc.so_reuseport", 0)),
            maximum_concurrent_rpcs=4 * self.core.max_clients,
        )
        unary, stream = grpc.unary_unary_rpc_method_handler, grpc.stream_unary_rpc_method_handler
        handlers = {
            "Ready": unary(self._guarded(self._ready)),
            "SendPolicyInstructions": unary(self._guarded(self._instructions)),
            "SendObservations": stream(self._guarded(self._observations)),
            "GetActions": unary(self._guarded(self._actions)),
        }
        server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(SERVICE, handlers),))
        try:
            bound = server.add_insecure_port(f"{host}:{port}")
        except RuntimeError as error:
            raise OSError(f"cannot listen on {host}:{port}: {error}") from None
        await server.start()

        def web_ready(beside: int) -> None:
            self.web_port = beside
            ready(bound)

        try:
            await self.web.serve(host, port + 1 if port else 0, stop, web_ready)
        finally:
            await asyncio.to_thread(self.core.close)
            await server.stop(2.0)

    def _guarded(self, method: Any) -> Any:
        """A refusal becomes a gRPC status with its text."""
        codes = need("grpc").StatusCode

        async def run(request: Any, context: Any) -> bytes:
            try:
                self._check(context)
                return bytes(await method(request, context))
            except Refused as refused:
                error = refused
            except Exception as broken:  # whatever one call breaks, the others are served
                log.exception("a call of %s failed", context.peer())
                error = self.core.refused("failed", f"{type(broken).__name__}: {broken}")
            await context.abort(getattr(codes, STATUS.get(error.code, "INVALID_ARGUMENT")), error.text)
            raise error

        return run

    def _check(self, context: Any) -> None:
        token = self.pages.token
        if token is None:
            return
        given = dict(context.invocation_metadata() or ()).get("authorization", "")
        if not same(str(given).partition(" ")[2].strip(), token):
            raise self.core.refused("unauthorised", "give the token as metadata authorization: Bearer TOKEN")

    def _client(self, peer: str) -> _Client:
        if peer not in self._clients:
            raise self.core.refused("malformed", "call Ready first")
        client = self._clients[peer]
        client.last = time.monotonic()
        return client

    async def _ready(self, _: bytes, context: Any) -> bytes:
        now, peer = time.monotonic(), context.peer()
        for name in [k for k, v in self._clients.items() if now - v.last > IDLE_S or k == peer]:
            del self._clients[name]
            self.core.disconnect(name)
        self.core.connect(peer)
        self._clients[peer] = _Client(last=now)
        return b""

    async def _instructions(self, request: bytes, context: Any) -> bytes:
        client = self._client(context.peer())
        try:
            found = (await asyncio.to_thread(pickled.read, fields(request).get(1, b""))).fields
            features = found.get("lerobot_features")
            state = features.get("observation.state", {}) if isinstance(features, dict) else None
            names = state.get("names", []) if isinstance(state, dict) else None
            if not isinstance(names, list) or not all(isinstance(n, str) for n in names):
                raise Refused("malformed", "the instructions name no motors in lerobot_features")
        except Refused as error:
            raise self.core.refused(error.code, error.message, error.remedy) from None
        per = found.get("actions_per_chunk")
        client.names = names
        client.per_chunk = per if isinstance(per, int) and per > 0 else None
        log.info(
            "client %s asks for %.80r; the served policy answers", context.peer(), found.get("pretrained_name_or_path")
        )
        return b""

    async def _observations(self, stream: AsyncIterator[bytes], context: Any) -> bytes:
        peer = context.peer()
        client = self._client(peer)
        try:
            data = await asyncio.wait_for(self._collect(stream), READ_S)
            sent = (await asyncio.to_thread(pickled.read, data)).fields
            step, at = sent.get("timestep"), sent.get("timestamp")
            if isinstance(step, bool) or not isinstance(step, int) or not 0 <= step < 2**30:
                raise Refused("malformed", "an observation's timestep is no whole number from 0 on")
            if not isinstance(at, float) or not math.isfinite(at):
                raise Refused("malformed", "an observation's timestamp is no number")
        except asyncio.TimeoutError:
            raise self.core.refused("malformed", f"the observation did not arrive within {READ_S:g} s") from None
        except Refused as error:
            raise self.core.refused(error.code, error.message, error.remedy) from None
        if step in client.answered and sent.get("must_go") is not True:
            return b""
        future = self.core.ask(peer, lambda: self.reader.read(self._named(client, sent.get("observation"))), step)
        client.asked.append((step, at, future))
        client.came.set()
        return b""

    async def _collect(self, stream: AsyncIterator[bytes]) -> bytes:
        data = bytearray()
        async for part in stream:
            found = fields(part)
            state = found.get(1, 0)
            if state not in (BEGIN, MIDDLE, END):
                raise Refused("malformed", f"transfer state {str(state)[:20]}")
            if state == BEGIN:
                data.clear()
            more = found.get(2, b"")
            if not isinstance(more, bytes):
                raise Refused("malformed", "no protobuf message of LeRobot")
            data += more
            if len(data) > self.max_bytes:
                raise Refused("too_large", f"an observation has more than {self.max_bytes} bytes")
            if state == END:
                return bytes(data)
        raise Refused("malformed", "the client went away in the middle of its message")

    def _named(self, client: _Client, raw: Any) -> dict[str, Any]:
        """A robot's raw observation (a number per motor, a picture per camera, task) under the policy's keys."""
        if not isinstance(raw, dict):
            raise Refused("malformed", "the observation is no mapping")
        if missing := [n for n in client.names if n not in raw]:
            raise Refused("input", f"the observation has no {missing[0][:80]!r}, which the instructions name")
        rest = {k: v for k, v in raw.items() if k not in client.names}
        found = {k: v for k, v in rest.items() if getattr(v, "ndim", 0) == 3 or k in ("task", MOMENT, RTC)}
        if client.names:
            found["observation.state"] = [raw[n] for n in client.names]
        return found

    async def _actions(self, _: bytes, context: Any) -> bytes:
        client = self._client(context.peer())
        if not client.asked:
            client.came.clear()
            try:
                await asyncio.wait_for(client.came.wait(), WAIT_S)
            except asyncio.TimeoutError:
                return b""
        while client.asked:
            step, at, future = client.asked.popleft()
            try:
                answer = await asyncio.wrap_future(future)
            except Refused as error:
                if error.code == "superseded":
                    continue
                raise
            except asyncio.CancelledError:
                if future.cancelled():  # the client began again
                    continue
                raise
            client.answered.append(step)
            if answer.said:  # there is no field for it
                context.set_trailing_metadata(
                    (("vlac-limits", "; ".join(answer.said)), ("vlac-held", str(answer.held)))
                )
            chunk = answer.chunk[: client.per_chunk]
            return message(pickled.timed_actions(chunk, step, at, self.dt))
        return b""
