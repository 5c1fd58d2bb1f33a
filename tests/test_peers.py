"""Artifacts beside peers: turns, drift, contenders that fail, table and plot; peers are small scripts here."""

from __future__ import annotations

import sys
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import vlac
from vlac.errors import EngineError, InputError, VlacError
from vlac.peers import contenders as known
from vlac.peers import rounds
from vlac.peers.compare import compare, ours
from vlac.peers.contenders import BASE, Contender
from vlac.peers.figures import plot, table
from vlac.peers.rounds import changed, drift

pytestmark = pytest.mark.filterwarnings("ignore:the task is longer")

PEER = """
import json, sys, time
import numpy as np
print(json.dumps({"load_s": 0.5}), flush=True)
asked = 0
for line in sys.stdin:
    request = json.loads(line)
    with np.load(request["npz"]) as z:
        chunk = z["noise"] * 2
    if "prepared" in request:
        np.savez(request["prepared"], noise=chunk / 2)
    asked += 1
    if MODE == "dies" and asked == 2:
        sys.exit("out of luck")
    if MODE == "refuses":
        print(json.dumps({"error": "not today"}), flush=True)
        continue
    np.save(request["out"], chunk + (0.5 if MODE == "off" else 0.0))
    print(json.dumps({"wall_s": 2.0, "cpu_s": 4.0, "peak_mb": 10.0}), flush=True)
"""


def peer(folder: Path, name: str, mode: str = "", prepared: bool = False) -> Contender:
    script = folder / f"{name}.py"
    script.write_text(f"MODE = {mode!r}\n{PEER}")
    return Contender(name, command=(sys.executable, str(script)), prepared=prepared, file=script)


@pytest.fixture(scope="module")
def artifact(golden: Callable[[str], Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("peers") / "out"
    return Path(str(vlac.compile(golden("smolvla_tiny").checkpoint, "gguf-q8", out, goldens=1).path))


def test_one_run(artifact: Path, tmp_path: Path) -> None:
    others = [peer(tmp_path, BASE), peer(tmp_path, "exact", prepared=True), peer(tmp_path, "off", "off")]
    others += [peer(tmp_path, "dies", "dies"), peer(tmp_path, "refuses", "refuses")]
    others += [Contender("absent", command=(sys.executable, "-c", "raise SystemExit('no such engine')"))]
    report = compare([ours(artifact, name="ours")], tmp_path, rounds=2, threads=1, peers=others)
    rows = {r["name"]: r for r in report["rows"]}
    assert rows["exact"]["relative_l2"] == 0 and rows["exact"]["cold"]["ratio"] == {"cpu_s": 1, "wall_s": 1}
    assert rows["off"]["max_abs"] == pytest.approx(0.5) and "state" not in rows["off"]
    assert "out of luck" in rows["dies"]["failed"] and rows["refuses"]["failed"] == "not today"
    assert "no such engine" in rows["absent"]["failed"]
    mine = rows["ours"]
    assert len(mine["cold"]["wall_s"]) == 2 and mine["cold"]["ratio"]["wall_s"] < 1
    assert set(mine["of_cold"]) == {"camera", "state"} and mine["relative_l2"] > 0.1
    assert mine["cold_load_s"] > 0 and mine["private_mb"] < mine["peak_mb"] and mine["mb"] > 0.1
    assert [len(g["rows"]) for g in report["groups"]] == [7]
    text = table(report["rows"])
    assert "| ours |" in text and "dies took no part: " in text
    names = [e.text for e in ElementTree.fromstring(plot(report["rows"], "a < b")).iter() if e.tag.endswith("text")]
    assert names[0] == "a < b" and any(str(n).startswith("ours ") for n in names)


def test_groups_where_memory_does_not_hold_all(artifact: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rounds, "HELD", 1e-9)
    others = [peer(tmp_path, BASE), peer(tmp_path, "exact"), peer(tmp_path, "off", "off")]
    report = compare([ours(artifact, name="ours")], tmp_path, rounds=2, threads=1, peers=others)
    assert [g["rows"] for g in report["groups"]] == [[BASE, "exact"], [BASE, "off"], [BASE, "ours"]]
    assert [r["name"] for r in report["rows"]] == [BASE, "exact", "off", "ours"]
    assert len(report["load_average"]) == 6 and all(r["relative_l2"] is not None for r in report["rows"])


def test_a_base_that_fails_ends_the_run(artifact: Path, tmp_path: Path) -> None:
    with pytest.raises(EngineError, match="out of luck"):
        compare([ours(artifact)], tmp_path, rounds=2, threads=1, peers=[peer(tmp_path, BASE, "dies")])
    with pytest.raises(InputError, match="rounds"):
        compare([ours(artifact)], tmp_path, rounds=0)


def test_lerobot_that_is_not_set_up(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(known, "ROOT", tmp_path)
    with pytest.raises(VlacError, match="LeRobot is not set up") as error:
        known.lerobot(tmp_path)
    assert "lerobot.sh" in error.value.remedy
    assert known.ggml_compiler(tmp_path) == []
    assert known.qvac(tmp_path) == []


def test_what_a_case_keeps() -> None:
    old, new = ({"image/a": n, "image/b": n, "state": n} for n in (0, 1))
    assert changed(old, new, "camera") == {"image/a": 0, "image/b": 1, "state": 1}
    assert changed(old, new, "state") == {"image/a": 0, "image/b": 0, "state": 1}


def test_drift_is_over_common_columns() -> None:
    a = np.array([[3.0, 4.0, 9.0]], np.float32)
    assert drift(a, np.array([[3.0, 5.0]], np.float32)) == (pytest.approx(1 / np.sqrt(34)), 1.0)


def test_labels_of_the_plot_do_not_cover_each_other() -> None:
    def row(name: str, ratio: float, drift: float, mb: float | None, engine: str = "ggml") -> dict[str, Any]:
        cold = {"ratio": {"wall_s": ratio}, "wall_s": [2.0]}
        return {"name": name, "engine": engine, "mb": mb, "relative_l2": drift, "cold": cold}

    rows = [row(BASE, 1.0, 0.0, None, ""), row("slow", 7.9, 1e-2, 500.0, "")]
    rows += [row(f"form-{i}", 0.2 + 0.01 * i, 3e-2, 400.0) for i in range(6)]
    texts = [e for e in ElementTree.fromstring(plot(rows, "t")).iter() if e.tag.endswith("text")]
    labels = [e for e in texts if str(e.text).endswith(" MB")]
    boxes = [(float(e.get("x", 0)), float(e.get("y", 0)), 6 * len(str(e.text))) for e in labels]
    assert len(boxes) == 6 and any(e.text == "slow 500 MB, at 7.9" for e in texts)
    assert "7.8" not in {e.text for e in texts}  # the axis is of the others
    for i, (x, y, wide) in enumerate(boxes):
        assert not any(abs(y - b) < 12 and x < a + w and a < x + wide for a, b, w in boxes[:i])
