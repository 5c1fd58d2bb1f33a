"""Load on `vlac serve`: clients in processes of their own, every reply compared with the policy's own answer.

    python benchmarks/serve_load.py out/ --clients 8 --minutes 10 --out results.json

States requests, p50/p95/p99 of the round trip, wrong (crossed) and lost replies, and the server's memory over time.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np

OBSERVATIONS = 4
"""Different observations per client; their answers are known beforehand."""


def observations(cameras: list[str], state_dim: int, client: int) -> list[dict[str, Any]]:
    made = []
    for n in range(OBSERVATIONS):
        rng = np.random.Generator(np.random.PCG64([client, n]))
        pictures = {c: rng.integers(0, 256, (64, 64, 3), dtype=np.uint8) for c in cameras}
        state = rng.standard_normal(state_dim).astype(np.float32)
        made.append({"images": pictures, "state": state, "task": "push the red cube left", "moment": (client, n)})
    return made


def drive(port: int, seen: list[dict[str, Any]], wanted: list[np.ndarray], until: float, results: Any) -> None:
    from openpi_client.websocket_client_policy import WebsocketClientPolicy
    from websockets.exceptions import WebSocketException

    policy = WebsocketClientPolicy("127.0.0.1", port)
    times, wrong, lost = [], 0, 0
    n = 0
    while time.time() < until:
        o = seen[n % OBSERVATIONS]
        message = {
            **o["images"],
            "observation.state": o["state"],
            "prompt": o["task"],
            "moment": list(o["moment"]),
        }
        started = time.perf_counter()
        try:
            actions = policy.infer(message)["actions"]
        except (OSError, RuntimeError, WebSocketException) as error:
            print(f"lost: {type(error).__name__}: {error}", file=sys.stderr)
            lost += 1
            break
        times.append((time.perf_counter() - started) * 1e3)
        wrong += not np.array_equal(actions, wanted[n % OBSERVATIONS])
        n += 1
    results.put((times, wrong, lost))


def memory_mb(pid: int) -> float:
    pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**20


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("artifact")
    parser.add_argument("--clients", type=int, default=8)
    parser.add_argument("--minutes", type=float, default=1.0)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()

    from vlac.drivers import open_driver

    driver = open_driver(args.artifact, threads=args.threads)
    cameras = [c.key for c in driver.io.cameras]
    seen = [observations(cameras, driver.io.state_dim, c) for c in range(args.clients)]
    wanted = [[driver.act(o) for o in mine] for mine in seen]
    facts = driver.facts
    driver.close()

    command = ["serve", args.artifact, "--protocol", "openpi", "--port", "0", "--threads", str(args.threads)]
    server = subprocess.Popen(
        [sys.executable, "-c", "from vlac.cli import main; main()", *command], stderr=subprocess.PIPE, text=True
    )
    assert server.stderr is not None
    line = server.stderr.readline()
    if "serving" not in line:
        sys.exit(line + server.stderr.read())
    port = int(line.rsplit(":", 1)[1])
    threading.Thread(target=server.stderr.read, daemon=True).start()

    spawn = multiprocessing.get_context("spawn")
    results = spawn.Queue()
    began, until = time.time(), time.time() + 60 * args.minutes
    clients = [
        spawn.Process(target=drive, args=(port, seen[c], wanted[c], until, results)) for c in range(args.clients)
    ]
    for c in clients:
        c.start()
    memory = []
    while time.time() < until:
        time.sleep(min(5.0, max(0.1, until - time.time())))
        memory.append(round(memory_mb(server.pid), 1))
    parts = [results.get(timeout=60) for _ in clients]
    for c in clients:
        c.join()
    seconds = time.time() - began
    server.send_signal(signal.SIGTERM)
    code = server.wait(30)
    times = np.concatenate([np.asarray(p[0]) for p in parts])
    quarter = max(1, len(memory) // 4)
    report = {
        "policy": facts,
        "clients": args.clients,
        "seconds": round(seconds, 1),
        "requests": len(times),
        "per_second": round(len(times) / seconds, 1),
        "round_trip_ms": {f"p{q}": round(float(np.percentile(times, q)), 2) for q in (50, 95, 99, 100)},
        "fewest_and_most_per_client": [min(len(p[0]) for p in parts), max(len(p[0]) for p in parts)],
        "wrong": sum(p[1] for p in parts),
        "lost": sum(p[2] for p in parts),
        "server_memory_mb": {
            "every_5_s": memory,
            "second_quarter": float(np.median(memory[quarter : 2 * quarter] or memory)),
            "last_quarter": float(np.median(memory[-quarter:])),
        },
        "server_exit_code": code,
    }
    text = json.dumps(report, indent=2)
    print(text)
    if args.out is not None:
        args.out.write_text(text + "\n", encoding="utf-8")
    sys.exit(1 if report["wrong"] or report["lost"] or code else 0)


if __name__ == "__main__":
    main()
