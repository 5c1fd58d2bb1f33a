"""openpi's PyTorch folders: the same network as LeRobot's, openpi's own normalisation, prompts and resize."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from checkpoint_files import GOLDEN, edit_json, edit_tensors, read, read_tensors, write_tensors
from PIL import Image

import vlac
from vlac.errors import CheckpointError
from vlac.graph import Call, Repeat
from vlac.policy import Policy
from vlac.readers.openpi import CAMERAS
from vlac.registry import families
from vlac.runtime.observation import preprocess_image
from vlac.runtime.prompt import prompt_text
from vlac.runtime.session import execute, prepare
from vlac.spec import FlowSpec

HEADS = {"vision.num_attention_heads": 3}
Array = np.ndarray[Any, Any]
SOURCE = {"pi0": "pi0_tiny", "pi05": "pi05_tiny"}


def statistics(seed: int, size: int) -> dict[str, list[float]]:
    rng = np.random.default_rng(seed)
    mean, std = rng.standard_normal(size), rng.uniform(0.2, 2.0, size)
    std[-1] = 0.0
    return {"mean": mean.tolist(), "std": std.tolist(), "q01": (mean - 2 * std).tolist(), "q99": (mean + std).tolist()}


def openpi_folder(to: Path, kind: str, *assets: str, state: int = 7, action: int = 6) -> Path:
    """A golden's weights as openpi's converter writes them, with statistics and tokenizer."""
    source = GOLDEN / SOURCE[kind] / "checkpoint"
    folder = to / kind
    (folder / "tokenizer").mkdir(parents=True)
    tensors = read_tensors(source / "model.safetensors")
    write_tensors(folder / "model.safetensors", {n.removeprefix("model."): t for n, t in tensors.items()})
    (folder / "tokenizer" / "tokenizer.json").write_bytes((source / "tokenizer" / "tokenizer.json").read_bytes())
    config = {"action_dim": 10, "action_horizon": 8, "paligemma_variant": "gemma_2b", "precision": "bfloat16"}
    (folder / "config.json").write_text(json.dumps({**config, "action_expert_variant": "gemma_300m"}))
    for i, name in enumerate(assets or ("droid",)):
        (folder / "assets" / name).mkdir(parents=True)
        table = {"norm_stats": {"state": statistics(2 * i, state), "actions": statistics(2 * i + 1, action)}}
        (folder / "assets" / name / "norm_stats.json").write_text(json.dumps(table))
    return folder


@pytest.fixture(params=["pi0", "pi05"])
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def table_of(folder: Path, asset: str = "droid") -> Any:
    return json.loads((folder / "assets" / asset / "norm_stats.json").read_text())["norm_stats"]


def test_the_network_is_lerobots(kind: str, tmp_path: Path) -> None:
    policy = read(openpi_folder(tmp_path, kind), spec=HEADS)
    other = read(GOLDEN / SOURCE[kind] / "checkpoint", spec=HEADS)
    assert policy.family == kind and policy.flow == FlowSpec.euler(10)
    ours, theirs = (families.get(kind).build(p) for p in (policy, other))
    assert ours.params == theirs.params
    assert [s.nodes for s in ours.stages] == [s.nodes for s in theirs.stages]
    for name in ("expert.layers.1.mlp.up_proj.weight", "text.layers.0.input_layernorm.weight", "action_in_proj.bias"):
        np.testing.assert_array_equal(policy.weights[name].load(), other.weights[name].load())


def unnormalised(kind: str, table: dict[str, list[float]], x: Array) -> Array:
    """openpi's Unnormalize, in float64."""
    stat = {k: np.array(v) for k, v in table.items()}
    if kind == "pi0":
        return np.asarray(x * (stat["std"] + 1e-6) + stat["mean"])
    return np.asarray((x + 1.0) / 2.0 * (stat["q99"] - stat["q01"] + 1e-6) + stat["q01"])


def normalised(kind: str, table: dict[str, list[float]], x: Array) -> Array:
    """openpi's Normalize, in float64."""
    stat = {k: np.array(v) for k, v in table.items()}
    if kind == "pi0":
        return np.asarray((x - stat["mean"]) / (stat["std"] + 1e-6))
    return np.asarray((x - stat["q01"]) / (stat["q99"] - stat["q01"] + 1e-6) * 2.0 - 1.0)


def pictures(size: int = 56) -> dict[str, Array]:
    rng = np.random.default_rng(3)
    return {name: rng.integers(0, 256, (size, size, 3), dtype=np.uint8) for name in CAMERAS[:2]}


def run(policy: Policy, state: Array | None, task: str, noise: Array) -> tuple[Any, Array]:
    from vlac.goldens import reference_session

    program = families.get(policy.family).build(policy)
    ready = prepare(policy.io, policy.tokenizer, program, images=pictures(), state=state, task=task, noise=noise)
    return ready, execute(program, reference_session(program), ready.env, ready.symbols)


def test_an_artifact_acts_in_the_robots_units(kind: str, tmp_path: Path) -> None:
    folder = openpi_folder(tmp_path, kind)
    table = table_of(folder)
    state = np.array(table["state"]["mean"]) + 0.3 * np.array(table["state"]["std"])
    noise = np.random.default_rng(4).standard_normal((8, 10)).astype(np.float32)
    done = vlac.compile(folder, "onnx-fp32", tmp_path / "out", spec=HEADS, goldens=1)
    assert done.path is not None
    with vlac.load(done.path, engine="torch") as session:
        chunk = session.act(pictures(), state.astype(np.float32), "pick up", noise=noise)
        plain = session.act(
            pictures(), normalised(kind, table["state"], state).astype(np.float32), "pick up", noise=noise,
            units="normalized",
        )  # fmt: skip
    expected = unnormalised(kind, table["actions"], plain.astype(np.float64))
    np.testing.assert_allclose(chunk, expected, atol=2e-5)
    assert chunk.shape == (8, 6) and "assets/droid/norm_stats.json" in read(folder, spec=HEADS).source.files


def test_state_is_normalised_padded_or_told(kind: str, tmp_path: Path) -> None:
    folder = openpi_folder(tmp_path, kind)
    policy, table = read(folder, spec=HEADS), table_of(folder)
    state = np.linspace(-1, 1, 7).astype(np.float32)
    state[-1] = np.float32(table["state"]["mean"][-1])  # the last joint never moved: std 0
    ready, _ = run(policy, state, " put_it\naway", np.zeros((8, 10), np.float32))
    expected = normalised(kind, table["state"], state.astype(np.float64))
    if kind == "pi0":
        np.testing.assert_allclose(ready.env["state"][0, :6], expected[:6], rtol=1e-5, atol=1e-6)
        assert not ready.env["state"][0, 7:].any()
        assert prompt_text(policy.io.text_steps[:-1], " put_it\naway", None) == "put it away\n"
    else:
        told = prompt_text(policy.io.text_steps[:-1], " put_it\naway", expected.astype(np.float32))
        bins = np.digitize(expected.astype(np.float32), np.linspace(-1, 1, 257)[:-1]) - 1
        assert told == f"Task: put it away, State: {' '.join(map(str, bins))};\nAction: "
    assert policy.io.text_steps[-1].params["max_length"] == (48 if kind == "pi0" else 200)


def test_pi05_may_have_been_trained_without_the_state(tmp_path: Path) -> None:
    policy = read(openpi_folder(tmp_path, "pi05"), spec={**HEADS, "discrete_state_input": "false"})
    assert policy.io.state_dim == 0
    _, chunk = run(policy, None, "go", np.zeros((8, 10), np.float32))
    assert chunk.shape == (8, 10)


def test_no_config_is_needed(tmp_path: Path) -> None:
    folder = openpi_folder(tmp_path, "pi05")
    (folder / "config.json").unlink()
    policy = read(folder, spec=HEADS)
    assert policy.spec.chunk_size == 50 and any("--spec chunk_size" in w for w in policy.warnings)
    assert read(folder, spec={**HEADS, "chunk_size": "8"}).spec.chunk_size == 8
    steps = families.get("pi05").build(policy).schedule.steps
    assert [type(s) for s in steps] == [Call, Call, Repeat]


def fitted(picture: Array, size: int) -> Array:
    """openpi's client: Pillow's bilinear resize, pasted onto black."""
    h, w = picture.shape[:2]
    ratio = max(w / size, h / size)
    small = Image.fromarray(picture).resize((int(w / ratio), int(h / ratio)), Image.Resampling.BILINEAR)
    black = Image.new("RGB", (size, size), 0)
    black.paste(small, (int((size - small.width) / 2), int((size - small.height) / 2)))
    return np.asarray(black)


@pytest.mark.parametrize("shape", [(56, 56), (48, 64), (240, 320), (31, 20), (57, 90)])
def test_pictures_are_fitted_by_pillow_to_the_byte(shape: tuple[int, int], tmp_path: Path) -> None:
    steps = read(openpi_folder(tmp_path, "pi0"), spec=HEADS).io.image_steps
    picture = np.random.default_rng(1).integers(0, 256, (*shape, 3), dtype=np.uint8)
    expected = fitted(picture, 56).astype(np.float32) / 255.0 * 2.0 - 1.0
    np.testing.assert_allclose(preprocess_image(picture, steps), expected.transpose(2, 0, 1), atol=2e-7)


def test_one_of_several_statistics_is_chosen(tmp_path: Path) -> None:
    folder = openpi_folder(tmp_path, "pi0", "droid", "physical-intelligence/libero")
    with pytest.raises(CheckpointError, match=r"several statistics; there are: droid, physical-intelligence/libero"):
        read(folder, spec=HEADS)
    for key in ("physical-intelligence/libero", "libero"):
        step = read(folder, spec=HEADS, stats_key=key).io.state_steps[0]
        assert step.params["mean"] == table_of(folder, "physical-intelligence/libero")["state"]["mean"]
    assert read(folder, spec=HEADS, no_stats=True).io.units == "normalized"
    with pytest.raises(CheckpointError, match="no statistics for 'ur5'"):
        read(folder, spec=HEADS, stats_key="ur5")


def test_padded_statistics_can_be_cut_to_the_robot(tmp_path: Path) -> None:
    folder = openpi_folder(tmp_path, "pi0", state=10, action=10)
    assert read(folder, spec=HEADS).io.action_dim == 10
    policy = read(folder, spec={**HEADS, "state_dim": "7", "action_dim": "6"})
    assert (policy.io.state_dim, policy.io.action_dim) == (7, 6)
    assert len(policy.io.action_steps[1].params["std"]) == 6


def shorten(part: str) -> Callable[[Path], None]:
    path = "assets/droid/norm_stats.json"
    return lambda folder: edit_json(folder / path, lambda t: t["norm_stats"][part].update(std=[1.0], q99=["x"]))


BROKEN: dict[str, tuple[Callable[[Path], None], str]] = {
    "statistics of another length": (shorten("state"), "statistics of state: .* are not 7 finite numbers"),
    "statistics without actions": (
        lambda f: edit_json(f / "assets/droid/norm_stats.json", lambda t: t["norm_stats"].pop("actions") and None),
        "expected norm_stats with state and actions",
    ),
    "no tokenizer": (lambda f: (f / "tokenizer" / "tokenizer.json").unlink(), "the tokenizer"),
    "action_dim": (lambda f: edit_json(f / "config.json", lambda t: t.update(action_dim=32)), "action_dim is 32"),
    "a tensor more": (
        lambda f: edit_tensors(f / "model.safetensors", lambda t: t.update(extra=np.zeros(3, np.float32))),
        "tensors that the network does not have: extra",
    ),
}


@pytest.mark.parametrize("case", BROKEN)
def test_a_broken_folder_is_refused(case: str, tmp_path: Path) -> None:
    spoil, message = BROKEN[case]
    folder = openpi_folder(tmp_path, "pi0")
    spoil(folder)
    with pytest.raises(CheckpointError, match=message):
        read(folder, spec=HEADS)


@pytest.mark.parametrize("case", ["no tokenizer", "a tensor more"])
def test_inspecting_notes_what_compiling_refuses(case: str, tmp_path: Path) -> None:
    spoil, message = BROKEN[case]
    folder = openpi_folder(tmp_path, "pi0")
    spoil(folder)
    assert any(message in w for w in read(folder, spec=HEADS, headers_only=True).warnings)
