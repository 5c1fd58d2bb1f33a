"""quantize-kv on the toy attention that bars were set on: the published table's rows, ours beside other formats.

The table holds means of six seeds (two or three with heads of 256) and does not tell how noisy its queries are nor how
their logits are scaled. This reading was chosen on the rows of q8_0, q4_0, iq4_nl and KIVI alone, of all four columns
at once. Seeds are not the table's (no generator that was tried gives them), so its figures are held against means over
many seeds and, as six seeds scatter by 11 to 19 %, against the foreign rows of the same seeds.
"""

from __future__ import annotations

import math
from functools import lru_cache

import numpy as np
import pytest

from vlac import formats, kv_codes
from vlac.engines.base import NpArray
from vlac.rotations import rotation

NOISE = 1.2
"""Deviation of what is added to a key to make a query; keys have deviation 1 before they are scaled."""

SEEDS = {"plain": 96, "outliers": 96, "values": 48, "outliers256": 24}
MEANS_OF = {"plain": 6, "outliers": 6, "values": 6, "outliers256": 3}

FOREIGN = {
    "q8_0": {"plain": 1.8e-5, "outliers": 2.4e-4, "outliers256": 2.4e-5, "values": 5.2e-5},
    "q8_0 turned": {"plain": 1.7e-5, "outliers": 6.7e-5, "outliers256": 7.8e-6, "values": 2.7e-5},
    "q4_0": {"plain": 5.5e-3, "outliers": 5.5e-2, "outliers256": 4.9e-3, "values": 1.3e-2},
    "q4_0 turned": {"plain": 5.1e-3, "outliers": 2.0e-2, "outliers256": 2.1e-3, "values": 7.1e-3},
    "kivi 4": {"plain": 2.7e-3, "outliers": 2.4e-3, "outliers256": 6.0e-4, "values": 9.0e-3},
    "kivi 3": {"plain": 1.1e-2, "outliers": 1.1e-2, "outliers256": 2.7e-3, "values": 4.2e-2},
}

OURS = {
    "4 raw": {"plain": 9.1e-3, "outliers": 2.7e-2, "outliers256": 2.5e-3, "values": 8.8e-3},
    "4 norm": {"plain": 6.1e-3, "outliers": 2.2e-2, "outliers256": 2.1e-3},
    "4 norm centered": {"plain": 4.8e-3, "outliers": 3.7e-3, "outliers256": 1.0e-3},
    "3 raw": {"plain": 2.9e-2, "values": 3.18e-2},
    "3 norm": {"plain": 1.7e-2, "outliers": 7.8e-2, "outliers256": 8.1e-3, "values": 3.13e-2},
    "3 norm centered": {"plain": 1.6e-2, "outliers": 1.5e-2, "outliers256": 4.1e-3},
    "2 norm centered": {"plain": 7.2e-2, "outliers": 5.9e-2, "outliers256": 2.0e-2},
    "4 inner": {"plain": 1.4e-2, "outliers": 5.1e-2, "outliers256": 4.1e-3},
    "3 inner": {"plain": 4.0e-2, "outliers": 1.7e-1, "outliers256": 1.2e-2},
    "4 least_squares": {"plain": 6.2e-3, "values": 8.5e-3},
    "3 least_squares": {"plain": 1.7e-2, "values": 3.1e-2},
    "2 least_squares": {"values": 1.1e-1},
}
"""Bits, the scale that is kept (form=inner: the raw one, and an orthogonal matrix for the signs), centring."""


# --- the toy ---------------------------------------------------------------------------------------------------


def toy(seed: int, d: int, rows: int, outliers: bool) -> tuple[NpArray, NpArray, NpArray]:
    """(queries, keys, values) of one head: keys are 1.5 (0.8 of rank 8 + 0.6 noise), with four channels x2 and of mean
    +-10 inside the brackets; 50 queries are noisy keys without these channels, and their logits less each query's mean
    have deviation 3; values have channels of log-normal size."""
    rng = np.random.default_rng(seed)
    base = 0.8 * rng.standard_normal((rows, 8)) @ rng.standard_normal((8, d)) / math.sqrt(8)
    base += 0.6 * rng.standard_normal((rows, d))
    k = base.copy()
    if outliers:
        channels = rng.permutation(d)[:4]
        k[:, channels] = 2 * k[:, channels] + rng.choice([-10.0, 10.0], 4)
    v = rng.standard_normal((rows, d)) * np.exp(0.5 * rng.standard_normal(d))
    q = base[rng.integers(0, rows, 50)] + NOISE * rng.standard_normal((50, d))
    logits = q @ k.T
    return q * 2 / (logits - logits.mean(1, keepdims=True)).std(), 1.5 * k, v


def attended(q: NpArray, k: NpArray, v: NpArray) -> NpArray:
    s = q @ np.swapaxes(k, -1, -2)
    p = np.exp(s - s.max(-1, keepdims=True))
    return np.asarray(p / p.sum(-1, keepdims=True) @ v)


def block(x: NpArray, name: str) -> NpArray:
    """x through a ggml format; "turned": rotated by a Hadamard matrix while in it."""
    fmt, _, turned = name.partition(" ")
    h = rotation(x.shape[-1], 0) if turned else np.eye(x.shape[-1])
    y = (x @ h).astype(np.float32)
    return np.asarray(formats.decode(fmt, formats.encode(fmt, y), y.shape) @ h.T)


def kivi(x: NpArray, bits: int, axis: int) -> NpArray:
    """KIVI (arXiv 2402.02750): 2^bits steps between least and greatest of 32 neighbours on an axis, both in float16."""
    x, out = np.swapaxes(x, axis, -1), np.empty_like(np.swapaxes(x, axis, -1))
    for at in range(0, x.shape[-1], 32):
        part = x[..., at : at + 32]
        low, high = part.min(-1, keepdims=True), part.max(-1, keepdims=True)
        step = ((high - low) / (2**bits - 1)).astype(np.float16).astype(np.float64)
        low = low.astype(np.float16).astype(np.float64)
        out[..., at : at + 32] = np.clip(np.rint((part - low) / step), 0, 2**bits - 1) * step + low
    return np.swapaxes(out, axis, -1)


def coded(x: NpArray, name: str, default: bool) -> NpArray:
    """x [seeds, rows, d] packed as a row of OURS and unpacked, in the default form or the table's."""
    bits, scale, *centered = name.split()
    form = "groups" if default else "inner" if scale == "inner" else "head"
    scale = {"inner": "raw"}.get(scale, scale)
    mean, d = (x.mean(1, keepdims=True) if centered else 0.0), x.shape[-1]
    packed = kv_codes.encode((x - mean).reshape(-1, d).astype(np.float32), None, int(bits), d, 3, scale, form)
    return np.asarray(kv_codes.decode(packed, None, int(bits), d, 3, form).reshape(x.shape) + mean)


@lru_cache(maxsize=4)
def drawn(column: str) -> tuple[NpArray, NpArray, NpArray, NpArray]:
    """The toys of all seeds, stacked, and what attention gives with exact keys and values."""
    d, rows = (256, 968) if column == "outliers256" else (64, 177)
    toys = (toy(s, d, rows, column.startswith("outliers")) for s in range(SEEDS[column]))
    q, k, v = (np.stack(x) for x in zip(*toys, strict=True))
    return q, k, v, attended(q, k, v)


@lru_cache(maxsize=256)
def errors(column: str, row: str, default: bool = False) -> NpArray:
    """Square error of attention's result over its square, one for each seed."""
    q, k, v, want = drawn(column)
    values = column == "values"
    if default:  # its factors for groups take sixteen tries
        q, k, v, want = (x[:48] if k.shape[-1] == 64 else x[:6] for x in (q, k, v, want))
    x = v if values else k
    if row.startswith("kivi"):
        y = kivi(x, int(row[-1]), -1 if values else -2)
    else:
        y = block(x, row) if row in FOREIGN else coded(x, row, default)
    got = attended(q, k, y) if values else attended(q, y, v)
    return np.asarray(((got - want) ** 2).sum((1, 2)) / (want**2).sum((1, 2)))


def luck(column: str, picks: NpArray) -> NpArray:
    """Mean logarithm of how far the foreign rows are from the table on some seeds: what these seeds do to any row."""
    found = [np.log(errors(column, row)[picks].mean(-1) / table[column]) for row, table in FOREIGN.items()]
    return np.asarray(np.mean(found, axis=0))


def picks(column: str) -> NpArray:
    """Seeds [4000, 6]: as many at a time as the table's mean is of."""
    return np.random.default_rng(0).integers(0, SEEDS[column], (4000, MEANS_OF[column]))


# --- the table -------------------------------------------------------------------------------------------------

COLUMNS = sorted(SEEDS)
ROUNDING = 0.03
"""Two digits, for most figures; what it adds to an interval."""

APART = {("plain", "4 norm"): 0.70, ("plain", "4 least_squares"): 0.70, ("outliers256", "3 inner"): 1.45}
"""Their ratios: beside the other formats these three of 33 are outside of what six or three seeds give, or at its edge.
The first two are one set of codes, and ours err less; the third is a form that is not the default."""


def cells(rows: dict[str, dict[str, float]], *columns: str) -> list[tuple[str, str]]:
    return [(column, row) for column in columns for row in rows if column in rows[row]]


@pytest.mark.parametrize("column", COLUMNS)
def test_the_reading_is_one_that_the_other_formats_may_have_had(column: str) -> None:
    low, high = np.quantile(luck(column, picks(column)), [0.025, 0.975])
    assert low - ROUNDING < 0 < high + ROUNDING


@pytest.mark.parametrize(("column", "row"), cells(FOREIGN, "outliers", "values"))
def test_other_formats_come_out_as_in_the_table(column: str, row: str) -> None:
    assert abs(errors(column, row).mean() / FOREIGN[row][column] - 1) < (0.15 if column == "outliers" else 0.05)


@pytest.mark.parametrize(("column", "row"), cells(OURS, "outliers", "values"))
def test_our_rows_come_out_as_in_the_table(column: str, row: str) -> None:
    assert abs(errors(column, row).mean() / OURS[row][column] - 1) < (0.1 if column == "outliers" else 0.05)


@pytest.mark.parametrize(("column", "row"), cells(OURS, *COLUMNS))
def test_our_rows_stand_to_the_other_formats_as_in_the_table(column: str, row: str) -> None:
    """Divided by what the same seeds do to the foreign rows, the table's figure is among the central 95 %."""
    found, some = errors(column, row), picks(column)
    ratios = np.log(found[some].mean(1) / OURS[row][column]) - luck(column, some)
    low, high = np.quantile(ratios, [0.025, 0.975])
    if (column, row) in APART:
        ratio = math.exp(math.log(found.mean() / OURS[row][column]) - luck(column, np.arange(SEEDS[column])))
        assert abs(ratio / APART[column, row] - 1) < 0.1
    else:
        assert low - ROUNDING < 0 < high + ROUNDING


@pytest.mark.parametrize(("column", "row"), [(c, r) for c, r in cells(OURS, *COLUMNS) if "inner" not in r])
def test_the_default_form_errs_less_than_every_row(column: str, row: str) -> None:
    assert errors(column, row, default=True).mean() < OURS[row][column]


# --- what the table is read for --------------------------------------------------------------------------------


@pytest.mark.parametrize("default", [False, True])
def test_centring_repairs_biased_channels_and_costs_nothing(default: bool) -> None:
    for bits in (3, 4):
        raw, centered = (errors("outliers", f"{bits} norm{c}", default).mean() for c in ("", " centered"))
        assert centered < raw / 4
        raw, centered = (errors("plain", f"{bits} norm{c}", default).mean() for c in ("", " centered"))
        assert centered < 1.1 * raw


@pytest.mark.parametrize("column", ["plain", "outliers", "outliers256"])
@pytest.mark.parametrize("bits", [3, 4])
def test_the_inner_product_variant_loses_at_equal_bits(bits: int, column: str) -> None:
    """Unbiased as its paper says, and worse where a softmax reads it."""
    assert errors(column, f"{bits} inner").mean() > 1.8 * errors(column, f"{bits} norm").mean()
