"""Stages and whole loops as CUDA graphs: hundreds of small kernels are launched as one.

A graph reads and writes fixed memory. `Graphs` keeps for each key a set of input tensors; a call copies its inputs
there, replays, and copies the outputs out, so that nobody holds memory that the next replay overwrites.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass
from typing import Any

Tensor = Any
Tensors = Mapping[str, Tensor]
Function = Callable[[Tensors], dict[str, Tensor]]
Replay = Callable[[], None]
Record = Callable[[Callable[[], dict[str, Tensor]]], tuple[Replay, dict[str, Tensor]]]
"""Runs a function once while recording it; how to run it again, and the outputs, which then change in place."""

WARM_UPS = 3
"""Runs before recording, in which libraries choose kernels and take memory: that must not happen inside."""


def on_cuda(torch: Any, device: Any) -> Record:
    """Records with torch.cuda.CUDAGraph."""
    pool = torch.cuda.graph_pool_handle()

    def record(run: Callable[[], dict[str, Tensor]]) -> tuple[Replay, dict[str, Tensor]]:
        with torch.cuda.device(device):
            side = torch.cuda.Stream(device)
            side.wait_stream(torch.cuda.current_stream(device))
            with torch.cuda.stream(side):
                for _ in range(WARM_UPS):
                    run()
            torch.cuda.current_stream(device).wait_stream(side)
            graph = torch.cuda.CUDAGraph()
            # another thread may be observing meanwhile: only this one's forbidden calls spoil the recording
            with torch.cuda.graph(graph, pool=pool, capture_error_mode="thread_local"):
                out = run()
        return graph.replay, out

    return record


@dataclass(frozen=True)
class _Recorded:
    inputs: Tensors
    replay: Replay
    outputs: Tensors


class Graphs:
    """Functions by key, recorded at their first call. `record` is `on_cuda`, or a stand-in that tests bring."""

    def __init__(self, record: Record) -> None:
        self._record = record
        self._known: dict[Hashable, _Recorded] = {}

    def __len__(self) -> int:
        return len(self._known)

    def run(self, key: Hashable, function: Function, inputs: Tensors) -> dict[str, Tensor]:
        """function(inputs), by replaying what was recorded for `key`; same shapes and dtypes at every call."""
        known = self._known.get(key)
        if known is None:
            fixed = {name: t.clone() for name, t in inputs.items()}
            replay, outputs = self._record(lambda: function(fixed))
            known = self._known[key] = _Recorded(fixed, replay, outputs)
        for name, t in known.inputs.items():
            t.copy_(inputs[name])
        known.replay()
        return {name: t.clone() for name, t in known.outputs.items()}

    def clear(self) -> None:
        """Frees the graphs and their memory."""
        self._known.clear()
