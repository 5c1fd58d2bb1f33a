"""What an engine says of observations, for parity: chunks, stage values, and whether it says the same twice."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from vlac import metrics
from vlac.artifact import Golden
from vlac.engines.base import EngineSession
from vlac.graph import Program
from vlac.io import IO
from vlac.registry import Progress
from vlac.runtime.actions import apply_action_steps
from vlac.runtime.inputs import prepared
from vlac.runtime.schedule import generated
from vlac.runtime.session import execute

NpArray = np.ndarray[Any, Any]
CALLS = 3
"""How often an engine answers the first observation, to be compared with itself."""


@dataclass(frozen=True)
class Answers:
    """What one engine said: per observation the normalised chunk, the chunk in the policy's units and stage values;
    `repeats` compares the engine with itself on the first observation: call by call, and whole loops (a robot's way)
    with stages run one by one (`stepwise`, max|d|/max)."""

    normalised: list[NpArray]
    chunks: list[NpArray]
    taps: list[dict[str, NpArray]]
    repeats: dict[str, Any]
    tokens: list[NpArray | None]
    """ids that were generated, None for a policy that generates none"""


def answers(
    program: Program,
    session: EngineSession,
    io: IO,
    tokenizer: bytes | None,
    given: Sequence[Golden],
    progress: Progress,
    what: str,
    follow: Sequence[NpArray | None] = (),
) -> Answers:
    """`follow`: the ids that another engine generated, for each observation (see `execute`)."""
    total = 2 * len(given) + CALLS - 1
    result = Answers([], [], [], {}, [])
    done = 0
    for i, obs in enumerate(given):
        ready = prepared(io, tokenizer, program, obs)
        # the chunk comes from the way a robot takes (whole loops); stage values from a run of their own, step by step
        chunks = []
        for _ in range(1 if i else CALLS):
            progress(what, done, total)
            chunks.append(execute(program, session, ready.env, ready.symbols))
            done += 1
        progress(what, done, total)
        taps: dict[str, NpArray] = {}
        leader = follow[i] if follow else None
        stepwise = execute(program, session, ready.env, ready.symbols, taps=taps, follow=leader)
        done += 1
        if i == 0:
            result.repeats.update(
                calls=CALLS,
                bit_equal=all(np.array_equal(x, chunks[0]) for x in chunks[1:]),
                max_relative=max(metrics.max_relative(x, chunks[0]) for x in chunks[1:]),
                stepwise=metrics.max_relative(stepwise, chunks[0]),
            )
        chunk = chunks[0] if leader is None else stepwise
        result.normalised.append(apply_action_steps(io.normalised_action_steps, chunk, ready.state))
        result.chunks.append(apply_action_steps(io.action_steps, chunk, ready.state))
        result.taps.append({k: np.array(v) for k, v in taps.items()})
        result.tokens.append(generated(program, taps))
    progress(what, total, total)
    return result
