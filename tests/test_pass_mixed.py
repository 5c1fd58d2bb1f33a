"""mixed-precision: within budgets of drift and size, better than uniform, a table that is edited and passed back."""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from conftest import GoldenFolder
from hypothesis import given
from hypothesis import strategies as st

from vlac.api import apply_passes, lower_for
from vlac.checkpoint import read_policy
from vlac.errors import Inapplicable
from vlac.formats import FORMATS
from vlac.passes import mixed_precision
from vlac.passes.mixed_precision import USABLE, Bench, fewest, limit_of, size_of, steps_up, stored
from vlac.policy import Policy
from vlac.registry import targets, told

pytest.importorskip("torch")


@pytest.fixture(scope="module")
def tiny(golden: Callable[[str], GoldenFolder]) -> Policy:
    return read_policy(str(golden("smolvla_tiny").checkpoint))


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("mixed") / "table.txt"


@pytest.fixture(scope="module")
def mixed(tiny: Policy, written: Path) -> Policy:
    return apply_passes(tiny, [f"mixed-precision:budget=rel_l2<=0.05,high=q8_0,samples=1,write={written}"])


def test_the_budget_holds_and_bytes_are_saved(mixed: Policy) -> None:
    f = mixed.history[0].figures
    assert f["drift"] <= 0.05 < f["drift_all_q4_0"]
    assert f["bytes_all_q4_0"] < f["bytes"] < f["bytes_all_q8_0"]


def test_it_beats_every_uniform_format_of_its_size(tiny: Policy, written: Path, mixed: Policy) -> None:
    """With as many bytes as a uniform format takes, the chunk drifts less; hardly at q8_0, where f16 costs 8 bits more
    and q5_0 rounds 8 times worse."""
    f = mixed.history[0].figures
    recipe = f"mixed-precision:high=f16,samples=1,write={written.with_name('sizes.txt')},size=<="
    for fmt in ("q5_0", "q8_0"):
        got = apply_passes(tiny, [f"{recipe}{f[f'bytes_all_{fmt}']}B"]).history[0].figures
        assert got["bytes"] <= f[f"bytes_all_{fmt}"]
        assert got["drift"] <= f[f"drift_all_{fmt}"] * (0.8 if fmt == "q5_0" else 1), fmt


def test_the_plan_reaches_the_program(mixed: Policy) -> None:
    program, _, _ = lower_for(mixed, targets.get("gguf-f32"), {})
    plan = dict(mixed.precision)
    assert {n: p.format for n, p in program.params.items() if n in plan} == plan
    assert len(plan) == mixed.history[0].figures["weights"] and len(set(plan.values())) > 1


def test_a_table_is_edited_and_passed_back(tiny: Policy, mixed: Policy, written: Path, tmp_path: Path) -> None:
    again = apply_passes(tiny, [f"mixed-precision:table={written}"])
    assert again.precision == mixed.precision and again.history[0].figures["bytes"] == mixed.history[0].figures["bytes"]
    lines = written.read_text(encoding="utf-8").splitlines()
    assert lines[0].startswith("#")
    name = lines[1].split()[0]
    edited = tmp_path / "edited.txt"
    edited.write_text(f"{name} f16  # by hand\n" + "\n".join(lines[2:]), encoding="utf-8")
    assert dict(apply_passes(tiny, [f"mixed-precision:table={edited}"]).precision)[name] == "f16"
    for text, says in (
        (f"{name}x f16", f"no weight '{name}x'"),
        (f"{name} q3", "line 1"),
        (lines[1], "leaves out"),
    ):
        edited.write_text(text, encoding="utf-8")
        with pytest.raises(Inapplicable, match=says):
            apply_passes(tiny, [f"mixed-precision:table={edited}"])
    with pytest.raises(Inapplicable, match="is no file"):
        apply_passes(tiny, ["mixed-precision:table=none.txt"])


def test_a_killed_run_goes_on_and_tells_how_far_it_is(
    tiny: Policy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = [f"mixed-precision:budget=0.2,high=q5_0,samples=1,write={tmp_path / 'table.txt'}"]
    drifts, calls = Bench.drifts, 0

    def counted(self: Bench, formats: dict[str, str]) -> tuple[float, ...]:
        nonlocal calls
        calls += 1
        if calls == 20:
            raise KeyboardInterrupt
        return drifts(self, formats)

    monkeypatch.setattr(mixed_precision.Bench, "drifts", counted)
    shown: list[tuple[int, int]] = []
    with pytest.raises(KeyboardInterrupt), told(lambda _, done, total: shown.append((done, total))):
        apply_passes(tiny, recipe)
    assert len(shown) == 20 and shown[-1][0] == 19 and shown[-1][1] > 40
    kept = tmp_path / "table.txt.measured"
    kept.write_text(kept.read_text(encoding="utf-8")[:-9], encoding="utf-8")  # torn while writing
    before, calls = 18, 1000
    after = apply_passes(tiny, recipe)
    total = calls - 1000
    calls = 1000
    assert apply_passes(tiny, recipe).precision == after.precision and calls == 1000
    whole = [line for line in kept.read_text(encoding="utf-8").splitlines() if line.endswith("}")]
    assert len(set(whole)) == before + total


# --- pieces ------------------------------------------------------------------------------------------------------


@given(st.integers(0, 60), st.integers(0, 60))
def test_bisection(count: int, threshold: int) -> None:
    assert fewest(count, lambda n: n >= threshold) == min(count, threshold)


@given(st.lists(st.tuples(st.floats(0.01, 1), st.floats(0.01, 1), st.integers(1, 99)), min_size=1, max_size=8))
def test_steps_go_up_to_the_finest_the_worthiest_first(rows: list[tuple[float, float, int]]) -> None:
    names, rungs = [f"w{i}" for i in range(len(rows))], ("a", "b", "c")
    alone = {}
    for name, (first, share, _) in zip(names, rows, strict=True):
        alone |= {(name, "a"): first, (name, "b"): first * share, (name, "c"): 0.0}
    cost = {(n, r): k * i for n, (_, _, k) in zip(names, rows, strict=True) for i, r in enumerate(rungs)}
    order = steps_up(alone, lambda n, r: cost[n, r], names, rungs)
    assert dict(order) == dict.fromkeys(names, "c")
    worth, at = [], dict.fromkeys(names, "a")
    for name, rung in order:
        worth.append((alone[name, at[name]] ** 2 - alone[name, rung] ** 2) / (cost[name, rung] - cost[name, at[name]]))
        at[name] = rung
    assert all(a >= b - 1e-9 for a, b in pairwise(worth))


@pytest.mark.parametrize("fmt", USABLE)
def test_storing_is_as_good_as_the_format(fmt: str) -> None:
    w = np.random.default_rng(0).standard_normal((6, 40)).astype(np.float32)
    error = np.linalg.norm(stored(w, fmt) - w) / np.linalg.norm(w)
    assert stored(w, fmt).shape == w.shape
    assert error <= 2.0 ** (1.5 - FORMATS[fmt].bits) * 2 if FORMATS[fmt].bits < 16 else error < 5e-3


def test_limits() -> None:
    assert [limit_of(t) for t in ("rel_l2<=0.02", "<=0.02", "0.02", "")] == [0.02, 0.02, 0.02, math.inf]
    sizes = [size_of(t) for t in ("<=300MB", "300MB", "0.3GB", "500kB", "7", "")]
    assert sizes == [3e8, 3e8, 3e8, 5e5, 7.0, math.inf]


@pytest.mark.parametrize(
    ("params", "says"),
    [
        ("budget=0", "above 0"),
        ("budget=cos>=0.9", "write rel_l2<=X"),
        ("size=<=many", "such as size<=300MB"),
        ("size<=0MB", "such as size<=300MB"),
        ("samples=1", "give budget=rel_l2<=X, size<=Y"),
        ("budget=0.02,low=q8_0,high=q4_0", "high must be finer"),
        ("budget=0.02,low=int4,high=q8_0", "int4, int8, f16, f32"),
        ("budget=0.02,low=q2", "there are: q4_0"),
        ("budget=1e-6,samples=1,high=q5_0", "weights in q5_0 the chunk drifts by"),
        ("size<=100kB,samples=1,high=q5_0", "weights in q4_0 they take"),
        ("budget=0.02,size<=260kB,samples=1,high=q8_0", "a drift of 0.02 takes"),
    ],
)
def test_refusals(tiny: Policy, params: str, says: str) -> None:
    with pytest.raises(Inapplicable) as raised:
        apply_passes(tiny, [f"mixed-precision:{params}"])
    assert says in str(raised.value)
