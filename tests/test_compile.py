"""compile(): the artifact is put in place in one step, the same input gives the same bytes, refusals leave nothing."""

from __future__ import annotations

import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import vlac
from vlac.api import parse_pass
from vlac.errors import Unsupported, VlacError
from vlac.place import check_destination, partial

GOLDEN = Path(__file__).parent / "golden" / "smolvla_tiny" / "checkpoint"
TARGETS = ["gguf-q8", "onnx-int8"]


def snapshot(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("flow-steps:steps=4", ("flow-steps", {"steps": "4"})),
        ("a", ("a", {})),
        ("a:k=v,m=text.*", ("a", {"k": "v", "m": "text.*"})),
    ],
)
def test_pass_grammar(text, expected):
    assert parse_pass(text) == expected


@pytest.mark.parametrize("text", ["a:k", "a:=v", "a:k=1,k=2"])
def test_pass_grammar_refuses(text):
    with pytest.raises(VlacError, match="--pass"):
        parse_pass(text)


def test_strangers_are_never_replaced(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(VlacError, match=r"notes\.txt"):
        check_destination(tmp_path)
    (tmp_path / "model.gguf").write_bytes(b"GGUF somebody else's")
    (tmp_path / "notes.txt").unlink()
    with pytest.raises(VlacError, match=r"model\.gguf"):
        vlac.compile(GOLDEN, "gguf-q8", tmp_path)
    assert snapshot(tmp_path) == {"model.gguf": b"GGUF somebody else's"}


def test_failure_inside_leaves_the_earlier_one(tmp_path):
    out = tmp_path / "out"
    with partial(out, 0) as temp:
        (temp / "a").write_text("first")
    with pytest.raises(ValueError, match="boom"), partial(out, 0) as temp:
        (temp / "a").write_text("second")
        raise ValueError("boom")
    assert snapshot(tmp_path) == {"out/a": b"first"}


def test_full_disk_is_said_before_writing(tmp_path):
    with pytest.raises(VlacError, match="MB free"), partial(tmp_path / "out", 1 << 60):
        pass
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("target", TARGETS)
def test_same_bytes_twice(tmp_path, target):
    first = vlac.compile(GOLDEN, target, tmp_path / "a")
    vlac.compile(GOLDEN, target, tmp_path / "b")
    assert first.path is not None and first.path.exists()
    assert snapshot(tmp_path / "a") == snapshot(tmp_path / "b")


def test_compiling_again_replaces_whole(tmp_path):
    out = tmp_path / "out"
    vlac.compile(GOLDEN, "onnx-fp32", out)
    vlac.compile(GOLDEN, "gguf-f16", out)
    assert [p.suffix for p in out.iterdir()] == [".gguf"]
    vlac.compile(GOLDEN, "onnx-fp32", out)
    assert not list(out.glob("*.gguf"))
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_out_may_be_one_gguf_file(tmp_path):
    result = vlac.compile(GOLDEN, "gguf-q8", tmp_path / "arm.gguf")
    assert result.path == tmp_path / "arm.gguf"
    with vlac.load(tmp_path / "arm.gguf", engine="numpy") as policy:
        assert policy.hparams.chunk_size == 10
    with pytest.raises(VlacError, match="folder"):
        vlac.compile(GOLDEN, "onnx-fp32", tmp_path / "b.gguf")


def test_dry_run_writes_nothing_and_tells_the_census(tmp_path):
    result = vlac.compile(GOLDEN, "gguf-q8", tmp_path / "out", dry_run=True)
    assert result.path is None and not (tmp_path / "out").exists()
    formats = result.manifest["census"]["formats"]
    assert formats["q8_0"]["bytes"] > 0 and result.manifest["golden"] == "none"


@pytest.mark.parametrize(
    ("kwargs", "match"),
    [
        ({"target": "gguf-q9"}, "gguf-q8"),
        ({"passes": ["no-such-pass"]}, "no pass"),
        ({"spec": {"text.no_such": 3}}, "no_such"),
        ({"target": "gguf-q8", "single_file": True}, "single-file"),
        ({"checkpoint": "/no/such/folder"}, "no/such/folder"),
    ],
)
def test_refusals_leave_nothing(tmp_path, kwargs, match):
    with pytest.raises(VlacError, match=match):
        vlac.compile(**{"checkpoint": GOLDEN, "out": tmp_path / "out", **kwargs})
    assert list(tmp_path.iterdir()) == []


def test_unknown_target_names_those_there_are():
    with pytest.raises(Unsupported, match="onnx-fp32"):
        vlac.compile(GOLDEN, "tflite")


def test_disk_full_in_the_middle(tmp_path):
    """A file size limit stands in for a full disk: the write fails with EFBIG half way."""
    out = tmp_path / "out"
    vlac.compile(GOLDEN, "gguf-q8", out)
    before = snapshot(tmp_path)
    code = f"import vlac; vlac.compile({str(GOLDEN)!r}, 'gguf-f32', {str(out)!r})"

    def limit() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (300_000, 300_000))

    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, preexec_fn=limit)
    assert done.returncode != 0
    assert "disk became full" in done.stderr, done.stderr
    assert snapshot(tmp_path) == before


@pytest.mark.parametrize("moment", ["_move", "fsync"])
def test_kill_in_the_middle_leaves_the_earlier_artifact(tmp_path, moment):
    out = tmp_path / "out"
    vlac.compile(GOLDEN, "gguf-q8", out)
    before = snapshot(out)
    patch = "p._move" if moment == "_move" else "p.os.fsync"
    code = (
        "import time, pathlib, vlac, vlac.place as p\n"
        "def hang(*a):\n"
        f"    pathlib.Path({str(tmp_path / 'ready')!r}).write_text('')\n"
        "    time.sleep(600)\n"
        f"{patch} = hang\n"
        f"vlac.compile({str(GOLDEN)!r}, 'onnx-fp32', {str(out)!r})\n"
    )
    child = subprocess.Popen([sys.executable, "-c", code])
    for _ in range(1200):
        if (tmp_path / "ready").exists() or child.poll() is not None:
            break
        time.sleep(0.1)
    assert child.poll() is None, "the child ended before it could be killed"
    os.kill(child.pid, signal.SIGKILL)
    child.wait()
    assert snapshot(out) == before
    assert any(".vlac-partial-" in p.name for p in tmp_path.iterdir())
    vlac.compile(GOLDEN, "onnx-fp32", out)
    assert (out / "manifest.json").is_file()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out", "ready"]


def test_bytes_do_not_depend_on_where_and_with_how_many_threads(tmp_path):
    """From another working folder, a relative path, other threads and another order of hashing."""
    code = "import sys, vlac; vlac.compile(sys.argv[1], 'onnx-int8', sys.argv[2])"
    made = []
    for n, (folder, checkpoint) in enumerate(((tmp_path, GOLDEN), (GOLDEN.parent, Path("checkpoint")))):
        out = tmp_path / f"made{n}"
        env = {**os.environ, "OMP_NUM_THREADS": str(1 + 3 * n), "PYTHONHASHSEED": str(n)}
        subprocess.run([sys.executable, "-c", code, checkpoint, out], cwd=folder, env=env, check=True)
        made.append(snapshot(out))
    assert made[0] == made[1]


def test_nan_weights_are_refused_by_name(tmp_path):
    import numpy as np

    broken = tmp_path / "ckpt"
    shutil.copytree(GOLDEN, broken)
    path = broken / "model.safetensors"
    data = bytearray(path.read_bytes())
    data[-8:-4] = np.float32(np.nan).tobytes()
    path.write_bytes(data)
    with pytest.raises(VlacError, match="NaN"):
        vlac.compile(broken, "gguf-q8", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_broken_plug_in_is_named(tmp_path):
    info = tmp_path / "broken_arm-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: broken-arm\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[vlac.targets]\narm = broken_arm\n")
    (tmp_path / "broken_arm.py").write_text("raise RuntimeError('no such board')\n")
    code = (
        "import vlac.registry as r\n"
        "from vlac.errors import VlacError\n"
        "for _ in range(2):\n"
        "    try: r.targets.all()\n"
        "    except VlacError as e: print(e)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env={**os.environ, "PYTHONPATH": str(tmp_path)}
    )
    assert done.stdout.count("broken-arm) cannot be loaded: RuntimeError: no such board") == 2, done.stderr
