"""Numbers of a program moved by gradients until it answers as another program does, through the torch engine's own ops.

Of weights that are rounded, codes stay as they are and scales move; biases and norms move freely. A sampler's turns are
compared one by one, each from the state that the other program reached (side by side, so that gradients need no walk
back through the loop); a program without a loop is compared by its result. Observations are batched by torch.func.vmap.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np

from vlac.engines.base import NpArray
from vlac.engines.torch_engine import Tensor, TorchSession
from vlac.graph import Program, Repeat

BETAS = (0.9, 0.99)
RATES = (1e-3, 1e-3)
"""Of scales (relative) and of free parameters."""
WARM = 20
"""Steps over which rates rise; then they fall to 0 along a cosine."""


@dataclass(frozen=True)
class Coded:
    """A weight [n, k] as codes [n, g, size] and scales [n, g, 1]; `inverse` [n, n], if there, multiplies it."""

    codes: NpArray
    scales: NpArray
    inputs: int
    inverse: NpArray | None = None


@dataclass(frozen=True)
class Batch:
    """Observations of one bucket: runtime inputs stacked along a first axis, and which camera slots hold pictures."""

    env: Mapping[str, NpArray]
    symbols: Mapping[str, int]
    slots: Sequence[int]


class _Learning(TorchSession):
    """A session whose parameters are those of `made`, which keep gradients, and otherwise the program's."""

    def __init__(self, program: Program) -> None:
        super().__init__(program, lambda name: program.weights[name].load(), keep_weights=False)
        self.made: dict[str, Tensor] = {}
        self.kept: dict[str, Tensor] = {}

    def _parameter(self, name: str) -> Tensor:
        if name in self.made:
            return self.made[name]
        if name not in self.kept:
            self.kept[name] = self._tensor(self._weight(name))
        return self.kept[name]


class Tuner:
    """Two programs of the same stages: `wanted` answers, `program` is moved until it answers alike.

    coded: weights by name. free: parameters that move as they are. columns: of the result, how many count.
    steps: of Adam, at RATES that rise and fall over them.
    """

    def __init__(
        self,
        wanted: Program,
        program: Program,
        coded: Mapping[str, Coded],
        free: Sequence[str],
        columns: int,
        steps: int,
    ) -> None:
        self.wanted, self.moved = _Learning(wanted), _Learning(program)
        self.torch = torch = self.moved._torch
        self.columns, self.steps, self.done = columns, steps, 0

        def tensor(x: NpArray) -> Tensor:
            return torch.from_numpy(np.array(x, dtype=np.float32))

        self.coded = {n: (tensor(c.codes), tensor(c.scales), c) for n, c in coded.items()}
        self.inverse = {n: tensor(c.inverse) for n, c in coded.items() if c.inverse is not None}
        self.gains = {n: torch.zeros_like(s, requires_grad=True) for n, (_, s, _) in self.coded.items()}
        self.free = {n: tensor(program.weights[n].load()).requires_grad_(True) for n in free}
        groups = [
            {"params": list(p.values()), "rate": r} for p, r in zip((self.gains, self.free), RATES, strict=True) if p
        ]
        self.adam = torch.optim.Adam(groups, lr=0.0, betas=BETAS)

    # --- what is asked of it

    def chunks(self, batch: Batch, *, wanted: bool) -> NpArray:
        """The results [B, N, columns] of one of the two programs."""
        with self._set(), self.torch.no_grad():
            self._make()
            states = self._over(self.wanted if wanted else self.moved, batch, None)
            return np.array(self._last(states)[..., : self.columns].numpy())

    def step(self, batches: Sequence[Batch]) -> float:
        """One step of Adam on all of them; the mean loss before it, relative to the results' mean square."""
        torch, loss = self.torch, 0.0
        turned = min(1.0, (self.done + 1) / WARM) * 0.5 * (1 + math.cos(math.pi * self.done / self.steps))
        for group in self.adam.param_groups:
            group["lr"] = group["rate"] * turned
        self.adam.zero_grad()
        sizes = [len(next(iter(b.env.values()))) for b in batches]
        with self._set():
            for b, size in zip(batches, sizes, strict=True):
                with torch.no_grad():
                    states = self._over(self.wanted, b, None)
                self._make()
                part = self._missed(self._over(self.moved, b, states), states) * (size / sum(sizes))
                part.backward()
                loss += float(part.detach())
            self.adam.step()
        self.done += 1
        return loss

    def found(self) -> tuple[dict[str, NpArray], dict[str, NpArray]]:
        """(scales [n, g, 1] that float16 holds, free parameters), as they are now."""
        with self.torch.no_grad():
            scales = {n: self._scale(n).numpy().copy() for n in self.coded}
            return scales, {n: t.numpy().copy() for n, t in self.free.items()}

    # --- parameters

    def _scale(self, name: str) -> Tensor:
        s = self.coded[name][1] * (1 + self.gains[name])
        return s + (s.half().float() - s).detach()  # as it is stored, with the gradient of what it is

    def _make(self) -> None:
        made: dict[str, Tensor] = dict(self.free)
        for name, (codes, _, c) in self.coded.items():
            weight = (codes * self._scale(name)).flatten(1)[:, : c.inputs]
            made[name] = self.inverse[name] @ weight if name in self.inverse else weight
        self.moved.made = made

    # --- programs on batches

    def _over(self, session: _Learning, batch: Batch, states: Mapping[str, Tensor] | None) -> dict[str, Tensor]:
        """What a loop carries [B, turns + 1, ...], or with `states` of another, [B, turns, ...] one turn from each."""
        torch = self.torch
        env = {n: torch.from_numpy(np.ascontiguousarray(v)) for n, v in batch.env.items()}
        one = lambda e, s: self._one(session, e, s, batch)  # noqa: E731
        found: dict[str, Tensor] = torch.func.vmap(one, in_dims=(0, 0 if states else None))(env, states or None)
        return found

    def _one(
        self, session: _Learning, env: Mapping[str, Tensor], states: Mapping[str, Tensor] | None, batch: Batch
    ) -> dict[str, Tensor]:
        values = dict(env)
        for step in session.program.schedule.steps:
            stage = session.program.stage(step.stage)
            if isinstance(step, Repeat):
                own = {step.index, *(into for _, into, _ in step.carry)}
                rest = {n: values[n] for n, _ in stage.inputs if n not in own}
                if states is not None:
                    return self._turns(session, step, rest, states, batch.symbols)
                start = {into: values[initial] for _, into, initial in step.carry}
                return self._loop(session, step, rest, start, batch.symbols)
            if step.each:
                values.update(self._each(session, step.stage, values, batch))
            else:
                given = {n: values[n] for n, _ in stage.inputs}
                values.update(session._run(step.stage, given, batch.symbols))
        return {"": values[session.program.schedule.result][None]}

    def _each(self, session: _Learning, stage: str, values: Mapping[str, Tensor], batch: Batch) -> dict[str, Tensor]:
        torch, slots = self.torch, list(batch.slots)
        rest = {n: values[n] for n, _ in session.program.stage(stage).inputs if n != "pixels"}
        run = lambda p: session._run(stage, {**rest, "pixels": p}, batch.symbols)  # noqa: E731
        out = torch.func.vmap(run)(torch.stack([values["pixels"][i] for i in slots]))
        count = values["pixels"].shape[0]
        return {
            n: torch.cat([v[slots.index(i)] if i in slots else torch.zeros_like(v[0]) for i in range(count)])
            for n, v in out.items()
        }

    def _loop(
        self,
        session: _Learning,
        step: Repeat,
        rest: Mapping[str, Tensor],
        carried: Mapping[str, Tensor],
        symbols: Mapping[str, int],
    ) -> dict[str, Tensor]:
        torch, states = self.torch, [carried]
        for i in range(step.times):
            index = torch.tensor([i], dtype=torch.int32)
            out = session._run(step.stage, {**rest, **states[-1], step.index: index}, symbols)
            states.append({into: out[name] for name, into, _ in step.carry})
        return {into: torch.stack([s[into] for s in states]) for into in carried}

    def _turns(
        self,
        session: _Learning,
        step: Repeat,
        rest: Mapping[str, Tensor],
        states: Mapping[str, Tensor],
        symbols: Mapping[str, int],
    ) -> dict[str, Tensor]:
        torch = self.torch

        def turn(state: Mapping[str, Tensor], index: Tensor) -> dict[str, Tensor]:
            out = session._run(step.stage, {**rest, **state, step.index: index[None]}, symbols)
            return {into: out[name] for name, into, _ in step.carry}

        before = {n: v[:-1] for n, v in states.items()}
        found: dict[str, Tensor] = torch.func.vmap(turn)(before, torch.arange(step.times, dtype=torch.int32))
        return found

    def _last(self, states: Mapping[str, Tensor]) -> Tensor:
        """The result among what a loop carries: what starts as noise."""
        result = self.wanted.program.schedule.result
        carry = [c for s in self.wanted.program.schedule.steps if isinstance(s, Repeat) for c in s.carry]
        return states[next((into for name, into, _ in carry if name == result), "")][:, -1]

    def _missed(self, found: Mapping[str, Tensor], states: Mapping[str, Tensor]) -> Tensor:
        """Squares missed over all turns, relative to the results' mean square."""
        size = self._last(states)[..., : self.columns].square().mean()
        total = self.torch.zeros(())
        for name, value in found.items():
            target = states[name][:, -value.shape[1] :]
            total = total + (value - target)[..., : self.columns].square().mean() * value.shape[1]
        return total / size

    @contextmanager
    def _set(self) -> Iterator[None]:
        """One thread, so that sums are split alike everywhere; attention by plain products, which have batches."""
        torch, had = self.torch, self.torch.get_num_threads()
        torch.set_num_threads(1)
        try:
            with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
                yield
        finally:
            torch.set_num_threads(had)
