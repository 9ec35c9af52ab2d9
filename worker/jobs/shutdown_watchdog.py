"""Ends the process if a shutdown waits too long for a Redis that does not answer."""

from __future__ import annotations

import logging
import os
import threading
import time

import structlog
from celery.platforms import EX_FAILURE

from headrace.worker.jobs.deliveries import DeliveryBook
from headrace.worker.jobs.health import Health, stopping

log = structlog.get_logger("headrace.worker")

TICK_S = 0.2
#: A shutdown waits at least this many seconds for Redis, whatever the settings say: Redis may only be slow.
LEAST_PATIENCE_S = 5.0


class ShutdownWatchdog:
    """A thread that ends the process if it was told to stop and Redis has not answered for `patience_s` since then.

    Nothing can be returned to the queue in that case. What was not stored is computed again when the leases run out.
    """

    def __init__(self, health: Health, book: DeliveryBook, patience_s: float) -> None:
        self._health, self._book, self._patience_s = health, book, max(LEAST_PATIENCE_S, patience_s)
        self._stop = threading.Event()

    def start(self) -> None:
        """Start the thread."""
        threading.Thread(target=self._watch, name="headrace-watch", daemon=True).start()

    def stop(self) -> None:
        """The shutdown is over."""
        self._stop.set()

    def _watch(self) -> None:
        asked_at = None
        while asked_at is None or time.monotonic() - max(asked_at, self._health.answered_at) < self._patience_s:
            if self._stop.wait(TICK_S):
                return
            if asked_at is None and stopping():
                asked_at = time.monotonic()
        log.error("worker.abandoned", reason="Redis does not answer", jobs=len(self._book.open_jobs()))
        logging.shutdown()
        os._exit(EX_FAILURE)
