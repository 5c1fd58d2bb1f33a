"""The process that `vlac bench` measures: it loads one artifact, runs it, writes its timings as JSON and ends.

    python -m vlac.bench_worker REQUEST.json RESULT.json

A process of its own, so that load times are cold and the peak of memory is the policy's and nobody else's.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

FEW = 10
"""Actions in the row "ten_actions"."""


def peak_rss() -> tuple[int, str]:
    """Peak resident bytes of this process image, and where the figure is from.

    VmHWM first: ru_maxrss survives exec, so that a child can inherit its parent's peak (Linux, getrusage(2)).
    """
    from vlac.machine import read_text

    for line in read_text("/proc/self/status").splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024, "VmHWM"
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return (peak if sys.platform == "darwin" else peak * 1024), "ru_maxrss"


def _major_faults() -> int | str:
    """Pages that this process had to fetch from disk."""
    try:
        import resource
    except ImportError:
        return "not available: this system has no getrusage"
    return resource.getrusage(resource.RUSAGE_SELF).ru_majflt


def measure(request: dict[str, Any], entered: float) -> dict[str, Any]:
    """Runs the request ({path, engine, threads, runs, least, budget_s, started, sustain}); times in milliseconds.

    sustain: {"window_s", "most_s"}: until latency has settled (vlac.steady), or for most_s; {}: `runs` chunks.
    """
    import numpy as np

    from vlac import steady
    from vlac.runtime.session import load

    imported = time.perf_counter()
    before, _ = peak_rss()
    options = request.get("options")
    session = load(request["path"], engine=request["engine"], threads=request["threads"], options=options)
    loaded = time.perf_counter()
    inputs = inputs_of(request["path"])
    rng = np.random.Generator(np.random.PCG64(0))

    def act(given: dict[str, Any]) -> dict[str, float]:
        begun = time.perf_counter()
        session.act(**given)
        took = 1000 * (time.perf_counter() - begun)
        return {**{k: float(v) for k, v in session.stats.items() if k.endswith("_ms")}, "chunk_ms": took}

    def turn(i: int) -> dict[str, float]:
        """An observation nobody has seen: the runtime reuses what it knows about an unchanged camera."""
        given = dict(inputs[i % len(inputs)])
        return act({**given, "images": {k: _touched(v, i, rng) for k, v in given["images"].items()}})

    first = turn(0)
    to_first = 1000 * (time.time() - request["started"])
    turn(1)  # warm-up that is not counted
    runs: list[dict[str, float]] = []
    ends: list[float] = []
    sustain, since = request.get("sustain") or {}, None
    started, begun, worked = time.time(), time.perf_counter(), time.process_time()
    while True:
        runs.append(turn(2 + len(runs)))
        ends.append(time.perf_counter() - begun)
        if sustain:
            since = steady.settled(ends, [r["chunk_ms"] for r in runs], sustain["window_s"])
            if (since is not None and len(runs) >= request["least"]) or ends[-1] > sustain["most_s"]:
                break
        elif len(runs) >= request["runs"] or (len(runs) >= request["least"] and ends[-1] > request["budget_s"]):
            break
    window = {"start": started, "end": time.time(), "cpu_s": time.process_time() - worked}
    reuse = _reused(inputs[0], act, rng, min(len(runs), request["least"]), session.hparams.chunk_size)
    peak, source = peak_rss()
    result = {
        "info": {k: v for k, v in session.info.items() if isinstance(v, (str, int, float, bool, list))},
        "hparams": {k: v for k, v in session.hparams.items() if isinstance(v, (str, int, float, bool, list, tuple))},
        "import_ms": 1000 * (imported - entered),
        "load_ms": 1000 * (loaded - imported),
        "first_ms": first["chunk_ms"],
        "to_first_chunk_ms": to_first,
        "runs": runs,
        "ends_s": ends,
        "window": window,
        "settled_at": since,
        "major_faults": _major_faults(),
        "reuse": reuse,
        "peak_rss_bytes": peak,
        "peak_rss_from": source,
        "before_load_bytes": before,
    }
    session.close()
    return result


def inputs_of(path: str) -> list[dict[str, Any]]:
    """Arguments of `act` for an artifact's golden observations, or for seeded ones."""
    from vlac.artifact import open_artifact
    from vlac.goldens import synthetic
    from vlac.runtime.inputs import samples

    artifact = open_artifact(path)
    goldens = artifact.goldens() or synthetic(artifact.io, 2)
    text = bool(artifact.io.text_steps)
    noise = samples(artifact.program)
    return [
        {
            "images": dict(g.images),
            "state": g.state,
            **({"noise": g.noise} if noise else {}),
            **({"task": g.task} if text else {}),
        }
        for g in goldens
    ]


def _reused(
    given: dict[str, Any], act: Callable[[dict[str, Any]], dict[str, float]], rng: Any, count: int, chunk_size: int
) -> dict[str, list[float]]:
    """Milliseconds of chunks for which only one of several cameras is new, only state and noise, and of which, all new,
    only the first FEW actions are asked for."""

    def afresh() -> dict[str, Any]:
        state, noise = given.get("state"), given.get("noise")
        moved = (
            {}
            if state is None or not state.size
            else {"state": state + rng.standard_normal(state.shape).astype(state.dtype) / 100}
        )
        return moved | ({} if noise is None else {"noise": rng.standard_normal(noise.shape).astype(noise.dtype)})

    images = dict(given["images"])
    act({**given, "images": images})
    result: dict[str, list[float]] = {}
    if len(images) > 1:
        last = list(images)[-1]
        result["one_camera_new"] = []
        for i in range(count):
            images[last] = _touched(images[last], i, rng)
            result["one_camera_new"].append(act({**given, "images": images, **afresh()})["chunk_ms"])
    if afresh():
        result["state_new"] = [act({**given, "images": images, **afresh()})["chunk_ms"] for _ in range(count)]
    if chunk_size > FEW:
        result["ten_actions"] = []
        for i in range(count):
            images = {k: _touched(v, i, rng) for k, v in images.items()}
            result["ten_actions"].append(act({**given, "images": images, **afresh(), "n_actions": FEW})["chunk_ms"])
    return result


def _touched(image: Any, i: int, rng: Any) -> Any:
    copy = image.copy()
    copy[i % copy.shape[0], :, :] = rng.integers(0, 256, copy.shape[1:], dtype=copy.dtype)
    return copy


def main() -> int:
    """Reads the request, writes the result or the refusal; 0 when there are figures."""
    entered = time.perf_counter()
    from vlac.errors import VlacError

    request = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    try:
        result, code = measure(request, entered), 0
    except VlacError as error:
        result, code = {"error": error.message, "remedy": error.remedy}, 2
    Path(sys.argv[2]).write_text(json.dumps(result), encoding="utf-8")
    return code


if __name__ == "__main__":
    sys.exit(main())
