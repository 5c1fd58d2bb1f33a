"""`vlac serve`: opens the policy, puts a core, its watchers and one protocol together, and ends gracefully."""

from __future__ import annotations

import asyncio
import dataclasses
import ipaddress
import logging
import signal
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from vlac.drivers import ArtifactDriver, Driver, open_driver
from vlac.errors import InputError
from vlac.facts import is_artifact
from vlac.parity import joints_of
from vlac.record import Recorder
from vlac.serve.chunking import Chunking, Rtc
from vlac.serve.core import After, Asked, Core
from vlac.serve.eyes import Eyes
from vlac.serve.guard import Guard, parse_bound
from vlac.serve.lerobot import LeRobot
from vlac.serve.observation import ObservationReader
from vlac.serve.openpi import OpenPI
from vlac.serve.pages import Pages
from vlac.serve.sidecars import Recording, Shadow
from vlac.serve.watch import Watch
from vlac.serve.web import Web

log = logging.getLogger("vlac.serve")
PORTS = {"openpi": 8000, "lerobot": 8080, "http": 8000}


@dataclass(frozen=True)
class Options:
    """What the command line says; see its help."""

    protocol: str = "http"
    host: str = "127.0.0.1"
    port: int | None = None
    token: str | None = None
    max_bytes: int = 32 << 20
    max_clients: int = 64
    fps: int = 30
    record: Path | None = None
    dashboard: bool = False
    shadow: str | None = None
    shadow_every: int = 10
    limits: tuple[str, ...] = ()
    hold: str | None = None
    rtc: Rtc | None = None
    rename: Mapping[str, str] = field(default_factory=dict)


@dataclass
class Served:
    """A server put together: its parts, and how to end them."""

    core: Core
    watch: Watch
    pages: Pages
    protocol: Any
    recorder: Recorder | None
    shadow: Shadow | None

    def close(self) -> None:
        """Answers what waits, commits what is recorded, ends the shadow."""
        self.core.close()
        if self.recorder is not None:
            self.recorder.close()
        if self.shadow is not None:
            self.shadow.close()


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach it."""
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def build(driver: Driver, options: Options) -> Served:
    """The parts around one policy; InputError for options that do not fit it."""
    if options.protocol not in PORTS:
        raise InputError(f"--protocol {options.protocol!r}; there are {', '.join(PORTS)}")
    if "drift" in "".join(options.limits) and options.shadow is None:
        raise InputError("--limit drift needs --shadow REFERENCE")
    bounds = tuple(parse_bound(text) for text in options.limits)
    io = driver.io
    chunking = _chunking(driver, options)
    facts = facts_of(driver) | ({} if chunking is None else {"rtc": dataclasses.asdict(chunking.rtc)})
    watch = Watch(tuple(joints_of(io)), io.n_action_steps, io.n_action_steps / options.fps * 1e3, facts)
    after: list[After] = []
    shadow: Shadow | None = None
    guard = Guard(bounds, options.hold, watch) if bounds else None
    if options.shadow is not None:

        def seen(drift: float, joints: list[float]) -> None:
            watch.drift(drift, joints)
            watch.event("shadow", "compared")
            if guard is not None:
                guard.drift = drift

        def failed(reason: str) -> None:
            watch.event("shadow", "failed")
            log.error("the shadow %s: %s", options.shadow, reason)

        shadow = Shadow(options.shadow, options.shadow_every, watch.joints, seen, failed)
        after.append(shadow)
    if guard is not None:
        after.append(guard)
    recorder = None
    if options.record is not None:
        recorder = Recorder(options.record, max(1, round(options.fps / io.n_action_steps)))
        after.append(Recording(recorder))
    after.append(watch)
    if chunking is not None:
        after.append(chunking)
    core = _core(driver, tuple(after), options.max_clients, watch, chunking)
    watch.gauges = {k: lambda k=k: float(core.load()[k]) for k in ("clients", "waiting")}  # type: ignore[misc]
    if recorder is not None:
        counts = recorder.counts
        for name in ("steps", "recorded", "dropped", "refused"):
            watch.gauges[f"record_{name}"] = lambda name=name: float(getattr(counts, name))  # type: ignore[misc]
    pages = Pages(core, watch, options.token, facts, options.dashboard)
    reader = ObservationReader(
        io, options.rename, guided=chunking is not None, frames=isinstance(driver, ArtifactDriver)
    )
    return Served(core, watch, pages, _protocol(options, core, reader, pages), recorder, shadow)


def _core(driver: Driver, after: tuple[After, ...], max_clients: int, watch: Watch, chunking: Chunking | None) -> Core:
    """The core that acts and, of an artifact, the one that looks beside it."""
    if not isinstance(driver, ArtifactDriver):
        return Core(driver, after, max_clients, watch.count)
    eyes = Eyes(driver)

    def count(name: str) -> None:
        watch.count("frames" if name == "chunks" else name)

    def before(asked: Asked) -> dict[str, Any]:
        observation = asked.observation if chunking is None else chunking.before(asked)
        return {**observation, "source": asked.client}

    looking = Core(eyes, (eyes,), max_clients, count, eyes.before)
    return Core(driver, after, max_clients, watch.count, before, looking, eyes.complete)


def _chunking(driver: Driver, options: Options) -> Chunking | None:
    if options.rtc is None:
        return None
    if not isinstance(driver, ArtifactDriver):
        raise InputError("--rtc: only artifacts are guided, and this is a checkpoint", remedy="compile it")
    if options.shadow is not None and not is_artifact(options.shadow):
        raise InputError(
            f"--rtc: the shadow {options.shadow} is a checkpoint and cannot be guided", remedy="compile it"
        )
    return Chunking(driver.session, options.rtc, options.fps)


def _protocol(options: Options, core: Core, reader: ObservationReader, pages: Pages) -> Any:
    if options.protocol == "openpi":
        return OpenPI(core, reader, pages, options.max_bytes)
    if options.protocol == "lerobot":
        return LeRobot(core, reader, pages, options.max_bytes, options.fps)
    return Web(core, reader, pages, options.max_bytes)


def facts_of(driver: Driver) -> dict[str, Any]:
    """What a client should know, as plain values."""
    io = driver.io
    return {
        "name": driver.facts["name"],
        "target": driver.facts["target"],
        "engine": driver.facts["engine"],
        "cameras": [c.key for c in io.cameras],
        "state_dim": io.state_dim,
        "action_dim": io.action_dim,
        "action_names": list(io.action_names),
        "chunk_size": io.chunk_size,
        "n_action_steps": io.n_action_steps,
        "instruction": bool(io.text_steps),
    }


def serve(
    path: str,
    options: Options,
    engine: str | None = None,
    threads: int | None = None,
    say: Callable[[str], None] = print,
) -> None:
    """Serves until SIGINT or SIGTERM; then answers what waits and returns.

    Raises VlacError for a policy or options that do not fit, OSError when the address is taken.
    """
    driver = open_driver(path, engine=engine, threads=threads)
    served = None
    try:
        served = build(driver, options)
        asyncio.run(_until_signal(served, options, say))
    finally:
        if served is not None:
            served.close()
        driver.close()


async def _until_signal(served: Served, options: Options, say: Callable[[str], None]) -> None:
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, stop.set)
    if not is_loopback(options.host) and options.token is None:
        say(f"warning: {options.host} can be reached by others, and there is no --token")

    def ready(port: int) -> None:
        scheme = {"openpi": "ws", "lerobot": "grpc", "http": "http"}[options.protocol]
        say(f"serving {served.pages.facts['name']} as {options.protocol} on {scheme}://{options.host}:{port}")
        web = getattr(served.protocol, "web_port", port)
        if web != port:
            say(f"plain HTTP, health and metrics on http://{options.host}:{web}")
        if options.dashboard:
            say(f"dashboard on http://{options.host}:{web}/dashboard")

    port = PORTS[options.protocol] if options.port is None else options.port
    await served.protocol.serve(options.host, port, stop, ready)
    say("ended; everything that waited was answered")
