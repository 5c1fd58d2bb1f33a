"""What a server says no to, by name: every protocol carries `code` and the text, and stays up."""

from __future__ import annotations

from vlac.errors import VlacError

CODES = {
    "malformed": 400,
    "input": 422,
    "unauthorised": 401,
    "not_found": 404,
    "too_large": 413,
    "superseded": 409,
    "too_many_clients": 503,
    "draining": 503,
    "limit": 503,
    "engine": 500,
    "failed": 500,
}
"""Refusals and their HTTP status: "malformed" is no message of the protocol, "input" an observation that does not fit
the policy, "superseded" one that a newer one of the same client replaced before its turn came."""


LONGEST = 600
"""Characters of a refusal: what it quotes is a client's, and may be of any length."""


class Refused(VlacError):
    """A request that gets no chunk; `code` is one of CODES. The message can be sent, whatever it quotes."""

    def __init__(self, code: str, message: str, *, remedy: str = "") -> None:
        message = message.encode("utf-8", "backslashreplace").decode()
        super().__init__(message if len(message) <= LONGEST else message[:LONGEST] + "...", remedy=remedy)
        self.code = code

    @property
    def status(self) -> int:
        """As HTTP says it."""
        return CODES[self.code]

    @property
    def text(self) -> str:
        """One line, with the code first."""
        return f"{self.code}: {self.message}" + (f" ({self.remedy})" if self.remedy else "")
