"""The worker and a task as Flower shows them."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path
from typing import Any


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def asked(url: str, body: Any = None) -> Any:
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(url, data, {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=30) as response:
        return json.load(response)


def until(found: Any, what: str) -> Any:
    """The first result of `found` that is not empty."""
    end = time.monotonic() + 40
    while time.monotonic() < end:
        try:
            if value := found():
                return value
        except OSError:
            pass
        time.sleep(0.5)
    raise AssertionError(f"Flower does not show {what}")


port = free_port()
# As in docs/deployment.md, for a Flower without headrace.
Path("flower_settings.py").write_text('broker_transport_options = {"global_keyprefix": "headrace:"}\n')
broker = os.environ["REDIS"].replace("unix://", "redis+socket://")
command = [sys.executable, "-m", "celery", "--broker", broker, "--config=flower_settings", "flower", f"--port={port}"]
unauthenticated = {**os.environ, "FLOWER_UNAUTHENTICATED_API": "true"}
with Path("flower.log").open("w") as log:
    flower = subprocess.Popen(command, env=unauthenticated, stdout=log, stderr=log)
try:
    api = f"http://127.0.0.1:{port}/api"
    workers = until(lambda: asked(f"{api}/workers?refresh=1"), "the worker")
    (name, worker), *_ = workers.items()
    assert any("headrace" in task for task in worker["registered"]), worker["registered"]
    completion = {"model": "demo", "prompt": "Hello.", "max_tokens": 5}

    def succeeded() -> list[Any]:
        asked(os.environ["SERVER"] + "/v1/completions", completion)
        return [task for task in asked(f"{api}/tasks").values() if task["state"] == "SUCCESS"]

    task = until(succeeded, "a task that succeeded")[0]
    print(f"the worker {name.split('@')[0]} with its queues and tasks; the task {task['name']}: {task['state']}")
finally:
    flower.terminate()
    flower.wait(20)
    print(Path("flower.log").read_text()[-1500:], file=sys.stderr)
