"""Clocks that are wrong. The suite itself always uses `real_time`."""

from __future__ import annotations

import random
import sys
import time
from contextlib import ExitStack
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import patch

real_time = time.time

#: By how many seconds a clock may be wrong. An hour either way is longer than every deadline and lease of the storm.
ERRORS_S = (-3600.0, 3600.0, 0.0)
#: Seconds for which a process uses the error that it has read.
READ_S = 0.2


def next_error(salt: int, now_s: float) -> float:
    """By how much a clock is wrong after a jump; never what it was."""
    return random.Random(f"clock {salt}").choice([error_s for error_s in ERRORS_S if error_s != now_s])


class WorkerClock:
    """Replaces `time.time` in a worker process: the real time plus the seconds in a file, which may change."""

    def __init__(self, file: Path) -> None:
        self._file = file
        self._error_s, self._read_at = 0.0, float("-inf")

    def install(self) -> None:
        """Call it before Celery and headrace are imported, since some modules import the function by its name."""
        time.time = self.now

    def now(self) -> float:
        if time.monotonic() - self._read_at > READ_S:
            self._read_at = time.monotonic()
            self._error_s = read_error(self._file)
        return real_time() + self._error_s


def read_error(file: Path) -> float:
    try:
        return float(file.read_text())
    except (OSError, ValueError):  # the clock is right, or the file is being written
        return 0.0


class ClientClock:
    """Replaces the clock of `headrace.client` in this process, during a `with` block."""

    def __init__(self) -> None:
        self.error_s = 0.0
        self._patches = ExitStack()

    def __enter__(self) -> ClientClock:
        wrong = SimpleNamespace(**{**vars(time), "time": lambda: real_time() + self.error_s})
        for name, module in list(sys.modules.items()):
            if name.startswith("headrace.client") and getattr(module, "time", None) is time:
                self._patches.enter_context(patch.object(module, "time", wrong))
        return self

    def __exit__(self, *_: object) -> None:
        self._patches.close()
