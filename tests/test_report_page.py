"""The HTML report: what it is made of, what it says and does not say, and how it looks in a real browser."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import open_golden

import vlac
from vlac import cli, report_figures
from vlac.errors import InputError
from vlac.report_data import Entry, collect, kind_of, labels
from vlac.report_figures import Axis, Point, depth, front, heat_map, plane
from vlac.report_page import render, unproved
from vlac.statistics import Paired, wilson

ROOT = Path(__file__).resolve().parents[1]
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
pytestmark = pytest.mark.filterwarnings("ignore:the task is longer")


# --- pictures --------------------------------------------------------------------------------------------------

X, Y = Axis("x", str, less=True), Axis("y", str, less=False)


def at(label: str, x: float, y: float) -> Point:
    return Point(label, x, y, 1.0, 0)


def test_the_front_is_what_nothing_else_beats() -> None:
    points = [at("fast", 1, 0.5), at("good", 3, 0.9), at("beaten", 4, 0.8), at("slow", 5, 0.95), at("worse", 3, 0.7)]
    assert [p.label for p in front(points, X, Y)] == ["fast", "good", "slow"]
    twins = [at("a", 1, 1), at("b", 1, 1)]
    assert front(twins, X, Y) == twins


def test_names_of_points_do_not_lie_on_one_another() -> None:
    points = [at(f"artifact-{i}", 10 + i % 2, 0.9 + 0.001 * i) for i in range(8)]
    svg = plane(points, X, Y, "p", "t")
    found = re.findall(r'class="name" x="([\d.]+)" y="([\d.]+)">(artifact-\d)', svg)
    assert len(found) == 8
    rows = [(float(x), float(y)) for x, y, _ in found]
    for i, (x, y) in enumerate(rows):
        for a, b in rows[:i]:
            assert abs(y - b) > 11 or abs(x - a) > 7 * len("artifact-0"), (rows, i)
        assert 0 <= x <= report_figures.WIDTH and 0 <= y <= report_figures.HEIGHT


@pytest.mark.parametrize("values", [[0.0], [5.0], [1e-9, 1.0], [3.0, 3.0], [1e6, 2e6]])
def test_axes_hold_every_value_and_have_round_ticks(values: list[float]) -> None:
    for axis in (Axis("x", str, less=True), Axis("x", str, less=True, log=True)):
        if axis.log and min(values) <= 0:
            continue
        span = axis.span(values)
        assert all(0 <= axis.place(v, span) <= 1 for v in values)
        assert 1 <= len(axis.ticks(span)) <= 7


def test_heat_deepens_with_drift_and_says_the_worst() -> None:
    assert [depth(v) for v in (0, 1e-4, 1e-1, 1.0, float("nan"))] == [0, 0, 1, 1, 1]
    values = np.full((10, 2), 1e-3)
    values[7, 1] = 0.04
    svg = heat_map(values.tolist(), ["arm", "<b>&gripper"], 5, "h", "t")
    assert svg.count("<rect") == 20 and 'class="cut"' in svg
    assert "worst: &lt;b&gt;&amp;gripper at step 7, 4 % of its range" in svg and "<b>" not in svg


# --- what it is made of ------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def artifacts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("report")
    checkpoint = open_golden(ROOT / "tests" / "golden" / "smolvla_tiny").checkpoint
    vlac.compile(checkpoint, target="gguf-q8", out=folder / "q8", goldens=1)
    vlac.compile(checkpoint, target="onnx-fp32", out=folder / "fp32", passes=["flow-steps:steps=2"], goldens=1)
    return folder


@pytest.fixture(scope="module")
def measured(artifacts: Path) -> list[Entry]:
    return collect([artifacts / "q8", artifacts / "fp32"], runs=2)


def closed_loop(k: int, only_first: int, only_second: int) -> dict[str, Any]:
    """A result as `vlac eval --save` writes it, for counts that a test chooses: what the page says about them."""
    low, high = wilson(k, 400)
    success = {"count": k, "of": 400, "rate": k / 400, "low": low, "high": high}
    table = Paired(k - only_first, only_first, only_second, 400 - k - only_second)
    ends = dict(zip(("low", "high"), table.interval(), strict=True))
    return {
        "environment": "vlac/PushCubes-v0",
        "artifact": "out",
        "sha256": "",
        "control": "none",
        "success": success,
        "rows": [],
        "seeds": [0, 399],
        "n_action_steps": 8,
        "control_hz": 10.0,
        "mean_steps": 41.5,
        "jerk": 0.01,
        "delay": {"ms": 0.0, "from": "none", "steps": 0},
        "by_goal": [
            {"goal": f"{c} {d}", **success, "mean_steps": 40.0} for c in ("red", "blue") for d in ("up", "down")
        ],
        "paired": {"difference": table.difference, "p": table.p, **ends},
        "against": {"artifact": "push-cubes"},
    }


def test_labels_are_as_short_as_they_can_be() -> None:
    assert labels([Path("a/out"), Path("b/out.gguf")]) == ["a/out", "b/out"]
    assert labels([Path("a/x"), Path("b/y")]) == ["x", "y"]


def test_saved_results_are_matched_by_what_they_measured(artifacts: Path, tmp_path: Path, capsys: Any) -> None:
    saved = {}
    for kind, options in (("parity", ()), ("bench", ("--runs", "2"))):
        saved[kind] = tmp_path / f"{kind}.json"
        with pytest.raises(SystemExit):
            cli.app([kind, str(artifacts / "q8"), "--quiet", "--save", str(saved[kind]), *options])
        assert kind_of(json.loads(saved[kind].read_text())) == kind
    capsys.readouterr()
    given = [saved["bench"], saved["parity"]]
    q8, fp32 = collect([artifacts / "q8", artifacts / "fp32"], given, timed=False)
    assert q8.bench == json.loads(saved["bench"].read_text()) and q8.parity == json.loads(saved["parity"].read_text())
    assert fp32.bench is None and fp32.parity is not None
    with pytest.raises(InputError, match="another artifact"):
        collect([artifacts / "fp32"], given, timed=False)
    (tmp_path / "x.json").write_text("{}")
    with pytest.raises(InputError, match="no result of"):
        collect([artifacts / "fp32"], [tmp_path / "x.json"], timed=False)
    with pytest.raises(InputError, match="given twice"):
        collect([artifacts / "q8", artifacts / "q8"], timed=False)


# --- the page ----------------------------------------------------------------------------------------------------


class Checked(HTMLParser):
    """Every tag is closed, every id is there once, everything named by a reference exists, nothing is fetched."""

    VOID = ("meta", "img", "br", "rect", "circle", "path", "polyline")

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.ids: list[str] = []
        self.named: list[str] = []
        self.words: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag not in self.VOID:
            self.open.append(tag)
        for key, value in attrs:
            assert not key.startswith("on"), f"script in {tag}"
            if key == "id":
                self.ids.append(value or "")
            if key == "aria-labelledby":
                self.named += (value or "").split()
            if key in ("src", "href"):
                assert value and value.startswith(("data:", "#")), f"{tag} fetches {value}"
        assert tag not in ("script", "link", "iframe")
        assert tag != "img" or dict(attrs).get("alt"), "a picture without words"

    def handle_endtag(self, tag: str) -> None:
        if tag not in self.VOID:
            assert self.open and self.open.pop() == tag, f"{tag} closes nothing"

    def handle_data(self, data: str) -> None:
        if "style" not in self.open:
            self.words.append(data)


def read(page: str) -> str:
    """The page's text, after the checks of `Checked`."""
    seen = Checked()
    seen.feed(page)
    seen.close()
    assert not seen.open, f"left open: {seen.open}"
    assert len(seen.ids) == len(set(seen.ids))
    assert set(seen.named) <= set(seen.ids)
    assert "url(" not in page and "@import" not in page
    return " ".join(" ".join(seen.words).split())


def test_the_page_says_what_was_measured_and_what_was_not(measured: list[Entry]) -> None:
    text = read(render(measured, "2026-01-01 00:00 UTC", "vlac report"))
    for entry in measured:
        assert entry.parity is not None and entry.bench is not None
        assert entry.label in text and entry.sha256 in text
    for words in ("flow-steps", "steps=2", "q8_0", "Drift over latency", "prefix", "What this report does not prove"):
        assert words in text, words
    assert "success was not measured for q8, fp32" in text
    assert "In closed loop" not in text and "Success over latency" not in text


def test_success_is_told_with_interval_pair_and_what_it_leaves_open(measured: list[Entry]) -> None:
    one, two = (Entry(**vars(e)) for e in measured)
    one.eval, two.eval = closed_loop(370, 3, 2), closed_loop(331, 5, 45)
    one.controls = [{**closed_loop(20, 0, 0), "control": "shuffled"}]
    text = read(render([one, two], "now", "vlac report"))
    for words in (
        "92.5 %",
        "370 of 400; 89.5..94.7 %",
        "+0.2 (",
        "p = 1.00",
        "-10.0 (",
        "4.21e-9",
        "red up",
        "shuffled",
    ):
        assert words in text, words
    said = " ".join(unproved([one, two]))
    assert "That q8 is as good as its reference" in said and "That fp32 is as good" not in said


def test_without_bench_and_parity_the_page_still_stands(measured: list[Entry]) -> None:
    bare = Entry("bare <script>", Path("x"), measured[0].manifest, 10, "ab")
    text = read(render([bare], "now", "vlac report"))
    assert "bare <script>" in text and "Precision census" in text and "Where the time goes" not in text


def test_the_command_writes_the_page_and_a_table(artifacts: Path, tmp_path: Path, capsys: Any) -> None:
    out = tmp_path / "deep" / "report.html"
    with pytest.raises(SystemExit) as ended:
        cli.app(["report", str(artifacts / "q8"), "--no-bench", "-o", str(out), "--quiet"])
    printed, errors = capsys.readouterr()
    assert not ended.value.code and errors == ""
    assert str(out) in printed and "q8" in printed
    assert "q8" in read(out.read_text(encoding="utf-8"))


# --- in a browser --------------------------------------------------------------------------------------------------

needs_browser = pytest.mark.skipif(CHROMIUM is None, reason="no chromium (apt-get install chromium)")


def browser(profile: Path, *args: str) -> str:
    """Runs chromium without a display; its stdout."""
    assert CHROMIUM is not None
    flags = ["--headless=new", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", f"--user-data-dir={profile}"]
    done = subprocess.run([CHROMIUM, *flags, *args], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def page(measured: list[Entry], tmp_path_factory: pytest.TempPathFactory) -> Path:
    one, two = (Entry(**vars(e)) for e in measured)
    one.eval, two.eval = closed_loop(370, 3, 2), closed_loop(331, 5, 45)
    path = tmp_path_factory.mktemp("page") / "report.html"
    path.write_text(render([one, two], "now", "vlac report"), encoding="utf-8")
    return path


@needs_browser
@pytest.mark.slow
@pytest.mark.parametrize(("width", "dark"), [(390, False), (390, True), (1280, False)])
def test_a_browser_draws_it(page: Path, tmp_path: Path, width: int, dark: bool) -> None:
    from PIL import Image

    shot = tmp_path / "shot.png"
    scheme = ["--force-dark-mode", "--blink-settings=preferredColorScheme=0"] if dark else []
    browser(tmp_path / "p", *scheme, f"--window-size={width},2000", f"--screenshot={shot}", page.as_uri())
    picture = np.asarray(Image.open(shot).convert("RGB"))
    assert picture.shape[1] == width
    ground = picture[:4, :4].reshape(-1, 3).mean()
    assert (ground < 60) if dark else (ground > 200)
    for part in np.array_split(picture, 4):  # text and colour from top to bottom
        assert len(np.unique(part.reshape(-1, 3), axis=0)) > 50
        assert (np.abs(part.astype(int) - int(ground)).max(axis=2) > 60).mean() > 0.01
    coloured = picture.max(axis=2).astype(int) - picture.min(axis=2) > 60
    assert coloured.mean() > 0.005, "bars and points have lost their colours"


@needs_browser
@pytest.mark.slow
@pytest.mark.parametrize("width", [390, 820, 1280])
def test_nothing_sticks_out_sideways(page: Path, tmp_path: Path, width: int) -> None:
    script = "<script>document.title = document.documentElement.scrollWidth + ' of ' + innerWidth</script></body>"
    probe = tmp_path / "probe.html"
    text = re.sub(r'<meta http-equiv="Content-Security-Policy"[^>]*>', "", page.read_text(encoding="utf-8"))
    probe.write_text(text.replace("</body>", script), encoding="utf-8")
    seen = browser(tmp_path / "p", f"--window-size={width},2000", "--dump-dom", probe.as_uri())
    found = re.search(r"<title>(\d+) of (\d+)</title>", seen)
    assert found is not None and int(found[1]) <= int(found[2]), found and found[0]
