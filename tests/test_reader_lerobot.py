"""LeRobot folders: every generation reads the same, statistics never get lost silently, broken folders are refused."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Iterator
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
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from vlac.checkpoint import read_policy
from vlac.errors import CheckpointError, Unsupported, VlacError
from vlac.io import IO, Camera, Step
from vlac.readers import safetensors_file
from vlac.registry import ReadOptions

HEADERS = ReadOptions(headers_only=True)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A writable copy of smolvla_tiny."""
    return copy_golden(tmp_path)


# --- what goes in and out ---


def test_io_of_the_letterbox_golden() -> None:
    folder = GOLDEN / "smolvla_letterbox" / "checkpoint"
    stats = read_tensors(folder / PRE_STATE)
    io = golden_io("smolvla_letterbox")
    assert io.cameras == (
        Camera("observation.images.top", (3, 60, 80)),
        Camera("observation.images.wrist", (3, 50, 36)),
        Camera("observation.images.empty_camera_0", (3, 480, 640), optional=True),
    )
    assert io.image_steps == (
        Step("resize_with_pad", {"width": 48, "height": 48, "align": "right-bottom", "value": 0.0}),
        Step("affine", {"scale": 2.0, "offset": -1.0}),
    )
    mean, std = (stats[f"observation.state.{s}"].tolist() for s in ("mean", "std"))
    low, high = (stats[f"action.{s}"].tolist() for s in ("min", "max"))
    assert io.state_steps == (
        Step("normalise", {"mode": "MEAN_STD", "eps": 1e-8, "mean": mean, "std": std}),
        Step("pad", {"size": 8}),
    )
    assert io.action_steps == (
        Step("take", {"size": 7}),
        Step("unnormalise", {"mode": "MIN_MAX", "eps": 1e-8, "min": low, "max": high}),
    )
    assert io.normalised_action_steps == (Step("take", {"size": 7}),)
    tokenise = {"max_length": 20, "padding": "longest", "truncation": True, "add_special_tokens": True}
    assert io.text_steps == (Step("ensure_suffix", {"suffix": "\n"}), Step("tokenise", tokenise))
    assert (io.max_missing_cameras, io.image_size, io.vocab_size) == (1, 48, 272)
    assert (io.chunk_size, io.n_action_steps, io.action_dim, io.max_action_dim, io.state_dim) == (8, 5, 7, 9, 5)
    assert IO.from_json(io.to_json()) == io


def test_empty_cameras_are_appended_when_the_file_does_not_list_them(folder: Path) -> None:
    edit_config(folder, empty_cameras=2)
    cameras = read(folder).io.cameras
    assert [c.name for c in cameras] == ["top", "wrist", "empty_camera_0", "empty_camera_1"]
    assert [c.optional for c in cameras] == [False, False, True, True]


def test_rename_map(folder: Path) -> None:
    renames = {"observation.images.front": "observation.images.top"}
    edit_step(folder, PRE, "rename_observations_processor", lambda s: s["config"].update(rename_map=renames))
    assert read(folder).io.rename == renames


def test_image_statistics_become_a_step_before_the_resize(folder: Path) -> None:
    modes = {"VISUAL": "MEAN_STD", "STATE": "MEAN_STD", "ACTION": "MEAN_STD"}
    edit_config(folder, normalization_mapping=modes)
    edit_step(folder, PRE, "normalizer_processor", lambda s: s["config"].update(norm_map=modes))
    with pytest.raises(CheckpointError, match=r"no statistics mean, std for observation\.images\.top"):
        read(folder)

    def add(tensors: dict[str, np.ndarray[Any, Any]]) -> None:
        for camera in ("top", "wrist"):
            tensors[f"observation.images.{camera}.mean"] = np.full((3, 1, 1), 0.5, np.float32)
            tensors[f"observation.images.{camera}.std"] = np.full((3, 1, 1), 0.25, np.float32)

    edit_tensors(folder / PRE_STATE, add)
    steps = read(folder).io.image_steps
    assert [s.step for s in steps] == ["normalise", "resize_with_pad", "affine"]
    assert steps[0].params["std"] == [[[0.25]]] * 3
    assert read(folder, no_stats=True).io.image_steps == steps
    edit_tensors(folder / PRE_STATE, lambda t: t["observation.images.top.mean"].fill(0.1))
    with pytest.raises(Unsupported, match="cameras are normalised by different statistics"):
        read(folder)


# --- generations ---


@pytest.mark.parametrize("name", ["smolvla_tiny", "smolvla_letterbox"])
def test_older_generation_with_buffers_reads_the_same(tmp_path: Path, name: str) -> None:
    folder = copy_golden(tmp_path, name)
    to_older_generation(folder)
    assert read(folder).io == golden_io(name)


def test_underscores_in_feature_names_are_matched_against_the_config(folder: Path) -> None:
    to_older_generation(folder)

    def rename(table: dict[str, Any]) -> None:
        features = table["input_features"]
        table["input_features"] = {k.replace("images.top", "images.top_left"): v for k, v in features.items()}
        table["normalization_mapping"]["VISUAL"] = "MEAN_STD"
        del table["input_features"]["observation.images.wrist"]

    edit_json(folder / "config.json", rename)

    def add(tensors: dict[str, np.ndarray[Any, Any]]) -> None:
        for stat in ("mean", "std"):
            tensors[f"normalize_inputs.buffer_observation_images_top_left.{stat}"] = np.ones((3, 1, 1), np.float32)

    edit_tensors(folder / "model.safetensors", add)
    policy = read(folder)
    assert policy.io.cameras[0].key == "observation.images.top_left"
    assert policy.io.image_steps[0].step == "normalise"


def test_compiled_models_names_are_stripped(folder: Path) -> None:
    path = folder / "model.safetensors"
    write_tensors(path, {n.replace("model.", "model._orig_mod.", 1): t for n, t in read_tensors(path).items()})
    assert set(read(folder).weights) == set(read_policy(str(GOLDEN / "smolvla_tiny" / "checkpoint")).weights)


def test_the_same_tensor_under_both_names_is_refused(folder: Path) -> None:
    extra = {"model._orig_mod.state_proj.bias": np.zeros(48, np.float32)}
    edit_tensors(folder / "model.safetensors", lambda t: t.update(extra))
    with pytest.raises(CheckpointError, match="_orig_mod"):
        read(folder)


def test_sharded_weights(folder: Path) -> None:
    tensors = read_tensors(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names = sorted(tensors)
    weight_map = {}
    for i, part in enumerate((names[::2], names[1::2]), 1):
        shard = f"model-0000{i}-of-00002.safetensors"
        write_tensors(folder / shard, {n: tensors[n] for n in part})
        weight_map |= dict.fromkeys(part, shard)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    policy = read(folder)
    np.testing.assert_array_equal(policy.weights["state_proj.bias"].load(), tensors["model.state_proj.bias"])
    assert set(weight_map.values()) < set(policy.source.files)


def test_state_files_are_found_at_any_step_index(folder: Path) -> None:
    (folder / PRE_STATE).rename(folder / "policy_preprocessor_step_9_normalizer_processor.safetensors")

    def insert(table: dict[str, Any]) -> None:
        table["steps"][5]["state_file"] = "policy_preprocessor_step_9_normalizer_processor.safetensors"
        table["steps"][1:1] = [{"registry_name": "to_batch_processor", "config": {}}] * 4

    edit_json(folder / PRE, insert)
    assert read(folder).io == golden_io()


def test_half_precision_files(folder: Path) -> None:
    path = folder / "model.safetensors"
    tensors = read_tensors(path)
    write_tensors(path, {n: t.astype(np.float16) if "mlp" in n else t for n, t in tensors.items()})
    weights = read(folder).weights
    name = "text.layers.0.mlp.up_proj.weight"
    assert weights[name].dtype == "f16"
    expected = tensors["model.vlm_with_expert.vlm.model.text_model.layers.0.mlp.up_proj.weight"]
    np.testing.assert_array_equal(weights[name].load(), expected.astype(np.float16))


def test_trainers_output_folder_is_understood(tmp_path: Path) -> None:
    copy_golden(tmp_path / "run").rename(tmp_path / "run" / "pretrained_model")
    assert read(tmp_path / "run").io == golden_io()


def test_embedding_saved_tied_is_found_under_lm_head(folder: Path) -> None:
    embedding = "model.vlm_with_expert.vlm.model.text_model.embed_tokens.weight"
    edit_tensors(
        folder / "model.safetensors", lambda t: t.update({"model.vlm_with_expert.vlm.lm_head.weight": t.pop(embedding)})
    )
    assert read(folder).weights["text.embed_tokens.weight"].shape == (272, 48)


# --- config keys ---


def test_every_config_key_is_consumed_or_listed(folder: Path) -> None:
    keys = set(json.loads((folder / "config.json").read_text()))
    policy = read(folder)
    assert policy.warnings == ()
    assert set(policy.ignored) < keys and {"optimizer_lr", "device", "train_expert_only"} <= set(policy.ignored)
    assert not {"chunk_size", "prefix_length", "num_steps"} & set(policy.ignored)


def test_unknown_config_keys_are_named(folder: Path) -> None:
    edit_config(folder, secret_sauce=1, other=2)
    assert "config.json: unknown keys, not used: secret_sauce, other" in read(folder).warnings


def test_real_time_chunking_is_named(folder: Path) -> None:
    edit_config(folder, rtc_config={"enabled": True})
    assert any("rtc_config" in w for w in read(folder).warnings)


# --- broken folders ---


def write(name: str, text: str) -> Callable[[Path], Any]:
    return lambda folder: (folder / name).write_text(text)


def pre_step(kind: str, edit: Callable[[dict[str, Any]], Any]) -> Callable[[Path], Any]:
    return lambda folder: edit_step(folder, PRE, kind, edit)


def custom_code(table: dict[str, Any]) -> None:
    table["steps"][2] = {"class": "somewhere.Step", "config": {}}


def unknown_step(table: dict[str, Any]) -> None:
    table["steps"][2] = {"registry_name": "magic_processor", "config": {}}


def tensors(edit: Callable[[dict[str, np.ndarray[Any, Any]]], Any]) -> Callable[[Path], Any]:
    return lambda folder: edit_tensors(folder / "model.safetensors", edit)


def truncate(name: str, by: int) -> Callable[[Path], Any]:
    return lambda folder: (folder / name).write_bytes((folder / name).read_bytes()[:-by])


BIAS = "model.state_proj.bias"
NORM = "normalizer_processor"
BROKEN: dict[str, tuple[Callable[[Path], Any], type[VlacError], str]] = {
    "config is not JSON": (write("config.json", "{"), CheckpointError, r"config\.json: not valid JSON"),
    "config key twice": (write("config.json", '{"type": 1, "type": 2}'), CheckpointError, "'type' appears twice"),
    "no config": (lambda f: (f / "config.json").unlink(), VlacError, r"no config\.json"),
    "unknown type": (lambda f: edit_config(f, type="act"), Unsupported, "policy type 'act' .*known: .*smolvla"),
    "type is a list": (lambda f: edit_config(f, type=["smolvla"]), Unsupported, "policy type"),
    "not a policy": (write("config.json", '{"model_type": "llama"}'), Unsupported, "names no policy type"),
    "config is a list": (write("config.json", "[]"), Unsupported, "names no policy type"),
    "no weights": (lambda f: (f / "model.safetensors").unlink(), CheckpointError, r"no model\.safetensors"),
    "weights as pickle": (
        lambda f: (f / "model.safetensors").rename(f / "model.pt"),
        CheckpointError,
        r"only as pickle \(model\.pt\)",
    ),
    "weights truncated": (truncate("model.safetensors", 5), CheckpointError, r"model\.safetensors: tensors end"),
    "statistics truncated": (truncate(PRE_STATE, 5), CheckpointError, f"{PRE_STATE}: tensors end"),
    "tensor missing": (tensors(lambda t: t.pop(BIAS)), CheckpointError, f"tensor {BIAS} is missing"),
    "tensor misshapen": (
        tensors(lambda t: t.update({BIAS: np.zeros(47, np.float32)})),
        CheckpointError,
        rf"tensor {BIAS} has shape \[47\], config and sizes give \[48\]",
    ),
    "tensor of integers": (
        tensors(lambda t: t.update({BIAS: np.zeros(48, np.int64)})),
        CheckpointError,
        f"tensor {BIAS} is I64, expected F64",
    ),
    "unknown tensor": (
        tensors(lambda t: t.update({"model.extra": np.zeros(3, np.float32)})),
        CheckpointError,
        r"1 tensors that the network does not have: model\.extra",
    ),
    "one processor file": (lambda f: (f / POST).unlink(), CheckpointError, f"{POST} is missing"),
    "processor is not JSON": (write(PRE, "nothing"), CheckpointError, f"{PRE}: not valid JSON"),
    "processor without steps": (write(PRE, "{}"), CheckpointError, f"{PRE}: no list of steps"),
    "custom code": (lambda f: edit_json(f / PRE, custom_code), Unsupported, r"somewhere\.Step.*runs no code"),
    "unknown step": (lambda f: edit_json(f / PRE, unknown_step), Unsupported, "step 2 .magic_processor.: unknown step"),
    "state file elsewhere": (
        pre_step(NORM, lambda s: s.update(state_file="../x.safetensors")),
        CheckpointError,
        r"state_file: '\.\./x\.safetensors' is not a plain file name",
    ),
    "state file absolute": (
        pre_step(NORM, lambda s: s.update(state_file="/tmp/x.safetensors")),
        CheckpointError,
        "is not a plain file name",
    ),
    "eps is text": (pre_step(NORM, lambda s: s["config"].update(eps="x")), CheckpointError, "eps is 'x'"),
    "norm_map is a list": (
        pre_step(NORM, lambda s: s["config"].update(norm_map=["x"])),
        CheckpointError,
        "expected an object of names",
    ),
    "two normalisers": (
        lambda f: edit_json(f / PRE, lambda t: t["steps"].append(t["steps"][5])),
        CheckpointError,
        "a second step of this kind",
    ),
    "left padding": (
        pre_step("tokenizer_processor", lambda s: s["config"].update(padding_side="left")),
        Unsupported,
        "padding_side 'left'",
    ),
    "unknown padding": (
        pre_step("tokenizer_processor", lambda s: s["config"].update(padding="left")),
        Unsupported,
        "padding 'left'",
    ),
    "unknown truncation": (
        pre_step("tokenizer_processor", lambda s: s["config"].update(truncation="middle")),
        Unsupported,
        "truncation 'middle'",
    ),
    "tokenizer without a name": (
        pre_step("tokenizer_processor", lambda s: s["config"].pop("tokenizer_name")),
        Unsupported,
        "no tokenizer_name",
    ),
    "no prompt at all": (
        pre_step("tokenizer_processor", lambda s: s["config"].update(max_length=0)),
        CheckpointError,
        "max_length 0",
    ),
    "no tokenizer step": (
        lambda f: edit_json(f / PRE, lambda t: t["steps"].pop(3) and None),
        Unsupported,
        "expected one tokenizer_processor",
    ),
    "newline after the tokenizer": (
        lambda f: edit_json(f / PRE, lambda t: t["steps"].insert(5, t["steps"].pop(2))),
        Unsupported,
        "text steps tokenizer, smolvla_new_line_processor",
    ),
    "no tokenizer file": (
        lambda f: (f / "vlm" / "tokenizer.json").unlink(),
        CheckpointError,
        r"the tokenizer is named 'vlm', but there is no tokenizer\.json",
    ),
    "tokenizer is not one": (write("vlm/tokenizer.json", "{}"), CheckpointError, "tokenizers cannot load it"),
    "tokenizer is not JSON": (write("vlm/tokenizer.json", "x"), CheckpointError, r"tokenizer\.json: not valid JSON"),
}


@pytest.mark.parametrize("case", BROKEN, ids=str)
def test_broken_folder_is_refused(folder: Path, case: str) -> None:
    spoil, error, message = BROKEN[case]
    spoil(folder)
    with pytest.raises(error, match=message):
        read(folder)


def test_nan_weights_are_named_when_loaded(folder: Path) -> None:
    edit_tensors(folder / "model.safetensors", lambda t: t[BIAS].fill(np.nan))
    with pytest.raises(CheckpointError, match=rf"{BIAS}: 48 of 48 values are NaN or Inf"):
        read(folder).weights["state_proj.bias"].load()


def test_nan_is_refused_in_tensors_that_inference_never_reads(folder: Path) -> None:
    head = "model.vlm_with_expert.vlm.lm_head.weight"
    edit_tensors(folder / "model.safetensors", lambda t: t[head].__setitem__((3, 4), np.inf))
    with pytest.raises(CheckpointError, match=rf"{head}: 1 of \d+ values are NaN or Inf"):
        read(folder)
    assert read_policy(str(folder), HEADERS).parameters


def test_headers_only_reads_no_weight(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = golden_io()
    loaded: list[str] = []
    load = safetensors_file._load

    def spy(mapped: Any, name: str, info: Any) -> Any:
        loaded.append(mapped._header.path.name)
        return load(mapped, name, info)

    monkeypatch.setattr(safetensors_file, "_load", spy)
    policy = read_policy(str(folder), HEADERS)
    assert policy.io == expected and set(loaded) == {PRE_STATE, POST_STATE}


def test_source_names_every_file(folder: Path) -> None:
    source = read(folder).source
    assert {"config.json", "model.safetensors", "vlm/tokenizer.json", PRE, PRE_STATE} <= set(source.files)
    assert all(len(f["sha256"]) == 64 and f["size"] > 0 for f in source.files.values())


# --- any value anywhere ---

JSON_FILES = ("config.json", PRE, POST, "vlm/config.json")
WILD = [None, True, -1, 0, 1, 3.5, 10**30, float("inf"), "x", "", "../..", "\0", [], [1], [None], {}, {"a": 1}]


def places(value: Any, here: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Paths of every value inside a JSON document."""
    yield here
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in items:
        yield from places(inner, (*here, key))


def replaced(document: Any, place: tuple[Any, ...], value: Any) -> Any:
    if not place:
        return value
    document = copy.copy(document)
    document[place[0]] = replaced(document[place[0]], place[1:], value)
    return document


DOCUMENTS = {name: json.loads((GOLDEN / "smolvla_tiny" / "checkpoint" / name).read_text()) for name in JSON_FILES}
PLACES = [(name, place) for name, document in DOCUMENTS.items() for place in places(document)]


@pytest.fixture(scope="module")
def spoiled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return copy_golden(tmp_path_factory.mktemp("wild"))


@settings(max_examples=250, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.sampled_from(PLACES), st.sampled_from(WILD), st.booleans())
def test_any_value_in_any_place_reads_or_is_refused(
    spoiled: Path, where: tuple[str, tuple[Any, ...]], value: Any, headers_only: bool
) -> None:
    name, place = where
    original = DOCUMENTS[name]
    (spoiled / name).write_text(json.dumps(replaced(original, place, value)))
    try:
        policy = read(spoiled, headers_only=headers_only)
        assert IO.from_json(policy.io.to_json()) == policy.io
    except VlacError as error:
        assert error.message
    finally:
        (spoiled / name).write_text(json.dumps(original))
