"""Tensors of a checkpoint as the weights of a network: every name, shape and dtype checked, no data read."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from fnmatch import fnmatchcase
from pathlib import Path

from vlac.errors import CheckpointError, VlacError
from vlac.readers.safetensors_file import FLOATS
from vlac.weights import LazyTensor, Weights

CONVOLUTION = "vision.patch_embedding.weight"
"""[D, channels * patch^2] in the network, [D, channels, patch, patch] on disk."""


def take_weights(
    tensors: Weights,
    where: Path,
    shapes: Mapping[str, tuple[int, ...]],
    disk_name: Callable[[str], str],
    unread: Iterable[str],
    problem: Callable[[VlacError], None],
) -> Weights:
    """Canonical name -> tensor.

    Args:
        shapes: every weight the network reads; disk_name gives its name in the file.
        unread: patterns of names that the file may hold besides; `problem` is told of any others.

    Raises: CheckpointError that names a tensor which is missing, has another shape, or holds no floats.
    """
    result = {}
    for name, shape in shapes.items():
        source = disk_name(name)
        if source not in tensors:
            raise CheckpointError(
                f"{where}: tensor {source} is missing", remedy="download or copy the checkpoint again"
            )
        result[name] = _checked(tensors[source], shape, f"{where}: tensor {source}", name == CONVOLUTION)
    used = {disk_name(name) for name in shapes}
    patterns = tuple(unread)
    extra = [n for n in tensors if n not in used and not any(fnmatchcase(n, p) for p in patterns)]
    if extra:
        problem(
            CheckpointError(f"{where}: {len(extra)} tensors that the network does not have: {', '.join(extra[:6])}")
        )
    return Weights(result)


def _checked(tensor: LazyTensor, shape: tuple[int, ...], where: str, flattened: bool) -> LazyTensor:
    found = tensor.shape
    if flattened and len(found) == 4 and found[2] == found[3]:
        found = (found[0], math.prod(found[1:]))
    if found != shape:
        raise CheckpointError(
            f"{where} has shape {list(tensor.shape)}, config and sizes give {list(shape)}",
            remedy="config.json belongs to another checkpoint, or sizes need --spec",
        )
    if tensor.dtype.upper() not in FLOATS:
        raise CheckpointError(f"{where} is {tensor.dtype.upper()}, expected {', '.join(FLOATS)}")
    return tensor if tensor.shape == shape else tensor.map(lambda w: w.reshape(shape), shape)
