"""bitsandbytes' 4-bit linears on the torch engine."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from conftest import GoldenFolder

import vlac
from vlac.artifact import open_artifact
from vlac.errors import EngineError

bitsandbytes = pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
Golden = Callable[[str], GoldenFolder]


@pytest.fixture(scope="module")
def artifacts(golden: Golden, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    out = tmp_path_factory.mktemp("out")
    for target in ("onnx-fp32", "gguf-f32"):
        vlac.compile(golden("smolvla_tiny").checkpoint, target=target, out=out / target)
    return {target: out / target for target in ("onnx-fp32", "gguf-f32")}


@pytest.mark.parametrize("target", ["onnx-fp32", "gguf-f32"])
@pytest.mark.parametrize("linear", ["nf4", "fp4"])
def test_session_computes_with_the_rounded_weights(
    golden: Golden, artifacts: dict[str, Path], target: str, linear: str
) -> None:
    """The same program in numpy, with linears rounded and restored by bitsandbytes itself, gives the same chunk."""
    import torch
    from bitsandbytes import functional

    from vlac.engines.bitsandbytes_linear import linear_weights
    from vlac.engines.numpy_engine import NumpySession
    from vlac.runtime.actions import apply_action_steps
    from vlac.runtime.session import execute, prepare

    artifact = open_artifact(artifacts[target])
    chosen = linear_weights(artifact)
    assert len(chosen) > 20

    def weight(name: str) -> np.ndarray:
        values = artifact.tensors[name].decode()
        if name not in chosen:
            return values
        pad = -values.shape[1] % 64
        packed, state = functional.quantize_4bit(
            torch.nn.functional.pad(torch.tensor(values), (0, pad)), blocksize=64, quant_type=linear
        )
        return functional.dequantize_4bit(packed, state).numpy()[:, : values.shape[1]]

    tiny = golden("smolvla_tiny")
    ready = prepare(artifact.io, artifact.tokenizer, artifact.program, **tiny.observation(0))
    x = execute(artifact.program, NumpySession(artifact.program, weight), ready.env, ready.symbols)
    expected = apply_action_steps(artifact.io.action_steps, x)
    policy = vlac.load(artifacts[target], engine="torch", options={"linear": linear})
    found = policy.act(**tiny.observation(0))
    assert np.abs(found - expected).max() <= 2e-5 * np.abs(expected).max()
    moved = np.linalg.norm(found - tiny.chunk(0)) / np.linalg.norm(tiny.chunk(0))
    assert 1e-3 < moved < 0.5
    assert policy.info["linear"] == linear and policy.info["linear_values"] > 100_000


def test_int8_rounds_weights_and_what_they_multiply(golden: Golden, artifacts: dict[str, Path]) -> None:
    """Two scales per product, of the weight's row and of the activation's: percents of the chunk, not nothing."""
    tiny = golden("smolvla_tiny")
    policy = vlac.load(artifacts["gguf-f32"], engine="torch", options={"linear": "int8"})
    found = policy.act(**tiny.observation(0))
    moved = np.linalg.norm(found - tiny.chunk(0)) / np.linalg.norm(tiny.chunk(0))
    assert 1e-3 < moved < 0.05 and policy.info["linear"] == "int8"


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"linear": "nf3"}, "nf4, fp4, int8"),
        ({"linear": "nf4", "dtype": "f64"}, "runs in f32"),
        ({"lin": "nf4"}, "linear"),
    ],
)
def test_refusals(artifacts: dict[str, Path], options: dict[str, str], says: str) -> None:
    with pytest.raises(EngineError, match=says):
        vlac.load(artifacts["onnx-fp32"], engine="torch", options=options)
