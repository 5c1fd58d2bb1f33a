"""Arrays and messages off the network: msgpack with openpi's arrays, and .npy; nothing here can run code.

Every size is checked against the bytes that are there before memory is taken for it.
"""

from __future__ import annotations

import io
import math
from typing import Any

import numpy as np

from vlac.errors import VlacError
from vlac.serve.refusal import Refused

NpArray = np.ndarray[Any, Any]
DTYPES = frozenset(("|b1", "|u1", "|i1", *(f"<{k}{n}" for k, n in (*(("i", n) for n in (2, 4, 8)),
                   *(("u", n) for n in (2, 4, 8)), *(("f", n) for n in (2, 4, 8))))))  # fmt: skip
MAX_RANK = 6
MAX_ITEMS = 20_000
"""Values in a message: an empty list is one byte of msgpack and dozens in memory."""
_SIZES = {
    **dict(zip(range(0xC4, 0xCA), ((1, 0), (2, 0), (4, 0), (1, 1), (2, 1), (4, 1)), strict=True)),
    **dict(zip(range(0xD9, 0xDC), ((1, 0), (2, 0), (4, 0)), strict=True)),
}
"""msgpack's bin, ext and str: bytes of the length, and bytes behind it that the length does not count."""
_FIXED = dict(zip(range(0xCA, 0xD9), (4, 8, 1, 2, 4, 8, 1, 2, 4, 8, 2, 3, 5, 9, 17), strict=True))
_NESTED = {0xDC: (2, 1), 0xDD: (4, 1), 0xDE: (2, 2), 0xDF: (4, 2)}
"""Arrays and maps: bytes of the length, and values for each that it counts."""


def need(module: str) -> Any:
    """Imports what the extra `serve` brings; VlacError tells how to install it."""
    import importlib

    try:
        return importlib.import_module(module)
    except ImportError:
        raise VlacError(
            f"{module.split('.')[0]} is not installed", remedy="pip install 'vlac-compiler[serve]'"
        ) from None


def array(data: Any, dtype: Any, shape: Any) -> NpArray:
    """An array over bytes; Refused("malformed") unless type, shape and length agree."""
    name = dtype.decode("ascii", "replace") if isinstance(dtype, bytes) else dtype
    if not isinstance(name, str) or name.replace("=", "<") not in DTYPES:
        raise Refused(
            "malformed", f"an array is of type {str(name)[:40]!r}, expected one of {', '.join(sorted(DTYPES))}"
        )
    if not isinstance(data, (bytes, bytearray)):
        raise Refused("malformed", f"an array's data is a {type(data).__name__}, expected bytes")
    if (
        not isinstance(shape, (list, tuple))
        or len(shape) > MAX_RANK
        or not all(isinstance(n, int) and not isinstance(n, bool) and 0 <= n < 2**31 for n in shape)
    ):
        raise Refused("malformed", f"an array's shape is {str(shape)[:80]}, expected up to {MAX_RANK} sizes")
    kind = np.dtype(name)
    if math.prod(shape) * kind.itemsize != len(data):
        raise Refused("malformed", f"an array {name} {list(shape)} has {len(data)} bytes")
    return np.frombuffer(data, dtype=kind).reshape(shape)


def check_items(message: bytes) -> None:
    """Refused("malformed") for msgpack of more than MAX_ITEMS values; what is broken is left to its reader."""
    at, coming = 0, 1
    for _ in range(MAX_ITEMS):
        if not coming or at >= len(message):
            return
        code, at, coming = message[at], at + 1, coming - 1
        if 0x80 <= code < 0xA0:
            coming += (code & 15) * (1 if code & 16 else 2)
        elif 0xA0 <= code < 0xC0:
            at += code & 31
        elif code in _SIZES:
            width, more = _SIZES[code]
            at += width + more + int.from_bytes(message[at : at + width], "big")
        elif code in _NESTED:
            width, each = _NESTED[code]
            coming += each * int.from_bytes(message[at : at + width], "big")
            at += width
        else:
            at += _FIXED.get(code, 0)
    if coming and at < len(message):
        raise Refused("malformed", f"a message of more than {MAX_ITEMS} values", remedy="send arrays as arrays")


def unpack(message: bytes) -> Any:
    """A msgpack message with arrays as openpi's client writes them (`__ndarray__`, `__npgeneric__`).

    Raises Refused("malformed").
    """
    msgpack = need("msgpack")
    check_items(message)

    def hook(found: dict[Any, Any]) -> Any:
        if b"__ndarray__" in found or "__ndarray__" in found:
            part = {k.decode() if isinstance(k, bytes) else k: v for k, v in found.items()}
            return array(part.get("data"), part.get("dtype"), part.get("shape"))
        if b"__npgeneric__" in found or "__npgeneric__" in found:
            value = found.get(b"data", found.get("data"))
            if not isinstance(value, (bool, int, float)):
                raise Refused("malformed", "a scalar holds no number")
            return value
        return found

    try:
        return msgpack.unpackb(message, object_hook=hook, strict_map_key=True, raw=False)
    except Refused:
        raise
    except (ValueError, TypeError, RecursionError, MemoryError, OverflowError, msgpack.UnpackException) as error:
        raise Refused("malformed", f"no msgpack message: {type(error).__name__} {str(error)[:120]}".rstrip()) from None


def pack(value: Any) -> bytes:
    """The counterpart: arrays in openpi's form."""

    def default(found: Any) -> Any:
        if isinstance(found, np.ndarray):
            c = np.ascontiguousarray(found)
            return {b"__ndarray__": True, b"data": c.tobytes(), b"dtype": c.dtype.str, b"shape": c.shape}
        raise TypeError(f"cannot pack {type(found).__name__}")

    return bytes(need("msgpack").packb(value, default=default))


def npy(data: bytes) -> NpArray:
    """An .npy file; Refused("malformed") for anything else, object arrays above all."""
    stream = io.BytesIO(data)
    form: Any = np.lib.format
    try:
        version = form.read_magic(stream)
        if version == (1, 0):
            shape, fortran, dtype = form.read_array_header_1_0(stream)
        else:
            shape, fortran, dtype = form.read_array_header_2_0(stream)
    except Exception as error:  # NumPy parses the header as Python, with whatever that raises
        raise Refused("malformed", f"no .npy file: {str(error)[:120]}") from None
    rest = data[stream.tell() :]
    if not fortran:
        return array(rest, dtype.str, shape)
    return array(rest, dtype.str, shape[::-1]).transpose()


def npy_bytes(value: NpArray) -> bytes:
    """An array as an .npy file."""
    stream = io.BytesIO()
    np.save(stream, value, allow_pickle=False)
    return stream.getvalue()
