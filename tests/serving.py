"""A server in a thread of the test, on a toy policy whose inference the test can hold."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import runtime_toy

from vlac.drivers import ArtifactDriver
from vlac.runtime.session import Session
from vlac.serve.run import Options, Served, build

TASK = "pick up the red cube"


class Toy(ArtifactDriver):
    """The toy policy; `go` cleared holds every inference until it is set again."""

    def __init__(self) -> None:
        super().__init__(Session(runtime_toy.artifact(), engine="numpy"))
        self.go = threading.Event()
        self.go.set()
        self.seen: list[dict[str, Any]] = []

    def act(self, observation: dict[str, Any]) -> np.ndarray:
        self.seen.append(observation)
        assert self.go.wait(20)
        return super().act(observation)


@dataclass
class Running:
    port: int
    served: Served
    toy: Toy


@contextmanager
def running(protocol: str, toy: Toy | None = None, **options: Any) -> Iterator[Running]:
    toy = toy or Toy()
    served = build(toy, Options(protocol=protocol, **options))
    ports: list[int] = []
    ready, failures = threading.Event(), []
    loop = asyncio.new_event_loop()
    stop = asyncio.Event()

    def listening(port: int) -> None:
        ports.append(port)
        ready.set()

    def run() -> None:
        try:
            loop.run_until_complete(served.protocol.serve("127.0.0.1", 0, stop, listening))
        except Exception as error:
            failures.append(error)
            ready.set()

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    assert ready.wait(20) and not failures, failures
    try:
        yield Running(ports[0], served, toy)
    finally:
        toy.go.set()
        loop.call_soon_threadsafe(stop.set)
        thread.join(20)
        served.close()
        assert not thread.is_alive() and not failures, failures
        loop.close()


def observation(seed: int = 0, **changes: Any) -> dict[str, Any]:
    """As a client sends it; `direct` is the answer it must get."""
    made = runtime_toy.observation(seed)
    state = np.asarray(made["state"], np.float32) + seed
    return {
        "observation/images/top": made["images"]["top"],
        "images": {"wrist": made["images"]["wrist"]},
        "observation/state": state,
        "prompt": TASK,
        "moment": [seed, 0],
        **changes,
    }


def direct(seed: int = 0) -> np.ndarray:
    made = runtime_toy.observation(seed)
    state = np.asarray(made["state"], np.float32) + seed
    return Toy().act({"images": made["images"], "state": state, "task": TASK, "moment": (seed, 0)})
