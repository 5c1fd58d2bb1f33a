"""Plain HTTP: POST /act with JSON, pictures as .npy, PNG or JPEG in base64; the chunk as JSON or .npy.

The OpenAPI description is at /openapi.json and a page of it, which loads nothing from elsewhere, at /docs.
"""

from __future__ import annotations

import asyncio
import base64
import binascii
import contextlib
import io
import json
import logging
import time
import warnings
from dataclasses import dataclass
from typing import Any

import numpy as np

from vlac import __version__
from vlac.serve.core import Answer, Core, plain
from vlac.serve.observation import MAX_SIDE, ObservationReader
from vlac.serve.pages import Pages
from vlac.serve.refusal import Refused
from vlac.serve.wire import MAX_ITEMS, need, npy, npy_bytes

NpArray = np.ndarray[Any, Any]
log = logging.getLogger("vlac.serve")
NPY = "application/x-npy"
FORMS = ("npy", "png", "jpeg")
READ_S = 20.0
"""A body must be here within this time."""

HEAD_S = 10.0
"""A request's line and headers must be here within this time of the connection's beginning, or of their first byte."""
IDLE_S = 30.0


@dataclass
class _Known:
    in_flight: int = 0
    last: float = 0.0


class Web:
    """The protocol on one core; `serve` runs until `stop` is set."""

    name = "http"

    def __init__(self, core: Core, reader: ObservationReader, pages: Pages, max_bytes: int) -> None:
        self.core, self.reader, self.pages, self.max_bytes = core, reader, pages, max_bytes
        self._known: dict[str, _Known] = {}

    async def serve(self, host: str, port: int, stop: asyncio.Event, ready: Any) -> None:
        """Listens; calls ready(port) once it does."""
        uvicorn = need("uvicorn")
        config = uvicorn.Config(
            self.app(), host=host, port=port, log_level="warning", access_log=False, lifespan="off",
            limit_concurrency=4 * self.core.max_clients, timeout_keep_alive=30, timeout_graceful_shutdown=12,
            server_header=False, ws="none", http=_timed(self.core), loop="none", h11_max_incomplete_event_size=16384,
        )  # fmt: skip
        server = uvicorn.Server(config)
        server.capture_signals = contextlib.nullcontext  # signals are ours
        task = asyncio.create_task(server.serve())
        while not server.started and not task.done():
            await asyncio.sleep(0.01)
        if task.done():
            await task
            raise OSError(f"cannot listen on {host}:{port}")
        ready(server.servers[0].sockets[0].getsockname()[1])
        await stop.wait()
        await asyncio.to_thread(self.core.close)
        server.should_exit = True
        await task

    def app(self) -> Any:
        """The ASGI application."""
        fastapi = need("fastapi")
        app = fastapi.FastAPI(
            title="vlac serve", version=__version__, docs_url=None, redoc_url=None, description=_DESCRIPTION
        )

        async def act(request: Any) -> Any:
            try:
                return self._reply(request, await self._act(request))
            except Refused as error:
                body = {"error": error.code, "message": error.message, "remedy": error.remedy}
                return fastapi.responses.JSONResponse(body, status_code=error.status)

        act.__annotations__ = {"request": fastapi.Request, "return": fastapi.Response}
        app.post("/act", openapi_extra=_BODY, responses=_RESPONSES, summary="One observation, one action chunk")(act)

        async def unknown(request: Any, error: Any) -> Any:
            what = f"{request.method} {request.scope['path'][:80]}: {error.detail}"
            body = {"error": "not_found", "message": what, "remedy": "GET /docs says what there is"}
            return fastapi.responses.JSONResponse(body, status_code=error.status_code)

        app.add_exception_handler(need("starlette.exceptions").HTTPException, unknown)

        async def page(request: Any) -> Any:
            query = request.scope["query_string"].decode("latin-1")
            target = request.scope["path"] + (f"?{query}" if query else "")
            status, kind, body = self.pages.get(target, request.headers.get("authorization", ""))
            return fastapi.Response(body, status_code=status, headers=self.pages.headers(kind, body))

        page.__annotations__ = {"request": fastapi.Request, "return": fastapi.Response}
        for path, what in _PAGES.items():
            app.get(path, summary=what)(page)

        def docs() -> Any:
            body = _page(app.openapi()).encode()
            return fastapi.Response(body, headers=self.pages.headers("text/html; charset=utf-8", body))

        docs.__annotations__ = {"return": fastapi.Response}
        app.get("/docs", include_in_schema=False)(docs)
        return app

    async def _act(self, request: Any) -> Answer:
        if not self.pages.allowed(request.headers.get("authorization", "")):
            raise self.core.refused("unauthorised", "give the token", "send Authorization: Bearer TOKEN")
        body = await self._body(request)
        client = f"{request.client.host}:{request.headers.get('x-client', request.client.port)}"[:120]
        self._enter(client)
        try:
            # parsing is away from the loop that carries the others
            future = await asyncio.to_thread(self.core.ask, client, lambda: self._read(body))
            return await asyncio.wrap_future(future)
        finally:
            self._known[client].in_flight -= 1
            self._known[client].last = time.monotonic()

    def _enter(self, client: str) -> None:
        """HTTP does not tell when a client goes: one that was quiet for IDLE_S has gone, or earlier where others wait
        for its place."""
        now = time.monotonic()
        if client not in self._known:
            idle = sorted((k for k, v in self._known.items() if not v.in_flight), key=lambda k: self._known[k].last)
            full = len(self._known) >= self.core.max_clients
            for name in [k for i, k in enumerate(idle) if (full and i == 0) or now - self._known[k].last > IDLE_S]:
                del self._known[name]
                self.core.disconnect(name)
        self.core.connect(client)
        known = self._known.setdefault(client, _Known())
        known.in_flight, known.last = known.in_flight + 1, now

    async def _body(self, request: Any) -> bytes:
        if request.headers.get("content-type", "").partition(";")[0].strip() != "application/json":
            raise self.core.refused("malformed", "the content type is not application/json")
        body = bytearray()
        too_large = f"the body has more than {self.max_bytes} bytes"
        if int(request.headers.get("content-length") or 0) > self.max_bytes:
            raise self.core.refused("too_large", too_large, "`vlac serve --max-bytes`")

        async def collect() -> None:
            async for part in request.stream():
                body.extend(part)
                if len(body) > self.max_bytes:
                    raise self.core.refused("too_large", too_large, "`vlac serve --max-bytes`")

        try:
            await asyncio.wait_for(collect(), READ_S)
        except asyncio.TimeoutError:
            raise self.core.refused("malformed", f"the body did not arrive within {READ_S:g} s") from None
        except need("starlette.requests").ClientDisconnect:
            raise self.core.refused("malformed", "the client went away in the middle of its message") from None
        return bytes(body)

    def _read(self, body: bytes) -> dict[str, Any]:
        if sum(map(body.count, (b",", b"[", b"{"))) > MAX_ITEMS:
            raise Refused(
                "malformed", f"JSON of more than {MAX_ITEMS} values", remedy="send pictures as npy, png or jpeg"
            )
        try:
            found = json.loads(body)
        except (ValueError, RecursionError) as error:
            raise Refused("malformed", f"no JSON: {str(error)[:120]}") from None
        return self.reader.read(_decoded(found, self.max_bytes))

    def _reply(self, request: Any, answer: Answer) -> Any:
        responses = need("fastapi.responses")
        if NPY in request.headers.get("accept", "") and len(answer.chunk):
            headers = {
                "X-Held": str(answer.held).lower(),
                "X-Limits": "; ".join(answer.said),
                "X-Guided": str(answer.guided),
            }
            return responses.Response(npy_bytes(answer.chunk), media_type=NPY, headers=headers)
        return responses.JSONResponse(plain(answer, answer.chunk.tolist(), "timing"))


def _timed(core: Core) -> Any:
    """uvicorn's HTTP/1.1, without patience for requests that never get to their end: they would take the places of
    those that do."""
    h11 = need("h11")
    base = need("uvicorn.protocols.http.h11_impl").H11Protocol

    class Timed(base):  # type: ignore[misc, valid-type]
        late: asyncio.TimerHandle | None = None

        def connection_made(self, transport: Any) -> None:
            super().connection_made(transport)
            self.watch()

        def data_received(self, data: bytes) -> None:
            super().data_received(data)
            self.watch()

        def connection_lost(self, error: Any) -> None:
            self.forget()
            super().connection_lost(error)

        def watch(self) -> None:
            if self.conn.their_state is not h11.IDLE:
                self.forget()
            elif self.late is None:
                self.late = asyncio.get_running_loop().call_later(HEAD_S, self.end)

        def forget(self) -> None:
            if self.late is not None:
                self.late.cancel()
                self.late = None

        def end(self) -> None:
            self.late = None
            if self.conn.their_state is h11.IDLE and not self.transport.is_closing():
                core.refused("malformed", "slow headers")
                self.send_400_response(f"malformed: the request's headers did not arrive within {HEAD_S:g} s")

    return Timed


def _decoded(found: Any, most: int, depth: int = 0) -> Any:
    """Arrays where pictures were written; none with more than `most` bytes, however small its file."""
    if not isinstance(found, dict) or depth > 2:
        return found
    if len(found) == 1 and next(iter(found)) in FORMS:
        return _array(*next(iter(found.items())), most)
    return {k: _decoded(v, most, depth + 1) for k, v in found.items()}


def _array(form: str, text: Any, most: int) -> NpArray:
    if not isinstance(text, str):
        raise Refused("malformed", f"{form} is not base64 text")
    try:
        data = base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError) as error:
        raise Refused("malformed", f"{form} is not base64: {error}") from None
    return npy(data) if form == "npy" else _picture(form, data, most)


def _picture(form: str, data: bytes, most: int) -> NpArray:
    from PIL import Image

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(io.BytesIO(data), formats=[form.upper()]) as image:
                if max(image.size) > MAX_SIDE:
                    raise Refused("input", f"a picture of {image.size}, expected at most {MAX_SIDE} on a side")
                if 3 * image.size[0] * image.size[1] > most:
                    raise Refused("too_large", f"a picture of {image.size} has more than {most} bytes")
                return np.array(image.convert("RGB"))
    except Refused:
        raise
    except Exception as error:  # Pillow's decoders raise a dozen types for broken files
        raise Refused("malformed", f"no {form} picture: {type(error).__name__} {str(error)[:120]}") from None


def _page(schema: dict[str, Any]) -> str:
    """A plain page of an OpenAPI description."""
    import html

    rows = []
    for path, methods in schema["paths"].items():
        for method, what in methods.items():
            detail = html.escape(json.dumps({k: what[k] for k in ("requestBody", "responses") if k in what}, indent=2))
            title = f"<code>{method.upper()} {html.escape(path)}</code> {html.escape(what.get('summary', ''))}"
            rows.append(f"<details><summary>{title}</summary><pre>{detail}</pre></details>")
    about = html.escape(schema["info"].get("description", ""))
    return (
        "<!doctype html><meta charset=utf-8><title>vlac serve</title>"
        "<style>body{font:15px sans-serif;max-width:60em;margin:2em auto}pre{background:#f4f4f4;padding:1em;"
        "overflow:auto}summary{margin:.6em 0;cursor:pointer}</style>"
        f"<h1>vlac serve</h1><pre>{about}</pre>{''.join(rows)}<p>Machine-readable: <code>/openapi.json</code></p>"
    )


_PAGES = {
    "/healthz": "Whether it serves; 503 while it ends",
    "/metrics": "For Prometheus",
    "/policy": "What the policy takes and gives",
    "/dashboard": "The dashboard, with --dashboard",
    "/dashboard.json": "What the dashboard shows",
}
_DESCRIPTION = """POST /act takes one observation as JSON and answers an action chunk.
Keys: the policy's cameras (GET /policy names them), observation.state, prompt (or task), and moment [seed, step], from
which the sampler's noise is drawn. A picture is {"npy": BASE64}, {"png": BASE64} or {"jpeg": BASE64}.
observe: true sends frames alone; later observations may leave frames and instruction out and are answered by them.
With --rtc also rtc: {"executed", "inference_delay", "execution_horizon", "schedule", "max_guidance_weight", "reset"}.
Header X-Client names a client whose requests come over several connections."""
_PICTURE = {"type": "object", "properties": {f: {"type": "string", "format": "byte"} for f in FORMS}}
_BODY = {
    "requestBody": {
        "required": True,
        "content": {
            "application/json": {
                "schema": {
                    "type": "object",
                    "properties": {
                        "images": {"type": "object", "additionalProperties": _PICTURE},
                        "state": {"type": "array", "items": {"type": "number"}},
                        "prompt": {"type": "string"},
                        "moment": {"type": "array", "items": {"type": "integer"}, "minItems": 2, "maxItems": 2},
                        "rtc": {"type": "object"},
                        "observe": {"type": "boolean"},
                    },
                }
            }
        },
    }
}
_RESPONSES: dict[int | str, dict[str, Any]] = {
    200: {
        "description": "actions [N][A] in the robot's units; as .npy with Accept: application/x-npy",
        "content": {"application/json": {}, NPY: {}},
    },
    400: {"description": "malformed"},
    401: {"description": "unauthorised"},
    409: {"description": "superseded by a newer observation of the same client"},
    413: {"description": "too_large"},
    422: {"description": "input: the observation does not fit the policy"},
    500: {"description": "engine, failed"},
    503: {"description": "draining, too_many_clients, limit"},
}
