"""Work that nobody needs is not done, and what is left gives the same numbers: stages by rate, chunks of n actions, and
free prompt lengths and cameras."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import open_golden

import vlac
from vlac.api import draw
from vlac.checkpoint import read_policy
from vlac.dims import symbol
from vlac.engines.base import get_engine
from vlac.engines.numpy_engine import NumpySession
from vlac.errors import InputError
from vlac.graph import Call, Param, Program, Schedule, StageBuilder, Symbol, check
from vlac.lower import REWRITES, lower
from vlac.program_text import parse
from vlac.registry import ReadOptions
from vlac.removals import removals
from vlac.removals import text as removals_text
from vlac.rewrites.rates import split_by_rate
from vlac.rewrites.suffix import free_suffix
from vlac.runtime.session import Session
from vlac.weights import LazyTensor, Weights
from vlac.work import work

pytestmark = pytest.mark.filterwarnings("ignore::vlac.errors.VlacWarning")
ENGINES = [("onnx-fp32", "onnxruntime"), ("onnx-fp32", "openvino"), ("gguf-f32", "ggml"), ("gguf-f32", "torch")]
LOSSY = [("onnx-int8", "onnxruntime"), ("onnx-int8", "openvino"), ("gguf-q8", "ggml")]
GOLDENS = Path(__file__).parent / "golden"


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[..., Path]]:
    @cache
    def make(name: str, target: str) -> Path:
        out = tmp_path_factory.mktemp("artifact") / "out"
        return vlac.compile(open_golden(GOLDENS / name).checkpoint, target, out, goldens=1).path or out

    yield make


def session(path: Path, engine: str, **options: Any) -> Session:
    if why := get_engine(engine).missing():
        pytest.skip(why)
    return vlac.load(path, engine=engine, threads=1, options=options)


def programs(name: str) -> tuple[Program, Program]:
    """(as drawn, lowered)"""
    drawn = draw(read_policy(str(GOLDENS / name / "checkpoint"), ReadOptions()))
    return drawn, lower(drawn)


# --- stages by rate ----------------------------------------------------------------------------------------------


def test_one_token_of_smolvlas_prefix_depends_on_the_state() -> None:
    _, program = programs("smolvla_tiny")
    assert [s.stage for s in program.schedule.steps] == ["vision", "prefix", "prefix_state", "flow_once", "flow"]
    assert "state" not in dict(program.stage("prefix").inputs)
    rows = {t.shape[0] for n, t in program.stage("prefix_state").inputs if n.endswith(".kept")}
    assert rows == {symbol("C") * 4 + symbol("T")}
    of = work(program, {"C": 2, "T": 24})
    assert of["prefix_state"].macs < of["prefix"].macs / 20


def test_the_state_of_pi0_is_all_that_leaves_its_prefix() -> None:
    """pi0 has the state in the suffix: only its projection, which leaves the loop, is a stage of its own."""
    from test_pi0 import policy_of

    program = lower(draw(policy_of("pi0_tiny")))
    assert [n.op for n in program.stage("prefix_state").nodes] == ["linear"]
    assert "state" not in dict(program.stage("prefix").inputs)


@pytest.mark.parametrize(("target", "engine"), ENGINES + LOSSY)
def test_a_new_state_runs_only_what_depends_on_it(
    target: str, engine: str, compiled: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    golden = open_golden(GOLDENS / "smolvla_tiny")
    with session(compiled("smolvla_tiny", target), engine) as policy:
        given = golden.observation(0)
        policy.act(**given)
        moved = {**given, "state": np.asarray(given["state"]) + np.float32(0.25)}
        chunk = policy.act(**moved)
        assert {"vision[0]", "vision[1]", "prefix", "prompt"} <= set(policy.stats["reused"])
        assert not {"prefix_state", "flow"} & set(policy.stats["reused"])
        assert np.array_equal(chunk, policy.act(**moved, reuse=False))


def test_split_and_whole_agree() -> None:
    _, program = programs("smolvla_tiny")
    drawn, _ = programs("smolvla_tiny")
    whole = drawn
    for rewrite in REWRITES:
        whole = whole if rewrite.name == "split_by_rate" else rewrite.fn(whole)
    env, symbols = inputs(program, 1)
    a, b = (chunk_of(p, env, symbols) for p in (program, whole))
    assert np.abs(b).max() > 0 and np.abs(a - b).max() <= 1e-6 * np.abs(b).max()


def inputs(program: Program, seed: int) -> tuple[dict[str, Any], dict[str, int]]:
    from vlac.runtime.inputs import runtime_types

    sizes = program.max_symbols()
    rng = np.random.default_rng(seed)
    env: dict[str, Any] = {}
    for name, t in runtime_types(program.bind(sizes)).items():
        shape = tuple(int(str(d)) for d in t.shape)
        shape = (sizes["C"], *shape) if name == "pixels" else shape
        env[name] = (
            rng.standard_normal(shape).astype(np.float32)
            if t.dtype == "f32"
            else np.ones(shape, np.bool_)
            if t.dtype == "bool"
            else rng.integers(0, 20, shape).astype(np.int32)
        )
    return env, sizes


def chunk_of(program: Program, env: Mapping[str, Any], symbols: Mapping[str, int]) -> np.ndarray:
    from vlac.runtime.schedule import execute

    return execute(program, NumpySession(program, lambda n: program.weights[n].load()), env, symbols)


def sequence(block_of_state: int, tail: bool = True) -> Program:
    """Attention over T words and a state, which the words see if its block number is 0."""
    t = symbol("T")
    b = StageBuilder("prefix")
    words = b.embed(b.input("tokens", "i32", t), "@words")
    state = b.linear(b.input("state", "f32", 1, 3), "@state")
    order = (words, state) if tail else (state, words)
    x = b.concat(*order, axis=0)
    b.input("token_valid", "bool", t)
    one = b.full(shape=(1,), value=1.0, dtype="bool")
    valid = b.concat(*(("token_valid", one) if tail else (one, "token_valid")), axis=0)
    zeros = b.full(shape=(t,), value=0.0, dtype="i32")
    own = b.full(shape=(1,), value=float(block_of_state), dtype="i32")
    block = b.concat(*((zeros, own) if tail else (own, zeros)), axis=0)
    mask = b.attention_mask(block, block, valid)
    q, k, v = (b.linear(x, f"@{n}") for n in "qkv")
    y = b.add(x, b.attention(q, k, v, mask, heads=2, kv_heads=2, scale=0.5))
    b.output(b.linear(y, "@out", name="chunk"))
    shapes = {"words": (20, 8), "state": (8, 3), "q": (8, 8), "k": (8, 8), "v": (8, 8), "out": (4, 8)}
    rng = np.random.default_rng(0)
    values = {n: rng.standard_normal(s).astype(np.float32) for n, s in shapes.items()}
    return check(
        Program(
            "toy",
            (Symbol("T", (4, 8)),),
            (b.build(),),
            {n: Param(s) for n, s in shapes.items()},
            Schedule((Call("prefix"),), "chunk"),
            Weights({n: LazyTensor.of(v, n) for n, v in values.items()}),
        )
    )


def test_words_that_do_not_see_the_state_are_kept() -> None:
    program = sequence(1)
    cut = check(split_by_rate(program))
    assert [s.name for s in cut.stages] == ["prefix", "prefix_state"]
    env, symbols = inputs(program, 0)
    env["token_valid"][-2:] = False
    assert np.allclose(chunk_of(program, env, symbols), chunk_of(cut, env, symbols), rtol=0, atol=1e-6)
    assert chunk_of(cut, env, symbols).std() > 0.1


@pytest.mark.parametrize("program", [sequence(0), sequence(1, tail=False), sequence(-1)], ids=["seen", "1st", "below"])
def test_a_sequence_that_sees_the_state_stays_whole(program: Program) -> None:
    assert split_by_rate(program) == program


def test_the_log_tells_what_every_rewrite_saved() -> None:
    drawn, program = programs("smolvla_tiny")
    log = removals(drawn)
    saved = {
        row["rewrite"]: sum(a - b for s in row["stages"].values() for a, b in [s["gmac"]]) for row in log["rewrites"]
    }
    assert all(saved[name] > 0 for name in ("prune", "tabulate_steps", "hoist_invariants", "split_by_rate"))
    total = sum(w.macs for w in work(drawn, {}).values()) - sum(w.macs for w in work(program).values())
    assert sum(saved.values()) == pytest.approx(total / 1e9)
    assert log["again"]["inputs"]["state"]["stages"] == ["prefix_state", "flow"]
    assert list(log["sizes"]["N"].values()) == sorted(log["sizes"]["N"].values())
    text = removals_text(log)
    assert all(line.startswith("#") for line in text.splitlines()) and "new state: prefix_state, flow" in text
    assert parse(str(program) + text) == program


# --- chunks of n actions -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["smolvla_tiny", "smolvla_letterbox"])
@pytest.mark.parametrize(("target", "engine"), ENGINES)
def test_the_first_actions_alone(name: str, target: str, engine: str, compiled: Callable[..., Path]) -> None:
    golden = open_golden(GOLDENS / name)
    with session(compiled(name, target), engine) as policy:
        given = golden.observation(0)
        whole = policy.act(**given)
        assert policy.stats["rows_computed"] == len(whole)
        assert np.array_equal(policy.act(**given, n_actions=len(whole)), whole)
        for n in (1, 3, len(whole) - 1):
            few = policy.act(**given, n_actions=n)
            assert n <= policy.stats["rows_computed"] < n + len(whole) / 5 and len(few) == n
            assert np.abs(few - whole[:n]).max() <= 1e-5 * np.abs(whole).max()
            assert np.array_equal(few, policy.act(**given, n_actions=n, reuse=False))


def test_the_same_seed_is_the_same_noise(compiled: Callable[..., Path]) -> None:
    given = {k: v for k, v in open_golden(GOLDENS / "smolvla_tiny").observation(1).items() if k != "noise"}
    with session(compiled("smolvla_tiny", "gguf-f32"), "torch") as policy:
        whole = policy.act(**given, seed=3)
        assert np.abs(policy.act(**given, seed=3, n_actions=2) - whole[:2]).max() <= 1e-5 * np.abs(whole).max()
        with pytest.raises(InputError, match=r"n_actions=11, expected 1\.\.10"):
            policy.act(**given, n_actions=11)
        for wrong in (0, True, 2.0):
            with pytest.raises(InputError, match="n_actions="):
                policy.act(**given, n_actions=wrong)  # type: ignore[arg-type]


def test_actions_that_see_later_ones_are_computed_and_cut() -> None:
    from test_pi0 import policy_of

    program = lower(draw(policy_of("pi0_tiny")))
    assert [s.name for s in program.symbols] == ["C", "T"]


LOOP = """
program toy
stage flow (step: i32[1], x: f32[6,4])
  own = arange() {{start=1, stop=7}} : i32[6]
  first = full() {{dtype="i32", shape=[1], value=0.0}} : i32[1]
  keys = concat(first, own) {{axis=0}} : i32[7]
  valid = full() {{dtype="bool", shape=[6], value=1.0}} : bool[6]
  old = full() {{dtype="bool", shape=[1], value=1.0}} : bool[1]
  all = concat(old, valid) {{axis=0}} : bool[7]
  blocks = {query} : i32[6]
  mask = attention_mask(blocks, keys, all) : bool[6,7]
  past = embed(first, @past) : f32[1,4]
  k = concat(past, x) {{axis=0}} : f32[7,4]
  y = attention(x, k, k, mask) {{heads=1, kv_heads=1, scale=0.5}} : f32[6,4]
  {more}x_next = {result} : f32[6,4]
  return x_next
params
  past : f32[2,4]
schedule
  repeat 3 flow index step carry x=x_next from noise
  result x_next
"""
CAUSAL = "arange() {start=1, stop=7}"


MIXED = """rows = transpose(y) {perm=[1, 0]} : f32[4,6]
  shares = softmax(rows) : f32[4,6]
  mixed = transpose(shares) {perm=[1, 0]} : f32[6,4]
  """


def loop(query: str = CAUSAL, result: str = "add(x, y)", more: str = "") -> Program:
    text = LOOP.format(query=query, result=result, more=more).strip()
    weights = Weights({"past": LazyTensor.of(np.linspace(-1, 1, 8).reshape(2, 4).tolist(), "past")})
    return parse(text).replace(weights=weights)


def test_a_causal_loop_has_free_rows() -> None:
    program = loop()
    freed = check(free_suffix(program))
    assert [(s.name, s.buckets) for s in freed.symbols] == [("N", (2, 3, 4, 5, 6))]
    assert freed.bind({"N": 6}) == program
    noise = np.random.default_rng(0).standard_normal((6, 4)).astype(np.float32)
    whole = chunk_of(program, {"noise": noise}, {})
    for n in (2, 5):
        assert np.array_equal(chunk_of(freed, {"noise": noise[:n]}, {"N": n}), whole[:n])


@pytest.mark.parametrize(
    "changes",
    [
        {"query": 'full() {dtype="i32", shape=[6], value=9.0}'},  # everybody sees everybody
        {"query": "arange() {start=2, stop=8}"},  # one ahead
        {"query": "cumsum(own)"},
        {"result": "add(x, mixed)", "more": MIXED},
    ],
)
def test_loops_that_look_ahead_stay_as_they_are(changes: dict[str, str]) -> None:
    program = loop(**changes)
    assert free_suffix(program) == program


# --- free sizes --------------------------------------------------------------------------------------------------

TASKS = ("go", "pick up the red cube and put it into the box on the left side of the table, slowly")


@pytest.mark.parametrize(("target", "engine"), ENGINES)
def test_padding_is_not_computed(target: str, engine: str, compiled: Callable[..., Path]) -> None:
    """Short and long prompts, one camera and two: what every size gives is what the largest, padded, gives."""
    golden = open_golden(GOLDENS / "smolvla_letterbox")
    with session(compiled("smolvla_letterbox", target), engine) as policy:
        program = policy.artifact.program
        assert {"C", "T"} <= {s.name for s in program.symbols}
        padded = program.bind({k: v for k, v in program.max_symbols().items() if k != "N"})
        given = golden.observation(0)
        for task in TASKS:
            picture = next(iter(given["images"].values()))
            for cameras in (given["images"], {**given["images"], "empty_camera_0": picture}):
                one = {**given, "images": cameras, "task": task}
                chunk = policy.act(**one)
                assert np.abs(chunk - whole_chunk(policy, padded, one)).max() <= 1e-5 * np.abs(chunk).max()


def whole_chunk(policy: Session, program: Program, given: Mapping[str, Any]) -> np.ndarray:
    from vlac.engines.torch_engine import TorchSession
    from vlac.runtime.actions import apply_action_steps
    from vlac.runtime.inputs import prepare
    from vlac.runtime.schedule import execute

    ready = prepare(policy.io, policy.artifact.tokenizer, program, **given)
    engine = TorchSession(program, lambda n: policy.artifact.tensors[n].decode(), threads=1)
    x = execute(program, engine, ready.env, ready.symbols)
    return apply_action_steps(policy.io.action_steps, x, ready.state)
