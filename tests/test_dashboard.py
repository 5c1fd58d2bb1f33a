"""The dashboard in a real browser: it draws what the server did, and asks nobody else for anything."""

# ruff: noqa: E402
from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest

for module in ("fastapi", "uvicorn", "websockets", "msgpack"):
    pytest.importorskip(module)
BROWSER = next((b for b in map(shutil.which, ("chromium", "chromium-browser", "google-chrome")) if b), None)
if BROWSER is None:
    pytest.skip("no chromium", allow_module_level=True)

from serving import observation, running
from websockets.sync.client import connect

from vlac.serve.wire import pack


def test_the_page_draws_in_a_browser(tmp_path: Path) -> None:
    with running("openpi", dashboard=True, limits=("jerk<=0.001",)) as server:
        with connect(f"ws://127.0.0.1:{server.port}", compression=None) as client:
            client.recv()
            for n in range(5):
                client.send(pack(observation(1, moment=[1, n])))
                client.recv(timeout=20)
        done = subprocess.run(
            [BROWSER, "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path}",
             "--virtual-time-budget=4000", "--dump-dom", f"http://127.0.0.1:{server.port}/dashboard"],
            capture_output=True, text=True, timeout=90,
        )  # fmt: skip
    page = done.stdout
    assert re.search(r'id="figure-chunks">5<', page), page[:3000] + done.stderr[-1000:]
    drawn = re.findall(r'data-name="([^"]+)"', page)
    assert {"flow", "total", "hand-over"} <= set(drawn)
    assert sum(name.startswith("127.0.0.1#") for name in drawn) == 4  # one trace per joint
    assert "jerk&lt;=0.001 does not hold" in page
    assert "Content Security Policy" not in done.stderr
