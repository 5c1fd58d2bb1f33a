"""Files in QVAC's layout, run by QVAC's own engine and held against vlac's fp32 reference.

The engine takes tens of seconds a process on two cores, so there are few of these, each with several calls.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import dialect_files as files
import numpy as np
import pytest
import qvac_peer

import vlac
from vlac.api import draw
from vlac.artifact import Golden
from vlac.checkpoint import read_policy
from vlac.gguf_dialects import check_file
from vlac.goldens import answer, synthetic
from vlac.policy import Policy
from vlac.registry import silent

pytestmark = [pytest.mark.qvac, pytest.mark.skipif(bool(qvac_peer.reason()), reason=qvac_peer.reason() or "there")]

Array = np.ndarray[Any, Any]


def cosine(a: Sequence[Array], b: Sequence[Array]) -> float:
    x, y = (np.concatenate([np.asarray(v, np.float64).ravel() for v in side]) for side in (a, b))
    return float(x @ y / np.linalg.norm(x) / np.linalg.norm(y))


def asked(policy: Policy, observations: Sequence[Golden]) -> list[dict[str, Array]]:
    """The observations as the engine's own inputs."""
    program = draw(policy)
    return [
        qvac_peer.call(
            policy.io, policy.tokenizer, program, images=dict(o.images), state=o.state, task=o.task, noise=o.noise
        )
        for o in observations
    ]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return files.write(tmp_path_factory.mktemp("qvac") / "engine", files.ENGINE, seed=5)


@pytest.mark.parametrize(("target", "least", "most"), [("gguf-f32", 0.999999, 3e-3), ("gguf-q8", 0.9995, 0.2)])
def test_their_engine_answers_as_our_reference(
    checkpoint: Path, tmp_path: Path, target: str, least: float, most: float
) -> None:
    policy = read_policy(str(checkpoint))
    result = vlac.compile(checkpoint, target=target, out=tmp_path / "out.gguf", dialect="qvac", goldens=1)
    assert result.path is not None
    check_file(result.path, "qvac")
    answered, _ = answer(policy, synthetic(policy.io, 3, seed=3), silent)
    calls = asked(policy, answered)
    actions, hparams = qvac_peer.run(result.path, [*calls, calls[0]], policy.io, tmp_path / "run")
    assert hparams["chunkSize"] == 7 and hparams["actionDim"] == 4
    assert hparams["maxActionDim"] == 11 and hparams["maxStateDim"] == 9 and hparams["visionImageSize"] == 64
    np.testing.assert_array_equal(actions[0], actions[3])  # a call does not depend on those before it
    expected = [g.chunk_normalised for g in answered]
    figures = [float(np.abs(a - e).max() / np.abs(e).max()) for a, e in zip(actions, expected, strict=False)]
    print(f"{target}: cosine {cosine(actions[:3], expected):.9f}, max|d|/max {max(figures):.2e}")
    assert cosine(actions[:3], expected) >= least
    assert max(figures) <= most
