"""Normalisation statistics of a LeRobot checkpoint, wherever its generation keeps them, and what they cover.

The best-known silent failure in the field is a checkpoint whose statistics are keyed under another name: LeRobot then
skips un-normalisation and the arm moves in the wrong units. Here every feature that is normalised must find statistics
of its own shape, or reading stops with the names that there are and the remedy.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from vlac.errors import CheckpointError, Unsupported
from vlac.io import Step
from vlac.readers.safetensors_file import open_file, read_json
from vlac.weights import Array, Weights

STATS = ("mean", "std", "min", "max", "q01", "q10", "q90", "q99")
"""What normalisation can read; files also hold q50 and count."""

NEEDED = {
    "MEAN_STD": ("mean", "std"),
    "MIN_MAX": ("min", "max"),
    "QUANTILES": ("q01", "q99"),
    "QUANTILE10": ("q10", "q90"),
}
"""Mode -> the statistics it reads. IDENTITY reads none."""

BUFFER_PREFIXES = (
    "normalize_targets.",
    "normalize.",
    "input_normalizer.",
    "normalize_inputs.",
    "output_normalizer.",
    "unnormalize.",
    "unnormalize_outputs.",
)
"""Where older generations kept statistics inside the weights; a later one wins over an earlier one."""

Table = Mapping[str, Mapping[str, Array]]
"""feature name -> statistic -> float32 values."""


@dataclass(frozen=True)
class Statistics:
    """A table of statistics and the file it came from. `unset` names features whose values were never filled in."""

    table: Table
    origin: str
    unset: tuple[str, ...] = ()

    @property
    def features(self) -> tuple[str, ...]:
        return tuple(sorted(self.table))


NO_STATISTICS = Statistics({}, "the checkpoint")


def _collect(entries: Iterable[tuple[str, str, Array]], origin: str) -> Statistics:
    """(feature, statistic, values) triples -> Statistics; non-finite values mean "never filled in"."""
    table: dict[str, dict[str, Array]] = {}
    unset: set[str] = set()
    for feature, stat, values in entries:
        if np.isfinite(values).all():
            table.setdefault(feature, {})[stat] = values
        else:
            unset.add(feature)
    return Statistics(table, origin, tuple(sorted(unset)))


def from_state_file(path: Path) -> Statistics:
    """Keys `{feature}.{stat}` of a (un)normaliser's safetensors file."""
    entries = []
    for key, tensor in open_file(path).items():
        feature, _, stat = key.rpartition(".")
        if feature and stat in STATS:
            # not .load(): infinities are legal here and mean "no statistics"
            entries.append((feature, stat, np.array(_raw(tensor.load_unchecked()))))
    return _collect(entries, path.name)


def _raw(values: Any) -> Array:
    return np.ascontiguousarray(values, dtype=np.float32)


def is_buffer(name: str) -> bool:
    """Whether a weight name is a normalisation buffer of an older generation."""
    return name.startswith(BUFFER_PREFIXES) and ".buffer_" in f".{name}"


def from_buffers(weights: Weights, features: Iterable[str], origin: str) -> Statistics:
    """Statistics inside the weights: `normalize_inputs.[group.]buffer_observation_state.mean` and the like.

    Underscores stand for dots; names are matched against the config's features, so that features whose names contain
    underscores are found. A group (a robot's name) stays in front: "so100.observation.state".
    """
    flat: dict[str, str] = {}
    for feature in features:
        key = feature.replace(".", "_")
        if flat.get(key, feature) != feature:
            raise CheckpointError(f"{origin}: buffer_{key} can mean {flat[key]} or {feature}")
        flat[key] = feature
    entries = []
    for prefix in BUFFER_PREFIXES:
        for name, tensor in weights.items():
            if not name.startswith(prefix):
                continue
            group, _, rest = name[len(prefix) :].rpartition("buffer_")
            flat_name, _, stat = rest.rpartition(".")
            if not flat_name or stat not in STATS:
                continue
            feature = flat.get(flat_name, flat_name.replace("_", "."))
            group = group.strip("._")
            entries.append((f"{group}.{feature}" if group else feature, stat, _raw(tensor.load_unchecked())))
    return _collect(entries, origin)


def from_dataset(path: Path) -> Statistics:
    """A LeRobot dataset's meta/stats.json: {feature: {stat: list}}."""
    table = read_json(path)
    if not isinstance(table, dict) or not all(isinstance(v, dict) for v in table.values()):
        raise CheckpointError(f"{path}: expected {{feature: {{statistic: values}}}}")
    entries = []
    for feature, stats in table.items():
        for stat, values in stats.items():
            if stat not in STATS:
                continue
            try:
                entries.append((feature, stat, np.asarray(values, dtype=np.float32)))
            except (TypeError, ValueError):
                raise CheckpointError(f"{path}: {feature}.{stat} is not an array of numbers") from None
    return _collect(entries, str(path))


@dataclass(frozen=True)
class Lookup:
    """Finds a feature's statistics under the name the user gave with --stats-key.

    `stats_key` is a group ("so100": so100.observation.state), or pairs "observation.state=joints,action=targets".
    """

    statistics: Statistics
    stats_key: str | None = None
    problems: list[str] = field(default_factory=list)

    def _candidates(self, feature: str) -> list[str]:
        key = self.stats_key
        if not key:
            return [feature]
        if "=" in key:
            pairs = dict(pair.split("=", 1) for pair in key.split(",") if "=" in pair)
            return [pairs.get(feature, feature)]
        return [f"{key}{separator}{feature}" for separator in (".", "/", "_")]

    def find(self, feature: str, mode: str, shape: tuple[int, ...], where: str) -> dict[str, list[Any]] | None:
        """The arrays that `mode` reads, as lists; None for IDENTITY. CheckpointError when missing or misshapen."""
        if mode == "IDENTITY":
            return None
        if mode not in NEEDED:
            raise Unsupported(
                f"{where}: normalisation mode {mode!r} of {feature}; known: IDENTITY, {', '.join(NEEDED)}"
            )
        table = self.statistics.table
        name = next((n for n in self._candidates(feature) if n in table), None)
        missing = NEEDED[mode] if name is None else tuple(s for s in NEEDED[mode] if s not in table[name])
        if name is None or missing:
            raise CheckpointError(self._missing(feature, mode, missing), remedy=self._remedy(feature))
        found = {stat: table[name][stat] for stat in NEEDED[mode]}
        for stat, values in found.items():
            if values.shape != shape:
                raise CheckpointError(
                    f"{self.statistics.origin}: {name}.{stat} has shape {list(values.shape)}, but the config's feature "
                    f"{feature} has shape {list(shape)}",
                    remedy="config and statistics come from different robots: correct the feature's shape in "
                    "config.json, or give the right statistics with --stats-from CKPT",
                )
        return {stat: values.tolist() for stat, values in found.items()}

    def _missing(self, feature: str, mode: str, stats: tuple[str, ...]) -> str:
        names = ", ".join(self.statistics.features[:20]) or "none"
        never = " (saved, but infinite or NaN: never filled in)" if feature in self.statistics.unset else ""
        under = f" under --stats-key {self.stats_key}" if self.stats_key else ""
        return (
            f"no statistics {', '.join(stats)} for {feature}{under}, which is normalised by {mode}{never}; without "
            f"them the robot would move in the wrong units. {self.statistics.origin} holds statistics for: {names}"
        )

    def _remedy(self, feature: str) -> str:
        near = [n for n in self.statistics.features if n != feature and n.endswith(feature)]
        group = near[0][: -len(feature)].strip("./_") if near else ""
        choose = "--stats-key NAME (or FEATURE=NAME)"
        if group:  # a group must cover every feature; where it does not, only this one is renamed
            whole = all(n.startswith(group) for n in self.statistics.features)
            choose = f"--stats-key {group}" if whole else f"--stats-key {feature}={near[0]}"
        return (
            f"{choose} if one of these is right, --stats-from CKPT or stats.json, or --no-stats (normalised units only)"
        )


def norm_step(kind: str, mode: str, eps: float, arrays: Mapping[str, Any] | None) -> tuple[Step, ...]:
    """The io step ("normalise" or "unnormalise") for a feature; nothing for IDENTITY."""
    return () if arrays is None else (Step(kind, {"mode": mode, "eps": eps, **arrays}),)
