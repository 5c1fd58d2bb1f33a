"""The command line: its surface word by word, every exit code, and what goes to stdout and stderr."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import typer

from vlac import __version__, cli
from vlac.cli import options
from vlac.errors import CheckpointError, InputError

HERE = Path(__file__).parent


@pytest.fixture
def vlac(capsys: pytest.CaptureFixture[str]) -> Any:
    """vlac("list") -> (exit code, stdout, stderr)."""

    def run(*args: Any) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as ended:
            cli.app([str(a) for a in args])
        out, err = capsys.readouterr()
        return int(ended.value.code or 0), out, err

    return run


# --- surface ---------------------------------------------------------------------------------------------------


def surface() -> str:
    """Commands with their parameters and help, however the installed typer draws them."""
    group: Any = typer.main.get_command(cli.app)
    lines = []
    for name, command in group.commands.items():
        lines += ["", f"vlac {name}: {' '.join(command.help.split())}"]
        for p in command.params:
            if "--help" in p.opts:
                continue
            spelled = ", ".join(p.opts) if p.param_type_name == "option" else p.metavar
            lines.append(f"  {spelled}{' (repeatable)' if p.multiple else ''}: {getattr(p, 'help', '') or ''}".rstrip())
    return "\n".join(lines).strip() + "\n"


def test_the_surface_is_the_one_on_record() -> None:
    record = HERE / "cli_surface.txt"
    if os.environ.get("VLAC_RECORD") == "1":
        record.write_text(surface(), encoding="utf-8")
    assert surface() == record.read_text(encoding="utf-8")


def test_help_of_every_command(vlac: Any) -> None:
    code, out, _ = vlac("--help")
    assert code == 0
    for name in ("inspect", "compile", "parity", "bench", "run", "list", "doctor"):
        assert name in out
        code, text, _ = vlac(name, "--help")
        assert code == 0 and "Usage" in text


def test_version(vlac: Any) -> None:
    assert vlac("--version")[:2] == (0, f"vlac {__version__}\n")


def test_shell_completion_is_offered() -> None:
    env = {**os.environ, "_VLAC_COMPLETE": "complete_bash", "COMP_WORDS": "vlac in", "COMP_CWORD": "1"}
    code = "import sys; sys.argv = ['vlac']; from vlac.cli import app; app(prog_name='vlac')"
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=False)
    assert "inspect" in done.stdout, done.stderr


def test_help_imports_nothing_heavy() -> None:
    code = (
        "import sys\nfrom vlac import cli\n"
        "try:\n    cli.app(['--help'])\nexcept SystemExit:\n    pass\n"
        "print([m for m in ('numpy', 'torch', 'onnx', 'onnxruntime', 'openvino', 'PIL', 'tokenizers', 'rich', "
        "'huggingface_hub') if m in sys.modules], file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stderr.strip() == "[]"


# --- refusals --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["inspect", "no/such/thing"], "no/such/thing"),
        (["inspect", "x.gguf"], "does not exist"),
        (["compile", "CKPT", "--target", "gguf-q99", "-o", "OUT"], "no target 'gguf-q99'; there are: "),
        (["compile", "CKPT", "--spec", "nothing", "-o", "OUT"], "--spec 'nothing' is not KEY=VALUE"),
        (["compile", "CKPT", "--spec", "a=1", "--spec", "a=2", "-o", "OUT"], "--spec a is given twice"),
        (["compile", "CKPT", "--pass", "no-such-pass", "-o", "OUT", "--target", "gguf-f32"], "no pass 'no-such-pass'"),
        (["parity", "no-artifact"], "no-artifact does not exist"),
        (["parity", "no-artifact", "--limit", "speed<=1"], "no figure 'speed'"),
        (["bench", "no-artifact"], "no-artifact does not exist"),
        (["bench", "no-artifact", "-o", "xml"], "-o 'xml': there are md, json, csv, jsonl"),
        (["run", "no-artifact", "--image", "top"], "--image 'top' is not KEY=VALUE"),
        (["run", "no-artifact", "--image", "top=none.png"], "none.png does not exist"),
        (["run", "no-artifact", "--state", "1,two"], "numbers separated by commas"),
        (["run", "no-artifact"], "no-artifact does not exist"),
    ],
)
def test_refusals_end_with_2_and_say_why(
    vlac: Any, golden: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, args: list[str], words: str
) -> None:
    monkeypatch.chdir(tmp_path)
    places = {"CKPT": str(golden("smolvla_tiny").checkpoint), "OUT": str(tmp_path / "out")}
    args = [places.get(a, a) for a in args]
    code, out, err = vlac(*args)
    assert code == 2 and words in err and "error: " in err and out == ""
    code, out, err = vlac(*args, "--json")
    answer = json.loads(out)
    assert code == 2 and words in answer["error"] and set(answer) == {"error", "remedy"} and err == ""
    assert list(tmp_path.iterdir()) == [], "nothing half-written"


@pytest.mark.parametrize("args", [["compile"], ["bench", "x", "--runs", "0"], ["no-such-command"], ["list", "--nope"]])
def test_usage_errors_end_with_2(vlac: Any, args: list[str]) -> None:
    code, out, err = vlac(*args)
    assert code == 2 and err and out == ""


def boom(error: BaseException) -> Any:
    def fail(*args: Any, **kwargs: Any) -> Any:
        raise error

    return fail


def test_an_unexpected_error_is_called_a_bug(vlac: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vlac.facts.inspect", boom(ZeroDivisionError("division by zero")))
    monkeypatch.delenv("VLAC_TRACEBACK", raising=False)
    code, _, err = vlac("inspect", "x")
    assert code == 2 and "this is a bug in vlac: ZeroDivisionError" in err and "Traceback" not in err
    assert "VLAC_TRACEBACK=1" in err
    monkeypatch.setenv("VLAC_TRACEBACK", "1")
    code, _, err = vlac("inspect", "x")
    assert code == 2 and "Traceback (most recent call last)" in err and "in fail" in err


@pytest.mark.parametrize(
    ("error", "code", "words"),
    [
        (KeyboardInterrupt(), 130, "interrupted"),
        (MemoryError(), 2, "out of memory"),
        (OSError(28, "No space left on device", "/x/y"), 2, "/x/y: No space left on device"),
        (CheckpointError("model.safetensors: cut short", remedy="download it again"), 2, "-> download it again"),
        (BrokenPipeError(), 0, ""),
    ],
)
def test_what_else_can_happen(
    vlac: Any, monkeypatch: pytest.MonkeyPatch, error: BaseException, code: int, words: str
) -> None:
    monkeypatch.setattr("vlac.facts.inspect", boom(error))
    if isinstance(error, BrokenPipeError):
        monkeypatch.setattr(os, "dup2", lambda a, b: b)
    found, _, err = vlac("inspect", "x")
    assert found == code and words in err


def test_key_values() -> None:
    assert options.key_values(["a=1", "b=c=d"], "--x") == {"a": "1", "b": "c=d"}
    assert options.key_values(["a=1,b=2", "c=d,e"], "--x") == {"a": "1", "b": "2", "c": "d,e"}
    assert options.key_values(None, "--x") == {}
    for bad in ("a", "=1", "a="):
        with pytest.raises(InputError, match="is not KEY=VALUE"):
            options.key_values([bad], "--x")


# --- the whole way ---------------------------------------------------------------------------------------------


def test_inspect_a_checkpoint(vlac: Any, golden: Any) -> None:
    checkpoint = golden("smolvla_letterbox").checkpoint
    code, out, _ = vlac("inspect", checkpoint)
    assert code == 0
    for words in ("observation.images.wrist", "3x50x36", "may be absent", "MIN_MAX", "dims 6 never moved", "BPE"):
        assert words in out
    facts = json.loads(vlac("inspect", checkpoint, "--json")[1])
    assert facts["kind"] == "checkpoint" and facts["chunk_size"] == 8 and facts["n_action_steps"] == 5
    assert facts["statistics"]["action"]["covers"] == 7 and facts["statistics"]["action"]["constant"] == [6]
    assert 0 < sum(p["parameters"] for p in facts["parts"].values()) <= facts["parameters"], "dead ones are counted too"


def test_inspect_shows_the_program_at_any_rewrite(vlac: Any, golden: Any) -> None:
    from vlac.program_text import parse

    checkpoint = golden("smolvla_tiny").checkpoint
    drawn = vlac("inspect", checkpoint, "--program")[1]
    hoisted = vlac("inspect", checkpoint, "--program", "--after", "hoist_invariants")[1]
    assert len(parse(drawn).stages) == 3 and drawn != hoisted and str(parse(hoisted)) == hoisted
    code, _, err = vlac("inspect", checkpoint, "--program", "--after", "nothing")
    assert code == 2 and "no rewrite 'nothing'" in err


def test_list_names_what_is_plugged_in(vlac: Any) -> None:
    code, out, _ = vlac("list")
    assert code == 0
    for words in ("smolvla", "lerobot", "gguf-q8", "onnx-int8", "quantize-weights", "numpy"):
        assert words in out
    assert {"families", "readers", "passes", "targets", "engines"} == set(json.loads(vlac("list", "--json")[1]))


def test_doctor_tries_every_engine(vlac: Any) -> None:
    code, out, _ = vlac("doctor", "--json")
    found = json.loads(out)
    assert code == 0 and found["engines"]["numpy"]["works"]
    for name, engine in found["engines"].items():
        assert engine["works"] or engine["says"], name
        assert engine["works"] == (engine["installed"] and not engine["broken"])


def test_doctor_survives_an_engine_that_kills_its_process() -> None:
    from vlac.doctor import _try

    assert _try("import os; os.abort()") == (False, "the process was killed by signal 6")
    assert _try("raise ValueError('no kernel')") == (False, "ValueError: no kernel")
    assert _try("print('noise'); print('1.2.3')") == (True, "1.2.3")


def test_doctors_model_is_a_matrix_product() -> None:
    onnx = pytest.importorskip("onnx", reason="reads the model of doctor's self-test")
    from vlac.doctor import onnx_model

    model = onnx.load_model_from_string(onnx_model())
    onnx.checker.check_model(model)
    x = np.arange(8, dtype=np.float32).reshape(2, 4)
    from onnx.reference import ReferenceEvaluator

    w = np.arange(4)[:, None] - np.arange(3)[None, :]
    assert np.array_equal(ReferenceEvaluator(model).run(None, {"x": x})[0], x @ w)


@pytest.fixture(scope="module")
def artifact(golden: Any, tmp_path_factory: Any) -> Path:
    pytest.importorskip("torch", reason="compiling this artifact wants the torch engine")
    import vlac

    out = tmp_path_factory.mktemp("cli") / "out"
    vlac.compile(golden("smolvla_tiny").checkpoint, "gguf-f32", out)
    return out


def test_compile_says_where_the_artifact_is(vlac: Any, golden: Any, tmp_path: Path) -> None:
    pytest.importorskip("torch", reason="compiling this artifact wants the torch engine")
    checkpoint = golden("smolvla_tiny").checkpoint
    args = ("compile", checkpoint, "--target", "gguf-f32", "-o", tmp_path / "out", "--json")
    code, out, err = vlac(*args, "--dry-run")
    assert code == 0 and json.loads(out)["path"] is None and err == "" and not (tmp_path / "out").exists()
    code, out, err = vlac(*args)
    answer = json.loads(out)
    assert code == 0 and err == "" and Path(answer["path"]).is_file() and answer["manifest"]["target"] == "gguf-f32"
    code, out, err = vlac(*args[:-1])
    assert code == 0 and out.startswith(f"wrote {tmp_path}") and "vlac parity" in out and "fp32 reference" in err


def test_inspect_an_artifact(vlac: Any, artifact: Path) -> None:
    code, out, _ = vlac("inspect", artifact)
    assert code == 0 and "gguf-f32" in out and "2 observations (synthetic)" in out
    (file,) = artifact.glob("*.gguf")
    facts = json.loads(vlac("inspect", file, "--json")[1])
    assert facts["kind"] == "artifact" and facts["goldens"]["count"] == 2 and facts["census"]["promoted"] == {}
    program = vlac("inspect", artifact, "--program")[1]
    assert program.startswith("program smolvla") and "stage flow" in program
    assert vlac("inspect", artifact, "--program", "--after", "share")[0] == 2


def test_parity_exit_codes(vlac: Any, artifact: Path) -> None:
    code, out, _ = vlac("parity", artifact, "--engine", "torch")
    assert code == 0 and out.rstrip().endswith("PASS") and "not asked" in out
    code, out, _ = vlac("parity", artifact, "--engine", "torch", "--limit", "max<=1e-15")
    assert code == 1 and out.rstrip().endswith("FAIL") and "first stage over the limit" in out
    code, out, err = vlac("parity", artifact, "--engine", "torch", "--limit", "max<=1e-15", "--json")
    assert code == 1 and json.loads(out)["ok"] is False and err == ""


def test_bench_prints_every_form(vlac: Any, artifact: Path) -> None:
    args = ("bench", artifact, "--engine", "torch", "--threads", "1", "--runs", "2")
    code, out, _ = vlac(*args)
    assert code == 0 and "| model" in out and "peak RSS" in out
    code, out, err = vlac(*args, "-o", "jsonl")
    assert code == 0 and all(json.loads(line)["runs"] == 2 for line in out.splitlines()) and err == ""


def test_run_acts_and_writes_the_chunk(vlac: Any, artifact: Path, tmp_path: Path) -> None:
    from PIL import Image

    rng = np.random.default_rng(0)
    images = []
    for name in ("top", "wrist"):
        Image.fromarray(rng.integers(0, 255, (60, 80, 3), dtype=np.uint8)).save(tmp_path / f"{name}.png")
        images += ["--image", f"{name}={tmp_path / name}.png"]
    args = ("run", artifact, *images, "--state", "0,0,0,0,0,0", "--task", "pick up the cube", "--engine", "torch")
    code, out, err = vlac(*args, "--seed", "1", "-o", tmp_path / "chunk.npy")
    assert code == 0, err
    assert "chunk of 10 steps in robot units" in out and "2 more" in out
    chunk = np.load(tmp_path / "chunk.npy", allow_pickle=False)
    assert chunk.shape == (10, 6) and chunk.dtype == np.float32
    answer = json.loads(vlac(*args, "--seed", "1", "--json")[1])
    assert np.allclose(answer["chunk"], chunk) and answer["units"] == "robot" and answer["engine"] == "torch"
    other = json.loads(vlac(*args, "--seed", "2", "--json")[1])
    assert not np.allclose(other["chunk"], chunk), "the seed is the sampler's"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["chunk.npy", "top.png", "wrist.png"]


@pytest.mark.parametrize("mode", ["I;16", "F"])
def test_pictures_with_more_than_8_bits_are_refused(tmp_path: Path, mode: str) -> None:
    """Pillow's convert cuts them off at 255: a white picture, silently."""
    from PIL import Image

    from vlac.act_once import read_image

    Image.new(mode, (4, 4)).save(tmp_path / "deep.tiff")
    with pytest.raises(InputError, match=f"mode {mode}"):
        read_image(tmp_path / "deep.tiff")


def test_run_names_what_is_wrong_with_the_observation(vlac: Any, artifact: Path) -> None:
    code, _, err = vlac("run", artifact, "--engine", "torch", "--state", "0,0", "--task", "pick")
    assert code == 2 and "camera" in err


# --- progress and interrupts -----------------------------------------------------------------------------------


def test_progress_says_each_phase_once(capsys: pytest.CaptureFixture[str]) -> None:
    from vlac.progress import progress

    with progress(quiet=False) as show:
        show("reading", 0, 0)
        for i in range(5):
            show("reading", i, 5)
        for i, name in enumerate(("a.weight", "b.weight", "c.weight")):
            show(name, i, 3)  # items of one phase, each by its own name
        show("done", 1, 1)
    assert capsys.readouterr().err.splitlines() == ["reading", "a.weight", "done"]
    with progress(quiet=True) as show:
        show("reading", 0, 5)
    assert capsys.readouterr().err == ""


def test_progress_draws_bars_on_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    from vlac.progress import progress

    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    with progress(quiet=False) as show:
        show("reading", 0, 0)
        show("writing", 1, 2)
        show("writing", 2, 2)


@pytest.mark.parametrize("earlier", [False, True])
def test_ctrl_c_leaves_nothing_half_written(
    vlac: Any, golden: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, earlier: bool
) -> None:
    pytest.importorskip("torch", reason="compiling this artifact wants the torch engine")
    args = ("compile", golden("smolvla_tiny").checkpoint, "--target", "gguf-f32", "-o", tmp_path / "out", "-q")
    if earlier:
        assert vlac(*args)[0] == 0
    before = {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}
    from vlac import goldens

    real = goldens.answer

    def interrupted(*a: Any, **k: Any) -> Any:
        real(*a, **k)
        raise KeyboardInterrupt

    monkeypatch.setattr(goldens, "answer", interrupted)
    code, _, err = vlac(*args)
    assert code == 130 and "nothing half-written" in err
    assert {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()} == before
    assert [p.name for p in tmp_path.iterdir()] == (["out"] if earlier else [])
