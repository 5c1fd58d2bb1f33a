"""Chunk queues: the answers of LeRobot's own queues to random operations, and several threads at once.

tests/golden/rtc/queues.json is written by scripts/peers/lerobot_rtc.py, with LeRobot 0.6.1.
"""

from __future__ import annotations

import json
import threading
from typing import Any

import numpy as np
import pytest
from conftest import ROOT

from vlac.errors import InputError
from vlac.runtime.chunk_queue import AGGREGATES, ChunkQueue, StepQueue

QUEUES = json.loads((ROOT / "tests" / "golden" / "rtc" / "queues.json").read_text(encoding="utf-8"))


def plain(rows: np.ndarray[Any, Any] | None) -> list[Any] | None:
    return None if rows is None else rows.tolist()


@pytest.mark.parametrize("case", QUEUES["merged"])
def test_lerobots_action_queue(case: dict[str, Any]) -> None:
    queue = ChunkQueue()
    for step in case["steps"]:
        if "merge" in step:
            raw = np.array(step["merge"], np.float32)
            if case["replace"]:
                queue.replace(raw * -2, raw, step["delay"])
            else:
                queue.append(raw * -2, raw)
        elif "clear" in step:
            queue.clear()
        else:
            assert plain(queue.get()) == step["got"]
        assert (len(queue), queue.taken) == (step["size"], step["index"])
        assert plain(queue.left()) == step["left"] and plain(queue.left_for_robot()) == step["processed"]


@pytest.mark.parametrize("case", QUEUES["aggregated"], ids=lambda c: str(c["aggregate"]))
def test_lerobots_robot_client(case: dict[str, Any]) -> None:
    queue = StepQueue(case["aggregate"])
    for step in case["steps"]:
        if "put" in step:
            queue.put(step["put"], step["first"])
        else:
            got = queue.get()
            if step["got"] is None:
                assert got is None
            else:
                assert got is not None and got[0] == step["got"][0] == queue.taken
                assert np.allclose(got[1], step["got"][1], atol=1e-6)
        assert len(queue) == step["size"]


def test_the_goldens_try_everything() -> None:
    steps = [s for c in QUEUES["merged"] for s in c["steps"]]
    assert any("clear" in s for s in steps) and any(s.get("delay", 0) < 0 for s in steps)
    assert any("merge" in s and s["delay"] > len(s["merge"]) for s in steps)
    assert {c["aggregate"] for c in QUEUES["aggregated"]} == set(AGGREGATES)


def test_what_goes_in_and_out_is_a_copy() -> None:
    queue, chunk = ChunkQueue(), np.zeros((3, 2), np.float32)
    queue.replace(chunk, chunk)
    chunk[:] = 7
    for rows in (queue.left(), queue.left_for_robot(), queue.get()):
        assert rows is not None and not rows.any()
        rows[:] = 7
    assert not np.asarray(queue.left()).any() and not np.asarray(queue.get()).any()


def test_threads_lose_and_repeat_nothing() -> None:
    """Two robots' loops take what one policy's thread appends: every action once."""
    queue, rows, got = ChunkQueue(), 4000, [[], []]  # type: ignore[var-annotated]
    done = threading.Event()

    def take(into: list[float]) -> None:
        while not (done.is_set() and not len(queue)):
            action = queue.get()
            if action is not None:
                into.append(float(action[0]))

    takers = [threading.Thread(target=take, args=(g,)) for g in got]
    for t in takers:
        t.start()
    for first in range(0, rows, 8):
        chunk = np.arange(first, first + 8, dtype=np.float32)[:, None]
        queue.append(chunk, chunk)
    done.set()
    for t in takers:
        t.join(30)
    assert sorted(got[0] + got[1]) == list(range(rows))
    assert got[0] == sorted(got[0]) and got[1] == sorted(got[1])


def test_what_does_not_fit_is_refused() -> None:
    with pytest.raises(InputError, match="weighted_average, latest_only, average, conservative"):
        StepQueue("newest")
    with pytest.raises(InputError, match=r"a chunk \[3\]"):
        StepQueue().put([1, 2, 3], 0)
    queue = ChunkQueue()
    with pytest.raises(InputError, match=r"\[3, 2\] with normalised rows \[2, 2\]"):
        queue.replace(np.zeros((3, 2)), np.zeros((2, 2)))
    queue.append(np.zeros((3, 2)), np.zeros((3, 2)))
    with pytest.raises(InputError, match="behind one with 2 columns"):
        queue.append(np.zeros((3, 1)), np.zeros((3, 2)))


def test_a_function_of_ones_own() -> None:
    queue = StepQueue(np.maximum)
    queue.put([[1.0], [5.0]], 0)
    queue.put([[3.0], [2.0], [4.0]], 0)
    assert [queue.get()[1][0] for _ in range(3)] == [3.0, 5.0, 4.0]  # type: ignore[index]
    assert queue.get() is None and queue.taken == 2
