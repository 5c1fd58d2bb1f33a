"""The few calls of NVIDIA's driver that an engine needs: memory, copies, a stream, graphs. Through ctypes: no package.

CUDA Driver API, sections Memory, Stream and Graph Management. Pointers and handles are plain integers.
"""

from __future__ import annotations

import ctypes
from typing import Any

import numpy as np

from vlac.errors import EngineError

NpArray = np.ndarray[Any, Any]

_NON_BLOCKING, _CAPTURE_RELAXED = 1, 2


class Cuda:
    """The primary context of the first GPU and one stream. Raises EngineError when a call fails."""

    def __init__(self) -> None:
        try:
            self._lib = ctypes.CDLL("libcuda.so.1")
        except OSError as error:
            raise EngineError(f"no NVIDIA driver: {error}", remedy="run this on a machine with an NVIDIA GPU") from None
        device, context, stream = ctypes.c_int(), ctypes.c_void_p(), ctypes.c_void_p()
        self._call("cuInit", 0)
        self._call("cuDeviceGet", ctypes.byref(device), 0)
        self._call("cuDevicePrimaryCtxRetain", ctypes.byref(context), device)
        self._device, self._context = device, context
        self.enter()
        self._call("cuStreamCreate", ctypes.byref(stream), _NON_BLOCKING)
        self.stream = int(stream.value or 0)

    def _call(self, name: str, *arguments: Any) -> None:
        code = getattr(self._lib, name)(*arguments)
        if code:
            text = ctypes.c_char_p()
            self._lib.cuGetErrorString(code, ctypes.byref(text))
            why = (text.value or b"").decode(errors="replace")
            raise EngineError(
                f"CUDA: {name} failed with {code} ({why})", remedy="close other programs that use the GPU"
            )

    def enter(self) -> None:
        """Makes the context current in the calling thread: a session may be used from several."""
        self._call("cuCtxSetCurrent", self._context)

    def allocate(self, size: int) -> int:
        """Device memory of `size` bytes."""
        pointer = ctypes.c_uint64()
        self._call("cuMemAlloc_v2", ctypes.byref(pointer), ctypes.c_size_t(max(size, 1)))
        return int(pointer.value)

    def free(self, pointer: int) -> None:
        """Gives device memory back."""
        self._call("cuMemFree_v2", ctypes.c_uint64(pointer))

    def upload(self, pointer: int, array: NpArray) -> None:
        """Copies a contiguous array to the device, in the stream's order."""
        source = ctypes.c_void_p(array.ctypes.data)
        self._call(
            "cuMemcpyHtoDAsync_v2", ctypes.c_uint64(pointer), source, ctypes.c_size_t(array.nbytes), self._stream()
        )

    def download(self, array: NpArray, pointer: int) -> None:
        """Copies from the device into a contiguous array; it is there after `wait`."""
        into = ctypes.c_void_p(array.ctypes.data)
        self._call(
            "cuMemcpyDtoHAsync_v2", into, ctypes.c_uint64(pointer), ctypes.c_size_t(array.nbytes), self._stream()
        )

    def copy(self, into: int, pointer: int, size: int) -> None:
        """Copies within the device."""
        ends = (ctypes.c_uint64(into), ctypes.c_uint64(pointer))
        self._call("cuMemcpyDtoDAsync_v2", *ends, ctypes.c_size_t(size), self._stream())

    def wait(self) -> None:
        """Until everything in the stream is done."""
        self._call("cuStreamSynchronize", self._stream())

    def begin_capture(self) -> None:
        """From here on calls in the stream are noted, not done."""
        self._call("cuStreamBeginCapture_v2", self._stream(), _CAPTURE_RELAXED)

    def end_capture(self) -> int:
        """What was noted since `begin_capture`, ready to `launch`."""
        graph, ready = ctypes.c_void_p(), ctypes.c_void_p()
        self._call("cuStreamEndCapture", self._stream(), ctypes.byref(graph))
        try:
            self._call("cuGraphInstantiateWithFlags", ctypes.byref(ready), graph, ctypes.c_uint64(0))
        finally:
            self._call("cuGraphDestroy", graph)
        return int(ready.value or 0)

    def launch(self, graph: int) -> None:
        """Does what was captured, in the stream's order."""
        self._call("cuGraphLaunch", ctypes.c_void_p(graph), self._stream())

    def drop(self, graph: int) -> None:
        """Frees a captured graph."""
        self._call("cuGraphExecDestroy", ctypes.c_void_p(graph))

    def close(self) -> None:
        """Gives the stream and the context back."""
        self._call("cuStreamDestroy_v2", self._stream())
        self._call("cuDevicePrimaryCtxRelease_v2", self._device)

    def _stream(self) -> ctypes.c_void_p:
        return ctypes.c_void_p(self.stream)
