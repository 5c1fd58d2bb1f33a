"""From an instruction to the sentence that a policy was trained on: the steps of `IO.text_steps` before `tokenise`.

Each takes the text so far and the normalised state (None where the policy has none) and gives the next text.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np

from vlac.errors import ArtifactError, InputError
from vlac.io import Step
from vlac.runtime.observation import Array

State = Array | None
PromptStep = Callable[..., str]


def ensure_suffix(text: str, state: State = None, *, suffix: str) -> str:
    """`text`, with `suffix` appended unless it ends so already."""
    return text if text.endswith(suffix) else text + suffix


def clean_task(text: str, state: State = None) -> str:
    """White space stripped at both ends; then underscores and line breaks become blanks (pi0.5, pi0-FAST)."""
    return text.strip().replace("_", " ").replace("\n", " ")


def state_bins(state: Array, bins: int = 256) -> list[int]:
    """Bin of each normalised state value: how many of the edges -1 + 2k/bins (k = 0 .. bins-1) it reaches, minus 1.

    Values below -1 give -1, values from 1 - 2/bins on give bins - 1: no clipping, as LeRobot and openpi do it.
    """
    edges = np.linspace(-1.0, 1.0, bins + 1)[:-1]
    return [int(v) - 1 for v in np.searchsorted(edges, state.astype(np.float64).reshape(-1), side="right")]


def state_in_prompt(text: str, state: State, *, before: str, between: str, after: str, bins: int = 256) -> str:
    """before + text + between + the state's bins joined by blanks + after."""
    if state is None:
        raise InputError("this policy reads its state in the prompt, and no state is given", remedy="give state=")
    return f"{before}{text}{between}{' '.join(map(str, state_bins(state, bins)))}{after}"


def lowercase(text: str, state: State = None) -> str:
    """Python's str.lower."""
    return text.lower()


def surround(text: str, state: State = None, *, before: str, after: str) -> str:
    """before + text + after."""
    return f"{before}{text}{after}"


def default_text(text: str, state: State = None, *, default: str) -> str:
    """`text`, or `default` where it is empty."""
    return text or default


def words_only(text: str, state: State = None) -> str:
    """Lower-case, without anything but letters, digits, underscores and white space."""
    return re.sub(r"[^\w\s]", "", text.lower())


PROMPT_STEPS: dict[str, PromptStep] = {
    "ensure_suffix": ensure_suffix,
    "clean_task": clean_task,
    "state_in_prompt": state_in_prompt,
    "lowercase": lowercase,
    "surround": surround,
    "default_text": default_text,
    "words_only": words_only,
}
READ_STATE = ("state_in_prompt",)
"""Steps that need the state."""


def reads_state(steps: Iterable[Step]) -> bool:
    """Whether a prompt holds the robot's state."""
    return any(s.step in READ_STATE for s in steps)


def prompt_text(steps: Iterable[Step], task: str, state: State) -> str:
    """The sentence that is tokenised; `steps` without the final `tokenise`."""
    for step in steps:
        task = PROMPT_STEPS[step.step](task, state, **step.params)
    return task


def check_prompt_steps(steps: Iterable[Step], where: str) -> None:
    """Raises ArtifactError when a step is unknown or its parameters are not texts and numbers that it takes."""
    for step in steps:
        if step.step not in PROMPT_STEPS:
            raise ArtifactError(
                f"{where}: step {step.step!r} is unknown to this vlac; it knows {', '.join(PROMPT_STEPS)}, and "
                "tokenise at the end",
                remedy="update vlac on this machine, or compile again with this version",
            )
        try:
            wanted = inspect.signature(PROMPT_STEPS[step.step])
            wanted.bind("", None, **step.params)
        except TypeError as error:
            raise ArtifactError(
                f"{where}: step {step.step}: wrong parameters {dict(step.params)}: {error}", remedy="compile again"
            ) from None
        for name, value in step.params.items():
            if not _fits(value, wanted.parameters[name].annotation):
                raise ArtifactError(f"{where}: step {step.step}: wrong parameters: {name} is {value!r}")


def _fits(value: Any, annotation: str) -> bool:
    if annotation == "int":
        return isinstance(value, int) and not isinstance(value, bool) and value > 0
    return isinstance(value, str)
