"""Two rates over a network: a client sends frames when its cameras have some, and its state when it wants actions.

Frames are looked at in a thread of their own (`Session.observe`): an answer waits for two stages of them at most
(vlac.runtime.two_rate). They belong to the client that sent them.
"""

from __future__ import annotations

import dataclasses
import threading
import warnings
from collections import deque
from typing import Any

import numpy as np

from vlac.drivers import ArtifactDriver
from vlac.errors import VlacWarning
from vlac.serve.core import Answer, Asked

NpArray = np.ndarray[Any, Any]
KEPT = 4
"""Frames of a client that are kept for what looks at an answer afterwards: the newest, and those it may be of."""


class Eyes:
    """The policy of the core that looks, around the driver of the core that acts."""

    def __init__(self, driver: ArtifactDriver) -> None:
        self.driver, self.session = driver, driver.session
        self._lock = threading.Lock()
        self._frames: dict[str, deque[tuple[int, dict[str, Any]]]] = {}

    # --- of the core that looks ---

    def before(self, asked: Asked) -> dict[str, Any]:
        """The observation, and whose it is."""
        return {**asked.observation, "source": asked.client}

    def act(self, observation: dict[str, Any]) -> NpArray:
        """float32 [1, 1], the number of the client's frames: 1, 2, ..."""
        source = observation["source"]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", VlacWarning)
            text = observation["task"] if self.driver.io.text_steps else None
            with self._lock:  # before an answer can be of them
                kept = self._frames.setdefault(source, deque(maxlen=KEPT))
                number = kept[-1][0] + 1 if kept else 1
                kept.append((number, {"images": observation["images"], "task": observation["task"]}))
            try:
                self.session.observe(observation["images"], text, source=source)
            except BaseException:
                with self._lock:
                    kept.pop()
                raise
        return np.full((1, 1), number, np.float32)

    def chunk(self, asked: Asked, answer: Answer) -> Answer:
        """The answer to frames: their number."""
        return dataclasses.replace(answer, observed=int(answer.chunk[0, 0]), chunk=np.zeros((0, 0), np.float32))

    def gone(self, client: str) -> None:
        """Forgets a client's frames."""
        self.session.forget(client)
        with self._lock:
            self._frames.pop(client, None)

    # --- of the core that acts ---

    def complete(self, observation: dict[str, Any]) -> dict[str, Any]:
        """An observation that was answered by frames sent before, with those frames and their number "observed"."""
        number = int(self.session.stats["observation"])
        with self._lock:
            kept = dict(self._frames.get(observation["source"], ()))
        return {**observation, **kept.get(number, {}), "observed": number}
