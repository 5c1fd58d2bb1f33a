"""What frames at a rate of their own save a server: CPU time per control tick, frames changing every few ticks.

    python benchmarks/serve_two_rate.py out/ [--ticks 400] [--every 5] [--out FILE.json]

Three ways through openpi's protocol, each on a server of its own: every message with new frames (one rate), every
message with frames that change every `--every` ticks (the server finds them unchanged), and frames sent alone when they
change with states in between. States the server's CPU time per tick and the bytes sent per tick; nothing waits for a
clock, and wall time is not stated.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from serve_load import cpu_seconds

WARM = 20
Tick = Callable[[int], list[dict[str, Any]]]


def served(artifact: str, tick: Tick, ticks: int) -> dict[str, Any]:
    """Figures of one way: tick(n) gives the messages of tick n, the last of which is answered with actions."""
    from websockets.sync.client import connect

    from vlac.serve.wire import pack, unpack

    command = ["serve", artifact, "--protocol", "openpi", "--port", "0", "--threads", "1"]
    server = subprocess.Popen(
        [sys.executable, "-c", "from vlac.cli import main; main()", *command], stderr=subprocess.PIPE, text=True
    )
    try:
        assert server.stderr is not None
        port = int(server.stderr.readline().rsplit(":", 1)[1])
        with connect(f"ws://127.0.0.1:{port}", compression=None, max_size=None) as socket:
            socket.recv()
            sent, began = 0, 0.0
            for n in range(WARM + ticks):
                if n == WARM:
                    sent, began = 0, cpu_seconds(server.pid)
                for message in tick(n):
                    data = pack(message)
                    sent += len(data)
                    socket.send(data)
                    answer = socket.recv()
                    if isinstance(answer, str):
                        sys.exit(answer)
                if "actions" not in unpack(answer):
                    sys.exit("no actions")
            cpu = cpu_seconds(server.pid) - began
    finally:
        server.terminate()
        server.communicate()
    return {"server_cpu_ms_per_tick": round(cpu * 1e3 / ticks, 2), "kib_sent_per_tick": round(sent / 1024 / ticks, 1)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("artifact")
    parser.add_argument("--ticks", type=int, default=400)
    parser.add_argument("--every", type=int, default=5)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()

    from vlac.artifact import open_artifact

    artifact = open_artifact(args.artifact)
    io = artifact.io
    rng = np.random.default_rng(0)
    states = rng.standard_normal((WARM + args.ticks, io.state_dim)).astype(np.float32)

    def frames(n: int) -> dict[str, Any]:
        random = np.random.default_rng([n])
        pictures = {c.key: random.integers(0, 256, (*c.shape[1:], 3), np.uint8) for c in io.cameras}
        return {**pictures, "prompt": "push the red cube to the left"}

    def state(n: int) -> dict[str, Any]:
        return {"observation.state": states[n], "moment": [0, n]}

    def two(n: int) -> list[dict[str, Any]]:
        return [*([{**frames(n), "observe": True}] if n % args.every == 0 else []), state(n)]

    ways: dict[str, Tick] = {
        "new frames in every message": lambda n: [{**frames(n), **state(n)}],
        "unchanged frames in every message": lambda n: [{**frames(n - n % args.every), **state(n)}],
        "frames alone, then states": two,
    }
    report = {
        "name": artifact.manifest.get("name"),
        "target": artifact.manifest.get("target"),
        "ticks": args.ticks,
        "ticks_per_frame": args.every,
        "ways": {name: served(args.artifact, tick, args.ticks) for name, tick in ways.items()},
    }
    text = json.dumps(report, indent=1)
    print(text)
    if args.out is not None:
        args.out.write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
