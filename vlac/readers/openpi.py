"""openpi's PyTorch checkpoints -> Policy: model.safetensors, assets/<asset id>/norm_stats.json, perhaps a config.json.

What openpi keeps in code and not in the folder is stated here: three cameras, 10 Euler steps, PaliGemma's tokenizer,
prompt lengths 48 and 200, mean/std for pi0 and quantiles for pi0.5, 1e-6 added to every divisor. The robot's own
transforms (which camera is which, joint order, delta actions) are code of a training config: state and actions here
are those that the statistics speak of.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from vlac.errors import CheckpointError, Unsupported, VlacError
from vlac.io import IO, Camera, Step
from vlac.policy import Policy, Source
from vlac.readers import paligemma
from vlac.readers.hub import companion
from vlac.readers.lerobot import Config
from vlac.readers.paligemma import Common
from vlac.readers.safetensors_file import open_file, read_json
from vlac.readers.tokenizer_file import given_tokenizer, read_tokenizer
from vlac.registry import Reader, ReadOptions, readers
from vlac.spec import FlowSpec

CAMERAS = ("base_0_rgb", "left_wrist_0_rgb", "right_wrist_0_rgb")
EPS = 1e-6
PROMPT = {"pi0": 48, "pi05": 200}
HORIZON = 50
STEPS = 10

Table = Mapping[str, Mapping[str, Any]]


@dataclass
class _Opened:
    """The folder and what was noted; `problem` raises, or notes when only headers are read."""

    folder: Path
    options: ReadOptions
    warnings: list[str] = field(default_factory=list)

    def problem(self, error: VlacError) -> None:
        if not self.options.headers_only:
            raise error
        self.warnings.append(str(error))

    def given(self, key: str, default: int) -> int:
        """A number of the checkpoint that --spec may say ("state_dim")."""
        try:
            return int(self.options.spec.get(key, default))
        except (TypeError, ValueError):
            raise Unsupported(f"--spec {key}={self.options.spec[key]!r}: expected a whole number") from None


OWN = ("state_dim", "action_dim", "chunk_size", "discrete_state_input")
"""--spec keys that are of the checkpoint, not of a network part."""


def statistics_files(folder: Path) -> dict[str, Path]:
    """Asset id -> norm_stats.json, below assets/."""
    assets = folder / "assets"
    return {p.parent.relative_to(assets).as_posix(): p for p in sorted(assets.glob("**/norm_stats.json"))}


def _statistics(opened: _Opened) -> Table:
    """The "state" and "actions" tables of one asset; empty with --no-stats."""
    options, found = opened.options, statistics_files(opened.folder)
    if options.no_stats:
        return {}
    if options.stats_from is not None:
        place = Path(options.stats_from)
        found = {"": place} if place.is_file() else statistics_files(place)
    key = options.stats_key or options.unnorm_key
    names = [n for n in found if key in (None, n, n.rsplit("/", 1)[-1])]
    if len(names) != 1:
        opened.problem(
            CheckpointError(
                f"{opened.folder}/assets: {'several statistics' if names else 'no statistics'}"
                f"{f' for {key!r}' if key else ''}; there are: {', '.join(found) or 'none'}",
                remedy="choose one with --stats-key, or --no-stats (normalised units only)",
            )
        )
        return {}
    table = read_json(found[names[0]])
    table = table.get("norm_stats", table) if isinstance(table, dict) else None
    if not isinstance(table, dict) or not all(isinstance(table.get(k), dict) for k in ("state", "actions")):
        raise CheckpointError(f"{found[names[0]]}: expected norm_stats with state and actions")
    return table


def _arrays(opened: _Opened, table: Table, part: str, names: tuple[str, str], size: int) -> list[np.ndarray[Any, Any]]:
    """Two statistics of a part, each float64 [size]."""
    result = []
    for name in names:
        try:
            values = np.asarray(table[part].get(name), dtype=np.float64)
        except (TypeError, ValueError):
            values = np.zeros(0)
        if values.ndim != 1 or len(values) < size or not np.isfinite(values).all():
            raise CheckpointError(f"{opened.folder}: statistics of {part}: {name} are not {size} finite numbers")
        result.append(values[:size])
    return result


def _norm_steps(opened: _Opened, table: Table, part: str, kind: str, size: int, quantiles: bool) -> tuple[Step, ...]:
    """The step that does openpi's normalisation of a part, its 1e-6 worked into the statistics."""
    if not table:
        return ()
    if quantiles:
        low, high = _arrays(opened, table, part, ("q01", "q99"), size)
        stats = {"mode": "QUANTILES", "q01": low.tolist(), "q99": (high + EPS).tolist()}
    else:
        mean, std = _arrays(opened, table, part, ("mean", "std"), size)
        std = std + EPS if kind == "unnormalise" else std
        stats = {"mode": "MEAN_STD", "mean": mean.tolist(), "std": std.tolist()}
    return (Step(kind, {"eps": EPS, **stats}),)


def _length(table: Table, part: str, default: int) -> int:
    """How many joints the statistics of a part speak of."""
    values = next((v for v in table.get(part, {}).values() if isinstance(v, list)), None)
    return default if values is None else len(values)


def _text_steps(kind: str, discrete: bool) -> tuple[Step, ...]:
    if kind == "pi05" and discrete:
        prompt = Step("state_in_prompt", {"before": "Task: ", "between": ", State: ", "after": ";\nAction: "})
    else:
        prompt = Step("ensure_suffix", {"suffix": "\n"})
    tokenise = {"max_length": PROMPT[kind], "padding": "max_length", "truncation": True, "add_special_tokens": True}
    return Step("clean_task"), prompt, Step("tokenise", tokenise)


def _common(opened: _Opened, config: Config, kind: str) -> Common:
    tensors = paligemma.plain_names(open_file(opened.folder / "model.safetensors"))
    spec = {k: v for k, v in opened.options.spec.items() if k not in OWN}
    source = paligemma.Source(tensors, opened.folder / "model.safetensors", spec, opened.problem)
    patch, positions = (
        source.shape("vision.patch_embedding.weight", 4)[-1],
        source.shape("vision.position_embedding", 2),
    )
    size = math.isqrt(positions[0]) * patch
    columns = source.shape("action_in_proj.weight", 2)[1]
    stated = config.take("action_dim", columns)
    if stated != columns:
        raise CheckpointError(f"{config.path}: action_dim is {stated}, action_in_proj reads {columns}")
    rows = opened.given("chunk_size", config.size("action_horizon", HORIZON))
    if "chunk_size" not in opened.options.spec and config.raw("action_horizon") is None:
        opened.warnings.append(
            f"no file says how long a chunk is: {HORIZON} rows, as pi0 was trained; --spec chunk_size=10 says otherwise"
        )
    return Common(
        source=source,
        cameras=tuple(Camera(name, (3, size, size)) for name in CAMERAS),
        image_size=size,
        image_steps=(
            Step("pillow_fit", {"size": size, "filter": "bilinear"}),
            Step("affine", {"scale": 2.0, "offset": -1.0}),
        ),
        chunk_size=rows,
        n_action_steps=rows,
        max_action_dim=columns,
        max_state_dim=columns,
        tokenizer_max_length=PROMPT[kind],
    )


def _io(opened: _Opened, shared: Common, kind: str, vocab_size: int) -> IO:
    table, quantiles = _statistics(opened), kind == "pi05"
    discrete = str(opened.options.spec.get("discrete_state_input", True)).lower() in ("1", "true")
    state_dim = opened.given("state_dim", _length(table, "state", shared.max_state_dim))
    action_dim = opened.given("action_dim", _length(table, "actions", shared.max_action_dim))
    if not 0 < state_dim <= shared.max_state_dim or not 0 < action_dim <= shared.max_action_dim:
        raise CheckpointError(
            f"{opened.folder}: state of {state_dim}, actions of {action_dim}; the network has {shared.max_action_dim}"
        )
    pad = (Step("pad", {"size": shared.max_state_dim}),) if kind == "pi0" else ()
    reads = kind == "pi0" or discrete
    take = Step("take", {"size": action_dim})
    return IO(
        cameras=shared.cameras,
        image_steps=shared.image_steps,
        state_key="state" if reads else "",
        state_dim=state_dim if reads else 0,
        state_steps=(*_norm_steps(opened, table, "state", "normalise", state_dim, quantiles), *pad) if reads else (),
        text_steps=_text_steps(kind, discrete),
        action_key="actions",
        action_dim=action_dim,
        max_action_dim=shared.max_action_dim,
        chunk_size=shared.chunk_size,
        n_action_steps=shared.n_action_steps,
        action_steps=(take, *_norm_steps(opened, table, "actions", "unnormalise", action_dim, quantiles)),
        normalised_action_steps=(take,),
        max_missing_cameras=len(shared.cameras) - 1,
        image_size=shared.image_size,
        vocab_size=vocab_size,
        units="robot" if table else "normalized",
    )


def _tokenizer(opened: _Opened) -> bytes | None:
    try:
        if opened.options.tokenizer is not None:
            return given_tokenizer(opened.options.tokenizer)
        inside = opened.folder / "tokenizer" / "tokenizer.json"
        path = (
            inside
            if inside.is_file()
            else companion(opened.folder, paligemma.TOKENIZER, "tokenizer.json", "the tokenizer")
        )
        return read_tokenizer(path)
    except CheckpointError as error:
        opened.problem(error)
        return None


def read(folder: Path, options: ReadOptions) -> Policy:
    """The Policy of an openpi folder. Raises CheckpointError (broken, ambiguous) and Unsupported."""
    from vlac.families import pi0, pi05

    path = folder / "config.json"
    table = read_json(path) if path.is_file() else {}
    if not isinstance(table, dict):
        raise CheckpointError(f"{path}: not a JSON object")
    config, opened = Config(path, table), _Opened(folder, options)
    for key in ("paligemma_variant", "action_expert_variant", "precision"):
        config.raw(key)  # tensors say the same
    names = open_file(folder / "model.safetensors")
    kind = "pi05" if any(n.endswith("input_layernorm.dense.weight") for n in names) else "pi0"
    shared = _common(opened, config, kind)
    spec = pi05.spec_of(shared) if kind == "pi05" else pi0.spec_of(shared)
    shapes = pi05.shapes(spec) if isinstance(spec, pi05.Pi05Spec) else pi0.shapes(spec)
    opened.warnings.append(
        "openpi: the robot's own transforms (camera names, joint order, delta actions) are not in the checkpoint; "
        "state and actions are those of its statistics"
    )
    if config.leftover():
        opened.warnings.append(f"config.json: unknown keys, not used: {', '.join(config.leftover())}")
    return Policy(
        family=kind,
        name=folder.resolve().name,
        spec=spec,
        weights=paligemma.take_weights(shared.source, shapes, pi05.UNREAD if kind == "pi05" else ()),
        io=_io(opened, shared, kind, spec.text.vocab_size),
        source=Source(str(folder)),
        tokenizer=_tokenizer(opened),
        flow=FlowSpec.euler(STEPS),
        warnings=tuple(opened.warnings),
        ignored=config.ignored(),
        parameters=sum(math.prod(t.shape) for t in names.values()),
    )


def detect(path: Path) -> bool:
    """A folder with model.safetensors whose config.json, if any, has openpi's keys or that has openpi's statistics."""
    if not (path / "model.safetensors").is_file():
        return False
    table = read_json(path / "config.json") if (path / "config.json").is_file() else {}
    if not isinstance(table, dict) or "type" in table or "model_type" in table:
        return False
    return bool(statistics_files(path)) or {"action_horizon", "paligemma_variant"} <= set(table)


READER = readers.add(Reader("openpi", detect, read, doc="openpi's PyTorch folders of pi0 and pi0.5"))
