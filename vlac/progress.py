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


class Phases:
    """Tells a new phase from the next item of the same one.

    Work that reports each item by its own name (tensor after tensor, same total) is one phase under its first name.
    """

    def __init__(self) -> None:
        self.name = ""
        self._done = 0
        self._total = 0

    def enter(self, what: str, done: int, total: int) -> bool:
        """Notes a report; True when it opens a new phase."""
        same = what == self.name or (total > 1 and total == self._total and done >= self._done)
        self._done, self._total = done, total
        if not same:
            self.name = what
        return not same


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
    phases = Phases()
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task: Any = None

        def show(what: str, done: int, total: int) -> None:
            nonlocal task
            if phases.enter(what, done, total):
                if task is not None:
                    bar.update(task, total=1, completed=1, share="")
                    bar.stop_task(task)
                task = bar.add_task(what, total=total or None, share="")
            text = f"{100 * done // total} %" if total else ""
            bar.update(task, description=what, completed=done, total=total or None, share=text)

        yield show


def _lines(every: float = 5.0) -> Show:
    """One line when a phase begins, then at most one in `every` seconds."""
    phases, when = Phases(), 0.0

    def show(what: str, done: int, total: int) -> None:
        nonlocal when
        now = time.monotonic()
        new = phases.enter(what, done, total)
        if not new and (now - when < every or not total):
            return
        when = now
        part = f" {100 * done // total} %" if total and not new else ""
        print(f"{what}{part}", file=sys.stderr, flush=True)

    return show
