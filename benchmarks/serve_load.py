"""Load on `vlac serve`: clients in processes of their own, every reply compared with the policy's own answer.

    python benchmarks/serve_load.py out/ [--protocols openpi http lerobot] [--minutes 10 3 3] [--clients 8]
        [--out FILE.json]

One protocol after the other, each with a server of its own; nobody needs to look on. --minutes: for each, or for all.

Clients: openpi's own; keep-alive HTTP; for LeRobot the calls of its RobotClient, message by message. States requests,
p50/p95/p99 of the round trip, wrong (crossed) and lost replies, the server's CPU time per request and memory over time,
and the machine's load average before and after: latencies say little on a machine that does something else as well.
FILE.json keeps one entry per protocol, written as each ends. Ends with 1 if a reply was wrong or lost.
"""

from __future__ import annotations

import argparse
import base64
import http.client
import json
import multiprocessing
import os
import pickle
import signal
import subprocess
import sys
import threading
import time
import types
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

Ask = Callable[[dict[str, Any], int], np.ndarray]
"""The answer to an observation, the client's n-th; raises when there is none."""
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


def openpi_client(port: int, client: int) -> Ask:
    from openpi_client.websocket_client_policy import WebsocketClientPolicy

    policy = WebsocketClientPolicy("127.0.0.1", port)
    return lambda o, n: policy.infer(
        {**o["images"], "observation.state": o["state"], "prompt": o["task"], "moment": list(o["moment"])}
    )["actions"]


def http_client(port: int, client: int) -> Ask:
    from vlac.serve.wire import npy, npy_bytes

    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    headers = {"Content-Type": "application/json", "Accept": "application/x-npy", "X-Client": f"client {client}"}

    def ask(o: dict[str, Any], n: int) -> np.ndarray:
        pictures = {k: {"npy": base64.b64encode(npy_bytes(v)).decode()} for k, v in o["images"].items()}
        rest = {"observation.state": o["state"].tolist(), "prompt": o["task"], "moment": list(o["moment"])}
        connection.request("POST", "/act", json.dumps({**pictures, **rest}), headers)
        with connection.getresponse() as response:
            body = response.read()
        if response.status != 200:
            raise RuntimeError(body.decode())
        return npy(body)

    return ask


@dataclass
class TimedObservation:
    timestamp: float
    timestep: int
    observation: dict[str, Any]
    must_go: bool = True


@dataclass
class RemotePolicyConfig:
    policy_type: str
    pretrained_name_or_path: str
    lerobot_features: dict[str, Any]
    actions_per_chunk: int


@dataclass
class TimedAction:
    timestamp: float = 0.0
    timestep: int = 0
    action: Any = None


def lerobot_client(port: int, client: int) -> Ask:
    import grpc

    from vlac.serve.lerobot import fields, message

    pretend_lerobot()
    channel = grpc.insecure_channel(f"127.0.0.1:{port}")
    path = "/transport.AsyncInference/"

    def call(name: str, data: bytes = b"") -> bytes:
        return channel.unary_unary(path + name)(data, timeout=60)

    features = {"observation.state": {"dtype": "float32", "shape": (STATE,), "names": [f"m{i}" for i in range(STATE)]}}
    call("Ready")
    call("SendPolicyInstructions", message(pickle.dumps(RemotePolicyConfig("smolvla", "served", features, 1000))))

    def ask(o: dict[str, Any], n: int) -> np.ndarray:
        motors = {f"m{i}": float(v) for i, v in enumerate(o["state"])}
        pictures = {k.rsplit(".", 1)[-1]: v for k, v in o["images"].items()}
        raw = {**motors, **pictures, "task": o["task"], "moment": list(o["moment"])}
        data = pickle.dumps(TimedObservation(time.time(), n, raw))
        channel.stream_unary(path + "SendObservations")(iter([bytes([8, 3, 18]) + message(data)[1:]]), timeout=60)
        found = pickle.loads(fields(call("GetActions"))[1])  # noqa: S301  (of our own server)
        if [a.timestep for a in found] != list(range(n, n + len(found))):
            raise RuntimeError("the steps are another observation's")
        return np.array([a.action for a in found], np.float32)

    return ask


def pretend_lerobot() -> None:
    """LeRobot's message classes and `torch.tensor` under their names, without importing either."""
    names = ["lerobot", "async_inference", "helpers"]
    for i in range(1, len(names) + 1):
        sys.modules[".".join(names[:i])] = types.ModuleType(names[i - 1])
    for kind in (TimedObservation, RemotePolicyConfig, TimedAction):
        kind.__module__ = ".".join(names)
        setattr(sys.modules[kind.__module__], kind.__name__, kind)
    sys.modules["torch"] = types.ModuleType("torch")
    sys.modules["torch"].tensor = lambda values: values  # type: ignore[attr-defined]


STATE = 4
CLIENTS: dict[str, Callable[[int, int], Ask]] = {
    "openpi": openpi_client,
    "http": http_client,
    "lerobot": lerobot_client,
}


def drive(
    protocol: str, port: int, client: int, seen: list[dict[str, Any]], wanted: list[np.ndarray], until: float, out: Any
) -> None:
    global STATE
    STATE = len(seen[0]["state"])
    times, wrong, lost = [], 0, 0
    n = 0
    try:
        ask = CLIENTS[protocol](port, client)
        while time.time() < until:
            started = time.perf_counter()
            actions = ask(seen[n % OBSERVATIONS], n)
            times.append((time.perf_counter() - started) * 1e3)
            wrong += not np.array_equal(actions, wanted[n % OBSERVATIONS])
            n += 1
    except Exception as error:  # whatever it is, a reply is missing, and the report must say so
        print(f"lost: {type(error).__name__}: {error}", file=sys.stderr)
        lost += 1
    out.put((times, wrong, lost))


def memory_mb(pid: int) -> float:
    pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**20


def cpu_seconds(pid: int) -> float:
    """User and system time of a process with its threads."""
    fields = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("artifact")
    parser.add_argument("--protocols", nargs="+", choices=tuple(CLIENTS), default=list(CLIENTS))
    parser.add_argument("--clients", type=int, default=8)
    parser.add_argument("--minutes", type=float, nargs="+", default=[1.0])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    minutes = args.minutes * len(args.protocols) if len(args.minutes) == 1 else args.minutes
    if len(minutes) != len(args.protocols):
        parser.error("--minutes: one number, or one for each protocol")
    failed = False
    for protocol, long in zip(args.protocols, minutes, strict=True):
        report = load(args.artifact, protocol, args.clients, long, args.threads)
        print(json.dumps({protocol: report}, indent=2), flush=True)
        failed |= bool(report["wrong"] or report["lost"] or report["server_exit_code"])
        if args.out is not None:
            known = json.loads(args.out.read_text(encoding="utf-8")) if args.out.exists() else {}
            args.out.write_text(json.dumps({**known, protocol: report}, indent=1) + "\n", encoding="utf-8")
    sys.exit(int(failed))


def load(artifact: str, protocol: str, count: int, minutes: float, threads: int) -> dict[str, Any]:
    """`count` clients of a new server for so long; what they met, as JSON values."""
    before = [round(v, 1) for v in os.getloadavg()]

    from vlac.drivers import open_driver

    driver = open_driver(artifact, threads=threads)
    cameras = [c.key for c in driver.io.cameras]
    seen = [observations(cameras, driver.io.state_dim, c) for c in range(count)]
    wanted = [[driver.act(o) for o in mine] for mine in seen]
    facts = driver.facts
    driver.close()

    command = ["serve", artifact, "--protocol", protocol, "--port", "0", "--threads", str(threads)]
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
    began, until = time.time(), time.time() + 60 * minutes
    clients = [
        spawn.Process(target=drive, args=(protocol, port, c, seen[c], wanted[c], until, results)) for c in range(count)
    ]
    cpu = cpu_seconds(server.pid)
    for c in clients:
        c.start()
    memory = []
    while time.time() < until:
        time.sleep(min(5.0, max(0.1, until - time.time())))
        memory.append(round(memory_mb(server.pid), 1))
    parts = [results.get(timeout=60) for _ in clients]
    for c in clients:
        c.join()
    seconds, cpu = time.time() - began, cpu_seconds(server.pid) - cpu
    server.send_signal(signal.SIGTERM)
    code = server.wait(30)
    times = np.concatenate([np.asarray(p[0]) for p in parts])
    quarter = max(1, len(memory) // 4)
    return {
        "policy": facts,
        "date": time.strftime("%Y-%m-%d", time.gmtime()),
        "clients": count,
        "seconds": round(seconds, 1),
        "requests": len(times),
        "per_second": round(len(times) / seconds, 1),
        "server_cpu_ms_per_request": round(cpu * 1e3 / max(1, len(times)), 2),
        "load_average": [round(v, 1) for v in os.getloadavg()],
        "load_average_before": before,
        "cores": os.cpu_count(),
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


if __name__ == "__main__":
    main()
