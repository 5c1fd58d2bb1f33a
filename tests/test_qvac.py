"""Files in QVAC's layout, run by QVAC's own engine and held against vlac's fp32 reference.

Without a C compiler (tests/qvac_peer.py) the engine takes tens of seconds a process: few tests, of several calls.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import dialect_files as files
import numpy as np
import pi_files
import pytest
import qvac_peer

import vlac
from vlac.api import draw
from vlac.artifact import Golden
from vlac.checkpoint import read_policy
from vlac.errors import VlacError
from vlac.gguf_dialects import check_file
from vlac.goldens import answer, synthetic
from vlac.policy import Policy
from vlac.registry import silent
from vlac.targets._qvac_memory import LONGEST, right_prompts

pytestmark = [pytest.mark.qvac, pytest.mark.skipif(bool(qvac_peer.reason()), reason=qvac_peer.reason() or "there")]

Array = np.ndarray[Any, Any]


def cosine(a: Sequence[Array], b: Sequence[Array]) -> float:
    x, y = (np.concatenate([np.asarray(v, np.float64).ravel() for v in side]) for side in (a, b))
    return float(x @ y / np.linalg.norm(x) / np.linalg.norm(y))


def asked(policy: Policy, observations: Sequence[Golden]) -> list[dict[str, Array]]:
    """The observations as the engine's own inputs."""
    program = draw(policy)
    length = policy.spec.tokenizer_max_length if policy.family == "pi05" else 0
    return [
        qvac_peer.call(
            *(policy.io, policy.tokenizer, program),
            prompt_length=length,
            images=dict(o.images),
            state=o.state,
            task=o.task,
            noise=o.noise,
        )
        for o in observations
    ]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return files.write(tmp_path_factory.mktemp("qvac") / "engine", files.ENGINE, seed=5)


def held_against(
    policy: Policy, model: Path, observations: Sequence[Golden], folder: Path
) -> tuple[float, float, dict[str, Any]]:
    """(cosine over all calls, max|d|/max, hparams); the first call is asked again at the end, to the same answer."""
    answered, _ = answer(policy, observations, silent)
    calls = asked(policy, answered)
    actions, hparams = qvac_peer.run(model, [*calls, calls[0]], policy.io, folder)
    np.testing.assert_array_equal(actions[0], actions[-1])
    expected = [g.chunk_normalised for g in answered]
    worst = max(float(np.abs(a - e).max() / np.abs(e).max()) for a, e in zip(actions, expected, strict=False))
    return cosine(actions[:-1], expected), worst, hparams


@pytest.mark.parametrize(("target", "least", "most"), [("gguf-f32", 0.999999, 3e-3), ("gguf-q8", 0.9995, 0.1)])
def test_smolvla_answers_as_our_reference(
    checkpoint: Path, tmp_path: Path, target: str, least: float, most: float
) -> None:
    policy = read_policy(str(checkpoint))
    result = vlac.compile(checkpoint, target=target, out=tmp_path / "out.gguf", dialect="qvac", goldens=1)
    assert result.path is not None
    check_file(result.path, "qvac")
    observations = synthetic(policy.io, 2, seed=3)
    found, worst, hparams = held_against(policy, result.path, observations, tmp_path / "run")
    print(f"{target}: cosine {found:.9f}, max|d|/max {worst:.2e}")
    assert hparams["chunkSize"] == 7 and hparams["actionDim"] == 4
    assert hparams["maxActionDim"] == 11 and hparams["maxStateDim"] == 9 and hparams["visionImageSize"] == 64
    assert found >= least and worst <= most


@pytest.mark.parametrize(("target", "least", "most"), [("gguf-f32", 0.999999, 3e-4), ("gguf-q8", 0.9995, 0.02)])
def test_pi05_answers_as_our_reference(tmp_path: Path, target: str, least: float, most: float) -> None:
    """Widths are the published ones, which that engine has in its code; one layer of each part."""
    checkpoint = pi_files.write(tmp_path / "pi05")
    policy = read_policy(str(checkpoint))
    result = vlac.compile(checkpoint, target=target, out=tmp_path / "out.gguf", dialect="qvac", goldens=1)
    assert result.path is not None
    check_file(result.path, "qvac")
    observations = synthetic(policy.io, 2, seed=3)
    found, worst, hparams = held_against(policy, result.path, observations, tmp_path / "run")
    print(f"{target}: cosine {found:.9f}, max|d|/max {worst:.2e}")
    assert hparams["stateInputMode"] == "discrete" and hparams["numCameras"] == len(policy.io.cameras)
    assert found >= least and worst <= most


@pytest.mark.parametrize(("layers", "chunk"), [(2, 8), (4, 5), (6, 24)])
def test_prompts_that_the_engine_answers_wrong_are_known(tmp_path: Path, layers: int, chunk: int) -> None:
    """Whether its allocator puts something on a mask, worked out for every length of the prompt and held against it."""
    text = {**files.ENGINE.text, "num_hidden_layers": layers, "num_attention_heads": 3, "hidden_size": 160}
    shape = dataclasses.replace(files.ENGINE, text=text, cameras={"top": (32, 32)})
    checkpoint = files.write(tmp_path / "small", shape, chunk_size=chunk, expert_width_multiplier=0.5)
    policy = read_policy(str(checkpoint))
    result = vlac.compile(checkpoint, target="gguf-f32", out=tmp_path / "out.gguf", dialect="qvac", goldens=1)
    assert result.path is not None
    right = right_prompts(check_file(result.path, "qvac").dims, 1)
    answered, _ = answer(policy, synthetic(policy.io, 1, seed=3), silent)
    (call,) = asked(policy, answered)
    lengths = range(len(call["tokens"]), LONGEST + 1, 5)
    more = [(0, n - len(call["tokens"])) for n in lengths]
    calls = [{**call, "tokens": np.pad(call["tokens"], m), "mask": np.pad(call["mask"], m)} for m in more]
    actions, _ = qvac_peer.run(result.path, calls, policy.io, tmp_path / "run")
    found = [n for n, a in zip(lengths, actions, strict=True) if cosine([a], [answered[0].chunk_normalised]) > 0.999999]
    assert found == [n for n in lengths if n in right]


def test_a_mutated_file_that_passes_the_check_does_not_end_the_engine(tmp_path: Path) -> None:
    """60 mutations; benchmarks/qvac_mutations.py makes a thousand."""
    small = files.write(tmp_path / "small")
    result = vlac.compile(small, target="gguf-f32", out=tmp_path / "small.gguf", dialect="qvac", goldens=1)
    assert result.path is not None
    accepted = []
    for path in files.mutants(result.path, tmp_path, 60, seed=3):
        try:
            check_file(path, "qvac")
            accepted.append(path)
        except VlacError:
            continue
    assert 5 <= len(accepted) < 40
    found = qvac_peer.probe(accepted, tmp_path / "run")
    assert {p.name: said for p, said in found.items() if "ran" not in said} == {}
