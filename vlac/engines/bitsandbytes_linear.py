"""Linears in bitsandbytes' formats on the torch engine: load(path, engine="torch", options={"linear": "nf4"}).

For trying a format on any artifact, CUDA or CPU; not a fast path on CPUs, and nothing is stored. Takes the weights that
the artifact's census calls "linear": heads that touch state and actions stay float32.
"""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Mapping, Sequence
from typing import Any

from vlac.artifact import Artifact
from vlac.engines.torch_engine import Tensor, TorchSession
from vlac.errors import EngineError

FORMATS = ("nf4", "fp4", "int8")
"""NormalFloat4 (Dettmers et al. 2023, arXiv 2305.14314, section 3) and 4-bit floats, 4.5 bits a weight with scales;
LLM.int8 (arXiv 2208.07339) without outlier columns: a scale per row of the weight and per row of what it multiplies."""

BLOCK = 64
"""Values that share a scale; rows of a weight are padded with zeros to whole blocks, and so is what they multiply."""


class BitsandbytesSession(TorchSession):
    """A TorchSession that rounds the weights of linears to `linear` (one of FORMATS) when they are first needed.

    Raises EngineError when bitsandbytes is not installed or the format is unknown.
    """

    def __init__(
        self, artifact: Artifact, linear: str, threads: int | None = None, device: str = "cpu", dtype: str = "f32"
    ) -> None:
        if linear not in FORMATS:
            raise EngineError(f"torch engine: linear={linear!r}; there are: {', '.join(FORMATS)}")
        if importlib.util.find_spec("bitsandbytes") is None:
            raise EngineError(
                "torch engine: linear= needs bitsandbytes, which is not installed",
                remedy="pip install 'vlac-compiler[bitsandbytes]'",
            )
        if dtype != "f32":
            raise EngineError(f"torch engine: linear={linear!r} runs in f32, not {dtype}")
        super().__init__(artifact.program, lambda name: artifact.tensors[name].decode(), threads, device, dtype)
        import bitsandbytes
        from bitsandbytes import functional

        self._format = linear
        self._bits: Any = bitsandbytes
        self._functional: Any = functional
        self._chosen = linear_weights(artifact)
        self._plain = self._ops["linear"]
        self._ops["linear"] = self._linear
        values = sum(math.prod(artifact.program.params[name].shape) for name in self._chosen)
        self.info |= {"linear": linear, "bitsandbytes": bitsandbytes.__version__, "linear_values": values}

    def _parameter(self, name: str) -> Tensor:
        weight = super()._parameter(name)
        if name in self._chosen and self._format == "int8" and not hasattr(weight, "row_scales"):
            packed, scales, _ = self._functional.int8_vectorwise_quant(weight.to(self._torch.float16))
            packed.row_scales = scales
            self._weights[name] = packed
            return packed
        if name in self._chosen and self._format != "int8" and not hasattr(weight, "quant_state"):
            pad = -weight.shape[1] % BLOCK
            padded = self._torch.nn.functional.pad(weight, (0, pad)) if pad else weight
            packed, state = self._functional.quantize_4bit(
                padded.contiguous(), blocksize=BLOCK, quant_type=self._format
            )
            packed.quant_state, packed.pad = state, pad
            self._weights[name] = weight = packed
        return weight

    def _linear(self, x: Sequence[Tensor], a: Mapping[str, Any]) -> Tensor:
        if (scales := getattr(x[1], "row_scales", None)) is not None:
            rows, each, _ = self._functional.int8_vectorwise_quant(x[0].to(self._torch.float16))
            whole = self._functional.int8_linear_matmul(rows, x[1]).to(self._float)
            product = whole * (each[:, None] * scales[None, :] / 127**2)
            return product + x[2] if len(x) > 2 else product
        state = getattr(x[1], "quant_state", None)
        if state is None:
            return self._plain(x, a)
        rows = self._torch.nn.functional.pad(x[0], (0, x[1].pad)) if x[1].pad else x[0]
        return self._bits.matmul_4bit(rows, x[1].t(), quant_state=state, bias=x[2] if len(x) > 2 else None)


def linear_weights(artifact: Artifact) -> frozenset[str]:
    """Names of the program's parameters whose role in the census is "linear"."""
    rows = artifact.manifest.get("census", {}).get("tensors", {})
    before = artifact.manifest.get("tensor_names", {})  # a container may store tensors under other names
    return frozenset(n for n in artifact.program.params if rows.get(before.get(n, n), {}).get("role") == "linear")
