"""The thread in which all engines of a process compute, one step each in turn.

Engines share a thread, because torch starts as many OpenMP threads as there are cores for every thread that computes.
With several such teams, threads that wait for each other sleep instead of spinning, and steps become slower. In one
thread each step is as fast as with a single engine; an engine only runs fewer steps per second while others have work.
"""

from __future__ import annotations

import threading
from typing import Protocol


class Steppable(Protocol):
    """What a step loop runs: an engine."""

    #: Set when the engine has ended and leaves the loop.
    ended: threading.Event

    def run_step(self) -> float:
        """Run one step. Returns how long the loop may sleep, in seconds, if nothing wakes it."""
        ...


class StepLoop:
    """Runs the steps of its engines in turn. Its thread exists while there is an engine in it."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._wake = threading.Event()
        self._engines: list[Steppable] = []
        self._thread: threading.Thread | None = None

    def add(self, engine: Steppable) -> None:
        """Run the steps of this engine too, until it has `ended`."""
        with self._lock:
            self._engines.append(engine)
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, name="headrace-engine", daemon=True)
                self._thread.start()
        self.wake()

    def wake(self) -> None:
        """End the loop's sleep: an engine has work."""
        self._wake.set()

    def in_thread(self) -> bool:
        """Whether the caller runs in the loop's thread."""
        return self._thread is threading.current_thread()

    def _run(self) -> None:
        while engines := self._remaining():
            self._wake.clear()
            sleeps = [engine.run_step() for engine in engines]
            if sleep_s := min(sleeps):
                self._wake.wait(sleep_s)

    def _remaining(self) -> list[Steppable]:
        with self._lock:
            self._engines = [engine for engine in self._engines if not engine.ended.is_set()]
            if not self._engines:
                self._thread = None
            return list(self._engines)
