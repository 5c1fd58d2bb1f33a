"""The ggml engine as a whole: goldens, sessions, refusals before anything native, providers and their self-test."""

from __future__ import annotations

import mmap
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import vlac
from vlac.artifact import StoredTensor, open_artifact
from vlac.dims import symbol
from vlac.engines import ggml_engine, ggml_lib, ggml_selftest
from vlac.engines.ggml_engine import ENGINE, GgmlSession, give_back_pages
from vlac.engines.numpy_engine import run_stage
from vlac.errors import EngineError, InputError
from vlac.formats import decode, encode
from vlac.graph import Call, Param, Program, Repeat, Schedule, StageBuilder, Symbol

NpArray = np.ndarray[Any, Any]

pytestmark = pytest.mark.skipif(bool(ggml_lib.missing()), reason=ggml_lib.missing() or "ggml is there")


def stored(values: NpArray, fmt: str = "f32") -> StoredTensor:
    data = encode(fmt, values)
    return StoredTensor(values.shape, fmt, lambda: decode(fmt, data, values.shape), data)


# --- goldens -----------------------------------------------------------------------------------------------------

# max |difference| over the largest value of LeRobot's fp32 chunk, in robot units. Random weights: a trained network
# rounds more kindly. About twice what was measured on an AVX512 machine (f32 6e-7 and 1.1e-6, f16 1e-3, bf16 1.1e-2,
# q8 2.3e-2, q6 3.0e-2, q5 5.8e-2, q4 5.5e-2).
LIMITS = {
    "gguf-f32": 2e-5, "gguf-f16": 3e-3, "gguf-bf16": 2.5e-2, "gguf-q8": 5e-2, "gguf-q6": 6e-2, "gguf-q5": 1.2e-1,
    "gguf-q4": 1.2e-1,
}  # fmt: skip


@pytest.mark.filterwarnings("ignore::vlac.errors.VlacWarning")
@pytest.mark.parametrize("target", LIMITS)
@pytest.mark.parametrize("name", ["smolvla_tiny", "smolvla_letterbox"])
def test_goldens(name: str, target: str, golden: Any, tmp_path: Path) -> None:
    folder = golden(name)
    vlac.compile(folder.checkpoint, target, tmp_path / "out")
    with vlac.load(tmp_path / "out", engine="ggml", threads=2) as policy:
        for i in (*range(len(folder.tasks)), 0):
            got, want = policy.act(**folder.observation(i)), folder.chunk(i)
            assert np.abs(got - want).max() <= LIMITS[target] * np.abs(want).max()


# --- sessions ----------------------------------------------------------------------------------------------------


def loop() -> tuple[Program, dict[str, StoredTensor]]:
    """A prefix of symbolic length and a repeated stage that attends to it with masks, ids and a cache."""
    t = symbol("T")
    r = np.random.default_rng(8)
    p = StageBuilder("prefix")
    x = p.embed(p.input("tokens", "i32", t), "@words")
    p.output(p.linear(x, "@kv", name="k"), p.linear(x, "@kv", name="v"))
    f = StageBuilder("flow")
    step, x = f.input("step", "i32", 1), f.input("x", "f32", 5, 8)
    k, v, ok = f.input("k", "f32", t, 8), f.input("v", "f32", t, 8), f.input("token_valid", "bool", t)
    one = f.full(shape=(5,), value=0.0, dtype="i32")
    keys = f.full(shape=(t + 5,), value=0.0, dtype="i32")
    valid = f.concat(ok, f.full(shape=(5,), value=1.0, dtype="bool"), axis=0)
    y = f.attention(x, f.concat(k, x, axis=0), f.concat(v, x, axis=0), f.attention_mask(one, keys, valid),
                    heads=2, kv_heads=2, scale=0.5)  # fmt: skip
    f.output(f.add(x, f.mul(f.sub(y, x), f.embed(step, "@dts")), name="x_next"))
    values = {"words": (20, 8), "kv": (8, 8), "dts": (4, 1)}
    tensors = {n: stored(r.standard_normal(s).astype(np.float32)) for n, s in values.items()}
    repeat = Repeat("flow", 4, "step", (("x_next", "x", "noise"),))
    program = Program("loop", (Symbol("T", (3, 16)),), (p.build(), f.build()),
                      {n: Param(t.shape) for n, t in tensors.items()},
                      Schedule((Call("prefix"), repeat), "x_next"))  # fmt: skip
    return program, tensors


def inputs(n: int, seed: int) -> dict[str, NpArray]:
    r = np.random.default_rng(seed)
    valid = r.random(n) < 0.7
    valid[0] = True
    return {
        "tokens": r.integers(0, 20, n).astype(np.int32), "token_valid": valid,
        "noise": r.standard_normal((5, 8)).astype(np.float32),
    }  # fmt: skip


def expected(program: Program, tensors: dict[str, StoredTensor], env: dict[str, NpArray]) -> NpArray:
    bound = program.bind({"T": len(env["tokens"])})
    env = {**env, **run_stage(bound, "prefix", env, lambda n: tensors[n].decode()), "x": env["noise"]}
    for i in range(4):
        env["step"] = np.array([i], dtype=np.int32)
        env["x"] = run_stage(bound, "flow", env, lambda n: tensors[n].decode())["x_next"]
    return env["x"]


def test_buckets_loops_and_changed_inputs_in_any_order() -> None:
    program, tensors = loop()
    session = GgmlSession(program, tensors, threads=1)
    repeat = program.schedule.steps[1]
    assert isinstance(repeat, Repeat)
    for n, seed in ((3, 0), (16, 1), (3, 2), (3, 0), (16, 1), (7, 3)):
        env = inputs(n, seed)
        prefix = session.run("prefix", env, {"T": n})
        got = session.repeat(repeat, {**env, **prefix}, {"T": n})["x_next"]
        want = expected(program, tensors, env)
        assert np.abs(got - want).max() <= 3e-5 * np.abs(want).max()
    session.close()


def test_outputs_belong_to_the_caller() -> None:
    program, tensors = loop()
    session = GgmlSession(program, tensors, threads=1)
    first = session.run("prefix", inputs(3, 0), {"T": 3})
    kept = {k: v.copy() for k, v in first.items()}
    session.run("prefix", inputs(3, 1), {"T": 3})
    session.close()
    assert all(np.array_equal(first[k], kept[k]) for k in first)


@pytest.mark.parametrize(("rows", "threads"), [(2, 1), (64, 2)])
def test_only_large_graphs_share_their_work(rows: int, threads: int) -> None:
    b = StageBuilder("mlp")
    b.output(b.op("linear", b.silu(b.linear(b.input("state", "f32", rows, 384), "@up")), "@down", name="y"))
    r = np.random.default_rng(0)
    tensors = {n: stored(r.standard_normal((384, 384)).astype(np.float32) / 20) for n in ("up", "down")}
    params = {n: Param(t.shape) for n, t in tensors.items()}
    program = Program("mlp", (), (b.build(),), params, Schedule((Call("mlp"),), "y"))
    env = {"state": r.standard_normal((rows, 384)).astype(np.float32)}
    found = []
    for most in (1, 2):
        session = GgmlSession(program, tensors, threads=most)
        found.append(session.run("mlp", env, {})["y"])
        assert [g.threads for g in session._graphs.values()] == [min(most, threads)]
        session.close()
    want = run_stage(program, "mlp", env, lambda n: tensors[n].decode())["y"]
    assert all(np.abs(got - want).max() <= 1e-5 * np.abs(want).max() for got in found)


def test_old_graphs_make_room(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ggml_engine, "MAX_GRAPHS", 2)
    program, tensors = loop()
    session = GgmlSession(program, tensors, threads=1)
    want = session.run("prefix", inputs(3, 0), {"T": 3})["k"]
    for n in (4, 5, 6, 3):
        got = session.run("prefix", inputs(n, 0), {"T": n})["k"]
        assert len(session._graphs) <= 2
    assert np.array_equal(got, want)
    session.close()


def test_info_says_what_a_report_needs() -> None:
    program, tensors = loop()
    session = GgmlSession(program, tensors)
    assert session.info["threads"] == len(os.sched_getaffinity(0))
    assert session.info["ggml_version"][0].isdigit()
    assert session.info["provider"]
    assert isinstance(session.info["features"], dict)
    session.close()


def test_a_closed_session_says_so_and_closes_twice() -> None:
    program, tensors = loop()
    session = GgmlSession(program, tensors, threads=1)
    session.run("prefix", inputs(3, 0), {"T": 3})
    session.close()
    session.close()
    with pytest.raises(EngineError, match="session is closed"):
        session.run("prefix", inputs(3, 0), {"T": 3})


def test_all_native_memory_is_given_back(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every context, buffer, allocator and backend that was made is freed, evicted graphs and failed ones included."""
    lib = ggml_lib.load()
    makes = {
        "init": "free", "backend": "backend_free", "gallocr_new": "gallocr_free",
        "backend_cpu_buffer_from_ptr": "backend_buffer_free",
        "backend_alloc_ctx_tensors_from_buft": "backend_buffer_free",
    }  # fmt: skip
    alive: list[tuple[str, int]] = []

    class Counting:
        def __getattr__(self, name: str) -> Any:
            real = getattr(lib, name)
            if name in makes:
                return lambda *a: alive.append((makes[name], real(*a))) or alive[-1][1]
            if name in makes.values():
                return lambda address: (alive.remove((name, address)), real(address))
            return real

    monkeypatch.setattr(ggml_lib, "_loaded", Counting())
    monkeypatch.setattr(ggml_engine, "MAX_GRAPHS", 3)
    program, tensors = loop()
    session = GgmlSession(program, tensors, threads=1)
    for n in (3, 16, 4, 5, 3):
        session.run("prefix", inputs(n, n), {"T": n})
    assert alive
    session.close()
    assert alive == []


def test_weights_are_used_where_they_lie_in_the_file(golden: Any, tmp_path: Path) -> None:
    vlac.compile(golden("smolvla_tiny").checkpoint, "gguf-f16", tmp_path / "out")
    artifact = open_artifact(tmp_path / "out")
    session = ENGINE.open(artifact, threads=1)
    assert isinstance(session, GgmlSession)
    assert session._weights is not None
    for name, tensor in session._weights.tensors.items():
        data = artifact.tensors[name].data
        assert data is not None
        assert ggml_lib.Tensor.from_address(tensor).data == data.ctypes.data
    session.close()


def test_bf16_beside_q8_is_recoded_where_the_cpu_has_no_bf16(monkeypatch: pytest.MonkeyPatch) -> None:
    b = StageBuilder("s")
    b.output(b.linear(b.linear(b.input("state", "f32", 4, 64), "@fine"), "@coarse", name="y"))
    r = np.random.default_rng(0)
    formats, x = {"fine": "bf16", "coarse": "q8_0"}, r.standard_normal((4, 64)).astype(np.float32)
    tensors = {n: stored(r.standard_normal((64, 64)).astype(np.float32), f) for n, f in formats.items()}
    params = {n: Param(t.shape, t.format) for n, t in tensors.items()}
    program = Program("two", (), (b.build(),), params, Schedule((Call("s"),), "y"))
    found = {}
    for features in ({"AVX512_BF16": "1"}, {}):
        monkeypatch.setattr(ggml_lib.load(), "features", features)
        session = GgmlSession(program, tensors, threads=1)
        assert ("recoded" in session.info) == (not features)
        assert session.program.params["fine"].format == ("bf16" if features else "q8_0")
        found[bool(features)] = session.run("s", {"state": x}, {})["y"]
        session.close()
    assert 1e-4 < np.linalg.norm(found[True] - found[False]) / np.linalg.norm(found[True]) < 2e-2


def test_q8_in_a_loop_is_recoded_where_the_cpu_has_bf16(monkeypatch: pytest.MonkeyPatch) -> None:
    once, loop = StageBuilder("once"), StageBuilder("loop")
    once.output(once.linear(once.input("state", "f32", 4, 64), "@once", name="seen"))
    loop.input("step", "i32", 1)
    x = loop.linear(loop.input("x", "f32", 4, 64), "@loop")
    loop.output(loop.add(x, loop.input("seen", "f32", 4, 64), name="next"))
    r = np.random.default_rng(0)
    tensors = {n: stored(r.standard_normal((64, 64)).astype(np.float32), "q8_0") for n in ("once", "loop")}
    params = {n: Param(t.shape, t.format) for n, t in tensors.items()}
    repeat = Repeat("loop", 3, "step", (("next", "x", "noise"),))
    program = Program("looped", (), (once.build(), loop.build()), params, Schedule((Call("once"), repeat), "next"))
    most = 2 * 64 * 64
    for features, room, want in (
        ({"AVX512_BF16": "1"}, most, "bf16"),
        ({"AVX512_BF16": "1"}, most - 1, "q8_0"),
        ({}, most, "q8_0"),
    ):
        monkeypatch.setattr(ggml_lib.load(), "features", features)
        monkeypatch.setattr(ggml_engine, "PRIVATE_BYTES", room)
        session = GgmlSession(program, tensors, threads=1)
        assert ("recoded" in session.info) == (want == "bf16")
        assert {n: p.format for n, p in session.program.params.items()} == {"once": "q8_0", "loop": want}
        session.close()


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="needs /proc")
def test_pages_given_back_leave_memory_and_keep_their_bytes(tmp_path: Path) -> None:
    def shared_pages() -> int:
        return int(Path("/proc/self/statm").read_text().split()[2])

    values = np.random.default_rng(0).integers(0, 256, 32 << 20, dtype=np.uint8)
    values.tofile(tmp_path / "weights")
    mapped = np.memmap(tmp_path / "weights", mode="r", dtype=np.uint8)
    part = mapped[100:-100].view(np.uint16)
    total, before = int(part.sum(dtype=np.int64)), shared_pages()
    give_back_pages(part)
    assert before - shared_pages() > 0.9 * values.nbytes / mmap.PAGESIZE
    assert int(part.sum(dtype=np.int64)) == total
    own = values.copy()
    give_back_pages(own[64:])
    assert np.array_equal(own, values)


def test_unaligned_weights_are_copied() -> None:
    program, tensors = loop()
    room = np.zeros(tensors["kv"].data.nbytes + 64, dtype=np.uint8)  # type: ignore[union-attr]
    start = -room.ctypes.data % 32 + 4
    data = room[start : start + 256]
    data[:] = tensors["kv"].data
    moved = {**tensors, "kv": StoredTensor((8, 8), "f32", tensors["kv"].decode, data)}
    for t in (tensors, moved):
        session = GgmlSession(program, t, threads=1)
        got = session.run("prefix", inputs(3, 0), {"T": 3})["k"]
        session.close()
        want = run_stage(program.bind({"T": 3}), "prefix", inputs(3, 0), lambda n: tensors[n].decode())["k"]
        assert np.abs(got - want).max() <= 4e-6 * np.abs(want).max()


# --- refusals ----------------------------------------------------------------------------------------------------


def test_ids_outside_the_table_never_reach_ggml() -> None:
    program, tensors = loop()
    session = GgmlSession(program, tensors, threads=1)
    for bad in (20, -1, 2**31 - 1):
        env = inputs(3, 0)
        env["tokens"][1] = bad
        with pytest.raises(InputError, match="for a table of 20 rows"):
            session.run("prefix", env, {"T": 3})
    env = inputs(3, 0)
    want = run_stage(program.bind({"T": 3}), "prefix", env, lambda n: tensors[n].decode())["k"]
    assert np.abs(session.run("prefix", env, {"T": 3})["k"] - want).max() <= 4e-6 * np.abs(want).max()
    session.close()


@pytest.mark.parametrize(
    "tokens", [np.zeros(4, np.int32), np.zeros(3, np.int64), np.zeros((3, 1), np.int32), np.zeros(2, np.int32)]
)
def test_wrong_shapes_and_dtypes_never_reach_ggml(tokens: NpArray) -> None:
    program, tensors = loop()
    session = GgmlSession(program, tensors, threads=1)
    with pytest.raises(EngineError, match=r"stage prefix: input tokens is .*, expected i32\[3\]"):
        session.run("prefix", {"tokens": tokens}, {"T": 3})
    session.close()


@pytest.mark.parametrize(
    ("tensor", "said"),
    [
        (
            StoredTensor((8, 8), "f32", lambda: np.zeros((8, 8), np.float32), np.zeros(255, np.uint8)),
            "255 bytes for f32",
        ),
        (
            StoredTensor((8, 8), "f32", lambda: np.zeros((8, 8), np.float32), None),
            "not stored in one of ggml's formats",
        ),
        (
            StoredTensor((8, 8), "int8", lambda: np.zeros((8, 8), np.float32), np.zeros(64, np.uint8)),
            "not stored in one",
        ),
        (
            StoredTensor((8, 8), "q8_0", lambda: np.zeros((8, 8), np.float32), np.zeros(68, np.uint8)),
            "68 bytes for q8_0",
        ),
    ],
)
def test_weights_that_ggml_would_misread_are_refused(tensor: StoredTensor, said: str) -> None:
    program, tensors = loop()
    with pytest.raises(EngineError, match=said):
        changed = program.replace(params={**program.params, "kv": Param((8, 8), tensor.format)})
        GgmlSession(changed, {**tensors, "kv": tensor}, threads=1)


def test_weights_that_are_not_the_programs_are_refused() -> None:
    program, tensors = loop()
    with pytest.raises(EngineError, match=r"tensor kv is missing, the program wants f32\[8, 8\]"):
        GgmlSession(program, {n: t for n, t in tensors.items() if n != "kv"}, threads=1)
    with pytest.raises(EngineError, match=r"tensor kv is f32\[4, 1\], the program wants f32\[8, 8\]"):
        GgmlSession(program, {**tensors, "kv": tensors["dts"]}, threads=1)


@pytest.mark.parametrize(
    ("op", "attrs"),
    [("cast", {"dtype": "f32"}), ("time_embedding", {"dim": 8, "min_period": 0.1, "max_period": 1.0})],
)
def test_an_op_inside_the_graph_that_only_the_host_can_do_is_declined_at_opening(op: str, attrs: Any) -> None:
    b = StageBuilder("s")
    b.output(b.op(op, b.scale(b.input("state", "f32", 3, 1), factor=2.0), name="bad", **attrs))
    program = Program("p", (), (b.build(),), {}, Schedule((Call("s"),), "bad"))
    with pytest.raises(EngineError, match=rf"declines stage s, bad = {op}\(scale\.1\)") as caught:
        GgmlSession(program, {}, threads=1)
    assert "torch" in caught.value.remedy


def test_a_mask_that_the_graph_would_have_to_compute_is_declined() -> None:
    b = StageBuilder("s")
    x = b.scale(b.input("state", "f32", 4, 4), factor=2.0)
    m = b.cast(x, dtype="bool")
    b.output(b.attention(x, x, x, m, heads=1, kv_heads=1, scale=1.0, name="y"))
    program = Program("p", (), (b.build(),), {}, Schedule((Call("s"),), "y"))
    with pytest.raises(EngineError, match="engine ggml declines stage s"):
        GgmlSession(program, {}, threads=1)


def test_threads_must_be_positive() -> None:
    program, tensors = loop()
    with pytest.raises(EngineError, match="threads=0"):
        GgmlSession(program, tensors, threads=0)


# --- providers ---------------------------------------------------------------------------------------------------


def directory() -> Path:
    return ggml_lib.find()[0][1]


def run(code: str, **env: str) -> subprocess.CompletedProcess[str]:
    root = str(Path(__file__).resolve().parents[1])
    full = {**os.environ, "PYTHONPATH": root, **env}
    return subprocess.run(
        [sys.executable, "-c", code], env=full, capture_output=True, text=True, timeout=120, check=False
    )


LOAD = "from vlac.engines import ggml_lib as g; l = g.load(); print(l.provider, l.directory)"


def test_the_self_test_passes_here(capsys: pytest.CaptureFixture[str]) -> None:
    resource = pytest.importorskip("resource")
    limit = resource.getrlimit(resource.RLIMIT_CPU)
    assert ggml_selftest.main([str(directory())]) == 0
    assert "cpu_library" in capsys.readouterr().out
    assert resource.getrlimit(resource.RLIMIT_CPU) == limit  # its own limit is for a process of its own


def test_finding_a_provider_imports_nothing() -> None:
    done = run("import sys; from vlac.engines import ggml_lib as g; print(g.missing() == '', "
               "any(p.module in sys.modules for p in g.PROVIDERS), 'numpy.ctypeslib' in sys.modules)")  # fmt: skip
    assert done.stdout.split()[:2] == ["True", "False"], done.stderr


def test_a_folder_can_be_named(tmp_path: Path) -> None:
    done = run(LOAD, VLAC_GGML_LIB=str(directory()), XDG_CACHE_HOME=str(tmp_path))
    assert done.stdout.split() == ["VLAC_GGML_LIB", str(directory())], done.stderr
    assert len(list((tmp_path / "vlac").glob("ggml-*.json"))) == 1


def test_loading_says_nothing() -> None:
    done = run("from vlac.engines import ggml_lib as g; g.load()")
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_a_cache_that_cannot_be_written_does_no_harm(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("no folder")
    done = run(LOAD, XDG_CACHE_HOME=str(tmp_path / "file"))
    assert str(directory()) in done.stdout, done.stderr


def test_a_cache_with_nonsense_is_not_believed(tmp_path: Path) -> None:
    run(LOAD, XDG_CACHE_HOME=str(tmp_path))
    (cache,) = (tmp_path / "vlac").glob("ggml-*.json")
    for nonsense in ("", "[]", "{}", '{"cpu_library": "../../evil.so"}', '{"cpu_library": 3}'):
        cache.write_text(nonsense)
        done = run(LOAD, XDG_CACHE_HOME=str(tmp_path))
        assert str(directory()) in done.stdout, done.stderr


def test_a_library_that_fails_its_self_test_is_refused_by_name(tmp_path: Path) -> None:
    lib = tmp_path / "lib"
    lib.mkdir()
    for stem in ("ggml-base", "ggml"):
        ggml_lib.library(lib, stem).write_bytes(b"\x7fELF not really")
    code = "from vlac.engines import ggml_lib as g\ntry: g.load()\nexcept Exception as e: print(type(e).__name__, e)"
    done = run(code,
               VLAC_GGML_LIB=str(lib), XDG_CACHE_HOME=str(tmp_path))  # fmt: skip
    assert "EngineError engine ggml: no usable library; VLAC_GGML_LIB:" in done.stdout
    assert "self-test failed (exit 1)" in done.stdout
    assert "pip install transcribe-cpp-native" in done.stdout
    assert not list(tmp_path.glob("vlac/*.json"))


def test_the_next_best_variant_is_taken_when_the_best_is_wrong(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As with ggml 0.26 on SVE vectors of 512 bits, where q4_K is wrong (test_arm.py shows that)."""
    asked: list[list[str]] = []

    def selftest(folder: Path, refused: list[str]) -> tuple[bool, str, str]:
        asked.append(list(refused))
        left = [v for v in ("best", "second", "plain") if v not in refused]
        if not left:
            return False, "", "(exit 1): none of 0 other CPU variants runs on this CPU"
        return left[0] == good, left[0], f"(exit 1): {left[0]} is wrong"

    monkeypatch.setattr(ggml_lib, "_run_selftest", selftest)
    good = "plain"
    assert ggml_lib._check_in_subprocess(tmp_path) == "plain"
    assert asked == [[], ["best"], ["best", "second"]]
    good = "none of them"
    with pytest.raises(
        EngineError, match=r"best \(exit 1\): best is wrong; second .*; plain \(exit 1\): plain is wrong"
    ):
        ggml_lib._check_in_subprocess(tmp_path)


def test_a_variant_that_was_refused_is_not_chosen(capsys: pytest.CaptureFixture[str]) -> None:
    variants = [v.name for v in ggml_lib.cpu_variants(directory())]
    if len(variants) < 2:
        pytest.skip("this ggml has one CPU library")
    best = ggml_selftest.best_variant(directory())
    assert ggml_selftest.best_variant(directory(), [best]) not in ("", best)
    assert ggml_selftest.main([str(directory()), *variants]) == 1
    assert "none of 0 other CPU variants runs on this CPU" in capsys.readouterr().err


def test_openmp_builds_are_told_not_to_spin(tmp_path: Path) -> None:
    for code, uses in ((b"..GOMP_parallel..", True), (b"..__kmpc_fork_call..", True), (b"..pthread_create..", False)):
        ggml_lib.library(tmp_path, "ggml-cpu").write_bytes(code)
        assert ggml_lib._uses_openmp(tmp_path, "") is uses


def test_an_unknown_provider_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("VLAC_GGML_LIB", raising=False)
    monkeypatch.setenv("VLAC_GGML_PROVIDER", "nobody")
    assert "VLAC_GGML_PROVIDER=nobody is not installed (known: transcribe-cpp-native" in ENGINE.missing()


@pytest.mark.parametrize("change", [("ne", "f32 -> f16"), ("overhead", "369")])
def test_the_abi_check_notices_a_strange_library(change: tuple[str, str]) -> None:
    class Strange:
        def __init__(self, lib: ggml_lib.Ggml) -> None:
            self._lib = lib

        def __getattr__(self, name: str) -> Any:
            if name == "tensor_overhead" and change[0] == "overhead":
                return lambda: 369
            if name == "new_tensor_4d" and change[0] == "ne":
                return lambda c, t, a, b, d, e: self._lib.new_tensor_4d(c, t, b, a, d, e)
            return getattr(self._lib, name)

    with pytest.raises(EngineError, match="self-test: "):
        ggml_selftest.check_abi(Strange(ggml_lib.load()))  # type: ignore[arg-type]
