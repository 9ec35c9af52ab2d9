"""Processes that compute what cannot be stopped inside a thread. They answer JSON lines, and are ended if slow.

A process takes one request at a time and is kept for the next one.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

#: Seconds that a process may take to start.
START_LIMIT_S = 60.0


class TooLong(Exception):
    """The process did not answer in time."""


class HelperProcess:
    """A process of a program, which is a file of this package."""

    def __init__(self, program: Path) -> None:
        kept = {name: os.environ[name] for name in ("PATH", "TZ", "LD_LIBRARY_PATH", "HOME") if name in os.environ}
        self._process = subprocess.Popen(  # noqa: S603  # this interpreter and a file of this package
            [sys.executable, "-P", str(program)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            # Without the worker's secrets; in a session of its own, so that Ctrl-C reaches the worker alone.
            env={**kept, "PYTHONPATH": os.pathsep.join(filter(None, sys.path)), "PYTHONUTF8": "1"},
            start_new_session=True,
        )
        stdin, stdout = self._process.stdin, self._process.stdout
        if stdin is None or stdout is None:
            raise OSError("no pipes")
        self._stdin, self._stdout = stdin, stdout
        try:
            self._read_line(START_LIMIT_S)
        except BaseException:
            self.end()
            raise

    def ask(self, request: dict[str, Any], limit_s: float) -> dict[str, Any]:
        """The answer to a request. Raises TooLong, or OSError if the process has ended."""
        data = memoryview(json.dumps(request).encode() + b"\n")
        self._stdin.write(data)  # the process reads whole lines before it computes, so this does not block for long
        self._stdin.flush()
        answer: dict[str, Any] = json.loads(self._read_line(limit_s))
        return answer

    def _read_line(self, limit_s: float) -> bytes:
        stdout = self._stdout
        deadline, data = time.monotonic() + limit_s, bytearray()
        while not data.endswith(b"\n"):
            left = deadline - time.monotonic()
            if left <= 0 or not select.select([stdout], [], [], left)[0]:
                raise TooLong
            piece = os.read(stdout.fileno(), 2**16)
            if not piece:
                raise OSError("the process has ended")
            data += piece
        return bytes(data)

    def lives(self) -> bool:
        """Whether the process has not ended."""
        return self._process.poll() is None

    def end(self) -> None:
        """End the process."""
        with contextlib.suppress(OSError):
            self._process.kill()
        for pipe in (self._stdin, self._stdout):
            with contextlib.suppress(OSError):
                pipe.close()
        self._process.wait()


class Helpers:
    """The processes of a program. May be used from any thread.

    Args:
        program: a file that prints a line when it is ready, and answers each line with one.
    """

    def __init__(self, program: Path) -> None:
        self.program = program
        self._lock = threading.Lock()
        self._idle: list[HelperProcess] = []

    def ask(self, request: dict[str, Any], limit_s: float) -> dict[str, Any]:
        """The answer of a process to a request. The process is ended if there is none.

        Raises:
            TooLong: it did not answer in time.
            OSError: it has ended.
            ValueError: its answer is not JSON.
        """
        process = self._idle_process()
        try:
            process = process or HelperProcess(self.program)
            answer = process.ask(request, limit_s)
        except BaseException:
            if process is not None:
                process.end()
            raise
        with self._lock:
            self._idle.append(process)
        return answer

    def _idle_process(self) -> HelperProcess | None:
        """A process that waits; none that was killed meanwhile."""
        while True:
            with self._lock:
                process = self._idle.pop() if self._idle else None
            if process is None or process.lives():
                return process
            process.end()

    def close(self) -> None:
        """End the processes that wait."""
        with self._lock:
            idle, self._idle = self._idle, []
        for process in idle:
            process.end()
