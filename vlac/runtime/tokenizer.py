"""From an instruction to token ids: the steps of `IO.text_steps` by name, on the Hugging Face `tokenizers` library.

Truncation is the original's: the first ids stay, and who asked learns what text was lost. Padding ids are 0; they are
masked, so their value reaches nothing.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from vlac.errors import ArtifactError, InputError
from vlac.io import Step
from vlac.runtime.prompt import State, check_prompt_steps, ensure_suffix, prompt_text

if TYPE_CHECKING:
    from tokenizers import Encoding, Tokenizer

__all__ = [
    "Prompt",
    "check_text_steps",
    "encode_task",
    "ensure_suffix",
    "load_tokenizer",
    "max_prompt_tokens",
    "tokenise",
]

PADDINGS = ("max_length", "longest", "do_not_pad")


@dataclass(frozen=True)
class Prompt:
    """Token ids i32[T], which of them are real bool[T], and the text that truncation dropped ("" if none)."""

    ids: npt.NDArray[np.int32]
    valid: npt.NDArray[np.bool_]
    lost: str = ""


def load_tokenizer(data: bytes, where: str = "tokenizer.json") -> Tokenizer:
    """A tokenizer from the bytes of tokenizer.json; truncation and padding that it carries are switched off."""
    from tokenizers import Tokenizer

    try:
        tokenizer = Tokenizer.from_buffer(data)
    except Exception as error:  # the library raises plain Exception in some versions, ValueError in others
        raise ArtifactError(
            f"{where}: the tokenizer does not load: {error}",
            remedy="the file is damaged or needs a newer `tokenizers`; copy the artifact again or update the package",
        ) from None
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


def tokenise(
    tokenizer: Tokenizer,
    text: str,
    *,
    max_length: int,
    padding: str = "longest",
    truncation: bool = True,
    add_special_tokens: bool = True,
    final_id: int | None = None,
) -> Prompt:
    """`text` as at most `max_length` ids; `final_id` is appended unless they end so.

    padding "max_length" fills up with id 0, marked not valid; "longest" and "do_not_pad" leave one prompt as it is.
    A longer text is cut at the right as Hugging Face's fast tokenizers cut it (special tokens keep their place);
    with truncation=False it is refused.
    """
    encoding = tokenizer.encode(text, add_special_tokens=add_special_tokens)
    final = [] if final_id is None or encoding.ids[-1:] == [final_id] else [final_id]
    max_length -= len(final)
    lost = ""
    if len(encoding.ids) > max_length:
        if not truncation:
            raise InputError(
                f"the task makes {len(encoding.ids)} tokens, this policy takes {max_length}", remedy="shorten the task"
            )
        encoding, lost = _truncate(tokenizer, text, max_length, add_special_tokens)
    count = len(encoding.ids) + len(final)
    size = max_length + len(final) if padding == "max_length" else count
    ids, valid = np.zeros(size, dtype=np.int32), np.zeros(size, dtype=np.bool_)
    ids[:count], valid[:count] = [*encoding.ids, *final], True
    return Prompt(ids, valid, lost)


def _truncate(tokenizer: Tokenizer, text: str, max_length: int, special: bool) -> tuple[Encoding, str]:
    plain = tokenizer.encode(text, add_special_tokens=False)
    room = max(0, max_length - (tokenizer.num_special_tokens_to_add(False) if special else 0))
    lost = text[plain.offsets[room][0] :]
    plain.truncate(room)
    return tokenizer.post_process(plain, None, special), lost


def check_text_steps(steps: Iterable[Step], where: str) -> None:
    """Raises ArtifactError unless the steps are known, have their parameters, and end in one `tokenise`."""
    steps = tuple(steps)
    if not steps:
        return
    for i, step in enumerate(steps):
        if (step.step == "tokenise") != (i == len(steps) - 1):
            raise ArtifactError(
                f"{where}: step {step.step!r} is out of place: there is one tokenise at the end",
                remedy="update vlac on this machine, or compile again with this version",
            )
    check_prompt_steps(steps[:-1], where)
    length, padding = steps[-1].params.get("max_length"), steps[-1].params.get("padding", "longest")
    extra = set(steps[-1].params) - {"max_length", "padding", "truncation", "add_special_tokens", "final_id"}
    if not isinstance(length, int) or length < 1 or extra:
        raise ArtifactError(f"{where}: wrong parameters {[dict(s.params) for s in steps]}", remedy="compile again")
    if padding not in PADDINGS:
        raise ArtifactError(f"{where}: padding {padding!r} is none of {', '.join(PADDINGS)}", remedy="compile again")


def max_prompt_tokens(steps: Iterable[Step]) -> int:
    """The `max_length` of the tokenise step; 0 for a policy that reads no text."""
    return next((int(s.params["max_length"]) for s in steps if s.step == "tokenise"), 0)


def encode_task(
    steps: Iterable[Step], tokenizer: Tokenizer, task: Any, *, strict: bool = False, state: State = None
) -> Prompt:
    """An instruction through `IO.text_steps`; `state` is the normalised state, for prompts that hold it.

    Raises InputError when it is not text, makes no token, or is too long and strict=True.
    """
    if not isinstance(task, str):
        raise InputError(f"task is a {type(task).__name__}, expected text", remedy='give task="pick up the cube"')
    try:
        task.encode("utf-8")
    except UnicodeEncodeError as error:
        raise InputError(f"task {task!r} is not Unicode text: {error.reason}", remedy="decode it as UTF-8") from None
    steps, prompt = tuple(steps), None
    if steps and steps[-1].step == "tokenise":
        prompt = tokenise(tokenizer, prompt_text(steps[:-1], task, state), **steps[-1].params)
    if prompt is None or not prompt.valid.any():
        raise InputError(f"task {task!r} makes no token", remedy="give an instruction in words")
    if prompt.lost and strict:
        raise InputError(
            f"{truncation_notice(prompt)} (strict=True refuses that)", remedy="shorten the task, or give strict=False"
        )
    return prompt


def truncation_notice(prompt: Prompt) -> str:
    """One sentence about what was lost."""
    kept = int(prompt.valid.sum())
    return f"the task is longer than {kept} tokens and is cut as the original cuts it; lost: {prompt.lost!r}"
