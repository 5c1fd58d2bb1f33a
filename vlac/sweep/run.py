"""Runs a grid: what is measured already is left, the rest is shared among workers, every row is kept at once.

A folder holds it all: points/KEY.json (one row each, written whole or not at all), sweep.jsonl (the rows of the grid in
its order), pareto.svg and sweep.md. A run that was killed is started again with the same command.
"""

from __future__ import annotations

import fcntl
import json
import os
import queue
import shutil
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vlac.errors import InputError, VlacError
from vlac.registry import Progress, silent
from vlac.sweep.grid import Grid, read_grid, shard_of
from vlac.sweep.point import Point, Row, build_key, checkpoint_files, point_key, request_of
from vlac.sweep.worker import in_process

EXECUTORS = ("processes", "ray")


@dataclass(frozen=True)
class Group:
    """Points that share an artifact: one worker compiles it once and measures each."""

    build: str
    points: tuple[Point, ...]
    keys: tuple[str, ...]


def sweep(
    grid: str | Path,
    out: str | Path = "sweep/",
    *,
    workers: int = 1,
    shard: str = "1/1",
    executor: str = "processes",
    address: str | None = None,
    keep: bool = False,
    progress: Progress = silent,
) -> dict[str, Any]:
    """Compiles and measures every point of a grid (vlac/sweep/grid.py) that has no row in `out` yet.

    Args:
        workers: points at a time (processes). Latencies of points measured beside each other disturb one another; each
            row's bench verdict says when.
        shard: "i/n": only the i-th of n parts, for job arrays; parts may share `out`.
        executor: "processes", or "ray": on the cluster at `address` (RAY_ADDRESS, or one started here, without it).
        keep: leave the artifacts in out/artifacts.

    Returns: {"rows": rows of this part of the grid in order, "measured": how many of them now, "found": how many
        before, "failed": ..., "path": sweep.jsonl}. Raises VlacError for a wrong grid, before anything is compiled.
    """
    part, parts = shard_of(shard)
    if executor not in EXECUTORS:
        raise InputError(f"--executor {executor!r}; there are: {', '.join(EXECUTORS)}")
    if workers < 1:
        raise InputError(f"--workers {workers}: at least 1")
    table = read_grid(grid)
    folder = Path(out)
    groups = groups_of(table)
    mine = groups[part - 1 :: parts]
    with _alone(folder, part, parts):
        store = Store(folder, [k for g in groups for k in g.keys])
        left = [_pending(g, store) for g in mine]
        todo = [g for g in left if g.points]
        total = sum(len(g.keys) for g in mine)
        found = total - sum(len(g.keys) for g in todo)
        done = 0

        def keep_row(row: Row) -> None:
            nonlocal done
            store.add(row)
            done += 1
            progress("measuring points", found + done, total)

        progress("measuring points", found, total)
        requests = [_request(g, table, folder, executor) for g in todo]
        if executor == "ray":
            from vlac.sweep.on_ray import on_ray

            on_ray(requests, keep_row, address)
        else:
            _processes(requests, keep_row, workers, lambda r: None if keep else _forget(r))
        store.write()
    rows = [r for g in mine for k in g.keys if (r := store.get(k)) is not None]
    failures = sum(r["status"] == "failed" for r in rows)
    return {"rows": rows, "measured": done, "found": found, "failed": failures, "path": str(store.path)}


def groups_of(grid: Grid) -> list[Group]:
    """Points of the grid by artifact, each key once, in the order of the file."""
    files: dict[str, Mapping[str, Any]] = {}
    groups: dict[str, dict[str, Point]] = {}
    for point in grid.points:
        name = point.build.checkpoint
        if name not in files:
            files[name] = checkpoint_files(point.build)
        build = build_key(point.build, files[name], grid.measure)
        groups.setdefault(build, {}).setdefault(point_key(point, build, grid.measure), point)
    return [Group(build, tuple(points.values()), tuple(points)) for build, points in groups.items()]


def _pending(group: Group, store: Store) -> Group:
    """What of a group has no row yet, or one of a broken process."""
    left = [(p, k) for p, k in zip(group.points, group.keys, strict=True) if not store.settled(k)]
    return Group(group.build, tuple(p for p, _ in left), tuple(k for _, k in left))


def _request(group: Group, table: Grid, folder: Path, executor: str) -> dict[str, Any]:
    # another machine may not see this folder: there the worker makes a place of its own
    artifact = None if executor == "ray" else folder.resolve() / "artifacts" / group.build
    return request_of(group.points, group.keys, table.measure, artifact)


def _forget(request: Mapping[str, Any]) -> None:
    shutil.rmtree(request["artifact"], ignore_errors=True)


def _processes(
    requests: Sequence[Mapping[str, Any]],
    keep: Callable[[Row], None],
    workers: int,
    after: Callable[[Mapping[str, Any]], None],
) -> None:
    """Every request in a worker process, `workers` at a time; rows are kept by this thread alone."""
    waiting: queue.SimpleQueue[Mapping[str, Any] | None] = queue.SimpleQueue()
    rows: queue.SimpleQueue[Row | BaseException | None] = queue.SimpleQueue()
    for r in (*requests, *[None] * workers):
        waiting.put(r)

    def work() -> None:
        try:
            while (request := waiting.get()) is not None:
                in_process(request, rows.put)
                after(request)
        except BaseException as error:
            rows.put(error)
        rows.put(None)

    threads = [threading.Thread(target=work, daemon=True) for _ in range(min(workers, len(requests)))]
    for t in threads:
        t.start()
    alive = len(threads)
    while alive:
        row = rows.get()
        if isinstance(row, BaseException):
            raise row
        if row is None:
            alive -= 1
        else:
            keep(row)
    for t in threads:
        t.join()


# --- what is kept ------------------------------------------------------------------------------------------------


class Store:
    """Rows on disk by key, and the files made of those of one grid (`keys`, in order)."""

    def __init__(self, folder: Path, keys: Sequence[str]) -> None:
        self.folder, self.keys = folder, list(dict.fromkeys(keys))
        self.path = folder / "sweep.jsonl"
        (folder / "points").mkdir(parents=True, exist_ok=True)

    def get(self, key: str) -> Row | None:
        with suppress(OSError, ValueError):
            row = json.loads((self.folder / "points" / f"{key}.json").read_text(encoding="utf-8"))
            if isinstance(row, dict) and row.get("key") == key:
                return row
        return None

    def settled(self, key: str) -> bool:
        row = self.get(key)
        return row is not None and row["status"] != "failed"

    def add(self, row: Row) -> None:
        _replace(self.folder / "points" / f"{row['key']}.json", json.dumps(row) + "\n")
        self.write()

    def write(self) -> None:
        """sweep.jsonl, sweep.md and pareto.svg of all rows there are, other shards' as well."""
        from vlac.sweep.pareto import marked, picture, text

        with _locked(self.folder / ".rows.lock"):
            rows = marked([r for k in self.keys if (r := self.get(k)) is not None])
            _replace(self.path, "".join(json.dumps(r) + "\n" for r in rows))
            _replace(self.folder / "sweep.md", text(rows, len(self.keys)))
            _replace(self.folder / "pareto.svg", picture(rows))


def _replace(path: Path, text: str) -> None:
    temp = path.with_name(f".{path.name}.{os.getpid()}.{threading.get_ident()}")
    temp.write_text(text, encoding="utf-8")
    temp.replace(path)


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


@contextmanager
def _alone(folder: Path, part: int, parts: int) -> Iterator[None]:
    """One run at a time per shard and folder; the lock goes with the process, however it ends."""
    if folder.exists() and not folder.is_dir():
        raise VlacError(f"{folder} is no folder", remedy="give another place to -o")
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / f".shard-{part}-{parts}.lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise VlacError(
                f"{folder}: another `vlac sweep` is at work on shard {part}/{parts}",
                remedy="wait for it, or give each its own --shard",
            ) from None
        yield
