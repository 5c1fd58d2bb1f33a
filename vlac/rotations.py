"""Orthogonal matrices that spread outliers: Hadamard matrices with seeded signs, Gaussian ones where there are none.

Numpy only and the same on every machine: artifacts name a rotation by its size and seed.
"""

from __future__ import annotations

import math
from functools import lru_cache
from typing import Any

import numpy as np

NpArray = np.ndarray[Any, Any]


def hadamard(n: int) -> NpArray | None:
    """A Hadamard matrix [n, n] of +-1, float64: Sylvester's times, where needed, one of Paley's first kind (order
    p + 1, p a prime of the form 4m + 3); None if n has no such factors."""
    if n < 1:
        return None
    odd, twos = n, 0
    while odd % 2 == 0:
        odd, twos = odd // 2, twos + 1
    h = np.ones((1, 1))
    for power in range(twos + 1):
        size = odd * 2**power
        if size == 1 or (size % 4 == 0 and _is_prime(size - 1)):
            h = np.ones((1, 1)) if size == 1 else _paley(size - 1)
            for _ in range(twos - power):
                h = np.kron(np.array([[1.0, 1.0], [1.0, -1.0]]), h)
            return h
    return None


def has_hadamard(n: int) -> bool:
    """Whether `hadamard(n)` is a matrix."""
    odd = n
    while odd % 2 == 0 and odd > 1:
        odd //= 2
    sizes = [odd * 2**i for i in range(n.bit_length()) if odd * 2**i <= n]
    return n > 0 and any(s == 1 or (s % 4 == 0 and _is_prime(s - 1)) for s in sizes)


def _is_prime(p: int) -> bool:
    return p > 1 and all(p % d for d in range(2, math.isqrt(p) + 1))


def _paley(p: int) -> NpArray:
    """Paley's first construction: order p + 1 for a prime p = 3 mod 4."""
    squares = {(i * i) % p for i in range(1, p)}
    chi = np.array([0] + [1 if i in squares else -1 for i in range(1, p)], dtype=np.float64)
    h = np.ones((p + 1, p + 1))
    h[1:, 1:] = chi[(np.arange(p)[None, :] - np.arange(p)[:, None]) % p] + np.eye(p)
    h[1:, 0] = -1.0
    return h


@lru_cache(maxsize=64)
def rotation(n: int, seed: int) -> NpArray:
    """An orthogonal matrix [n, n], float64, from a seed: a Hadamard matrix with signs drawn for its rows, / sqrt(n);
    where there is none of size n, the Q of a Gaussian matrix."""
    rng = np.random.Generator(np.random.PCG64(seed))
    h = hadamard(n)
    if h is None:
        q, r = np.linalg.qr(rng.standard_normal((n, n)))
        return np.asarray(q * np.sign(np.diag(r)))
    signs = np.where(rng.random(n) < 0.5, -1.0, 1.0)
    return np.asarray(signs[:, None] * h / math.sqrt(n))
