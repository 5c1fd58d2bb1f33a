"""Success of the bundled policy through LeRobot's plugin against `vlac eval`, on the same seeds and noise.

python benchmarks/push_cubes_plugin.py [--episodes 50] [--seed 0] [--target onnx-fp32] [--engine torch] [--out FILE]

Needs scripts/peers/lerobot.sh. Nothing is timed; exit code 1 when a seed ends otherwise.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import vlac
from vlac.environments import PUSH_CUBES
from vlac.evaluate import evaluate

ROOT = Path(__file__).resolve().parents[1]
PYTHON = ROOT / ".venv-lerobot" / "bin" / "python"
PLUGIN = ROOT / "plugins" / "lerobot_policy_vlac"
Rows = list[dict[str, Any]]


def through_the_plugin(artifact: Path, folder: Path, seed: int, episodes: int, engine: str) -> Rows:
    """What LeRobot's rollout made of an artifact: seed, success and steps of each episode."""
    path = os.pathsep.join([str(ROOT), str(PLUGIN)])
    env = {**os.environ, "PYTHONPATH": path, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    script = ROOT / "benchmarks" / "push_cubes_plugin_lerobot.py"
    for command in (
        ["-m", "lerobot_policy_vlac", str(artifact), str(folder)],
        [str(script), str(folder), str(seed), str(episodes), engine],
    ):
        done = subprocess.run([str(PYTHON), *command], env=env, capture_output=True, text=True, check=False)
        if done.returncode:
            raise RuntimeError(done.stderr[-3000:])
    rows: Rows = json.loads(done.stdout.strip().splitlines()[-1])
    return rows


def compare(artifact: Path, folder: Path, seed: int, episodes: int, engine: str) -> dict[str, Any]:
    """Successes of both, and the seeds that ended otherwise."""
    theirs = through_the_plugin(artifact, folder, seed, episodes, engine)
    report = evaluate(artifact, PUSH_CUBES, episodes=episodes, seed=seed, engine=engine, threads=1)
    ours: Rows = [{k: row[k] for k in ("seed", "success", "steps")} for row in report["rows"]]
    other = [(a, b) for a, b in zip(ours, theirs, strict=True) if a["success"] != b["success"]]
    return {
        "episodes": episodes,
        "seeds": [seed, seed + episodes - 1],
        "engine": engine,
        "target": report["target"],
        "sha256": report["sha256"],
        "vlac_eval": sum(r["success"] for r in ours),
        "plugin": sum(r["success"] for r in theirs),
        "same_success": episodes - len(other),
        "same_steps": sum(a["steps"] == b["steps"] for a, b in zip(ours, theirs, strict=True)),
        "different": other,
    }


def main() -> int:
    """Exit code 1 when a seed ends otherwise."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--episodes", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--target", default="onnx-fp32")
    parser.add_argument("--engine", default="torch")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results" / "push_cubes_plugin.json")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        out = Path(temporary) / ("out.gguf" if arguments.target.startswith("gguf") else "out")
        result = vlac.compile("push-cubes", target=arguments.target, out=out, goldens=1)
        assert result.path is not None
        policy = Path(temporary) / "policy"
        found = compare(result.path, policy, arguments.seed, arguments.episodes, arguments.engine)
    arguments.out.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(found, indent=1))
    return 1 if found["different"] else 0


if __name__ == "__main__":
    sys.exit(main())
