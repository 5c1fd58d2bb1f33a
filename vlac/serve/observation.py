"""From what a client sends to an observation: which key is a camera, the state, the instruction; checked by name.

Keys may be flat ("observation/state", "observation.images.top", "top") or nested ("images": {"top": ...}). An unknown
key is refused: a camera with a wrong name would otherwise be a camera that is silently missing.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from vlac.io import IO
from vlac.runtime.rtc import SCHEDULES
from vlac.serve.refusal import Refused

NpArray = np.ndarray[Any, Any]

STATES = ("state", "agent_pos")
TASKS = ("task", "prompt", "instruction")
MOMENT = "moment"
"""[seed, step], whole numbers: the sampler's noise is drawn from them, as `vlac eval` draws it."""
OBSERVE = "observe"
"""True: frames alone; later observations of the client without frames are answered by them."""
MAX_SIDE, MAX_TASK = 8192, 4096
MAX_WEIGHT = 1000.0
"""Of guidance, a hundred times LeRobot's default; far more of it makes actions of any size."""
RTC = "rtc"
"""Mapping of what a client says about real-time chunking; see `guiding`."""
_SEEDS = 2**63
_STEPS = 2**20


class ObservationReader:
    """Reads the observations of one policy.

    Args:
        io: of the policy.
        rename: a client's key -> the policy's camera key, "state" or "task".
        guided: whether the server does real-time chunking, and keys of `RTC` say something.
        frames: whether frames may come alone, and observations without frames after them.
    """

    def __init__(
        self, io: IO, rename: Mapping[str, str] | None = None, guided: bool = False, frames: bool = False
    ) -> None:
        self._io, self._guided, self._frames = io, guided, frames
        names = {c.key: c.key for c in io.cameras} | {c.name: c.key for c in io.cameras}
        self._cameras = {_plain(k): v for k, v in names.items()}
        self._rename = {_plain(k): _plain(v) for k, v in (rename or {}).items()}
        self.keys = (*(c.key for c in io.cameras), *(["observation.state"] if io.state_dim else []), "prompt")

    def read(self, found: Any) -> dict[str, Any]:
        """{"images", "state", "task", "moment" (or None)}; images uint8 [H, W, 3] or float32 in [0, 1], own copies; and
        "rtc", what the client says about real-time chunking, "observe", that these are frames alone, where it does.
        "images" is None where neither frames nor an instruction came: those that came before count.

        Raises Refused("input") naming the key, what it holds and what was expected.
        """
        if not isinstance(found, Mapping):
            raise Refused("malformed", f"an observation is a mapping, this is {_kind(found)}")
        seen: dict[str, Any] = {"images": {}, "state": None, "task": None, "moment": None}
        for key, value in _flat(found):
            self._take(seen, key, value)
        if OBSERVE in seen:
            if seen["state"] is not None:
                raise Refused(
                    "input", "frames to observe come without a state", remedy="send the state when actions are wanted"
                )
        elif not seen["images"] and seen["task"] is None and self._frames:
            seen["images"] = None
        if seen["task"] is None and self._io.text_steps and seen["images"] is not None:
            raise Refused("input", "no instruction is given", remedy="send it as prompt or task")
        if seen["state"] is None and self._io.state_dim and OBSERVE not in seen:
            raise Refused("input", f"no state is given, expected {self._io.state_dim} numbers as observation.state")
        return seen

    def _take(self, seen: dict[str, Any], key: str, value: Any) -> None:
        plain = _plain(key)
        plain = self._rename.get(plain, plain)
        last = plain.rsplit(".", 1)[-1]
        camera = self._cameras.get(plain) or self._cameras.get(last)
        if camera is not None:
            if camera in seen["images"]:
                raise Refused("input", f"camera {camera} is given twice, the second time as {key!r}")
            seen["images"][camera] = picture(key, value)
        elif last in STATES:
            if seen["state"] is not None:
                raise Refused("input", f"the state is given twice, the second time as {key[:80]!r}")
            seen["state"] = self._state(key, value)
        elif last in TASKS:
            if seen["task"] is not None:
                raise Refused("input", f"the instruction is given twice, the second time as {key[:80]!r}")
            seen["task"] = _task(key, value)
        elif plain == MOMENT:
            seen["moment"] = moment(value)
        elif plain == OBSERVE and self._frames:
            if value is not True:
                raise Refused("input", f"{key[:80]} is {str(value)[:40]!r}, expected true, or nothing")
            seen[OBSERVE] = True
        elif plain.partition(".")[0] == RTC:
            if not self._guided:
                raise Refused(
                    "input", f"{key[:80]!r}: this server does no real-time chunking", remedy="start it with --rtc"
                )
            name = plain.partition(".")[2]
            seen.setdefault(RTC, {})[name] = guiding(key[:80], name, value)
        else:
            known = ", ".join((*self.keys, MOMENT))
            raise Refused(
                "input", f"unknown key {key[:80]!r}; this policy takes {known}", remedy="`vlac serve --rename` maps it"
            )

    def _state(self, key: str, value: Any) -> NpArray | None:
        if value is None:
            return None
        state = numbers(key, value).reshape(-1)
        if len(state) != self._io.state_dim:
            raise Refused("input", f"{key} has {len(state)} numbers, expected {self._io.state_dim}")
        return state


def _flat(found: Mapping[Any, Any], inside: str = "", depth: int = 0) -> Iterator[tuple[str, Any]]:
    for key, value in found.items():
        if not isinstance(key, str):
            raise Refused("input", f"a key is {_kind(key)}, expected text")
        name = f"{inside}/{key}" if inside else key
        if isinstance(value, Mapping):
            if depth == 2:
                raise Refused("input", f"{name[:80]!r} is nested too deep")
            yield from _flat(value, name, depth + 1)
        else:
            yield name, value


def _plain(key: str) -> str:
    return re.sub(r"/+", ".", key)


def _kind(value: Any) -> str:
    return f"an array of {value.dtype}" if isinstance(value, np.ndarray) else f"a {type(value).__name__}"


def picture(key: str, value: Any) -> NpArray:
    """uint8 [H, W, 3], or float in [0, 1]; [3, H, W] is turned round; a leading 1 is allowed."""
    if not isinstance(value, np.ndarray):
        raise Refused("input", f"{key} is {_kind(value)}, expected a picture as an array, uint8 [H, W, 3]")
    array = value[0] if value.ndim == 4 and value.shape[0] == 1 else value
    if array.ndim == 3 and array.shape[0] == 3 and array.shape[2] != 3:
        array = array.transpose(1, 2, 0)
    if array.ndim != 3 or array.shape[2] != 3 or not all(1 <= s <= MAX_SIDE for s in array.shape[:2]):
        raise Refused("input", f"{key} has shape {list(value.shape)[:8]}, expected [H, W, 3] of at most {MAX_SIDE}")
    if array.dtype == np.uint8:
        return np.array(array, order="C")
    if array.dtype.kind != "f":
        raise Refused("input", f"{key} is {array.dtype}, expected uint8, or float in [0, 1]")
    if not np.isfinite(array).all():
        raise Refused("input", f"{key} holds NaN or Inf")
    if array.min() < 0 or array.max() > 1:
        raise Refused("input", f"{key} is {array.dtype} from {array.min():.3g} to {array.max():.3g}, expected 0 to 1")
    return np.array(array, dtype=np.float32, order="C")


def numbers(key: str, value: Any) -> NpArray:
    """float32, finite, of an array or a list of numbers."""
    if not isinstance(value, (np.ndarray, list, tuple, int, float, np.number)) or isinstance(value, bool):
        raise Refused("input", f"{key} is {_kind(value)}, expected numbers")
    if isinstance(value, (list, tuple)) and not _plain_numbers(value):
        raise Refused("input", f"{key} holds something else than numbers")  # NumPy pads texts to the longest
    try:
        array = np.asarray(value)
        if array.dtype.kind not in "iuf":
            raise ValueError(f"its type is {array.dtype}")
        with np.errstate(over="ignore"):
            array = array.astype(np.float32)
    except (ValueError, TypeError, OverflowError) as error:
        raise Refused("input", f"{key} holds no numbers: {str(error)[:120]}") from None
    if not np.isfinite(array).all():
        raise Refused("input", f"{key} holds NaN or Inf")
    return np.array(array)


def _plain_numbers(values: Any, depth: int = 0) -> bool:
    return depth < 4 and all(
        _plain_numbers(v, depth + 1)
        if isinstance(v, (list, tuple))
        else isinstance(v, (int, float, np.ndarray, np.number)) and not isinstance(v, bool)
        for v in values
    )


def _task(key: str, value: Any) -> str:
    if not isinstance(value, str):
        raise Refused("input", f"{key} is {_kind(value)}, expected text")
    if len(value) > MAX_TASK:
        raise Refused("input", f"{key} has {len(value)} characters, expected at most {MAX_TASK}")
    if not value.isprintable() and any(ord(c) < 32 and c not in "\n\t\r" for c in value):
        raise Refused("input", f"{key} has control characters")
    try:
        value.encode()
    except UnicodeEncodeError:
        raise Refused("input", f"{key} is no valid text") from None
    return value


def moment(value: Any) -> tuple[int, int]:
    """(seed, step) of a list or an integer array of two."""
    found = value.tolist() if isinstance(value, np.ndarray) and value.size == 2 else value
    if (
        not isinstance(found, (list, tuple))
        or len(found) != 2
        or not all(isinstance(v, int) and not isinstance(v, bool) and 0 <= v < _SEEDS for v in found)
    ):
        raise Refused("input", "moment is not [seed, step], two whole numbers from 0 on")
    return found[0], found[1]


def guiding(key: str, name: str, value: Any) -> Any:
    """A value of `RTC`, checked: inference_delay, executed (actions taken since the client's last observation),
    execution_horizon: whole numbers from 0 on; schedule; max_guidance_weight; reset: true begins an episode."""
    found = value.item() if isinstance(value, (np.ndarray, np.generic)) and value.size == 1 else value
    whole = isinstance(found, int) and not isinstance(found, bool)
    if name in ("inference_delay", "executed", "execution_horizon"):
        fits, expected = whole and 0 <= found < _STEPS, "a number of control steps, 0 or more"
    elif name == "schedule":
        found = found.lower() if isinstance(found, str) else found
        fits, expected = found in SCHEDULES if isinstance(found, str) else False, f"one of {', '.join(SCHEDULES)}"
    elif name == "max_guidance_weight":
        fits = (whole or isinstance(found, float)) and 0 < found <= MAX_WEIGHT
        expected = f"a number above 0, at most {MAX_WEIGHT:g}"
    elif name == "reset":
        fits, expected = isinstance(found, bool), "true or false"
    else:
        raise Refused("input", f"unknown key {key!r}; there are {', '.join(RTC + '/' + n for n in _GUIDING)}")
    if not fits:
        raise Refused("input", f"{key} is {str(value)[:40]!r}, expected {expected}")
    return found


_GUIDING = ("inference_delay", "executed", "execution_horizon", "schedule", "max_guidance_weight", "reset")
