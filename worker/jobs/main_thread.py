"""Runs Celery's bookkeeping in the main thread, where remote control reads it."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import Any

from celery.concurrency.prefork import _run_ready_callbacks
from kombu.asynchronous import Hub


class MainThread:
    """Queues calls for the main thread and runs them in the order in which they were queued.

    The queue is needed because the hub itself does not keep the order.
    """

    def __init__(self) -> None:
        #: The event loop of the main thread, from the moment when Celery begins to read the queue.
        self.hub: Hub | None = None
        self._calls: deque[tuple[Callable[..., Any], tuple[Any, ...]]] = deque()

    def call(self, function: Callable[..., Any], *args: Any) -> None:
        """Call a function in the main thread. May be called from any thread; before there is a loop it runs at once."""
        self._calls.append((function, args))
        if self.hub is None:
            self._run_queued()
        else:
            self.hub.call_soon(self._run_queued)  # type: ignore[no-untyped-call]

    def wake(self) -> None:
        """Wake the loop: it then checks whether there is room for another message."""
        self.call(lambda: None)

    def flush(self) -> None:
        """Run everything that is queued. Call this in the main thread when its loop has ended."""
        self._run_queued()
        if self.hub is not None:
            _run_ready_callbacks(self.hub)

    def _run_queued(self) -> None:
        while self._calls:
            function, args = self._calls.popleft()
            function(*args)
