"""Does it matter? Success of a policy in closed loop: paired seeds, fixed noise, chunk replay, optional latency.

`rollout` runs any policy in any `World`; `evaluate` runs artifacts and checkpoints over many episodes, in several
processes where there are cores, and states success with its interval, alone or against a reference on the same ones.
"""

from __future__ import annotations

import math
import multiprocessing
import signal
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from vlac import machine, metrics
from vlac.drivers import Driver, Observation, Policy, open_driver
from vlac.environments import Adapter, World, open_world
from vlac.errors import EngineError, InputError
from vlac.facts import is_artifact
from vlac.registry import Progress, silent
from vlac.statistics import mcnemar_exact, paired, wilson

__all__ = ["Episode", "Plan", "evaluate", "mcnemar_exact", "rollout", "wilson"]

NpArray = np.ndarray[Any, Any]

CONTROLS = ("none", "shuffled", "blank")
"""What a policy must not get along without: "shuffled" tells it another episode's instruction, which asks for something
else; "blank" shows it black pictures. Success is judged by the true instruction."""
WARM, TIMED = 2, 8
"""Chunks made, and chunks timed, for `--delay measured`."""


@dataclass(frozen=True)
class Episode:
    """What happened in one episode.

    success: at some step the environment said so; the episode ends there. steps: taken until then, or to the end.
    jerk: of the executed actions (metrics.jerk; None below 4 steps). act_ms: every inference, wall time.
    """

    seed: int
    success: bool
    steps: int
    task: str
    goal: str
    told: str
    jerk: float | None
    act_ms: tuple[float, ...]


@dataclass(frozen=True)
class Plan:
    """How a policy is replayed: rows of a chunk per inference, and how many control steps an inference takes.

    An observation is taken every max(n_action_steps, delay) steps. Its chunk arrives `delay` steps later; until then
    the robot goes on along the old chunk, past n_action_steps if it must, and holds when that ends. Row i of a chunk is
    meant for the i-th step after its observation: rows whose time has passed are dropped. The first chunk of an episode
    is waited for before the clock starts.
    rtc: each chunk goes on from what is left of the one before (real-time chunking, vlac.runtime.rtc); guidance:
    arguments of `Session.act` in place of `vlac.runtime.rtc.closed_loop`.
    """

    n_action_steps: int
    delay: int = 0
    rtc: bool = False
    guidance: Mapping[str, Any] = field(default_factory=dict)

    @property
    def period(self) -> int:
        """Steps between two observations."""
        return max(self.n_action_steps, self.delay)


Watch = Callable[[World, int], None]


def rollout(
    policy: Policy,
    env_factory: Callable[[], World],
    seeds: Sequence[int],
    n_action_steps: int,
    *,
    delay: int = 0,
    control: str = "none",
    progress: Progress = silent,
) -> list[Episode]:
    """One episode per seed, in this process.

    Args:
        policy: `act(observation) -> [N, A]`; observations have images (uint8 [H, W, 3] by camera key), state (float32
            [d] or None), task, and "moment" = (seed, step), from which noise should be drawn.
        env_factory: opens the world, once (`environments.push_cubes`, or `environments.opener(adapter)`).
        n_action_steps: rows of a chunk that are executed before asking again.
        delay: control steps that an inference takes; see `Plan`.
        control: see CONTROLS.
    """
    world = env_factory()
    try:
        told = instructions(world, seeds, control)
        episodes = []
        for i, seed in enumerate(seeds):
            progress("episodes", i, len(seeds))
            episodes.append(run_episode(policy, world, seed, Plan(n_action_steps, delay), told.get(seed), control))
        progress("episodes", len(seeds), len(seeds))
        return episodes
    finally:
        world.close()


def run_episode(
    policy: Policy,
    world: World,
    seed: int,
    plan: Plan,
    told: str | None = None,
    control: str = "none",
    watch: Watch | None = None,
) -> Episode:
    """One episode; `told` replaces the instruction the policy hears, `watch` is called before the first step and after
    every one.

    Raises InputError when the policy's actions are not what the environment takes.
    """
    times: list[float] = []
    executed: list[NpArray] = []
    observation = world.reset(seed)
    task, goal = world.task, world.goal

    def ask(step: int) -> NpArray:
        seen = {**observation, "task": told or task, "moment": (seed, step)}
        if control == "blank":
            seen["images"] = {k: np.zeros_like(v) for k, v in seen["images"].items()}
        if plan.rtc and step:
            seen |= {"replayed": (step - began, plan.delay), "rtc": plan.guidance}
        started = time.perf_counter()
        chunk = np.asarray(policy.act(seen), dtype=np.float32)
        times.append((time.perf_counter() - started) * 1e3)
        _fits(chunk, plan, world)
        return chunk

    began = 0
    chunk = ask(0)
    coming: tuple[NpArray, int] | None = None
    success = ended = False
    step = 0
    if watch is not None:
        watch(world, step)
    while not success and not ended and step < world.max_steps:
        # what arrives now makes room for the next question; without delay that is answered at once
        if coming is not None and step >= coming[1] + plan.delay:
            (chunk, began), coming = coming, None
        if step and step % plan.period == 0:
            coming = (ask(step), step)
            if not plan.delay:
                (chunk, began), coming = coming, None
        row = step - began
        executed.append(chunk[row] if row < len(chunk) else _held(executed, world))
        observation, success, ended = world.step(executed[-1])
        step += 1
        if watch is not None:
            watch(world, step)
    return Episode(seed, success, step, task, goal, told or task, metrics.jerk(np.stack(executed)), tuple(times))


def _held(executed: Sequence[NpArray], world: World) -> NpArray:
    return executed[-1] if world.adapter.hold == "last" else np.zeros_like(executed[-1])


def _fits(chunk: NpArray, plan: Plan, world: World) -> None:
    if chunk.ndim != 2 or chunk.shape[1] != world.action_dim:
        raise InputError(
            f"{world.adapter.env} takes {world.action_dim} actions a step, the policy answers {list(chunk.shape)}",
            remedy="this policy was trained for another robot",
        )
    if plan.n_action_steps > len(chunk):
        raise InputError(f"n_action_steps {plan.n_action_steps}: the policy's chunks have {len(chunk)} rows")


def instructions(world: World, seeds: Sequence[int], control: str) -> dict[int, str]:
    """Seed -> the instruction to tell instead of the true one; empty unless control is "shuffled".

    Each episode is told the instruction of another one that asks for something else, chosen by its own seed.
    """
    if control not in CONTROLS:
        raise InputError(f"control {control!r}; there are {', '.join(CONTROLS)}")
    if control != "shuffled":
        return {}
    asked = {}
    for seed in seeds:
        world.reset(seed)
        asked[seed] = (world.goal, world.task)
    told = {}
    for seed, (goal, _) in asked.items():
        others = sorted({task for other, task in asked.values() if other != goal})
        if not others:
            raise InputError(
                "--control shuffled: no episode asks for anything else",
                remedy="take more episodes; an environment with one instruction has no such control",
            )
        told[seed] = others[int(np.random.Generator(np.random.PCG64([17, seed])).integers(len(others)))]
    return told


# --- many episodes ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Run:
    """Everything that a process needs to run episodes of one policy."""

    path: str
    adapter: Adapter
    plan: Plan
    control: str
    engine: str | None
    threads: int | None
    told: Mapping[int, str]


_HERE: dict[str, Any] = {}
"""What a worker process keeps open: run, driver, world."""


def _open(run: Run) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent hears it and ends the pool
    _HERE.update(
        run=run, driver=open_driver(run.path, run.engine, run.threads or 1), world=open_world(run.adapter), error=None
    )


def _one(seed: int) -> Episode:
    run: Run = _HERE["run"]
    return run_episode(_HERE["driver"], _HERE["world"], seed, run.plan, run.told.get(seed), run.control)


def run_all(run: Run, seeds: Sequence[int], workers: int, progress: Progress, what: str) -> list[Episode]:
    """Episodes of `seeds`, in order, in `workers` processes (1: in this one). The number changes no result."""
    episodes = []
    with _mapped(run, seeds, workers) as results:
        progress(what, 0, len(seeds))
        for i, episode in enumerate(results):
            episodes.append(episode)
            progress(what, i + 1, len(seeds))
    return episodes


@contextmanager
def _mapped(run: Run, seeds: Sequence[int], workers: int) -> Iterator[Iterator[Episode]]:
    if workers == 1:
        driver, world = open_driver(run.path, run.engine, run.threads or 1), open_world(run.adapter)
        try:
            yield (run_episode(driver, world, s, run.plan, run.told.get(s), run.control) for s in seeds)
        finally:
            world.close()
            driver.close()
        return
    # fresh processes: engines keep threads and locks that a fork would copy half
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(min(workers, len(seeds)), mp_context=context, initializer=_open, initargs=(run,))
    try:
        yield pool.map(_one, seeds)
    except BrokenProcessPool as error:
        raise EngineError(
            f"a process that ran {run.path} ended: {error}", remedy="--workers 1 shows why in this process"
        ) from None
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def evaluate(
    path: str | Path,
    adapter: Adapter,
    *,
    against: str | Path | None = None,
    episodes: int = 50,
    seed: int = 0,
    n_action_steps: int | None = None,
    delay: float | str | None = None,
    control: str = "none",
    engine: str | None = None,
    threads: int | None = None,
    workers: int = 1,
    pictures: Path | None = None,
    rtc: bool = False,
    guidance: Mapping[str, Any] | None = None,
    progress: Progress = silent,
) -> dict[str, Any]:
    """Success of an artifact (or checkpoint) over episodes `seed`, seed + 1, ...

    Args:
        against: another artifact or checkpoint: the same episodes with the same noise, for a paired difference.
        n_action_steps: rows executed per chunk; None = as the policy says, and with rtc under latency no more than the
            delay: the next inference begins when the last one's chunk is there.
        delay: milliseconds an inference takes on the robot's clock; "measured" = the median measured here first.
        engine: of `path`; `against` takes its best.
        threads: of each engine; None = 1, so that the number of workers changes no result.
        workers: processes. More than 1 needs a main module that can be imported (`if __name__ == "__main__":`).
        pictures: folder for a GIF and a PNG strip of the first episode that succeeded and the first that failed.

        rtc: real-time chunking, of `path` and of `against`, with the adapter's `displacements`; guidance: see `Plan`.

    Returns: the report as JSON values. Raises VlacError for what cannot be run.
    """
    seeds = range(seed, seed + episodes)
    _check_seeds(adapter, seeds)
    for given in (path, against) if rtc else ():
        if given is not None and not is_artifact(given):
            raise InputError(f"--rtc: {given} is a checkpoint, and only artifacts are guided", remedy="compile it")
    driver, world = open_driver(path, engine, threads or 1), open_world(adapter)
    try:
        facts = {**driver.facts, **_kind(path)}
        waited = _delay(delay, driver, world, seeds, progress)
        steps = math.ceil(waited["ms"] * world.fps / 1e3)
        n = n_action_steps or min(driver.io.n_action_steps, steps if rtc and steps else driver.io.n_action_steps)
        handed = {"displacements": adapter.displacements} if adapter.displacements else {}
        plan = Plan(n, steps, rtc, {**handed, **(guidance or {})} if rtc else {})
        _fits(np.zeros((driver.io.chunk_size, driver.io.action_dim)), plan, world)
        told = instructions(world, seeds, control)
        fps, longest = world.fps, world.max_steps
    finally:
        world.close()
        driver.close()
    run = Run(str(path), adapter, plan, control, engine, threads, told)
    mine = run_all(run, seeds, workers, progress, f"episodes of {Path(path).name}")
    report: dict[str, Any] = {
        "environment": adapter.env,
        "artifact": str(path),
        **facts,
        "episodes": episodes,
        "seeds": [seeds[0], seeds[-1]],
        "n_action_steps": n,
        "rtc": rtc,
        "displacements": list(plan.guidance.get("displacements", ())),
        "control": control,
        "control_hz": fps,
        "max_steps": longest,
        "delay": {**waited, "steps": plan.delay},
        **summary(mine),
        "not_said": NOT_SAID,
    }
    if against is not None:
        other = Run(str(against), adapter, plan, control, None, threads, told)
        theirs = run_all(other, seeds, workers, progress, f"episodes of {Path(against).name}")
        report["against"] = {"artifact": str(against), **_facts_of(against), **summary(theirs)}
        report["paired"] = comparison(mine, theirs)
    if pictures is not None:
        from vlac.episode_pictures import draw_both

        report["pictures"] = draw_both(run, mine, pictures, progress)
    return report


NOT_SAID = [
    "success in this simulator is not success on a robot",
    "the interval covers other starts of this task, not other tasks",
]


def _check_seeds(adapter: Adapter, seeds: range) -> None:
    if not seeds or seeds[0] < 0:
        raise InputError(f"{len(seeds)} episodes from seed {seeds.start}: at least one, from seed 0 on")
    if adapter.unseen_below is not None and seeds[-1] >= adapter.unseen_below:
        raise InputError(
            f"seeds {seeds[0]}..{seeds[-1]}: unseen starts are 0..{adapter.unseen_below - 1}",
            remedy="seeds beyond are kept for training",
        )


def _kind(path: str | Path) -> dict[str, Any]:
    """Size and hash of an artifact; of a checkpoint nothing."""
    from vlac.artifact import open_artifact
    from vlac.bench import fingerprint

    if not is_artifact(path):
        return {}
    known = fingerprint(open_artifact(path))
    return {"bytes": known["bytes"], "sha256": known["sha256"]}


def _facts_of(path: str | Path) -> dict[str, Any]:
    driver = open_driver(path)
    try:
        return {**driver.facts, **_kind(path)}
    finally:
        driver.close()


def _delay(
    delay: float | str | None, driver: Driver, world: World, seeds: Sequence[int], progress: Progress
) -> dict[str, Any]:
    if delay is None:
        return {"ms": 0.0, "from": "none: the robot waits for each chunk"}
    if delay == "measured":
        machine.refuse_emulated()
        progress("measuring the latency", 0, 0)
        return {"ms": latency_ms(driver, world, seeds), "from": f"median of {TIMED} chunks measured here"}
    if isinstance(delay, str) or not (0 <= delay < 1e6):
        raise InputError(f"--delay {delay!r}: milliseconds, or 'measured'")
    return {"ms": float(delay), "from": "given"}


def latency_ms(policy: Policy, world: World, seeds: Sequence[int]) -> float:
    """Median wall time of a chunk in milliseconds, each on the first observation of another episode where there are."""
    times: list[float] = []
    for i in range(WARM + TIMED):
        seed = seeds[i % len(seeds)]
        seen: Observation = {**world.reset(seed), "moment": (seed, i)}
        started = time.perf_counter()
        policy.act(seen)
        times.append((time.perf_counter() - started) * 1e3)
    return statistics.median(times[WARM:])


# --- figures ---------------------------------------------------------------------------------------------------


def rate(successes: Sequence[bool]) -> dict[str, Any]:
    """Count, rate and 95 % Wilson interval."""
    k, n = sum(successes), len(successes)
    low, high = wilson(k, n)
    return {"count": k, "of": n, "rate": k / n, "low": low, "high": high}


def summary(episodes: Sequence[Episode]) -> dict[str, Any]:
    """What a run of episodes says, and every episode."""
    goals = sorted({e.goal for e in episodes})
    tasks = sorted({e.task for e in episodes})
    calls = [ms for e in episodes for ms in e.act_ms]
    return {
        "success": rate([e.success for e in episodes]),
        "mean_steps": _mean([e.steps for e in episodes]),
        "mean_steps_succeeded": _mean([e.steps for e in episodes if e.success]),
        "jerk": _mean([e.jerk for e in episodes if e.jerk is not None]),
        "act_ms_median": statistics.median(calls),
        "inferences": len(calls),
        "by_goal": [{"goal": g, **_part([e for e in episodes if e.goal == g])} for g in goals],
        "by_instruction": [{"instruction": t, **_part([e for e in episodes if e.task == t])} for t in tasks],
        "rows": [{k: v for k, v in asdict(e).items() if k != "act_ms"} for e in episodes],
    }


def _part(episodes: Sequence[Episode]) -> dict[str, Any]:
    return {**rate([e.success for e in episodes]), "mean_steps": _mean([e.steps for e in episodes])}


def _mean(values: Sequence[float]) -> float | None:
    return statistics.fmean(values) if values else None


def comparison(mine: Sequence[Episode], theirs: Sequence[Episode]) -> dict[str, Any]:
    """Paired counts, difference of the success rates with its interval, McNemar's exact p."""
    table = paired([e.success for e in mine], [e.success for e in theirs])
    low, high = table.interval()
    return {**asdict(table), "difference": table.difference, "low": low, "high": high, "p": table.p}
