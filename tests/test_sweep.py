"""Sweeps: strict grids, rows kept by content, a kill -9 survived, shards and Ray nodes that share; ablation."""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
import time
import xml.etree.ElementTree as ET
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import GoldenFolder
from hypothesis import given
from hypothesis import strategies as st

import vlac
from vlac.errors import InputError, VlacError
from vlac.sweep import run
from vlac.sweep.ablate import ablate, ablation_text, recipe_of
from vlac.sweep.grid import read_grid, shard_of
from vlac.sweep.pareto import AIMS, front, marked, picture, text
from vlac.sweep.point import Build, Measure, Point, build_key, failed, refused
from vlac.sweep.run import groups_of, sweep

pytest.importorskip("yaml")
pytest.importorskip("torch")

GRID = """
checkpoint: {checkpoint}
target: [gguf-f32, gguf-q8]
engine: torch
passes:
  flow: [none, "flow-steps:steps=3"]
  norms: [none, [smooth-norms: {{ratio: 1}}]]
measure: {{runs: 0, goldens: 1}}
"""


@pytest.fixture
def grid(golden: Callable[[str], GoldenFolder], tmp_path: Path) -> Callable[..., Path]:
    """grid(old="new", ...) -> a file of eight points, texts replaced."""

    def write(text: str = GRID, **changes: str) -> Path:
        text = text.format(checkpoint=golden("smolvla_tiny").checkpoint)
        for old, new in changes.items():
            assert old in text
            text = text.replace(old, new)
        path = tmp_path / "grid.yaml"
        path.write_text(text, encoding="utf-8")
        return path

    return write


# --- grids -------------------------------------------------------------------------------------------------------


def test_a_grid_is_every_combination_in_order(grid: Callable[..., Path]) -> None:
    points = read_grid(grid()).points
    assert [(p.build.target, p.build.passes) for p in points[:4]] == [
        ("gguf-f32", ()),
        ("gguf-f32", ("smooth-norms:ratio=1",)),
        ("gguf-f32", ("flow-steps:steps=3",)),
        ("gguf-f32", ("flow-steps:steps=3", "smooth-norms:ratio=1")),
    ]
    assert len(points) == 8 and {p.engine for p in points} == {"torch"}
    assert points[3].axes == {"flow": "flow-steps:steps=3", "norms": "smooth-norms:ratio=1"}


@pytest.mark.parametrize(
    ("old", "new", "says"),
    [
        ("measure:", "measures:", "unknown key 'measures'; there are: checkpoint, target, engine"),
        ("goldens:", "golden:", "unknown key 'golden'; there are: runs, observations, goldens, episodes, environment"),
        ("goldens: 1", "goldens: 0", "goldens is 0"),
        ("runs: 0", "runs: -1", "runs is -1"),
        ("runs: 0", "runs: few", "runs is 'few'"),
        ("runs: 0", "episodes: 5, environment: libero", "no environment 'libero'; there are: push-cubes"),
        ("gguf-q8", "gguf-q3", "gguf-q8"),
        ("engine: torch", "engine: tensorflow", "no engine 'tensorflow'; there are: onnxruntime"),
        ("engine: torch", "threads: 0", "threads must be 1 or more"),
        ("flow-steps:steps=3", "flow-steps:stepz=3", "no parameter 'stepz'; there are: steps"),
        ("flow-steps:steps=3", "flow-stepz", "no pass 'flow-stepz'"),
        ("flow: [none,", "flow: none # [", "flow: expected a list of choices"),
        ("target: [gguf-f32, gguf-q8]", "", "at least checkpoint and target"),
        ("target: [gguf-f32, gguf-q8]", "target: []", "target is an empty list"),
    ],
)
def test_what_is_no_grid_is_refused_before_work(grid: Callable[..., Path], old: str, new: str, says: str) -> None:
    path = grid(**{old: new})
    with pytest.raises(VlacError) as raised:
        sweep(path, path.parent / "out")
    assert says in str(raised.value)
    assert not list((path.parent / "out").glob("points/*"))


@pytest.mark.parametrize("shard", ["0/2", "3/2", "1", "a/b", "1/0"])
def test_wrong_shards(shard: str) -> None:
    with pytest.raises(InputError, match="i/n"):
        shard_of(shard)


# --- keys --------------------------------------------------------------------------------------------------------


def test_keys_are_of_contents(tmp_path: Path) -> None:
    files = {"config.json": {"sha256": "a"}}

    def key(*passes: str, files: dict[str, Any] = files, measure: Measure = Measure()) -> str:  # noqa: B008
        return build_key(Build("here", "gguf-q8", passes), files, measure)

    plain = key("flow-steps:steps=4")
    assert plain == key("flow-steps:solver=euler,steps=4")  # a default spelled out
    assert plain != key("flow-steps:steps=5") != key() and plain != key("flow-steps:steps=4", files={})
    data = tmp_path / "a.npz"
    data.write_bytes(b"1")
    first = key(measure=Measure(observations=str(data)))
    moved = data.rename(tmp_path / "b.npz")
    assert key(measure=Measure(observations=str(moved))) == first
    moved.write_bytes(b"2")
    assert key(measure=Measure(observations=str(moved))) != first


# --- running -----------------------------------------------------------------------------------------------------


def rows_of(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "sweep.jsonl").read_text(encoding="utf-8").splitlines()]


def test_a_sweep_measures_refuses_and_remembers(
    grid: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = grid(**{"[gguf-f32, gguf-q8]": "gguf-q8", "steps=3": "steps=0"})
    out = tmp_path / "out"
    found = sweep(path, out, workers=2)
    assert (found["measured"], found["found"], found["failed"]) == (4, 0, 0)
    rows = rows_of(out)
    assert [r["status"] for r in rows] == ["done", "done", "refused", "refused"]
    assert "at least 1" in rows[2]["error"]["message"]
    assert rows[0]["figures"]["drift"] == rows[0]["parity"]["cost"]["relative_l2"] > 0
    assert rows[0]["figures"]["mb"] > 0.1 and rows[0]["figures"]["compiler_ok"] and rows[0]["bench"] is None
    assert any(r["front"] for r in rows) and not list((out / "artifacts").iterdir())
    assert "4 of 4 points" in (out / "sweep.md").read_text(encoding="utf-8")

    monkeypatch.setattr(run, "in_process", lambda *_: pytest.fail("a finished point was measured again"))
    again = sweep(path, out)
    assert (again["measured"], again["found"]) == (0, 4) and again["rows"] == found["rows"]


@pytest.mark.slow
def test_success_in_closed_loop_is_a_figure(tmp_path: Path) -> None:
    pytest.importorskip("gymnasium")
    pytest.importorskip("pymunk")
    path = tmp_path / "grid.yaml"
    path.write_text(
        "checkpoint: push-cubes\ntarget: gguf-q8\nengine: torch\nmeasure: {runs: 0, goldens: 1, episodes: 2}",
        encoding="utf-8",
    )
    (row,) = sweep(path, tmp_path / "out")["rows"]
    f = row["figures"]
    assert f["success"] == row["eval"]["success"]["rate"] and row["eval"]["episodes"] == 2
    assert 0 <= f["success_interval"][0] <= f["success"] <= f["success_interval"][1] <= 1


def test_a_broken_worker_fails_its_points_only_and_is_tried_again(grid: Callable[..., Path], tmp_path: Path) -> None:
    path = grid(**{"[gguf-f32, gguf-q8]": "gguf-f32", 'flow: [none, "flow-steps:steps=3"]': "flow: [none]"})
    table = read_grid(path)
    (group, *_) = groups_of(table)
    out = tmp_path / "out"
    store = run.Store(out, list(group.keys))
    store.add(failed(group.points[0], group.keys[0], "signal 11"))
    found = sweep(path, out)
    assert found["measured"] == 2 and found["failed"] == 0
    bad = {"points": [], "keys": [], "measure": {"nonsense": 1}, "artifact": None}
    with pytest.raises(TypeError):
        run.in_process(bad, lambda _: None)


def test_a_worker_that_dies_says_how(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run.in_process.__globals__["sys"], "executable", "/bin/false")
    point = Point(Build("nowhere", "gguf-f32"))
    rows: list[dict[str, Any]] = []
    from vlac.sweep.point import request_of

    run.in_process(request_of([point], ["k"], Measure(), None), rows.append)
    assert rows[0]["status"] == "failed" and "exit code 1" in rows[0]["error"]["message"]


def test_kill_nine_and_again(grid: Callable[..., Path], tmp_path: Path) -> None:
    """Killed after the first row, its worker with it: the second run measures the rest, and only the rest."""
    path, out = grid(GRID.replace("[gguf-f32, gguf-q8]", "gguf-f32")), tmp_path / "out"
    command = [sys.executable, "-m", "vlac.cli", "sweep", str(path), "-o", str(out), "--quiet"]
    mark = {**os.environ, "VLAC_TEST_MARK": str(out)}
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=mark)
    points = out / "points"
    deadline = time.monotonic() + 120
    while (not list(points.glob("*.json")) or not _marked(out)) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert process.pid in _marked(out)
    process.send_signal(signal.SIGKILL)
    process.wait()
    deadline = time.monotonic() + 20
    while _marked(out) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not _marked(out), "a worker outlived its parent"
    before = {p.name: p.stat().st_mtime_ns for p in points.glob("*.json")}
    assert 1 <= len(before) < 4
    found = sweep(path, out)
    assert (found["measured"], found["found"]) == (4 - len(before), len(before))
    assert {p.name: p.stat().st_mtime_ns for p in points.glob("*.json")}.items() >= before.items()
    assert len(rows_of(out)) == 4


def _marked(out: Path) -> list[int]:
    """Processes that the killed one started, and itself."""
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            if f"VLAC_TEST_MARK={out}".encode() in (entry / "environ").read_bytes():
                found.append(int(entry.name))
        except OSError:
            continue
    return found


def test_shards_share_a_folder(grid: Callable[..., Path], tmp_path: Path) -> None:
    path = grid(GRID.replace("[gguf-f32, gguf-q8]", "gguf-f32"))
    parts = [sweep(path, tmp_path / "out", shard=f"{i}/3") for i in (1, 2, 3)]
    keys = [r["key"] for part in parts for r in part["rows"]]
    assert len(keys) == len(set(keys)) == 4 and [p["measured"] for p in parts] == [2, 1, 1]
    assert len(rows_of(tmp_path / "out")) == 4


def test_two_sweeps_of_one_shard_are_refused(grid: Callable[..., Path], tmp_path: Path) -> None:
    out = tmp_path / "out"
    with run._alone(out, 1, 1), pytest.raises(VlacError, match="at work on shard 1/1"):
        sweep(grid(), out)
    with pytest.raises(InputError, match="processes, ray"):
        sweep(grid(), out, executor="slurm")


# --- Ray ---------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_two_ray_nodes_share_the_points(grid: Callable[..., Path], tmp_path: Path) -> None:
    ray = pytest.importorskip("ray", reason="Ray is not installed: pip install 'vlac-compiler[ray]'")
    from ray.cluster_utils import Cluster

    path = grid(GRID.replace("[gguf-f32, gguf-q8]", "gguf-f32"))
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
    try:
        cluster.add_node(num_cpus=1)
        found = sweep(path, tmp_path / "out", executor="ray", address=cluster.address)
        assert not ray.is_initialized()
    finally:
        cluster.shutdown()
    assert found["measured"] == 4 and found["failed"] == 0
    assert len({r["node"] for r in found["rows"]}) == 2
    again = sweep(path, tmp_path / "out")
    assert (again["measured"], again["found"]) == (0, 4)


def test_ray_is_asked_for_by_name(grid: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(VlacError, match=r"vlac-compiler\[ray\]"):
        sweep(grid(), tmp_path / "out", executor="ray")


# --- the front ---------------------------------------------------------------------------------------------------


def row(status: str = "done", **figures: float | None) -> dict[str, Any]:
    point = Point(Build("c", "gguf-q8"))
    base = refused(point, "k", VlacError("no")) if status == "refused" else failed(point, "k", "broke")
    return {**base, "status": status, "figures": figures, "parity": {"engine": "torch"}}


@given(st.lists(st.tuples(*[st.floats(0.1, 9) for _ in AIMS]), min_size=1, max_size=12))
def test_the_front_is_what_nothing_beats(values: list[tuple[float, ...]]) -> None:
    rows = [row(**dict(zip(AIMS, v, strict=True))) for v in values]
    better = [[AIMS[a] * r["figures"][a] for a in AIMS] for r in rows]
    on = front(rows)
    assert any(on)
    for i, p in enumerate(better):
        beaten = any(all(x <= y for x, y in zip(q, p, strict=True)) and q != p for q in better)
        assert on[i] == (not beaten)
    ET.fromstring(picture(marked(rows)))


def test_what_was_not_measured_does_not_count() -> None:
    rows = [
        row(mb=1.0, ms=None, drift=0.1, success=None),
        row(mb=2.0, ms=None, drift=0.2),
        row("refused"),
        row("failed"),
    ]
    assert front(rows) == [True, False, False, False]
    shown = text(marked(rows), 5)
    assert "4 of 5 points" in shown and "refused: gguf-q8: no passes: no" in shown
    tree = ET.fromstring(picture(marked(rows)))
    assert len([e for e in tree.iter() if e.tag.endswith("circle")]) == 2
    ET.fromstring(picture([]))


# --- ablation ----------------------------------------------------------------------------------------------------


def test_ablation_tells_what_each_pass_does(golden: Callable[[str], GoldenFolder], tmp_path: Path) -> None:
    checkpoint = str(golden("smolvla_tiny").checkpoint)
    recipe = ["flow-steps:steps=3", "smooth-norms:ratio=1", "quantize-weights:format=q8_0,match=text.*"]
    made = vlac.compile(checkpoint, target="gguf-f32", out=tmp_path / "out", passes=recipe, goldens=1)
    names = [p.split(":")[0] for p in recipe_of(made.manifest)]
    assert names == ["flow-steps", "smooth-norms", "quantize-weights"]
    report = ablate(tmp_path / "out", checkpoint, engine="torch", runs=0)
    rows = {r["removed"].split(":")[0]: r["figures"] for r in report["rows"]}
    assert list(rows) == ["", *names, "all of them"]
    whole = rows[""]["drift"]
    assert math.isclose(rows["smooth-norms"]["drift"], whole, rel_tol=1e-2)
    assert rows["flow-steps"]["drift"] < 0.5 * whole and rows["all of them"]["drift"] < 1e-5
    assert rows["quantize-weights"]["mb"] > rows[""]["mb"]
    shown = ablation_text(report)
    assert "(the whole recipe)" in shown and "MB -" in shown
    with pytest.raises(InputError, match="--reference CKPT"):
        ablate(tmp_path / "out", None)


def test_nothing_to_leave_out(golden: Callable[[str], GoldenFolder], tmp_path: Path) -> None:
    checkpoint = str(golden("smolvla_tiny").checkpoint)
    vlac.compile(checkpoint, target="gguf-f32", out=tmp_path / "out", goldens=1)
    with pytest.raises(InputError, match="no pass was applied"):
        ablate(tmp_path / "out", checkpoint)
