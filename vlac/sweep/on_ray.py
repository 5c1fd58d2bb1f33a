"""Groups of points as Ray tasks, on as many machines as the cluster has (extra `ray`).

Every node needs vlac with what it measures, and the checkpoint under the same name. A task runs its points in a worker
process of its own, as on one machine, and sends the rows back; nothing is shared through the disk.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from vlac.errors import VlacError
from vlac.sweep.point import Row, failed, group_of
from vlac.sweep.worker import in_process


def on_ray(requests: Sequence[Mapping[str, Any]], keep: Callable[[Row], None], address: str | None) -> None:
    """Runs every request as a task on one CPU of a Ray cluster; rows reach `keep` as tasks end, "node" added."""
    if not requests:
        return
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    try:
        import ray
    except ImportError:
        raise VlacError("--executor ray needs Ray", remedy="pip install 'vlac-compiler[ray]'") from None
    ours = not ray.is_initialized()
    if ours:
        try:
            ray.init(address=address, include_dashboard=None if address else False, log_to_driver=False)
        except (ConnectionError, ValueError) as error:
            raise VlacError(
                f"no Ray cluster at {address or os.environ.get('RAY_ADDRESS', '')!r}: {error}",
                remedy="start one: ray start --head, then ray start --address HOST:6379 on the others",
            ) from None
    try:
        _tasks(ray, requests, keep)
    finally:
        if ours:
            ray.shutdown()


def _tasks(ray: Any, requests: Sequence[Mapping[str, Any]], keep: Callable[[Row], None]) -> None:
    remote = ray.remote(num_cpus=1, max_retries=1, scheduling_strategy="SPREAD")(task)
    waiting = {remote.remote(request): request for request in requests}
    while waiting:
        (ready,), _ = ray.wait(list(waiting), num_returns=1)
        request = waiting.pop(ready)
        try:
            rows = ray.get(ready)
        except ray.exceptions.RayError as error:
            points, keys, _, _ = group_of(request)
            rows = [
                failed(p, k, f"Ray: {' '.join(str(error).split())[:500]}") for p, k in zip(points, keys, strict=True)
            ]
        for row in rows:
            keep(row)


def task(request: Mapping[str, Any]) -> list[Row]:
    """What a node does: the rows of one group, with the node's id."""
    import ray

    rows: list[Row] = []
    in_process(request, rows.append)
    node = ray.get_runtime_context().get_node_id()
    return [{**row, "node": node} for row in rows]
