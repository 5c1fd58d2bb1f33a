"""Recorded observations for parity, calibration and golden answers: which frames, which cameras, which refusals."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import ROOT, GoldenFolder, open_golden
from hypothesis import given, settings
from hypothesis import strategies as st

import vlac
from vlac.artifact import open_artifact
from vlac.checkpoint import read_policy, recorded_beside
from vlac.datasets.layout import Episode
from vlac.errors import DatasetError, InputError, VlacError
from vlac.io import IO, Camera
from vlac.parity import parity
from vlac.recorded import Recorded, beside, match_cameras, read_index, spread, write_folder

pytest.importorskip("pyarrow")

BUNDLED = ROOT / "vlac" / "zoo" / "push_cubes" / "observations"


def policy_io(*keys: str, missing: int = 0, rename: dict[str, str] | None = None, state: int = 6) -> IO:
    cameras = tuple(Camera(k, (3, 48, 48)) for k in keys)
    return IO(
        *(cameras, (), "observation.state", state, (), (), "action", 3, 8, 10, 10, (), ()),
        max_missing_cameras=missing,
        rename=rename or {},
    )


# --- which cameras -----------------------------------------------------------------------------------------------

TOP, WRIST = "observation.images.top", "observation.images.wrist"
MATCHED: dict[str, tuple[IO, Sequence[str], dict[str, str], dict[str, str]]] = {
    "the same keys": (policy_io(TOP, WRIST), [WRIST, TOP, "x"], {}, {TOP: TOP, WRIST: WRIST}),
    "the same last part": (policy_io(TOP), ["observation.image.top"], {}, {TOP: "observation.image.top"}),
    "renamed by last parts": (policy_io(TOP), ["images.front"], {"front": "top"}, {TOP: "images.front"}),
    "renamed by keys": (policy_io(TOP, WRIST), ["a", TOP], {"a": TOP, TOP: WRIST}, {TOP: "a", WRIST: TOP}),
    "by the policy's own names": (
        policy_io("observation.images.camera1", rename={TOP: "observation.images.camera1"}),
        [TOP],
        {},
        {"observation.images.camera1": TOP},
    ),
    "one may be missing": (policy_io(TOP, WRIST, missing=1), [TOP], {}, {TOP: TOP}),
}


@pytest.mark.parametrize("case", MATCHED)
def test_cameras_find_each_other(case: str) -> None:
    io, there, rename, wanted = MATCHED[case]
    assert match_cameras(io, there, rename, "d") == wanted


@pytest.mark.parametrize(
    ("io", "there", "rename", "message"),
    [
        (policy_io(TOP, WRIST), [TOP, "observation.images.side"], {}, "no camera wrist.*recorded are.*side"),
        (policy_io(TOP), ["a.top", "b.top"], {}, "no camera top"),
        (policy_io(TOP, missing=1), ["side"], {}, "no camera top"),
        (policy_io(TOP), [TOP], {"front": "top"}, "'front' is no recorded camera"),
        (policy_io(TOP), ["front"], {"front": "up"}, "'up' is no policy camera"),
        (policy_io(TOP), ["a", "b"], {"a": "top", "b": "top"}, "the same name"),
    ],
)
def test_cameras_that_do_not_fit_are_named(io: IO, there: list[str], rename: dict[str, str], message: str) -> None:
    with pytest.raises(InputError, match=message):
        match_cameras(io, there, rename, "d")


def test_the_refusal_says_how_to_rename() -> None:
    with pytest.raises(InputError) as refusal:
        match_cameras(policy_io(TOP, WRIST), [TOP, "observation.images.side"], {}, "d")
    assert "--rename side=wrist" in refusal.value.remedy


# --- which frames ------------------------------------------------------------------------------------------------


@settings(max_examples=80, deadline=None)
@given(lengths=st.lists(st.integers(0, 40), min_size=1, max_size=30), count=st.integers(1, 60))
def test_frames_are_spread_over_episodes(lengths: list[int], count: int) -> None:
    starts = np.concatenate([[0], np.cumsum(lengths)])
    episodes = [Episode(i, n, int(starts[i]), (), "", 0) for i, n in enumerate(lengths)]
    chosen = spread(episodes, count)
    assert chosen == sorted(set(chosen)) == spread(episodes, count)
    assert len(chosen) == min(count, sum(lengths)) and all(0 <= i < sum(lengths) for i in chosen)
    filled = [e for e in episodes if e.length]
    per = [sum(e.start <= i < e.start + e.length for i in chosen) for e in filled]
    if filled and min(e.length for e in filled) >= -(-count // len(filled)) * 2:
        assert max(per) - min(per) <= 1, "no episode twice before each had its turn"


def test_frames_come_from_all_parts_of_episodes() -> None:
    episodes = [Episode(i, 100, 100 * i, (), "", 0) for i in range(50)]
    parts = np.array([i % 100 for i in spread(episodes, 50)])
    assert all(((parts >= 20 * q) & (parts < 20 * q + 20)).sum() >= 7 for q in range(5))


# --- an observations/ folder -------------------------------------------------------------------------------------


def frames(n: int, cameras: Sequence[str] = (TOP, WRIST), state: int = 6) -> list[dict[str, Any]]:
    rng = np.random.Generator(np.random.PCG64(5))
    return [
        {
            "images": {c: rng.integers(0, 256, (48, 48, 3), dtype=np.uint8) for c in cameras},
            "state": rng.standard_normal(state).astype(np.float32),
            "task": "pick up the red cube",
            "episode": i,
            "frame": 2,
        }
        for i in range(n)
    ]


def test_a_folder_holds_exactly_what_was_written(tmp_path: Path) -> None:
    given_frames = frames(5)
    write_folder(tmp_path / "o", given_frames, {"made by": "a test"})
    taken = Recorded(tmp_path / "o").take(policy_io(TOP, WRIST), None)
    assert len(taken) == 5
    for golden, wanted in zip(taken, given_frames, strict=True):
        np.testing.assert_array_equal(golden.state, wanted["state"])
        np.testing.assert_array_equal(golden.images[WRIST], wanted["images"][WRIST])
        assert golden.task == wanted["task"] and golden.chunk.size == 0 and golden.noise.shape == (10, 8)
    two = Recorded(tmp_path / "o").take(policy_io(TOP, WRIST), 2)
    np.testing.assert_array_equal(two[1].state, given_frames[2]["state"])
    again = tmp_path / "again"
    write_folder(again, given_frames, {"made by": "a test"})
    assert (again / "index.json").read_bytes() == (tmp_path / "o" / "index.json").read_bytes()


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ({"images": {TOP: "../../x.png"}, "state": [0] * 6, "task": ""}, "no path inside"),
        ({"images": {TOP: "x.png"}, "state": [0] * 6, "task": ""}, "does not exist"),
        ({"images": {TOP: "000_top.png"}, "state": ["0"] * 6, "task": ""}, "'state' holds other things"),
        ({"images": {TOP: "000_top.png"}, "state": [0] * 6}, "needs 'images'"),
        ({"images": {TOP: 3}, "state": [0] * 6, "task": ""}, "needs 'images'"),
        ({"images": {TOP: "index.json"}, "state": [0] * 6, "task": ""}, "cannot be decoded"),
    ],
)
def test_broken_folders_are_refused(tmp_path: Path, entry: dict[str, Any], message: str) -> None:
    write_folder(tmp_path, frames(1, [TOP]), {})
    (tmp_path / "index.json").write_text(json.dumps({"observations": [entry]}))
    with pytest.raises(DatasetError, match=message):
        Recorded(tmp_path).take(policy_io(TOP), None)


def test_a_state_of_another_robot_is_refused(tmp_path: Path) -> None:
    write_folder(tmp_path, frames(1, [TOP]), {})
    with pytest.raises(InputError, match="the state has 6 numbers, the policy takes 7"):
        Recorded(tmp_path).take(policy_io(TOP, state=7), None)
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match=r"neither meta/info.json .* nor index.json"):
        Recorded(tmp_path / "empty").take(policy_io(TOP), None)


def test_the_bundled_observations() -> None:
    """64 moments of push-cubes, every task eight times; small enough to ship."""
    entries = read_index(BUNDLED)
    taken = Recorded(BUNDLED).take(policy_io("observation.images.top", "observation.images.follow", state=4), None)
    assert len(entries) == len(taken) == 64
    assert all(p.shape == (64, 64, 3) for g in taken for p in g.images.values())
    words = [(e["task"].split()[2], e["task"].split()[-1].replace("wards", "")) for e in entries]
    assert all(words.count(w) == 8 for w in words) and len(set(words)) == 8
    assert sum(f.stat().st_size for f in BUNDLED.iterdir()) < 300_000


def test_the_bundled_observations_are_what_the_environment_gives() -> None:
    pytest.importorskip("pymunk")
    sys.path.insert(0, str(ROOT / "scripts"))
    import push_cubes_observations as script

    kept = Recorded(BUNDLED).take(policy_io("observation.images.top", "observation.images.follow", state=4), None)
    for i in (0, 13, 63):
        made = script.moment(script.FIRST_SEED + i)
        np.testing.assert_array_equal(made["state"], kept[i].state)
        assert made["task"] == kept[i].task
        for key, picture in made["images"].items():
            np.testing.assert_array_equal(picture, kept[i].images[key])


# --- parity, calibration, golden answers -------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tiny() -> GoldenFolder:
    return open_golden(ROOT / "tests" / "golden" / "smolvla_tiny")


@pytest.fixture(scope="module")
def artifact(tiny: GoldenFolder, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("recorded") / "f32"
    vlac.compile(tiny.checkpoint, "gguf-f32", out)
    return out


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three episodes of four frames for the tiny policy; its wrist camera is called side."""
    from vlac.datasets import Writer

    path = tmp_path_factory.mktemp("dataset") / "demonstrations"
    picture = {"dtype": "image", "shape": (48, 48, 3)}
    features = {
        TOP: picture,
        "observation.images.side": picture,
        "observation.state": {"dtype": "float32", "shape": (6,)},
        "action": {"dtype": "float32", "shape": (6,)},
    }
    with Writer(path, features, 10) as writer:
        for i, f in enumerate(frames(12, (TOP, "observation.images.side"))):
            writer.add_frame({**f["images"], "observation.state": f["state"], "action": f["state"]}, task=f["task"])
            if i % 4 == 3:
                writer.save_episode()
    return path


def test_parity_on_a_dataset(artifact: Path, dataset: Path, tiny: GoldenFolder) -> None:
    given_data = Recorded(dataset, {"side": "wrist"})
    r = parity(artifact, observations=given_data, frames=3, engine="torch", reference=str(tiny.checkpoint))
    assert r["ok"] and r["observations"] == {"source": "dataset demonstrations", "count": 3}
    assert r["cost"]["max_relative"] < 1e-5
    alone = parity(artifact, observations=given_data, engine="torch")
    assert alone["ok"] and alone["cost"] is None and alone["observations"]["count"] == 12
    assert any("give --reference" in line for line in alone["not_asked"])
    with pytest.raises(VlacError, match="no reference chunks"):
        parity(artifact, observations=given_data, engine="torch", limits=["cos>=0.9"])
    with pytest.raises(InputError, match="no camera wrist"):
        parity(artifact, observations=dataset, engine="torch")


def test_parity_on_a_dataset_from_the_command_line(artifact: Path, dataset: Path, tiny: GoldenFolder) -> None:
    from typer.testing import CliRunner

    from vlac.cli import app

    words = ["parity", str(artifact), "--dataset", str(dataset), "--frames", "2", "--engine", "torch", "--json", "-q"]
    done = CliRunner().invoke(app, [*words, "--rename", "side=wrist", "--reference", str(tiny.checkpoint)])
    assert done.exit_code == 0, done.output
    assert json.loads(done.output)["observations"]["count"] == 2
    refused = CliRunner().invoke(app, words)
    assert refused.exit_code == 2 and "--rename side=wrist" in refused.output
    both = CliRunner().invoke(app, [*words, "--observations", "x.npz"])
    assert both.exit_code == 2 and "--dataset together with --observations" in both.output


def test_passes_calibrate_on_the_data_given(dataset: Path, tiny: GoldenFolder, tmp_path: Path) -> None:
    recipe = ["flow-steps:steps=4,solver=fitted,samples=8"]
    made = {}
    for name, more in {"seeded": {}, "given": {"calibrate": dataset, "rename": {"side": "wrist"}}}.items():
        result = vlac.compile(tiny.checkpoint, "gguf-f32", tmp_path / name, passes=recipe, **more)  # type: ignore[arg-type]
        made[name] = result.manifest
    assert made["given"]["calibration"] == "dataset demonstrations" and "calibration" not in made["seeded"]
    figures = {name: m["history"][0]["figures"] for name, m in made.items()}
    assert figures["given"]["held_out_observations"] == figures["seeded"]["held_out_observations"] == 2
    assert figures["given"]["held_out_drift_fitted"] != figures["seeded"]["held_out_drift_fitted"]
    with pytest.raises(InputError, match="no camera wrist"):
        vlac.compile(tiny.checkpoint, "gguf-f32", tmp_path / "no", passes=recipe, calibrate=dataset)
    assert not (tmp_path / "no").exists()


def test_observations_beside_a_checkpoint_are_the_default(tiny: GoldenFolder, tmp_path: Path) -> None:
    checkpoint = tmp_path / "checkpoint"
    shutil.copytree(tiny.checkpoint, checkpoint)
    write_folder(checkpoint / "observations", frames(12), {})
    assert beside(checkpoint) == recorded_beside(str(checkpoint)) == read_policy(str(checkpoint)).recorded
    result = vlac.compile(checkpoint, "gguf-f32", tmp_path / "out")
    assert result.path is not None and result.manifest["golden"] == "recorded"
    carried = open_artifact(result.path).goldens()
    assert len(carried) == 8 and all(g.chunk.size for g in carried)
    np.testing.assert_array_equal(carried[1].state, frames(12)[12 // 8]["state"])
    r = parity(result.path, engine="torch")
    assert r["observations"]["count"] == 8 and "(recorded)" in r["observations"]["source"]
    full = parity(result.path, engine="torch", reference=str(checkpoint), frames=9)
    assert full["ok"] and full["observations"] == {"source": "recorded observations (observations/)", "count": 9}
    # and beside the artifact they are found before those of the reference
    shutil.move(str(checkpoint / "observations"), str(result.path.parent / "observations"))
    assert parity(result.path, engine="torch", reference=str(checkpoint), frames=2)["observations"]["count"] == 2
