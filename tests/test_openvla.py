"""OpenVLA and OpenVLA-OFT against the answers of the original classes: preprocessing, every token, logits, actions."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from checkpoint_files import GOLDEN, copy_golden, edit_json, write_tensors

import vlac
from vlac.checkpoint import read_policy
from vlac.engines.base import get_engine
from vlac.errors import CheckpointError, EngineError, InputError, Unsupported, VlacError
from vlac.readers.safetensors_file import open_file
from vlac.registry import ReadOptions
from vlac.runtime.session import Session

NpArray = np.ndarray[Any, Any]

MAIN, OFT = GOLDEN / "openvla_tiny", GOLDEN / "openvla_oft_tiny"
OFT_SPEC = {"num_images_in_input": "2"}
EXACT = (("onnx-fp32", "onnxruntime"), ("onnx-fp32", "openvino"), ("gguf-f32", "ggml"), ("gguf-f16", "ggml"))
"""Targets that must give every token of the original."""

ROUNDED = (
    ("gguf-q8", "ggml", 0.05),
    ("onnx-int8", "onnxruntime", 0.05),
    ("onnx-int8", "openvino", 0.05),
    ("onnx-int4", "onnxruntime", 0.5),
    ("gguf-q4", "ggml", 0.05),
    ("gguf-q5", "ggml", 0.05),
    ("gguf-q6", "ggml", 0.05),
    ("gguf-bf16", "ggml", 0.02),
    ("onnx-fp16", "onnxruntime", 0.002),
)
"""Target, engine, and how far (relative L2) the first token's logits may lie from the original's (random weights)."""


ROUNDED_OFT = tuple(
    (target, engine, {"onnx-int4": 0.8, "gguf-q4": 0.35}.get(target, 2.2 * limit)) for target, engine, limit in ROUNDED
)
"""The same for the chunk of an L1 head, which reads seven rows of 44 random features at once."""


def arrays(folder: Path) -> dict[str, NpArray]:
    with np.load(folder / "golden.npz") as file:
        return dict(file)


def facts(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "golden.json").read_text(encoding="utf-8"))
    return found


def observation(folder: Path, i: int) -> dict[str, Any]:
    a, task = arrays(folder), facts(folder)["observations"][i]["task"]
    if folder == MAIN:
        return {"images": {"image": a[f"obs{i}_image"]}, "task": task}
    images = {"image": a[f"obs{i}_image0"], "wrist_image": a[f"obs{i}_image1"]}
    return {"images": images, "task": task, "state": a[f"obs{i}_state"]}


def need(engine: str) -> None:
    if why := get_engine(engine).missing():
        pytest.skip(f"{engine}: {why}")


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """compiled(folder, target, key=..., **spec): the path of an artifact, made once."""
    made: dict[Any, Path] = {}

    def get(folder: Path, target: str, key: str = "bridge_orig", **options: Any) -> Path:
        at = (folder, target, key, repr(options))
        if at not in made:
            out = tmp_path_factory.mktemp("openvla")
            spec = {**(OFT_SPEC if folder == OFT else {}), **options.pop("spec", {})}
            result = vlac.compile(
                folder / "checkpoint", target, out / "made", unnorm_key=key, spec=spec, goldens=1, **options
            )
            assert result.path is not None
            made[at] = result.path
        return made[at]

    return get


def logits_of(session: Session, given: dict[str, Any]) -> NpArray:
    from vlac.runtime.schedule import execute
    from vlac.runtime.session import prepare

    artifact = session.artifact
    ready = prepare(artifact.io, session._tokenizer, artifact.program, **given)
    collected: dict[str, NpArray] = {}
    assert session._engine is not None
    execute(artifact.program, session._engine, ready.env, ready.symbols, collected=collected)
    return collected["step_logits"]


# --- OpenVLA ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("i", range(4))
def test_preprocessing_is_the_originals(i: int) -> None:
    from vlac.api import draw
    from vlac.runtime.session import prepare

    a, policy = arrays(MAIN), read_policy(str(MAIN / "checkpoint"), ReadOptions(unnorm_key="bridge_orig"))
    ready = prepare(policy.io, policy.tokenizer, draw(policy), **observation(MAIN, i))
    assert np.abs(ready.env["pixels"][0] - a[f"obs{i}_pixel_values"]).max() <= 1e-6
    ids = ready.env["tokens"][ready.env["token_valid"]].tolist()
    assert ids == [*a[f"obs{i}_input_ids"].tolist(), facts(MAIN)["trailing_token_id"]]


def check_tokens(path: Path, engine: str, i: int) -> None:
    a = arrays(MAIN)
    with vlac.load(path, engine=engine, threads=1) as policy:
        chunk = policy.act(**observation(MAIN, i))
        assert policy.tokens is not None
        assert policy.tokens.tolist() == a[f"obs{i}_action_tokens"].tolist()
        want = a[f"obs{i}_action"]
        assert chunk.shape == (1, len(want))
        assert np.abs(chunk[0] - want).max() <= 1e-5 * np.abs(want).max()
        normalised = policy.act(**observation(MAIN, i), units="normalized")
        assert np.abs(normalised[0] - a[f"obs{i}_action_normalized"]).max() <= 1e-6
        logits, told = logits_of(policy, observation(MAIN, i)), a[f"obs{i}_step_logits"]
        assert np.abs(logits - told).max() <= 1e-4 * np.abs(told).max()


@pytest.mark.parametrize("i", [0, 2, 3])
def test_every_token_in_torch(i: int, compiled: Any) -> None:
    need("torch")
    check_tokens(compiled(MAIN, "gguf-f32"), "torch", i)


@pytest.mark.parametrize(("target", "engine"), EXACT)
@pytest.mark.parametrize("i", [0, 2, 3])
def test_every_token_in_every_exact_target(target: str, engine: str, i: int, compiled: Any) -> None:
    need(engine)
    check_tokens(compiled(MAIN, target), engine, i)


def test_another_dataset_has_another_action(compiled: Any) -> None:
    need("onnxruntime")
    check_tokens(compiled(MAIN, "onnx-fp32", key="toy_arm"), "onnxruntime", 1)


@pytest.mark.parametrize(("target", "engine", "limit"), ROUNDED)
def test_rounded_weights_stay_within_bounds(target: str, engine: str, limit: float, compiled: Any) -> None:
    need(engine)
    a = arrays(MAIN)
    with vlac.load(compiled(MAIN, target), engine=engine, threads=1) as policy:
        for i in (0, 2, 3):
            first, told = logits_of(policy, observation(MAIN, i))[0], a[f"obs{i}_step_logits"][0]
            assert np.linalg.norm(first - told) <= limit * np.linalg.norm(told)


def test_one_file_decodes_the_same_tokens(compiled: Any) -> None:
    need("onnxruntime")
    with vlac.load(compiled(MAIN, "onnx-fp32", single_file=True), engine="onnxruntime", threads=1) as policy:
        policy.act(**observation(MAIN, 0))
        assert policy.tokens is not None
        assert policy.tokens.tolist() == arrays(MAIN)["obs0_action_tokens"].tolist()


def test_parity_holds(compiled: Any) -> None:
    need("ggml")
    from vlac.parity import parity

    report = parity(compiled(MAIN, "gguf-f32"), engine="ggml")
    assert report["ok"], report


def test_a_reference_too_large_for_memory_reads_weights_anew(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    need("torch")
    monkeypatch.setattr("vlac.goldens.MAX_REFERENCE_BYTES", 0)
    made = vlac.compile(MAIN / "checkpoint", "gguf-f32", tmp_path / "out", unnorm_key="bridge_orig", goldens=1)
    assert made.path is not None
    with vlac.load(made.path, engine="torch") as policy:
        (golden,) = policy.artifact.goldens()
        assert np.array_equal(policy.act(images=golden.images, task=golden.task), golden.chunk)


# --- RT-2 style options ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("engine", ["torch", "ggml", "onnxruntime"])
def test_the_argmax_may_be_restricted_to_the_bins(engine: str, compiled: Any) -> None:
    need(engine)
    a = arrays(MAIN)
    target = "onnx-fp32" if engine == "onnxruntime" else "gguf-f32"
    path = compiled(MAIN, target, spec={"bins.restricted": "true", "bins.kind": "cells"})
    with vlac.load(path, engine=engine, threads=1) as policy:
        policy.act(**observation(MAIN, 0))
        assert policy.tokens is not None
        low, high = facts(MAIN)["base_vocab"] - 256, facts(MAIN)["base_vocab"]
        assert policy.tokens[0] == low + int(np.argmax(a["obs0_step_logits"][0][low:high]))
        assert all(low <= t < high for t in policy.tokens)


TABLE = (*range(600, 700), 31, *range(450, 300, -1), 70, 804, 12, 9)
"""256 ids in an order of their own."""


@pytest.mark.parametrize("engine", ["torch", "ggml", "onnxruntime", "openvino"])
@pytest.mark.parametrize("folder", [MAIN, OFT], ids=["one by one", "all at once"])
def test_bins_may_have_any_ids(folder: Path, engine: str, compiled: Any, tmp_path: Path) -> None:
    need(engine)
    table = tuple(i for i in TABLE if i < 760) if folder == OFT else TABLE
    spec = {"bins.restricted": True, "bins.kind": "cells", "bins.ids": list(table)}
    target = "gguf-f32" if engine in ("torch", "ggml") else "onnx-fp32"
    if folder == OFT:
        copied = copy_golden(tmp_path, "openvla_oft_tiny")
        next(copied.glob("action_head--*")).unlink()
        made = vlac.compile(copied, target, tmp_path / "out", unnorm_key="bridge_orig", spec={**OFT_SPEC, **spec}).path
    else:
        made = compiled(folder, target, spec=spec)
    with vlac.load(made, engine=engine, threads=1) as policy:
        chunk = policy.act(**observation(folder, 0), units="normalized")
        assert policy.tokens is not None
        assert set(policy.tokens.tolist()) <= set(table)
        places = np.array([table.index(t) for t in policy.tokens])
        assert np.abs(chunk.reshape(-1) - (-1 + (2 * places + 1) / len(table))).max() <= 1e-6
        if folder == MAIN:
            told = arrays(MAIN)["obs0_step_logits"][0]
            assert policy.tokens[0] == table[int(np.argmax(told[list(table)]))]


def test_ids_of_bins_are_checked() -> None:
    from vlac.readers.prismatic import read_ids
    from vlac.runtime.token_bins import token_bins

    assert read_ids("12+7+3-5+9-8") == (12, 7, 3, 4, 5, 9, 8)
    assert read_ids([4, 2]) == (4, 2)
    for given, message in (("a+1", "expected ids"), ("1+1", "1 ids for 2 bins"), ("5-900", "ids 5..900, of 863")):
        with pytest.raises((CheckpointError, Unsupported), match=message):
            read_policy(str(MAIN / "checkpoint"), ReadOptions(unnorm_key="bridge_orig", spec={"bins.ids": given}))
    common: dict[str, Any] = {"bins": 2, "kind": "cells", "first": 0, "direction": 1, "columns": 1, "ids": [40, 3]}
    assert token_bins(np.array([3.0, 40.0]), **common).tolist() == [[0.5], [-0.5]]
    with pytest.raises(EngineError, match="picked id 7"):
        token_bins(np.array([3.0, 7.0]), **common)


# --- OpenVLA-OFT -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("target", "engine"), (("gguf-f32", "torch"), *EXACT))
@pytest.mark.parametrize("i", [0, 1, 3])
def test_oft_gives_the_originals_chunk(target: str, engine: str, i: int, compiled: Any) -> None:
    need(engine)
    a = arrays(OFT)
    with vlac.load(compiled(OFT, target), engine=engine, threads=1) as policy:
        chunk, want = policy.act(**observation(OFT, i)), a[f"obs{i}_action"]
        limit = 5e-3 if target == "gguf-f16" else 1e-5
        assert np.abs(chunk - want).max() <= limit * np.abs(want).max()
        assert policy.tokens is None


@pytest.mark.parametrize(("target", "engine", "limit"), ROUNDED_OFT)
def test_oft_with_rounded_weights_stays_within_bounds(target: str, engine: str, limit: float, compiled: Any) -> None:
    need(engine)
    a = arrays(OFT)
    with vlac.load(compiled(OFT, target), engine=engine, threads=1) as policy:
        for i in (0, 1, 3):
            chunk, want = policy.act(**observation(OFT, i)), a[f"obs{i}_action"]
            assert np.linalg.norm(chunk - want) <= limit * np.linalg.norm(want)


def test_oft_without_its_head_decodes_all_tokens_at_once(tmp_path: Path) -> None:
    need("torch")
    folder = copy_golden(tmp_path, "openvla_oft_tiny")
    next(folder.glob("action_head--*")).unlink()
    made = vlac.compile(folder, "gguf-f32", tmp_path / "out", unnorm_key="bridge_orig", spec=OFT_SPEC, goldens=1)
    assert made.path is not None
    a = arrays(OFT)
    with vlac.load(made.path, engine="torch") as policy:
        for i in range(4):
            chunk = policy.act(**observation(OFT, i))
            assert np.abs(chunk - a[f"obs{i}_action_discrete"]).max() <= 1e-5
            assert policy.tokens is not None
            assert policy.tokens.shape == (35,)


def test_a_side_file_that_holds_code_is_refused(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    folder = copy_golden(tmp_path, "openvla_oft_tiny")
    torch.save({"fc1.weight": Path("/")}, next(folder.glob("action_head--*")))
    with pytest.raises(CheckpointError, match="not a torch state dict of tensors"):
        read_policy(str(folder), ReadOptions(unnorm_key="bridge_orig", spec=OFT_SPEC))


def test_an_artifact_may_hold_statistics_of_several_datasets(tmp_path: Path) -> None:
    need("torch")
    folder = copy_golden(tmp_path, "openvla_tiny")

    def edit(table: dict[str, Any]) -> None:
        table["other"] = {"action": {"q01": [0.0] * 7, "q99": [10.0] * 7, "mask": [True] * 6 + [False]}}

    edit_json(folder / "dataset_statistics.json", edit)
    keys = "bridge_orig,other"
    made = vlac.compile(folder, "gguf-f32", tmp_path / "out", unnorm_key=keys, goldens=1)
    assert made.path is not None
    a = arrays(MAIN)
    with vlac.load(made.path, engine="torch") as policy:
        assert policy.hparams.unnorm_keys == ("bridge_orig", "other")
        assert np.abs(policy.act(**observation(MAIN, 0))[0] - a["obs0_action"]).max() <= 1e-6
        other = policy.act(**observation(MAIN, 0), unnorm_key="other")[0]
        normalised = a["obs0_action_normalized"]
        assert np.abs(other - [*((normalised[:6] + 1) * 5), normalised[6]]).max() <= 1e-5
        with pytest.raises(InputError, match="bridge_orig, other"):
            policy.act(**observation(MAIN, 0), unnorm_key="toy_arm")
    with pytest.raises(CheckpointError, match="5 numbers, the network has 7"):
        read_policy(str(folder), ReadOptions(unnorm_key="bridge_orig,toy_arm"))


# --- other shapes ----------------------------------------------------------------------------------------------


def one_tower(tmp_path: Path, kept: str) -> Path:
    """The golden checkpoint with one tower only, and the two-layer projector that such checkpoints have."""
    folder = copy_golden(tmp_path, "openvla_tiny")
    index = json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]
    tensors: dict[str, NpArray] = {}
    for shard in sorted(set(index.values())):
        tensors.update({n: t.load() for n, t in open_file(folder / shard).items()})
        (folder / shard).unlink()
    (folder / "model.safetensors.index.json").unlink()
    at = 0 if kept == "featurizer" else 1
    drop = "vision_backbone.fused_featurizer." if at == 0 else "vision_backbone.featurizer."
    tensors = {n: t for n, t in tensors.items() if not n.startswith(drop)}
    tensors = {n.replace("fused_featurizer", "featurizer"): t for n, t in tensors.items()}
    width = tensors["vision_backbone.featurizer.pos_embed"].shape[2]
    tensors["projector.fc1.weight"] = tensors.pop("projector.fc1.weight")[:48, :width]
    tensors["projector.fc1.bias"] = tensors.pop("projector.fc1.bias")[:48]
    tensors["projector.fc2.weight"] = tensors.pop("projector.fc2.weight")[:, :48]
    del tensors["projector.fc3.weight"], tensors["projector.fc3.bias"]
    write_tensors(folder / "model.safetensors", tensors)

    def config(table: dict[str, Any]) -> None:
        table.update(use_fused_vision_backbone=False, image_sizes=[70])
        table["vision_backbone_id"] = ("dinov2-vit-l", "siglip-vit-so400m")[at]
        for key in ("timm_model_ids", "timm_model_kwargs", "timm_override_act_layers"):
            table[key] = [table[key][at]]

    def pictures(table: dict[str, Any]) -> None:
        for key in ("tvf_resize_params", "tvf_crop_params", "tvf_normalize_params"):
            table[key] = [table[key][at]]
        # the shorter side to 75, the middle of it: 73 pixels, of which 70 are whole patches
        table["tvf_resize_params"][0]["size"] = 75
        table["tvf_crop_params"][0]["output_size"] = [73, 73]
        table.update(tvf_do_letterbox=True, tvf_letterbox_fill=[127, 127, 127])

    edit_json(folder / "config.json", config)
    edit_json(folder / "config.json", lambda t: t.update(image_sizes=[73]))
    edit_json(folder / "preprocessor_config.json", pictures)
    return folder


@pytest.mark.parametrize("kept", ["featurizer", "fused_featurizer"])
def test_one_tower_and_pictures_that_are_cut(kept: str, tmp_path: Path) -> None:
    folder = one_tower(tmp_path, kept)
    tokens = []
    for target, engine in (("gguf-f32", "torch"), *EXACT[:3]):
        if get_engine(engine).missing():
            continue
        made = vlac.compile(folder, target, tmp_path / f"out-{engine}", unnorm_key="toy_arm", goldens=1)
        assert made.path is not None
        with vlac.load(made.path, engine=engine, threads=1) as policy:
            assert policy.act(**observation(MAIN, 0)).shape == (1, 5)
            assert policy.tokens is not None
            tokens.append(policy.tokens.tolist())
    assert tokens == [tokens[0]] * len(tokens)


# --- refusals --------------------------------------------------------------------------------------------------


def refused(tmp_path: Path, edit: Any, file: str = "config.json", **options: Any) -> VlacError:
    folder = copy_golden(tmp_path, "openvla_tiny")
    edit_json(folder / file, edit)
    with pytest.raises(VlacError) as error:
        read_policy(str(folder), ReadOptions(**{"unnorm_key": "bridge_orig", **options}))
    return error.value


def test_several_datasets_need_a_choice() -> None:
    with pytest.raises(CheckpointError, match="bridge_orig, toy_arm") as error:
        read_policy(str(MAIN / "checkpoint"))
    assert "--unnorm-key" in error.value.remedy
    with pytest.raises(CheckpointError, match="no statistics under 'elsewhere'"):
        read_policy(str(MAIN / "checkpoint"), ReadOptions(unnorm_key="elsewhere"))


def test_a_tower_without_known_heads_asks_for_them(tmp_path: Path) -> None:
    def edit(table: dict[str, Any]) -> None:
        table.pop("timm_model_kwargs")
        table["timm_model_ids"] = ["vit_tiny", "vit_so400m_patch14_siglip_224"]

    error = refused(tmp_path, edit)
    assert isinstance(error, CheckpointError)
    assert "--spec vision.num_attention_heads" in error.remedy
    folder = tmp_path / "openvla_tiny"
    spec = {"vision.num_attention_heads": "5", "fused.num_attention_heads": "3"}
    policy = read_policy(str(folder), ReadOptions(unnorm_key="bridge_orig", spec=spec))
    assert (policy.spec.vision.num_attention_heads, policy.spec.fused.num_attention_heads) == (5, 3)


CONTRADICTIONS = (
    (lambda t: t.update(vision_backbone_id="clip-vit-l"), Unsupported, "clip-vit-l"),
    (lambda t: t["text_config"].update(vocab_size=900), CheckpointError, "vocab_size 900, tensors say 863"),
    (lambda t: t["text_config"].update(num_attention_heads=5), CheckpointError, "5 heads"),
    (lambda t: t["text_config"].update(model_type="phi"), Unsupported, "phi"),
    (lambda t: t.update(image_sizes=[56, 56]), CheckpointError, "16 patches"),
    (lambda t: t.update(image_sizes=[70, 56]), Unsupported, "one size"),
    (lambda t: t.update(n_action_bins=900), CheckpointError, "900 bins"),
)


@pytest.mark.parametrize("n", range(len(CONTRADICTIONS)))
def test_contradictions_are_refused(n: int, tmp_path: Path) -> None:
    edit, kind, message = CONTRADICTIONS[n]
    error = refused(tmp_path, edit)
    assert isinstance(error, kind)
    assert message in str(error)


def test_a_missing_shard_is_named(tmp_path: Path) -> None:
    folder = copy_golden(tmp_path, "openvla_tiny")
    (folder / "model-00002-of-00005.safetensors").unlink()
    with pytest.raises(CheckpointError, match="model-00002-of-00005"):
        read_policy(str(folder), ReadOptions(unnorm_key="bridge_orig"))


def test_an_adapter_alone_is_not_a_model(tmp_path: Path) -> None:
    folder = copy_golden(tmp_path, "openvla_tiny")
    for file in folder.glob("model*"):
        file.unlink()
    (folder / "adapter_config.json").write_text("{}")
    with pytest.raises(CheckpointError, match="only an adapter"):
        read_policy(str(folder))


# --- steps -----------------------------------------------------------------------------------------------------


def test_token_bins_are_openvlas() -> None:
    from vlac.runtime.token_bins import centres, token_bins

    ids = np.array([31999, 31872, 31745, 31744, 2000, 32000], np.float32)
    common: dict[str, Any] = {"bins": 256, "kind": "edges", "first": 31999, "direction": -1, "columns": 6}
    told = [-0.99607843, 0.0, 0.99607843, 0.99607843, 0.99607843, -0.99607843]
    assert np.abs(token_bins(ids, **common, end=2)[0] - told).max() <= 1e-7
    with pytest.raises(EngineError, match="after 4 of 6"):
        token_bins(ids, **common, end=2000)
    assert token_bins(ids[::-1], **common, end=31999).shape == (1, 6)  # at the last place an end is only an id
    assert centres(4, "cells").tolist() == [-0.75, -0.25, 0.25, 0.75]
    up = token_bins(np.array([10.0, 13.0]), bins=4, kind="cells", first=10, direction=1, columns=1)
    assert up.tolist() == [[-0.75], [0.75]]


def test_letterbox_leaves_an_odd_pixel_and_crops_in_the_middle() -> None:
    from vlac.runtime.pillow_steps import centre_crop, pillow_resize, square

    x = np.zeros((3, 4, 7), np.float32)
    padded = square(x, fill=[127, 127, 127])
    assert padded.shape == (3, 6, 7)
    assert padded[0, 0, 0] == np.float32(127) / np.float32(255)
    assert pillow_resize(x, size=8, filter="bicubic").shape == (3, 8, 14)
    order = np.broadcast_to(np.arange(7, dtype=np.float32), (3, 4, 7))
    assert centre_crop(order, height=2, width=4)[0, 0].tolist() == [2, 3, 4, 5]  # 1.5 rounds to 2


@pytest.mark.parametrize(("task", "final"), [("go", 7), ("go", None)])
def test_a_final_token_is_appended_once(task: str, final: int | None) -> None:
    from vlac.runtime.tokenizer import load_tokenizer, tokenise

    tokenizer = load_tokenizer((MAIN / "checkpoint" / "tokenizer.json").read_bytes())
    plain = tokenise(tokenizer, task, max_length=20)
    longer = tokenise(tokenizer, task, max_length=20, final_id=final)
    assert longer.ids.tolist() == [*plain.ids.tolist(), *([] if final is None else [final])]
    same = tokenise(tokenizer, task, max_length=20, final_id=int(plain.ids[-1]))
    assert same.ids.tolist() == plain.ids.tolist()
