"""What a number of successes says: intervals and tests in closed form, for closed-loop evaluation.

Successes are counts of independent episodes; two policies are compared on the same episodes (paired). Standard library.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from vlac.errors import InputError

Z95 = 1.959963984540054
"""The 97.5 % point of the normal distribution: two-sided 95 % intervals."""


def wilson(k: int, n: int, z: float = Z95) -> tuple[float, float]:
    """The score interval of k successes in n trials (Wilson 1927, JASA 22, p. 209), both ends in [0, 1]; n = 0: (0, 1).

    Raises InputError unless 0 <= k <= n.
    """
    if not 0 <= k <= n:
        raise InputError(f"{k} successes of {n} trials: there cannot be")
    if n == 0:
        return 0.0, 1.0
    p, zz = k / n, z * z
    centre = (p + zz / (2 * n)) / (1 + zz / n)
    half = z / (1 + zz / n) * math.sqrt(p * (1 - p) / n + zz / (4 * n * n))
    # at k = 0 and k = n the ends are exactly 0 and 1; rounding would leave 1e-17 of a difference
    return 0.0 if k == 0 else max(0.0, centre - half), 1.0 if k == n else min(1.0, centre + half)


def mcnemar_exact(b: int, c: int) -> float:
    """Two-sided exact p of McNemar's test: b pairs in which only the first succeeds, c in which only the second does.

    Under the hypothesis of no difference each discordant pair falls to either side with 1/2: twice the binomial tail of
    the smaller count, at most 1 (McNemar 1947, Psychometrika 12, p. 153; exact form as in Fagerland et al. 2013).
    """
    if b < 0 or c < 0:
        raise InputError(f"discordant pairs {b} and {c}: counts cannot be negative")
    n = b + c
    tail = sum(math.comb(n, i) for i in range(min(b, c) + 1))
    return min(1.0, 2 * tail / 2**n) if n else 1.0


@dataclass(frozen=True)
class Paired:
    """Two policies on the same episodes: both succeed, only the first, only the second, neither."""

    both: int
    only_first: int
    only_second: int
    neither: int

    @property
    def n(self) -> int:
        """Episodes."""
        return self.both + self.only_first + self.only_second + self.neither

    @property
    def difference(self) -> float:
        """Success rate of the first minus that of the second."""
        return (self.only_first - self.only_second) / self.n

    @property
    def p(self) -> float:
        """McNemar's exact p."""
        return mcnemar_exact(self.only_first, self.only_second)

    def interval(self, z: float = Z95) -> tuple[float, float]:
        """Interval of the difference: Newcombe 1998 (Statistics in Medicine 17, p. 2635), method 10."""
        first, second = (self.both + self.only_first, self.both + self.only_second)
        p1, p2 = first / self.n, second / self.n
        (l1, u1), (l2, u2) = wilson(first, self.n, z), wilson(second, self.n, z)
        phi = self._correlation(first, second)

        def reach(x: float, y: float) -> float:
            return math.sqrt(max(0.0, x * x - 2 * phi * x * y + y * y))

        return self.difference - reach(p1 - l1, u2 - p2), self.difference + reach(u1 - p1, p2 - l2)

    def _correlation(self, first: int, second: int) -> float:
        """phi of the 2x2 table, corrected for continuity where it is positive (Newcombe's method 10)."""
        margins = first * (self.n - first) * second * (self.n - second)
        if margins == 0:
            return 0.0
        product: float = self.both * self.neither - self.only_first * self.only_second
        if product > 0:
            product = max(0.0, product - self.n / 2)
        return product / math.sqrt(margins)


def paired(first: Sequence[bool], second: Sequence[bool]) -> Paired:
    """The table of two runs over the same episodes, in the same order; InputError when lengths differ or are 0."""
    if len(first) != len(second) or not first:
        raise InputError(f"{len(first)} episodes cannot be paired with {len(second)}")
    both = sum(a and b for a, b in zip(first, second, strict=True))
    only_first, only_second = sum(map(bool, first)) - both, sum(map(bool, second)) - both
    return Paired(both, only_first, only_second, len(first) - both - only_first - only_second)
