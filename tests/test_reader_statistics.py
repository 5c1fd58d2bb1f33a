"""Statistics: under whatever name and wherever they are, nothing passes silently that makes a robot wrong."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from checkpoint_files import (
    GOLDEN,
    POST,
    POST_STATE,
    PRE,
    PRE_STATE,
    copy_golden,
    edit_config,
    edit_json,
    edit_step,
    edit_tensors,
    golden_io,
    read,
    read_tensors,
    to_older_generation,
    write_tensors,
)

from vlac.errors import CheckpointError, Unsupported


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A writable copy of smolvla_tiny."""
    return copy_golden(tmp_path)


def rename_statistics(folder: Path, prefix: str) -> None:
    for file in (PRE_STATE, POST_STATE):
        path = folder / file
        write_tensors(path, {f"{prefix}.{n}": t for n, t in read_tensors(path).items()})


def test_statistics_under_another_name_are_refused_with_the_remedy(folder: Path) -> None:
    rename_statistics(folder, "so100")
    with pytest.raises(CheckpointError) as refused:
        read(folder)
    text = str(refused.value)
    assert "no statistics mean, std for observation.state" in text
    assert "so100.action, so100.observation.state" in text
    assert all(remedy in text for remedy in ("--stats-key so100", "--stats-from", "--no-stats"))


def test_inspect_names_both_problems_and_goes_on(folder: Path) -> None:
    rename_statistics(folder, "so100")
    warnings = "\n".join(read(folder, headers_only=True).warnings)
    assert "for observation.state" in warnings and "for action" in warnings and "--stats-key so100" in warnings


@pytest.mark.parametrize("key", ["so100", "observation.state=so100.observation.state,action=so100.action"])
def test_stats_key_finds_them(folder: Path, key: str) -> None:
    rename_statistics(folder, "so100")
    assert read(folder, stats_key=key).io == golden_io()


def test_stats_key_that_is_not_there_is_refused(folder: Path) -> None:
    with pytest.raises(CheckpointError, match="under --stats-key aloha"):
        read(folder, stats_key="aloha")


def test_buffers_of_one_robot_need_its_name(folder: Path) -> None:
    to_older_generation(folder, group="so100.")
    with pytest.raises(CheckpointError, match=r"(?s)so100\.action.*--stats-key so100"):
        read(folder)
    assert read(folder, stats_key="so100").io == golden_io()


def _action_under_another_name(tensors: dict[str, Any]) -> None:
    for name in [n for n in tensors if n.startswith("action.")]:
        tensors[f"arm.{name}"] = tensors.pop(name)


def test_one_feature_under_another_name_gets_a_remedy_that_works(folder: Path) -> None:
    for file in (PRE_STATE, POST_STATE):
        edit_tensors(folder / file, _action_under_another_name)
    with pytest.raises(CheckpointError) as refused:
        read(folder)
    given = re.search(r"--stats-key (\S+) if", refused.value.remedy)
    assert given and read(folder, stats_key=given[1]).io == golden_io()


def test_infinite_buffers_are_no_statistics(folder: Path) -> None:
    to_older_generation(folder)
    name = "normalize_inputs.buffer_observation_state.mean"
    edit_tensors(folder / "model.safetensors", lambda t: t[name].fill(np.inf))
    with pytest.raises(CheckpointError, match="never filled in"):
        read(folder)


def test_config_that_contradicts_its_statistics_is_refused(folder: Path) -> None:
    for file in (PRE_STATE, POST_STATE):
        edit_tensors(folder / file, lambda t: t.update({n: np.resize(a, 8) for n, a in t.items() if "state" in n}))
    message = r"observation\.state\.mean has shape \[8\], but the config's feature observation\.state has shape \[6\]"
    with pytest.raises(CheckpointError, match=message):
        read(folder)
    assert any("has shape [8]" in w for w in read(folder, headers_only=True).warnings)


def test_missing_statistics_file_is_refused(folder: Path) -> None:
    (folder / POST_STATE).unlink()
    with pytest.raises(CheckpointError, match=rf"for action.*\n?.*{POST_STATE} \(named by .*, but missing\)"):
        read(folder)


def test_one_missing_statistic_is_named(folder: Path) -> None:
    edit_tensors(folder / POST_STATE, lambda t: t.pop("action.std"))
    with pytest.raises(CheckpointError, match="no statistics std for action"):
        read(folder)


def test_feature_that_the_normaliser_does_not_list_is_refused(folder: Path) -> None:
    edit_step(folder, POST, "unnormalizer_processor", lambda s: s["config"].update(features={}))
    with pytest.raises(CheckpointError, match="its features do not list action"):
        read(folder)


def test_processor_without_a_normaliser_is_refused(folder: Path) -> None:
    edit_json(folder / POST, lambda t: t.update(steps=t["steps"][1:]))
    with pytest.raises(CheckpointError, match=r"policy_postprocessor\.json: no unnormalizer_processor, so action"):
        read(folder)


def test_identity_needs_no_statistics(folder: Path) -> None:
    modes = {"VISUAL": "IDENTITY", "STATE": "IDENTITY", "ACTION": "IDENTITY"}
    edit_config(folder, normalization_mapping=modes)
    for file, kind in ((PRE, "normalizer_processor"), (POST, "unnormalizer_processor")):
        edit_step(folder, file, kind, lambda s: (s.pop("state_file"), s["config"].update(norm_map=modes)))
    policy = read(folder)
    assert [s.step for s in policy.io.state_steps] == ["pad"]
    assert [s.step for s in policy.io.action_steps] == ["take"]
    assert policy.warnings == ()


def test_the_processors_mode_is_the_one_that_runs(folder: Path) -> None:
    edit_config(folder, normalization_mapping={"STATE": "MIN_MAX", "ACTION": "IDENTITY"})
    policy = read(folder)
    assert policy.io == golden_io()
    notes = [w.split(":")[1].strip() for w in policy.warnings]
    assert notes == ["STATE MIN_MAX is not used", "ACTION IDENTITY is not used"]


@pytest.mark.parametrize("change", [{"norm_map": {}}, {"features": {"action": {"type": "ENV", "shape": [6]}}}], ids=str)
def test_processor_that_skips_what_the_config_normalises_is_refused(folder: Path, change: dict[str, Any]) -> None:
    edit_step(folder, POST, "unnormalizer_processor", lambda s: s["config"].update(change))
    with pytest.raises(CheckpointError, match=r"passes action unchanged, but config\.json normalises ACTION"):
        read(folder)


def test_unknown_mode_is_refused(folder: Path) -> None:
    edit_step(folder, POST, "unnormalizer_processor", lambda s: s["config"].update(norm_map={"ACTION": "LOG"}))
    with pytest.raises(Unsupported, match="normalisation mode 'LOG' of action"):
        read(folder)


def test_no_stats_keeps_everything_normalised(folder: Path) -> None:
    rename_statistics(folder, "so100")
    (folder / POST_STATE).unlink()
    io = read(folder, no_stats=True).io
    assert io.units == "normalized"
    assert [s.step for s in (*io.state_steps, *io.action_steps)] == ["pad", "take"]


@pytest.mark.parametrize("place", ["stats.json", "meta/stats.json"])
def test_stats_from_a_dataset(folder: Path, tmp_path: Path, place: str) -> None:
    stats: dict[str, dict[str, Any]] = {}
    for key, values in read_tensors(folder / PRE_STATE).items():
        feature, _, stat = key.rpartition(".")
        stats.setdefault(feature, {"count": [7]})[stat] = values.tolist()
    file = tmp_path / "data" / place
    file.parent.mkdir(parents=True)
    file.write_text(json.dumps(stats))
    rename_statistics(folder, "other")
    assert read(folder, stats_from=str(file)).io == golden_io()
    assert read(folder, stats_from=str(tmp_path / "data")).io == golden_io()


def test_stats_from_another_checkpoint(folder: Path) -> None:
    rename_statistics(folder, "other")
    source = str(GOLDEN / "smolvla_tiny" / "checkpoint")
    assert read(folder, stats_from=source).io == golden_io()
    with pytest.raises(CheckpointError, match=r"observation\.state\.mean has shape \[5\]"):
        read(folder, stats_from=str(GOLDEN / "smolvla_letterbox" / "checkpoint"))


@pytest.mark.parametrize("text", ["[]", '{"action": 3}', '{"action": {"mean": "x"}}', "{"])
def test_broken_stats_json_is_refused(folder: Path, tmp_path: Path, text: str) -> None:
    (tmp_path / "stats.json").write_text(text)
    with pytest.raises(CheckpointError, match=r"stats\.json"):
        read(folder, stats_from=str(tmp_path / "stats.json"))


def test_stats_from_nothing_is_refused(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="neither a stats"):
        read(folder, stats_from=str(tmp_path))
