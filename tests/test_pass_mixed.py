"""mixed-precision: within the budget, cheaper than uniform, in the right order, and stored as measured."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from conftest import GoldenFolder
from hypothesis import given
from hypothesis import strategies as st

from vlac.api import apply_passes, lower_for
from vlac.checkpoint import read_policy
from vlac.errors import Inapplicable
from vlac.formats import FORMATS
from vlac.passes.mixed_precision import USABLE, Bench, fewest, nbytes, plan_of, stored
from vlac.policy import Policy
from vlac.registry import targets

pytest.importorskip("torch")


@pytest.fixture(scope="module")
def tiny(golden: Callable[[str], GoldenFolder]) -> Policy:
    return read_policy(str(golden("smolvla_tiny").checkpoint))


@pytest.fixture(scope="module")
def mixed(tiny: Policy) -> Policy:
    return apply_passes(tiny, ["mixed-precision:budget=0.08,samples=1"])


def test_the_budget_holds_and_bytes_are_saved(mixed: Policy) -> None:
    f = mixed.history[0].figures
    assert f["drift"] <= 0.08 < f["drift_all_q4_0"]
    assert f["bytes_all_q4_0"] < f["bytes"] < f["bytes_all_q8_0"]
    assert 0 < f["promoted"] < f["linears"]


def test_the_plan_reaches_the_program(mixed: Policy) -> None:
    program, _, _ = lower_for(mixed, targets.get("gguf-f32"), {})
    formats = [p.format for n, p in program.params.items() if n in dict(mixed.precision)]
    assert len(formats) == len(mixed.precision) == mixed.history[0].figures["linears"]
    assert formats.count("q8_0") == mixed.history[0].figures["promoted"]


def test_the_order_is_worth_something(tiny: Policy, mixed: Policy) -> None:
    """As many bytes promoted from the other end of the list drift more."""
    names = [n for n, _ in mixed.precision]
    bench = Bench.of(tiny, 1, "")
    size, worst = mixed.history[0].figures["bytes"], 0
    while nbytes(bench.program.params, plan_of(names[::-1], worst, "q4_0", "q8_0")) < size:
        worst += 1
    backwards = bench.drift(plan_of(names[::-1], worst, "q4_0", "q8_0"))
    assert backwards > 1.2 * mixed.history[0].figures["drift"]


@given(st.integers(0, 60), st.integers(0, 60))
def test_bisection(count: int, threshold: int) -> None:
    assert fewest(count, lambda n: n >= threshold) == min(count, threshold)


@pytest.mark.parametrize("fmt", USABLE)
def test_storing_is_as_good_as_the_format(fmt: str) -> None:
    w = np.random.default_rng(0).standard_normal((6, 40)).astype(np.float32)
    error = np.linalg.norm(stored(w, fmt) - w) / np.linalg.norm(w)
    assert stored(w, fmt).shape == w.shape
    assert error <= 2.0 ** (1.5 - FORMATS[fmt].bits) * 2 if FORMATS[fmt].bits < 16 else error < 5e-3


@pytest.mark.parametrize(
    ("params", "says"),
    [
        ("budget=0", "above 0"),
        ("budget=0.02,low=q8_0,high=q4_0", "high must be finer"),
        ("budget=0.02,low=q2", "there are: int4"),
        ("budget=1e-6,samples=1", "all 43 linears in q8_0 the chunk drifts by"),
    ],
)
def test_refusals(tiny: Policy, params: str, says: str) -> None:
    with pytest.raises(Inapplicable, match=says):
        apply_passes(tiny, [f"mixed-precision:{params}"])
