"""SmolVLA: every tap of the golden observations in the reference engine, and what is refused by name."""

from __future__ import annotations

import dataclasses
import json
import math
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from checkpoint_files import GOLDEN, copy_golden, edit_config, edit_json, edit_tensors, read_tensors

from vlac.checkpoint import read_policy
from vlac.engines.numpy_engine import NumpySession
from vlac.errors import CheckpointError, Unsupported, VlacError
from vlac.families import smolvla
from vlac.graph import Program
from vlac.policy import Policy
from vlac.program_text import parse
from vlac.readers import lerobot_smolvla
from vlac.registry import ReadOptions
from vlac.spec import DecoderSpec, VisionSpec

NAMES = ("smolvla_tiny", "smolvla_letterbox")
VLM = "model.vlm_with_expert.vlm.model."
Arrays = dict[str, np.ndarray[Any, Any]]


def relative(a: np.ndarray[Any, Any], b: np.ndarray[Any, Any]) -> float:
    """max|a-b| / max|b|."""
    return float(np.abs(a - b).max() / np.abs(b).max())


def showing(program: Program, **extra: tuple[str, ...]) -> Program:
    """The program with more values leaving its stages."""
    stages = (dataclasses.replace(s, outputs=s.outputs + extra.get(s.name, ())) for s in program.stages)
    return program.replace(stages=tuple(stages))


def session(policy: Policy) -> NumpySession:
    program = smolvla.build(policy)
    shown = showing(program, prefix=("prefix_embeddings", "positions"), flow=("velocity",))
    return NumpySession(shown, lambda name: program.weights[name].load())


@pytest.fixture(scope="module", params=NAMES)
def driven(request: pytest.FixtureRequest) -> tuple[Policy, list[tuple[Arrays, Arrays]]]:
    """(policy, [(golden arrays, our arrays)]) with every stage fed by hand from the golden's own inputs."""
    policy = read_policy(str(GOLDEN / request.param / "checkpoint"))
    with np.load(GOLDEN / request.param / "golden.npz") as z:
        arrays = {k: z[k] for k in z.files}
    engine = session(policy)
    result = []
    for obs in ("obs0", "obs1"):
        golden = {k[len(obs) + 1 :]: v for k, v in arrays.items() if k.startswith(obs)}
        result.append((golden, drive(policy, engine, golden)))
    return policy, result


def drive(policy: Policy, engine: NumpySession, golden: Arrays) -> Arrays:
    spec, slots = policy.spec, len(policy.io.cameras)
    given = sum(k.startswith("image/") for k in golden)
    symbols = {"C": slots, "T": golden["tokens"].shape[1]}
    ours: Arrays = {}
    features = np.zeros((slots, spec.tokens_per_camera, spec.text.hidden_size), np.float32)
    for c in range(given):
        pixels = golden[f"tap/image_preprocessed_{c}"][0]
        ours[f"vision_features_{c}"] = features[c] = engine.run("vision", {"pixels": pixels}, {})["image_tokens"]
    state = np.zeros((1, spec.max_state_dim), np.float32)
    state[0, : policy.io.state_dim] = golden["state_normalised"][0]
    env = {
        "image_tokens": features.reshape(-1, spec.text.hidden_size),
        "image_valid": np.arange(slots) < given,
        "tokens": golden["tokens"][0].astype(np.int32),
        "token_valid": golden["mask"][0],
        "state": state,
    }
    ours |= engine.run("prefix", env, symbols)
    x = golden["noise"][0]
    for i in range(len(policy.flow.times if policy.flow else ())):
        step = engine.run("flow", {**ours, "x": x, "step": np.array([i], np.int32)}, symbols)
        x = step["x_next"]
        if i == 0:
            ours |= {"velocity_step0": step["velocity"], "x_after_step0": x}
    ours["chunk"] = x
    return ours


Driven = tuple[Policy, list[tuple[Arrays, Arrays]]]


def test_vision_features(driven: Driven) -> None:
    for golden, ours in driven[1]:
        given = [k for k in ours if k.startswith("vision_features")]
        assert len(given) == 2
        for name in given:
            assert relative(ours[name], golden[f"tap/{name}"][0]) <= 5e-6


def test_prefix_bookkeeping(driven: Driven) -> None:
    for golden, ours in driven[1]:
        valid = golden["tap/prefix_pad_mask"][0]
        np.testing.assert_array_equal(ours["prefix_valid"], valid)
        np.testing.assert_array_equal(ours["positions"][valid], golden["tap/prefix_position_ids"][0][valid])
        assert ours["prefix_count"] == [valid.sum()]


def test_prefix_embeddings_keys_and_values(driven: Driven) -> None:
    policy, observations = driven
    layers = {"first": 0, "last": policy.spec.text.num_hidden_layers - 1}
    for golden, ours in observations:
        valid = golden["tap/prefix_pad_mask"][0]
        assert relative(ours["prefix_embeddings"][valid], golden["tap/prefix_embeddings"][0][valid]) <= 5e-6
        for kind in "kv":
            for which, i in layers.items():
                expected = golden[f"tap/prefix_{kind}_{which}"][0]  # (K, L, d)
                expected = expected.transpose(1, 0, 2).reshape(len(valid), -1)
                assert relative(ours[f"prefix_{kind}.{i}"][valid], expected[valid]) <= 5e-6


def test_flow_and_chunk(driven: Driven) -> None:
    policy, observations = driven
    for golden, ours in observations:
        assert relative(ours["velocity_step0"], golden["tap/velocity_step0"][0]) <= 3e-5
        assert relative(ours["x_after_step0"], golden["tap/x_after_step0"][0]) <= 1e-5
        chunk = ours["chunk"][:, : policy.io.action_dim]
        assert relative(chunk, golden["chunk_normalised"][0]) <= 5e-6


@pytest.mark.parametrize("name", NAMES)
def test_spec_is_the_goldens(name: str) -> None:
    spec = read_policy(str(GOLDEN / name / "checkpoint")).spec
    dims = json.loads((GOLDEN / name / "golden.json").read_text())["dims"]
    text = dims["text"] | {"num_hidden_layers": 4}
    assert {k: getattr(spec.text, k) for k in text} == text
    assert {k: getattr(spec.vision, k) for k in dims["vision"]} == dims["vision"]
    assert (spec.scale_factor, spec.text.vocab_size) == (dims["scale_factor"], dims["vocab"])
    assert spec.expert.head_dim == spec.text.head_dim


@pytest.mark.parametrize("name", NAMES)
def test_program_prints_and_parses_back(name: str) -> None:
    program = smolvla.build(read_policy(str(GOLDEN / name / "checkpoint")))
    assert parse(str(program)) == program


def test_every_tensor_is_read_or_known_to_be_dead() -> None:
    folder = GOLDEN / "smolvla_tiny" / "checkpoint"
    policy = read_policy(str(folder))
    read = {lerobot_smolvla.lerobot_name(name) for name in policy.weights}
    left = set(read_tensors(folder / "model.safetensors")) - read
    assert left == {"model.vlm_with_expert.vlm.lm_head.weight", f"{VLM}text_model.norm.weight"}
    assert set(smolvla.build(policy).params) == set(policy.weights) | {"flow.times", "flow.dts"}


def program_with(tmp_path: Path, options: ReadOptions | None = None, **config: Any) -> Program:
    folder = copy_golden(tmp_path)
    edit_config(folder, **config)
    return smolvla.build(read_policy(str(folder), options))


def plain() -> Program:
    return smolvla.build(read_policy(str(GOLDEN / "smolvla_tiny" / "checkpoint")))


def test_prefix_padding_changes_nothing_that_is_read(tmp_path: Path) -> None:
    assert program_with(tmp_path, prefix_length=100) == plain()


def reshape_expert(layers: range, width: int) -> Any:
    """Gives k and v projections of these expert layers another input width."""

    def edit(tensors: Arrays) -> None:
        for i in layers:
            for p in "kv":
                name = f"model.vlm_with_expert.lm_expert.layers.{i}.self_attn.{p}_proj.weight"
                tensors[name] = np.resize(tensors[name], (24, width)).astype(np.float32)

    return edit


def layer_kinds(program: Program) -> list[str]:
    """For each expert layer: "self" where its attention is masked by self_mask, else "cross"."""
    flow = program.stage("flow")
    return [n.inputs[3].removesuffix("_mask") for n in flow.nodes if n.op == "attention"]


@pytest.mark.parametrize(
    ("config", "kinds"),
    [
        ({"self_attn_every_n_layers": 1}, ["self"] * 4),
        ({"self_attn_every_n_layers": 3}, ["self", "cross", "cross", "self"]),
        ({"self_attn_every_n_layers": 0}, ["cross"] * 4),
        ({"self_attn_every_n_layers": -1}, ["cross"] * 4),
        ({"attention_mode": "self_attn"}, ["self"] * 4),
    ],
    ids=str,
)
def test_which_expert_layers_are_self_layers(tmp_path: Path, config: dict[str, Any], kinds: list[str]) -> None:
    folder = copy_golden(tmp_path)
    edit_config(folder, **config)
    for i, kind in enumerate(kinds):
        edit_tensors(folder / "model.safetensors", reshape_expert(range(i, i + 1), 36 if kind == "self" else 24))
    assert layer_kinds(smolvla.build(read_policy(str(folder)))) == kinds


def test_an_expert_with_fewer_layers_reads_every_second_vlm_layer(tmp_path: Path) -> None:
    folder = copy_golden(tmp_path)
    edit_config(folder, num_expert_layers=2, self_attn_every_n_layers=-1)

    def edit(tensors: Arrays) -> None:
        reshape_expert(range(2), 24)(tensors)
        for name in [n for n in tensors if ".lm_expert.layers.2." in n or ".lm_expert.layers.3." in n]:
            del tensors[name]

    edit_tensors(folder / "model.safetensors", edit)
    program = smolvla.build(read_policy(str(folder)))
    inputs = [name for name, _ in program.stage("flow").inputs if name.startswith("prefix_k")]
    assert inputs == ["prefix_k.0", "prefix_k.2"] and layer_kinds(program) == ["cross"] * 2


def test_image_special_tokens_frame_every_camera(tmp_path: Path) -> None:
    folder = copy_golden(tmp_path)
    edit_config(folder, add_image_special_tokens=True, empty_cameras=1)
    policy = read_policy(str(folder))
    spec, d = policy.spec, policy.spec.text.hidden_size
    table = policy.weights["text.embed_tokens.weight"].load()
    tokens = np.array([9, 8], np.int32)
    env = {
        "image_tokens": np.arange(3 * 4 * d, dtype=np.float32).reshape(12, d),
        "image_valid": np.array([True, False, True]),
        "camera_valid": np.array([True, True, True]),
        "tokens": tokens,
        "token_valid": np.array([True, True]),
        "state": np.zeros((1, spec.max_state_dim), np.float32),
    }
    out = session(policy).run("prefix", env, {"C": 3, "T": 2})
    rows = out["prefix_embeddings"][:21].reshape(3, 7, d)
    for camera in range(3):
        np.testing.assert_array_equal(rows[camera, [0, 6]], table[[spec.fake_image_token_id] * 2])
        np.testing.assert_array_equal(rows[camera, 1], table[spec.global_image_token_id])
        images = env["image_tokens"].reshape(3, 4, d)[camera]
        np.testing.assert_allclose(rows[camera, 2:6], images * np.float32(d**0.5), rtol=1e-6)
    valid = out["prefix_valid"][:21].reshape(3, 7)
    assert valid[0].all() and valid[2].all()
    assert valid[1].tolist() == [True, True, False, False, False, False, True]
    np.testing.assert_allclose(out["prefix_embeddings"][21:23], table[tokens] * np.float32(d**0.5), rtol=1e-6)


def test_image_size_that_patches_do_not_divide_drops_the_remainder(tmp_path: Path) -> None:
    program = program_with(tmp_path, resize_imgs_with_padding=[50, 50])
    ops = [n.op for n in program.stage("vision").nodes]
    assert ops[:3] == ["slice", "slice", "patchify"]


def test_buckets() -> None:
    program = plain()
    assert {s.name: s.buckets for s in program.symbols} == {"C": (1, 2), "T": (8, 16, 24)}


def test_spec_option_reaches_the_spec(tmp_path: Path) -> None:
    folder = copy_golden(tmp_path)
    sizes = {"head_dim": 6, "num_attention_heads": 12}
    edit_json(folder / "vlm" / "config.json", lambda t: t["text_config"].update(sizes))
    assert read_policy(str(folder)).spec.text.num_attention_heads == 12
    spec = read_policy(str(folder), ReadOptions(spec={"text.head_dim": "12", "chunk_size": "20"})).spec
    assert (spec.text.head_dim, spec.text.num_attention_heads, spec.expert.num_key_value_heads) == (12, 6, 2)
    assert spec.chunk_size == 20


def test_spec_replaces_an_unknown_backbone(tmp_path: Path) -> None:
    folder = copy_golden(tmp_path)
    (folder / "vlm" / "config.json").unlink()
    with pytest.raises(CheckpointError, match=r"VLM .* is named 'vlm'.*(\n.*)*--spec text\.head_dim"):
        read_policy(str(folder))
    given = {"text.head_dim": "12", "vision.num_attention_heads": "4"}
    assert read_policy(str(folder), ReadOptions(spec=given)).spec == plain_spec()
    inspected = read_policy(str(folder), ReadOptions(headers_only=True))
    assert any("named 'vlm'" in w for w in inspected.warnings)


def plain_spec() -> smolvla.SmolVLASpec:
    spec = read_policy(str(GOLDEN / "smolvla_tiny" / "checkpoint")).spec
    assert isinstance(spec, smolvla.SmolVLASpec)
    return spec


REFUSED: dict[str, tuple[dict[str, Any], type[VlacError], str]] = {
    "two observations": ({"n_obs_steps": 2}, Unsupported, "n_obs_steps = 2"),
    "aloha": ({"adapt_to_pi_aloha": True}, Unsupported, "adapt_to_pi_aloha"),
    "delta joints": ({"use_delta_joint_actions_aloha": True}, Unsupported, "use_delta_joint_actions_aloha"),
    "attention mode": ({"attention_mode": "both"}, Unsupported, "attention_mode 'both'; known"),
    "expert layers with self layers": ({"num_expert_layers": 2}, Unsupported, "num_expert_layers = 2 for 4"),
    "expert layers, self mode": (
        {"num_expert_layers": 2, "attention_mode": "self_attn"},
        Unsupported,
        "num_expert_layers = 2 for 4",
    ),
    "expert layers do not divide": ({"num_expert_layers": 3}, CheckpointError, "num_expert_layers = 3"),
    "not square": ({"resize_imgs_with_padding": [48, 40]}, Unsupported, "resize_imgs_with_padding"),
    "resize is text": ({"resize_imgs_with_padding": "48"}, CheckpointError, "resize_imgs_with_padding is '48'"),
    "another image size": ({"resize_imgs_with_padding": [96, 96]}, Unsupported, "16x16 patches"),
    "no cameras": (
        {"input_features": {"observation.state": {"type": "STATE", "shape": [6]}}},
        CheckpointError,
        "no camera",
    ),
    "no state": (
        {"input_features": {"observation.images.top": {"type": "VISUAL", "shape": [3, 8, 8]}}},
        Unsupported,
        r"no observation\.state",
    ),
    "no features": ({"input_features": None}, CheckpointError, "input_features is missing or empty"),
    "grey camera": (
        {"input_features": {"observation.images.top": {"type": "VISUAL", "shape": [1, 8, 8]}}},
        Unsupported,
        r"camera observation\.images\.top has shape \[1, 8, 8\]",
    ),
    "feature without shape": ({"input_features": {"a": {"type": "STATE"}}}, CheckpointError, r"input_features\.a"),
    "state too wide": ({"max_state_dim": 4}, CheckpointError, "max_state_dim = 4"),
    "action too wide": ({"max_action_dim": 4}, CheckpointError, "action_in_proj|max_action_dim = 4"),
    "no actions": ({"output_features": {}}, CheckpointError, "output_features is missing or empty"),
    "more steps than the chunk": ({"n_action_steps": 11}, CheckpointError, "n_action_steps 11 exceeds"),
    "chunk of nothing": ({"chunk_size": 0}, CheckpointError, "chunk_size is 0"),
    "no Euler steps": ({"num_steps": 0}, CheckpointError, "num_steps is 0"),
    "text for a number": ({"num_steps": "10"}, CheckpointError, "num_steps is '10', expected int"),
    "true for a number": ({"chunk_size": True}, CheckpointError, "chunk_size is True, expected int"),
    "number for a switch": ({"add_image_special_tokens": 1}, CheckpointError, "add_image_special_tokens is 1"),
    "expert width": ({"expert_width_multiplier": 0.5}, CheckpointError, "expert.* has shape"),
    "odd expert": ({"expert_width_multiplier": 0.9}, Unsupported, "odd width 43"),
    "too many VLM layers": ({"num_vlm_layers": 5}, CheckpointError, "layers.4.* is missing"),
    "no resize, cameras differ": (
        {
            "resize_imgs_with_padding": None,
            "input_features": {
                "observation.images.top": {"type": "VISUAL", "shape": [3, 48, 48]},
                "observation.images.wrist": {"type": "VISUAL", "shape": [3, 48, 64]},
                "observation.state": {"type": "STATE", "shape": [6]},
            },
        },
        Unsupported,
        "resize_imgs_with_padding is null",
    ),
}


@pytest.mark.parametrize("case", REFUSED, ids=str)
def test_config_that_is_refused(tmp_path: Path, case: str) -> None:
    config, error, message = REFUSED[case]
    with pytest.raises(error, match=message):
        program_with(tmp_path, **config)


def test_without_resize_cameras_must_have_the_towers_size(tmp_path: Path) -> None:
    folder = copy_golden(tmp_path)
    edit_config(folder, resize_imgs_with_padding=None)
    steps = [s.step for s in read_policy(str(folder)).io.image_steps]
    assert steps == ["affine"]


VLM_REFUSED = {
    "head_dim": (lambda t: t["text_config"].update(head_dim=10), "do not hold 6 heads of size 10"),
    "heads": (lambda t: t["text_config"].update(num_attention_heads=5), "do not hold 5 heads of size 12"),
    "vision heads": (lambda t: t["vision_config"].update(num_attention_heads=5), "5 heads"),
    "bias": (lambda t: t["text_config"].update(attention_bias=True), "attention_bias"),
    "no heads": (lambda t: t["vision_config"].update(num_attention_heads=None), "num_attention_heads is None"),
    "eps is text": (lambda t: t["text_config"].update(rms_norm_eps="small"), "rms_norm_eps is 'small'"),
    "not SmolVLM": (lambda t: {"hidden_size": 3}, "needs text_config"),
    "activation": (lambda t: t["text_config"].update(hidden_act="mish"), "activation 'mish'"),
}


@pytest.mark.parametrize("case", VLM_REFUSED, ids=str)
def test_backbone_config_that_is_refused(tmp_path: Path, case: str) -> None:
    edit, message = VLM_REFUSED[case]
    folder = copy_golden(tmp_path)
    edit_json(folder / "vlm" / "config.json", edit)
    with pytest.raises(VlacError, match=message):
        smolvla.build(read_policy(str(folder)))


def test_unknown_spec_field_is_refused(tmp_path: Path) -> None:
    with pytest.raises(Unsupported, match="no field 'horns'"):
        program_with(tmp_path, ReadOptions(spec={"text.horns": 3}))
    with pytest.raises(Unsupported, match=r"text\.head_dim='many'"):
        program_with(tmp_path / "b", ReadOptions(spec={"text.head_dim": "many"}))


def test_the_published_450m_shape_is_read_from_headers(tmp_path: Path) -> None:
    """The real sizes, with the backbone's hub id only and no data on disk (a sparse file): inspect needs no more."""
    folder = copy_golden(tmp_path)
    shutil.rmtree(folder / "vlm")
    vlm = "HuggingFaceTB/SmolVLM2-500M-Video-Instruct"
    edit_config(
        folder,
        vlm_model_name=vlm,
        num_vlm_layers=16,
        max_state_dim=32,
        max_action_dim=32,
        chunk_size=50,
        resize_imgs_with_padding=[512, 512],
    )
    text = DecoderSpec(960, 2560, 16, 15, 5, 64, vocab_size=49280)
    spec = dataclasses.replace(
        plain_spec(),
        vision=VisionSpec(768, 3072, 12, 12, 512, 16, position_rule="buckets"),
        text=text,
        expert=dataclasses.replace(text, hidden_size=720, intermediate_size=2048, vocab_size=0),
        max_state_dim=32,
        max_action_dim=32,
        chunk_size=50,
    )
    tensors = {lerobot_smolvla.lerobot_name(name): shape for name, shape in smolvla.shapes(spec).items()}
    tensors[f"{VLM}vision_model.embeddings.patch_embedding.weight"] = (768, 3, 16, 16)
    tensors["model.vlm_with_expert.vlm.lm_head.weight"] = (49280, 960)
    tensors[f"{VLM}text_model.norm.weight"] = (960,)
    assert (len(tensors), sum(map(math.prod, tensors.values())) // 100_000) == (500, 4500)
    header, end = {}, 0
    for name, shape in tensors.items():
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [end, end + 2 * math.prod(shape)]}
        end += 2 * math.prod(shape)
    raw = json.dumps(header).encode()
    with (folder / "model.safetensors").open("wb") as file:
        file.write(len(raw).to_bytes(8, "little") + raw)
        file.truncate(8 + len(raw) + end)
    policy = read_policy(str(folder), ReadOptions(headers_only=True))
    assert policy.spec == spec and policy.spec.tokens_per_camera == 64
    assert [w.split("\n")[0].split(": ", 1)[1][:13] for w in policy.warnings] == ["the tokenizer"]
    program = smolvla.build(policy)
    assert sum(math.prod(p.shape) for p in program.params.values()) < 403_000_000
