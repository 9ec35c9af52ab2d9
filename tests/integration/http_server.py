"""`headrace serve` for tests: started as a user starts it, on a free port, and always ended by the test."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import openai

from headrace.worker.child_processes import die_with_parent
from tests.patience import PATIENCE_S


class HttpServer:
    """A server that keeps files in `directory` and writes its output to `directory`/server.log."""

    def __init__(self, directory: Path, redis_url: str, *flags: str, **environment: str) -> None:
        command = [
            sys.executable,
            "-m",
            "headrace.worker.cli",
            "serve",
            "--port",
            "0",
            "--files",
            str(directory / "store"),
        ]
        self._command = [*command, *flags]
        self._environment = {
            **os.environ,
            "HEADRACE_REDIS_URL": redis_url,
            "HEADRACE_LOG_FORMAT": "json",
            "HEADRACE_SOFT_SHUTDOWN_S": "2",
            **environment,
        }
        self.log = directory / "server.log"
        self.url = ""
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> HttpServer:
        """Start it, and wait until it listens."""
        known = self.said().count("headrace serves ")
        with self.log.open("ab") as out:
            self._process = subprocess.Popen(
                die_with_parent(self._command), env=self._environment, stdout=out, stderr=out
            )
        deadline = time.monotonic() + PATIENCE_S
        while self.said().count("headrace serves ") == known:
            assert self._process.poll() is None, self.said()
            assert time.monotonic() < deadline, f"it does not listen: {self.said()}"
            time.sleep(0.02)
        self.url = re.findall(r"headrace serves (http://\S+)/v1 ", self.said())[-1]
        return self

    def __enter__(self) -> HttpServer:
        return self.start()

    def __exit__(self, *_: object) -> None:
        self.end(signal.SIGKILL)

    def end(self, number: signal.Signals = signal.SIGTERM) -> int:
        """Send a signal, and wait. Returns the exit code."""
        assert self._process is not None
        with contextlib.suppress(ProcessLookupError):
            self._process.send_signal(number)
        return self._process.wait(PATIENCE_S)

    @property
    def pid(self) -> int | None:
        """The process id; None before it was started."""
        return self._process.pid if self._process else None

    @property
    def alive(self) -> bool:
        """Whether the process runs."""
        return self._process is not None and self._process.poll() is None

    def said(self) -> str:
        """Its output so far."""
        return self.log.read_text() if self.log.exists() else ""

    def openai(self, key: str = "none-is-needed", **options: Any) -> openai.OpenAI:
        """The official client, by default without retries, because tests check the first answer."""
        return openai.OpenAI(
            base_url=f"{self.url}/v1", api_key=key, **{"max_retries": 0, "timeout": PATIENCE_S, **options}
        )

    def async_openai(self) -> openai.AsyncOpenAI:
        """The official client for asyncio."""
        return openai.AsyncOpenAI(
            base_url=f"{self.url}/v1", api_key="none-is-needed", max_retries=0, timeout=PATIENCE_S
        )

    def http(self, **headers: str) -> httpx.Client:
        """A plain client."""
        return httpx.Client(base_url=self.url, headers=headers, timeout=PATIENCE_S)


def events_of(response: httpx.Response) -> Iterator[tuple[str, str]]:
    """Yield server-sent events as they arrive: name and data."""
    name = ""
    for line in response.iter_lines():
        if line.startswith("event: "):
            name = line.removeprefix("event: ")
        elif line.startswith("data: "):
            yield name, line.removeprefix("data: ")
            name = ""
