"""Worker processes for tests, always ended by the test."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from headrace.client import Client
from headrace.client.wire import keys
from headrace.worker.child_processes import die_with_parent
from headrace.worker.redis_server import EmbeddedRedis
from tests.integration.warm import WarmProcess
from tests.patience import PATIENCE_S


class WorkerProcess:
    """A `celery -A worker worker` in a process group of its own, writing JSON lines to `log`.

    `patch` is Python code that runs in it first, to cause faults that a user cannot cause. Unless it is `bare`, it is
    forked from a warm process (tests/integration/warm.py).
    """

    def __init__(self, log: Path, *flags: str, patch: str = "", bare: bool = False, **environment: str) -> None:
        self.log = log
        self.flags = ["-A", "worker", "worker", *flags]
        assert not (bare and patch), "a program of its own runs what users run"
        self._slow = log.with_suffix(".slow")
        self.patch, self.bare = "" if bare else _slowly_while(self._slow) + patch, bare
        # One thread: if several workers share two cores, threads that wait for each other are many times slower.
        self.environment = {**os.environ, "HEADRACE_LOG_FORMAT": "json", "HEADRACE_THREADS": "1", **environment}
        self.environment.pop("OMP_NUM_THREADS", None)  # tests/conftest.py
        self.process: subprocess.Popen[bytes] | WarmProcess | None = None

    def start(self) -> WorkerProcess:
        if self.bare:
            command = die_with_parent([sys.executable, "-m", "celery", *self.flags])
            with self.log.open("ab") as out:
                self.process = subprocess.Popen(
                    command, env=self.environment, stdout=out, stderr=out, start_new_session=True
                )
        else:
            self.process = WarmProcess(self.flags, self.environment, self.log, self.patch)
        return self

    def __enter__(self) -> WorkerProcess:
        return self.start()

    def __exit__(self, *_: object) -> None:
        self.kill()

    @contextlib.contextmanager
    def slowly(self) -> Iterator[None]:
        """Slow its jobs down during the block, so that a test can observe a running job on any machine."""
        assert not self.bare, "a program of its own runs what users run"
        self._slow.touch()
        try:
            yield
        finally:
            self._slow.unlink()

    @property
    def alive(self) -> bool:
        return self.process is not None and self.process.poll() is None

    def wait_ready(self, timeout: float = PATIENCE_S) -> None:
        self.wait_for("worker.ready", timeout)

    def wait_for(self, event: str, timeout: float = PATIENCE_S, count: int = 1) -> None:
        """Wait until the log contains this many lines of an event."""
        deadline = time.monotonic() + timeout
        while len(self.events(event)) < count:
            assert self.alive, (
                f"the worker ended with {self.process and self.process.returncode}:\n{self.text()[-3000:]}"
            )
            assert time.monotonic() < deadline, f"no {event} after {timeout} s:\n{self.text()[-3000:]}"
            time.sleep(0.05)

    def text(self) -> str:
        return self.log.read_text(errors="replace") if self.log.exists() else ""

    def events(self, name: str) -> list[dict[str, Any]]:
        lines = [line for line in self.text().splitlines() if line.startswith("{") and f'"{name}"' in line]
        return [line for line in map(json.loads, lines) if line["event"] == name]

    def signal(self, number: signal.Signals) -> None:
        assert self.process is not None
        os.kill(self.process.pid, number)

    def wait(self, timeout: float = PATIENCE_S) -> int:
        """The exit code."""
        assert self.process is not None
        return self.process.wait(timeout)

    def kill(self) -> None:
        """Send SIGKILL, and wait until the process has ended."""
        if self.process is not None and self.process.poll() is None:
            self.process.send_signal(signal.SIGKILL)
            self.process.wait()


def worker_on(server: EmbeddedRedis, log: Path, *flags: str, patch: str = "", **settings: str) -> WorkerProcess:
    """Create a worker for one test, with few slots and the shortest possible lease."""
    defaults = {"HEADRACE_REDIS_URL": server.url, "HEADRACE_SLOTS": "4", "HEADRACE_LEASE_S": "3"}
    return WorkerProcess(log, *flags, patch=patch, **{**defaults, **settings})


def paced(step_s: float) -> str:
    """A patch that delays each step, so that the duration of jobs does not depend on the speed of the machine."""
    return f"""
import time
from headrace.worker.engine.model_runner import ModelRunner
run = ModelRunner.run
def paced(self, step):
    time.sleep({step_s})
    return run(self, step)
ModelRunner.run = paced
"""


def skewed(seconds: float) -> str:
    """A patch that puts the clock of a worker's machine forward, or back."""
    return f"""
import time
import kombu.transport.redis
time.time = kombu.transport.redis.time = lambda real=time.time: real() + {seconds}
"""


def _slowly_while(file: Path) -> str:
    """A patch that delays each step while this file exists."""
    return f"""
import os, time
from headrace.worker.engine.model_runner import ModelRunner
run = ModelRunner.run
def slowly(self, step, run=run):
    if os.path.exists({str(file)!r}):
        time.sleep(0.05)
    return run(self, step)
ModelRunner.run = slowly
"""


def attempts(client: Client, job_id: str) -> int:
    """The number of attempts in the record of a job."""
    return int(client._redis.hget(keys.job(job_id), "attempts") or 0)


def wait_until(condition: Any, timeout: float = PATIENCE_S) -> None:
    """Wait until a condition holds that another process causes."""
    deadline = time.monotonic() + timeout
    while not condition():
        assert time.monotonic() < deadline, "the condition did not become true in time"
        time.sleep(0.02)
