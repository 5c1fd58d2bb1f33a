"""The recorder: steps of one loop or many become a dataset; nothing holds the loop up, nothing ends it."""

from __future__ import annotations

import os
import random
import re
import signal
import subprocess
import sys
import threading
import time
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import ROOT

from vlac.datasets import open_dataset
from vlac.datasets.files import UNFINISHED
from vlac.errors import DatasetError, InputError, VlacWarning
from vlac.record import TIME, Counts, Recorder

FPS = 10


def step(episode: int, number: int, side: int = 16) -> dict[str, Any]:
    rng = np.random.Generator(np.random.PCG64([episode, number]))
    pictures = rng.integers(0, 256, (2, side, side, 3), dtype=np.uint8)
    return {
        "images": {"top": pictures[0], "observation.images.wrist": pictures[1]},
        "state": rng.standard_normal(4).astype(np.float32),
        "action": rng.standard_normal(2).astype(np.float32),
        "task": f"task {episode % 2}",
    }


def check(path: Path, wanted: list[dict[str, Any]]) -> None:
    with open_dataset(path) as dataset:
        assert len(dataset) == len(wanted)
        for got, want in zip(dataset.frames(range(len(dataset))), wanted, strict=True):
            np.testing.assert_array_equal(got["images"]["observation.images.top"], want["images"]["top"])
            np.testing.assert_array_equal(got["state"], want["state"])
            np.testing.assert_array_equal(got["action"], want["action"])
            assert got["task"] == want["task"]


def numbers(counts: Counts) -> tuple[int, int, int, int, int]:
    return counts.steps, counts.recorded, counts.dropped, counts.refused, counts.episodes


def wait_for(what: Any) -> None:
    deadline = time.monotonic() + 30
    while not what():
        assert time.monotonic() < deadline, "the recorder did not get there"
        time.sleep(0.01)


def test_steps_become_episodes(tmp_path: Path) -> None:
    steps = [[step(e, i) for i in range(3 + e)] for e in range(3)]
    with Recorder(tmp_path / "d", FPS) as recorder:
        for episode in steps:
            for one in episode:
                assert recorder.step(**one)
            recorder.end_episode()
        recorder.end_episode()
    assert numbers(recorder.close()) == (12, 12, 0, 0, 3) and not recorder.counts.failed
    check(tmp_path / "d", [one for episode in steps for one in episode])
    with open_dataset(tmp_path / "d") as dataset:
        assert [e.length for e in dataset.episodes] == [3, 4, 5] and dataset.fps == FPS
        assert TIME in dataset.info.features


def test_closing_keeps_the_open_episode_and_recording_goes_on_later(tmp_path: Path) -> None:
    for episode in range(2):
        with Recorder(tmp_path / "d", FPS) as recorder:
            for i in range(4):
                recorder.step(**step(episode, i))
    check(tmp_path / "d", [step(e, i) for e in range(2) for i in range(4)])
    assert recorder.step(**step(0, 0)) is False, "after closing nothing is taken"


def test_a_picture_may_be_overwritten_at_once(tmp_path: Path) -> None:
    one = step(0, 0)
    kept = {k: np.array(v) for k, v in one["images"].items()}
    with Recorder(tmp_path / "d", FPS) as recorder:
        recorder.step(**one)
        for picture in one["images"].values():
            picture[:] = 0
    check(tmp_path / "d", [{**one, "images": kept}])


def test_many_loops_do_not_mix(tmp_path: Path) -> None:
    def loop(recorder: Recorder, source: int) -> None:
        for i in range(10):
            assert recorder.step(**step(source, i), source=str(source))
        recorder.end_episode(str(source))

    with Recorder(tmp_path / "d", FPS, backlog=1000) as recorder:
        threads = [threading.Thread(target=loop, args=(recorder, n)) for n in range(6)]
        for t in threads:
            t.start()
        for t in threads:
            t.join()
    assert numbers(recorder.counts) == (60, 60, 0, 0, 6)
    with open_dataset(tmp_path / "d") as dataset:
        seen = set()
        for episode in dataset.episodes:
            frames = list(dataset.frames(range(episode.start, episode.start + episode.length)))
            source = next(n for n in range(6) if np.array_equal(step(n, 0)["state"], frames[0]["state"]))
            seen.add(source)
            for i, f in enumerate(frames):
                np.testing.assert_array_equal(f["state"], step(source, i)["state"])
        assert seen == set(range(6))


def test_long_and_idle_episodes_are_committed_by_themselves(tmp_path: Path) -> None:
    with Recorder(tmp_path / "d", FPS, max_frames=4, idle_s=0.05) as recorder:
        for i in range(10):
            recorder.step(**step(0, i))
        wait_for(lambda: recorder.counts.recorded == 10)
        assert recorder.counts.episodes == 3
        with open_dataset(tmp_path / "d") as dataset:
            assert len(dataset) == 10, "while recording goes on"
    check(tmp_path / "d", [step(0, i) for i in range(10)])


def test_episodes_of_large_pictures_are_committed_before_memory_is_full(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("vlac.record.EPISODE_BYTES", 5000)
    with Recorder(tmp_path / "d", FPS) as recorder:
        for i in range(9):
            recorder.step(**step(0, i))
    assert recorder.counts.episodes >= 3 and recorder.counts.recorded == 9


def test_a_pause_begins_a_new_episode(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    later = time.monotonic() + 1000
    clock = iter([later + s for s in (0.0, 0.1, 0.2, 60.0, 60.1)])
    with Recorder(tmp_path / "d", FPS, idle_s=10.0) as recorder:
        for i in range(5):
            with monkeypatch.context() as patch:
                patch.setattr("vlac.record._now", lambda: next(clock))
                recorder.step(**step(0, i))
    with open_dataset(tmp_path / "d") as dataset:
        assert [e.length for e in dataset.episodes] == [3, 2]


def test_a_discarded_episode_is_not_there(tmp_path: Path) -> None:
    with Recorder(tmp_path / "d", FPS) as recorder:
        for episode in range(2):
            for i in range(3):
                recorder.step(**step(episode, i))
            if episode == 0:
                recorder.discard_episode()
    check(tmp_path / "d", [step(1, i) for i in range(3)])


def test_it_drops_and_says_so_instead_of_waiting(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    go = threading.Event()
    add = Recorder._add

    def slow(self: Recorder, one: Any) -> None:
        go.wait(30)
        add(self, one)

    monkeypatch.setattr(Recorder, "_add", slow)
    recorder = Recorder(tmp_path / "d", FPS, backlog=5)
    with pytest.warns(VlacWarning) as said:
        taken = [recorder.step(**step(0, i)) for i in range(20)]
    assert "falls behind: 1 of" in str(said[0].message) and len(said) <= 4, "at 1, 2, 4 and 8 dropped steps"
    go.set()
    counts = recorder.close()
    assert 5 <= sum(taken) <= 6 and counts.dropped == 20 - sum(taken) and counts.recorded == sum(taken)
    check(tmp_path / "d", [step(0, i) for i in range(sum(taken))])


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"state": np.array([0, np.nan, 0, 0])}, "NaN"),
        ({"state": np.zeros(5)}, r"\[5\], expected float32 \[4\]"),
        ({"images": {"top": np.zeros((8, 8, 3), np.uint8)}}, "lacks"),
        ({"action": None}, "lacks"),
        ({"action": "push"}, "no arrays of numbers"),
        ({"task": None}, "instruction"),
        ({"extra": {"more": [1.0]}}, "has .*more"),
    ],
)
def test_a_step_that_does_not_fit_is_left_out_and_told(tmp_path: Path, change: dict[str, Any], reason: str) -> None:
    with pytest.warns(VlacWarning, match="a step is left out"), Recorder(tmp_path / "d", FPS) as recorder:
        recorder.step(**step(0, 0))
        recorder.step(**(step(0, 1) | change))
        recorder.step(**step(0, 2))
        wait_for(lambda: recorder.counts.refused)
        counts = recorder.close()
    assert numbers(counts)[1:] == (2, 0, 1, 1)
    assert re.search(reason, counts.reason), counts.reason
    check(tmp_path / "d", [step(0, 0), step(0, 2)])


def test_a_full_disk_ends_the_recording_and_not_the_loop(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with Recorder(tmp_path / "d", FPS) as recorder:
        recorder.step(**step(0, 0))
    monkeypatch.setattr("vlac.datasets.files.sync", lambda path: (_ for _ in ()).throw(OSError(28, "No space left")))
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        with Recorder(tmp_path / "d", FPS) as recorder:
            recorder.step(**step(1, 0))
            recorder.end_episode()
            wait_for(lambda: recorder.counts.failed)
            assert recorder.step(**step(1, 1)) is False
    assert "No space left" in recorder.counts.failed and any("has ended" in str(w.message) for w in said)
    check(tmp_path / "d", [step(0, 0)])


def test_folders_that_cannot_be_recorded_to_are_refused_at_once(tmp_path: Path) -> None:
    (tmp_path / "f").mkdir()
    (tmp_path / "f" / "x").write_text("")
    with pytest.raises(InputError, match="is no dataset"):
        Recorder(tmp_path / "f", FPS)
    with pytest.raises(InputError, match="fps=0"):
        Recorder(tmp_path / "g", 0)
    with pytest.raises(InputError, match="'image' or 'video'"):
        Recorder(tmp_path / "g", FPS, pictures="gif")
    with Recorder(tmp_path / "d", FPS) as recorder:
        recorder.step(**step(0, 0))
    with Recorder(tmp_path / "d", FPS), pytest.raises(DatasetError, match="recorded to by another"):
        Recorder(tmp_path / "d", FPS)


UNTIL_KILLED = """
import sys
sys.path[:0] = sys.argv[2:]
import test_record
from vlac.record import Recorder
from vlac.datasets import open_dataset
from vlac.errors import DatasetError
recorder = Recorder(sys.argv[1], 10)
try:
    episode = len(open_dataset(sys.argv[1]).episodes)
except DatasetError:
    episode = 0
print("ready", flush=True)
while True:
    for i in range(4):
        while not recorder.step(**test_record.step(episode, i)):
            pass
    recorder.end_episode()
    episode += 1
    print("episodes", recorder.counts.episodes, flush=True)
"""


def test_kill_9_leaves_every_committed_episode(tmp_path: Path) -> None:
    path, rng = tmp_path / "d", random.Random(3)
    command = [sys.executable, "-W", "ignore", "-c", UNTIL_KILLED, str(path), str(ROOT), str(ROOT / "tests")]
    before = 0
    for _ in range(3):
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
            assert process.stdout is not None and process.stdout.readline() == "ready\n"
            said = 0
            while said < 2:
                said = int(process.stdout.readline().split()[1])
            time.sleep(rng.random() * 0.3)
            os.kill(process.pid, signal.SIGKILL)
            for line in process.stdout.readlines():
                said = int(line.split()[1])
        with open_dataset(path) as dataset:
            count = len(dataset.episodes)
            assert count >= before + said, "an episode that was counted is there"
            assert all(e.length == 4 for e in dataset.episodes)
        check(path, [step(e, i) for e in range(count) for i in range(4)])
        before = count
    with Recorder(path, FPS):
        pass
    assert not [p for p in path.rglob("*") if UNFINISHED in p.name]
