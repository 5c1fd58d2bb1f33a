"""Prompts are what Hugging Face's fast tokenizers make of them: cut, padded, special tokens in place."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer
from tokenizers.processors import TemplateProcessing

from vlac.errors import ArtifactError, InputError
from vlac.io import Step
from vlac.runtime.tokenizer import (
    check_text_steps,
    encode_task,
    ensure_suffix,
    load_tokenizer,
    max_prompt_tokens,
    tokenise,
)

BYTES = (Path(__file__).parent / "golden" / "smolvla_tiny" / "checkpoint" / "vlm" / "tokenizer.json").read_bytes()


def specials(template: str) -> Tokenizer:
    tokenizer = load_tokenizer(BYTES)
    tokenizer.add_special_tokens(["<bos>", "<eos>"])
    pairs = [(t, tokenizer.token_to_id(t)) for t in ("<bos>", "<eos>")]
    tokenizer.post_processor = TemplateProcessing(single=template, pair=f"{template} $B:1", special_tokens=pairs)
    return tokenizer


TEMPLATES = {"none": "$A:0", "bos": "<bos>:0 $A:0", "both": "<bos>:0 $A:0 <eos>:0"}


@settings(max_examples=150, deadline=None)
@given(
    st.text(st.characters(exclude_categories=["Cs"]), max_size=40),
    st.integers(1, 24),
    st.sampled_from(sorted(TEMPLATES)),
    st.booleans(),
)
def test_prompts_are_cut_as_hugging_face_cuts_them(text: str, max_length: int, template: str, special: bool) -> None:
    reference, mine = specials(TEMPLATES[template]), specials(TEMPLATES[template])
    if special and max_length <= reference.num_special_tokens_to_add(False):
        return
    reference.enable_truncation(max_length)
    want = reference.encode(text, add_special_tokens=special).ids
    prompt = tokenise(mine, text, max_length=max_length, padding="longest", add_special_tokens=special)
    assert prompt.ids.tolist() == want and prompt.valid.all()
    assert prompt.ids.dtype == np.int32 and prompt.valid.dtype == np.bool_
    whole = mine.encode(text, add_special_tokens=special).ids
    assert bool(prompt.lost) == (len(whole) > max_length)
    assert text.endswith(prompt.lost)
    padded = tokenise(mine, text, max_length=max_length, padding="max_length", add_special_tokens=special)
    assert len(padded.ids) == len(padded.valid) == max_length
    assert padded.ids[padded.valid].tolist() == want and not padded.ids[~padded.valid].any()


def test_truncation_and_padding_inside_the_file_are_ignored() -> None:
    data: dict[str, Any] = json.loads(BYTES)
    data["truncation"] = {"direction": "Left", "max_length": 2, "strategy": "LongestFirst", "stride": 0}
    data["padding"] = {
        "strategy": {"Fixed": 64}, "direction": "Left", "pad_to_multiple_of": None, "pad_id": 0, "pad_type_id": 0,
        "pad_token": "x",
    }  # fmt: skip
    text = "push the blue block"
    prompt = tokenise(load_tokenizer(json.dumps(data).encode()), text, max_length=48)
    assert prompt.ids.tolist() == load_tokenizer(BYTES).encode(text).ids and prompt.lost == ""


def test_without_truncation_a_long_task_is_refused() -> None:
    with pytest.raises(InputError, match=r"the task makes \d+ tokens, this policy takes 3"):
        tokenise(load_tokenizer(BYTES), "push the blue block", max_length=3, truncation=False)


def test_a_suffix_is_appended_once() -> None:
    assert ensure_suffix("go", suffix="\n") == "go\n" == ensure_suffix("go\n", suffix="\n")
    assert ensure_suffix("go\n\n", suffix="\n") == "go\n\n"


@pytest.mark.parametrize("name", ["smolvla_tiny", "smolvla_letterbox"])
def test_recorded_tasks_give_lerobots_ids(name: str, golden: Callable[[str], Any]) -> None:
    folder = golden(name)
    tokenizer = load_tokenizer((folder.checkpoint / "vlm" / "tokenizer.json").read_bytes())
    text = json.loads((folder.checkpoint / "policy_preprocessor.json").read_text())["steps"][3]["config"]
    params = {k: text[k] for k in ("max_length", "padding", "truncation")}
    steps = (Step("ensure_suffix", {"suffix": "\n"}), Step("tokenise", params))
    check_text_steps(steps, "io.text_steps")
    assert max_prompt_tokens(steps) == text["max_length"]
    for i, task in enumerate(folder.tasks):
        mask = folder.arrays[f"obs{i}/mask"][0]
        prompt = encode_task(steps, tokenizer, task)
        np.testing.assert_array_equal(prompt.valid, mask)
        np.testing.assert_array_equal(prompt.ids[mask], folder.arrays[f"obs{i}/tokens"][0][mask])


def test_a_task_without_any_token_is_refused() -> None:
    steps = (Step("tokenise", {"max_length": 8}),)
    with pytest.raises(InputError, match="task '' makes no token"):
        encode_task(steps, load_tokenizer(BYTES), "")


@pytest.mark.parametrize("data", [b"", b"{", b"{}", b"null", b"\xff\xfe", BYTES[:400]])
def test_a_broken_tokenizer_file_is_named(data: bytes) -> None:
    with pytest.raises(ArtifactError, match=r"out/tokenizer\.json: the tokenizer does not load") as caught:
        load_tokenizer(data, "out/tokenizer.json")
    assert caught.value.remedy
