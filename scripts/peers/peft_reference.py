"""Goldens of merge-lora: adapters that peft makes for the tiny SmolVLA, and the weights that peft merges.

python scripts/peers/peft_reference.py [OUT]

Needs peft, torch and safetensors: .venv-lerobot after `pip install --no-deps peft`.

For each case a folder as save_pretrained writes it, with merged.safetensors: the merged weights of its layers. The base
is tests/golden/smolvla_tiny, as a tree of modules with its tensors' names, so that no policy class is needed.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file

ROOT = Path(__file__).resolve().parents[2]
BASE = ROOT / "tests" / "golden" / "smolvla_tiny" / "checkpoint" / "model.safetensors"
EXPERT, TEXT = "model.vlm_with_expert.lm_expert.layers", "model.vlm_with_expert.vlm.model.text_model.layers"
TARGETS = [
    f"{EXPERT}.0.self_attn.q_proj",
    f"{EXPERT}.1.mlp.down_proj",
    f"{TEXT}.0.self_attn.v_proj",
    "model.state_proj",
]
CASES = {
    "plain": {"r": 4, "lora_alpha": 8},
    "patterns": {
        "r": 4,
        "lora_alpha": 8,
        "rank_pattern": {"mlp.down_proj": 2, "lm_expert.*q_proj": 3},
        "alpha_pattern": {"state_proj": 5, "v_proj": 1},
    },
    "rslora": {"r": 4, "lora_alpha": 6, "use_rslora": True},
    "dora": {"r": 2, "lora_alpha": 4, "use_dora": True},
}


def tree(tensors: dict[str, torch.Tensor]) -> torch.nn.Module:
    """Modules with the tensors' names: linears where a weight has two axes."""
    root = torch.nn.Module()
    for name in TARGETS:
        *path, last = name.split(".")
        at = root
        for part in path:
            if part not in at._modules:
                at.add_module(part, torch.nn.Module())
            at = at._modules[part]
        weight, bias = tensors[f"{name}.weight"], tensors.get(f"{name}.bias")
        linear = torch.nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None)
        linear.load_state_dict({"weight": weight} | ({} if bias is None else {"bias": bias}))
        at.add_module(last, linear)
    return root


def main() -> None:
    out = Path(sys.argv[1]) if len(sys.argv) > 1 else ROOT / "tests" / "golden" / "peft"
    tensors = {k: v.float() for k, v in load_file(BASE).items()}
    for case, options in CASES.items():
        torch.manual_seed(len(case))
        model = get_peft_model(tree(tensors), LoraConfig(target_modules=TARGETS, **options))
        for name, p in model.named_parameters():
            if ".lora_" in name:
                p.data = torch.randn_like(p) * 0.1 + (p.data if "magnitude" in name else 0)
        model.save_pretrained(out / case)
        merged = model.merge_and_unload().state_dict()
        save_file(
            {f"{n}.weight": merged[f"{n}.weight"].contiguous() for n in TARGETS}, out / case / "merged.safetensors"
        )
        (out / case / "README.md").unlink(missing_ok=True)
        print(case, sorted(p.name for p in (out / case).iterdir()))


if __name__ == "__main__":
    main()
