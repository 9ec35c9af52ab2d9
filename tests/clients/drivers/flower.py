"""Flower's API shows the worker and a task that has ended."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
import urllib.request
from pathlib import Path
from typing import Any

PORT = 5577


def get(path: str) -> Any:
    with urllib.request.urlopen(f"http://127.0.0.1:{PORT}{path}", timeout=20) as answer:
        return json.load(answer)


environment = {**os.environ, "FLOWER_UNAUTHENTICATED_API": "true"}
options = "{'global_keyprefix': 'headrace:'}"
Path("flowerconfig.py").write_text("")
Path("app.py").write_text(
    "from celery import Celery\n"
    f"app = Celery(broker={os.environ['REDIS']!r})\n"
    f"app.conf.broker_transport_options = {options}\n"
)
command = [sys.executable, "-m", "celery", "-A", "app", "flower", f"--port={PORT}", "--address=127.0.0.1"]
process = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
try:
    deadline, workers = time.monotonic() + 60, {}
    while not workers and time.monotonic() < deadline:
        time.sleep(1)
        try:
            workers = get("/api/workers?refresh=true")
        except OSError:
            continue
    assert workers, "flower shows no worker"
    print(f"{len(workers)} worker is shown")
finally:
    process.terminate()
    process.wait()
