"""What a GR00T N1.7 checkpoint says about one robot: cameras, state, actions, their statistics, and pictures."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from vlac.errors import CheckpointError, Unsupported
from vlac.families.groot import GrootSpec
from vlac.io import IO, Camera, Step
from vlac.readers.lerobot import Config
from vlac.readers.safetensors_file import read_json
from vlac.registry import ReadOptions

KNOWN_IDS = {
    "simpler_env_google": 0, "simpler_env_widowx": 1, "libero_sim": 2, "new_embodiment": 10,
    "oxe_droid_relative_eef_relative_joint": 24, "real_g1_relative_eef_relative_joints": 25,
    "unitree_g1_full_body_with_waist_height_nav_cmd": 25,
}  # fmt: skip
"""Category of an embodiment where embodiment_id.json does not tell it."""

DEFAULT_TASK = "Perform the task."
MEAN_STD = ([0.5, 0.5, 0.5], [0.5, 0.5, 0.5])

Table = Mapping[str, Any]


@dataclass(frozen=True)
class Group:
    """A part of the state or of the action: its name and its range; a relative one is added to part `state`."""

    name: str
    low: tuple[tuple[float, ...], ...]
    high: tuple[tuple[float, ...], ...]
    state: str = ""

    @property
    def size(self) -> int:
        return len(self.low[0])


@dataclass(frozen=True)
class Embodiment:
    """One robot: its tag, its category of projectors, and the processor's settings. `rows`: of a chunk."""

    tag: str
    index: int
    processor: Config
    cameras: tuple[str, ...]
    state: tuple[Group, ...]
    action: tuple[Group, ...]
    rows: int
    percentiles: bool = True

    def ranges(self, low: list[float], high: list[float]) -> dict[str, Any]:
        """Parameters of a normalise or unnormalise step."""
        if self.percentiles:
            return {"mode": "QUANTILES", "q01": low, "q99": high}
        return {"mode": "MIN_MAX", "min": low, "max": high}


# --- files -----------------------------------------------------------------------------------------------------


def _side(folder: Path, name: str, needed: bool = True) -> tuple[Path, dict[str, Any]]:
    """A side file of the root, or of `processor/` where NVIDIA's trainer leaves them."""
    for path in (folder / name, folder / "processor" / name):
        if path.is_file():
            table = read_json(path)
            if not isinstance(table, dict):
                raise CheckpointError(f"{path}: not an object")
            return path, table
    if needed:
        raise CheckpointError(f"{folder / name}: missing; it belongs to a GR00T N1.7 checkpoint")
    return folder / name, {}


def _choose(known: Sequence[str], options: ReadOptions, where: Path) -> str:
    tag = options.embodiment
    if tag is None and len(known) == 1:
        return known[0]
    listed = ", ".join(sorted(known)[:16]) or "none"
    if tag is None:
        raise CheckpointError(
            f"{where}: {len(known)} embodiments with statistics: {listed}", remedy="choose one: --embodiment NAME"
        )
    if tag not in known:
        raise CheckpointError(f"{where}: no embodiment {tag!r} with statistics; there are: {listed}")
    return tag


def read_embodiment(folder: Path, config: Config, options: ReadOptions) -> Embodiment:
    """The robot that --embodiment names, or the only one. CheckpointError names what is missing or broken."""
    path, table = _side(folder, "processor_config.json")
    processor = Config(path, Config(path, table).table("processor_kwargs"))
    where, statistics = _side(folder, "statistics.json")
    modalities = processor.table("modality_configs")
    tag = _choose([t for t in modalities if t in statistics], options, where)
    ids_path, ids = _side(folder, "embodiment_id.json", needed=False)
    index, most = ids.get(tag, KNOWN_IDS.get(tag)), config.size("max_num_embodiments", 32)
    if type(index) is not int or not 0 <= index < most:
        raise CheckpointError(f"{ids_path}: {tag!r} has id {index!r}, expected 0 to {most - 1}")
    modality, stats = (Config(p, Config(p, t).table(tag)) for p, t in ((path, modalities), (where, statistics)))
    return robot_of(tag, index, processor, modality, stats, config.size("action_horizon", 40))


def robot_of(tag: str, index: int, processor: Config, modality: Config, stats: Config, horizon: int) -> Embodiment:
    """A robot from its entries of modality_configs and of the statistics; the network has `horizon` rows."""
    path, where = modality.path, stats.path
    video, state, action = (Config(path, modality.table(k)) for k in ("video", "state", "action"))
    for name, part in (("video", video), ("state", state)):
        if len(part.raw("delta_indices", [0])) != 1:
            raise Unsupported(f"{path}: {tag}: a history of {len(part.raw('delta_indices'))} in {name}")
    rows = len(action.raw("delta_indices", []))
    if not 1 <= rows <= horizon:
        raise CheckpointError(f"{path}: {tag}: {rows} steps of {horizon} in delta_indices")
    processor.refuse("use_mean_std", False, None, why="not implemented")
    kind = ("q01", "q99") if processor.take("use_percentiles", True) else ("min", "max")
    plain = stats.table("state")
    return Embodiment(
        tag,
        index,
        processor,
        tuple(_names(path, video)),
        tuple(group_of(where, n, plain.get(n), kind) for n in _names(path, state)),
        tuple(_actions(where, action, stats, kind, processor.raw("use_relative_action", False), rows)),
        rows,
        kind[0] == "q01",
    )


def _names(path: Path, part: Config) -> list[str]:
    keys = part.raw("modality_keys")
    if (
        not isinstance(keys, list)
        or not keys
        or not all(isinstance(k, str) and k for k in keys)
        or len(set(keys)) < len(keys)
    ):
        raise CheckpointError(f"{path}: modality_keys {keys!r}, expected names")
    return keys


def group_of(path: Path, name: str, table: Any, kind: tuple[str, str], rows: int = 1, state: str = "") -> Group:
    """Statistics [n], or one line for each of `rows` steps."""
    found = []
    for key in kind:
        try:
            values = np.atleast_2d(np.asarray(table[key], dtype=np.float64))
        except (KeyError, TypeError, ValueError):
            raise CheckpointError(f"{path}: statistics of {name} have no numbers {key}") from None
        if values.ndim != 2 or not values.size or not np.isfinite(values).all() or len(values) not in (1, rows):
            raise CheckpointError(f"{path}: {key} of {name} has shape {list(values.shape)}, for {rows} steps")
        found.append(values)
    if found[0].shape != found[1].shape:
        raise CheckpointError(f"{path}: {name}: {kind[0]} and {kind[1]} differ in shape")
    low, high = (tuple(tuple(float(v) for v in row) for row in values) for values in found)
    return Group(name, low, high, state)


def _actions(
    path: Path, action: Config, stats: Config, kind: tuple[str, str], relative: bool, rows: int
) -> Iterator[Group]:
    """Groups of the action; relative ones have the range of differences, and the part of the state that is added."""
    names = _names(action.path, action)
    settings = action.raw("action_configs") or [{}] * len(names)
    if not isinstance(settings, list) or len(settings) != len(names):
        raise CheckpointError(f"{action.path}: action_configs needs one entry for each of {len(names)} groups")
    for name, given in zip(names, settings, strict=True):
        rep, form = str(given.get("rep", "ABSOLUTE")).upper(), str(given.get("type", "NON_EEF")).upper()
        if not relative or rep == "ABSOLUTE":
            yield group_of(path, name, stats.table("action").get(name), kind)
        elif rep == "RELATIVE" and form == "NON_EEF":
            range_of = stats.table("relative_action").get(name)
            yield group_of(path, name, range_of, ("min", "max"), rows, given.get("state_key") or name)
        else:
            raise Unsupported(f"{action.path}: action {name} is {rep} {form}; only joints may be relative")


# --- pictures --------------------------------------------------------------------------------------------------


def picture_limits(path: Path | None) -> tuple[tuple[int, int], tuple[list[float], list[float]]]:
    """((least, most pixels), (mean, std)) of the VLM's own image processor."""
    table = read_json(path) if path is not None else {}
    size = table.get("size") or {}
    limits = (size.get("shortest_edge", 65536), size.get("longest_edge", 16777216))
    normal = (table.get("image_mean", MEAN_STD[0]), table.get("image_std", MEAN_STD[1]))
    good = all(isinstance(v, list) and len(v) == 3 and all(type(x) in (int, float) for x in v) for v in normal)
    if not all(type(v) is int and v > 0 for v in limits) or not good or 0 in normal[1]:
        raise CheckpointError(f"{path}: size {size!r}, mean and std {normal!r}")
    return limits, normal


def _edge(config: Config, key: str, default: int) -> int:
    value = config.raw(key)
    value = [default, default] if value is None else value
    if not isinstance(value, list) or len(value) != 2 or not all(type(v) is int and 0 < v <= 8192 for v in value):
        raise CheckpointError(f"{config.path}: {key} is {value!r}, expected two sizes")
    if value[0] != value[1]:
        raise Unsupported(f"{config.path}: {key} {value}: pictures must be squares")
    return int(value[0])


def image_steps(
    processor: Config, config: Config, unit: int, limits: tuple[int, int], normal: tuple[list[float], list[float]]
) -> tuple[tuple[Step, ...], int]:
    """(steps, side of the square picture that the tower sees): resize, crop the middle, resize.

    As torchvision does it, or with use_albumentations as OpenCV does. unit: pixels of a merged patch.
    """
    target = _edge(processor, "image_target_size", 256)
    # a file that states a target and no crop means none
    cropped = _edge(processor, "image_crop_size", 230 if processor.raw("image_target_size") is None else target)
    edge, fraction = processor.raw("shortest_image_edge") or target, processor.raw("crop_fraction")
    fraction = cropped / target if fraction is None else fraction
    if type(edge) is not int or not 0 < edge <= 8192 or type(fraction) not in (int, float) or not 0 < fraction <= 1:
        raise CheckpointError(f"{processor.path}: shortest_image_edge {edge!r}, crop_fraction {fraction!r}")
    area = processor.take("use_albumentations", False)
    size = max(1, int(edge * fraction) if area else round(edge * fraction))
    start, last = (edge - size) // 2, edge if area else target

    def resized(side: int) -> Step:
        return Step("area_resize", {"shorter": side}) if area else _tensor_resize(side)

    steps = [Step("to_square")] if processor.take("letter_box_transform", False) else []
    steps.append(resized(edge))
    if size != edge:
        steps.append(Step("window", {"top": start, "left": start, "height": size, "width": size}))
    if size != last:
        steps.append(resized(last))
    final = smart_side(last, unit, *limits)
    if final != last:
        steps.append(_tensor_resize(final))
    return (*steps, Step("stack_normalised", {"mean": [normal[0]], "std": [normal[1]]})), final


def _tensor_resize(side: int) -> Step:
    return Step("tensor_resize", {"height": side, "width": side})


def smart_side(side: int, unit: int, least: int, most: int) -> int:
    """Qwen's rule for a square: whole units, and an area between least and most."""
    result = max(unit, round(side / unit) * unit)
    if result * result > most:
        return max(unit, math.floor(side / math.sqrt(side * side / most) / unit) * unit)
    if result * result < least:
        return math.ceil(side * math.sqrt(least / (side * side)) / unit) * unit
    return result


# --- io --------------------------------------------------------------------------------------------------------


def _bounds(groups: Sequence[Group]) -> tuple[list[float], list[float]]:
    return [v for g in groups for v in g.low[0]], [v for g in groups for v in g.high[0]]


def state_steps(robot: Embodiment, size: int, known: bool) -> tuple[Step, ...]:
    """To [-1, 1]; a joint whose range is empty is silent."""
    low, high = _bounds(robot.state)
    steps = [Step("normalise", robot.ranges(low, high))] if known else []
    if empty := [i for i, (a, b) in enumerate(zip(low, high, strict=True)) if a == b]:
        steps.append(Step("silence", {"columns": empty}))
    if robot.processor.take("clip_outliers", True):
        steps.append(Step("clamp", {"low": -1.0, "high": 1.0}))
    return (*steps, Step("pad", {"size": size}))


def action_steps(robot: Embodiment) -> tuple[Step, ...]:
    """From [-1, 1] to the robot's units, what lies outside cut; relative parts are added to the present state."""
    clip, relative = Step("clamp", {"low": -1.0, "high": 1.0}), [g for g in robot.action if g.state]
    if not relative:
        low, high = _bounds(robot.action)
        return clip, Step("unnormalise", robot.ranges(low, high))
    lows, highs = (
        np.concatenate([np.broadcast_to(getattr(g, end), (robot.rows, g.size)) for g in robot.action], axis=1).tolist()
        for end in ("low", "high")
    )
    starts = dict(zip((g.name for g in robot.state), _starts(robot.state), strict=True))
    columns: list[int] = []
    sources: list[int] = []
    for group, start in zip(robot.action, _starts(robot.action), strict=True):
        if group.state:
            part = next((g for g in robot.state if g.name == group.state), None)
            if part is None or part.size != group.size:
                raise CheckpointError(f"{robot.tag}: action {group.name} is relative to state {group.state!r}")
            columns += range(start, start + group.size)
            sources += range(starts[group.state], starts[group.state] + group.size)
    added = Step("add_state", {"columns": columns, "state_columns": sources})
    return clip, Step("unnormalise_rows", {"low": lows, "high": highs}), added


def _starts(groups: Sequence[Group]) -> list[int]:
    return [sum(g.size for g in groups[:i]) for i in range(len(groups))]


def make_io(
    spec: GrootSpec, robot: Embodiment, pictures: tuple[Step, ...], around: tuple[str, str], options: ReadOptions
) -> IO:
    """Inputs and outputs of this robot."""
    state_dim, action_dim = (sum(g.size for g in groups) for groups in (robot.state, robot.action))
    if state_dim > spec.max_state_dim or action_dim > spec.max_action_dim:
        raise CheckpointError(f"{robot.tag}: {state_dim} states and {action_dim} actions, the network holds fewer")
    words = (Step("words_only"),) if robot.processor.take("formalize_language", True) else ()
    taken = (Step("take_rows", {"count": robot.rows}), Step("take", {"size": action_dim}))
    tokenise = {"max_length": spec.max_tokens, "padding": "longest", "truncation": False, "add_special_tokens": False}
    known = not options.no_stats
    width = 480 if pictures[0].step == "area_resize" else 640
    return IO(
        cameras=tuple(Camera(f"observation.images.{n}", (3, 480, width)) for n in robot.cameras),
        image_steps=pictures,
        state_key="observation.state",
        state_dim=state_dim,
        state_steps=state_steps(robot, spec.max_state_dim, known),
        text_steps=(
            Step("default_text", {"default": DEFAULT_TASK}),
            *words,
            Step("surround", {"before": around[0], "after": around[1]}),
            Step("tokenise", tokenise),
        ),
        action_key="action",
        action_dim=action_dim,
        max_action_dim=spec.max_action_dim,
        chunk_size=robot.rows,
        n_action_steps=min(8, robot.rows) if robot.tag == "libero_sim" else robot.rows,
        action_steps=(*taken, *(action_steps(robot) if known else ())),
        normalised_action_steps=taken,
        image_size=spec.vision.image_size,
        vocab_size=spec.text.vocab_size,
        units="robot" if known else "normalized",
        sampled_rows=spec.chunk_size,
    )
