"""Action tokens to numbers: bins of [-1, 1] mapped onto ids of a vocabulary (RT-2, Brohan et al. 2023; OpenVLA)."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from vlac.errors import EngineError

Array = npt.NDArray[np.float32]


def centres(bins: int, kind: str) -> npt.NDArray[np.float64]:
    """Centres of [-1, 1] cut uniformly. kind "edges": `bins` edges, ends included, so bins - 1 centres (OpenVLA);
    "cells": `bins` cells, centre i at -1 + (2i + 1)/bins (RT-1, RT-2)."""
    edges = np.linspace(-1.0, 1.0, bins if kind == "edges" else bins + 1)
    middle: npt.NDArray[np.float64] = (edges[:-1] + edges[1:]) / 2.0
    return middle


def token_bins(
    x: Array,
    *,
    bins: int,
    kind: str,
    first: int,
    direction: int,
    columns: int,
    end: int = -1,
    ids: Sequence[int] = (),
) -> Array:
    """Ids x (any shape, whole numbers) -> bin centres, float32 [N, columns].

    Bin i has the id first + direction * i; ids beyond either end mean the bin at that end. `end`: an id that ends an
    answer; EngineError when it stands before the last place, because then what follows is no action. `ids`: bin i has
    the id ids[i] instead; EngineError for an id that means no bin.
    """
    tokens = np.rint(x).astype(np.int64).reshape(-1)
    early = np.flatnonzero(tokens[:-1] == end)
    if early.size:
        raise EngineError(
            f"the policy ended its answer after {early[0]} of {tokens.size} action tokens",
            remedy="check instruction and picture: this observation is far from what the policy was trained on",
        )
    table = centres(bins, kind)
    index = _places(tokens, ids) if ids else (tokens - first) * direction
    index = np.clip(index, 0, len(table) - 1)
    return table[index].astype(np.float32).reshape(-1, columns)


def _places(tokens: npt.NDArray[np.int64], ids: Sequence[int]) -> npt.NDArray[np.int64]:
    known = {token: i for i, token in enumerate(ids)}
    strange = [int(t) for t in tokens if int(t) not in known]
    if strange:
        raise EngineError(
            f"the policy picked id {strange[0]}, which means no bin",
            remedy="compile with --spec bins.restricted=true: only the bins' ids compete then",
        )
    return np.array([known[int(t)] for t in tokens], dtype=np.int64)
