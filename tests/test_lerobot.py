"""vlac against LeRobot itself, over checkpoints of many shapes that LeRobot builds and saves.

Raw pictures, raw state and an instruction go in on both sides; chunks in robot units come out and must agree.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import ROOT, open_golden

import vlac

sys.path.insert(0, str(ROOT / "scripts"))
from smolvla_checkpoint import Shape, write_checkpoint

PYTHON = ROOT / ".venv-lerobot" / "bin" / "python"
pytestmark = [
    pytest.mark.filterwarnings("ignore:the task is longer"),
    pytest.mark.lerobot,
    pytest.mark.skipif(not PYTHON.exists(), reason="no .venv-lerobot; scripts/peers/lerobot.sh sets it up"),
]

SHORT, LONG = "pick up the cube", "stack the blue cup on the plate and then push the green block to the left " * 3


def case(
    name: str,
    *,
    text: dict[str, int] | None = None,
    vision: dict[str, int] | None = None,
    tasks: tuple[str, ...] = (SHORT, "open the top drawer slowly"),
    cameras: dict[str, tuple[int, int]] | None = None,
    normalisation: dict[str, str] | None = None,
    seed: int = 3,
    shape: dict[str, Any] | None = None,
    **policy: Any,
) -> dict[str, Any]:
    """A case of scripts/peers/lerobot_reference.py; a small base with what differs."""
    cameras = cameras or {"top": (48, 48), "wrist": (48, 48)}
    base_text = {"hidden_size": 48, "intermediate_size": 88, "num_hidden_layers": 4, "num_attention_heads": 6}
    base_text |= {"num_key_value_heads": 2, "head_dim": 12}
    base_vision = {"hidden_size": 48, "intermediate_size": 80, "num_hidden_layers": 2, "num_attention_heads": 4}
    base_vision |= {"image_size": 48, "patch_size": 6}
    base_policy = {"chunk_size": 10, "n_action_steps": 10, "max_state_dim": 8, "max_action_dim": 8}
    base_policy |= {"tokenizer_max_length": 24, "pad_language_to": "max_length"}
    modes = {"VISUAL": "IDENTITY", "STATE": "MEAN_STD", "ACTION": "MEAN_STD", **(normalisation or {})}
    return {
        "name": name,
        "seed": seed,
        "tasks": list(tasks),
        "images": cameras,
        "shape": {
            "text": {**base_text, **(text or {})},
            "vision": {**base_vision, **(vision or {})},
            "cameras": cameras,
            "tokenizer_entries": 272,
            "normalisation": modes,
            "policy": {**base_policy, **policy},
            **(shape or {}),
        },
    }


CASES = [
    case(
        "three_cameras_every_third_layer",
        text={"num_hidden_layers": 6, "hidden_size": 64, "head_dim": 20, "num_attention_heads": 4}
        | {"num_key_value_heads": 1},
        cameras={"top": (48, 48), "left": (48, 48), "right": (48, 48)},
        self_attn_every_n_layers=3,
        chunk_size=13,
        n_action_steps=4,
        num_steps=5,
    ),
    case("every_layer_self", cameras={"front": (48, 48)}, self_attn_every_n_layers=1),
    case("every_layer_cross", self_attn_every_n_layers=-1),
    case("fewer_expert_layers", num_expert_layers=2, self_attn_every_n_layers=-1),
    case("attention_mode_self_attn", attention_mode="self_attn", expert_width_multiplier=0.5),
    case("image_special_tokens", add_image_special_tokens=True),
    case("prefix_padded", prefix_length=45, pad_language_to="longest"),
    case("prefix_padded_special", prefix_length=50, add_image_special_tokens=True, tokenizer_max_length=20),
    case("min_max", normalisation={"STATE": "MIN_MAX", "ACTION": "MIN_MAX"}),
    case("quantiles", normalisation={"STATE": "QUANTILES", "ACTION": "QUANTILES"}),
    case("quantile10_identity", normalisation={"STATE": "QUANTILE10", "ACTION": "IDENTITY"}),
    case("letterbox", cameras={"top": (60, 80), "wrist": (70, 37), "side": (31, 31)}),
    case("long_prompts", tasks=(LONG, SHORT), pad_language_to="longest", tokenizer_max_length=17),
    case("long_prompts_padded", tasks=(LONG, "go"), tokenizer_max_length=9),
    case("empty_cameras", empty_cameras=2, pad_language_to="longest"),
    case("empty_camera_special_tokens", empty_cameras=1, add_image_special_tokens=True),
    case(
        "other_sizes",
        text={"hidden_size": 72, "intermediate_size": 100, "num_hidden_layers": 5, "num_attention_heads": 9}
        | {"num_key_value_heads": 3, "head_dim": 10},
        vision={"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2, "image_size": 64, "patch_size": 8},
        cameras={"a": (90, 160)},
        shape={"scale_factor": 2, "state_dim": 1, "action_dim": 14, "vocab": 300},
        num_vlm_layers=3,
        expert_width_multiplier=1.0,
        max_state_dim=5,
        max_action_dim=33,
        chunk_size=3,
        n_action_steps=1,
        num_steps=3,
        min_period=0.01,
        max_period=2.0,
    ),
    case("one_action_one_step", chunk_size=1, n_action_steps=1, num_steps=1, shape={"action_dim": 1}),
    case(
        "four_cameras_every_fourth_layer",
        text={"num_hidden_layers": 9, "hidden_size": 36, "intermediate_size": 50, "num_attention_heads": 6}
        | {"num_key_value_heads": 3, "head_dim": 6},
        cameras={"a": (48, 48), "b": (1080, 1920), "c": (17, 300), "d": (300, 17)},
        expert_width_multiplier=0.5,
        self_attn_every_n_layers=4,
        chunk_size=100,
        n_action_steps=50,
        tokenizer_max_length=128,
        pad_language_to="longest",
    ),
    case(
        "one_layer_head_dim_64",
        text={"hidden_size": 128, "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 1}
        | {"head_dim": 64},
        cameras={"front": (17, 300)},
        chunk_size=1,
        n_action_steps=1,
        tokenizer_max_length=5,
        tasks=("", "nimm den W\u00fcrfel"),
    ),
    case(
        "nothing_to_pad",
        text={"hidden_size": 60, "intermediate_size": 77, "num_hidden_layers": 3, "num_attention_heads": 5}
        | {"num_key_value_heads": 5, "head_dim": 14},
        normalisation={"STATE": "MIN_MAX", "ACTION": "QUANTILES"},
        shape={"state_dim": 7, "action_dim": 7},
        expert_width_multiplier=0.5,
        self_attn_every_n_layers=3,
        max_state_dim=7,
        max_action_dim=7,
    ),
]

WRITTEN = case("written_by_vlac", seed=8)
"""A checkpoint of scripts/smolvla_checkpoint.py, which LeRobot must load: what our full-size files are made with."""
WRITTEN_BF16 = case("written_by_vlac_bf16", seed=9)

ENGINES = {"gguf-f32": "ggml", "onnx-fp32": "onnxruntime"}


@pytest.fixture(scope="module")
def answered(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with every case's checkpoint and LeRobot's answers."""
    work = tmp_path_factory.mktemp("lerobot")
    for one in (WRITTEN, WRITTEN_BF16):
        shape = Shape.from_json(one["shape"])
        write_checkpoint(work / one["name"] / "checkpoint", shape, one["seed"], bf16=one is WRITTEN_BF16)
    cases = [*CASES, WRITTEN, WRITTEN_BF16]
    (work / "cases.json").write_text(json.dumps(cases), encoding="utf-8")
    script = ROOT / "scripts" / "peers" / "lerobot_reference.py"
    done = subprocess.run([PYTHON, script, work], capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stdout + done.stderr
    return work


@pytest.mark.parametrize("target", ENGINES)
@pytest.mark.parametrize("name", [c["name"] for c in [*CASES, WRITTEN, WRITTEN_BF16]])
def test_chunk_is_lerobots(answered: Path, tmp_path: Path, name: str, target: str) -> None:
    golden = open_golden(answered / name)
    vlac.compile(golden.checkpoint, target=target, out=tmp_path / "out")
    policy = vlac.load(tmp_path / "out", engine=ENGINES[target], threads=1)
    for i in range(len(golden.tasks)):
        expected = golden.chunk(i)
        found = policy.act(**golden.observation(i))
        assert found.shape == expected.shape and found.dtype == np.float32
        assert np.abs(found - expected).max() <= 2e-5 * np.abs(expected).max()
    policy.close()


def test_cases_depend_on_every_input(answered: Path) -> None:
    """Answers of the two observations differ by far more than the tolerance: the comparison can fail."""
    for one in CASES:
        golden = open_golden(answered / one["name"])
        first, second = golden.chunk(0, "normalised"), golden.chunk(1, "normalised")
        assert np.abs(first - second).max() > 0.01 * np.abs(first).max()
