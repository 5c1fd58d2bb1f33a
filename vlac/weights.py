"""Lazy tensors: mmapped, mapped, combined, never all in memory.

A `LazyTensor` knows its shape and loads float32 on demand; a `Weights` is an immutable mapping of them.
Readers make them, passes and rewrites wrap them, targets stream them one at a time.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import accumulate

import numpy as np
import numpy.typing as npt

from vlac.errors import CheckpointError

Array = npt.NDArray[np.float32]

PIECE = 1 << 24
"""Values of a piece that `LazyTensor.rows` gives: 64 MB in float32."""


@dataclass(frozen=True)
class LazyTensor:
    """A float tensor that is read when asked for.

    Attributes:
        shape: its shape.
        load_unchecked: returns float32, C order, of `shape`; may be a read-only view of a memory map.
        dtype: the type on disk ("f32", "f16", "bf16", ...), for reports.
        source: where it comes from ("model.safetensors: model.state_proj.weight"), for errors.
        importance: mean squares [k] of what multiplies a weight's columns, where a pass measured them: packers that can
            give important columns smaller errors do.
        load_rows: returns rows start..stop - 1 (of the first axis) without reading the others; None where only the
            whole can be had.
    """

    shape: tuple[int, ...]
    load_unchecked: Callable[[], Array] = field(repr=False, compare=False)
    dtype: str = "f32"
    source: str = ""
    load_rows: Callable[[int, int], Array] | None = field(default=None, repr=False, compare=False)
    importance: Array | None = field(default=None, repr=False, compare=False)

    def load(self) -> Array:
        """The values, float32, C order. Raises CheckpointError if they have another shape, NaN or Inf."""
        return self._checked(self.load_unchecked(), self.shape)

    def rows(self) -> Iterator[Array]:
        """The values as runs of whole rows, in order, checked like those of `load`: of about PIECE values each where
        the source can be read so, else all at once. For tensors of which one float32 copy is already much memory."""
        count = math.prod(self.shape)
        if self.load_rows is None or count <= PIECE:
            yield self.load()
            return
        step = max(1, PIECE * self.shape[0] // count)
        for start in range(0, self.shape[0], step):
            stop = min(start + step, self.shape[0])
            yield self._checked(self.load_rows(start, stop), (stop - start, *self.shape[1:]))

    def _checked(self, values: Array, shape: tuple[int, ...]) -> Array:
        array = np.asarray(values, dtype=np.float32, order="C")
        if array.shape != shape:
            raise CheckpointError(f"{self.source}: values have shape {array.shape}, declared {shape}")
        # min and max carry NaN and Inf through without a temporary of the tensor's size
        if array.size and not (np.isfinite(array.min()) and np.isfinite(array.max())):
            bad = int(np.size(array) - np.count_nonzero(np.isfinite(array)))
            raise CheckpointError(
                f"{self.source}: {bad} of {array.size} values are NaN or Inf",
                remedy="the checkpoint is damaged or training diverged; use an earlier one",
            )
        return array

    def map(self, fn: Callable[[Array], Array], shape: Sequence[int] | None = None) -> LazyTensor:
        """The same tensor with `fn` applied when it is loaded; `shape` if `fn` changes the shape."""
        return LazyTensor(
            tuple(shape) if shape is not None else self.shape,
            lambda: fn(self.load()),
            self.dtype,
            self.source,
        )

    def map_rows(self, fn: Callable[[Array], Array], row: Sequence[int] | None = None) -> LazyTensor:
        """Like `map`, for an `fn` that does the same to any run of rows; `row`: the shape of a row if it changes it."""
        shape = self.shape if row is None else (self.shape[0], *row)
        read = self.load_rows
        rows = None if read is None else lambda start, stop: fn(read(start, stop))
        return LazyTensor(shape, lambda: fn(self.load()), self.dtype, self.source, rows)

    def cut(self, start: int, stop: int) -> LazyTensor:
        """Rows start..stop - 1 (of the first axis); the others are read only where the whole alone can be had."""
        read = self.load_rows
        whole = lambda: self.load()[start:stop] if read is None else read(start, stop)  # noqa: E731
        rows = None if read is None else lambda i, j: read(start + i, start + j)
        shape = (stop - start, *self.shape[1:])
        return LazyTensor(shape, whole, self.dtype, self.source, rows, self.importance)

    @staticmethod
    def of(array: npt.ArrayLike, source: str = "computed") -> LazyTensor:
        """A tensor that is already in memory."""
        value = np.asarray(array, dtype=np.float32, order="C")
        return LazyTensor(value.shape, lambda: value, "f32", source)

    @staticmethod
    def concat(parts: Sequence[LazyTensor], axis: int = 0) -> LazyTensor:
        """Parts joined along `axis`; each is loaded only when the whole is."""
        first = parts[0]
        shape = list(first.shape)
        shape[axis] = sum(p.shape[axis] for p in parts)
        return LazyTensor(
            tuple(shape),
            lambda: np.concatenate([p.load() for p in parts], axis=axis),
            first.dtype if all(p.dtype == first.dtype for p in parts) else "f32",
            " + ".join(p.source for p in parts),
            None if axis or any(p.load_rows is None for p in parts) else lambda i, j: _joined_rows(parts, i, j),
        )


def _joined_rows(parts: Sequence[LazyTensor], start: int, stop: int) -> Array:
    """Rows start..stop - 1 of parts that are joined along the first axis."""
    ends = list(accumulate(p.shape[0] for p in parts))
    found = []
    for part, end in zip(parts, ends, strict=True):
        first, last = max(start - (end - part.shape[0]), 0), min(stop - (end - part.shape[0]), part.shape[0])
        if first < last:
            assert part.load_rows is not None
            found.append(part.load_rows(first, last))
    return found[0] if len(found) == 1 else np.concatenate(found, axis=0)


class Weights(Mapping[str, LazyTensor]):
    """An immutable mapping from name to LazyTensor; every change gives a new one."""

    def __init__(self, tensors: Mapping[str, LazyTensor] | None = None) -> None:
        self._tensors: dict[str, LazyTensor] = dict(tensors or {})

    def __getitem__(self, name: str) -> LazyTensor:
        try:
            return self._tensors[name]
        except KeyError:
            raise CheckpointError(f"tensor {name} is missing") from None

    def __contains__(self, name: object) -> bool:
        return name in self._tensors

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)

    def map(self, name: str, fn: Callable[[Array], Array], shape: Sequence[int] | None = None) -> Weights:
        """A copy in which one tensor is mapped lazily."""
        return self.with_(**{name: self[name].map(fn, shape)})

    def with_(self, **tensors: LazyTensor) -> Weights:
        """A copy with tensors added or replaced (names with dots: pass as ** of a dict)."""
        return Weights({**self._tensors, **tensors})

    def without(self, *names: str) -> Weights:
        """A copy without these names."""
        return Weights({k: v for k, v in self._tensors.items() if k not in names})
