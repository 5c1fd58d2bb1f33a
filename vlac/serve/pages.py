"""Health, metrics and the dashboard as plain GET pages; every protocol serves the same ones."""

from __future__ import annotations

import hmac
import importlib.resources
import json
from collections.abc import Mapping
from typing import Any
from urllib.parse import parse_qs, urlsplit

from vlac.serve.core import Core
from vlac.serve.watch import Watch

JSON, TEXT, HTML = "application/json", "text/plain; version=0.0.4; charset=utf-8", "text/html; charset=utf-8"
POLICY = "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; connect-src 'self'"
"""Nothing on the page comes from elsewhere, and the browser holds it to that."""


class Pages:
    """GET /healthz (open to all), /metrics, /policy, and with a dashboard /dashboard and /dashboard.json.

    token: None, or what "Authorization: Bearer TOKEN" or "?token=TOKEN" must say for all but /healthz.
    facts: about the policy; openpi's metadata too.
    """

    def __init__(self, core: Core, watch: Watch, token: str | None, facts: Mapping[str, Any], dashboard: bool) -> None:
        self.core, self.watch, self.token, self.facts, self.dashboard = core, watch, token, dict(facts), dashboard

    def get(self, target: str, authorization: str = "") -> tuple[int, str, bytes]:
        """(status, content type, body) of a path with its query."""
        try:
            parts = urlsplit(target)
        except ValueError:
            return 404, TEXT, b"not found\n"
        query = parse_qs(parts.query)
        if parts.path == "/healthz":
            ok = not self.core.draining
            state = {"status": "ok" if ok else "draining", **self.watch.health(), **self.core.load()}
            return 200 if ok else 503, JSON, json.dumps(state).encode()
        if not self.allowed(authorization, query.get("token", [""])[0]):
            return 401, TEXT, b"unauthorised: give the token\n"
        if parts.path == "/metrics":
            return 200, TEXT, self.watch.prometheus().encode()
        if parts.path == "/policy":
            return 200, JSON, json.dumps(self.facts).encode()
        if self.dashboard and parts.path in ("/dashboard", "/"):
            return 200, HTML, importlib.resources.files("vlac.serve").joinpath("dashboard.html").read_bytes()
        if self.dashboard and parts.path == "/dashboard.json":
            after = query.get("after", ["0"])[0]
            return 200, JSON, json.dumps(self.watch.page(int(after[:18]) if after.isdecimal() else 0)).encode()
        return 404, TEXT, b"not found\n"

    def headers(self, kind: str, body: bytes) -> dict[str, str]:
        """The response's headers."""
        return {
            "Content-Type": kind,
            "Content-Length": str(len(body)),
            "Cache-Control": "no-store",
            "Content-Security-Policy": POLICY,
            "X-Content-Type-Options": "nosniff",
        }

    def allowed(self, authorization: str, asked: str = "") -> bool:
        """Whether the token is there, where one is wanted."""
        return self.token is None or same(authorization.partition(" ")[2].strip() or asked, self.token)


def same(given: str, token: str) -> bool:
    """Whether a token is the one that is wanted, in a time that tells nothing about it."""
    return hmac.compare_digest(given.encode("utf-8", "surrogateescape"), token.encode())
