"""Tokenizers, backbones, adapters and checkpoints that lie elsewhere: found, or refused with the remedy."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from checkpoint_files import (
    GOLDEN,
    PRE,
    copy_golden,
    edit_config,
    edit_json,
    edit_step,
    edit_tensors,
    golden_io,
    read,
    read_tensors,
    write_tensors,
)

from vlac.checkpoint import read_policy
from vlac.errors import CheckpointError, Unsupported, VlacError
from vlac.registry import ReadOptions


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A writable copy of smolvla_tiny."""
    return copy_golden(tmp_path)


def name_tokenizer(folder: Path, name: str) -> None:
    edit_step(folder, PRE, "tokenizer_processor", lambda s: s["config"].update(tokenizer_name=name))


@pytest.mark.parametrize("name", ["someone/vlm", "/home/trainer/vlm", "../models/vlm", "C:\\models\\vlm"])
def test_tokenizer_is_found_by_the_last_part_of_its_name(folder: Path, name: str) -> None:
    name_tokenizer(folder, name)
    if ":" in name:
        with pytest.raises(CheckpointError, match="is named"):
            read(folder)
        return
    assert read(folder).tokenizer == (folder / "vlm" / "tokenizer.json").read_bytes()


def test_nothing_outside_the_checkpoint_is_read(folder: Path) -> None:
    shutil.move(folder / "vlm", folder.parent / "outside")
    name_tokenizer(folder, "../outside")
    edit_config(folder, vlm_model_name="../outside")
    with pytest.raises(CheckpointError, match=r"'\.\./outside'"):
        read(folder)


def test_tokenizer_on_the_hub_offline_names_the_remedies(folder: Path) -> None:
    name_tokenizer(folder, "nobody/no-such-tokenizer")
    with pytest.raises(CheckpointError) as refused:
        read(folder)
    text = str(refused.value)
    assert "nobody/no-such-tokenizer" in text and "place a folder 'no-such-tokenizer'" in text and "HF_HOME" in text
    policy = read(folder, headers_only=True)
    assert policy.tokenizer is None and any("no-such-tokenizer" in w for w in policy.warnings)


def test_tokenizer_files_own_truncation_and_padding_are_taken_out(folder: Path) -> None:
    path = folder / "vlm" / "tokenizer.json"
    truncation = {"direction": "Right", "max_length": 2, "strategy": "LongestFirst", "stride": 0}
    edit_json(path, lambda t: t.update(truncation=truncation))
    tokenizer = read(folder).tokenizer
    assert tokenizer is not None and json.loads(tokenizer)["truncation"] is None


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty hub cache that the client uses, offline."""
    from huggingface_hub import constants

    cache = tmp_path / "hub"
    cache.mkdir()
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    return cache


def put_in_cache(cache: Path, repo: str, folder: Path) -> None:
    """A repository as the hub's client lays it out: blobs, and links in a snapshot."""
    root = cache / f"models--{repo.replace('/', '--')}"
    commit = "0" * 40
    (root / "blobs").mkdir(parents=True)
    (root / "refs").mkdir()
    (root / "refs" / "main").write_text(commit)
    for i, file in enumerate(sorted(p for p in folder.rglob("*") if p.is_file())):
        link = root / "snapshots" / commit / file.relative_to(folder)
        link.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(file, root / "blobs" / str(i))
        link.symlink_to(root / "blobs" / str(i))


def test_a_hub_id_is_read_from_the_cache_offline(hub: Path, folder: Path) -> None:
    put_in_cache(hub, "someone/my_smolvla", folder)
    policy = read_policy("someone/my_smolvla")
    assert policy.io == golden_io()
    assert (policy.name, policy.source.checkpoint, policy.source.revision) == (
        "my_smolvla",
        "someone/my_smolvla",
        "0" * 40,
    )


def test_backbone_and_tokenizer_are_read_from_the_cache(hub: Path, folder: Path) -> None:
    put_in_cache(hub, "someone/tiny-vlm", folder / "vlm")
    shutil.rmtree(folder / "vlm")
    name_tokenizer(folder, "someone/tiny-vlm")
    edit_config(folder, vlm_model_name="someone/tiny-vlm")
    assert read(folder).spec == read_policy(str(GOLDEN / "smolvla_tiny" / "checkpoint")).spec


def test_a_hub_id_that_is_not_in_the_cache_is_refused_offline(hub: Path) -> None:
    with pytest.raises(VlacError, match=r"nobody/nothing.*(?s:.*)HF_HOME"):
        read_policy("nobody/nothing")


@pytest.mark.parametrize("name", ["no such folder", "a/b/c", "", "../../x"])
def test_what_is_neither_folder_nor_hub_id_is_refused(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(VlacError):
        read_policy(name)


def test_a_file_is_not_a_checkpoint(folder: Path) -> None:
    with pytest.raises(Unsupported, match="a file that no reader knows"):
        read_policy(str(folder / "model.safetensors"))


def client_error(name: str) -> Exception:
    """One of the client's errors, whatever its constructor wants in this version."""
    from huggingface_hub import errors

    kind = getattr(errors, name)
    error = kind.__new__(kind)
    Exception.__init__(error, "first line\nsecond line")
    assert isinstance(error, Exception)
    return error


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("GatedRepoError", "is gated on the hub.*(?s:.*)HF_TOKEN"),
        ("RepositoryNotFoundError", "neither a local folder nor a repository"),
        ("RevisionNotFoundError", "has no revision v9"),
        ("LocalEntryNotFoundError", "at revision v9 is not in the hub cache"),
        ("EntryNotFoundError", "does not exist on the hub"),
        ("HfHubHTTPError", "cannot be fetched: "),
        ("HFValidationError", "cannot be fetched: first line$"),
    ],
)
def test_the_clients_errors_say_what_to_do(monkeypatch: pytest.MonkeyPatch, name: str, message: str) -> None:
    import huggingface_hub

    def fail(*_: Any, **__: Any) -> str:
        raise client_error(name)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
    with pytest.raises(VlacError, match=f"(?m)checkpoint someone/thing.*{message}"):
        read_policy("someone/thing", ReadOptions(revision="v9"))


def test_only_data_files_are_asked_for(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    import huggingface_hub

    asked: dict[str, Any] = {}

    def answer(repo: str, **options: Any) -> str:
        asked.update(options, repo=repo)
        return str(folder)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", answer)
    assert read_policy("someone/thing", ReadOptions(revision="v9")).io == golden_io()
    assert (asked["repo"], asked["revision"], asked["allow_patterns"]) == (
        "someone/thing",
        "v9",
        ["*.json", "*.safetensors"],
    )


# --- LoRA ---


def make_adapter(folder: Path, **config: Any) -> dict[str, np.ndarray[Any, Any]]:
    """Moves the weights into `base` and puts an adapter beside it; returns the adapter's tensors."""
    base = folder / "base"
    base.mkdir()
    (folder / "model.safetensors").rename(base / "model.safetensors")
    rng = np.random.default_rng(0)
    module = "base_model.model.model.vlm_with_expert.lm_expert.layers.0.self_attn.q_proj"
    tensors = {
        f"{module}.lora_A.weight": rng.standard_normal((4, 36)).astype(np.float32),
        f"{module}.lora_B.weight": rng.standard_normal((72, 4)).astype(np.float32),
        "base_model.model.model.state_proj.bias": rng.standard_normal(48).astype(np.float32),
    }
    write_tensors(folder / "adapter_model.safetensors", tensors)
    table = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "base_model_name_or_path": "base", **config}
    (folder / "adapter_config.json").write_text(json.dumps(table))
    edit_config(folder, use_peft=True)
    return tensors


@pytest.mark.parametrize(("config", "scale"), [({}, 2.0), ({"use_rslora": True}, 4.0)])
def test_lora_is_merged(folder: Path, config: dict[str, Any], scale: float) -> None:
    a, b, bias = make_adapter(folder, **config).values()
    weights = read(folder).weights
    name = "model.vlm_with_expert.lm_expert.layers.0.self_attn.q_proj.weight"
    expected = read_tensors(folder / "base" / "model.safetensors")[name] + scale * b @ a
    np.testing.assert_allclose(
        weights["expert.layers.0.self_attn.q_proj.weight"].load(), expected, rtol=1e-5, atol=1e-5
    )
    np.testing.assert_array_equal(weights["state_proj.bias"].load(), bias)


@pytest.mark.parametrize(
    ("config", "error", "message"),
    [
        ({"use_dora": True}, CheckpointError, "use_dora is True, lora_magnitude_vector is missing"),
        ({"lora_bias": True}, Unsupported, "lora_bias"),
        ({"peft_type": "IA3"}, Unsupported, "peft_type 'IA3'"),
        ({"fan_in_fan_out": True}, Unsupported, "fan_in_fan_out"),
        ({"init_lora_weights": "pissa"}, Unsupported, "init_lora_weights"),
        ({"rank_pattern": {"q_proj": 2}}, CheckpointError, "do not fit r=2"),
        ({"rank_pattern": {"q_proj": -1}}, CheckpointError, "expected a number above 0"),
        ({"alpha_pattern": {"(q": 1}}, CheckpointError, "no regular expression"),
        ({"r": 3}, CheckpointError, "r=3"),
        ({"r": 0}, CheckpointError, "r = 0"),
        ({"base_model_name_or_path": "../elsewhere"}, CheckpointError, "'../elsewhere' is neither a folder inside"),
        ({"base_model_name_or_path": None}, CheckpointError, "no base_model_name_or_path"),
        ({"base_model_name_or_path": "someone/base-model"}, VlacError, "someone/base-model"),
    ],
    ids=str,
)
def test_adapter_that_is_refused(folder: Path, config: dict[str, Any], error: type[VlacError], message: str) -> None:
    make_adapter(folder, **config)
    with pytest.raises(error, match=message):
        read(folder)


def test_adapter_for_a_tensor_that_is_not_there_is_refused(folder: Path) -> None:
    make_adapter(folder)
    edit_tensors(
        folder / "adapter_model.safetensors", lambda t: t.update({"base_model.model.x": np.zeros(2, np.float32)})
    )
    with pytest.raises(CheckpointError, match="tensor x belongs to no tensor"):
        read(folder)


def test_use_peft_without_an_adapter_is_refused(folder: Path) -> None:
    edit_config(folder, use_peft=True)
    with pytest.raises(CheckpointError, match=r"adapter_config\.json is missing"):
        read(folder)
