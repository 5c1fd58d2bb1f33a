"""The server's core, whatever the protocol: one thread owns the policy, clients wait their turn, the newest observation
of a client wins.

At most one observation per client waits, so nothing grows: a newer one takes the place (and the turn) of the older,
whose sender is told "superseded". An answer goes to the future of the request it belongs to and nowhere else.
"""

from __future__ import annotations

import dataclasses
import logging
import secrets
import threading
import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np

from vlac.errors import InputError, VlacError
from vlac.serve.refusal import Refused

NpArray = np.ndarray[Any, Any]
log = logging.getLogger("vlac.serve")


class Policy(Protocol):
    """What is served: `act({"images", "state", "task", "moment"}) -> float32 [N, A]` (vlac.drivers)."""

    def act(self, observation: dict[str, Any]) -> NpArray: ...


@dataclass(frozen=True)
class Answer:
    """A chunk for one request.

    chunk: float32 [N, A]. timing: milliseconds ("wait_ms" for the turn, the policy's stages, "total_ms").
    said: what a guard remarked. held: the chunk is not the policy's, the guard holds the robot.
    guided: rows that are drawn to what is left of the client's chunk before (real-time chunking).
    observed: number of the client's frames that it is an answer to, where they came before it; a chunk without rows
        says that these were looked at.
    """

    chunk: NpArray
    timing: Mapping[str, float]
    said: tuple[str, ...] = ()
    held: bool = False
    guided: int = 0
    observed: int = 0


@dataclass(frozen=True)
class Asked:
    """A request under way. `step`: the control step it was observed at, where the client tells it."""

    client: str
    observation: dict[str, Any]
    step: int | None
    at: float
    answer: Future[Answer] = field(repr=False, compare=False)


class After(Protocol):
    """What looks at every chunk before it leaves (guard, shadow, recorder, watch), in the policy's thread."""

    def chunk(self, asked: Asked, answer: Answer) -> Answer: ...

    def gone(self, client: str) -> None: ...


class Core:
    """Owns the policy's thread.

    Args:
        policy: see Policy.
        after: each sees every answer, in order, and may return another.
        max_clients: how many may be connected.
        before: what the policy is asked instead of a request's observation, made in the policy's thread.
        eyes: a core that looks at frames which are sent alone (vlac.serve.eyes); its clients are this one's.
        complete: an observation without frames -> with those it was answered by, and their number "observed".
        count: called with a name for everything counted ("chunks", or a refusal's code).
    """

    def __init__(
        self,
        policy: Policy,
        after: tuple[After, ...] = (),
        max_clients: int = 64,
        count: Any = lambda name: None,
        before: Callable[[Asked], dict[str, Any]] | None = None,
        eyes: Core | None = None,
        complete: Callable[[dict[str, Any]], dict[str, Any]] | None = None,
    ) -> None:
        self.policy, self.after, self.max_clients = policy, after, max_clients
        self._before, self._eyes, self._complete = before, eyes, complete
        self._count = count
        self._changed = threading.Condition()
        self._waiting: dict[str, Asked] = {}
        self._clients: set[str] = set()
        self._gone: list[str] = []
        self._busy = self._draining = self._closed = False
        self._salt, self._number = secrets.randbits(62), 0
        self._thread = threading.Thread(target=self._run, name="vlac-policy", daemon=True)
        self._thread.start()

    # --- the protocols' side, any thread ---

    @property
    def draining(self) -> bool:
        """Whether the server is about to end."""
        return self._draining

    def load(self) -> dict[str, int]:
        """How many clients are connected and how many observations wait."""
        with self._changed:
            return {"clients": len(self._clients), "waiting": len(self._waiting)}

    def connect(self, client: str) -> None:
        """Lets a client in; Refused("too_many_clients"), or ("draining")."""
        with self._changed:
            if self._draining:
                raise self.refused("draining", "the server is about to end", "connect again later")
            if client not in self._clients and len(self._clients) >= self.max_clients:
                raise self.refused("too_many_clients", f"{self.max_clients} clients are connected", "close one")
            self._clients.add(client)
        if self._eyes is not None:
            self._eyes.connect(client)

    def disconnect(self, client: str) -> None:
        """Forgets a client and what it asked."""
        if self._eyes is not None:
            self._eyes.disconnect(client)
        with self._changed:
            if client not in self._clients:
                return
            self._clients.discard(client)
            self._gone.append(client)
            old = self._waiting.pop(client, None)
            self._changed.notify_all()
        if old is not None:
            old.answer.cancel()

    def submit(self, client: str, observation: dict[str, Any], step: int | None = None) -> Future[Answer]:
        """The future of an answer; it fails with Refused. An earlier observation of the client that still waits is
        superseded."""
        future: Future[Answer] = Future()
        old = None
        with self._changed:
            if self._draining or client not in self._clients:
                code, why = (
                    ("draining", "the server is about to end") if self._draining else ("failed", "not connected")
                )
                raise self.refused(code, why)
            moment = observation.get("moment")
            if moment is None:
                self._number += 1
                observation = {**observation, "moment": (self._salt, self._number)}
            elif step is None:
                step = moment[1]
            old = self._waiting.get(client)
            self._waiting[client] = Asked(client, observation, step, time.perf_counter(), future)  # keeps its place
            self._changed.notify_all()
        if old is not None:
            _fail(old.answer, self.refused("superseded", "a newer observation of this client took its place"))
        return future

    def ask(self, client: str, read: Callable[[], dict[str, Any]], step: int | None = None) -> Future[Answer]:
        """`submit` of what `read` returns; its refusal is counted and raised."""
        try:
            observation = read()
        except Refused as error:
            self._count(error.code)
            raise
        except Exception as error:  # whatever a reader breaks on, the connection and the others go on
            log.exception("a message of %s could not be read", client)
            raise self.refused("failed", f"{type(error).__name__}: {error}") from None
        if self._eyes is not None and observation.get("observe"):
            return self._eyes.submit(client, observation, step)
        return self.submit(client, observation, step)

    def refused(self, code: str, message: str, remedy: str = "") -> Refused:
        """A refusal that is counted."""
        self._count(code)
        return Refused(code, message, remedy=remedy)

    def drain(self) -> None:
        """Nothing new from now on; what waits is answered."""
        with self._changed:
            self._draining = True
            self._changed.notify_all()

    def close(self, timeout: float = 10.0) -> bool:
        """Drains, ends the thread; False when the policy did not finish within `timeout` seconds."""
        self.drain()
        if self._eyes is not None:
            self._eyes.close(timeout)
        deadline = time.monotonic() + timeout
        with self._changed:
            self._changed.wait_for(lambda: not self._waiting and not self._busy, timeout)
            left, self._waiting = list(self._waiting.values()), {}
            self._closed = True
            self._changed.notify_all()
        for asked in left:
            _fail(asked.answer, self.refused("draining", "the server has ended"))
        self._thread.join(max(0.1, deadline - time.monotonic()))
        return not self._thread.is_alive()

    # --- the policy's thread ---

    def _run(self) -> None:
        while True:
            with self._changed:
                self._busy = False
                self._changed.notify_all()
                self._changed.wait_for(lambda: self._waiting or self._closed or self._gone)
                gone, self._gone = self._gone, []
                if self._closed and not gone:
                    return
                asked = self._waiting.pop(next(iter(self._waiting))) if self._waiting else None
                self._busy = asked is not None
            for client in gone:
                for each in self.after:
                    each.gone(client)
            if asked is not None and asked.answer.set_running_or_notify_cancel():
                self._answer(asked)

    def _answer(self, asked: Asked) -> None:
        started = time.perf_counter()
        try:
            if self._before is not None:
                asked = dataclasses.replace(asked, observation=self._before(asked))
            chunk = np.asarray(self.policy.act(asked.observation), dtype=np.float32)
            answer = Answer(chunk, _timing(self.policy, asked.at, started))
            if self._complete is not None and asked.observation["images"] is None:
                asked = dataclasses.replace(asked, observation=self._complete(asked.observation))
                answer = dataclasses.replace(answer, observed=asked.observation["observed"])
            for each in self.after:
                answer = each.chunk(asked, answer)
        except Refused as error:
            self._count(error.code)
            asked.answer.set_exception(error)
        except VlacError as error:
            code = "input" if isinstance(error, InputError) else "engine"
            asked.answer.set_exception(self.refused(code, error.message, error.remedy))
        except Exception as error:  # whatever one request breaks, the others are served
            log.exception("a request of %s failed", asked.client)
            asked.answer.set_exception(self.refused("failed", f"{type(error).__name__}: {error}"))
        else:
            self._count("chunks")
            asked.answer.set_result(answer)


def plain(answer: Answer, actions: Any, timing: str) -> dict[str, Any]:
    """An answer as a mapping for the wire; `actions` as the protocol writes them, `timing` the key of the timing."""
    said: dict[str, Any] = {timing: {k: float(v) for k, v in answer.timing.items()}}
    if len(answer.chunk):
        said |= {"actions": actions, "limits": list(answer.said), "held": answer.held, "guided": answer.guided}
    return said | ({"observed": answer.observed} if answer.observed else {})


def _timing(policy: Policy, at: float, started: float) -> dict[str, float]:
    stats = getattr(getattr(policy, "session", None), "stats", {})
    stages = {k: float(v) for k, v in stats.items() if k.endswith("_ms") and k != "total_ms"}
    now = time.perf_counter()
    return {"wait_ms": (started - at) * 1e3, **stages, "infer_ms": (now - started) * 1e3, "total_ms": (now - at) * 1e3}


def _fail(future: Future[Answer], error: Refused) -> None:
    if future.set_running_or_notify_cancel():
        future.set_exception(error)
