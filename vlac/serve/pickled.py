"""What LeRobot's RobotClient sends is a pickle. It is read here as data, by a machine that cannot run anything.

Python's unpickler is not used. This reads the few opcodes that plain values, NumPy arrays and LeRobot's three message
classes are written with; a class or function is only ever a *name*, looked up in the tables below and never imported.
Any other name, opcode or use is refused: there is nothing here that a message could make call anything.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from vlac.serve.refusal import Refused
from vlac.serve.wire import array

NpArray = np.ndarray[Any, Any]
_HELPERS = "lerobot.async_inference.helpers"
MESSAGES = ("RemotePolicyConfig", "TimedObservation")
"""Classes of `lerobot.async_inference.helpers` whose fields are read."""
NAMES: Mapping[tuple[str, str], str] = {
    **{(_HELPERS, name): name for name in MESSAGES},
    ("numpy", "ndarray"): "ndarray",
    ("numpy", "dtype"): "dtype",
    **{(f"numpy.{core}.multiarray", name): name for core in ("_core", "core") for name in ("_reconstruct", "scalar")},
    **{(f"numpy.{core}.numeric", "_frombuffer"): "_frombuffer" for core in ("_core", "core")},
}
MAX_ITEMS = 20_000
_MARK = object()


@dataclass
class Message:
    """One of MESSAGES with its fields."""

    name: str
    fields: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class _Name:
    name: str


@dataclass
class _Dtype:
    text: str


@dataclass
class _Array:
    value: NpArray | None = None


def _no(what: str) -> Refused:
    return Refused(
        "malformed", f"a pickle {what}", remedy="only data of LeRobot's own messages is read; nothing is run"
    )


def read(data: bytes) -> Message:
    """The message in a pickle; Refused("malformed") for whatever is no plain LeRobot message."""
    machine = _Machine(data)
    try:
        result = machine.run()
    except (IndexError, struct.error, UnicodeDecodeError, TypeError, ValueError, RecursionError) as error:
        raise _no(f"that is broken: {type(error).__name__}") from None
    if not isinstance(result, Message):
        raise _no(f"of a {type(result).__name__}, expected one of {', '.join(MESSAGES)}")
    left = [MAX_ITEMS]  # shared parts count each time they are used: a small pickle can name very many items
    result.fields = {k: plain(v, left) for k, v in result.fields.items()}
    return result


def plain(value: Any, left: list[int], depth: int = 0) -> Any:
    """Without the machine's own kinds: arrays, numbers, texts, lists, mappings of text keys; at most left[0] items."""
    left[0] -= 1
    if depth > 4 or left[0] < 0:
        raise _no("that is nested too deep" if depth > 4 else "with too many items")
    if isinstance(value, _Array):
        if value.value is None:
            raise _no("with an array without values")
        return value.value
    if isinstance(value, (list, tuple)):
        return [plain(v, left, depth + 1) for v in value]
    if isinstance(value, dict):
        return {k: plain(v, left, depth + 1) for k, v in value.items()}
    if value is None or isinstance(value, (bool, int, float, str, np.generic)):
        return value
    raise _no(f"holds a {type(value).__name__} as a value")


class _Machine:
    """A stack machine over pickle opcodes of protocols 2 to 5; see pickletools for what each does."""

    def __init__(self, data: bytes) -> None:
        self.data, self.at = data, 0
        self.stack: list[Any] = []
        self.memo: dict[int, Any] = {}
        self.made = 0

    def take(self, n: int) -> bytes:
        part = self.data[self.at : self.at + n]
        if len(part) != n:
            raise _no("that is cut off")
        self.at += n
        return part

    def number(self, form: str) -> Any:
        return struct.unpack(form, self.take(struct.calcsize(form)))[0]

    def since_mark(self) -> list[Any]:
        at = len(self.stack) - 1
        while self.stack[at] is not _MARK:
            at -= 1
        items = self.stack[at + 1 :]
        del self.stack[at:]
        return items

    def run(self) -> Any:
        """The value on the stack at STOP."""
        while True:
            code = self.take(1)
            if code == b".":
                if len(self.stack) != 1 or self.at != len(self.data):
                    raise _no("with more than one value")
                return self.stack[0]
            step = _PLAIN.get(code)
            if step is None:
                raise _no(f"with opcode 0x{code.hex()}, which plain data does not need")
            self.made += 1
            if self.made > 50 * MAX_ITEMS:
                raise _no("with too many items")
            step(self)

    def pop(self, n: int) -> list[Any]:
        if n > len(self.stack):
            raise _no("that is broken")
        items = self.stack[len(self.stack) - n :]
        del self.stack[len(self.stack) - n :]
        return items

    # --- the three steps in which an unpickler would call something ---

    def name(self) -> None:
        module, name = self.pop(2)
        if not (isinstance(module, str) and isinstance(name, str)):
            raise _no("that names no text")
        self.push_name(module, name)

    def push_name(self, module: str, name: str) -> None:
        if (module, name) not in NAMES:
            raise _no(f"that asks for {module[:60]}.{name[:60]}")
        self.stack.append(_Name(NAMES[module, name]))

    def new(self) -> None:
        kind, arguments = self.pop(2)
        if not isinstance(kind, _Name) or kind.name not in MESSAGES or arguments != ():
            raise _no("that makes something else than LeRobot's messages")
        self.stack.append(Message(kind.name))

    def reduce(self) -> None:
        kind, arguments = self.pop(2)
        if not isinstance(kind, _Name) or not isinstance(arguments, tuple):
            raise _no("that calls something")
        made: Any
        if kind.name == "dtype" and arguments and isinstance(arguments[0], str):
            made = _Dtype(arguments[0])
        elif kind.name == "_reconstruct":
            made = _Array()
        elif kind.name == "_frombuffer" and len(arguments) == 4:
            data, dtype, shape, order = arguments
            made = _Array(_filled(data, dtype, shape, order == "F"))
        elif kind.name == "scalar" and len(arguments) == 2:
            made = _filled(arguments[1], arguments[0], (), False)[()]
        else:
            raise _no(f"that calls {kind.name}")
        self.stack.append(made)

    def build(self) -> None:
        (state,) = self.pop(1)
        target = self.stack[-1]
        if isinstance(target, Message) and isinstance(state, dict) and not target.fields:
            target.fields = dict(state)
        elif isinstance(target, _Dtype) and len(target.text) == 2 and isinstance(state, tuple) and _order(state):
            target.text = f"{'<' if state[1] == '=' else state[1]}{target.text}"
        elif isinstance(target, _Array) and target.value is None and isinstance(state, tuple) and len(state) == 5:
            _, shape, dtype, fortran, data = state
            target.value = _filled(data, dtype, shape, bool(fortran))
        else:
            raise _no("that gives a state to something else than a message or an array")

    # --- plain data ---

    def set_items(self, items: list[Any]) -> None:
        into = self.stack[-1]
        if not isinstance(into, dict) or len(items) % 2 or not all(isinstance(k, str) for k in items[::2]):
            raise _no("with a mapping whose keys are no text")
        into.update(zip(items[::2], items[1::2], strict=True))

    def append(self, items: list[Any]) -> None:
        into = self.stack[-1]
        if not isinstance(into, list):
            raise _no("that appends to something else than a list")
        into.extend(items)

    def put(self, at: int) -> None:
        self.memo[at] = self.stack[-1]

    def get(self, at: int) -> None:
        if at not in self.memo:
            raise _no("that is broken")
        self.stack.append(self.memo[at])

    def text(self, form: str) -> None:
        self.stack.append(self.take(self.number(form)).decode("utf-8"))

    def bytes_(self, form: str) -> None:
        self.stack.append(self.take(self.number(form)))

    def long(self) -> None:
        self.stack.append(int.from_bytes(self.take(self.number("<B")), "little", signed=True))

    def line_name(self) -> None:
        end = [self.data.index(b"\n", self.at)]
        end.append(self.data.index(b"\n", end[0] + 1))
        module, name = self.data[self.at : end[0]], self.data[end[0] + 1 : end[1]]
        self.at = end[1] + 1
        self.push_name(module.decode("utf-8"), name.decode("utf-8"))


def _order(state: tuple[Any, ...]) -> bool:
    return len(state) > 1 and state[1] in ("<", "|", "=", ">")


def _filled(data: Any, dtype: Any, shape: Any, fortran: bool) -> NpArray:
    if not isinstance(dtype, _Dtype) or not isinstance(shape, tuple):
        raise _no("with an array of no type or shape")
    text = dtype.text if dtype.text[:1] in "<|>=" else ("|" if dtype.text[1:] == "1" else "<") + dtype.text
    return array(data, text, shape[::-1]).T if fortran else array(data, text, shape)


_PLAIN: Mapping[bytes, Any] = {
    b"\x80": lambda m: m.take(1),  # PROTO
    b"\x95": lambda m: m.take(8),  # FRAME
    b"(": lambda m: m.stack.append(_MARK),
    b"N": lambda m: m.stack.append(None),
    b"\x88": lambda m: m.stack.append(True),
    b"\x89": lambda m: m.stack.append(False),
    b"}": lambda m: m.stack.append({}),
    b"]": lambda m: m.stack.append([]),
    b")": lambda m: m.stack.append(()),
    b"t": lambda m: m.stack.append(tuple(m.since_mark())),
    b"\x85": lambda m: m.stack.append(tuple(m.pop(1))),
    b"\x86": lambda m: m.stack.append(tuple(m.pop(2))),
    b"\x87": lambda m: m.stack.append(tuple(m.pop(3))),
    b"K": lambda m: m.stack.append(m.number("<B")),
    b"M": lambda m: m.stack.append(m.number("<H")),
    b"J": lambda m: m.stack.append(m.number("<i")),
    b"\x8a": _Machine.long,
    b"G": lambda m: m.stack.append(m.number(">d")),
    b"\x8c": lambda m: m.text("<B"),
    b"X": lambda m: m.text("<I"),
    b"\x8d": lambda m: m.text("<Q"),
    b"C": lambda m: m.bytes_("<B"),
    b"B": lambda m: m.bytes_("<I"),
    b"\x8e": lambda m: m.bytes_("<Q"),
    b"\x96": lambda m: m.bytes_("<Q"),  # BYTEARRAY8
    b"\x94": lambda m: m.put(len(m.memo)),
    b"q": lambda m: m.put(m.number("<B")),
    b"r": lambda m: m.put(m.number("<I")),
    b"h": lambda m: m.get(m.number("<B")),
    b"j": lambda m: m.get(m.number("<I")),
    b"s": lambda m: m.set_items(m.pop(2)),
    b"u": lambda m: m.set_items(m.since_mark()),
    b"a": lambda m: m.append(m.pop(1)),
    b"e": lambda m: m.append(m.since_mark()),
    b"\x93": _Machine.name,
    b"c": _Machine.line_name,
    b"\x81": _Machine.new,
    b"R": _Machine.reduce,
    b"b": _Machine.build,
}


def _text(value: str) -> bytes:
    data = value.encode()
    return b"X" + struct.pack("<I", len(data)) + data


def timed_actions(chunk: NpArray, first: int, at: float, dt: float) -> bytes:
    """What RobotClient unpickles: a list of TimedAction with float32 tensors, written without torch.

    chunk [N, A] is for the control steps first, first + 1, ..., which begin at `at` seconds and last `dt`.
    """
    out = bytearray(b"\x80\x04](")
    for i, row in enumerate(np.asarray(chunk, np.float32)):
        numbers = b"".join(b"G" + struct.pack(">d", float(v)) for v in row)
        out += b"c" + f"{_HELPERS}\nTimedAction\n".encode() + b")\x81}("
        out += _text("timestamp") + b"G" + struct.pack(">d", at + i * dt)
        out += _text("timestep") + b"J" + struct.pack("<i", first + i)
        out += _text("action") + b"ctorch\ntensor\n" + b"](" + numbers + b"e\x85Rub"
    return bytes(out + b"e.")
