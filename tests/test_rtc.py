"""Real-time chunking: LeRobot's own answers from every engine, what is refused, and nothing where it is not asked for.

tests/golden/rtc is written by scripts/peers/lerobot_rtc.py.
"""

from __future__ import annotations

import importlib.util
import sys
import types
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import ROOT, open_golden
from family_cases import CASES as FAMILY_CASES

import vlac
from vlac.drivers import ArtifactDriver, noise_at
from vlac.engines.base import get_engine
from vlac.environments import PUSH_CUBES
from vlac.errors import EngineError, InputError, VlacWarning
from vlac.evaluate import evaluate
from vlac.runtime.rtc import STEADY, closed_loop, guidance_weight, prefix_weights
from vlac.runtime.session import Session

GOLDEN = ROOT / "tests" / "golden"
SPEC = {"vision.num_attention_heads": 3}
CASES = (  # as in scripts/peers/lerobot_rtc.py
    ("LINEAR", 2, 8, 10.0),
    ("EXP", 1, 6, 10.0),
    ("ONES", 2, 5, 10.0),
    ("ZEROS", 3, 10, 10.0),
    ("LINEAR", 0, 10, 2.5),
)
NAMES = ("smolvla_tiny", "smolvla_letterbox", "pi0_tiny", "pi05_tiny")
ENGINES = (
    ("gguf-f32", "torch"),
    ("gguf-f32", "ggml"),
    ("onnx-fp32", "onnxruntime"),
    ("onnx-fp32", "openvino"),
)
pytestmark = pytest.mark.filterwarnings("ignore::vlac.errors.VlacWarning")

Compiled = Callable[[str, str], Path]


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> Compiled:
    """compiled("smolvla_tiny", "gguf-f32") is the artifact's path; each is made once."""
    made: dict[tuple[str, str], Path] = {}

    def make(name: str, target: str) -> Path:
        if (name, target) not in made:
            out = tmp_path_factory.mktemp("rtc") / "out"
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", VlacWarning)
                spec = SPEC if name.startswith("pi") else None
                vlac.compile(GOLDEN / name / "checkpoint", target, out, spec=spec, goldens=1, allow_promote=True)
            made[name, target] = out
        return made[name, target]

    return make


def opened(path: Path, engine: str) -> Session:
    if why := get_engine(engine).missing():
        pytest.skip(why)
    return vlac.load(path, engine=engine, threads=1)


def guided(policy: Session, given: dict[str, Any], prev: Any, n: int, **more: Any) -> np.ndarray[Any, Any]:
    schedule, delay, horizon, most = CASES[n]
    rtc = {"inference_delay": delay, "execution_horizon": horizon, "schedule": schedule, "max_guidance_weight": most}
    return policy.act(**given, prev_chunk=prev, **{**rtc, **more})


@pytest.mark.parametrize(
    ("name", "target", "engine"), [("smolvla_tiny", "gguf-f32", "numpy"), *((n, *e) for n in NAMES for e in ENGINES)]
)
def test_lerobots_own_chunks(name: str, target: str, engine: str, compiled: Compiled) -> None:
    folder, answers = open_golden(GOLDEN / name), np.load(GOLDEN / "rtc" / f"{name}.npz")
    with opened(compiled(name, target), engine) as policy:
        for i in range(len(folder.tasks)):
            given = folder.observation(i)
            robot = policy.act(**given)
            plain = policy.normalised
            for n in range(len(CASES)):
                want = answers[f"obs{i}/{n}/chunk"]
                guided(policy, given, answers[f"obs{i}/{n}/prev"], n)
                got = policy.normalised
                assert np.abs(got - want).max() <= 1e-5 * np.abs(want).max()
                assert np.abs(plain - want).max() > 0.05 * np.abs(want).max()  # it is not the unguided chunk
            assert np.array_equal(policy.act(**given), robot)  # and leaves nothing behind


def test_a_chunk_goes_on_from_the_one_before(compiled: Compiled) -> None:
    """Rows that will have been executed are kept; robot units and fewer rows say the same."""
    folder = open_golden(GOLDEN / "smolvla_tiny")
    with opened(compiled("smolvla_tiny", "gguf-f32"), "torch") as policy:
        given = folder.observation(0)
        policy.act(**{**given, "noise": given["noise"][::-1].copy()})
        left = policy.normalised[2:]
        plain, robot = policy.act(**given), guided(policy, given, left, 0)
        whole = policy.normalised
        assert np.abs(whole[:2] - left[:2]).max() < 0.25 * np.abs(given["noise"]).max() and not np.array_equal(
            plain, robot
        )
        few = guided(policy, given, left, 0, n_actions=4)
        assert few.shape[0] == 4 and np.allclose(few, robot[:4], atol=1e-4)
        wide = np.zeros((len(left), policy.hparams.max_action_dim), np.float32)
        wide[:, : left.shape[1]] = left
        assert np.array_equal(guided(policy, given, wide[None], 0), robot)
        for none in (None, left[:0]):
            assert np.array_equal(guided(policy, given, none, 0), plain)


def test_observed_frames_are_guided_as_well(compiled: Compiled) -> None:
    folder = open_golden(GOLDEN / "smolvla_tiny")
    answers = np.load(GOLDEN / "rtc" / "smolvla_tiny.npz")
    with opened(compiled("smolvla_tiny", "onnx-fp32"), "onnxruntime") as policy:
        given = folder.observation(0)
        want = guided(policy, given, answers["obs0/0/prev"], 0)
        policy.observe(given["images"], given["task"])
        alone = {"state": given["state"], "noise": given["noise"]}
        assert np.array_equal(guided(policy, alone, answers["obs0/0/prev"], 0), want)


def test_a_driver_in_closed_loop_goes_on_from_its_last_chunk(compiled: Compiled) -> None:
    folder = open_golden(GOLDEN / "smolvla_tiny")
    with opened(compiled("smolvla_tiny", "gguf-f32"), "torch") as policy:
        given = folder.observation(1)
        seen = {k: given[k] for k in ("images", "state", "task")}
        driver = ArtifactDriver(policy)
        driver.act({**seen, "moment": (1, 0)})
        assert policy.normalised is not None
        left = policy.normalised[3:]
        plain = policy.act(**{**given, "noise": noise_at((1, 3), policy.io.noise_shape)})
        driver.act({**seen, "moment": (1, 0)})
        got = driver.act({**seen, "moment": (1, 3), "replayed": (3, 2)})
        noise = noise_at((1, 3), policy.io.noise_shape)
        assert np.array_equal(got, policy.act(**{**given, "noise": noise}, prev_chunk=left, **closed_loop(2)))
        driver.act({**seen, "moment": (1, 0)})
        told = driver.act({**seen, "moment": (1, 3), "replayed": (3, 2), "rtc": {"execution_horizon": 10}})
        want = policy.act(**{**given, "noise": noise}, prev_chunk=left, **closed_loop(2) | {"execution_horizon": 10})
        assert np.array_equal(told, want) and not np.array_equal(told, got)
        assert not np.array_equal(got, plain)


def test_eval_with_rtc_wants_artifacts() -> None:
    with pytest.raises(InputError, match="only artifacts are guided"):
        evaluate(GOLDEN / "smolvla_tiny" / "checkpoint", PUSH_CUBES, episodes=1, rtc=True)


WRONG = {
    "rows": ({"prev_chunk": np.zeros((99, 6))}, "prev_chunk is \\[99, 6\\]"),
    "columns": ({"prev_chunk": np.zeros((3, 5))}, "prev_chunk is \\[3, 5\\]"),
    "text": ({"prev_chunk": ["a"]}, "prev_chunk: could not"),
    "nan": ({"prev_chunk": np.full((3, 6), np.nan)}, "NaN or Inf"),
    "delay": ({"inference_delay": -1}, "inference_delay=-1"),
    "a fraction": ({"inference_delay": 1.5}, "inference_delay=1.5"),
    "schedule": ({"schedule": "cosine"}, "there are zeros, ones, linear, exp"),
    "weight": ({"max_guidance_weight": 0}, "max_guidance_weight=0"),
}


@pytest.mark.parametrize("case", WRONG)
def test_what_does_not_fit_is_refused(case: str, compiled: Compiled) -> None:
    changed, said = WRONG[case]
    with opened(compiled("smolvla_tiny", "gguf-f32"), "torch") as policy:
        given = open_golden(GOLDEN / "smolvla_tiny").observation(0)
        with pytest.raises(InputError, match=said):
            policy.act(**given, **{"prev_chunk": np.zeros((3, 6)), **changed})


def test_policies_without_such_a_loop_are_refused(tmp_path: Path) -> None:
    vlac.compile(
        GOLDEN / "smolvla_tiny" / "checkpoint",
        "gguf-f32",
        tmp_path / "ab",
        goldens=1,
        passes=["flow-steps:steps=5,solver=ab2"],
    )
    given = open_golden(GOLDEN / "smolvla_tiny").observation(0)
    with (
        vlac.load(tmp_path / "ab", engine="torch") as policy,
        pytest.raises(InputError, match="carries a memory"),
    ):
        policy.act(**given, prev_chunk=np.zeros((3, 6)))


def test_one_graph_is_refused(compiled: Compiled) -> None:
    with opened(compiled("smolvla_tiny", "onnx-fp32"), "onnxruntime") as policy:
        assert policy._engine is not None
        policy._engine.one_graph = True
        with pytest.raises(EngineError, match="one graph"):
            policy.act(**open_golden(GOLDEN / "smolvla_tiny").observation(0), prev_chunk=np.zeros((3, 6)))


def test_the_weights_are_the_papers() -> None:
    """Examples of LeRobot 0.6.1, delay 4, horizon 10."""
    linear = [1, 1, 1, 1, 0.857, 0.714, 0.571, 0.429, 0.286, 0.143, 0, 0]
    assert np.allclose(prefix_weights("linear", 4, 10, 12), linear, atol=6e-4)
    falling = [1, 1, 1, 1, 0.677, 0.434, 0.256, 0.134, 0.055, 0.013, 0, 0]
    assert np.allclose(prefix_weights("EXP", 4, 10, 12), falling, atol=6e-4)
    assert prefix_weights("ones", 4, 10, 12).tolist() == [1] * 10 + [0] * 2
    assert prefix_weights("zeros", 4, 10, 12).tolist() == [1] * 4 + [0] * 8
    assert prefix_weights("linear", 9, 5, 8).tolist() == [1] * 5 + [0] * 3
    assert guidance_weight(1.0, 10.0) == 10.0 and guidance_weight(0.5, 10.0) == pytest.approx(2.0)
    assert min(guidance_weight(t, 99.0) for t in np.linspace(0.01, 1, 100)) == pytest.approx(STEADY)


PROCESSOR = ROOT / ".venv-lerobot/lib/python3.11/site-packages/lerobot/policies/rtc/modeling_rtc.py"


@pytest.mark.lerobot
@pytest.mark.skipif(not PROCESSOR.exists(), reason="no .venv-lerobot; scripts/peers/lerobot.sh sets it up")
def test_weights_against_lerobots_source(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every schedule, delay, horizon and length up to a dozen, from LeRobot's own lines."""
    names = types.SimpleNamespace(ZEROS="ZEROS", ONES="ONES", LINEAR="LINEAR", EXP="EXP")
    for name, values in {
        "lerobot": {},
        "lerobot.configs": {"RTCAttentionSchedule": names},
        "lerobot_rtc": {"__path__": []},
        "lerobot_rtc.configuration_rtc": {"RTCConfig": object},
        "lerobot_rtc.debug_tracker": {"Tracker": object},
    }.items():
        module = types.ModuleType(name)
        module.__dict__.update(values)
        monkeypatch.setitem(sys.modules, name, module)
    spec = importlib.util.spec_from_file_location("lerobot_rtc.modeling_rtc", PROCESSOR)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    for schedule in vars(names):
        config = types.SimpleNamespace(prefix_attention_schedule=schedule, debug=False)
        processor = module.RTCProcessor(config)
        for rows in range(1, 12):
            for horizon in range(rows + 1):
                for delay in range(12):
                    want = processor.get_prefix_weights(delay, horizon, rows).numpy()
                    assert np.allclose(prefix_weights(schedule, delay, horizon, rows), want, atol=1e-6)


def of_family(name: str, out: Path) -> Session:
    case = FAMILY_CASES[name]
    vlac.compile(case.checkpoint, "gguf-f32", out, goldens=1, allow_promote=True, **case.options)
    return vlac.load(out, engine="torch", threads=1)


def test_a_flow_that_runs_from_0_to_1_is_guided_alike(tmp_path: Path) -> None:
    with of_family("groot_n17_tiny", tmp_path / "out") as policy:
        given = FAMILY_CASES["groot_n17_tiny"].observation(0)
        policy.act(**{**given, "noise": np.array(given["noise"])[..., ::-1, :].copy()})
        assert policy.normalised is not None
        left = policy.normalised[1:]
        policy.act(**given)
        plain = policy.normalised
        policy.act(**given, prev_chunk=left, inference_delay=7, execution_horizon=7)
        assert np.abs(policy.normalised[:7] - left).max() < 0.3 * np.abs(plain[:7] - left).max()


@pytest.mark.parametrize("name", ["tinyvla_tiny", "openvla_tiny", "pi0fast_tiny"])
def test_policies_without_a_flow_are_refused_by_name(name: str, tmp_path: Path) -> None:
    with of_family(name, tmp_path / "out") as policy:
        left = np.zeros((1, policy.hparams.action_dim))
        with pytest.raises(InputError, match="no flow from noise makes its actions"):
            policy.act(**FAMILY_CASES[name].observation(0), prev_chunk=left)
