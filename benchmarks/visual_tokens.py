"""Ways to give a language model fewer image tokens, at equal tokens: how far the chunk drifts.

python benchmarks/visual_tokens.py [CHECKPOINT] [--factor N] [--held-out N]

CHECKPOINT: a policy folder, by default the bundled push-cubes policy. Ways: random drop (one random token of each block
stays; mean of three draws), the plain average of blocks, and reduce-visual-tokens with its weight, its positions and
its ridge fit added one by one. Beside them merge-in-tower, which keeps the tokens and saves work in the tower, against
as few rows there made otherwise: random rows dropped (their place gets a neighbour's result; mean of three draws), and
rows averaged with a neighbour in the picture, whatever they show. Recorded
observations where the policy has them: fits see the first ones, drift is taken on the last. float32, the same noise.
Writes benchmarks/results/visual_tokens.json (visual_tokens-NAME.json for another checkpoint).
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
from compile_full_size import ROOT, machine, versions

from vlac import calibrate
from vlac.api import apply_passes, draw
from vlac.artifact import Golden
from vlac.checkpoint import read_policy
from vlac.goldens import reference_session, synthetic
from vlac.graph import Node, Param, Program
from vlac.passes import merge_in_tower
from vlac.policy import Policy
from vlac.recorded import Recorded
from vlac.runtime.inputs import prepared
from vlac.runtime.session import execute
from vlac.weights import LazyTensor

BUNDLED = ROOT / "vlac" / "zoo" / "push_cubes"
POOL = "reduce-visual-tokens:factor={f}{seen}"
WAYS = {
    "plain average": POOL + ",mass=0,positions=packed",
    "average, weight": POOL + ",positions=packed",
    "average, positions": POOL + ",mass=0",
    "average, weight, positions": POOL,
    "average, weight, positions, ridge": POOL + ",heal=ridge,samples={n}",
    "average, ridge": POOL + ",mass=0,positions=packed,heal=ridge,samples={n}",
}
TOWER = "merge-in-tower:samples={n}{seen}"


def chunks(policy: Policy, program: Program, given: Sequence[Golden]) -> list[np.ndarray]:
    session, found = reference_session(program), []
    for o in given:
        ready = prepared(policy.io, policy.tokenizer, program, o)
        found.append(execute(program, session, ready.env, ready.symbols)[:, : policy.io.action_dim])
    session.close()
    return found


def divided(policy: Policy, held: int, folder: Path) -> tuple[str, int, tuple[Golden, ...]]:
    """(parameter that names the observations a pass may see, their number, those that judge it).

    Of an observations/ folder the last `held` are kept apart; without one, both parts are drawn from seeds.
    """
    if policy.recorded is None:
        return "", 16, synthetic(policy.io, held, seed=77)
    source, mine = policy.recorded.path, folder / "observations"
    mine.mkdir()
    table = json.loads((source / "index.json").read_text(encoding="utf-8"))
    seen, judge = (
        dict(table, observations=part) for part in (table["observations"][:-held], table["observations"][-held:])
    )
    for name, part in (("seen", seen), ("judge", judge)):
        (mine / name).mkdir()
        (mine / name / "index.json").write_text(json.dumps(part), encoding="utf-8")
        for o in part["observations"]:
            for picture in o["images"].values():
                shutil.copy(source / picture, mine / name / picture)
    given = Recorded(mine / "judge").take(policy.io, None)
    return f",observations={mine / 'seen'}", len(seen["observations"]), given


def random_drop(policy: Policy, factor: int, seed: int) -> Program:
    """The program of a plain average with one random token of each block in place of its mean."""
    program = draw(apply_passes(policy, [WAYS["plain average"].format(f=factor, seen="")]))
    stage = program.stage("vision")
    shuffle = max(i for i, n in enumerate(stage.nodes) if n.op == "pixel_shuffle" and n.attr["factor"] == factor)
    side = int(policy.spec.tokens_per_camera**0.5)
    rng, pick = np.random.default_rng(seed), np.zeros(((side // factor) ** 2, side**2))
    for i in range(len(pick)):
        row, column = divmod(i, side // factor)
        dy, dx = rng.integers(0, factor, 2)
        pick[i, (row * factor + dy) * side + column * factor + dx] = 1
    nodes = (
        *stage.nodes[:shuffle],
        Node("columns", "transpose", stage.nodes[shuffle].inputs, (("perm", (1, 0)),)),
        Node("picked", "linear", ("columns", "@pick")),
        Node("image_tokens", "transpose", ("picked",), (("perm", (1, 0)),)),
    )
    return program.replace(
        stages=tuple(dataclasses.replace(s, nodes=nodes) if s.name == "vision" else s for s in program.stages),
        params={**program.params, "pick": Param(pick.shape)},
        weights=program.weights.with_(pick=LazyTensor.of(pick, "pick")),
    )


def neighbours(similar: np.ndarray, merged: int, checker: np.ndarray) -> np.ndarray:
    """As merge_in_tower.matching: candidates at even distances, each with the row nearest to it in order."""
    to, mine = np.arange(len(similar)), np.flatnonzero(checker)
    chosen = mine[np.linspace(0, len(mine) - 1, merged).astype(int)]
    others = np.flatnonzero(~checker)
    to[chosen] = others[np.abs(others[None] - chosen[:, None]).argmin(axis=1)]
    return to


def tower(policy: Policy, recipe: str, way: str, seed: int = 0) -> Policy:
    """The policy with rows of its tower merged as the pass does ("alike"), as neighbours stand, or dropped."""
    rng = np.random.default_rng(seed)

    def random(similar: np.ndarray, merged: int, checker: np.ndarray) -> np.ndarray:
        to, others = np.arange(len(similar)), np.flatnonzero(~checker)
        chosen = rng.permutation(np.flatnonzero(checker))[:merged]
        to[chosen] = others[np.abs(others[None] - chosen[:, None]).argmin(axis=1)]
        return to

    def without(to: np.ndarray, sizes: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        kept = np.unique(to)
        return np.eye(len(to))[kept], np.ones(len(kept), dtype=int), np.searchsorted(kept, to)

    changed = {"neighbours": {"matching": neighbours}, "dropped": {"matching": random, "matrix": without}}
    with mock.patch.multiple(merge_in_tower, **changed[way]) if way in changed else contextlib.nullcontext():
        return apply_passes(policy, [recipe])


def measure(policy: Policy, factor: int, held: int) -> list[dict[str, Any]]:
    with tempfile.TemporaryDirectory() as folder:
        return _measure(policy, factor, *divided(policy, held, Path(folder)))


def _measure(policy: Policy, factor: int, seen: str, fit: int, judge: Sequence[Golden]) -> list[dict[str, Any]]:
    want = chunks(policy, draw(policy), judge)
    rows = []

    def add(way: str, drift: float, tokens: int, figures: Any = None) -> None:
        rows.append({"way": way, "tokens_per_camera": tokens, "drift": drift, "figures": dict(figures or {})})
        print(rows[-1], flush=True)

    fewer = policy.spec.tokens_per_camera // factor**2
    drops = [calibrate.drift(chunks(policy, random_drop(policy, factor, s), judge), want) for s in range(3)]
    add("random drop", float(np.mean(drops)), fewer)
    for way, recipe in WAYS.items():
        after = apply_passes(policy, [recipe.format(f=factor, n=fit, seen=seen)])
        got = chunks(after, draw(after), judge)
        add(way, calibrate.drift(got, want), after.spec.tokens_per_camera, after.history[-1].figures)
    recipe = TOWER.format(n=fit, seen=seen)
    for way, name in (
        ("dropped", "in the tower: random drop"),
        ("neighbours", "in the tower: plain average of neighbours"),
        ("alike", "merge-in-tower, 25 % of the rows at each layer"),
    ):
        afters = [tower(policy, recipe, way, s) for s in range(3 if way == "dropped" else 1)]
        drops = [calibrate.drift(chunks(after, draw(after), judge), want) for after in afters]
        add(name, float(np.mean(drops)), policy.spec.tokens_per_camera, afters[0].history[-1].figures)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("checkpoint", type=Path, nargs="?", default=BUNDLED)
    parser.add_argument("--factor", type=int, default=2)
    parser.add_argument("--held-out", type=int, default=16)
    options = parser.parse_args()
    name = options.checkpoint.resolve().name
    suffix = "" if options.checkpoint == BUNDLED else f"-{name}"
    rows = measure(read_policy(str(options.checkpoint)), options.factor, options.held_out)
    record = {"machine": machine(), "versions": versions(), "checkpoint": name, "factor": options.factor, "rows": rows}
    path = ROOT / "benchmarks" / "results" / f"visual_tokens{suffix}.json"
    path.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
