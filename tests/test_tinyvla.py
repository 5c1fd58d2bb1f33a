"""TinyVLA against the answers of the original classes, in every engine; layouts, sizes and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from checkpoint_files import GOLDEN, copy_golden, edit_json

import vlac
from vlac.checkpoint import read_policy
from vlac.engines.base import get_engine
from vlac.errors import CheckpointError, InputError, Unsupported, VlacError
from vlac.registry import ReadOptions

pytest.importorskip("torch")

NpArray = np.ndarray[Any, Any]

NAMES = ("tinyvla_tiny", "tinyvla_v1_tiny")
TARGETS = (
    ("gguf-f32", "torch", 1e-5),
    ("onnx-fp32", "onnxruntime", 1e-5),
    ("onnx-fp32", "openvino", 1e-5),
    ("gguf-f32", "ggml", 2e-5),
    ("gguf-f16", "ggml", 5e-3),
    ("gguf-q8", "ggml", 0.15),
    ("onnx-int8", "onnxruntime", 0.15),
)
"""Target, engine, and how far an action may lie from the original's, of the largest action. The weights are random and
up to 60 wide, so 8 bits cost far more than on a trained network."""


def golden(name: str) -> tuple[dict[str, NpArray], dict[str, Any]]:
    with np.load(GOLDEN / name / "golden.npz") as file:
        arrays = dict(file)
    return arrays, json.loads((GOLDEN / name / "golden.json").read_text(encoding="utf-8"))


def need(engine: str) -> None:
    if why := get_engine(engine).missing():
        pytest.skip(f"{engine}: {why}")


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """compiled(name, target): the path of an artifact, made once."""
    made: dict[Any, Path] = {}

    def get(name: str, target: str) -> Path:
        if (name, target) not in made:
            out = tmp_path_factory.mktemp("tinyvla") / "made"
            path = vlac.compile(GOLDEN / name / "checkpoint", target, out, goldens=1).path
            assert path is not None
            made[name, target] = path
        return made[name, target]

    return get


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(("target", "engine", "limit"), TARGETS)
def test_actions_are_the_originals(name: str, target: str, engine: str, limit: float, compiled: Any) -> None:
    need(engine)
    a, facts = golden(name)
    with vlac.load(compiled(name, target), engine=engine, threads=1) as policy:
        for i, seen in enumerate(facts["observations"]):
            action, want = policy.act({"image": a[f"obs{i}_image"]}, task=seen["task"]), a[f"obs{i}_action"]
            assert action.shape == (1, len(want))
            assert np.abs(action[0] - want).max() <= limit * np.abs(want).max()


@pytest.mark.parametrize("name", NAMES)
def test_inputs_and_features_are_the_originals(name: str) -> None:
    from vlac.api import draw
    from vlac.goldens import reference_session
    from vlac.runtime.session import prepare

    a, facts = golden(name)
    policy = read_policy(str(GOLDEN / name / "checkpoint"))
    program = draw(policy)
    seen = tuple(s.__class__(s.name, s.inputs, s.nodes, (*s.outputs, *extra)) for s, extra in zip(
        program.stages, (("vision_features",), ("lang_features",)), strict=True))  # fmt: skip
    session = reference_session(program.replace(stages=seen))
    for i, obs in enumerate(facts["observations"]):
        ready = prepare(policy.io, policy.tokenizer, program, images={"image": a[f"obs{i}_image"]}, task=obs["task"])
        assert np.array_equal(ready.env["pixels"][0], a[f"obs{i}_pixel_values"])
        count = int(ready.env["token_valid"].sum())
        assert ready.env["tokens"][:count].tolist() == a[f"obs{i}_input_ids"].tolist()
        vision = session.run("vision", {"pixels": ready.env["pixels"][0]}, ready.symbols)
        inputs = {**ready.env, "image_tokens": vision["image_tokens"]}
        text = session.run("policy", {n: inputs[n] for n, _ in program.stage("policy").inputs}, ready.symbols)
        assert np.abs(vision["vision_features"] - a[f"obs{i}_vision_features"]).max() <= 1e-5
        assert np.abs(text["lang_features"][:count] - a[f"obs{i}_lang_features"]).max() <= 1e-5
    session.close()


@pytest.mark.parametrize("target", ["gguf-q8", "onnx-fp32"])
def test_parity_and_bench_of_a_policy_that_samples_nothing(target: str, compiled: Any) -> None:
    from vlac.parity import parity

    need("ggml" if target == "gguf-q8" else "onnxruntime")
    report = parity(compiled("tinyvla_tiny", target))
    assert report["ok"], report
    with vlac.load(compiled("tinyvla_tiny", target), threads=1) as policy:
        image = np.zeros((48, 48, 3), np.uint8)
        assert np.array_equal(policy.act({"image": image}, task="go"), policy.act({"image": image}, task="go"))
        with pytest.raises(InputError, match="takes no noise"):
            policy.act({"image": image}, task="go", noise=np.zeros((1, 3), np.float32))
        with pytest.raises(InputError, match="does not resize"):
            policy.act({"image": np.zeros((64, 64, 3), np.uint8)}, task="go")
        with pytest.raises(InputError, match="this policy takes 28"):
            policy.act({"image": image}, task="red block " * 30)


def test_bench_measures_it(compiled: Any) -> None:
    from vlac.bench import bench

    need("torch")
    report = bench(compiled("tinyvla_tiny", "gguf-f32"), engine="torch", threads=1, runs=2)
    assert {"vision", "policy", "chunk"} <= set(report["stages"])
    assert report["reuse"] == {}


def test_the_text_decoder_is_not_in_the_artifact(compiled: Any) -> None:
    program = (compiled("tinyvla_tiny", "onnx-fp32") / "program.txt").read_text(encoding="utf-8")
    assert "decoder" not in program
    assert read_policy(str(GOLDEN / "tinyvla_tiny" / "checkpoint")).parameters == 278267


# --- reading ---------------------------------------------------------------------------------------------------


def test_the_last_epoch_stands_in_for_the_best(tmp_path: Path) -> None:
    folder = copy_golden(tmp_path, "tinyvla_v1_tiny")
    (folder / "best_model.pt").rename(folder / "checkpoint_epoch_10.pt")
    (folder / "checkpoint_epoch_9.pt").write_bytes(b"")
    policy = read_policy(str(folder))
    assert policy.spec.pooled
    assert "checkpoint_epoch_10.pt" in policy.source.files
    assert read_policy(str(folder / "checkpoint_epoch_10.pt")).spec == policy.spec


def test_heads_come_from_the_config_or_from_the_command_line(tmp_path: Path) -> None:
    folder = copy_golden(tmp_path, "tinyvla_v1_tiny")
    want = read_policy(str(folder)).spec
    (folder / "config.json").unlink()
    with pytest.raises(CheckpointError, match="4 language heads for width 50") as error:
        read_policy(str(folder))
    assert "--spec language.num_attention_heads" in error.value.remedy
    assert read_policy(str(folder), ReadOptions(spec={"language.heads": "5"})).spec == want


def test_a_file_that_holds_code_is_refused(tmp_path: Path) -> None:
    import torch

    folder = copy_golden(tmp_path, "tinyvla_v1_tiny")
    torch.save({"model_state_dict": {"w": Path("/")}}, folder / "best_model.pt")
    with pytest.raises(CheckpointError, match="not a torch state dict of tensors"):
        read_policy(str(folder))


def edited(tmp_path: Path, edit: Any) -> VlacError:
    import torch

    folder = copy_golden(tmp_path, "tinyvla_tiny")
    table = torch.load(folder / "best_model.pt", weights_only=True)
    edit(table["model_state_dict"])
    torch.save(table, folder / "best_model.pt")
    with pytest.raises(VlacError) as error:
        read_policy(str(folder))
    return error.value


BROKEN = (
    (lambda t: t.pop("vision_norm.bias"), "vision_norm.bias is missing"),
    (lambda t: t.pop("fusion_attention.in_proj_weight"), "no layout of TinyVLA"),
    (lambda t: t.update(extra=t["vision_norm.bias"]), "does not have: extra"),
    (lambda t: t.update({"vision_norm.bias": t["vision_proj.weight"]}), "where the network has [44]"),
    (lambda t: t.update({"vision_norm.bias": t["vision_norm.bias"].int()}), "INT32"),
)


@pytest.mark.parametrize("n", range(len(BROKEN)))
def test_broken_files_are_refused(n: int, tmp_path: Path) -> None:
    edit, message = BROKEN[n]
    assert message.lower() in str(edited(tmp_path, edit)).lower()


def test_the_second_layout_has_no_text_decoder(tmp_path: Path) -> None:
    import torch

    folder = copy_golden(tmp_path, "tinyvla_tiny")
    table = torch.load(folder / "best_model.pt", weights_only=True)
    kept = {n: t for n, t in table["model_state_dict"].items() if not n.startswith("text_decoder.")}
    torch.save({"model_state_dict": kept}, folder / "best_model.pt")
    edit_json(folder / "config.json", lambda t: t["model"].pop("use_text_decoder") and None)
    second, third = read_policy(str(folder)), read_policy(str(GOLDEN / "tinyvla_tiny" / "checkpoint"))
    assert second.spec == third.spec
    assert all(np.array_equal(second.weights[n].load(), third.weights[n].load()) for n in third.weights)


def test_contradictions_and_namesakes_are_refused(tmp_path: Path) -> None:
    folder = copy_golden(tmp_path, "tinyvla_tiny")
    edit_json(folder / "config.json", lambda t: t["model"].update(lang_layers=3))
    with pytest.raises(CheckpointError, match="lang_layers is 3, tensors say 2"):
        read_policy(str(folder))
    (folder / "best_model.pt").unlink()
    edit_json(folder / "config.json", lambda t: {"model_type": "llava_pythia"})
    with pytest.raises(Unsupported, match="another model than the toy"):
        read_policy(str(folder))


def test_a_tokenizer_is_asked_for(tmp_path: Path) -> None:
    folder = copy_golden(tmp_path, "tinyvla_tiny")
    (folder / "tokenizer").rename(tmp_path / "elsewhere")
    with pytest.raises(CheckpointError, match="no tokenizer") as error:
        read_policy(str(folder))
    assert "--tokenizer" in error.value.remedy
    assert read_policy(str(folder), ReadOptions(tokenizer=str(tmp_path / "elsewhere"))).tokenizer
    assert "no tokenizer" in read_policy(str(folder), ReadOptions(headers_only=True)).warnings[0]
