"""Which engines run every op of a program."""

from __future__ import annotations

from collections.abc import Sequence
from importlib import import_module
from typing import Any

from vlac.errors import VlacError
from vlac.graph import Program


def engines_for(program: Program, known: Sequence[str]) -> dict[str, Any]:
    """What a manifest says: "engines", those of `known` that run it, and "declined", engine -> op -> why, if any does
    not. VlacError where none is left."""
    ops = {n.op for s in program.stages for n in s.nodes}
    tables = {e: getattr(import_module(f"vlac.engines.{e}_engine"), "DECLINES", {}) for e in known if e != "torch"}
    declined = {e: {op: why for op, why in t.items() if op in ops} for e, t in tables.items()}
    declined = {e: found for e, found in declined.items() if found}
    if set(declined) >= set(known):
        raise VlacError(f"no engine runs this program: {declined}")
    return {"engines": [e for e in known if e not in declined], **({"declined": declined} if declined else {})}
