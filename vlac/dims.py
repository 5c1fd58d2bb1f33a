"""Dimensions that may depend on symbols: `65*C + T + 1` until a bucket is chosen, then a plain int.

A program is drawn once with symbols (T: prompt tokens, C: cameras) and bound to numbers per bucket.
Only affine forms exist; that is all a VLA's shapes need, and it keeps every rule decidable.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Union

from vlac.errors import ProgramError

ROWS = "N"
"""The symbol for rows of the chunk: how many actions are computed."""


@dataclass(frozen=True)
class Affine:
    """sum(coefficient * symbol) + const with at least one symbol; made by `symbol`, `+` and `*`."""

    terms: tuple[tuple[str, int], ...]
    const: int = 0

    def __add__(self, other: Dim) -> Dim:
        terms = dict(self.terms)
        if isinstance(other, Affine):
            for name, k in other.terms:
                terms[name] = terms.get(name, 0) + k
            return _affine(terms, self.const + other.const)
        return _affine(terms, self.const + other)

    __radd__ = __add__

    def __sub__(self, other: Dim) -> Dim:
        return self + other * -1

    def __rsub__(self, other: Dim) -> Dim:
        return self * -1 + other

    def __mul__(self, other: Dim) -> Dim:
        if isinstance(other, Affine):
            raise ProgramError(f"dimension ({self}) * ({other}) is not affine")
        return _affine({name: k * other for name, k in self.terms}, self.const * other)

    __rmul__ = __mul__

    def __floordiv__(self, other: int) -> Dim:
        if any(k % other for _, k in self.terms) or self.const % other:
            raise ProgramError(f"dimension {self} is not divisible by {other}")
        return _affine({name: k // other for name, k in self.terms}, self.const // other)

    def __str__(self) -> str:
        parts = [name if k == 1 else f"{k}*{name}" for name, k in self.terms]
        if self.const:
            parts.append(str(self.const))
        return "+".join(parts)


Dim = Union[int, Affine]


def _affine(terms: Mapping[str, int], const: int) -> Dim:
    kept = tuple(sorted((name, k) for name, k in terms.items() if k))
    return Affine(kept, const) if kept else const


def symbol(name: str) -> Affine:
    """The symbol itself, as a dimension."""
    return Affine(((name, 1),))


def product(dims: Iterable[Dim]) -> Dim:
    """Product of dimensions; at most one may hold symbols."""
    result: Dim = 1
    for d in dims:
        result = d * result if isinstance(d, Affine) else result * d
    return result


def bind_dim(dim: Dim, symbols: Mapping[str, int]) -> Dim:
    """`dim` with the given symbols replaced by numbers."""
    if isinstance(dim, int):
        return dim
    result: Dim = dim.const
    for name, k in dim.terms:
        result = result + (k * symbols[name] if name in symbols else symbol(name) * k)
    return result


_TERM = re.compile(r"(?:(-?\d+)\*)?([A-Za-z_]\w*)|(-?\d+)")


def parse_dim(text: str) -> Dim:
    """Inverse of str(): "65*C+T+1" -> Affine, "12" -> 12."""
    result: Dim = 0
    for part in text.split("+"):
        m = _TERM.fullmatch(part.strip())
        if not m:
            raise ProgramError(f"cannot read dimension {text!r}")
        result = result + (int(m[3]) if m[3] else symbol(m[2]) * int(m[1] or 1))
    return result
