"""pi0, pi0.5 and pi0-FAST: LeRobot's own answers at every tap, on every target, and what is refused by name."""

from __future__ import annotations

import dataclasses
import json
import math
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from checkpoint_files import (
    GOLDEN,
    POST,
    PRE,
    copy_golden,
    edit_config,
    edit_json,
    edit_step,
    edit_tensors,
    read,
    sparse_tensors,
    to_older_generation,
)  # fmt: skip
from conftest import GoldenFolder

import vlac
from vlac.api import apply_passes
from vlac.checkpoint import read_policy
from vlac.engines.base import get_engine
from vlac.engines.numpy_engine import NumpySession
from vlac.errors import CheckpointError, Inapplicable, Unsupported, VlacWarning
from vlac.families import pi0, pi05
from vlac.goldens import reference_session
from vlac.graph import Program
from vlac.lower import lower
from vlac.policy import Policy
from vlac.program_text import parse
from vlac.readers import paligemma
from vlac.registry import ReadOptions, families
from vlac.runtime.actions import apply_action_steps
from vlac.runtime.inputs import Prepared
from vlac.runtime.session import execute, prepare
from vlac.spec import DecoderSpec, VisionSpec

FLOW = ("pi0_tiny", "pi05_tiny")
NAMES = (*FLOW, "pi0fast_tiny")
HEADS = {"vision.num_attention_heads": 3}
Array = np.ndarray[Any, Any]
Golden = Callable[[str], GoldenFolder]


def relative(a: Array, b: Array) -> float:
    """max|a-b| / max|b|."""
    return float(np.abs(a - b).max() / np.abs(b).max())


def policy_of(name: str, **options: Any) -> Policy:
    return read_policy(str(GOLDEN / name / "checkpoint"), ReadOptions(spec=HEADS, **options))


def drawn(policy: Policy) -> Program:
    return families.get(policy.family).build(policy)


def count(folder: GoldenFolder) -> int:
    return len(folder.tasks)


def observation(folder: GoldenFolder, i: int) -> dict[str, Any]:
    """Arguments of `prepare`, noise where the policy samples."""
    pictures = f"obs{i}/image/"
    noise = folder.arrays.get(f"obs{i}/noise")
    return {
        "images": {k.removeprefix(pictures): v for k, v in folder.arrays.items() if k.startswith(pictures)},
        "state": folder.arrays[f"obs{i}/state"],
        "task": folder.tasks[i],
        **({} if noise is None else {"noise": noise[0]}),
    }


def generated(folder: GoldenFolder, i: int) -> list[int]:
    """The golden's tokens up to and with the stop token."""
    ids = folder.arrays[f"obs{i}/tap/tokens_generated"]
    return [int(t) for t in np.trim_zeros(ids, "b")]


# --- values ----------------------------------------------------------------------------------------------------

SHOWN = {"prefix": ("prefix_embeddings", "prefix_valid", "positions"), "flow": ("velocity",)}


def showing(program: Program) -> Program:
    """The program with more values leaving its stages."""
    stages = []
    for s in program.stages:
        more = tuple(v for v in SHOWN.get(s.name, ()) if v not in s.outputs)
        stages.append(dataclasses.replace(s, outputs=s.outputs + more))
    return program.replace(stages=tuple(stages))


Driven = tuple[GoldenFolder, Policy, list[tuple[Prepared, dict[str, Array], Array]]]


@pytest.fixture(scope="module", params=NAMES)
def driven(request: pytest.FixtureRequest, golden: Golden) -> Driven:
    """(golden, policy, [(what the network is given, every value it makes, its result)]), the reference engine's."""
    folder, policy = golden(request.param), policy_of(request.param)
    program = showing(drawn(policy))
    session = NumpySession(program, lambda name: program.weights[name].load())
    runs = []
    for i in range(count(folder)):
        ready = prepare(policy.io, policy.tokenizer, program, **observation(folder, i))
        taps: dict[str, Array] = {}
        result = execute(program, session, ready.env, ready.symbols, taps=taps)
        runs.append((ready, taps, result))
    return folder, policy, runs


def kept(folder: GoldenFolder, i: int, ready: Prepared) -> Array:
    """Rows of the golden's prefix that take part (cameras given, valid tokens), as indices."""
    return np.flatnonzero(folder.arrays[f"obs{i}/tap/prefix_pad_mask"][0])


def test_what_the_network_is_given(driven: Driven) -> None:
    folder, policy, runs = driven
    for i, (ready, _, _) in enumerate(runs):
        tokens, mask = (folder.arrays[f"obs{i}/{k}"][0] for k in ("tokens", "mask"))
        np.testing.assert_array_equal(ready.env["tokens"][ready.env["token_valid"]], tokens[mask])
        for c in np.flatnonzero(ready.env["image_valid"]):
            assert relative(ready.env["pixels"][c], folder.arrays[f"obs{i}/tap/image_preprocessed_{c}"][0]) <= 1e-6
        if "state" in ready.env:
            state = folder.arrays[f"obs{i}/state_normalised"][0]
            assert relative(ready.env["state"][0, : len(state)], state) <= 1e-6
            assert ready.env["state"].shape == (1, policy.spec.max_state_dim)


def test_vision_features_and_prefix(driven: Driven) -> None:
    folder, policy, runs = driven
    last = policy.spec.text.num_hidden_layers - 1
    for i, (ready, taps, _) in enumerate(runs):
        tap = {k.removeprefix(f"obs{i}/tap/"): v for k, v in folder.arrays.items() if k.startswith(f"obs{i}/tap/")}
        n = policy.spec.vision.grid**2
        for c in np.flatnonzero(ready.env["image_valid"]):
            assert relative(taps["image_tokens"][c * n : (c + 1) * n], tap[f"vision_features_{c}"][0]) <= 5e-6
        theirs, ours = kept(folder, i, ready), np.flatnonzero(taps["prefix_valid"])
        assert len(theirs) == len(ours)
        np.testing.assert_array_equal(taps["positions"][ours], tap["prefix_position_ids"][0][theirs])
        assert relative(taps["prefix_embeddings"][ours], tap["prefix_embeddings"][0][theirs]) <= 5e-6
        for kind in "kv":
            for which, layer in {"first": 0, "last": last}.items():
                expected = tap[f"prefix_{kind}_{which}"][0].transpose(1, 0, 2)[theirs].reshape(len(theirs), -1)
                assert relative(taps[f"prefix_{kind}.{layer}"][ours], expected) <= 5e-6


def test_flow_and_chunk(driven: Driven) -> None:
    folder, policy, runs = driven
    for i, (ready, taps, result) in enumerate(runs):
        if policy.flow is not None:
            assert relative(taps["x_after_step0"], folder.arrays[f"obs{i}/tap/x_after_step0"][0]) <= 1e-5
        else:
            assert [int(t) for t in np.trim_zeros(result[0], "b")] == generated(folder, i)
        for units, steps in (("robot", policy.io.action_steps), ("normalised", policy.io.normalised_action_steps)):
            assert relative(apply_action_steps(steps, result, ready.state), folder.chunk(i, units)) <= 5e-6


@pytest.mark.parametrize("name", NAMES)
def test_program_prints_and_parses_back(name: str) -> None:
    program = drawn(policy_of(name))
    assert parse(str(program)) == program
    assert parse(str(lower(program))) == lower(program)


def test_modulations_of_pi05_become_tables() -> None:
    """7 norms: factor, shift and gate each, but for the last gate. Nothing of the time MLP is left in the loop."""
    program = drawn(policy_of("pi05_tiny"))
    before, after = (Counter(n.op for n in p.stage("flow").nodes) for p in (program, lower(program)))
    assert before["time_embedding"] == 1 and before["silu"] == 2 and before["linear"] == 2 + 7 * 3 + 2 + 7
    assert after["time_embedding"] == after["silu"] == 0
    assert after["embed"] == 7 * 3 - 1 + 1 and after["linear"] == 3 * 4 + 2
    tables = [p for p in lower(program).params if p.endswith(".table")]
    assert len(tables) == 20 and not any("dense" in p for p in lower(program).params)


def test_pi0_fast_stores_each_weight_once() -> None:
    program = lower(drawn(policy_of("pi0fast_tiny")))
    read: Counter[str] = Counter()
    for s in program.stages:
        read.update({i for n in s.nodes for i in n.inputs if i.startswith("@")})
    shared = [w for w in read if read[w] == 2]
    assert "@text.embed_tokens.weight" in shared
    assert sum(w.startswith("@text.layers.0.") for w in shared) == sum(w.startswith("@text.layers.0.") for w in read)


# --- targets ---------------------------------------------------------------------------------------------------

EXACT = (
    ("onnx-fp32", "onnxruntime", 1e-5),
    ("onnx-fp32", "torch", 1e-5),
    ("onnx-fp32", "openvino", 2e-5),
    ("gguf-f32", "ggml", 2e-5),
)
ROUNDED = (("gguf-f16", "ggml", 6e-3), ("gguf-q8", "ggml", 0.13), ("onnx-int8", "onnxruntime", 0.13))
"""Twice what was measured on these tiny networks, whose widths leave quantisation little to average over."""


@pytest.fixture(scope="module")
def artifacts(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[str, str], Path]]:
    made: dict[tuple[str, str], Path] = {}

    def compiled(name: str, target: str) -> Path:
        if (name, target) not in made:
            out = tmp_path_factory.mktemp("pi") / f"{name}-{target}"
            done = vlac.compile(GOLDEN / name / "checkpoint", target, out, spec=HEADS, goldens=1, allow_promote=True)
            assert done.path is not None
            made[name, target] = done.path
        return made[name, target]

    yield compiled


@pytest.mark.parametrize(("target", "engine", "bound"), EXACT + ROUNDED)
@pytest.mark.parametrize("name", FLOW)
def test_every_target_acts_as_lerobot(
    name: str, target: str, engine: str, bound: float, artifacts: Callable[[str, str], Path], golden: Golden
) -> None:
    if why := get_engine(engine).missing():
        pytest.skip(f"{engine}: {why}")
    folder = golden(name)
    with vlac.load(artifacts(name, target), engine=engine, threads=1) as session:
        for i in range(count(folder)):
            arguments = observation(folder, i)
            if name == "pi0_tiny" and i == 1:
                with pytest.warns(VlacWarning, match="longer than 24 tokens"):
                    chunk = session.act(**arguments)
            else:
                chunk = session.act(**arguments)
            assert relative(chunk, folder.chunk(i)) <= bound


@pytest.mark.parametrize(("target", "engine"), [e[:2] for e in EXACT] + [("gguf-f16", "ggml")])
def test_every_token_is_lerobots(
    target: str, engine: str, artifacts: Callable[[str, str], Path], golden: Golden
) -> None:
    if why := get_engine(engine).missing():
        pytest.skip(f"{engine}: {why}")
    folder = golden("pi0fast_tiny")
    with vlac.load(artifacts("pi0fast_tiny", target), engine=engine, threads=1) as session:
        for i in range(count(folder)):
            chunk = session.act(**observation(folder, i))
            assert session.tokens is not None and session.tokens.tolist() == generated(folder, i)
            np.testing.assert_allclose(chunk, folder.chunk(i), rtol=0, atol=1e-6)


# --- passes ----------------------------------------------------------------------------------------------------

NOTHING = ("rotate-values:part=all", "smooth-norms", "truncate-layers:keep=2,mode=kv-tap")
"""Passes that change no result; a tap on the last layer is all that an expert reads of it."""
LOSSY = ("truncate-layers:keep=2", "reduce-visual-tokens:factor=2", "resolution:size=28", "flow-steps:steps=4")
SOLVERS = ("flow-steps:steps=4,solver=ab2", "flow-steps:steps=4,solver=midpoint")


def after_pass(policy: Policy, recipe: str, folder: GoldenFolder) -> Array:
    """The robot's chunk for observation 0."""
    changed = apply_passes(policy, [recipe])
    program = lower(drawn(changed))
    ready = prepare(changed.io, changed.tokenizer, program, **observation(folder, 0))
    result = execute(program, reference_session(program), ready.env, ready.symbols)
    return apply_action_steps(changed.io.action_steps, result, ready.state)


@pytest.mark.parametrize("recipe", NOTHING)
@pytest.mark.parametrize("name", NAMES)
def test_exact_passes_change_nothing(name: str, recipe: str, golden: Golden) -> None:
    folder, policy = golden(name), policy_of(name)
    if name == "pi0fast_tiny" and "kv-tap" in recipe:
        with pytest.raises(Inapplicable, match="draws no taps for an expert"):
            after_pass(policy, recipe, folder)
    else:
        assert relative(after_pass(policy, recipe, folder), folder.chunk(0)) <= 5e-6


@pytest.mark.parametrize("recipe", LOSSY + SOLVERS)
@pytest.mark.parametrize("name", FLOW)
def test_other_passes_change_something(name: str, recipe: str, golden: Golden) -> None:
    folder = golden(name)
    drift = relative(after_pass(policy_of(name), recipe, folder), folder.chunk(0))
    assert 1e-3 < drift < 1.5


# --- reading ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_spec_is_the_goldens(name: str) -> None:
    spec = policy_of(name).spec
    dims = json.loads((GOLDEN / name / "golden.json").read_text())["dims"]
    names = {
        "width": "hidden_size",
        "depth": "num_hidden_layers",
        "mlp_dim": "intermediate_size",
        "num_heads": "num_attention_heads",
        "num_kv_heads": "num_key_value_heads",
        "head_dim": "head_dim",
    }
    assert {k: getattr(spec.text, v) for k, v in names.items()} == dims["vlm"]
    assert spec.text.vocab_size == dims["vocab"]
    assert {k: getattr(spec.vision, k) for k in dims["vision"]} == dims["vision"]
    if name in FLOW:
        assert {k: getattr(spec.expert, v) for k, v in names.items()} == dims["expert"]


def test_heads_that_no_file_tells_must_be_said() -> None:
    with pytest.raises(CheckpointError, match="width 36 is not known") as caught:
        read_policy(str(GOLDEN / "pi0_tiny" / "checkpoint"))
    assert "--spec vision.num_attention_heads" in str(caught.value)
    inspected = read_policy(str(GOLDEN / "pi0_tiny" / "checkpoint"), ReadOptions(headers_only=True))
    assert any("width 36" in w for w in inspected.warnings)


def test_head_sizes_may_be_said_and_must_fit() -> None:
    given = {**HEADS, "text.head_dim": "6"}
    spec = read_policy(str(GOLDEN / "pi0_tiny" / "checkpoint"), ReadOptions(spec=given)).spec
    assert (spec.text.head_dim, spec.text.num_attention_heads, spec.text.num_key_value_heads) == (6, 8, 2)
    assert spec.expert.head_dim == 6
    for wrong in ({"text.head_dim": "7"}, {"text.num_key_value_heads": "5"}, {"text.num_attention_heads": "3"}):
        with pytest.raises(CheckpointError):
            read_policy(str(GOLDEN / "pi0_tiny" / "checkpoint"), ReadOptions(spec={**HEADS, **wrong}))


def test_fields_have_short_names() -> None:
    given = {"vision.heads": "3", "text.kv_heads": "2"}
    spec = read_policy(str(GOLDEN / "pi0_tiny" / "checkpoint"), ReadOptions(spec=given)).spec
    assert (spec.vision.num_attention_heads, spec.text.num_key_value_heads, spec.text.head_dim) == (3, 2, 6)


def rename(pairs: dict[str, str]) -> Callable[[dict[str, Array]], None]:
    """Renames tensors by the beginnings or parts of their names."""

    def edit(tensors: dict[str, Array]) -> None:
        for name in list(tensors):
            new = name
            for old, part in pairs.items():
                new = new.replace(old, part)
            tensors[new] = tensors.pop(name)

    return edit


GENERATIONS: dict[str, tuple[str, dict[str, str]]] = {
    "without model.": ("pi0_tiny", {"model.action": "action", "model.state": "state", "model.pali": "pali"}),
    "with model.": ("pi05_tiny", {"paligemma_with": "model.paligemma_with", "action_": "model.action_"}),
    "before transformers 4.52": (
        "pi0_tiny",
        {
            "paligemma.model.vision_tower": "paligemma.vision_tower",
            "paligemma.model.multi_modal_projector": "paligemma.multi_modal_projector",
            "paligemma.model.language_model": "paligemma.language_model.model",
            "paligemma.lm_head": "paligemma.language_model.lm_head",
        },
    ),
    "time MLP of pi0 under its short name": ("pi0_tiny", {"action_time_mlp": "time_mlp"}),
    "time MLP of pi0.5 under its long name": ("pi05_tiny", {"time_mlp": "action_time_mlp"}),
    "embedding under its own name": ("pi0_tiny", {"paligemma.lm_head": "paligemma.model.language_model.embed_tokens"}),
}


@pytest.mark.parametrize("generation", GENERATIONS)
def test_names_of_every_generation_are_one_policy(generation: str, tmp_path: Path) -> None:
    name, pairs = GENERATIONS[generation]
    folder = copy_golden(tmp_path, name)
    edit_tensors(folder / "model.safetensors", rename(pairs))
    found, expected = read(folder, spec=HEADS), policy_of(name)
    assert found.spec == expected.spec and set(found.weights) == set(expected.weights)
    for key in ("text.embed_tokens.weight", "vision.layers.1.mlp.fc2.bias", "text.layers.2.mlp.up_proj.weight"):
        np.testing.assert_array_equal(found.weights[key].load(), expected.weights[key].load())


def test_an_early_pi0_without_processors_is_read(tmp_path: Path) -> None:
    """Mid 2025: statistics inside the weights, steps and resize under other keys, padding left and above."""
    folder = copy_golden(tmp_path, "pi0_tiny")
    to_older_generation(folder)

    def edit(table: dict[str, Any]) -> None:
        del table["image_resolution"], table["num_inference_steps"]
        table.update(resize_imgs_with_padding=[56, 56], num_steps=4, proj_width=36)

    edit_json(folder / "config.json", edit)
    policy = read(folder, spec=HEADS, tokenizer=str(folder / "tokenizer"))
    assert policy.flow is not None and len(policy.flow.times) == 4
    assert policy.io.image_steps[0].params["align"] == "right-bottom"
    plain = policy_of("pi0_tiny").io
    assert (policy.io.state_steps, policy.io.action_steps) == (plain.state_steps, plain.action_steps)
    assert policy.io.text_steps == plain.text_steps and any("early pi0" in w for w in policy.warnings)


def test_an_embedding_that_is_not_tied_is_read_as_it_is() -> None:
    policy = policy_of("pi0fast_tiny")
    head, table = (policy.weights[f"text.{n}.weight"].load() for n in ("lm_head", "embed_tokens"))
    assert not np.array_equal(head, table)


def test_no_code_of_a_checkpoint_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    """The action tokenizer's folder holds a Python file that raises when it is imported."""
    monkeypatch.syspath_prepend(str(GOLDEN / "pi0fast_tiny" / "checkpoint" / "fast"))
    step = policy_of("pi0fast_tiny").io.action_steps[0]
    assert step.step == "fast_decode" and len(step.params["pieces"]) == 96


def test_the_action_tokenizer_may_lie_at_the_root_of_its_folder(tmp_path: Path) -> None:
    folder = copy_golden(tmp_path, "pi0fast_tiny")
    (folder / "fast" / "bpe_tokenizer" / "tokenizer.json").rename(folder / "fast" / "tokenizer.json")
    assert read(folder, spec=HEADS).io == policy_of("pi0fast_tiny").io


def enable_relative(folder: Path, names: list[str] | None) -> None:
    """Turns a golden into one with actions relative to the state."""
    edit_config(folder, use_relative_actions=True, action_feature_names=names)
    edit_step(folder, PRE, "relative_actions_processor", lambda s: s["config"].update(enabled=True, action_names=names))
    edit_step(folder, POST, "absolute_actions_processor", lambda s: s["config"].update(enabled=True))


@pytest.mark.parametrize(
    ("names", "columns"),
    [
        (["a.pos", "b.pos", "c.pos", "d.pos", "Gripper.pos", "e.pos"], [0, 1, 2, 3, 5]),
        (None, [0, 1, 2, 3, 4, 5]),
        (["gripper"], [1, 2, 3, 4, 5]),
    ],
)
def test_relative_actions_add_the_raw_state(
    names: list[str] | None, columns: list[int], tmp_path: Path, golden: Golden
) -> None:
    folder = copy_golden(tmp_path, "pi05_tiny")
    enable_relative(folder, names)
    source, plain = golden("pi05_tiny"), policy_of("pi05_tiny")
    policy = read(folder, spec=HEADS)
    program = drawn(policy)
    ready = prepare(policy.io, policy.tokenizer, program, **observation(source, 0))
    x = np.zeros((8, 10), np.float32)
    difference = apply_action_steps(policy.io.action_steps, x, ready.state) - apply_action_steps(
        plain.io.action_steps, x
    )
    expected = np.zeros(6, np.float32)
    expected[columns] = source.arrays["obs0/state"][columns]
    np.testing.assert_allclose(difference, np.tile(expected, (8, 1)), atol=1e-6)
    assert policy.io.normalised_action_steps == plain.io.normalised_action_steps


def only_one_switched(folder: Path) -> None:
    edit_config(folder, use_relative_actions=True)
    edit_step(folder, PRE, "relative_actions_processor", lambda s: s["config"].update(enabled=True))


def without_state_step(folder: Path) -> None:
    def edit(table: dict[str, Any]) -> None:
        table["steps"] = [s for s in table["steps"] if "prepare_state" not in s["registry_name"]]

    edit_json(folder / PRE, edit)


def drop(pattern: str) -> Callable[[Path], None]:
    def edit(tensors: dict[str, Array]) -> None:
        for name in [n for n in tensors if pattern in n]:
            del tensors[name]

    return lambda folder: edit_tensors(folder / "model.safetensors", edit)


BROKEN: dict[str, tuple[str, Callable[[Path], None], type[Exception], str]] = {
    "relative without absolute": ("pi05_tiny", only_one_switched, CheckpointError, "must both be enabled"),
    "relative in the config only": (
        "pi05_tiny",
        lambda f: edit_config(f, use_relative_actions=True),
        CheckpointError,
        "use_relative_actions is True",
    ),
    "state nowhere": ("pi05_tiny", without_state_step, CheckpointError, "the state would be lost"),
    "state nowhere, FAST": ("pi0fast_tiny", without_state_step, CheckpointError, "the state would be lost"),
    "a layer of the expert is missing": ("pi0_tiny", drop("gemma_expert.model.layers.2"), CheckpointError, "2 expert"),
    "a tensor is missing": ("pi0_tiny", drop("state_proj.bias"), CheckpointError, "state_proj.bias is missing"),
    "embedding is missing": ("pi0_tiny", drop("paligemma.lm_head"), CheckpointError, "embed_tokens.weight is missing"),
    "images of another size": (
        "pi0_tiny",
        lambda f: edit_config(f, image_resolution=[70, 70]),
        Unsupported,
        "5x5 patches.*16 positions",
    ),
    "images that are not square": (
        "pi0_tiny",
        lambda f: edit_config(f, image_resolution=[56, 70]),
        Unsupported,
        "squares",
    ),
    "sampling": ("pi0fast_tiny", lambda f: edit_config(f, temperature=0.7), Unsupported, "temperature = 0.7"),
    "FAST without scale": (
        "pi0fast_tiny",
        lambda f: edit_json(f / "fast" / "processor_config.json", lambda t: t.pop("scale") and None),
        CheckpointError,
        "scale is None",
    ),
    "FAST with holes": (
        "pi0fast_tiny",
        lambda f: edit_json(f / "fast/bpe_tokenizer/tokenizer.json", lambda t: t["model"]["vocab"].update({"A": 999})),
        CheckpointError,
        "ids are not 0",
    ),
    "FAST of another kind": (
        "pi0fast_tiny",
        lambda f: edit_json(f / "fast/bpe_tokenizer/tokenizer.json", lambda t: t["model"].update(type="Unigram")),
        Unsupported,
        "not byte-level BPE",
    ),
    "a chunk that is shorter than its use": (
        "pi0_tiny",
        lambda f: edit_config(f, n_action_steps=9),
        CheckpointError,
        "n_action_steps 9 exceeds",
    ),
}


@pytest.mark.parametrize("case", BROKEN)
def test_a_broken_folder_is_refused(case: str, tmp_path: Path) -> None:
    name, spoil, kind, message = BROKEN[case]
    folder = copy_golden(tmp_path, name)
    spoil(folder)
    with pytest.raises(kind, match=message):
        read(folder, spec=HEADS)


def test_pi0_fast_without_a_cache_does_not_stop(tmp_path: Path) -> None:
    folder = copy_golden(tmp_path, "pi0fast_tiny")
    edit_config(folder, use_kv_cache=False)
    loop: Any = drawn(read(folder, spec=HEADS)).schedule.steps[-1]
    assert loop.times == 24 and not loop.until
    stopping: Any = drawn(policy_of("pi0fast_tiny")).schedule.steps[-1]
    assert stopping.until == "next_token" and stopping.stop == (95,)


# --- the published sizes ---------------------------------------------------------------------------------------

MODEL = "paligemma_with_expert."
UNREAD = {
    f"{MODEL}paligemma.lm_head.weight": (257152, 2048),
    f"{MODEL}gemma_expert.lm_head.weight": (257152, 1024),
    f"{MODEL}paligemma.model.language_model.norm.weight": (2048,),
}


@pytest.mark.parametrize(("name", "live"), [("pi0_tiny", 3238), ("pi05_tiny", 3353)])
def test_the_published_shape_is_read_from_headers(name: str, live: int, tmp_path: Path) -> None:
    """Real sizes, no data on disk (a sparse file). Millions of live parameters as LeRobot's own class counts them."""
    folder = copy_golden(tmp_path, name)
    edit_config(folder, max_state_dim=32, max_action_dim=32, chunk_size=50, n_action_steps=50,
                image_resolution=[224, 224])  # fmt: skip
    tiny = policy_of(name).spec
    text = DecoderSpec(2048, 16384, 18, 8, 1, 256, 257152, 1e-6, hidden_act="gelu_pytorch_tanh")
    sizes: dict[str, Any] = {
        "vision": VisionSpec(1152, 4304, 27, 16, 224, 14),
        "text": text,
        "expert": dataclasses.replace(text, hidden_size=1024, intermediate_size=4096, vocab_size=0),
        "chunk_size": 50,
        "max_action_dim": 32,
        **({"max_state_dim": 32} if name == "pi0_tiny" else {}),
    }
    spec = dataclasses.replace(tiny, **sizes)
    shapes = (pi0 if name == "pi0_tiny" else pi05).shapes(spec)
    assert sum(map(math.prod, shapes.values())) // 1_000_000 == live
    tensors = {paligemma.disk_name(n): s for n, s in shapes.items() if n != "text.embed_tokens.weight"} | UNREAD
    tensors[paligemma.disk_name("vision.patch_embedding.weight")] = (1152, 3, 14, 14)
    sparse_tensors(folder / "model.safetensors", tensors)
    policy = read_policy(str(folder), ReadOptions(headers_only=True))
    assert policy.spec == spec and policy.warnings == () and policy.spec.tokens_per_camera == 256
    assert not any("dense" in p for p in lower(drawn(policy)).params)
