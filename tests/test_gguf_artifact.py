"""Artifacts in GGUF: what a target writes is what opens again; names, formats, checksums, and damage found by name."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import vlac
from vlac.artifact import Artifact, Golden, Sidecars, open_artifact, write_goldens
from vlac.engines import ggml_lib
from vlac.errors import ArtifactError, Unsupported, VlacError
from vlac.formats import FORMATS, decode, encode
from vlac.gguf import MANIFEST, PROGRAM, read_gguf, verify
from vlac.graph import Call, Param, Program, Schedule, StageBuilder
from vlac.io import IO
from vlac.place import partial
from vlac.registry import silent, targets
from vlac.targets.gguf import file_name, size_label, tensor_name
from vlac.weights import LazyTensor, Weights

WEIGHTS = {
    "text.embed_tokens.weight": (40, 256),
    "text.layers.0.self_attn.q_proj.weight": (8, 256),
    "text.layers.0.self_attn.q_proj.bias": (8,),
    "expert.layers.10.mlp.gate_up_proj.weight": (8, 8),
}


def toy(fmt: str = "f32") -> Program:
    b = StageBuilder("main")
    x = b.embed(b.input("tokens", "i32", 5), "@text.embed_tokens.weight")
    x = b.linear(x, "@text.layers.0.self_attn.q_proj.weight", "@text.layers.0.self_attn.q_proj.bias")
    b.output(b.linear(x, "@expert.layers.10.mlp.gate_up_proj.weight", name="chunk"))
    r = np.random.default_rng(4)
    values = {n: r.standard_normal(s).astype(np.float32) for n, s in WEIGHTS.items()}
    params = {n: Param(s, fmt if len(s) == 2 and s[-1] == 256 else "f32") for n, s in WEIGHTS.items()}
    weights = Weights({n: LazyTensor.of(v) for n, v in values.items()})
    return Program("toy", (), (b.build(),), params, Schedule((Call("main"),), "chunk"), weights)


def an_io() -> IO:
    return IO((), (), "s", 1, (), (), "a", 8, 8, 5, 5, (), ())


def golden() -> Golden:
    one = np.ones(3, dtype=np.float32)
    return Golden({}, one, "pick", one[None], one[None], one[None])


def sidecars(program: Program, **changes: Any) -> Sidecars:
    manifest = {
        "format_version": 1, "family": "toy", "display_name": "ToyVLA", "name": "toy_base", "parameters": 450_046_176,
        "target": "gguf-f32", "engines": ["ggml"], "files": {},
    }  # fmt: skip
    base = Sidecars(
        str(program), an_io().to_json(), manifest, b'{"model": "gr\xc3\xbc\xc3\x9fe"}', write_goldens((golden(),))
    )
    return dataclasses.replace(base, **changes)


def emit(target: str, folder: Path, fmt: str = "f32", **changes: Any) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    program = toy(fmt)
    targets.get(target).emit(program, sidecars(program, **changes), folder, {}, silent)
    (path,) = folder.iterdir()
    return path


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return emit("gguf-q8", tmp_path_factory.mktemp("good"), "q8_0")


def summary(a: Artifact) -> Any:
    tensors = {n: (t.shape, t.format) for n, t in a.tensors.items()}
    return str(a.program), a.io, json.dumps(a.manifest), a.tokenizer, tensors


# --- whole artifacts ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fmt", [f.name for f in FORMATS.values() if f.ggml_type is not None])
def test_an_artifact_opens_as_it_was_written(fmt: str, tmp_path: Path) -> None:
    if fmt[-1] in "kl" and ggml_lib.missing():
        pytest.skip(ggml_lib.missing())
    a = open_artifact(emit("gguf-f32", tmp_path, fmt))
    program = toy(fmt)
    assert a.container == "gguf"
    assert a.io == an_io()
    assert a.tokenizer == '{"model": "grüße"}'.encode()
    assert a.goldens()[0].task == "pick"
    assert {tensor_name(n): p for n, p in program.params.items()} == a.program.params
    for name, lazy in program.weights.items():
        stored = a.tensors[tensor_name(name)]
        packed = encode(stored.format, lazy.load())
        assert stored.data is not None
        assert np.array_equal(stored.data, packed)
        assert np.array_equal(stored.decode(), decode(stored.format, packed, lazy.shape))
    verify(a.path)


def test_without_tokenizer_and_golden(tmp_path: Path) -> None:
    a = open_artifact(emit("gguf-f32", tmp_path, tokenizer=None, golden=None))
    assert a.tokenizer is None
    assert a.goldens() == ()
    verify(a.path)


def test_writing_twice_gives_the_same_bytes(tmp_path: Path) -> None:
    first, second = (emit("gguf-q8", tmp_path / n, "q8_0").read_bytes() for n in "ab")
    assert first == second


def test_keys_that_other_tools_read(good: Path) -> None:
    file = read_gguf(good)
    assert good.name == "ToyVLA-450M-base-Q8_0.gguf"
    assert {k: v.value for k, v in file.metadata.items() if k.startswith("general.") and "by" not in k} == {
        "general.architecture": "toy", "general.type": "model", "general.name": "toy_base",
        "general.basename": "ToyVLA",
        "general.size_label": "450M", "general.finetune": "base", "general.file_type": 7,
        "general.quantization_version": 2, "general.alignment": 32,
    }  # fmt: skip
    assert set(file.tensors) == {
        "token_embd.weight", "blk.0.attn_q.weight", "blk.0.attn_q.bias", "a.blk.10.ffn_gate_up.weight", "vlac.golden",
    }  # fmt: skip


def test_a_gguf_of_another_program_is_named(tmp_path: Path) -> None:
    gguf = pytest.importorskip("gguf")
    writer = gguf.GGUFWriter(tmp_path / "llama.gguf", "llama")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    with pytest.raises(ArtifactError, match=r"llama\.gguf: no key vlac\.program; .*general\.architecture: llama"):
        open_artifact(tmp_path / "llama.gguf")


# --- damage ------------------------------------------------------------------------------------------------------


def damaged(good: Path, folder: Path, old: bytes, new: bytes) -> Path:
    data = good.read_bytes()
    assert old in data
    assert len(old) == len(new)
    path = folder / "bad.gguf"
    path.write_bytes(data.replace(old, new, 1))
    return path


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        (b"linear(embed", b"linear(embod", "key vlac.program does not match its checksum"),
        (b'"chunk_size"', b'"chunk_sise"', "key vlac.io does not match its checksum"),
        (b'"family"', b'"famili"', "vlac.manifest does not match its checksum"),
        (b'{"model": "gr', b'{"model": "GR', "key tokenizer.huggingface.json does not match its checksum"),
        (b"vlac.io\x08", b"vlac.oi\x08", "no key vlac.io"),
        (
            b"tokenizer.huggingface.json\x08",
            b"tokenizer.huggingface.jsan\x08",
            "tokenizer.huggingface.json is in the man",
        ),
        (
            b"blk.0.attn_q.bias\x01",
            b"blk.0.attn_q.bios\x01",
            "blk.0.attn_q.bias is in the manifest or in the file, not",
        ),
    ],
)
def test_changed_texts_are_found_at_opening(good: Path, tmp_path: Path, old: bytes, new: bytes, said: str) -> None:
    with pytest.raises(ArtifactError, match=said):
        open_artifact(damaged(good, tmp_path, old, new))


@pytest.mark.parametrize("change", [lambda data: data[:-1], lambda data: data + b"more"])
def test_a_file_of_another_length_is_found_at_opening(good: Path, tmp_path: Path, change: Any) -> None:
    bad = tmp_path / "bad.gguf"
    bad.write_bytes(change(good.read_bytes()))
    with pytest.raises(ArtifactError, match=r"the file has \d+ bytes|ends at byte"):
        open_artifact(bad)


def test_a_changed_weight_is_found_by_verify(good: Path, tmp_path: Path) -> None:
    file = read_gguf(good)
    data = bytearray(good.read_bytes())
    data[file.data_start + file.tensors["blk.0.attn_q.weight"].offset + 9] ^= 1
    path = tmp_path / "bad.gguf"
    path.write_bytes(data)
    open_artifact(path)
    with pytest.raises(ArtifactError, match=r"bad\.gguf: tensor blk\.0\.attn_q\.weight does not match"):
        verify(path)


def test_a_newer_format_version_is_refused(tmp_path: Path) -> None:
    program = toy()
    side = sidecars(program)
    path = emit("gguf-f32", tmp_path, manifest={**side.manifest, "format_version": 99})
    with pytest.raises(ArtifactError, match="format version 99"):
        open_artifact(path)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_damage_is_an_artifact_error_or_changes_nothing_that_counts(good: Path, tmp_path: Path, data: Any) -> None:
    """Texts, shapes and formats are protected at opening; weights and goldens by verify."""
    raw = bytearray(good.read_bytes())
    end = read_gguf(good).data_start
    at = data.draw(st.integers(0, end - 1) | st.integers(0, len(raw) - 1))
    raw[at] ^= data.draw(st.integers(1, 255))
    path = tmp_path / "bad.gguf"
    path.unlink(missing_ok=True)
    path.write_bytes(raw)
    try:
        assert summary(open_artifact(path)) == summary(open_artifact(good))
        verify(path)
        whole, part = read_gguf(good), read_gguf(path)
        assert all(np.array_equal(whole.data(n), part.data(n)) for n in whole.tensors)
    except ArtifactError:
        pass


# --- targets -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("target", "shape", "role", "fmt"),
    [
        ("gguf-f32", (960, 960), "linear", "f32"),
        ("gguf-f16", (960, 960), "linear", "f16"),
        ("gguf-bf16", (49280, 960), "embed", "bf16"),
        ("gguf-q8", (960, 960), "linear", "q8_0"),
        ("gguf-q8", (2048, 720), "linear", "q8_0"),
        ("gguf-q8", (49280, 960), "embed", "q8_0"),
        ("gguf-q8", (272, 36), "embed", "f16"),
        ("gguf-q8", (32, 720), "head", "f32"),
        ("gguf-q8", (1024, 768), "other", "f32"),
        ("gguf-q6", (960, 2560), "linear", "q6_k"),
        ("gguf-q6", (960, 960), "linear", "q6_k"),
        ("gguf-q5", (2048, 720), "linear", "q5_k"),
        ("gguf-q4", (320, 320), "linear", "q8_0"),
        ("gguf-q4", (960, 12288), "linear", "q4_k"),
        ("gguf-q4", (49280, 960), "embed", "q8_0"),
        ("gguf-q4", (257152, 2048), "embed", "q4_k"),
    ],
)
def test_plan(target: str, shape: tuple[int, ...], role: str, fmt: str) -> None:
    assert targets.get(target).plan("x.weight", shape, role) == fmt


@pytest.mark.parametrize(
    ("name", "role", "bf16", "q8", "q6", "q5"),
    [
        ("vision.layers.3.mlp.fc1.weight", "linear", "bf16", "bf16", "q6_k", "q5_k"),
        ("vision.layers.3.self_attn.out_proj.weight", "linear", "bf16", "f16", "bf16", "q5_k"),
        ("vision.layers.0.mlp.fc1.weight", "linear", "bf16", "f16", "bf16", "bf16"),
        ("vision.layers.0.self_attn.qkv_proj.weight", "linear", "f16", "f16", "bf16", "bf16"),
        ("vision.patch_embedding.weight", "linear", "f16", "f16", "f16", "f16"),
        ("connector.proj.weight", "linear", "f16", "f16", "q6_k", "q5_k"),
        ("vision.position_embedding", "other", "f32", "f32", "f32", "f32"),
        ("text.layers.0.mlp.up_proj.weight", "linear", "bf16", "q8_0", "q6_k", "q5_k"),
        ("text.layers.0.self_attn.qkv_proj.weight", "linear", "f16", "q8_0", "q6_k", "q5_k"),
        ("expert.layers.0.mlp.up_proj.weight", "linear", "bf16", "q8_0", "q5_k", "q5_k"),
    ],
)
def test_what_matters_more_is_held_finer(name: str, role: str, bf16: str, q8: str, q6: str, q5: str) -> None:
    wanted = {"bf16": bf16, "q8": q8, "q6": q6, "q5": q5}
    assert {f: targets.get(f"gguf-{f}").plan(name, (768, 768), role) for f in wanted} == wanted
    assert targets.get("gguf-q6").plan("expert.x.weight", (960, 320), role) == ("q8_0" if role == "linear" else "f32")


@pytest.mark.parametrize(
    ("count", "label"),
    [(450_046_176, "450M"), (3_300_000_000, "3.3B"), (7_000_000_000, "7B"), (12_400_000_000, "12B"), (323_496, "323K"),
     (1_500_000, "1.5M"), (12, "12")],
)  # fmt: skip
def test_size_label(count: int, label: str) -> None:
    assert size_label(count) == label


@pytest.mark.parametrize(
    ("manifest", "name"),
    [
        (
            {"family": "toy", "display_name": "ToyVLA", "name": "toy_base", "parameters": 450e6},
            "ToyVLA-450M-base-Q8_0.gguf",
        ),
        ({"family": "toy", "display_name": "ToyVLA", "name": "toy", "parameters": 450e6}, "ToyVLA-450M-Q8_0.gguf"),
        ({"family": "toy", "name": "my arm/v 2", "parameters": 3.3e9}, "toy-3.3B-my-arm-v-2-Q8_0.gguf"),
    ],
)
def test_file_name(manifest: dict[str, Any], name: str) -> None:
    assert file_name(manifest, "Q8_0") == name


def test_long_names_are_cut_to_what_ggml_holds() -> None:
    names = [tensor_name("a" * 70 + x) for x in "xy"]
    assert len(set(names)) == 2
    assert all(len(n) == 63 for n in names)


def test_a_format_that_gguf_has_not_is_refused(tmp_path: Path) -> None:
    program = toy("int8")
    with pytest.raises(Unsupported, match=r"tensor text\.embed_tokens\.weight: int8\[40, 256\] cannot be stored"):
        targets.get("gguf-f32").emit(program, sidecars(program), tmp_path, {}, silent)
    assert list(tmp_path.iterdir()) == []


def test_names_that_clash_are_refused(tmp_path: Path) -> None:
    b = StageBuilder("main")
    x = b.linear(b.input("state", "f32", 1, 2), "@text.layers.0.mlp.fc1.w")
    b.output(b.linear(x, "@blk.0.ffn_up.w", name="chunk"))
    two = LazyTensor.of(np.eye(2))
    params = {n: Param((2, 2)) for n in ("text.layers.0.mlp.fc1.w", "blk.0.ffn_up.w")}
    program = Program(
        "toy", (), (b.build(),), params, Schedule((Call("main"),), "chunk"), Weights(dict.fromkeys(params, two))
    )
    with pytest.raises(Unsupported, match=r"would both be called 'blk\.0\.ffn_up\.w'"):
        targets.get("gguf-f32").emit(program, sidecars(program), tmp_path, {}, silent)


def test_a_full_disk_is_named(tmp_path: Path) -> None:
    if not Path("/dev/full").exists():
        pytest.skip("no /dev/full here")
    program = toy()
    with pytest.raises(VlacError, match="disk became full"), partial(tmp_path / "out", 0) as temp:
        (temp / file_name(sidecars(program).manifest, "F32")).symlink_to("/dev/full")
        targets.get("gguf-f32").emit(program, sidecars(program), temp, {}, silent)
    assert list(tmp_path.iterdir()) == []


def test_manifest_lies_in_the_file_as_text(good: Path) -> None:
    file = read_gguf(good)
    manifest = json.loads(file.text(MANIFEST) or "")
    assert manifest["tensor_names"]["blk.0.attn_q.weight"] == "text.layers.0.self_attn.q_proj.weight"
    assert "@blk.0.attn_q.weight" in (file.text(PROGRAM) or "")


def test_an_artifact_that_ggml_declines_names_torch_alone(tmp_path: Path) -> None:
    """Activations rounded between ops have no form in ggml: the file says so, and opens in the engine that runs it."""
    recipe = ["quantize-weights:bits=8,group=channel,act=int8-token"]
    made = vlac.compile("push-cubes", target="gguf-f32", out=tmp_path / "o", passes=recipe, goldens=1)
    assert made.manifest["engines"] == ["torch"]
    assert "kernels round" in made.manifest["declined"]["ggml"]["round_int8"]
    assert vlac.load(tmp_path / "o").hparams.engine == "torch"
