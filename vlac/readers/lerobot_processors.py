"""LeRobot's processor files (`policy_preprocessor.json`, `policy_postprocessor.json`) as plain data.

Steps are found by registry name at any index; a step that is unknown, or that names Python code, is refused by name.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from vlac.errors import CheckpointError, Unsupported
from vlac.io import Step
from vlac.readers.safetensors_file import inside, read_json

PRE, POST = "policy_preprocessor.json", "policy_postprocessor.json"

NEUTRAL = ("to_batch_processor", "device_processor", "action_tokenizer_processor")
"""Steps that change nothing at inference with batch 1 on a CPU."""

TEXT: Mapping[str, tuple[Step, ...]] = {
    **dict.fromkeys(
        ("smolvla_new_line_processor", "pi0_new_line_processor"), (Step("ensure_suffix", {"suffix": "\n"}),)
    ),
    "pi05_prepare_state_tokenizer_processor_step": (
        Step("clean_task"),
        Step("state_in_prompt", {"before": "Task: ", "between": ", State: ", "after": ";\nAction: "}),
    ),
    "pi0_fast_prepare_state_tokenizer_processor_step": (
        Step("clean_task"),
        Step("state_in_prompt", {"before": "Task: ", "between": ", State: ", "after": ";\n"}),
    ),
}
"""Steps that change the text before it is tokenised -> what they do to it."""

SWITCHED = ("relative_actions_processor", "absolute_actions_processor")
"""Steps that act only when their config says enabled."""


_PADDING = {"max_length": "max_length", **dict.fromkeys(("longest", "do_not_pad", "True", "False"), "longest")}
_TRUNCATION = dict.fromkeys(("True", "longest_first", "only_first"), True)
_TRUNCATION |= dict.fromkeys(("False", "None", "do_not_truncate"), False)
"""transformers' spellings; for one prompt "longest" and no padding are the same."""


@dataclass(frozen=True)
class NormStep:
    """A (un)normaliser step: what it says, and the file that should hold its statistics (None when it names none)."""

    eps: float
    features: Mapping[str, Any]
    norm_map: Mapping[str, str]
    state_file: Path | None
    where: str


@dataclass(frozen=True)
class TextStep:
    """The tokenizer step's settings, as LeRobot passes them to the tokenizer."""

    tokenizer_name: str
    max_length: int
    padding: str
    truncation: bool


@dataclass(frozen=True)
class Relative:
    """Actions are relative to the state, but for joints whose name contains one of `exclude`."""

    exclude: tuple[str, ...]
    names: tuple[str, ...]

    def columns(self, action_dim: int) -> tuple[int, ...]:
        """Columns that are relative; a column without a name is."""
        tokens = [t.lower() for t in self.exclude if t]
        fixed = {i for i, name in enumerate(self.names) if any(t in name.lower() for t in tokens)}
        return tuple(i for i in range(action_dim) if i not in fixed)


@dataclass(frozen=True)
class Processors:
    """Both pipelines. `text` are the text steps in order: a key of TEXT, or a TextStep."""

    rename: Mapping[str, str] = field(default_factory=dict)
    text: tuple[str | TextStep, ...] = ()
    normalise: NormStep | None = None
    unnormalise: NormStep | None = None
    relative: Relative | None = None


def read_processors(folder: Path) -> Processors | None:
    """Both processor files of a checkpoint, or None for the generation before them.

    Raises CheckpointError (broken, only one of two) and Unsupported (custom code, unknown or active unsupported step).
    """
    present = [name for name in (PRE, POST) if (folder / name).is_file()]
    if not present:
        return None
    if len(present) == 1:
        lost = POST if present == [PRE] else PRE
        raise CheckpointError(f"{folder}: {present[0]} is there but {lost} is missing", remedy="copy both files")
    rename: dict[str, str] = {}
    text: list[str | TextStep] = []
    norms: dict[str, NormStep] = {}
    switched: dict[str, Relative | None] = dict.fromkeys(SWITCHED)
    for file in (PRE, POST):
        for i, (kind, config, state_file) in enumerate(_steps(folder / file)):
            where = f"{folder / file}, step {i} ({kind})"
            if kind == "rename_observations_processor":
                rename |= _names(config.get("rename_map", {}), where)
            elif kind in TEXT:
                text.append(kind)
            elif kind == "tokenizer_processor":
                text.append(_text_step(config, where))
            elif kind in ("normalizer_processor", "unnormalizer_processor"):
                if kind in norms:
                    raise CheckpointError(f"{where}: a second step of this kind")
                norms[kind] = _norm_step(folder, config, state_file, where)
            elif kind in SWITCHED:
                switched[kind] = _relative(config, where)
            elif kind not in NEUTRAL:
                raise Unsupported(
                    f"{where}: unknown step",
                    remedy="known: rename_observations_processor, tokenizer_processor, normalizer_processor, "
                    f"unnormalizer_processor, {', '.join((*TEXT, *SWITCHED, *NEUTRAL))}",
                )
    relative, absolute = (switched[kind] for kind in SWITCHED)
    if (relative is None) != (absolute is None):
        raise CheckpointError(f"{folder}: {' and '.join(SWITCHED)} must both be enabled or both not")
    both = norms.get("normalizer_processor"), norms.get("unnormalizer_processor")
    return Processors(rename, tuple(text), *both, relative)


def _relative(config: dict[str, Any], where: str) -> Relative | None:
    """The setting of a relative or absolute step, None when it is switched off."""
    if not config.get("enabled", False):
        return None
    lists = [config.get(key) or [] for key in ("exclude_joints", "action_names")]
    if not all(isinstance(v, list) and all(isinstance(t, str) for t in v) for v in lists):
        raise CheckpointError(f"{where}: exclude_joints and action_names must be lists of names")
    return Relative(*(tuple(v) for v in lists))


def _steps(path: Path) -> list[tuple[str, dict[str, Any], Any]]:
    table = read_json(path)
    steps = table.get("steps") if isinstance(table, dict) else None
    if not isinstance(steps, list):
        raise CheckpointError(f"{path}: no list of steps")
    result = []
    for i, step in enumerate(steps):
        where = f"{path}, step {i}"
        if not isinstance(step, dict):
            raise CheckpointError(f"{where}: not an object")
        if "registry_name" not in step and "class" in step:
            raise Unsupported(
                f"{where}: is Python code ({str(step['class'])[:100]}); vlac runs no code from a checkpoint",
                remedy="save the policy with LeRobot's own processor steps",
            )
        kind, config = step.get("registry_name"), step.get("config", {})
        if not isinstance(kind, str) or not isinstance(config, dict):
            raise CheckpointError(f"{where}: needs registry_name (text) and config (object)")
        result.append((kind, config, step.get("state_file")))
    return result


def _names(value: Any, where: str) -> dict[str, str]:
    if not isinstance(value, dict) or not all(isinstance(v, str) for v in value.values()):
        raise CheckpointError(f"{where}: expected an object of names, found {str(value)[:100]}")
    return dict(value)


def _norm_step(folder: Path, config: dict[str, Any], state_file: Any, where: str) -> NormStep:
    eps, features = config.get("eps", 1e-8), config.get("features", {})
    if isinstance(eps, bool) or not isinstance(eps, (int, float)) or not 0 <= eps < 1:
        raise CheckpointError(f"{where}: eps is {eps!r}, expected a small number")
    if not isinstance(features, dict):
        raise CheckpointError(f"{where}: features must be an object")
    if config.get("normalize_observation_keys") is not None:
        raise Unsupported(f"{where}: normalize_observation_keys (normalising only some keys) is not implemented")
    path = None if state_file is None else inside(folder, state_file, f"{where}, state_file")
    return NormStep(float(eps), features, _names(config.get("norm_map", {}), where), path, where)


def _text_step(config: dict[str, Any], where: str) -> TextStep:
    name, length = config.get("tokenizer_name"), config.get("max_length", 512)
    if not isinstance(name, str) or not name:
        raise Unsupported(f"{where}: no tokenizer_name (the tokenizer was given as an object)")
    if isinstance(length, bool) or not isinstance(length, int) or not 1 <= length <= 65536:
        raise CheckpointError(f"{where}: max_length {length!r}, expected a whole number from 1 to 65536")
    if config.get("padding_side", "right") != "right":
        raise Unsupported(f"{where}: padding_side {config['padding_side']!r}; only right is implemented")
    padding, truncation = config.get("padding", "max_length"), config.get("truncation", True)
    if str(padding) not in _PADDING or str(truncation) not in _TRUNCATION:
        raise Unsupported(f"{where}: padding {str(padding)[:40]!r}, truncation {str(truncation)[:40]!r}")
    return TextStep(name, length, _PADDING[str(padding)], _TRUNCATION[str(truncation)])
