"""How far work has come, shown to a person: bars on a terminal, a line now and then elsewhere, nothing when quiet."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

Show = Callable[[str, int, int], None]


def _nothing(what: str, done: int, total: int) -> None:
    """Shows nothing."""


@contextmanager
def progress(quiet: bool) -> Iterator[Show]:
    """A `vlac.registry.Progress` on stderr: bars on a terminal, a line now and then elsewhere, nothing when quiet."""
    if quiet:
        yield _nothing
    elif sys.stderr.isatty():
        with _bars() as show:
            yield show
    else:
        yield _lines()


@contextmanager
def _bars() -> Iterator[Show]:
    from rich.console import Console
    from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

    columns = (
        SpinnerColumn(),
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.fields[share]}"),
        TimeElapsedColumn(),
    )
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        known: dict[str, Any] = {}

        def show(what: str, done: int, total: int) -> None:
            if what not in known:
                for task in known.values():
                    bar.stop_task(task)
                known[what] = bar.add_task(what, total=total or None, share="")
            text = f"{100 * done // total} %" if total else ""
            bar.update(known[what], completed=done, total=total or None, share=text)

        yield show


def _lines(every: float = 5.0) -> Show:
    """One line when something new begins, then at most one in `every` seconds."""
    last, when = "", 0.0

    def show(what: str, done: int, total: int) -> None:
        nonlocal last, when
        now = time.monotonic()
        new = what != last
        if not new and (now - when < every or not total):
            return
        last, when = what, now
        part = f" {100 * done // total} %" if total and not new else ""
        print(f"{what}{part}", file=sys.stderr, flush=True)

    return show
