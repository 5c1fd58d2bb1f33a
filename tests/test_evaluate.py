"""Closed-loop evaluation: statistics against published figures, replay and delay step by step, controls, the command.

Nothing here pretends to succeed: the scripted expert acts in the real environment, and the bundled policy, where it is
there, acts in a few real episodes.
"""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from dataclasses import replace
from fractions import Fraction
from math import comb
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from conftest import ROOT

from vlac import cli
from vlac.environments import PUSH_CUBES, Adapter, World, named, opener, read_adapter
from vlac.errors import InputError, VlacError
from vlac.evaluate import Plan, comparison, evaluate, instructions, rollout, run_episode
from vlac.statistics import Paired, mcnemar_exact, paired, wilson

sys.path.insert(0, str(ROOT / "scripts"))
from smolvla_checkpoint import Shape, write_checkpoint

ZOO = ROOT / "vlac" / "zoo" / "push_cubes"
needs_sim = pytest.mark.skipif(
    any(importlib.util.find_spec(m) is None for m in ("gymnasium", "pymunk")),
    reason="the extra sim (gymnasium, pymunk) is not installed",
)
ALOHA, PUSHT = (importlib.util.find_spec(name) is not None for name in ("gym_aloha", "gym_pusht"))
needs_policy = pytest.mark.skipif(not (ZOO / "model.safetensors").exists(), reason="no bundled policy in vlac/zoo")


# --- statistics ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("k", "n", "low", "high"),
    [(81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0.0, 0.1611), (1, 29, 0.0061, 0.1718)],
)
def test_wilson_gives_the_published_intervals(k: int, n: int, low: float, high: float) -> None:
    """Newcombe 1998, Statistics in Medicine 17, p. 857, table I, method 3."""
    assert wilson(k, n) == pytest.approx((low, high), abs=5e-5)


def test_wilson_is_symmetric_and_holds_the_rate() -> None:
    for n in (1, 7, 400):
        for k in range(n + 1):
            low, high = wilson(k, n)
            assert 0 <= low <= k / n <= high <= 1
            assert wilson(n - k, n) == pytest.approx((1 - high, 1 - low))
    assert wilson(0, 0) == (0.0, 1.0)
    with pytest.raises(InputError, match="5 successes of 4"):
        wilson(5, 4)


def test_mcnemar_is_the_exact_binomial_tail() -> None:
    assert mcnemar_exact(0, 0) == 1.0
    assert mcnemar_exact(6, 0) == pytest.approx(2 / 64)
    assert mcnemar_exact(1, 7) == pytest.approx(0.0703, abs=5e-5)  # Fagerland et al. 2013, BMC Med. Res. Meth. 13:91
    assert mcnemar_exact(6, 16) == pytest.approx(0.0525, abs=5e-5)
    for b in range(12):
        for c in range(12):
            n = b + c
            tail = sum(Fraction(comb(n, i), 2**n) for i in range(min(b, c) + 1))
            assert mcnemar_exact(b, c) == pytest.approx(float(min(Fraction(1), 2 * tail)))
            assert mcnemar_exact(b, c) == mcnemar_exact(c, b)


@pytest.mark.parametrize(
    ("table", "low", "high"),
    [
        (Paired(36, 12, 2, 0), 0.0569, 0.3404),
        (Paired(54, 0, 0, 0), -0.0664, 0.0664),
        (Paired(0, 30, 0, 0), 0.8395, 1.0),
    ],
)
def test_newcombe_gives_the_published_intervals(table: Paired, low: float, high: float) -> None:
    """Newcombe 1998, Statistics in Medicine 17, p. 2635, method 10; limits at the edges among them."""
    assert table.interval() == pytest.approx((low, high), abs=6e-5)


def test_pairs_are_counted_in_order() -> None:
    first, second = [True, True, False, False, True], [True, False, True, False, False]
    assert paired(first, second) == Paired(both=1, only_first=2, only_second=1, neither=1)
    assert paired(first, second).difference == pytest.approx(0.2)
    with pytest.raises(InputError, match="cannot be paired"):
        paired(first, second[1:])


# --- replay and delay, on an environment that only writes down ---------------------------------------------------


class Tape:
    """Gymnasium's interface; remembers what it was given. The observation is the number of the step."""

    metadata = {"render_fps": 10}  # noqa: RUF012
    action_space = SimpleNamespace(shape=(1,))

    def __init__(self, length: int) -> None:
        self.length, self.actions = length, []
        self.unwrapped = self
        self.max_steps = length

    def reset(self, seed: int) -> tuple[dict[str, Any], dict[str, Any]]:
        self.actions = []
        return self._seen(), {}

    def step(self, action: Any) -> tuple[dict[str, Any], float, bool, bool, dict[str, Any]]:
        self.actions.append(float(action[0]))
        return self._seen(), 0.0, False, len(self.actions) >= self.length, {"is_success": False}

    def _seen(self) -> dict[str, Any]:
        return {"step": np.array([len(self.actions)]), "eye": np.full((2, 2, 3), 7, np.uint8)}

    def close(self) -> None:
        pass


class Numbers:
    """Row i of the chunk for step s is 100 s + i + 1: an executed action tells its observation and its row."""

    def __init__(self, rows: int) -> None:
        self.rows, self.asked, self.seen = rows, [], []

    def act(self, observation: dict[str, Any]) -> np.ndarray[Any, Any]:
        step = int(observation["state"][0])
        self.asked.append(step)
        self.seen.append(observation)
        return np.array([[100 * step + i + 1] for i in range(self.rows)], np.float32)


def tape(length: int, hold: str = "zero") -> World:
    return World(Adapter("tape", {"eye": "eye"}, ("step",), task="go", hold=hold), Tape(length))


def replayed(rows: int, plan: Plan, length: int = 9, hold: str = "zero") -> tuple[list[float], list[int]]:
    policy, world = Numbers(rows), tape(length, hold)
    run_episode(policy, world, 5, plan)
    return world.env.actions, policy.asked


def test_without_delay_each_chunk_is_replayed_from_its_first_row() -> None:
    actions, asked = replayed(rows=4, plan=Plan(3))
    assert actions == [1, 2, 3, 301, 302, 303, 601, 602, 603]
    assert asked == [0, 3, 6]


def test_while_a_chunk_is_coming_the_old_one_goes_on_and_late_rows_are_dropped() -> None:
    actions, asked = replayed(rows=6, plan=Plan(3, delay=2))
    assert actions == [1, 2, 3, 4, 5, 303, 304, 305, 603]
    assert asked == [0, 3, 6]


def test_a_chunk_that_ends_too_early_leaves_the_robot_holding() -> None:
    assert replayed(rows=3, plan=Plan(3, delay=2))[0] == [1, 2, 3, 0, 0, 303, 0, 0, 603]
    assert replayed(rows=3, plan=Plan(3, delay=2), hold="last")[0] == [1, 2, 3, 3, 3, 303, 303, 303, 603]


def test_with_rtc_the_policy_is_told_how_far_the_robot_is() -> None:
    for plan, want in ((Plan(3, delay=2, rtc=True), [None, (3, 2), (3, 2)]), (Plan(3, delay=2), [None] * 3)):
        policy = Numbers(6)
        run_episode(policy, tape(9), 5, plan)
        assert [seen.get("replayed") for seen in policy.seen] == want


def test_an_inference_longer_than_the_replay_sets_the_pace() -> None:
    actions, asked = replayed(rows=8, plan=Plan(2, delay=4))
    assert asked == [0, 4, 8]
    assert actions == [1, 2, 3, 4, 5, 6, 7, 8, 405]


def test_noise_depends_on_seed_and_step_only_and_blank_is_black() -> None:
    policy = Numbers(4)
    (episode,) = rollout(policy, lambda: tape(9), [5], 4, control="blank")
    assert [o["moment"] for o in policy.seen] == [(5, 0), (5, 4), (5, 8)]
    assert all(not o["images"]["eye"].any() for o in policy.seen)
    assert (episode.success, episode.steps) == (False, 9)


def test_actions_that_do_not_fit_are_refused() -> None:
    class Wide:
        def act(self, observation: dict[str, Any]) -> np.ndarray[Any, Any]:
            return np.zeros((4, 6))

    with pytest.raises(InputError, match="takes 1 actions a step, the policy answers"):
        run_episode(Wide(), tape(3), 0, Plan(1))
    with pytest.raises(InputError, match="chunks have 4 rows"):
        run_episode(Numbers(4), tape(3), 0, Plan(5))
    with pytest.raises(InputError, match="no episode asks for anything else"):
        instructions(tape(3), range(4), "shuffled")


# --- adapters --------------------------------------------------------------------------------------------------


def test_an_adapter_is_read_from_json_and_yaml(tmp_path: Path) -> None:
    given = {"cameras": {"observation.image": "pixels"}, "state": "agent_pos", "task": "push it", "fps": 10}
    (tmp_path / "a.json").write_text(json.dumps(given))
    (tmp_path / "a.yaml").write_text(
        "cameras: {observation.image: pixels}\nstate: [agent_pos]\ntask: push it\nfps: 10\n"
    )
    one, two = read_adapter(tmp_path / "a.json", "x"), read_adapter(tmp_path / "a.yaml", "x")
    assert one == two == Adapter("x", {"observation.image": "pixels"}, ("agent_pos",), task="push it", fps=10.0)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"cameras": {}, "task": "a", "sucess": "x"}, "unknown key 'sucess'"),
        ({"cameras": ["pixels"], "task": "a"}, "cameras must map"),
        ({"cameras": {}}, "either task"),
        ({"cameras": {}, "task": "a", "task_from": "b"}, "either task"),
        ({"cameras": {}, "task": "a", "hold": "still"}, "expected last or zero"),
        ({"cameras": {}, "task": "a", "fps": -1}, "positive number"),
        ({"cameras": {}, "task": "a", "max_steps": 1.5}, "positive number"),
        ({"cameras": {}, "task": "a", "state": {"a": 1}}, "expected a list of texts"),
        ([], "not a mapping"),
    ],
)
def test_an_adapter_that_does_not_fit_is_refused_by_key(tmp_path: Path, given: Any, message: str) -> None:
    (tmp_path / "a.json").write_text(json.dumps(given))
    with pytest.raises(InputError, match=message):
        read_adapter(tmp_path / "a.json", "x")


def test_environments_are_named() -> None:
    assert named("push-cubes", None) is PUSH_CUBES
    for wrong in ("push-spheres", "gym:", "gym"):
        with pytest.raises(InputError, match="no environment"):
            named(wrong, None)
    with pytest.raises(InputError, match="needs --adapter"):
        named("gym:A-v0", None)


def test_the_examples_in_the_documentation_can_be_read() -> None:
    files = sorted((ROOT / "docs" / "adapters").iterdir())
    assert len(files) >= 2
    for file in files:
        assert read_adapter(file, "x").success == "is_success"


def test_an_environment_that_breaks_is_named() -> None:
    world = tape(3)
    world.env.step = lambda action: 1 / 0
    with pytest.raises(VlacError, match="tape failed in step: ZeroDivisionError"):
        run_episode(Numbers(4), world, 0, Plan(1))


def test_a_key_that_is_not_there_is_named() -> None:
    world = World(Adapter("tape", {"eye": "eyes/left"}, task="go"), Tape(3))
    with pytest.raises(InputError, match="obs has no 'eyes'; it has step, eye"):
        world.reset(0)


# --- the real environment ----------------------------------------------------------------------------------------


class Listener:
    """The scripted expert, which knows the cubes but not the task: it does what it is told, and repeats its action."""

    def __init__(self) -> None:
        from vlac.environments import push_cubes

        self.world = push_cubes()
        self.told: list[str] = []

    def open(self) -> World:
        return self.world

    def act(self, observation: dict[str, Any]) -> np.ndarray[Any, Any]:
        from vlac.sim import Expert
        from vlac.sim.push_cubes import TASKS

        env = self.world.env.unwrapped
        self.told.append(observation["task"])
        true = env.target, env.direction
        env.target, env.direction = next(k for k, v in TASKS.items() if observation["task"] in v)
        action = Expert().act(env)
        env.target, env.direction = true
        return np.stack([action] * 2)


@needs_sim
def test_the_expert_succeeds_and_with_other_peoples_instructions_fails() -> None:
    told, shuffled = Listener(), Listener()
    right = rollout(told, told.open, range(8), 1)
    wrong = rollout(shuffled, shuffled.open, range(8), 1, control="shuffled")
    assert [e.success for e in right].count(True) >= 7
    assert [e.success for e in wrong].count(True) <= 1
    assert all(a.task == b.task and a.seed == b.seed for a, b in zip(right, wrong, strict=True))
    assert all(e.told != e.task for e in wrong) and all(e.told == e.task for e in right)
    assert comparison(right, wrong)["p"] < 0.05
    assert all(e.steps == 80 for e in wrong if not e.success) and all(e.steps < 80 for e in right if e.success)


# --- artifacts, by the command -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A SmolVLA of push-cubes' shape with random weights, compiled: it runs, it does not succeed."""
    import vlac

    folder = tmp_path_factory.mktemp("cubes")
    text = {"hidden_size": 48, "intermediate_size": 88, "num_hidden_layers": 2, "num_attention_heads": 6}
    vision = {"hidden_size": 48, "intermediate_size": 80, "num_hidden_layers": 1, "num_attention_heads": 4}
    shape = Shape(
        text={**text, "num_key_value_heads": 2, "head_dim": 12},
        vision={**vision, "image_size": 64, "patch_size": 8},
        cameras={"top": (64, 64), "follow": (64, 64)},
        state_dim=4,
        action_dim=2,
        tokenizer_entries=272,
        policy={
            "chunk_size": 12,
            "n_action_steps": 8,
            "max_state_dim": 8,
            "max_action_dim": 8,
            "num_steps": 2,
            "tokenizer_max_length": 24,
        },
    )
    write_checkpoint(folder / "checkpoint", shape, 3)
    vlac.compile(folder / "checkpoint", target="onnx-fp32", out=folder / "out", goldens=1)
    return folder


@pytest.fixture
def command(capsys: pytest.CaptureFixture[str]) -> Any:
    """command("eval", ...) -> (exit code, stdout, stderr)."""

    def run(*args: Any) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as ended:
            cli.app([str(a) for a in args])
        out, err = capsys.readouterr()
        return int(ended.value.code or 0), out, err

    return run


@needs_sim
def test_eval_counts_compares_and_draws(artifact: Path, command: Any, tmp_path: Path) -> None:
    from PIL import Image

    code, out, err = command(
        *("eval", "push-cubes", artifact / "out", "--against", artifact / "checkpoint", "--episodes", 3),
        *("--seed", 7, "--n-action-steps", 4, "--delay", 150, "--workers", 1, "--pictures", tmp_path / "p"),
        *("--json", "--save", tmp_path / "r.json"),
    )
    assert (code, err) == (0, "")
    report = json.loads(out)
    assert report == json.loads((tmp_path / "r.json").read_text())
    assert (report["seeds"], report["n_action_steps"]) == ([7, 9], 4)
    assert (report["delay"]["ms"], report["delay"]["steps"]) == (150, 2)
    assert report["success"]["of"] == 3 and len(report["rows"]) == 3
    assert sum(g["of"] for g in report["by_goal"]) == sum(t["of"] for t in report["by_instruction"]) == 3
    # random weights: fp32 twice the same actions, so the same outcome and the same lengths
    theirs = report["against"]
    assert [r["steps"] for r in theirs["rows"]] == [r["steps"] for r in report["rows"]]
    assert theirs["jerk"] == pytest.approx(report["jerk"], rel=1e-3)
    pair = report["paired"]
    assert (pair["only_first"], pair["only_second"], pair["p"]) == (0, 0, 1.0)
    for episode in report["pictures"]:
        gif, strip = map(Image.open, episode["files"])
        assert gif.n_frames > 10 and strip.width == 4 * (192 + 4) - 4 and strip.height == 2 * (192 + 16)
        assert len(strip.convert("RGB").getcolors(1 << 20)) > 8, "the strip is blank"


@needs_sim
def test_the_number_of_processes_changes_no_result(artifact: Path) -> None:
    one, two = (
        evaluate(artifact / "out", PUSH_CUBES, episodes=3, workers=workers, control="shuffled") for workers in (1, 2)
    )
    assert one["rows"] == two["rows"]


@needs_sim
def test_real_time_chunking_thinks_all_the_time(artifact: Path) -> None:
    """Under latency the next inference begins when the last one's chunk is there, unless it is told otherwise."""
    for more, rows in (
        ({"delay": 300.0}, 3),
        ({"delay": 900.0}, 8),
        ({}, 8),
        ({"delay": 300.0, "n_action_steps": 5}, 5),
    ):
        report = evaluate(artifact / "out", PUSH_CUBES, episodes=1, rtc=True, **more)
        assert report["n_action_steps"] == rows, more
        pace = max(rows, report["delay"]["steps"])
        assert report["inferences"] == -(-report["rows"][0]["steps"] // pace)
    assert evaluate(artifact / "out", PUSH_CUBES, episodes=1, delay=300.0)["n_action_steps"] == 8


@needs_sim
def test_eval_refuses_what_it_cannot_do(artifact: Path, command: Any, golden: Any) -> None:
    for args, message in (
        (("push-cubes", artifact / "out", "--seed", 99_990), "unseen starts are 0..99999"),
        (("push-cubes", artifact / "out", "--delay", "soon"), "milliseconds, or 'measured'"),
        (("push-cubes", artifact / "out", "--control", "deaf"), "there are none, shuffled, blank"),
        (("push-cubes", artifact / "out", "--n-action-steps", 13), "chunks have 12 rows"),
        (("push-cubes", artifact / "nothing"), "no such folder"),
        (("push-cubes", golden("smolvla_tiny").checkpoint), "the policy answers [10, 6]"),
        (("cubes", artifact / "out"), "no environment 'cubes'"),
    ):
        code, _, err = command("eval", *args, "--episodes", 20, "--quiet")
        assert code == 2 and message in err, (args, err)


@needs_sim
def test_a_gymnasium_environment_runs_through_an_adapter_file(artifact: Path, command: Any, tmp_path: Path) -> None:
    adapter = {
        "imports": ["vlac.sim"],
        "cameras": {"observation.images.top": "pixels/top", "observation.images.follow": "pixels/follow"},
        "state": ["agent_pos"],
        "task_from": "instruction",
        "success": "success",
        "max_steps": 10,
        "options": {"image_size": 96},
    }
    (tmp_path / "a.json").write_text(json.dumps(adapter))
    where = ("eval", "gym:vlac/PushCubes-v0", artifact / "out", "--adapter", tmp_path / "a.json")
    code, out, err = command(*where, "--episodes", 2, "--workers", 1, "--json")
    assert code == 0, err or out
    assert [r["steps"] for r in json.loads(out)["rows"]] == [10, 10]


class Still:
    """Holds the joints where they are: no simulator breaks under it."""

    def act(self, observation: dict[str, Any]) -> np.ndarray[Any, Any]:
        return np.stack([observation["state"]] * 4)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("env", "file", "camera", "dims"),
    [
        pytest.param(
            *("gym_pusht/PushT-v0", "pusht.json", "observation.image", 2),
            marks=pytest.mark.skipif(not PUSHT, reason="gym-pusht is not installed (it needs pymunk 6)"),
        ),
        pytest.param(
            *("gym_aloha/AlohaTransferCube-v0", "aloha.yaml", "observation.images.top", 14),
            marks=pytest.mark.skipif(not ALOHA, reason="gym-aloha is not installed"),
        ),
    ],
)
def test_the_documented_adapters_drive_their_environments(env: str, file: str, camera: str, dims: int) -> None:
    adapter = replace(read_adapter(ROOT / "docs" / "adapters" / file, env), max_steps=12)
    seen = []

    class Watching(Still):
        def act(self, observation: dict[str, Any]) -> np.ndarray[Any, Any]:
            seen.append(observation)
            return super().act(observation)

    (episode,) = rollout(Watching(), opener(adapter), [3], 4)
    assert (episode.steps, episode.success, len(seen)) == (12, False, 3)
    assert seen[0]["images"][camera].dtype == np.uint8 and seen[0]["images"][camera].std() > 5
    assert seen[0]["state"].shape == (dims,)


LEROBOT = ROOT / ".venv-lerobot" / "bin" / "python"


@needs_sim
@needs_policy
@pytest.mark.slow
@pytest.mark.lerobot
@pytest.mark.skipif(not LEROBOT.exists(), reason="no .venv-lerobot; scripts/peers/lerobot.sh sets it up")
def test_lerobot_itself_walks_the_same_way() -> None:
    """LeRobot's loading, processors and sampling against the fp32 reference: three whole episodes, same noise."""
    script = ROOT / "benchmarks" / "push_cubes_lerobot.py"
    command = [LEROBOT, script, ZOO, "60000", "3"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stderr
    theirs, ours = json.loads(done.stdout)["rows"], evaluate("push-cubes", PUSH_CUBES, episodes=3, seed=60_000)["rows"]
    for a, b in zip(theirs, ours, strict=True):
        assert (a["seed"], a["success"], a["steps"], a["task"]) == (b["seed"], b["success"], b["steps"], b["task"])
        if b["success"]:  # rounding grows with every contact: an episode that runs to the end is not the same walk
            assert a["jerk"] == pytest.approx(b["jerk"], rel=1e-3)
    assert sum(row["success"] for row in ours) >= 2


@needs_sim
@needs_policy
@pytest.mark.slow
def test_the_bundled_policy_does_what_it_is_told() -> None:
    """24 real episodes of the fp32 reference; 90 % succeed over many, so that 17 are hardly ever missed."""
    right = evaluate("push-cubes", PUSH_CUBES, episodes=24, seed=50_000)
    wrong = evaluate("push-cubes", PUSH_CUBES, episodes=24, seed=50_000, control="shuffled")
    assert right["success"]["count"] >= 17
    assert wrong["success"]["count"] <= 6
