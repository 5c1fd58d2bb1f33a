"""What of a family's linears a target will store: names as the family draws them, values as lowering leaves them.

Lowering makes tables of some weights (what reads the sampler's time) and products of others (values of the last layer,
which nothing but the loop's projection reads). A weight in a table is not rounded, so it is left alone here; a product
is rounded as the product: the inner weight becomes outer^-1 Q(outer inner), from which lowering makes Q(outer inner).
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from fnmatch import fnmatchcase

import numpy as np

from vlac import calibrate
from vlac.lower import lower, lower_until, roles
from vlac.ops import NpArray
from vlac.policy import Policy
from vlac.rewrites.linears import composable
from vlac.weights import LazyTensor, Weights

WORST = 1e4
"""Condition number of outer weights that are solved with: beyond, lowering would not find the codes again."""


@dataclass(frozen=True)
class Product:
    """An inner weight [h, k] that is stored as outer * inner: `left` [h, h] times it, `weight` [h, k]."""

    outer: str
    left: NpArray
    weight: NpArray

    def inner(self, found: NpArray) -> NpArray:
        """The inner weight of which the outer one makes `found`, float32."""
        return np.linalg.solve(self.left, found.astype(np.float64)).astype(np.float32)


def stored_linears(policy: Policy, match: str) -> list[str]:
    """Names of the linears that match, as the family draws them, of which a lowered linear that matches is made."""
    program = calibrate.draw(policy)
    read: set[str] = set()

    def probe(name: str, tensor: LazyTensor) -> LazyTensor:
        def load() -> NpArray:
            read.add(name)
            return np.zeros(tensor.shape, np.float32)

        return LazyTensor(tensor.shape, load, tensor.dtype, tensor.source)

    probes = Weights({name: probe(name, program.weights[name]) for name in program.params})
    lowered = lower(program.replace(weights=probes))
    read.clear()
    for name, kind in roles(lowered).items():
        if kind == "linear" and fnmatchcase(name, match):
            lowered.weights[name].load()
    return [n for n, kind in roles(program).items() if kind == "linear" and fnmatchcase(n, match) and n in read]


def products(policy: Policy, names: Collection[str]) -> dict[str, Product]:
    """Inner weight of `names` -> what is stored in its place; only where the outer weight can be solved with."""
    found: dict[str, Product] = {}
    for inner, outer in composable(lower_until(calibrate.draw(policy), "hoist_invariants")):
        if inner not in names:
            continue
        left = policy.weights[outer].load().astype(np.float64)
        if left.shape[0] != left.shape[1] or np.linalg.cond(left) > WORST:
            continue
        weight = (left @ policy.weights[inner].load().astype(np.float64)).astype(np.float32)
        found[inner] = Product(outer, left, weight)
    return found
