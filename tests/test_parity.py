"""Figures of parity on arrays made by hand, the grammar of limits, observation files, and both questions end to end."""

from __future__ import annotations

import json
import math
from pathlib import Path
from types import MethodType
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from vlac import metrics
from vlac.engines.base import EngineSession, get_engine
from vlac.errors import InputError, VlacError
from vlac.io import IO, Step
from vlac.metrics import Joint, Limit, parse_limit
from vlac.observations import load_observations

# --- figures ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("a", "b", "cos", "l2", "worst"),
    [
        ([1.0, 0.0], [1.0, 0.0], 1.0, 0.0, 0.0),
        ([1.0, 0.0], [0.0, 1.0], 0.0, math.sqrt(2), 1.0),
        ([-2.0, 0.0], [2.0, 0.0], -1.0, 2.0, 2.0),
        ([3.0, 4.0], [6.0, 8.0], 1.0, 0.5, 0.5),
        ([0.0, 0.0], [0.0, 0.0], 1.0, 0.0, 0.0),
        ([1.0, 0.0], [0.0, 0.0], 0.0, math.inf, math.inf),
        ([0.0, 0.0], [1.0, 0.0], 0.0, 1.0, 1.0),
    ],
)
def test_distances(a: list[float], b: list[float], cos: float, l2: float, worst: float) -> None:
    assert metrics.cosine(a, b) == pytest.approx(cos)
    assert metrics.relative_l2(a, b) == pytest.approx(l2)
    assert metrics.max_relative(a, b) == pytest.approx(worst)


def test_shapes_must_agree() -> None:
    with pytest.raises(InputError, match=r"shape \(2,\) with \(3,\)"):
        metrics.cosine([1, 2], [1, 2, 3])


def test_jerk_is_the_third_difference() -> None:
    t = np.arange(8.0)
    assert metrics.jerk(np.stack([t**3, t**2], axis=1)) == pytest.approx(6 / math.sqrt(2))  # d3(t^3) = 6, d3(t^2) = 0
    assert metrics.jerk(np.zeros((3, 2))) is None


@pytest.mark.parametrize(
    ("names", "index", "how"),
    [
        (("x", "y", "z"), 2, "last joint"),
        (("gripper.pos", "y"), 0, "named 'gripper.pos'"),
        (("a", "left_Gripper", "b"), 1, "named 'left_Gripper'"),
    ],
)
def test_gripper_is_found_by_name_else_last(names: tuple[str, ...], index: int, how: str) -> None:
    found, reason = metrics.find_gripper(names)
    assert found == index and how in reason


def two_joints() -> list[Joint]:
    return [Joint("arm", -2.0, 2.0, "min..max"), Joint("gripper", 0.0, 10.0, "min..max")]


def test_compare_reports_each_figure_where_it_belongs() -> None:
    reference = np.zeros((2, 6, 2))
    reference[:, :, 0] = 1.0
    reference[:, :, 1] = 8.0
    candidate = reference.copy()
    candidate[1, 2, 0] += 0.5  # joint arm, second observation, step 2 (executed)
    candidate[0, 4, 1] = 1.0  # gripper opens in step 4 (tail)
    r = metrics.compare(candidate, reference, two_joints(), n_action_steps=4)
    assert r["max_abs"] == 7.0 and r["max_relative"] == pytest.approx(7 / 8)
    assert r["worst_sample"]["observation"] == 0
    arm, gripper = r["joints"]
    assert arm["max_abs"] == 0.5 and arm["share_of_range"] == pytest.approx(0.125) and arm["bias"] > 0
    assert gripper["max_abs"] == 7.0 and gripper["bias"] < 0
    assert r["gripper"] == {
        "joint": "gripper",
        "found": "named 'gripper'",
        "flips": 1,
        "steps": 12,
        "threshold": 5.0,
    }
    per_step = r["horizon"]["per_step"]
    assert [v > 0 for v in per_step] == [False, False, True, False, True, False]
    assert r["horizon"]["tail"] > r["horizon"]["executed"] > 0
    where = np.array(r["map"]["values"])  # by step and joint, rms over observations, over the joint's range
    assert where.shape == (6, 2) and np.count_nonzero(where) == 2
    assert where[2, 0] == pytest.approx(0.5 / 2**0.5 / 4) and where[4, 1] == pytest.approx(7 / 2**0.5 / 10)
    assert r["jerk"]["reference"] == 0 and r["jerk"]["artifact"] > 0 and r["jerk"]["ratio"] is None


def test_compare_of_equal_chunks_is_perfect() -> None:
    x = np.random.default_rng(0).standard_normal((3, 8, 2))
    figures = metrics.figures(metrics.compare(x, x, two_joints(), 8))
    assert figures["cosine"] == pytest.approx(1) and figures["jerk_ratio"] == 1
    assert all(figures[k] == 0 for k in ("relative_l2", "max_relative", "max_abs", "joint_share", "gripper_flips"))


def test_nan_is_the_worst_sample_and_keeps_no_limit() -> None:
    x = np.ones((2, 4, 2))
    bad = x.copy()
    bad[1, 0, 0] = np.nan
    r = metrics.compare(bad, x, two_joints(), 4)
    assert r["worst_sample"]["observation"] == 1
    for text in ("cos>=-1", "max<=1e9", "rel_l2<=1e9"):
        assert not metrics.judge([parse_limit(text)], metrics.figures(r))[0]["ok"]


def test_a_joint_that_never_moved_has_no_share_of_range() -> None:
    joints = [Joint("a", 1.0, 1.0, "min..max"), Joint("b")]
    r = metrics.compare(np.ones((1, 4, 2)), np.zeros((1, 4, 2)), joints, 4)
    assert [j["share_of_range"] for j in r["joints"]] == [None, None]
    assert not metrics.judge([parse_limit("joint<=1")], metrics.figures(r))[0]["ok"], "an unknown figure keeps no limit"


# --- limits ----------------------------------------------------------------------------------------------------

limits = st.builds(
    Limit,
    st.sampled_from(sorted(set(metrics.METRICS.values()))),
    st.sampled_from([">=", "<=", ">", "<"]),
    st.floats(allow_nan=False, allow_infinity=False),
) | st.builds(
    Limit,
    st.sampled_from(metrics.COMPILER_METRICS),
    st.sampled_from(["<=", "<"]),
    st.floats(0, 1),
    st.just("compiler"),
)


@given(limits)
def test_limits_print_and_parse_back(limit: Limit) -> None:
    assert parse_limit(str(limit)) == limit


@given(limits, st.floats(allow_nan=False))
def test_a_limit_is_its_relation(limit: Limit, figure: float) -> None:
    expected = {
        ">=": figure >= limit.value,
        "<=": figure <= limit.value,
        ">": figure > limit.value,
        "<": figure < limit.value,
    }
    assert limit.holds(figure) is expected[limit.relation]
    assert not limit.holds(None) and not limit.holds(math.nan)


@given(st.text())
def test_any_text_is_a_limit_or_a_named_refusal(text: str) -> None:
    try:
        parse_limit(text)
    except InputError as error:
        assert repr(text) in error.message and error.remedy


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("cos", "is not a limit"),
        ("cos=0.9", "is not a limit"),
        ("cos>=", "not a number"),
        ("cos>=high", "not a number"),
        ("cos>=nan", "finite"),
        ("speed<=1", "no figure 'speed'"),
        ("compiler.flips<=1", "question 1 has only"),
        ("cos>=0.9 max<=1", "is not a limit"),
    ],
)
def test_limits_that_are_none(text: str, complaint: str) -> None:
    with pytest.raises(InputError, match=complaint):
        parse_limit(text)


def test_short_names_of_limits() -> None:
    assert parse_limit(" cos >= 0.999 ") == Limit("cosine", ">=", 0.999)
    assert parse_limit("compiler.max<=1e-4") == Limit("max_relative", "<=", 1e-4, "compiler")


# --- observations ----------------------------------------------------------------------------------------------


def small_io(**changes: Any) -> IO:
    fields: dict[str, Any] = {
        "cameras": (),
        "image_steps": (),
        "state_key": "observation.state",
        "state_dim": 2,
        "state_steps": (),
        "text_steps": (Step("tokenise", {}),),
        "action_key": "action",
        "action_dim": 3,
        "max_action_dim": 4,
        "chunk_size": 5,
        "n_action_steps": 5,
        "action_steps": (),
        "normalised_action_steps": (),
    }
    return IO(**{**fields, **changes})


def an_observation() -> dict[str, np.ndarray[Any, Any]]:
    return {
        "obs0/image/observation.images.top": np.zeros((4, 6, 3), np.uint8),
        "obs0/state": np.zeros(2, np.float32),
        "obs0/task": np.frombuffer("öffne die Tür".encode(), np.uint8),
    }


def test_observations_in_both_layouts(tmp_path: Path) -> None:
    np.savez(tmp_path / "mine.npz", **an_observation())
    (mine,) = load_observations(tmp_path / "mine.npz", small_io())
    assert mine.task == "öffne die Tür" and mine.chunk.size == 0 and list(mine.images) == ["observation.images.top"]
    again = load_observations(tmp_path / "mine.npz", small_io())[0]
    assert np.array_equal(mine.noise, again.noise) and mine.noise.shape == (5, 4), "missing noise is seeded"

    arrays = {k: v for k, v in an_observation().items() if not k.endswith("task")}
    arrays["obs0/noise"] = np.ones((1, 5, 4), np.float32)
    arrays["obs0/chunk_robot"] = np.full((1, 5, 3), 2, np.float32)
    np.savez(tmp_path / "golden.npz", **arrays)
    (tmp_path / "golden.json").write_text(json.dumps({"tasks": ["open the drawer"]}))
    (theirs,) = load_observations(tmp_path / "golden.npz", small_io())
    assert theirs.task == "open the drawer" and theirs.chunk.shape == (5, 3) and theirs.noise.shape == (5, 4)


@pytest.mark.parametrize(
    ("key", "value", "complaint"),
    [
        ("obs0/state", np.zeros(3, np.float32), r"obs0/state is float32 \[3\], the policy wants float \[2\]"),
        ("obs0/state", np.zeros(2, np.int64), "int64"),
        ("obs0/state", np.array([np.nan, 0], np.float32), "NaN or Inf"),
        ("obs0/state", None, "obs0/state is missing"),
        ("obs0/task", None, "no task for observation 0"),
        ("obs0/task", np.array([255, 254], np.uint8), "not UTF-8"),
        ("obs0/task", np.zeros(2), "expected UTF-8 bytes"),
        ("obs0/noise", np.zeros((5, 3), np.float32), "obs0/noise"),
        ("obs0/image/observation.images.top", np.zeros((3, 4, 6), np.float32), r"expected uint8 \[H, W, 3\]"),
    ],
)
def test_observations_that_do_not_fit_are_named(tmp_path: Path, key: str, value: Any, complaint: str) -> None:
    arrays = {**an_observation(), key: value}
    np.savez(tmp_path / "x.npz", **{k: v for k, v in arrays.items() if v is not None})
    with pytest.raises(InputError, match=complaint):
        load_observations(tmp_path / "x.npz", small_io())


def test_files_that_hold_no_observations(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="does not exist"):
        load_observations(tmp_path / "none.npz", small_io())
    (tmp_path / "text.npz").write_text("not a zip")
    with pytest.raises(InputError, match="not a readable"):
        load_observations(tmp_path / "text.npz", small_io())
    np.savez(tmp_path / "other.npz", a=np.zeros(1))
    with pytest.raises(InputError, match=r"no obs0/.*it holds a"):
        load_observations(tmp_path / "other.npz", small_io())
    np.savez(tmp_path / "pickle.npz", **{"obs0/state": np.array([{}], dtype=object)})
    with pytest.raises(InputError, match="not a readable"):
        load_observations(tmp_path / "pickle.npz", small_io())


# --- both questions, end to end --------------------------------------------------------------------------------

pytest.importorskip("torch", reason="compiling these artifacts wants the torch engine")

import vlac  # noqa: E402
from vlac.parity import grade_of, joints_of, parity  # noqa: E402


@pytest.fixture(scope="module")
def artifact(golden: Any, tmp_path_factory: Any) -> Path:
    """smolvla_tiny as gguf-f32, with LeRobot's own observations as golden ones."""
    folder = golden("smolvla_tiny")
    out = tmp_path_factory.mktemp("parity") / "f32"
    vlac.compile(folder.checkpoint, "gguf-f32", out, observations=folder.path / "golden.npz")
    return out


def test_f32_passes_both_questions(artifact: Path) -> None:
    r = parity(artifact, engine="torch")
    assert r["ok"] and r["grade"] == "f32" and r["observations"]["count"] == 2
    assert "golden observations" in r["observations"]["source"]
    assert r["repeats"]["calls"] == 3 and r["repeats"]["bit_equal"] and r["repeats"]["stepwise"] < 1e-5
    assert r["compiler"]["reference"] == "numpy", "torch must not judge itself"
    assert [s["stage"] for s in r["compiler"]["stages"]] == ["vision", "prefix", "prefix_state", "flow"]
    assert r["compiler"]["chunk"]["max_relative"] < 1e-5 and r["cost"]["max_relative"] < 2e-5
    assert r["cost"]["noise_floor"]["relative_l2"] > 0.1 and r["cost"]["drift_over_noise"] < 1e-3
    assert any("Does it matter" in text for text in r["not_asked"])


def test_reference_and_lerobots_own_answers_agree(artifact: Path, golden: Any) -> None:
    folder = golden("smolvla_tiny")
    given = {"engine": "torch", "observations": folder.path / "golden.npz"}
    stored = parity(artifact, **given)["cost"]
    now = parity(artifact, reference=str(folder.checkpoint), **given)["cost"]
    assert stored["max_relative"] < 2e-5 and now["max_relative"] < 2e-5
    # what the prefix hands to the rest of itself exists only after lowering: the checkpoint has nothing like it
    assert {s["stage"] for s in now["stages"]} == {"vision", "prefix_state", "flow"}
    assert now["noise_floor"]["source"].endswith("run now")


def test_limits_decide_and_keep_to_their_question(artifact: Path) -> None:
    cost = parity(artifact, engine="torch", limits=["max<=1e-12"])
    assert not cost["ok"] and not cost["cost"]["ok"] and cost["compiler"]["ok"]
    compiler = parity(artifact, engine="torch", limits=["compiler.max<=1e-12"])
    assert not compiler["ok"] and compiler["cost"]["ok"] and compiler["compiler"]["first_stage_over"] == "vision"


def broken(engine: Any, stage: str, change: Any) -> Any:
    """An engine that changes the first float output of one stage."""

    class Broken:
        name, parity_options = "broken", engine.parity_options

        def open(self, artifact: Any, **options: Any) -> Any:
            session = engine.open(artifact, **options)
            run = session.run

            def spoiled(name: str, inputs: Any, symbols: Any) -> Any:
                out = run(name, inputs, symbols)
                if name == stage:
                    first = next(k for k, v in out.items() if v.dtype == np.float32)
                    out[first] = change(out[first])
                return out

            session.run = spoiled
            session.repeat = MethodType(EngineSession.repeat, session)  # the plain loop over run
            return session

    return Broken()


@pytest.mark.parametrize("stage", ["vision", "prefix", "prefix_state", "flow"])
def test_an_engine_that_is_wrong_in_one_stage_is_found_there(
    artifact: Path, stage: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    wrong = broken(get_engine("torch"), stage, lambda x: (x * 1.01).astype(np.float32))
    monkeypatch.setattr("vlac.parity.choose_engine", lambda artifact, name: wrong)
    r = parity(artifact)
    assert not r["ok"] and r["compiler"]["first_stage_over"] == stage


def test_fixed_grids_are_judged_by_what_one_rounding_weighs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A limit that the reference itself does not keep when its weights move by 2^-22 is widened to twice that; an
    engine that is wrong lies beyond it all the same, and a limit of the caller's stays."""
    from family_cases import CASES

    from vlac import parity_compiler
    from vlac.report import parity_text

    pytest.importorskip("onnx")
    case = CASES["tinyvla_tiny"]
    path = vlac.compile(case.checkpoint, "tensorrt-int8", tmp_path / "out", goldens=1, **case.options).path or ""
    seen: list[float] = []
    apart = parity_compiler._apart
    monkeypatch.setattr(parity_compiler, "_apart", lambda *x: (seen.append(apart(*x)), 1e-2)[1])
    monkeypatch.setattr(parity_compiler, "COMPILER_LIMITS", {"int8": "compiler.rel_l2<=1e-3"})

    def answered(factor: float, *limits: str) -> Any:
        off = broken(get_engine("torch"), "policy", lambda x: (x * np.float32(factor)).astype(np.float32))
        monkeypatch.setattr("vlac.parity.choose_engine", lambda artifact, name: off)
        return parity(path, threads=1, limits=limits)

    near = answered(1.01)
    assert near["compiler"]["ok"] and near["compiler"]["reference_spread"] == 1e-2
    assert "the reference moves by rel L2 0.0100 when its weights move by 2^-22" in parity_text(near)
    assert not answered(1.05)["compiler"]["ok"]
    assert not answered(1.01, "compiler.rel_l2<=1e-3")["compiler"]["ok"]
    assert len(seen) == 6 and all(0 < s < 0.3 for s in seen)


def test_an_engine_that_answers_differently_each_time_is_found(artifact: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(0)
    restless = broken(
        get_engine("torch"), "flow", lambda x: (x + 0.01 * rng.standard_normal(x.shape)).astype(np.float32)
    )
    monkeypatch.setattr("vlac.parity.choose_engine", lambda artifact, name: restless)
    r = parity(artifact, limits=["compiler.max<=10", "max<=10"])
    assert not r["repeats"]["bit_equal"] and not r["compiler"]["ok"] and not r["ok"]


def test_questions_that_cannot_be_put_are_refused(artifact: Path, golden: Any, tmp_path: Path) -> None:
    folder = golden("smolvla_tiny")
    bare = {k: v for k, v in folder.arrays.items() if k.startswith("obs0/") and k.split("/")[1] in ("image", "state")}
    np.savez(tmp_path / "bare.npz", **bare, **{"obs0/task": np.frombuffer(b"pick", np.uint8)})
    with pytest.raises(VlacError, match="no reference chunks") as error:
        parity(artifact, engine="torch", observations=tmp_path / "bare.npz")
    assert "--reference" in error.value.remedy
    other = golden("smolvla_letterbox").checkpoint
    with pytest.raises(VlacError, match="the reference has chunk_size 8, the artifact 10"):
        parity(artifact, engine="torch", reference=str(other))
    with pytest.raises(VlacError, match="does not run on engine 'openvino'"):
        parity(artifact, engine="openvino")


def test_joints_take_names_and_ranges_from_the_statistics() -> None:
    io = small_io(
        action_names=("a", "b"),
        action_steps=(Step("unnormalise", {"mode": "MEAN_STD", "mean": [0, 1, 2], "std": [1, 2, 0]}),),
    )
    assert [(j.name, j.low, j.high, j.span) for j in joints_of(io)] == [
        ("a", -2.0, 2.0, 4.0),
        ("b", -3.0, 5.0, 8.0),
        ("action 2", 2.0, 2.0, None),
    ]
    assert [j.span for j in joints_of(small_io())] == [None, None, None]


def test_the_coarsest_format_of_weight_names_the_grade(artifact: Path) -> None:
    from vlac.artifact import open_artifact
    from vlac.graph import Param

    program = open_artifact(artifact).program
    big = {"big": Param((4096, 4096), "q8_0"), "small": Param((8,), "q4_k"), "norm": Param((4096,), "f32")}
    assert grade_of(program) == "f32"
    assert grade_of(program.replace(params=big)) == "q8_0"


def test_what_one_rounding_weighs_is_asked_at_the_engines_own_rounding(golden: Any) -> None:
    from vlac.api import apply_passes, lower_for
    from vlac.checkpoint import read_policy
    from vlac.parity_compiler import _moved
    from vlac.registry import targets

    policy = read_policy(str(golden("smolvla_tiny").checkpoint))
    plain, packed = (
        lower_for(p, targets.get("onnx-fp32"), {})[0] for p in (policy, apply_passes(policy, ["quantize-kv"]))
    )
    assert _moved(plain, "f32") == 0 and _moved(plain, "q8_0") == 0
    assert [_moved(packed, grade) for grade in ("f32", "bf16", "int8", "q8_0")] == [2**-22, 2**-10, 2**-8, 2**-8]
