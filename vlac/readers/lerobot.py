"""LeRobot policy folders of every generation -> Policy.

A `LeRobotCheckpoint` holds what is the same for all policy types (config with tracked consumption, tensors, features,
processors, statistics); the family's `from_lerobot` takes from it what it needs and gives the Policy back.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, TypeVar

from vlac.errors import CheckpointError, Unsupported, VlacError
from vlac.io import Camera, Step
from vlac.policy import Policy
from vlac.readers import lerobot_statistics as stats
from vlac.readers import peft
from vlac.readers.hub import companion, policy_folder, resolve
from vlac.readers.lerobot_processors import POST, PRE, TEXT, NormStep, Processors, TextStep, read_processors
from vlac.readers.lerobot_statistics import Lookup, Statistics
from vlac.readers.safetensors_file import FLOATS, open_folder, read_json
from vlac.readers.tokenizer_file import given_tokenizer, read_tokenizer
from vlac.registry import Reader, ReadOptions, families, readers
from vlac.weights import Weights

V = TypeVar("V", int, float, bool, str)

IGNORED = (
    "device", "use_amp", "push_to_hub", "repo_id", "private", "tags", "license", "pretrained_path",
    "pretrained_revision", "use_peft", "compile_model", "compile_mode", "optimizer_*", "scheduler_*", "freeze_*",
    "train_*", "use_cache", "load_vlm_weights", "gradient_checkpointing", "time_sampling_*",
)  # fmt: skip
"""Config keys that do not act on inference in float32."""


class Config:
    """config.json, every key consumed once or listed: `take` consumes, `leftover` and `ignored` name the rest."""

    def __init__(self, path: Path, values: Mapping[str, Any]) -> None:
        self.path = path
        self._values = dict(values)
        self._taken: set[str] = set()

    def raw(self, key: str, default: Any = None) -> Any:
        """A value of any JSON kind; `default` when absent."""
        self._taken.add(key)
        return self._values.get(key, default)

    def take(self, key: str, default: V) -> V:
        """A value of the default's kind (a whole number will do for a float); CheckpointError for another kind."""
        value = self.raw(key, default)
        kind = type(default)
        if kind is float and isinstance(value, int) and not isinstance(value, bool):
            value = float(value)
        if not isinstance(value, kind) or (kind is not bool and isinstance(value, bool)):
            raise CheckpointError(f"{self.path}: {key} is {repr(value)[:80]}, expected {kind.__name__}")
        if isinstance(value, float) and not math.isfinite(value):
            raise CheckpointError(f"{self.path}: {key} is {value}, expected a finite number")
        return value

    def size(self, key: str, default: int, least: int = 1, most: int = 65536) -> int:
        """A whole number in [least, most]; the limit keeps a damaged config from asking for all memory."""
        value = self.take(key, default)
        if not least <= value <= most:
            raise CheckpointError(f"{self.path}: {key} is {value}, expected {least} to {most}")
        return value

    def table(self, key: str) -> dict[str, Any]:
        """An object; empty when absent or null."""
        value = self.raw(key)
        if value is not None and not isinstance(value, dict):
            raise CheckpointError(f"{self.path}: {key} is {repr(value)[:80]}, expected an object")
        return dict(value or {})

    def refuse(self, key: str, *neutral: Any, why: str) -> None:
        """Unsupported unless the key is absent or has one of the `neutral` values."""
        value = self.raw(key, neutral[0])
        if value not in neutral:
            raise Unsupported(f"{self.path}: {key} = {value!r}: {why}")

    def ignored(self) -> tuple[str, ...]:
        """Keys that nobody took and that are known not to act."""
        return tuple(k for k in self._values if k not in self._taken and any(fnmatchcase(k, p) for p in IGNORED))

    def leftover(self) -> tuple[str, ...]:
        """Keys that nobody took and nobody knows."""
        known = {*self._taken, *self.ignored()}
        return tuple(k for k in self._values if k not in known)


@dataclass
class LeRobotCheckpoint:
    """A LeRobot policy folder, opened. Families read it; `warnings` and `problem` collect what a person should know.

    Attributes:
        folder, name: where it lies; a short name for files.
        config: config.json with tracked consumption.
        tensors: the policy's weights, `_orig_mod` stripped, adapters merged, normalisation buffers taken out.
        processors: the processor files as data (synthesised from the config for the generation before them).
        statistics: (for inputs, for outputs).
        files: every file that was read.
    """

    folder: Path
    name: str
    options: ReadOptions
    config: Config
    tensors: Weights
    processors: Processors
    statistics: tuple[Statistics, Statistics]
    files: list[Path]
    warnings: list[str] = field(default_factory=list)

    def problem(self, error: VlacError) -> None:
        """Raises `error`, or notes it when only headers are read (inspect shows problems, compile refuses)."""
        if not self.options.headers_only:
            raise error
        self.warn(str(error))

    def warn(self, note: str) -> None:
        """Notes something once."""
        if note not in self.warnings:
            self.warnings.append(note)

    # --- features ---

    def features(self, group: str) -> dict[str, tuple[str, tuple[int, ...]]]:
        """`input_features` or `output_features`: name -> (type, shape), in order."""
        result = {}
        for name, entry in self.config.table(group).items():
            kind = entry.get("type") if isinstance(entry, dict) else None
            shape = entry.get("shape") if isinstance(entry, dict) else None
            sizes = isinstance(shape, list) and all(type(d) is int and 0 < d < 2**31 for d in shape)
            if not isinstance(kind, str) or shape is None or not sizes:
                raise CheckpointError(f"{self.config.path}: {group}.{name} needs a type and a shape, found {entry!r}")
            result[name] = (kind, tuple(shape))
        if not result:
            raise CheckpointError(f"{self.config.path}: {group} is missing or empty")
        return result

    def cameras(self, empty_cameras: int) -> tuple[Camera, ...]:
        """Camera slots in order; `empty_camera_{i}` are appended when the file does not list them."""
        empty = [f"observation.images.empty_camera_{i}" for i in range(empty_cameras)]
        result = []
        for name, (kind, shape) in self.features("input_features").items():
            if kind != "VISUAL":
                continue
            if len(shape) == 3 and shape[0] != 3 and shape[2] == 3:
                shape = (shape[2], shape[0], shape[1])
            if len(shape) != 3 or shape[0] != 3:
                raise Unsupported(f"{self.config.path}: camera {name} has shape {list(shape)}; expected (3, H, W)")
            result.append(Camera(name, (3, shape[1], shape[2]), optional=name in empty))
        if not result:
            raise CheckpointError(f"{self.config.path}: input_features holds no camera (type VISUAL)")
        known = {c.key for c in result}
        return (*result, *(Camera(name, (3, 480, 640), optional=True) for name in empty if name not in known))

    def vector(self, group: str, key: str, limit: int, limit_key: str) -> int:
        """Size of a 1-D feature that must be there ("observation.state", "action"), at most `limit`."""
        table = self.features(group)
        if key not in table:
            raise Unsupported(f"{self.config.path}: {group} has no {key}; there are: {', '.join(table)}")
        shape = table[key][1]
        if len(shape) != 1 or shape[0] > limit:
            raise CheckpointError(
                f"{self.config.path}: {group}.{key} has shape {list(shape)}; expected one axis of at most "
                f"{limit_key} = {limit}"
            )
        return shape[0]

    # --- normalisation ---

    def _mode(self, step: NormStep, feature: str, kind: str) -> str:
        entry = step.features.get(feature)
        listed = entry.get("type") if isinstance(entry, dict) else None
        mode = step.norm_map.get(listed if isinstance(listed, str) else kind, "IDENTITY")
        configured = self._configured_mode(kind)
        if mode == "IDENTITY" and configured not in (None, mode):
            self.problem(
                CheckpointError(
                    f"{step.where}: passes {feature} unchanged, but config.json normalises {kind} by {configured}",
                    remedy="make norm_map and features of the step agree with normalization_mapping, or --no-stats",
                )
            )
        elif configured not in (None, mode):
            self.warn(f"config.json: {kind} {configured} is not used: {step.where} normalises it by {mode}")
        if mode != "IDENTITY" and feature not in step.features:
            self.problem(
                CheckpointError(
                    f"{step.where}: normalises {kind} by {mode}, but its features do not list {feature}; they are: "
                    f"{', '.join(step.features) or 'none'}",
                    remedy="the processor was saved for other features; save it again, or --no-stats",
                )
            )
        return mode

    def _configured_mode(self, kind: str) -> str | None:
        return self.config.table("normalization_mapping").get(kind)

    def normalise(self, kind: str, feature: str, feature_kind: str, shape: tuple[int, ...]) -> tuple[Step, ...]:
        """The "normalise" or "unnormalise" step of a feature: none for IDENTITY and with --no-stats."""
        forward = kind == "normalise"
        step = self.processors.normalise if forward else self.processors.unnormalise
        if self.options.no_stats and feature_kind != "VISUAL":
            return ()
        if step is None and self._configured_mode(feature_kind) == "IDENTITY":
            return ()
        if step is None:
            file, name = (PRE, "normalizer_processor") if forward else (POST, "unnormalizer_processor")
            self.problem(
                CheckpointError(
                    f"{self.folder / file}: no {name}, so {feature} would pass unchanged",
                    remedy="save the processors again, or --no-stats (normalised units only)",
                )
            )
            return ()
        lookup = Lookup(self.statistics[0 if forward else 1], self.options.stats_key)
        try:
            mode = self._mode(step, feature, feature_kind)
            return stats.norm_step(kind, mode, step.eps, lookup.find(feature, mode, shape, step.where))
        except CheckpointError as error:
            self.problem(error)
            return ()

    def image_normalisation(self, cameras: Sequence[Camera]) -> tuple[Step, ...]:
        """Normalisation of the [0, 1] images (before resizing), the same for all cameras or refused."""
        found = [self.normalise("normalise", c.key, "VISUAL", (3, 1, 1)) for c in cameras if not c.optional]
        if any(f != found[0] for f in found):
            raise Unsupported(f"{self.folder}: cameras are normalised by different statistics")
        return found[0] if found else ()

    # --- text ---

    def text_steps(self) -> tuple[Step, ...]:
        """Prompt steps and tokenise, in the order of the processor file."""

        def tokenise(t: TextStep) -> Step:
            settings = {"max_length": t.max_length, "padding": t.padding, "truncation": t.truncation}
            return Step("tokenise", {**settings, "add_special_tokens": True})

        return tuple(s for t in self.processors.text for s in (TEXT[t] if isinstance(t, str) else (tokenise(t),)))

    def text_step(self) -> TextStep:
        """The one tokenizer step."""
        found = [t for t in self.processors.text if isinstance(t, TextStep)]
        if len(found) != 1 or self.processors.text[-1] is not found[0]:
            names = ", ".join(t if isinstance(t, str) else "tokenizer" for t in self.processors.text)
            raise Unsupported(f"{self.folder}: text steps {names or 'none'}; expected one tokenizer_processor, last")
        configured = self.config.raw("tokenizer_max_length", found[0].max_length)
        if configured != found[0].max_length:
            self.warn(
                f"config.json: tokenizer_max_length {configured} is not used: max_length {found[0].max_length} is"
            )
        return found[0]

    def companion(self, name: str, filename: str, what: str) -> Path:
        """A file of something that the checkpoint names (see vlac.readers.hub.companion)."""
        path = companion(self.folder, name, filename, what)
        self.files.append(path)
        return path

    def tokenizer(self) -> bytes | None:
        """tokenizer.json of --tokenizer, or that the tokenizer step names; None only when reading headers and there is
        none."""
        try:
            if self.options.tokenizer is not None:
                return given_tokenizer(self.options.tokenizer)
            return read_tokenizer(self.companion(self.text_step().tokenizer_name, "tokenizer.json", "the tokenizer"))
        except CheckpointError as error:
            self.problem(error)
            return None


# --- opening ---------------------------------------------------------------------------------------------------


def _generation_before_processors(config: Config) -> Processors:
    """Processors as the policy class itself ran them, from config.json."""
    mapping = config.table("normalization_mapping")
    features = {**config.table("input_features"), **config.table("output_features")}
    step = NormStep(1e-8, features, {str(k): str(v) for k, v in mapping.items()}, None, str(config.path))
    tokenizer = config.raw("vlm_model_name") or "google/paligemma-3b-pt-224"
    padding = "max_length" if config.raw("pad_language_to", "max_length") == "max_length" else "longest"
    text = TextStep(str(tokenizer), config.size("tokenizer_max_length", 48), padding, True)
    return Processors({}, ("pi0_new_line_processor", text), step, step)


def _statistics_elsewhere(source: str) -> tuple[Statistics, Statistics]:
    """--stats-from: a stats.json, a dataset folder (meta/stats.json) or another checkpoint (folder or hub id)."""
    path = policy_folder(resolve(source))
    for candidate in (path, path / "meta" / "stats.json", path / "stats.json"):
        if candidate.is_file() and candidate.suffix == ".json":
            found = stats.from_dataset(candidate)
            return found, found
    if not (path / "config.json").is_file():
        raise CheckpointError(f"--stats-from {source}: neither a stats.json, a dataset with one, nor a checkpoint")
    return open_checkpoint(path, ReadOptions()).statistics


def _statistics(
    processors: Processors | None, buffers: Weights, features: Sequence[str], options: ReadOptions, origin: str
) -> tuple[Statistics, Statistics]:
    if options.stats_from:
        return _statistics_elsewhere(options.stats_from)
    if processors is None:
        found = stats.from_buffers(buffers, features, origin)
        return found, found

    def of(step: NormStep | None) -> Statistics:
        if step is None or step.state_file is None:
            return stats.NO_STATISTICS
        if not step.state_file.is_file():
            return Statistics({}, f"{step.state_file.name} (named by {step.where}, but missing)")
        return stats.from_state_file(step.state_file)

    return of(processors.normalise), of(processors.unnormalise)


def _strip(name: str) -> str:
    return name.replace("_orig_mod.", "")


def open_checkpoint(folder: Path, options: ReadOptions) -> LeRobotCheckpoint:
    """Opens a LeRobot policy folder: config, processors, statistics; weights by header only."""
    path = folder / "config.json"
    table = read_json(path)
    if not isinstance(table, dict):
        raise CheckpointError(f"{path}: not a JSON object")
    config = Config(path, table)
    processors = read_processors(folder)
    if peft.is_adapter(folder) or config.raw("use_peft", False):
        weights, files = peft.open_merged(folder)
    else:
        weights, files = open_folder(folder), []
    stripped = Weights({_strip(name): t for name, t in weights.items()})
    if len(stripped) != len(weights):
        raise CheckpointError(f"{folder}: a tensor is there twice, with and without _orig_mod in its name")
    buffers = Weights({name: t for name, t in stripped.items() if stats.is_buffer(name)})
    tensors = stripped.without(*buffers)
    features = [*config.table("input_features"), *config.table("output_features")]
    read = _statistics(processors, buffers, features, options, str(folder / "model.safetensors"))
    return LeRobotCheckpoint(
        folder=folder,
        name=_short_name(folder),
        options=options,
        config=config,
        tensors=tensors,
        processors=processors or _generation_before_processors(config),
        statistics=read,
        files=[path, *files],
    )


def _short_name(folder: Path) -> str:
    """A name for files: the folder's, or the repository's inside a hub cache; generic last parts are skipped."""
    parts = [p for p in folder.resolve().parts if p not in ("pretrained_model", "checkpoint", "checkpoints")]
    if len(parts) > 2 and parts[-2] == "snapshots" and parts[-3].startswith("models--"):
        return parts[-3].split("--")[-1]
    return parts[-1] if parts else "policy"


def read(folder: Path, options: ReadOptions) -> Policy:
    """The Policy of a LeRobot folder. Raises CheckpointError (broken) and Unsupported (known but not implemented)."""
    checkpoint = open_checkpoint(folder, options)
    kind = checkpoint.config.raw("type")
    known = [f.name for f in families.all() if f.from_lerobot is not None]
    if kind not in known:
        raise Unsupported(
            f"{checkpoint.config.path}: policy type {kind!r} is not implemented; known: {', '.join(known)}",
            remedy="see `vlac list` for what there is, CONTRIBUTING for how to add a family",
        )
    from_lerobot = families.get(kind).from_lerobot
    assert from_lerobot is not None
    policy: Policy = from_lerobot(checkpoint)
    if not options.headers_only:
        _check_unread(checkpoint.tensors, policy.weights)
    if checkpoint.processors.relative and not any(s.step == "add_state" for s in policy.io.action_steps):
        raise Unsupported(f"{folder}: relative actions are not implemented for policies of type {kind!r}")
    unknown = checkpoint.config.leftover()
    if unknown:
        checkpoint.warn(f"config.json: unknown keys, not used: {', '.join(unknown)}")
    return policy.replace(
        name=checkpoint.name,
        parameters=sum(math.prod(t.shape) for t in checkpoint.tensors.values()),
        ignored=checkpoint.config.ignored(),
        warnings=(*policy.warnings, *checkpoint.warnings),
    )


def _check_unread(tensors: Weights, read: Weights) -> None:
    """Loads what inference never reads (an lm_head), so that NaN or Inf there is refused as well: the file is damaged
    or training diverged, and what is read of it is not to be trusted."""
    sources = {t.source for t in read.values()}
    for tensor in tensors.values():
        if tensor.source not in sources and tensor.dtype.upper() in FLOATS:
            tensor.load()


def detect(path: Path) -> bool:
    """A folder whose config.json has a policy `type`."""
    config = path / "config.json"
    if not config.is_file():
        return False
    table = read_json(config)
    return isinstance(table, dict) and "type" in table


READER = readers.add(Reader("lerobot", detect, read, doc="LeRobot policy folders (save_pretrained), all generations"))
