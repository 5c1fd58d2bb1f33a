"""openpi's protocol: a websocket, msgpack both ways, arrays as openpi-client writes them.

On connecting the server sends its metadata; then every message is an observation and every reply, in order, a mapping
with "actions" float32 [N, A]. A refusal is a text message, which openpi's client raises as RuntimeError; the connection
stays, unless the message was too large to be read.
"""

from __future__ import annotations

import asyncio
import http
import logging
from typing import Any

from vlac.serve.core import Answer, Core, plain
from vlac.serve.observation import ObservationReader
from vlac.serve.pages import Pages, same
from vlac.serve.refusal import Refused
from vlac.serve.wire import need, pack, unpack

log = logging.getLogger("vlac.serve")
IN_FLIGHT = 8
"""Messages of one client that may await their reply; then the server stops reading from it."""
MAX_FRAMES = 1024
SEND_S = 20.0
"""A client that does not take its reply within this time is disconnected."""


class OpenPI:
    """The protocol on one core; `serve` runs until `stop` is set."""

    name = "openpi"

    def __init__(self, core: Core, reader: ObservationReader, pages: Pages, max_bytes: int) -> None:
        self.core, self.reader, self.pages, self.max_bytes = core, reader, pages, max_bytes
        self._number = 0

    async def serve(self, host: str, port: int, stop: asyncio.Event, ready: Any) -> None:
        """Listens; calls ready(port) once it does."""
        server = need("websockets.asyncio.server")
        async with server.serve(
            self._client,
            host,
            port,
            compression=None,
            max_size=self.max_bytes,
            max_queue=2,
            write_limit=1 << 20,
            origins=[None],  # a page in somebody's browser is no robot
            process_request=self._request,
            open_timeout=10,
            ping_interval=20,
            ping_timeout=60,
            close_timeout=2,
            server_header=None,
        ) as listening:
            ready(listening.sockets[0].getsockname()[1])
            await stop.wait()
            await asyncio.to_thread(self.core.close)
            await asyncio.sleep(0.05)  # the last replies leave; then every connection is closed with code 1001

    def _request(self, connection: Any, request: Any) -> Any:
        authorization = "\n".join(request.headers.get_all("Authorization"))
        if "Upgrade" in request.headers:
            if not self._allowed(authorization):
                self.core.refused("unauthorised", "token")
                return connection.respond(http.HTTPStatus.UNAUTHORIZED, "unauthorised: give the token as api_key\n")
            return None
        status, kind, body = self.pages.get(request.path, authorization)
        response = connection.respond(http.HTTPStatus(status), "")
        for name, value in self.pages.headers(kind, body).items():
            if name in response.headers:
                del response.headers[name]
            response.headers[name] = value
        response.body = body
        return response

    def _allowed(self, header: str) -> bool:
        token = self.pages.token
        kind, _, given = header.partition(" ")
        return token is None or (kind.lower() in ("api-key", "bearer") and same(given.strip(), token))

    async def _client(self, connection: Any) -> None:
        self._number += 1
        client = f"{connection.remote_address[0]}#{self._number}"
        try:
            self.core.connect(client)
        except Refused as error:
            await connection.close(1013, error.text[:120])
            return
        replies: asyncio.Queue[Any] = asyncio.Queue(IN_FLIGHT)
        tasks = {
            asyncio.create_task(self._receive(connection, client, replies)),
            asyncio.create_task(self._send(connection, replies)),
        }
        try:
            # either may find that the client has gone while the other waits
            await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        finally:
            self.core.disconnect(client)
            for task in tasks:
                task.cancel()

    async def _receive(self, connection: Any, client: str, replies: asyncio.Queue[Any]) -> None:
        try:
            await connection.send(pack(self.pages.facts))
            while (message := await self._message(connection)) is not None:
                await replies.put(self._ask(client, message))
        except need("websockets.exceptions").ConnectionClosed:
            log.info("client %s went away", client)

    async def _message(self, connection: Any) -> bytes | str | None:
        """The next message; None, and the connection closed, for one in very many frames: they may be empty, and weigh
        more here than on the wire."""
        parts: list[Any] = []
        async for part in connection.recv_streaming():
            parts.append(part)
            if len(parts) > MAX_FRAMES:
                error = self.core.refused("too_large", f"a message of more than {MAX_FRAMES} frames")
                await connection.close(1009, error.text)
                return None
        return ("" if isinstance(parts[0], str) else b"").join(parts)

    def _ask(self, client: str, message: Any) -> Any:
        """The future of an answer, or the refusal."""

        def read() -> dict[str, Any]:
            if isinstance(message, str):
                raise Refused("malformed", "a text message, expected msgpack", remedy="send binary messages")
            return self.reader.read(unpack(message))

        try:
            return asyncio.wrap_future(self.core.ask(client, read))
        except Refused as error:
            return error

    async def _send(self, connection: Any, replies: asyncio.Queue[Any]) -> None:
        closed = need("websockets.exceptions").ConnectionClosed
        try:
            while True:
                asked = await replies.get()
                await asyncio.wait_for(connection.send(await _reply(asked)), SEND_S)
        except closed:
            return
        except asyncio.TimeoutError:
            log.warning("client %s does not take its replies; disconnected", connection.remote_address)
            connection.transport.abort()


async def _reply(asked: Any) -> bytes | str:
    if isinstance(asked, Refused):
        return asked.text
    try:
        answer: Answer = await asked
    except Refused as error:
        return error.text
    except asyncio.CancelledError:
        if asked.cancelled():
            return "superseded: the client went away"
        raise
    return pack(plain(answer, answer.chunk, "server_timing"))
