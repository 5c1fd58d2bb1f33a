"""Trains the bundled policy vlac/zoo/push_cubes: records demonstrations, trains LeRobot's SmolVLA on them, measures it.

bash scripts/peers/lerobot.sh
.venv-lerobot/bin/python scripts/train_push_cubes.py --out /tmp/push_cubes           (about 40 minutes on one core)
.venv-lerobot/bin/python scripts/train_push_cubes.py --out /tmp/push_cubes --eval 400

Run again, it goes on where it was stopped. OUT/dataset is the LeRobotDataset, OUT/policy LeRobot's folder with the
averaged weights, OUT/training.json every figure of the training, OUT/evaluation.json those of --eval.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import sys
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(__file__).resolve().parent))

import numpy as np
import push_cubes_data as data
import push_cubes_policy as small
import push_cubes_rollout as rollout
import torch
from lerobot.policies.smolvla.modeling_smolvla import SmolVLAPolicy
from tqdm import tqdm

Stats = dict[str, dict[str, torch.Tensor]]
DRAWS = 2
"""Times and noises per observation."""
HELD = 0.6
"""Part of the training with the full learning rate."""
PROBED = 0.5
"""Weight of the readings' error at the start; it falls to nothing."""
CORRECTED = 0.45
"""Part of the training after which the policy's own episodes, with the expert's actions, join the dataset."""


class Training:
    """The weights being trained, their running average, the optimiser and what was seen so far; saved as one file."""

    def __init__(self, args: argparse.Namespace):
        self.args, self.file = args, args.out / "training.pt"
        small.write_backbone(args.out / "base")
        self.policy = small.new_policy(args.out / "base", args.seed).train()
        vision = self.policy.model.vlm_with_expert.get_vlm_model().vision_model
        for layer in vision.encoder.layers:  # the same attention, faster backwards at these sizes
            layer.self_attn.config._attn_implementation = "eager"
        self.weights = [w for w in self.policy.parameters() if w.requires_grad]
        self.probe = small.Probe(self.policy)
        decayed = [w for w in self.weights if w.ndim > 1]
        groups = [{"params": decayed, "weight_decay": 0.01}, {"params": [w for w in self.weights if w.ndim < 2]}]
        groups.append({"params": list(self.probe.parameters())})
        self.optimiser = torch.optim.AdamW(groups, lr=args.lr, betas=(0.9, 0.99), weight_decay=0.0, fused=True)
        self.average = [w.detach().clone() for w in self.weights]
        self.step, self.seconds, self.history = 0, 0.0, []
        if self.file.exists():
            self._resume()

    def _resume(self) -> None:
        saved = torch.load(self.file, weights_only=True)
        for into, values in (
            (self.weights, saved["weights"]),
            (self.average, saved["average"]),
            (self.probe.parameters(), saved["probe"]),
        ):
            for weight, value in zip(into, values, strict=True):
                weight.data.copy_(value)
        self.optimiser.load_state_dict(saved["optimiser"])
        self.step, self.seconds, self.history = saved["step"], saved["seconds"], saved["history"]
        print(f"going on from step {self.step}")

    @property
    def done(self) -> float:
        """The part of the schedule that is behind: of the steps, or of the minutes if that is more."""
        budget = self.args.minutes * 60 if self.args.minutes else math.inf
        return max(self.step / self.args.steps, self.seconds / budget)

    def keep(self) -> None:
        partial = self.file.with_suffix(".partial")
        state = {"weights": [w.detach() for w in self.weights], "average": self.average}
        state["probe"] = [w.detach() for w in self.probe.parameters()]
        state |= {"optimiser": self.optimiser.state_dict(), "step": self.step, "seconds": self.seconds}
        torch.save({**state, "history": self.history}, partial)
        partial.replace(self.file)

    def save_average(self, stats: Stats, folder: Path) -> None:
        """LeRobot's folder with the averaged weights."""
        now = [w.detach().clone() for w in self.weights]
        for weight, value in zip(self.weights, self.average, strict=True):
            weight.data.copy_(value)
        small.save(self.policy, stats, folder)
        for weight, value in zip(self.weights, now, strict=True):
            weight.data.copy_(value)

    def learn(self, batch: dict[str, torch.Tensor], done: float) -> tuple[float, float]:
        """One step: (flow loss, error of the readings). `done` in 0..1 is how much of the training is behind it. The
        rate is held, then falls to nothing."""
        fall = min(1.0, (1 - done) / (1 - HELD))
        rate = self.args.lr * min(1.0, (self.step + 1) / 200) * 0.5 * (1 - math.cos(math.pi * fall))
        for group in self.optimiser.param_groups:
            group["lr"] = rate
        torch.manual_seed(self.args.seed * 10_000_019 + self.step)
        with torch.autocast("cpu", torch.bfloat16):
            loss = small.flow_loss(self.policy, batch, DRAWS)
            read = self.probe(batch)
        (loss + PROBED * (1 - done) * read).backward()
        torch.nn.utils.clip_grad_norm_(self.weights, 1.0)
        self.optimiser.step()
        self.optimiser.zero_grad()
        self.step += 1
        decay = min(0.998, (1 + self.step) / (10 + self.step))
        torch._foreach_lerp_(self.average, [w.detach() for w in self.weights], 1 - decay)
        return float(loss.detach()), float(read.detach())


def statistics(out: Path) -> Stats:
    """Of state and action, as the dataset holds them before corrections are added."""
    kept = out / "statistics.json"
    if not kept.exists():
        kept.write_bytes((out / "dataset" / "meta" / "stats.json").read_bytes())
    found = json.loads(kept.read_text(encoding="utf-8"))
    return {
        key: {name: torch.tensor(v, dtype=torch.float32) for name, v in found[key].items() if name != "count"}
        for key in ("observation.state", "action")
    }


class Batches:
    """Batches as SmolVLAPolicy takes them: what its preprocessor does, for many frames at once."""

    def __init__(self, demonstrations: data.Demonstrations, stats: Stats, policy: SmolVLAPolicy, seed: int, size: int):
        self.data, self.seed, self.size = demonstrations, seed, size
        self.stats = {k: (v["mean"], v["std"] + 1e-8) for k, v in stats.items()}
        self.tokenizer = policy.model.vlm_with_expert.processor.tokenizer
        self.known: dict[str, list[int]] = {}

    def __call__(self, step: int) -> dict[str, torch.Tensor]:
        raw = data.batch(self.data, np.random.default_rng([self.seed, step]), self.size)
        result = {
            f"observation.images.{c}": torch.from_numpy(raw[c]).permute(0, 3, 1, 2).contiguous().float().div_(255)
            for c in data.CAMERAS
        }
        for key, name in (("observation.state", "state"), ("action", "action")):
            mean, std = self.stats[key]
            result[key] = (torch.from_numpy(raw[name].astype(np.float32)) - mean) / std
        for text in raw["task"]:
            if text not in self.known:
                self.known[text] = self.tokenizer(f"{text}\n")["input_ids"]
        tokens = [self.known[text] for text in raw["task"]]
        longest = max(map(len, tokens))
        ids = [t + [self.tokenizer.pad_token_id] * (longest - len(t)) for t in tokens]
        result["observation.language.tokens"] = torch.tensor(ids)
        mask = torch.tensor([[i < len(t) for i in range(longest)] for t in tokens])
        result["observation.language.attention_mask"] = mask
        result["pusher"] = torch.from_numpy(raw["state"][:, :2].astype(np.float32))
        result |= {k: torch.from_numpy(np.ascontiguousarray(raw[k])) for k in ("cubes", "named", "other", "way")}
        result["action_is_pad"] = ~torch.from_numpy(raw["valid"])
        return result


def train(args: argparse.Namespace) -> None:
    """Demonstrations, half of the training, corrections of what the policy does by then, the rest of the training."""
    dataset, policy = args.out / "dataset", args.out / "policy"
    data.record(dataset, args.episodes)
    stats = statistics(args.out)
    training = Training(args)
    if training.done < CORRECTED:
        learn(training, stats, CORRECTED)
    rollout.correct(dataset, rollout.lerobot_act(policy), args.episodes + args.corrections)
    frames = learn(training, stats, 1.0)
    write_json(args.out / "training.json", summary(args, training, frames))
    draw_curve(training.history, policy / "loss.png")


def learn(training: Training, stats: Stats, until: float) -> int:
    """Trains until the part `until` of the schedule is behind; returns the number of frames in the dataset."""
    args = training.args
    demonstrations = data.load(args.out / "dataset", small.CHUNK)
    batches = Batches(demonstrations, stats, training.policy, args.seed, args.batch)
    bar = tqdm(total=args.steps, initial=training.step, desc="training")
    recent, began, kept = [], time.monotonic() - training.seconds, time.monotonic()
    while (done := training.done) < until:
        recent.append(training.learn(batches(training.step), done))
        training.seconds = time.monotonic() - began
        bar.update()
        if training.step % 50 == 0:
            loss, read = (float(v) for v in np.mean(recent, 0))
            training.history.append([training.step, round(training.seconds, 1), loss, read])
            recent = []
            bar.set_postfix(read=f"{read:.4f}", loss=f"{loss:.4f}")
        if time.monotonic() - kept > 180:
            training.save_average(stats, args.out / "policy")
            training.keep()
            kept = time.monotonic()
    bar.close()
    training.save_average(stats, args.out / "policy")  # first: what is kept counts on it
    training.keep()
    return len(demonstrations)


def summary(args: argparse.Namespace, training: Training, frames: int) -> dict[str, Any]:
    weights = list(training.policy.parameters())
    return {
        "seed": args.seed,
        "demonstrations": args.episodes,
        "corrections": args.corrections,
        "frames": frames,
        "steps": training.step,
        "batch": args.batch,
        "flow_draws_per_observation": DRAWS,
        "learning_rate": args.lr,
        "minutes": round(training.seconds / 60, 1),
        "threads": torch.get_num_threads(),
        "parameters": sum(w.numel() for w in weights),
        "trained_parameters": sum(w.numel() for w in weights if w.requires_grad),
        "versions": {"torch": torch.__version__, "python": platform.python_version(), "lerobot": "0.6.1"},
        "loss": [[step, seconds, round(loss, 5), round(read, 5)] for step, seconds, loss, read in training.history],
    }


def draw_curve(history: list[list[float]], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(6, 3), dpi=100, layout="constrained")
    axes.plot([h[0] for h in history], [h[2] for h in history], linewidth=1)
    axes.set(yscale="log", xlabel="step", ylabel="flow-matching loss", title="push_cubes: training loss")
    axes.grid(alpha=0.3, which="both")
    figure.savefig(path)


def evaluate(args: argparse.Namespace, policy: Path) -> None:
    """Success of the saved policy run by LeRobot, and of the two controls."""
    act = rollout.lerobot_act(policy)
    seeds = range(args.first_seed, args.first_seed + args.eval)
    result: dict[str, Any] = {"engine": "LeRobot 0.6.1", "episodes": args.eval, "first_seed": args.first_seed}
    result["n_action_steps"] = args.replay
    for control in ("none", "instruction", "blank"):
        episodes = rollout.run(act, seeds, args.replay, control)
        count = sum(e["success"] for e in episodes)
        low, high = rollout.wilson(count, len(episodes))
        name = {"none": "policy", "instruction": "wrong instruction", "blank": "blank pictures"}[control]
        lengths = [e["length"] for e in episodes if e["success"]]
        result[name] = {"successes": count, "success": count / len(episodes), "wilson95": [low, high]}
        result[name]["mean_length"] = float(np.mean(lengths)) if lengths else None
        result[name]["failed_seeds"] = [e["seed"] for e in episodes if not e["success"]] if control == "none" else None
        print(f"{name}: {count} of {len(episodes)} = {count / len(episodes):.3f} [{low:.3f}, {high:.3f}]", flush=True)
        if control == "none":
            result["per_task"] = per_task(episodes)
    write_json(args.out / "evaluation.json", result)


def per_task(episodes: list[dict[str, Any]]) -> dict[str, list[int]]:
    """(successes, episodes) of each cube and direction."""
    table: dict[str, list[int]] = {}
    for task, phrases in rollout.TASKS.items():
        some = [e for e in episodes if e["instruction"] in phrases]
        table[" ".join(task)] = [sum(e["success"] for e in some), len(some)]
    return table


def write_json(path: Path, value: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value, indent=1) + "\n", encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--episodes", type=int, default=2400, help="demonstrations")
    parser.add_argument("--corrections", type=int, default=600, help="episodes of the half-trained policy")
    parser.add_argument("--steps", type=int, default=6_000)
    parser.add_argument("--minutes", type=float, help="shortens the schedule so that training ends in this time")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--eval", type=int, metavar="N", help="measure OUT/policy over N episodes instead of training")
    parser.add_argument("--policy", type=Path, help="another folder to measure")
    parser.add_argument("--first-seed", type=int, default=0)
    parser.add_argument("--replay", type=int, default=5, help="actions executed of each chunk")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    if args.eval:
        evaluate(args, args.policy or args.out / "policy")
    else:
        train(args)


if __name__ == "__main__":
    main()
