"""What pi0.5 saves when padded text and absent cameras are not computed: counted at full size, timed at a middle one.

python benchmarks/pi05_padding.py [--repeats N] [--engine ggml] [--target gguf-q8] [--count-only]

LeRobot and openpi compute three cameras and 200 prompt tokens whatever is given. Counted: multiply-accumulates of the
lowered program at the published sizes. Timed: CPU seconds of a chunk (all threads, so that other work on the machine
matters little) with random weights at widths that fit a small machine; pictures and prompt are of the published size.
Writes benchmarks/results/pi05_padding.json.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import tempfile
import time
from dataclasses import replace
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import numpy as np
from compile_full_size import machine, versions

ROOT = Path(__file__).resolve().parents[1]
RESULT = ROOT / "benchmarks" / "results" / "pi05_padding.json"
GOLDEN = ROOT / "tests" / "golden" / "pi05_tiny" / "checkpoint"
sys.path.insert(0, str(ROOT / "scripts"))

FULL = {"vision": (1152, 4304, 27, 16), "text": (2048, 16384, 18), "expert": (1024, 4096), "heads": (8, 1, 256)}
MIDDLE = {"vision": (288, 1076, 6, 4), "text": (512, 4096, 6), "expert": (256, 1024), "heads": (8, 1, 64)}
VOCABULARY = {"full": 257152, "middle": 512}
CAMERAS, PROMPT = 3, 200
SHORT = "pick up the red cube"


def spec_of(sizes: dict[str, tuple[int, ...]], vocabulary: int) -> Any:
    from vlac.families.pi05 import Pi05Spec
    from vlac.spec import DecoderSpec, VisionSpec

    width, ffn, depth, heads = sizes["vision"]
    vision = VisionSpec(width, ffn, depth, heads, image_size=224, patch_size=14)
    width, ffn, depth = sizes["text"]
    queries, keys, head_dim = sizes["heads"]
    text = DecoderSpec(width, ffn, depth, queries, keys, head_dim, vocabulary, 1e-6, hidden_act="gelu_pytorch_tanh")
    expert = replace(text, hidden_size=sizes["expert"][0], intermediate_size=sizes["expert"][1], vocab_size=0)
    return Pi05Spec(
        vision=vision, text=text, expert=expert, chunk_size=50, max_action_dim=32, tokenizer_max_length=PROMPT
    )


def count() -> dict[str, float]:
    """GMAC of a chunk at the published sizes, by "cameras x prompt tokens"; no weight is made."""
    from vlac.api import draw
    from vlac.checkpoint import read_policy
    from vlac.families.pi05 import shapes
    from vlac.io import Camera
    from vlac.lower import lower
    from vlac.registry import ReadOptions
    from vlac.weights import LazyTensor, Weights
    from vlac.work import work

    policy = read_policy(str(GOLDEN), ReadOptions(spec={"vision.num_attention_heads": 3}))
    spec = spec_of(FULL, VOCABULARY["full"])
    weights = Weights({n: LazyTensor(s, lambda s=s: np.zeros(s, np.float32)) for n, s in shapes(spec).items()})
    cameras = tuple(Camera(f"observation.images.{i}", (3, 224, 224)) for i in range(CAMERAS))
    program = lower(draw(policy.replace(spec=spec, weights=weights, io=replace(policy.io, cameras=cameras))))
    tokens = next(s.buckets for s in program.symbols if s.name == "T")
    return {
        f"{c}x{t}": round(sum(w.macs for w in work(program, {"C": c, "T": t}).values()) / 1e9, 1)
        for c in (1, 2, 3)
        for t in tokens
        if t in (24, 32, 48, 64, PROMPT)
    }


def write_middle(folder: Path) -> None:
    """A LeRobot folder of the middle size: the golden one's small files, three cameras of 224, random weights."""
    from make_large import POOL, drawn
    from smolvla_checkpoint import write_safetensors

    from vlac.families.pi05 import shapes
    from vlac.readers.paligemma import disk_name

    shutil.copytree(GOLDEN, folder)
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    inputs = {k: v for k, v in config["input_features"].items() if v["type"] != "VISUAL"}
    names = [f"observation.images.{n}" for n in ("base", "left", "right")]
    inputs = {**{n: {"type": "VISUAL", "shape": [3, 224, 224]} for n in names}, **inputs}
    config.update(
        input_features=inputs, image_resolution=[224, 224], chunk_size=50, n_action_steps=50, max_action_dim=32,
        tokenizer_max_length=PROMPT,
    )  # fmt: skip
    steps = json.loads((folder / "policy_preprocessor.json").read_text(encoding="utf-8"))
    for step in steps["steps"]:
        if step.get("registry_name") == "tokenizer_processor":
            step["config"]["max_length"] = PROMPT
    for name, table in (("config.json", config), ("policy_preprocessor.json", steps)):
        (folder / name).unlink()
        (folder / name).write_text(json.dumps(table), encoding="utf-8")
    table = {disk_name(n): s for n, s in shapes(spec_of(MIDDLE, VOCABULARY["middle"])).items()}
    patch = disk_name("vision.patch_embedding.weight")
    table[patch] = (table[patch][0], 3, 14, 14)
    pool = np.random.default_rng(0).standard_normal(POOL, dtype=np.float32)
    (folder / "model.safetensors").unlink()
    write_safetensors(folder / "model.safetensors", table, lambda n, s: drawn(n, s, pool))


def measure(target: str, engine: str, repeats: int) -> list[dict[str, Any]]:
    import vlac

    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) / "middle"
        write_middle(folder)
        made = vlac.compile(folder, target, Path(temporary) / "out", goldens=1, spec={"vision.num_attention_heads": 4})
        rows = []
        with vlac.load(made.path, engine=engine) as policy:
            rng = np.random.default_rng(0)
            pictures = {c.key: rng.integers(0, 256, (224, 224, 3), dtype=np.uint8) for c in policy.artifact.io.cameras}
            state = np.zeros(policy.artifact.io.state_dim, np.float32)
            noise = rng.standard_normal(policy.artifact.io.noise_shape).astype(np.float32)
            two = dict(list(pictures.items())[:2])
            for name, images, task in (
                ("everything padded: 3 cameras, 200 tokens", pictures, SHORT + " and then wait" * 60),
                ("3 cameras, a short prompt", pictures, SHORT),
                ("2 cameras, a short prompt", two, SHORT),
            ):
                used, stages = [], {}
                for _ in range(repeats + 1):
                    began = time.process_time()
                    policy.act(images=images, state=state, task=task, noise=noise, reuse=False)
                    used.append(time.process_time() - began)
                    stages = {k: round(float(v), 1) for k, v in policy.stats.items() if k.endswith("_ms")}
                rows.append({"what": name, "cpu_s": round(min(used[1:]), 3), "of": repeats, "stages_ms": stages})
                print(json.dumps(rows[-1]), flush=True)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--engine", default="ggml")
    parser.add_argument("--target", default="gguf-q8")
    parser.add_argument("--count-only", action="store_true")
    args = parser.parse_args()
    gmac = count()
    full, less = gmac[f"{CAMERAS}x{PROMPT}"], gmac["2x32"]
    print(json.dumps(gmac), f"saved: {1 - less / full:.3f}", flush=True)
    if args.count_only:
        return
    rows = measure(args.target, args.engine, args.repeats)
    report = {
        "what": "pi0.5: padded text and absent cameras are not computed",
        "command": "python benchmarks/pi05_padding.py",
        "gmac_at_full_size": gmac,
        "saved_by_count": round(1 - less / full, 4),
        "timed": {"target": args.target, "engine": args.engine, "sizes": MIDDLE, "rows": rows},
        "saved_in_cpu_seconds": round(1 - rows[2]["cpu_s"] / rows[0]["cpu_s"], 4),
        "machine": machine(),
        "versions": versions(),
        "date": f"{datetime.now(timezone.utc):%Y-%m-%d}",
    }
    RESULT.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
