"""A worker process: one group of points in, one JSON line per row out. `python -m vlac.sweep.worker`

The request is the first line of stdin, which stays open: when the parent is gone, however it ended, so is the worker
with all that it started. Whatever libraries print goes to stderr, rows alone to stdout.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Mapping
from typing import Any

from vlac.sweep.point import Row, failed, group_of, run_group, scratch


def in_process(request: Mapping[str, Any], emit: Callable[[Row], None]) -> None:
    """Runs a group in a worker; a row per point reaches `emit`, those the worker did not live to tell as "failed"."""
    points, keys, _, _ = group_of(request)
    missing = dict(zip(keys, points, strict=True))
    with tempfile.TemporaryFile() as noise:
        process = subprocess.Popen(
            [sys.executable, "-m", "vlac.sweep.worker"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=noise,
            start_new_session=True,
        )
        assert process.stdin is not None and process.stdout is not None
        try:
            process.stdin.write(json.dumps(request).encode() + b"\n")
            process.stdin.flush()
            for line in process.stdout:
                row = json.loads(line)
                missing.pop(row["key"], None)
                emit(row)
            code = process.wait()
        except BrokenPipeError:
            code = process.wait()
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
            process.stdout.close()
        noise.seek(0)
        said = noise.read().decode("utf-8", "replace").strip()[-2000:]
    how = f"signal {-code}" if code < 0 else f"exit code {code}"
    for key, point in missing.items():
        emit(failed(point, key, f"the worker ended with {how}: {said or 'it said nothing'}"))


def _end_with_parent() -> None:
    def watch() -> None:
        sys.stdin.buffer.read()
        os.killpg(os.getpgrp(), signal.SIGKILL)

    threading.Thread(target=watch, daemon=True).start()


def main() -> int:
    """Reads the request, writes rows; a traceback on stderr and exit code 1 for what is no refusal."""
    out = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    request = json.loads(sys.stdin.buffer.readline())
    _end_with_parent()
    points, keys, measure, artifact = group_of(request)

    def emit(row: Row) -> None:
        from vlac.tables import as_json

        out.write(json.dumps(json.loads(as_json(row))) + "\n")
        out.flush()

    if artifact is not None:
        run_group(points, keys, measure, emit, artifact)
    else:
        with scratch(None) as folder:
            run_group(points, keys, measure, emit, folder / "artifact")
    out.close()
    os._exit(0)  # the thread that watches stdin may hold its lock


if __name__ == "__main__":
    sys.exit(main())
