"""The process that looks at the board while another one is measured: every half second, at the lowest priority.

    python -m vlac.board.sampler OUT.jsonl [ROOT]

It writes a line per look and ends when its standard input is closed.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from vlac.board import energy, readers
from vlac.board.reading import Absent, Tree

EVERY_S = 0.5

MOVING: dict[str, Callable[[Tree], Any]] = {
    "cpu_mhz": readers.cpu_clocks,
    "gpu_mhz": readers.gpu_clock,
    "temperature_c": readers.temperatures,
    "throttling": readers.throttling,
    "memory": readers.memory,
    "energy": energy.read,
    "busy_s": readers.cpu_ticks,
    "load": readers.load_average,
}


def look(tree: Tree) -> dict[str, Any]:
    """Everything that moves, at one moment (t: seconds of time.time). What is absent says why, as text."""
    seen: dict[str, Any] = {"t": time.time(), "own_s": time.process_time()}
    for name, reader in MOVING.items():
        value = reader(tree)
        seen[name] = str(value) if isinstance(value, Absent) else value
    return seen


def main() -> None:
    """Looks until standard input is closed."""
    with contextlib.suppress(OSError, AttributeError):
        os.nice(19)
    out, tree = Path(sys.argv[1]), Tree(Path(sys.argv[2] if len(sys.argv) > 2 else "/"))
    with out.open("w", encoding="utf-8") as file:

        def write(**more: Any) -> None:
            file.write(json.dumps({**look(tree), **more}) + "\n")
            file.flush()

        write(processes=readers.processes(tree))
        print("looking", flush=True)
        ended = False
        while not ended:
            ready, _, _ = select.select([sys.stdin], [], [], EVERY_S)
            ended = bool(ready) and not sys.stdin.read(1)
            if not ended:
                write()
        write(processes=readers.processes(tree))


if __name__ == "__main__":
    main()
