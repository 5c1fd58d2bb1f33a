"""Puts a trained policy into vlac/zoo/push_cubes with its card, its loss curve and 64 recorded observations.

.venv-lerobot/bin/python scripts/bundle_push_cubes.py OUT         (OUT of train_push_cubes.py, after its --eval)
"""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from push_cubes_observations import COUNT, FIRST_SEED, write

from vlac.sim import INSTRUCTIONS, TASKS, Expert, PushCubes

ROOT = Path(__file__).resolve().parents[1]
ZOO = ROOT / "vlac" / "zoo" / "push_cubes"
FIGURES = ROOT / "benchmarks" / "results" / "push_cubes_training.json"

CARD = """---
license: apache-2.0
library_name: lerobot
pipeline_tag: robotics
tags: [smolvla, push-cubes]
---
# push-cubes: a SmolVLA that pushes cubes

{millions:.2f}M parameters in LeRobot {lerobot}'s own SmolVLA layout (`SmolVLAPolicy.from_pretrained` loads this
folder from within it). It is told "{example}" and the like ({phrasings} phrasings of each of 8 tasks), sees two
64 x 64 pictures and the pusher's position and velocity, and answers with {chunk} displacements of the pusher, of which
{replay} are executed. The task is `vlac.sim.PushCubes`: simulated, two-dimensional. On real robots it is good for
nothing.

## Success
Run by LeRobot {lerobot}, fp32, {episodes} unseen starts (seeds {first}..{last}), 10 flow steps, {replay} actions of
each chunk:

| | success | 95 % interval (Wilson) |
| --- | --- | --- |
{rows}

| task | solved |
| --- | --- |
{tasks}

The scripted expert takes {expert_length:.0f} steps on average; the policy, where it succeeds, {length:.0f}.

## Recipe
Made by `scripts/train_push_cubes.py` (seed {seed}); figures in `benchmarks/results/push_cubes_training.json`.
- Data: {demonstrations} demonstrations of the scripted expert (noise on every executed action, knocks in most episodes;
  the recorded action is the expert's), then {corrections} episodes of the half-trained policy with the expert's
  actions: {frames} frames at 10 Hz, a LeRobotDataset v3. Seeds from 1 000 000 on; evaluation uses seeds below 100 000.
- Symmetries: mirrored, transposed and colour-swapped batches (16 in all); the velocity is hidden in 30 % of a batch.
- Flow matching by LeRobot's own functions, {flow_draws_per_observation} times and noises per observation; every weight
  that an action depends on is trained, from scratch. At first a probe helps (linear readings of where the cubes are
  and of what the expert does, weight falling to 0); it is thrown away.
- AdamW, rate {learning_rate}, batch {batch}, {steps} steps, {minutes} minutes on {threads} CPU core(s); what is saved
  are averaged weights (decay 0.998).
- The position ids of the 8 x 8 patches are checked to be 0..63 before training.

![loss](loss.png)

`observations/` holds 64 recorded observations of the expert at work (seeds {observed}..), for parity and calibration.
"""


def main() -> None:
    out = Path(sys.argv[1])
    training, evaluation = (
        json.loads((out / f"{n}.json").read_text(encoding="utf-8")) for n in ("training", "evaluation")
    )
    shutil.rmtree(ZOO, ignore_errors=True)
    shutil.copytree(out / "policy", ZOO, ignore=lambda folder, names: {"README.md"} & set(names))
    for file in ZOO.rglob("*"):  # safetensors come for the owner alone
        file.chmod(0o755 if file.is_dir() else 0o644)
    write(ZOO / "observations")
    (ZOO / "README.md").write_text(card(training, evaluation, expert_lengths()), encoding="utf-8")
    FIGURES.write_text(json.dumps({"training": training, "evaluation": evaluation}, indent=1) + "\n", encoding="utf-8")
    print(f"{ZOO}: {sum(f.stat().st_size for f in ZOO.rglob('*') if f.is_file()) / 1e6:.1f} MB")


def expert_lengths() -> list[int]:
    """How long the expert's episodes are, from the seeds of the recorded observations."""
    env, expert, lengths = PushCubes(), Expert(), []
    for number in range(COUNT):
        env.reset(seed=FIRST_SEED + number)
        steps, done = 0, False
        while not done:
            *_, done, late, _ = env.step(expert.act(env))
            done = done or late
            steps += 1
        lengths.append(steps)
    return lengths


def card(training: dict[str, Any], evaluation: dict[str, Any], lengths: list[int]) -> str:
    config = json.loads((ZOO / "config.json").read_text(encoding="utf-8"))
    rows = [
        f"| {name} | {one['successes']} of {evaluation['episodes']} = {100 * one['success']:.1f} % "
        f"| {100 * one['wilson95'][0]:.1f} to {100 * one['wilson95'][1]:.1f} % |"
        for name, one in evaluation.items()
        if isinstance(one, dict) and "wilson95" in one
    ]
    tasks = [f"| push {task} | {good} of {count} |" for task, (good, count) in evaluation["per_task"].items()]
    return CARD.format(
        **{k: v for k, v in training.items() if k not in ("versions", "loss")},
        millions=training["parameters"] / 1e6,
        lerobot=training["versions"]["lerobot"],
        example=INSTRUCTIONS[1],
        phrasings=len(INSTRUCTIONS) // len(TASKS),
        chunk=config["chunk_size"],
        replay=evaluation["n_action_steps"],
        episodes=evaluation["episodes"],
        first=evaluation["first_seed"],
        last=evaluation["first_seed"] + evaluation["episodes"] - 1,
        rows="\n".join(rows),
        tasks="\n".join(tasks),
        expert_length=sum(lengths) / len(lengths),
        length=evaluation["policy"]["mean_length"],
        observed=FIRST_SEED,
    )


if __name__ == "__main__":
    main()
