"""Rounding between ops in torch, in float64 like the reference: what lies between two codes falls to the same side."""

from __future__ import annotations

from typing import Any

from vlac.engines.torch_plan import Tensor, TorchOp
from vlac.float8 import LARGEST


def rounding_ops(torch: Any) -> dict[str, TorchOp]:
    """The ops by name."""
    return {
        "round_int8": lambda x, a: _round_int8(torch, x[0], a["form"], a["largest"]),
        "round_f16": lambda x, a: x[0].to(torch.float16).to(x[0].dtype),
        "round_fp8": lambda x, a: _round_fp8(torch, x[0], a["largest"]),
    }


def _round_int8(torch: Any, x: Tensor, form: str, largest: float) -> Tensor:
    v = x.to(torch.float64)
    if form == "tensor":
        s = largest / 127
        return (torch.clamp(torch.round(v / s), -128, 127) * s).to(x.dtype)
    rows, width = v.shape
    block = 32 if form == "block32" else width
    parts = torch.nn.functional.pad(v, (0, -width % block)).reshape(rows, -1, block)
    s = parts.abs().amax(dim=2, keepdim=True).clamp(min=1e-30) / 127
    return (torch.round(parts / s) * s).reshape(rows, -1)[:, :width].to(x.dtype)


def _round_fp8(torch: Any, x: Tensor, largest: float) -> Tensor:
    """torch's own conversion would round to float32 first."""
    s = largest / LARGEST
    v = x.to(torch.float64) / s
    step = torch.exp2(torch.clamp(torch.frexp(v).exponent - 1, -6, 8) - 3.0)
    return (torch.clamp(torch.round(v / step) * step, -LARGEST, LARGEST) * s).to(x.dtype)
