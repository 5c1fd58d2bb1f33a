"""What the last calls made, given back where its inputs are the same again, bit for bit.

An unchanged camera is neither resized nor encoded again, an instruction is tokenised once, and a stage whose inputs are
all unchanged is not run. The schedule says what a stage reads, so this knows no stage and no family by name.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Hashable, Mapping
from typing import Any, TypeVar

import numpy as np

NpArray = np.ndarray[Any, Any]
Value = TypeVar("Value")

MAX_PROMPTS = 32


class Reuse:
    """Results of one session's last calls. Not for several threads at once; the session's lock sees to that.

    Attributes:
        used: what was given back since `begin`, in order: "prompt", "picture observation.images.top", "vision[0]"
            (a stage for one camera slot), "prefix".
    """

    def __init__(self) -> None:
        self.used: list[str] = []
        self._pictures: dict[str, tuple[NpArray, NpArray]] = {}
        self._prompts: OrderedDict[Hashable, Any] = OrderedDict()
        self._stages: dict[str, list[tuple[dict[str, NpArray], dict[str, NpArray]]]] = {}

    def begin(self) -> None:
        """A new call."""
        self.used = []

    def clear(self) -> None:
        """Forgets everything."""
        self._pictures.clear()
        self._prompts.clear()
        self._stages.clear()

    def picture(self, camera: str, raw: Any, make: Callable[[], NpArray]) -> NpArray:
        """`make()`, or what it gave for the camera's last picture if that was a uint8 array of the same bytes."""
        if not (isinstance(raw, np.ndarray) and raw.dtype == np.uint8):
            return make()
        known = self._pictures.get(camera)
        if known is not None and known[0].shape == raw.shape and bool((known[0] == raw).all()):
            self.used.append(f"picture {camera}")
            return known[1]
        made = make()
        self._pictures[camera] = raw.copy(), made  # a copy: cameras like to write the next frame into the same array
        return made

    def prompt(self, key: Hashable, make: Callable[[], Value]) -> Value:
        """`make()`, or what it gave for the same key."""
        if key in self._prompts:
            self._prompts.move_to_end(key)
            self.used.append("prompt")
        else:
            self._prompts[key] = make()
            if len(self._prompts) > MAX_PROMPTS:
                self._prompts.popitem(last=False)
        found: Value = self._prompts[key]
        return found

    def stage(
        self,
        name: str,
        inputs: Mapping[str, NpArray],
        make: Callable[[], dict[str, NpArray]],
        *,
        slot: int | None = None,
        keep: int = 1,
    ) -> dict[str, NpArray]:
        """Outputs of a stage: `make()`, or those of one of the last `keep` different runs with the same inputs.

        Neither inputs nor outputs may be modified afterwards.
        """
        runs = self._stages.setdefault(name, [])
        for i, (before, outputs) in enumerate(runs):
            if before.keys() == inputs.keys() and all(same(before[k], inputs[k]) for k in inputs):
                runs.append(runs.pop(i))
                self.used.append(name if slot is None else f"{name}[{slot}]")
                return outputs
        outputs = make()
        runs.append((dict(inputs), outputs))
        del runs[:-keep]
        return outputs


def same(a: NpArray, b: NpArray) -> bool:
    """Whether two arrays hold the same bits in the same shape and dtype (so 0.0 is not -0.0)."""
    if a is b:
        return True
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    return np.array_equal(_bits(a), _bits(b))


def _bits(a: NpArray) -> NpArray:
    return np.ascontiguousarray(a).reshape(-1).view(np.uint8)
