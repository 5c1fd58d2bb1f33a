"""Products in bf16, f16 or int8 on the torch engine; everything else stays float32.

What carries an answer from step to step (norms, residuals, rotations, the sampler's state) and the heads that touch
state and actions are not rounded, only the operands of linears and attention: torch's autocast, but with the weights
stored in the narrow type. "int8": a scale per row of the weight and per row of what it multiplies, exact int32 sums
(LLM.int8, arXiv 2208.07339, section 2.2, without its outlier columns); attention then runs in bf16.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from vlac.graph import Program

Tensor = Any
"""torch.Tensor; torch is imported only when a session is made."""

NARROW = ("bf16", "f16", "int8")
"""Values of the option dtype that make products narrow."""

LEAST_ROWS = 17
"""torch._int_mm on CUDA wants more than 16 rows,"""
MULTIPLE = 8
"""and multiples of 8 on its other sides."""


@dataclass(frozen=True)
class Codes:
    """A linear's weight (N, K) as int8 (K', N'), both padded with zeros to multiples of 8; `scales` f32 (N,)."""

    values: Tensor
    scales: Tensor


def only_multiplied(program: Program, among: frozenset[str] | None) -> frozenset[str]:
    """Parameters that are read as the weight of linears and as nothing else; of `among`, if given."""
    weights: set[str] = set()
    other: set[str] = set()
    for node in (n for s in program.stages for n in s.nodes):
        for i, operand in enumerate(node.inputs):
            if operand.startswith("@"):
                (weights if node.op == "linear" and i == 1 else other).add(operand[1:])
    found = frozenset(weights - other)
    return found if among is None else found & among


class NarrowProducts:
    """Stores the weights of `chosen` narrow, and multiplies with them; `dtype` is one of NARROW."""

    def __init__(self, torch: Any, dtype: str, chosen: frozenset[str]) -> None:
        self._torch, self._dtype, self.chosen = torch, dtype, chosen
        self._low = torch.float16 if dtype == "f16" else torch.bfloat16

    def stored(self, weight: Tensor) -> Tensor | Codes:
        """A weight of `chosen`, float32 (N, K), as it is kept."""
        if self._dtype != "int8":
            return weight.to(self._low)
        codes, scales = self._rounded(weight)
        n, k = weight.shape
        codes = self._torch.nn.functional.pad(codes, (0, -k % MULTIPLE, 0, -n % MULTIPLE))
        return Codes(codes.t(), scales[:, 0])

    def linear(self, plain: Callable[..., Tensor]) -> Callable[[Sequence[Any], Mapping[str, Any]], Tensor]:
        """The op `linear` for narrow weights; others go to `plain`."""

        def run(x: Sequence[Any], a: Mapping[str, Any]) -> Tensor:
            if isinstance(x[1], Codes):
                y = self._int8(x[0], x[1])
            elif x[1].dtype == self._low:
                y = self._torch.nn.functional.linear(x[0].to(self._low), x[1]).to(x[0].dtype)
            else:
                return plain(x, a)
            return y + x[2] if len(x) > 2 else y

        return run

    def attention(self, plain: Callable[..., Tensor]) -> Callable[[Sequence[Tensor], Mapping[str, Any]], Tensor]:
        """The op `attention` with narrow operands; a mask's depth is cut to what float16 holds."""

        def run(x: Sequence[Tensor], a: Mapping[str, Any]) -> Tensor:
            low = [t.to(self._low) for t in x[:3]]
            if len(x) > 3:
                low.append(x[3].clamp(min=-3e4).to(self._low))
            return plain(low, a).to(x[0].dtype)

        return run

    def _rounded(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """int8 codes and their scales (rows, 1), largest value of a row = 127."""
        scales = x.abs().amax(dim=1, keepdim=True).clamp(min=1e-30) / 127
        return (x / scales).round().to(self._torch.int8), scales

    def _int8(self, x: Tensor, weight: Codes) -> Tensor:
        codes, scales = self._rounded(x)
        m, k = x.shape
        codes = self._torch.nn.functional.pad(codes, (0, weight.values.shape[0] - k, 0, max(0, LEAST_ROWS - m)))
        sums = self._torch._int_mm(codes, weight.values)[:m, : len(weight.scales)]
        return sums.to(x.dtype) * scales * weight.scales
