"""What a robot's caller sees: LeRobot's chunks, exact padding and masking, refusals that name the fault."""

from __future__ import annotations

import threading
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from runtime_toy import ACTIONS, CHUNK, COLUMNS, PROMPT, artifact, io, observation, program

from vlac.errors import ArtifactError, EngineError, InputError, VlacWarning
from vlac.io import Camera, Step
from vlac.runtime.inputs import prepare, runtime_types
from vlac.runtime.schedule import execute
from vlac.runtime.session import Session, load

IMAGE = np.zeros((12, 12, 3), np.uint8)


@pytest.fixture(scope="module")
def toy() -> Iterator[Session]:
    with Session(artifact()) as session:
        yield session


# --- LeRobot's own records -------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["smolvla_tiny", "smolvla_letterbox"])
@pytest.mark.filterwarnings("ignore::vlac.errors.VlacWarning")
def test_recorded_observations_give_lerobots_inputs_and_chunks(name: str, golden: Callable[[str], Any]) -> None:
    from vlac.checkpoint import read_policy
    from vlac.engines.numpy_engine import NumpySession
    from vlac.registry import families
    from vlac.runtime.actions import apply_action_steps

    folder = golden(name)
    policy = read_policy(str(folder.checkpoint))
    drawn = families.get(policy.family).build(policy)
    engine = NumpySession(drawn, lambda w: policy_weight(drawn, w))
    for i in range(2):
        ready = prepare(policy.io, policy.tokenizer, drawn, **folder.observation(i))
        mask = folder.arrays[f"obs{i}/mask"][0]
        np.testing.assert_array_equal(
            ready.env["tokens"][ready.env["token_valid"]], folder.arrays[f"obs{i}/tokens"][0][mask]
        )
        state = folder.arrays[f"obs{i}/state_normalised"][0]
        assert np.abs(ready.env["state"][0, : state.size] - state).max() <= 1e-6
        assert not ready.env["state"][0, state.size :].any()
        for slot in np.flatnonzero(ready.env["image_valid"]):
            want = folder.arrays[f"obs{i}/tap/image_preprocessed_{slot}"][0]
            assert np.abs(ready.env["pixels"][slot] - want).max() <= 1e-6
        x = execute(drawn, engine, ready.env, ready.symbols)
        for steps, units in ((policy.io.action_steps, "robot"), (policy.io.normalised_action_steps, "normalised")):
            want = folder.chunk(i, units)
            assert np.abs(apply_action_steps(steps, x) - want).max() <= 2e-5 * np.abs(want).max()


def policy_weight(drawn: Any, name: str) -> np.ndarray:
    return drawn.weights[name].load()


# --- the same chunk, however it is asked for -------------------------------------------------------------------


def test_act_gives_float32_rows_of_the_action_dimension_and_says_how_long_it_took(toy: Session) -> None:
    chunk = toy.act(**observation())
    assert chunk.dtype == np.float32 and chunk.shape == (CHUNK, ACTIONS) and chunk.flags.owndata
    times = {k: v for k, v in toy.stats.items() if k.endswith("_ms")}
    assert list(times) == ["preprocess_ms", "vision_ms", "prefix_ms", "flow_ms", "total_ms"]
    assert times["total_ms"] >= sum(v for k, v in times.items() if k != "total_ms") > 0


def test_hparams_are_attributes_and_a_mapping(toy: Session) -> None:
    h = toy.hparams
    assert h.cameras == ("observation.images.top", "observation.images.wrist") and h.camera_names == ("top", "wrist")
    assert (h.chunk_size, h.n_action_steps, h.action_dim, h.max_action_dim) == (CHUNK, 3, ACTIONS, COLUMNS)
    assert h["tokenizer_max_length"] == PROMPT and dict(h)["units"] == "robot" and "nonsense" not in h
    assert (h.family, h.target, h.engine) == ("toy", "toy-f32", "numpy")
    with pytest.raises(KeyError):
        h["nonsense"]


def test_a_seed_fixes_the_chunk_and_no_seed_does_not(toy: Session) -> None:
    first, same, other = (toy.act(**{**observation(), "seed": s}, reuse=False) for s in (1, 1, 2))
    np.testing.assert_array_equal(first, same)
    assert not np.array_equal(first, other)
    fresh = [toy.act(**{**observation(), "seed": None}) for _ in range(2)]
    assert not np.array_equal(*fresh)


def test_a_seed_is_pcg64_standard_normal_float32(toy: Session) -> None:
    noise = np.random.Generator(np.random.PCG64(5)).standard_normal((CHUNK, COLUMNS), dtype=np.float32)
    want = toy.act(**{**observation(), "seed": 5})
    for given in (noise, noise[None], noise.astype(np.float64)):
        np.testing.assert_array_equal(toy.act(**{**observation(), "seed": None, "noise": given}), want)


def test_cameras_go_by_key_or_last_part_and_in_any_order(toy: Session) -> None:
    obs = observation()
    top, wrist = obs["images"].values()
    want = toy.act(**obs)
    for images in (
        {"wrist": wrist, "top": top},
        {"observation.images.top": top, "observation.images.wrist": wrist},
        {"top": top, "observation.images.wrist": wrist},
    ):
        np.testing.assert_array_equal(toy.act(**{**obs, "images": images}), want)


def test_the_policys_renaming_is_applied_first() -> None:
    rename = {
        "observation.images.front": "observation.images.top",
        "observation.images.top": "observation.images.wrist",
    }
    obs = observation()
    top, wrist = obs["images"].values()
    with Session(artifact()) as plain, Session(artifact(rename=rename)) as renamed:
        want = plain.act(**obs)
        for images in (
            {"observation.images.front": top, "observation.images.top": wrist},
            {"front": top, "top": wrist},
            {"front": top, "wrist": wrist},
        ):
            np.testing.assert_array_equal(renamed.act(**{**obs, "images": images}), want)


def test_tokens_stand_in_for_the_task_and_masked_ones_do_not_exist(toy: Session) -> None:
    obs = observation()
    want = toy.act(**obs)
    ids = [2, 3, 4, 5, 6, 8]  # pick up the red cube please
    del obs["task"]
    np.testing.assert_array_equal(toy.act(**obs, tokens=ids), want)
    padded, mask = np.array([[*ids, 0, 0]]), np.array([[True] * 6 + [False] * 2])
    np.testing.assert_array_equal(toy.act(**obs, tokens=padded, mask=mask), want)
    left = np.array([1, 1, *ids], np.int64)
    np.testing.assert_array_equal(toy.act(**obs, tokens=left, mask=[0, 0, 1, 1, 1, 1, 1, 1]), want)


@pytest.mark.parametrize("task", ["now", "pick up the red cube", "pick up the red cube now now"])
def test_a_program_without_symbols_is_padded_to_the_same_chunk(toy: Session, task: str) -> None:
    obs = {**observation(), "task": task}
    with Session(artifact(static=True)) as static:
        np.testing.assert_allclose(static.act(**obs), toy.act(**obs), rtol=1e-5, atol=1e-6)


def test_the_smallest_bucket_is_taken() -> None:
    drawn, a = program(), artifact(max_missing_cameras=1)
    obs = observation()
    assert prepare(a.io, a.tokenizer, drawn, **obs).symbols == {"C": 2, "T": PROMPT}
    ready = prepare(a.io, a.tokenizer, drawn, **{**obs, "task": "now", "images": {"wrist": IMAGE}})
    assert ready.symbols == {"C": 1, "T": 4}
    assert ready.env["token_valid"].tolist() == [True, True, False, False]
    assert ready.env["pixels"].shape == (1, 3, 12, 12)


def test_an_absent_camera_is_left_out_exactly() -> None:
    obs = observation()
    one = {**obs, "images": {"wrist": obs["images"]["wrist"]}}
    with (
        Session(artifact(max_missing_cameras=1)) as free,
        Session(artifact(static=True, max_missing_cameras=1)) as static,
    ):
        np.testing.assert_allclose(static.act(**one), free.act(**one), rtol=1e-5, atol=1e-6)
        assert not np.allclose(free.act(**one), free.act(**obs), atol=1e-3)


def test_slots_of_absent_cameras_take_part_where_the_network_marks_them() -> None:
    drawn, a = program(special=True), artifact(special=True, max_missing_cameras=1)
    obs = {**observation(), "images": {"wrist": IMAGE}}
    ready = prepare(a.io, a.tokenizer, drawn, **obs)
    assert ready.symbols["C"] == 2
    assert ready.env["image_valid"].tolist() == [True, False]  # cameras given come first
    assert ready.env["camera_valid"].tolist() == [True, True]
    assert np.array_equal(ready.env["pixels"][0], np.full((3, 12, 12), -1)) and not ready.env["pixels"][1].any()
    with Session(a) as session:
        assert session.act(**obs).shape == (CHUNK, ACTIONS)


def test_normalised_units_skip_the_statistics_on_both_sides(toy: Session) -> None:
    obs = observation()
    state = np.array([0.5, 0.0, -2.0], np.float32)  # (raw - mean) / std
    robot = toy.act(**obs)
    normalised = toy.act(**{**obs, "state": state}, units="normalized")
    low, width = np.array([-10, 0, 5, -1], np.float32), np.array([20, 1, 1e-8, 2], np.float32)
    np.testing.assert_allclose((normalised + 1) / 2 * width + low, robot, atol=1e-5)


def test_an_artifact_without_statistics_knows_normalised_units_only() -> None:
    steps = {"state_steps": io().state_steps[1:], "action_steps": io().normalised_action_steps}
    with Session(artifact(units="normalized", **steps)) as session:
        assert session.hparams.units == "normalized"
        np.testing.assert_array_equal(session.act(**observation()), session.act(**observation(), units="normalized"))
        with pytest.raises(InputError, match="compiled without statistics") as caught:
            session.act(**observation(), units="robot")
        assert "--stats-key" in caught.value.remedy


def test_a_long_task_is_cut_with_a_warning_that_shows_what_was_lost(toy: Session) -> None:
    obs = observation()
    task = "pick up the red cube now now now please  pick the cube"
    with pytest.warns(VlacWarning, match="longer than 8 tokens .* lost: 'please  pick the cube please'"):
        cut = toy.act(**{**obs, "task": task})
    assert len(toy.warnings) == 1 and "lost" in toy.warnings[0]
    with pytest.raises(InputError, match=r"lost: .*strict=True"):
        toy.act(**{**obs, "task": task}, strict=True)
    np.testing.assert_array_equal(
        cut, toy.act(**{k: v for k, v in obs.items() if k != "task"}, tokens=[2, 3, 4, 5, 6, 7, 7, 7])
    )
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        toy.act(**obs, strict=True)
    assert toy.warnings == ()


def test_what_compiling_warned_of_stays_visible() -> None:
    with Session(artifact(manifest={"warnings": ["state 2 has std 0"]})) as session:
        assert session.warnings == ("state 2 has std 0",)


# --- taps ------------------------------------------------------------------------------------------------------


def test_taps_hold_every_stage_and_every_turn_and_change_nothing() -> None:
    from vlac.engines.numpy_engine import ENGINE

    a = artifact()
    engine = ENGINE.open(a)
    ready = prepare(a.io, a.tokenizer, a.program, **observation())
    taps: dict[str, np.ndarray] = {}
    stats: dict[str, float] = {}
    chunk = execute(a.program, engine, ready.env, ready.symbols, taps=taps, stats=stats)
    np.testing.assert_array_equal(chunk, execute(a.program, engine, ready.env, ready.symbols))
    assert list(taps) == [
        "image_tokens", "memory", "memory_valid", "x_after_step0", "x_after_step1", "x_after_step2", "x_next",
    ]  # fmt: skip
    assert taps["image_tokens"].shape == (18, 8)
    assert list(stats) == ["vision_ms", "prefix_ms", "flow_ms", "flow_held_bytes"]
    np.testing.assert_array_equal(taps["x_after_step2"], chunk)


def test_an_artifact_that_is_one_graph_runs_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    a = artifact(static=True, max_missing_cameras=1)
    obs = {**observation(), "images": {"wrist": IMAGE}}
    with Session(a) as session:
        want = session.act(**obs)
        engine = session._engine
        assert engine is not None
        seen: dict[str, Any] = {}

        def run_all(inputs: Any, symbols: Any) -> dict[str, np.ndarray]:
            seen.update(inputs)
            return {"x_next": chunk}

        chunk = execute(a.program, engine, prepare(a.io, a.tokenizer, a.program, **obs).env, {})
        monkeypatch.setattr(engine, "run_all", run_all)
        np.testing.assert_array_equal(session.act(**obs), want)
        assert set(seen) == {"pixels", "image_valid", "tokens", "token_valid", "state", "noise"}
        assert seen["pixels"].shape == (2, 3, 12, 12) and seen["image_valid"].tolist() == [True, False]
        assert [k for k in session.stats if k.endswith("_ms")] == ["preprocess_ms", "model_ms", "total_ms"]


# --- refusals --------------------------------------------------------------------------------------------------

TOP, WRIST = "observation.images.top", "observation.images.wrist"
NAN = float("nan")

BAD: dict[str, tuple[dict[str, Any], str]] = {
    "no images": ({"images": None}, r"no camera is given; .*top \(observation.images.top\), wrist"),
    "a bare image": ({"images": IMAGE}, "images is a ndarray, expected a mapping"),
    "missing camera": ({"images": {"top": IMAGE}}, f"camera {WRIST} is missing, none may be; .*given: {TOP}"),
    "misnamed camera": ({"images": {"top": IMAGE, "wirst": IMAGE}}, "'wirst' is unknown.*\n.*did you mean 'wrist'"),
    "extra camera": ({"images": {"top": IMAGE, "wrist": IMAGE, "zenith": IMAGE}}, "'zenith' is unknown.*has top"),
    "camera twice": ({"images": {"top": IMAGE, TOP: IMAGE, "wrist": IMAGE}}, f"{TOP} is given twice, as 'top'"),
    "number as camera": ({"images": {0: IMAGE, "wrist": IMAGE}}, "camera 0 is unknown"),
    "wrong picture": ({"images": {"top": IMAGE, "wrist": IMAGE.T}}, f"camera {WRIST}: .*channels come first"),
    "no state": ({"state": None}, r"no state is given; .*observation.state \[3\]"),
    "short state": ({"state": [1, 2]}, r"state \(observation.state\) has shape \[2\], expected \[3\]"),
    "2-D state": ({"state": np.zeros((3, 1))}, r"shape \[3, 1\], expected \[3\]"),
    "NaN state": ({"state": [0, NAN, 0]}, r"state \(observation.state\) has NaN or Inf at index 1"),
    "overflowing state": ({"state": [1e300, 0, 0]}, "NaN or Inf at index 0"),
    "overflow in units": ({"state": [0, 3e38, 0]}, r"overflows when normalised, at \[1\]"),
    "words as state": ({"state": ["a", "b", "c"]}, "not an array of numbers"),
    "no task": ({"task": None}, "no instruction is given"),
    "bytes as task": ({"task": b"pick"}, "task is a bytes, expected text"),
    "broken Unicode": ({"task": "pick \udcff"}, "not Unicode text"),
    "task and tokens": ({"tokens": [1]}, "task and tokens are both given"),
    "mask and task": ({"mask": [True]}, "mask is given without tokens"),
    "float tokens": ({"task": None, "tokens": [1.0]}, r"float64\[1\], expected integer ids"),
    "empty tokens": ({"task": None, "tokens": []}, "expected integer ids"),
    "2-D tokens": ({"task": None, "tokens": np.ones((2, 3), int)}, r"tokens has shape \[2, 3\], expected \[T\]"),
    "too many tokens": ({"task": None, "tokens": [1] * 9}, "9 tokens are given, this policy takes at most 8"),
    "id too large": ({"task": None, "tokens": [1, 40]}, r"tokens holds id 40, the embedding has rows 0\.\.39"),
    "negative id": ({"task": None, "tokens": [1, -1]}, "tokens holds id -1"),
    "short mask": ({"task": None, "tokens": [1, 2], "mask": [True]}, r"mask is bool\[1\], expected bool\[2\]"),
    "mask of numbers": ({"task": None, "tokens": [1, 2], "mask": [5, 1]}, "mask is int64"),
    "empty mask": ({"task": None, "tokens": [1, 2], "mask": [False, False]}, "mask leaves no token"),
    "noise shape": ({"seed": None, "noise": np.zeros((5, 4))}, r"noise has shape \[5, 4\], expected \[5, 6\]"),
    "noise NaN": ({"seed": None, "noise": np.full((5, 6), NAN)}, "noise has NaN or Inf"),
    "noise and seed": ({"noise": np.zeros((5, 6))}, "noise and seed are both given"),
    "negative seed": ({"seed": -1}, "seed is -1"),
    "float seed": ({"seed": 1.5}, "seed is 1.5"),
    "units": ({"units": "degrees"}, "units='degrees', expected 'robot' or 'normalized'"),
}


@pytest.mark.parametrize("case", BAD)
def test_a_wrong_observation_is_refused_by_name(toy: Session, case: str) -> None:
    changes, message = BAD[case]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(InputError, match=message):
            toy.act(**{**observation(), **changes})
    assert toy.act(**observation()).shape == (CHUNK, ACTIONS)  # and the session still works


def test_two_cameras_with_the_same_last_part_need_their_whole_keys() -> None:
    both = (Camera("observation.images.left.wrist", (3, 12, 12)), Camera("observation.images.right.wrist", (3, 12, 12)))
    with Session(artifact(cameras=both)) as session:
        with pytest.raises(InputError, match=r"'wrist' may be .*left.wrist or .*right.wrist"):
            session.act(**{**observation(), "images": {"wrist": IMAGE}})
        assert session.act(**{**observation(), "images": {c.key: IMAGE for c in both}}).shape == (CHUNK, ACTIONS)


def test_pictures_of_another_size_are_refused_where_nothing_resizes() -> None:
    with (
        Session(artifact(image_steps=io().image_steps[1:])) as session,
        pytest.raises(InputError, match=r"after preprocessing.*\[3, 20, 20\]"),
    ):
        session.act(**{**observation(), "images": {"top": np.zeros((20, 20, 3), np.uint8), "wrist": IMAGE}})


def test_all_cameras_may_not_be_absent() -> None:
    with Session(artifact(max_missing_cameras=2)) as session, pytest.raises(InputError, match="no camera is given"):
        session.act(**{**observation(), "images": {}})


# --- engines ---------------------------------------------------------------------------------------------------


def test_the_first_engine_of_the_artifact_that_is_installed_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    from vlac.engines.base import get_engine

    monkeypatch.setattr(type(get_engine("torch")), "missing", lambda self: "pip install torch")
    with Session(artifact(manifest={"engines": ["torch", "numpy"]})) as session:
        assert session.info["engine"] == "numpy" and session.info["target"] == "toy-f32"
    with pytest.raises(EngineError, match=r"no engine for .*toy-f32.*\n  torch: pip install torch"):
        Session(artifact(manifest={"engines": ["torch"]}))
    with pytest.raises(EngineError, match="engine torch cannot be used here: pip install torch"):
        Session(artifact(), engine="torch")


def test_an_engine_that_cannot_run_the_artifact_is_refused() -> None:
    with pytest.raises(EngineError, match="does not run on engine 'openvino'") as caught:
        Session(artifact(), engine="openvino")
    assert "numpy" in caught.value.remedy and "torch" in caught.value.remedy
    with pytest.raises(EngineError, match="threads=0"):
        Session(artifact(), threads=0)


def test_torch_runs_any_artifact(toy: Session) -> None:
    pytest.importorskip("torch")
    with Session(artifact(), engine="torch", threads=1) as session:
        want = toy.act(**observation())
        assert np.abs(session.act(**observation()) - want).max() <= 1e-5 * np.abs(want).max()


def test_a_chunk_with_nan_is_never_returned(monkeypatch: pytest.MonkeyPatch) -> None:
    with Session(artifact()) as session:
        assert session._engine is not None
        bad = np.full((CHUNK, COLUMNS), np.nan, np.float32)
        monkeypatch.setattr(session._engine, "repeat", lambda *a: {"x_next": bad})
        with pytest.raises(EngineError, match="30 of 30 values of the chunk are NaN or Inf"):
            session.act(**observation())


def test_a_stage_that_returns_another_shape_is_caught_before_the_next(monkeypatch: pytest.MonkeyPatch) -> None:
    with Session(artifact()) as session:
        assert session._engine is not None
        run = session._engine.run
        monkeypatch.setattr(session._engine, "run", lambda *a: {k: v[:1] for k, v in run(*a).items()})
        with pytest.raises(EngineError, match=r"stage prefix: input image_tokens is float32\[2, 8\].*f32\[18, 8\]"):
            session.act(**observation())


def test_ids_outside_a_table_never_reach_an_engine() -> None:
    a = artifact(vocab_size=0)  # an io that does not know the vocabulary
    with Session(a) as session, pytest.raises(EngineError, match=r"tokens holds 0\.\.99, table words has rows 0\.\.39"):
        session.act(**{**observation(), "task": None, "tokens": [1, 99]})


def test_a_closed_session_says_so() -> None:
    session = Session(artifact())
    session.close()
    session.close()
    with pytest.raises(EngineError, match="closed"):
        session.act(**observation())


def test_threads_wait_for_one_another() -> None:
    with Session(artifact()) as session:
        want = [session.act(**observation(i)) for i in range(4)]
        got: dict[int, np.ndarray] = {}
        workers = [
            threading.Thread(target=lambda i=i: got.update({i: session.act(**observation(i))})) for i in range(4)
        ]
        for w in workers:
            w.start()
        for w in workers:
            w.join()
    for i in range(4):
        np.testing.assert_array_equal(got[i], want[i])


# --- a broken artifact -----------------------------------------------------------------------------------------

BROKEN: dict[str, tuple[dict[str, Any], str]] = {
    "unknown step": ({"image_steps": (Step("crop"),)}, "io.image_steps|step 'crop' is unknown"),
    "unknown text step": (
        {"text_steps": (Step("translate"), Step("tokenise", {"max_length": 4}))},
        "'translate' is unknown",
    ),
    "no tokenise": ({"text_steps": (Step("ensure_suffix", {"suffix": "x"}),)}, "tokenise at the end"),
    "text parameters": ({"text_steps": (Step("tokenise", {"max_length": 0}),)}, "wrong parameters"),
    "padding": ({"text_steps": (Step("tokenise", {"max_length": 4, "padding": "left"}),)}, "padding 'left'"),
    "state too long": ({"state_dim": 9, "state_steps": (Step("pad", {"size": 4}),)}, "9 values do not fit into 4"),
    "state size": ({"state_steps": (Step("pad", {"size": 7}),)}, r"state is \[1, 7\], the program reads f32\[1,4\]"),
    "statistics": ({"action_dim": 2}, "min has 4 entries, expected 2"),
    "action columns": ({"normalised_action_steps": ()}, "6 columns, action_dim is 4"),
    "chunk": ({"chunk_size": 50}, r"noise is \[50, 6\], the program reads f32\[5,6\]"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_an_io_that_contradicts_itself_or_the_program_does_not_load(case: str) -> None:
    changes, message = BROKEN[case]
    with pytest.raises(ArtifactError, match=message):
        Session(artifact(**changes))


def test_a_broken_tokenizer_does_not_load() -> None:
    import dataclasses

    for data in (b"{", b"{}", b"\xff"):
        with pytest.raises(ArtifactError, match="the tokenizer does not load"):
            Session(dataclasses.replace(artifact(), tokenizer=data))


def test_a_path_that_is_no_artifact_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match="does not exist"):
        load(tmp_path / "nothing")


def test_runtime_types_are_those_of_the_stages() -> None:
    types = {name: str(t) for name, t in runtime_types(program()).items()}
    assert types == {
        "pixels": "f32[3,12,12]", "image_valid": "bool[C]", "tokens": "i32[T]", "token_valid": "bool[T]",
        "state": "f32[1,4]", "noise": "f32[5,6]",
    }  # fmt: skip
