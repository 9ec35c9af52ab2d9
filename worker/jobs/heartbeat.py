"""The heartbeat thread: leases, requests to cancel, time limits, and the worker's record.

It does not run on Celery's event loop, because leases must not run out while the main thread is busy or reconnects.
"""

from __future__ import annotations

import threading
import time
import traceback
from typing import TYPE_CHECKING, Protocol

import redis
import structlog

from headrace.config import Settings
from headrace.worker.jobs.cancellation import Cancellation
from headrace.worker.jobs.deliveries import DeliveryBook
from headrace.worker.jobs.health import Health, stopping
from headrace.worker.jobs.leases import Leases
from headrace.worker.jobs.observers import StartedJobs
from headrace.worker.jobs.store import Store
from headrace.worker.jobs.waiting import WaitingJobs
from headrace.worker.jobs.worker_record import WorkerRecord
from headrace.worker.queue.permissions import is_forbidden

if TYPE_CHECKING:
    from headrace.worker.engine.registry import ModelRegistry

log = structlog.get_logger("headrace.worker")

#: Seconds between two rounds while the worker holds jobs, and while it holds none.
TICK_S, IDLE_TICK_S = 0.2, 1.0
#: Seconds between two heartbeats: far below the lifetime of the worker's record.
BEAT_S = 2.0
#: Seconds between two looks for expired jobs in the index, and while there are many.
PRUNE_S, PRUNE_SOON_S = 60.0, 1.0


class Hooks(Protocol):
    """What the heartbeat needs of the pool."""

    def take_messages(self, on: bool) -> None:
        """Take messages from the queue, or stop taking them."""

    def wake_intake(self) -> None:
        """Check for idle models."""

    def end_process(self, error: BaseException) -> None:
        """End the process, because it cannot continue."""


class Heartbeat:
    """Keeps the leases of the messages that this process holds. It logs an outage of Redis once and retries."""

    def __init__(
        self,
        *,
        settings: Settings,
        models: ModelRegistry,
        store: Store,
        book: DeliveryBook,
        cancellation: Cancellation,
        health: Health,
        leases: Leases,
        record: WorkerRecord,
        started: StartedJobs,
        hooks: Hooks,
        waiting: WaitingJobs | None = None,
    ) -> None:
        self._settings, self._models, self._store, self._book = settings, models, store, book
        self._cancellation, self._health, self._leases, self._record = cancellation, health, leases, record
        self._started, self._hooks, self._waiting = started, hooks, waiting
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="headrace-heartbeat", daemon=True)
        self._beat_at = self._prune_at = 0.0
        self._stalled = False  # the state that was last acted on
        #: Jobs in the queue of each model that no worker holds, by priority. Counted at each heartbeat if there is a
        #: port for metrics.
        self.queued: dict[str, dict[str, int]] = {}

    @property
    def name(self) -> str:
        """The name of this worker."""
        return self._record.name

    def start(self) -> None:
        """Start the thread."""
        self._thread.start()

    def stop(self) -> None:
        """End the thread, and remove the worker's record."""
        self._stop.set()
        self._health.ended = True
        self._thread.join()
        self._record.remove()

    def _run(self) -> None:
        while not self._stop.is_set():
            try:
                if self.tick():
                    self._health.answered_at = time.monotonic()
                self._health.redis_down = False
            except redis.RedisError as error:
                if is_forbidden(error):
                    self._hooks.end_process(error)
                if not self._health.redis_down:
                    log.warning("redis.unanswered", error=str(error))
                self._health.redis_down = True
            except Exception:
                # A bug here must not let the leases of all jobs run out.
                log.error("heartbeat.failed", trace=traceback.format_exc())
            self._stop.wait(TICK_S if self._book.deliveries() or stopping() else IDLE_TICK_S)

    def tick(self) -> bool:
        """Do one round. Returns whether Redis answered a request in it. Raises redis.RedisError."""
        now = time.monotonic()
        self._cancellation.check_time_limits(now)
        self._write_started()
        jobs = bool(self._book.open_jobs())
        self._cancellation.cancel_requested()
        self._check_engines()
        if self._models.unloads and not stopping():
            self._hooks.wake_intake()
        if not self._stalled:
            self._leases.renew(now)
            if self._waiting is not None:
                self._waiting.look(now)
        if beat := now >= self._beat_at or stopping():
            self._record.write(now, stalled=self._stalled)
            self._beat_at = now + BEAT_S
            self._store.fill_index()
            if now >= self._prune_at:
                self._prune_at = now + (PRUNE_SOON_S if self._store.prune_index() else PRUNE_S)
            if self._settings.metrics_port and not stopping():
                self.queued = {model: self._store.queued(model) for model in self._models.names}
        return jobs or beat

    def _check_engines(self) -> None:
        """Check that the engines make progress. While one is stalled, leases are not renewed: others get its jobs."""
        age_s = self._health.stalled_for_s
        stalled = age_s > 0
        if stalled == self._stalled:
            return
        self._stalled = stalled
        self._beat_at = 0.0
        self._leases.renew_soon()
        self._hooks.take_messages(not stalled)
        if stalled:
            log.error("engine.stalled", step_age_s=round(age_s, 1), limit_s=self._settings.stall_s)
        else:
            log.warning("engine.resumed")

    def _write_started(self) -> None:
        here = set(self._book.open_jobs())
        if running := [job_id for job_id in self._started.take() if job_id in here]:  # the others have ended already
            self._store.started(running, self._record.name)
