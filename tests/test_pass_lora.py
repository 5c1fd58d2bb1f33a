"""merge-lora: the weights that peft merges, fused projections, and adapters that do not belong to the policy."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from checkpoint_files import read_tensors, write_tensors
from conftest import GoldenFolder

from vlac.api import apply_passes
from vlac.checkpoint import read_policy
from vlac.errors import CheckpointError, Inapplicable, Unsupported, VlacError
from vlac.policy import Policy
from vlac.readers.lerobot_smolvla import lerobot_name
from vlac.weights import LazyTensor

GOLDEN = Path(__file__).parent / "golden" / "peft"
MODULE = "model.vlm_with_expert.lm_expert.layers.0.self_attn.q_proj"


@pytest.fixture(scope="module")
def tiny(golden: Callable[[str], GoldenFolder]) -> Policy:
    return read_policy(str(golden("smolvla_tiny").checkpoint))


def adapter(folder: Path, tensors: dict[str, Any], **config: Any) -> Path:
    folder.mkdir(exist_ok=True)
    write_tensors(folder / "adapter_model.safetensors", {f"base_model.model.{k}": v for k, v in tensors.items()})
    table = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, **config}
    (folder / "adapter_config.json").write_text(json.dumps(table))
    return folder


def pair(module: str, rows: int, columns: int, rank: int = 2) -> dict[str, Any]:
    rng = np.random.default_rng(0)
    return {
        f"{module}.lora_A.weight": rng.standard_normal((rank, columns)).astype(np.float32),
        f"{module}.lora_B.weight": rng.standard_normal((rows, rank)).astype(np.float32),
    }


@pytest.mark.parametrize("case", ["plain", "patterns", "rslora", "dora"])
def test_weights_are_those_that_peft_merges(tiny: Policy, case: str) -> None:
    after = apply_passes(tiny, [f"merge-lora:adapter={GOLDEN / case}"])
    want = read_tensors(GOLDEN / case / "merged.safetensors")
    changed = {n for n in tiny.weights if after.weights[n] is not tiny.weights[n]}
    assert {lerobot_name(n) for n in changed} == set(want)
    for name in changed:
        got, peft = after.weights[name].load(), want[lerobot_name(name)]
        np.testing.assert_allclose(got, peft, atol=1e-6 * np.abs(peft).max())
        assert np.abs(got - tiny.weights[name].load()).max() > 1e-3
    figures = after.history[0].figures
    assert figures["weights_merged"] == 4 and figures["dora"] == (case == "dora")


def test_a_fused_projection_is_divided(tiny: Policy, tmp_path: Path) -> None:
    """q, k and v that one tensor of the checkpoint holds: each gets its rows of B."""
    names = [f"text.layers.0.self_attn.{p}_proj.weight" for p in "qkv"]
    fused = {n: LazyTensor.of(tiny.weights[n].load(), "model.safetensors: block.qkv.weight") for n in names}
    policy = tiny.replace(weights=tiny.weights.with_(**fused))
    rows = [t.shape[0] for t in fused.values()]
    tensors = pair("block.qkv", sum(rows), 48)
    after = apply_passes(policy, [f"merge-lora:adapter={adapter(tmp_path / 'a', tensors)}"])
    delta = 2 * tensors["block.qkv.lora_B.weight"].astype(float) @ tensors["block.qkv.lora_A.weight"]
    both = np.concatenate([after.weights[n].load() - tiny.weights[n].load() for n in names])
    np.testing.assert_allclose(both, delta, atol=1e-5)
    short = adapter(tmp_path / "b", pair("block.qkv", sum(rows) - 1, 48))
    with pytest.raises(Unsupported, match="cannot be divided"):
        apply_passes(policy, [f"merge-lora:adapter={short}"])


def test_saved_modules_replace_and_dead_ones_are_told(tiny: Policy, tmp_path: Path) -> None:
    bias = np.arange(48, dtype=np.float32)
    tensors = pair(MODULE, 72, 36) | {"model.state_proj.bias": bias}
    after = apply_passes(tiny, [f"merge-lora:adapter={adapter(tmp_path / 'a', tensors)}"])
    np.testing.assert_array_equal(after.weights["state_proj.bias"].load(), bias)
    assert after.history[0].figures["weights_replaced"] == 1
    dead = pair(MODULE, 72, 36) | pair("model.vlm_with_expert.vlm.lm_head", 100, 48)
    assert not any("lm_head" in n for n in tiny.weights)
    there = any("lm_head" in n for n in read_tensors(Path(tiny.source.checkpoint) / "model.safetensors"))
    recipe = [f"merge-lora:adapter={adapter(tmp_path / 'b', dead)}"]
    if there:
        assert "lm_head" in apply_passes(tiny, recipe).history[0].figures["not_read_by_inference"]
    else:
        with pytest.raises(CheckpointError, match="trained on another model"):
            apply_passes(tiny, recipe)


def test_an_embedding_is_merged_transposed(tiny: Policy, tmp_path: Path) -> None:
    rng, (vocabulary, width) = np.random.default_rng(0), tiny.weights["text.embed_tokens.weight"].shape
    name = lerobot_name("text.embed_tokens.weight").removesuffix(".weight")
    a, b = rng.standard_normal((2, vocabulary)).astype(np.float32), rng.standard_normal((width, 2)).astype(np.float32)
    folder = adapter(tmp_path / "a", {f"{name}.lora_embedding_A": a, f"{name}.lora_embedding_B": b})
    after = apply_passes(tiny, [f"merge-lora:adapter={folder}"])
    got = after.weights["text.embed_tokens.weight"].load() - tiny.weights["text.embed_tokens.weight"].load()
    np.testing.assert_allclose(got, 2 * (b.astype(float) @ a).T, atol=1e-5)


@pytest.mark.parametrize(
    ("tensors", "config", "error", "says"),
    [
        (pair("model.nothing", 72, 36), {}, CheckpointError, "does not hold"),
        (pair(MODULE, 71, 36), {}, CheckpointError, r"\[72, 36\], the adapter is for \[71, 36\]"),
        (pair(MODULE, 72, 36, 3), {}, CheckpointError, "do not fit r=2"),
        (pair(MODULE, 72, 36), {"use_dora": True}, CheckpointError, "lora_magnitude_vector is missing"),
        (pair(MODULE, 72, 36), {"peft_type": "LOHA"}, Unsupported, "LOHA"),
        (pair(MODULE, 72, 36), {"use_qalora": True}, Unsupported, "use_qalora"),
        (pair(MODULE, 72, 36), {"bias": "all"}, Unsupported, "bias = 'all'"),
        ({f"{MODULE}.lora_A.weight": np.zeros((2, 36), np.float32)}, {}, CheckpointError, "lora_B is missing"),
    ],
)
def test_adapters_that_do_not_fit(
    tiny: Policy, tmp_path: Path, tensors: dict[str, Any], config: dict[str, Any], error: type[VlacError], says: str
) -> None:
    with pytest.raises(error, match=says):
        apply_passes(tiny, [f"merge-lora:adapter={adapter(tmp_path / 'a', tensors, **config)}"])


def test_it_comes_first_and_needs_a_folder(tiny: Policy, tmp_path: Path) -> None:
    folder = adapter(tmp_path / "a", pair(MODULE, 72, 36))
    with pytest.raises(Inapplicable, match="after smooth-norms"):
        apply_passes(tiny, ["smooth-norms:ratio=1", f"merge-lora:adapter={folder}"])
    with pytest.raises(Inapplicable, match="no such folder"):
        apply_passes(tiny, [f"merge-lora:adapter={tmp_path / 'b'}"])
    with pytest.raises(VlacError, match="needs adapter="):
        apply_passes(tiny, ["merge-lora"])
