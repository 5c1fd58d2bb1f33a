"""FAST tokens to actions, and prompts that hold the state: against the tokenizers library, numpy and the DCT itself."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer

from vlac.errors import ArtifactError, InputError, VlacWarning
from vlac.io import Step
from vlac.runtime.actions import apply_action_steps
from vlac.runtime.fast import BYTES, decode_pieces, fast_decode, inverse_dct, without
from vlac.runtime.prompt import check_prompt_steps, clean_task, prompt_text, state_bins, state_in_prompt

FILE = Path(__file__).parent / "golden" / "pi0fast_tiny" / "checkpoint" / "fast" / "bpe_tokenizer" / "tokenizer.json"
Array = np.ndarray[Any, Any]


def pieces() -> list[str]:
    vocabulary = json.loads(FILE.read_text(encoding="utf-8"))["model"]["vocab"]
    return sorted(vocabulary, key=vocabulary.__getitem__)


PIECES = pieces()
LIBRARY = Tokenizer.from_file(str(FILE))


def test_the_alphabet_has_every_byte_once() -> None:
    assert sorted(BYTES.values()) == list(range(256))
    assert BYTES["A"] == 65 and BYTES["Ġ"] == 32 and BYTES["Ċ"] == 10


@given(st.lists(st.integers(0, len(PIECES) - 1), max_size=40))
@settings(max_examples=200, deadline=None)
def test_pieces_decode_as_the_library_decodes_them(ids: list[int]) -> None:
    assert decode_pieces([PIECES[i] for i in ids]) == LIBRARY.decode(ids, skip_special_tokens=False)


def dct(x: Array) -> Array:
    """The orthonormal DCT-II along axis 0, by its definition."""
    n = len(x)
    t = np.arange(n)
    rows = [np.cos(np.pi * (2 * t + 1) * k / (2 * n)) * np.sqrt((1 if k == 0 else 2) / n) for k in range(n)]
    return np.asarray(np.array(rows) @ x)


@pytest.mark.parametrize("n", [1, 2, 7, 50])
def test_the_inverse_dct_inverts(n: int) -> None:
    x = np.random.default_rng(n).standard_normal((n, 3))
    np.testing.assert_allclose(inverse_dct(dct(x)), x, atol=1e-6)


STOP, FIRST, REMOVE = 5, 300, [7, 8, 9]


def decode(ids: list[int], **changes: Any) -> Array:
    settings_: dict[str, Any] = {
        "pieces": PIECES, "first": FIRST, "stop": STOP, "remove": REMOVE, "begin": [], "min_token": -40,
        "scale": 10.0, "rows": 4, "columns": 2,
    }  # fmt: skip
    return fast_decode(np.array([ids], np.float32), **{**settings_, **changes})


def encode(coefficients: Array) -> list[int]:
    """Rounded coefficients as generated ids."""
    text = "".join(chr(int(c) + 40) for c in np.rint(coefficients * 10).reshape(-1))
    return [FIRST - i for i in LIBRARY.encode(text, add_special_tokens=False).ids]


def test_actions_come_back_to_the_coefficients_rounding() -> None:
    actions = np.random.default_rng(0).uniform(-1, 1, (4, 2))
    ids = encode(dct(actions))
    rounded = inverse_dct(np.rint(dct(actions) * 10) / 10)
    np.testing.assert_allclose(decode([*ids, STOP, 0, 0]), rounded, atol=1e-6)
    np.testing.assert_allclose(decode([*REMOVE, *ids, STOP, 77]), rounded, atol=1e-6)
    assert np.abs(rounded - actions).max() < 0.15


def test_a_short_answer_is_filled_with_zeros_and_a_long_one_is_cut() -> None:
    one = encode(np.array([3.0]))
    expected = np.zeros((4, 2))
    expected[0, 0] = 3.0
    np.testing.assert_allclose(decode([*one, STOP]), inverse_dct(expected), atol=1e-6)
    many = encode(np.arange(12) / 10.0)
    np.testing.assert_allclose(decode(many), inverse_dct((np.arange(8) / 10.0).reshape(4, 2)), atol=1e-6)
    assert decode([STOP]).shape == (4, 2) and not decode([STOP]).any()


@pytest.mark.parametrize("ids", [[FIRST + 1, STOP], [FIRST - len(PIECES), STOP], [3] * 6])
def test_an_answer_that_is_no_action_is_zeros_and_says_so(ids: list[int]) -> None:
    with pytest.warns(VlacWarning, match="tokens are no action tokens"):
        assert not decode(ids).any()


def test_an_answer_may_have_to_begin_as_trained() -> None:
    one = encode(np.array([3.0]))
    with pytest.warns(VlacWarning, match="does not begin as trained"):
        assert not decode([*one, STOP], begin=[7, 8]).any()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert decode([*REMOVE, *one, STOP], begin=[7, 8]).any()


def test_every_occurrence_is_taken_out() -> None:
    assert without([1, 7, 8, 9, 2, 7, 8, 9, 7, 8], REMOVE) == [1, 2, 7, 8]
    assert without([1, 2], []) == [1, 2]


# --- relative actions and prompts ------------------------------------------------------------------------------


def test_the_state_is_added_to_its_columns() -> None:
    steps = (Step("add_state", {"columns": [0, 2]}),)
    state = np.array([1.0, 10.0, 100.0, 1000.0], np.float32)
    out = apply_action_steps(steps, np.ones((2, 3), np.float32), state)
    np.testing.assert_array_equal(out, [[2.0, 1.0, 101.0]] * 2)
    with pytest.raises(InputError, match="relative to the state"):
        apply_action_steps(steps, np.ones((2, 3), np.float32))


def test_a_task_is_cleaned() -> None:
    assert clean_task(" \n stack_the green\ncup _ ") == "stack the green cup  "
    assert clean_task("pick up the cube") == "pick up the cube"


@given(st.lists(st.floats(-3, 3, width=32), min_size=1, max_size=8))
@settings(max_examples=200, deadline=None)
def test_bins_are_numpys_digitize(values: list[float]) -> None:
    x = np.array(values, np.float32)
    assert state_bins(x) == (np.digitize(x, np.linspace(-1, 1, 257)[:-1]) - 1).tolist()


def test_bins_are_not_clipped() -> None:
    assert state_bins(np.array([-1.5, -1.0, -0.9922, 0.0, 1.0, 7.0], np.float32)) == [-1, 0, 0, 128, 255, 255]


def test_a_prompt_holds_the_state() -> None:
    parts = {"before": "Task: ", "between": ", State: ", "after": ";\nAction: "}
    steps = (Step("clean_task"), Step("state_in_prompt", parts))
    state = np.array([[-2.0, 0.0, 0.5]], np.float32)
    assert prompt_text(steps, "open_it ", state) == "Task: open it, State: -1 128 192;\nAction: "
    assert state_in_prompt("{x}", state, **parts) == "Task: {x}, State: -1 128 192;\nAction: "
    with pytest.raises(InputError, match="no state is given"):
        prompt_text(steps, "open it", None)


@pytest.mark.parametrize(
    "step",
    [
        Step("state_in_prompt", {"before": "a"}),
        Step("state_in_prompt", {"before": "a", "between": "b", "after": 3}),
        Step("state_in_prompt", {"before": "a", "between": "b", "after": "c", "bins": 0}),
        Step("ensure_suffix"),
        Step("shout"),
    ],
)
def test_prompt_steps_are_checked_before_use(step: Step) -> None:
    with pytest.raises(ArtifactError, match=r"wrong parameters|unknown to this vlac"):
        check_prompt_steps((step,), "io.text_steps")
