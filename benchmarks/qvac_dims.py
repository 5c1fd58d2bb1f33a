"""Checkpoints of dimensions drawn from a seed, compiled to QVAC's layout and run by QVAC's own engine.

python benchmarks/qvac_dims.py [--smolvla 12] [--pi05 6] [--seed 0] [--formats f32,q8,...] [--wrong]
    [--out FILE]

Every checkpoint is SmolVLA- or pi0.5-like with random weights and dimensions that the engine accepts (vlac refuses
others by name: those rows say so, and more are drawn). The prompt is padded where vlac says that the engine answers its
own length wrong, and with --wrong such a length is run as well: it must be wrong there. Each file runs in a process of
its own on a seeded observation; the chunk is held against vlac's fp32 reference: cosine at least 0.999999 for f32 and
0.9995 for q8. Other formats have no bar here. Rows are written as they come; nothing is timed. Needs
scripts/peers/qvac.sh. Exit code 1 when a bar is missed.
"""

from __future__ import annotations

import argparse
import itertools
import json
import random
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import dialect_files as files  # noqa: E402
import pi_files  # noqa: E402
import qvac_peer  # noqa: E402

import vlac  # noqa: E402
from vlac.api import draw  # noqa: E402
from vlac.artifact import Golden  # noqa: E402
from vlac.checkpoint import read_policy  # noqa: E402
from vlac.errors import Unsupported  # noqa: E402
from vlac.gguf_dialects import check_file  # noqa: E402
from vlac.goldens import answer, synthetic  # noqa: E402
from vlac.policy import Policy  # noqa: E402
from vlac.registry import silent  # noqa: E402
from vlac.targets._qvac_memory import LONGEST, right_prompts  # noqa: E402

BARS = {"f32": 0.999999, "q8": 0.9995}
ORDERS: dict[str, tuple[str, list[str]]] = {
    "f32": ("gguf-f32", []),
    "f16": ("gguf-f16", []),
    "bf16": ("gguf-bf16", []),
    "q8": ("gguf-q8", []),
    "q6": ("gguf-q6", []),
    "q5": ("gguf-q5", []),
    "q4": ("gguf-q4", []),
    "q4_0": ("gguf-f32", ["quantize-weights:format=q4_0,match=text.layers.*.mlp.*"]),
    "iq4_nl": ("gguf-f32", ["quantize-weights:format=iq4_nl,match=text.layers.*.mlp.*"]),
}
"""Name -> target and passes: rows that hold no blocks of the format wanted get the next wider one."""


def smolvla(rng: random.Random, folder: Path, seed: int) -> dict[str, Any]:
    """Draws and writes a checkpoint; the dimensions drawn."""
    kv = rng.choice([1, 1, 2])
    heads = kv * rng.choice([1, 2, 3])
    every = rng.choice([2, 2, 3, 4])
    layers = rng.choice([n for n in range(2, 7) if (n - 1) % every])
    factor, patch = rng.choice([(2, 8), (2, 16), (3, 8), (4, 8), (2, 14)])
    size = patch * factor * rng.choice([1, 2, 3])
    vision_heads = rng.choice([1, 2, 3, 4])
    drawn: dict[str, Any] = {
        "text": {
            "hidden_size": 32 * rng.randrange(2, 11),
            "intermediate_size": 32 * rng.randrange(2, 14),
            "num_hidden_layers": layers,
            "num_attention_heads": heads,
            "num_key_value_heads": kv,
            "head_dim": 64,
        },
        "vision": {
            "hidden_size": vision_heads * rng.choice([16, 24, 32, 48, 64]),
            "intermediate_size": 32 * rng.randrange(2, 10),
            "num_hidden_layers": rng.choice([1, 2, 3]),
            "num_attention_heads": vision_heads,
            "image_size": size,
            "patch_size": patch,
        },
        "scale_factor": factor,
        "cameras": {f"view{i}": (rng.randrange(24, 97), rng.randrange(24, 97)) for i in range(rng.choice([1, 2, 3]))},
        "vocab": rng.randrange(290, 700),
        "state_dim": rng.randrange(2, 9),
        "action_dim": rng.randrange(2, 9),
    }
    policy = {
        "chunk_size": rng.choice([5, 8, 13, 24, 50]),
        "num_steps": rng.choice([2, 3, 5]),
        "max_state_dim": rng.choice([8, 17, 32]),
        "max_action_dim": rng.choice([8, 15, 32]),
        "self_attn_every_n_layers": every,
        "expert_width_multiplier": rng.choice([0.5, 0.75, 1.0]),
    }
    shape = files.maker.Shape(**drawn, tokenizer_entries=280, policy={"n_action_steps": 5, **policy})
    files.maker.write_checkpoint(folder, shape, seed)
    return {**drawn, **policy}


def pi05(rng: random.Random, folder: Path, seed: int) -> dict[str, Any]:
    """Likewise with the widths that the engine has in its code; one layer each."""
    drawn = {
        "size": 14 * rng.choice([2, 3, 4, 6]),
        "chunk_size": rng.choice([5, 8, 16, 50]),
        "max_action_dim": rng.choice([8, 16, 24, 32]),
        "tokenizer_max_length": rng.choice([100, 120, 160, 200]),
    }
    pi_files.write(folder, seed=seed, **{**drawn, "n_action_steps": min(5, drawn["chunk_size"])})
    return drawn


KINDS = {"smolvla": smolvla, "pi05": pi05}


def lengths(policy: Policy, dims: Mapping[str, Any]) -> tuple[int, int]:
    """(length that the prompt is padded to, one that the engine answers wrong; 0 for none) of a SmolVLA."""
    right = set(right_prompts(dims, len(policy.io.cameras)))
    (call,) = asked(policy, synthetic(policy.io, 1), 0)
    own = len(call["tokens"])
    wrong = [n for n in range(own, LONGEST + 1) if n not in right]
    return min((n for n in right if n >= own), default=0), wrong[0] if wrong else 0


def asked(policy: Policy, given: tuple[Golden, ...], length: int) -> list[dict[str, np.ndarray[Any, Any]]]:
    """The observations as the engine's own inputs, the prompt padded."""
    program = draw(policy)
    return [
        qvac_peer.call(
            *(policy.io, policy.tokenizer, program),
            prompt_length=length,
            images=dict(o.images),
            state=o.state,
            task=o.task,
            noise=o.noise,
        )
        for o in given
    ]


def compared(policy: Policy, model: Path, answered: tuple[Golden, ...], length: int, folder: Path) -> dict[str, Any]:
    """Cosine of the engine's chunk to the reference's and the largest difference over the largest value."""
    actions, _ = qvac_peer.run(model, asked(policy, answered, length), policy.io, folder)
    a, b = (np.concatenate([np.float64(v).ravel() for v in side]) for side in (actions, _chunks(answered)))
    return {
        "cosine": float(a @ b / np.linalg.norm(a) / np.linalg.norm(b)),
        "largest": float(np.abs(a - b).max() / np.abs(b).max()),
    }


def _chunks(answered: tuple[Golden, ...]) -> list[np.ndarray[Any, Any]]:
    return [g.chunk_normalised for g in answered]


def one(kind: str, seed: int, formats: list[str], wrong: bool, folder: Path) -> dict[str, Any]:
    """A checkpoint of this seed in every format: what it is, and what came of each; "refused" where vlac does."""
    row: dict[str, Any] = {"family": kind, "seed": seed, "formats": {}}
    row["dims"] = KINDS[kind](random.Random(f"{kind} {seed}"), folder / "checkpoint", seed)
    policy = read_policy(str(folder / "checkpoint"))
    answered, _ = answer(policy, synthetic(policy.io, 1, seed=seed), silent)
    for name in formats:
        target, passes = ORDERS[name]
        model = folder / f"{name}.gguf"
        try:
            made = vlac.compile(folder / "checkpoint", target, model, passes, dialect="qvac", goldens=1)
        except Unsupported as error:
            return {**row, "refused": error.message}
        assert made.path is not None
        dims = check_file(made.path, "qvac").dims
        length, bad = lengths(policy, dims) if kind == "smolvla" else (policy.spec.tokenizer_max_length, 0)
        if not length:
            return {**row, "refused": "no prompt as long as this one is answered right"}
        found = compared(policy, made.path, answered, length, folder / name)
        found["values"] = {k: v["values"] for k, v in made.manifest["census"]["formats"].items()}
        found["ok"] = bool(found["cosine"] >= BARS.get(name, 0.0))
        row |= {"prompt": length}
        if wrong and bad and name == "f32":
            row |= {"said_wrong": bad, "is_wrong": compared(policy, made.path, answered, bad, folder / "bad")}
            found["ok"] &= row["is_wrong"]["cosine"] < BARS[name]
        row["formats"][name] = found
        print(kind, seed, length, name, found, row.get("is_wrong", ""), file=sys.stderr, flush=True)
        model.unlink(missing_ok=True)
    return row


def main() -> int:
    """Exit code 1 when a file does not run or misses its bar."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--smolvla", type=int, default=12)
    parser.add_argument("--pi05", type=int, default=6)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--formats", default="f32,q8", help=f"of {', '.join(ORDERS)}")
    parser.add_argument("--wrong", action="store_true", help="run lengths of prompts that are said to be wrong, too")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results" / "qvac_dims.json")
    options = parser.parse_args()
    rows: list[dict[str, Any]] = []
    for kind, count in (("smolvla", options.smolvla), ("pi05", options.pi05)):
        for seed in itertools.count(options.seed):
            if sum(r["family"] == kind and "refused" not in r for r in rows) == count:
                break
            with tempfile.TemporaryDirectory() as folder:
                rows.append(one(kind, seed, options.formats.split(","), options.wrong, Path(folder)))
            missed = [f"{r['family']} {r['seed']} {n}" for r in rows for n, f in r["formats"].items() if not f["ok"]]
            record = {"vlac": vlac.__version__, "bars": BARS, "missed": missed, "rows": rows}
            options.out.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    refused = sum("refused" in r for r in rows)
    print(f"{len(rows)} checkpoints, {refused} refused, missed: {', '.join(missed) or 'none'}")
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
