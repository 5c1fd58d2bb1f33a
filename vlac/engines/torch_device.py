"""Where the torch engine computes, in which numbers, and torch's switches for it, all restored after a call."""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from vlac.engines.base import NpArray
from vlac.engines.torch_precision import NARROW
from vlac.errors import EngineError

SDPA = ("auto", "math")
"""How attention is computed: as torch sees fit, or by plain products, which are alike on every device."""


def checked_device(torch: Any, device: str) -> Any:
    """torch.device of "cpu", "cuda" or "cuda:N"; EngineError where there is none."""
    kind, _, number = str(device).partition(":")
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    known = device == "cpu" or (kind == "cuda" and (number.isdigit() if number else device == "cuda"))
    if not known:
        raise EngineError(f"torch engine: device {device!r}, expected cpu, cuda or cuda:N", remedy="use device=cpu")
    if device != "cpu" and int(number or 0) >= count:
        seen = f"cpu and {count} CUDA device{'s' if count > 1 else ''}" if count else "cpu only"
        raise EngineError(
            f"torch engine: device {device!r} is not there; torch {torch.__version__} sees {seen}",
            remedy="use device=cpu, or install a torch build with CUDA and a driver",
        )
    return torch.device(device)


def checked_dtype(torch: Any, dtype: str) -> Any:
    """The type of values between ops: float32 for narrow products too."""
    kinds = {"f32": torch.float32, "f64": torch.float64, **dict.fromkeys(NARROW, torch.float32)}
    if dtype not in kinds:
        raise EngineError(
            f"torch engine: dtype {dtype!r}, expected one of {', '.join(kinds)}",
            remedy="for other formats compile to another target, or see option linear",
        )
    return kinds[dtype]


def checked_sdpa(sdpa: str) -> str:
    """One of SDPA."""
    if sdpa not in SDPA:
        raise EngineError(f"torch engine: sdpa={sdpa!r}, expected one of {', '.join(SDPA)}")
    return sdpa


@contextmanager
def settings(torch: Any, threads: int | None, tf32: bool, sdpa: str) -> Iterator[None]:
    """Inference mode; full float32 products unless `tf32`; our number of threads; attention as `sdpa` says."""
    had, precision = torch.get_num_threads(), torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high" if tf32 else "highest")
    if threads is not None:
        torch.set_num_threads(threads)
    try:
        with ExitStack() as stack:
            stack.enter_context(torch.inference_mode())
            if sdpa == "math":
                stack.enter_context(torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH))
            yield
    finally:
        torch.set_float32_matmul_precision(precision)
        torch.set_num_threads(had)


class Resident:
    """Device tensors of arrays that were handed out: given back as an input, an array is not sent again.

    By identity, for as long as the caller keeps the array (EngineSession: arrays are never modified).
    """

    def __init__(self) -> None:
        self._known: dict[int, tuple[weakref.ref[NpArray], Any]] = {}

    def note(self, array: NpArray, tensor: Any) -> None:
        """Remembers the tensor that `array` is a copy of."""
        key = id(array)
        self._known[key] = (weakref.ref(array, lambda _: self._known.pop(key, None)), tensor)

    def find(self, array: NpArray) -> Any:
        """The tensor of this very array, or None."""
        reference, tensor = self._known.get(id(array), (None, None))
        return tensor if reference is not None and reference() is array else None

    def __len__(self) -> int:
        return len(self._known)
