"""The worker's clockwork, in a thread of its own: leases, requests to cancel, time limits, and a heartbeat.

Not on Celery's event loop: a main thread that is busy or reconnecting must not let leases run out.
"""

from __future__ import annotations

import json
import logging
import os
import socket
import threading
import time
import traceback
from collections import deque
from typing import TYPE_CHECKING

import redis
import structlog
from celery.platforms import EX_FAILURE
from celery.worker import state

from headrace.client.wire import keys
from headrace.config import Settings
from headrace.worker.jobs.store import WORKER_TTL_S, Store
from headrace.worker.queue.permissions import is_forbidden

if TYPE_CHECKING:
    from headrace.worker.engine.engine import Engine
    from headrace.worker.engine.registry import Models
    from headrace.worker.engine.stats import RowStats
    from headrace.worker.jobs.pool import Delivery, EnginePool

log = structlog.get_logger("headrace.worker")

#: How often requests to cancel are looked for while jobs are here; and how often anything is done while none are.
TICK_S, IDLE_TICK_S = 0.2, 1.0
#: How often a worker says what it does: often enough to look at, and long before it would count as gone.
BEAT_S = 2.0
#: Of more slots than that a worker's record does not say what is in them.
SHOWN_ROWS = 256
#: What a record says of an engine that is not there. As a record is a hash, what is not written stays.
NOT_LOADED: dict[str, str | int | float] = {
    "fingerprint": "",
    "running": 0,
    "tokens_per_s": 0.0,
    "step_age_s": 0.0,
    "rows": "[]",
}
#: A shutdown waits at least so long for a Redis that is silent, whatever the settings say: it may only be slow.
LEAST_PATIENCE_S = 5.0


class Monitor:
    """Looks after the pool's deliveries. Redis being away is logged once and otherwise waited out."""

    def __init__(self, pool: EnginePool, models: Models, store: Store, settings: Settings) -> None:
        self._pool, self._models, self._store, self._settings = pool, models, store, settings
        self.name = f"{socket.gethostname()}-{os.getpid()}"
        self._started: deque[str] = deque()
        self._stop, self._over = threading.Event(), threading.Event()
        self._thread = threading.Thread(target=self._loop, name="headrace-monitor", daemon=True)
        self._began_at = time.time()
        self._renew_at = self._beat_at = 0.0
        self._renewed_at = float("-inf")
        self._doubtful: set[str] = set()  # jobs whose lease may have run out: others may end them
        self._last_tokens: dict[str, int] = {}
        self._last_beat = time.monotonic()
        self._down = False
        self._stalled = False  # as was last acted on
        self._answered_at = float("-inf")
        #: Jobs in the queue of each model that no worker holds, by priority; counted at each heartbeat where somebody
        #: reads it.
        self.queued: dict[str, dict[str, int]] = {}

    def start(self) -> None:
        """Begin."""
        self._thread.start()
        threading.Thread(target=self._watch_shutdown, name="headrace-watch", daemon=True).start()

    def stop(self) -> None:
        """End, and take the worker's records away."""
        self._stop.set()
        self._thread.join()
        try:
            for model in self._models.names:
                self._store.withdraw(self._record(model))
        except redis.RedisError as error:
            log.warning("redis.unanswered", error=str(error))  # the record has a short life of its own
        self._over.set()

    def _record(self, model: str) -> str:
        """The name of the record that tells of a model."""
        return self.name if len(self._models.names) == 1 else keys.worker_of(self.name, model)

    @property
    def stalled_for_s(self) -> float:
        """How long an engine has been at one step if that is longer than it may be, else 0. The others wait for it."""
        age_s = max((stats.step_age_s for stats in self._models.stats().values()), default=0.0)
        return age_s if age_s > self._settings.stall_s else 0.0

    @property
    def redis_answers(self) -> bool:
        """Whether Redis took the last heartbeat, and not so long ago that another is missing."""
        return not self._down and time.monotonic() - self._answered_at < WORKER_TTL_S

    def why_not_alive(self) -> str:
        """What a restart would mend; empty if there is nothing."""
        age_s = self.stalled_for_s
        return f"the engine has been at one step for {age_s:.0f} s" if age_s else ""

    def why_not_ready(self) -> str:
        """Why no job would be taken and computed now; empty if one would."""
        if stopping() or self._stop.is_set():
            return "the worker is stopping"
        if not self.redis_answers:
            return "Redis does not take the worker's heartbeat"
        if not self._pool.consuming:
            return "the queue is not being read yet"
        return self.why_not_alive()

    def note_started(self, job_id: str) -> None:
        """A job got a slot; its record says so at the next tick. Called from the engine's thread."""
        self._started.append(job_id)

    def _watch_shutdown(self) -> None:
        """Until `stop` is over: end the process if it is to stop and Redis is silent for as long as that may take.

        Nothing can be handed back then. What was not stored is computed again where the leases run out.
        """
        asked_at = None
        while asked_at is None or time.monotonic() - max(asked_at, self._answered_at) < self._patience_s:
            if self._over.wait(TICK_S):
                return
            if asked_at is None and stopping():
                asked_at = time.monotonic()
        log.error("worker.abandoned", reason="Redis does not answer", jobs=len(self._pool.open_jobs()))
        logging.shutdown()
        os._exit(EX_FAILURE)

    @property
    def _patience_s(self) -> float:
        return max(LEAST_PATIENCE_S, self._settings.soft_shutdown_s)

    def _loop(self) -> None:
        while not self._stop.is_set():
            try:
                if self._tick():
                    self._answered_at = time.monotonic()
                self._down = False
            except redis.RedisError as error:
                if is_forbidden(error):
                    self._pool.end_process(error)
                if not self._down:
                    log.warning("redis.unanswered", error=str(error))
                self._down = True
            except Exception:
                # A fault here must not end the leases of everybody.
                log.error("monitor.failed", trace=traceback.format_exc())
            self._stop.wait(TICK_S if self._pool.deliveries() or stopping() else IDLE_TICK_S)

    def _tick(self) -> bool:
        """One round. Says whether Redis has answered something."""
        now = time.monotonic()
        self._check_time_limits(now)
        self._write_started()
        deliveries, jobs = self._pool.deliveries(), self._pool.open_jobs()
        if jobs:
            for job_id in self._store.cancelled(jobs).union(self._pool.revoked_jobs()):
                self._pool.cancel(job_id)
        self._look_at_engines()
        if self._models.unloads and not stopping():
            self._pool.look()
        if deliveries and now >= self._renew_at and not self._stalled:
            self._renew(deliveries, now)
        if beat := now >= self._beat_at or stopping():
            self._beat(now)
            self._beat_at = now + BEAT_S
            if self._settings.metrics_port and not stopping():
                self.queued = {model: self._store.queued(model) for model in self._models.names}
        return bool(jobs) or beat

    def _renew(self, deliveries: list[Delivery], now: float) -> None:
        """Renew the leases. Jobs whose lease may have run out before are let go of when others have ended them."""
        self._store.renew([delivery.tag for delivery in deliveries if delivery.tag is not None])
        late = now - self._settings.lease_s / 2  # half: the clocks of two machines differ, and asking costs little
        for delivery in deliveries:
            if max(delivery.received_at, self._renewed_at) < late:
                self._doubtful.update(list(delivery.open))
        self._renewed_at, self._renew_at = now, now + self._settings.lease_s / 4
        self._doubtful.intersection_update(self._pool.open_jobs())
        if doubtful := list(self._doubtful):
            claims = zip(doubtful, self._store.claim(doubtful), strict=True)
            if over := [job_id for job_id, claim in claims if claim.finished]:
                self._pool.let_go(over)

    def _look_at_engines(self) -> None:
        """See whether the engines come on. While one does not, no lease is renewed: others do the jobs."""
        age_s = self.stalled_for_s
        stalled = age_s > 0
        if stalled != self._stalled:
            self._stalled = stalled
            self._renew_at = self._beat_at = 0.0  # at once
            self._pool.take_messages(not stalled)
            if stalled:
                log.error("engine.stalled", step_age_s=round(age_s, 1), limit_s=self._settings.stall_s)
            else:
                log.warning("engine.goes_on")

    def _write_started(self) -> None:
        here = set(self._pool.open_jobs())
        started = [self._started.popleft() for _ in range(len(self._started))]
        if running := [job_id for job_id in started if job_id in here]:  # not those that have ended meanwhile
            self._store.started(running, self.name)

    def _check_time_limits(self, now: float) -> None:
        for delivery in self._pool.deliveries():
            limit, started = delivery.time_limit_s, delivery.started_at
            if limit is not None and started is not None and now - started > limit and delivery.verdict is None:
                self._pool.time_out(delivery)

    def _beat(self, now: float) -> None:
        """Write a record for each model: whoever reads them sees as many workers of one model each."""
        engines, passed_s = self._models.loaded, max(1e-9, now - self._last_beat)
        self._last_beat = now
        for model in self._models.names:
            self._store.announce(
                self._record(model),
                {
                    "model": model,
                    "slots": self._settings.slots,
                    "started_at": self._began_at,
                    "stalled": int(self._stalled),
                    "loaded": int(model in engines),
                    "failures": json.dumps(list(self._pool.failures[model])),
                    **self._of_engine(model, engines.get(model), passed_s),
                },
            )

    def _of_engine(self, model: str, engine: Engine | None, passed_s: float) -> dict[str, str | int | float]:
        if engine is None:
            return {**NOT_LOADED, "waiting": self._pool.held(model)}
        stats = engine.stats()
        rate = max(0, stats.tokens - self._last_tokens.get(model, 0)) / passed_s
        self._last_tokens[model] = stats.tokens
        return {
            "fingerprint": engine.fingerprint,
            "running": stats.running,
            "waiting": stats.waiting,
            "tokens_per_s": round(rate, 1),
            "drafted": stats.drafted,
            "accepted": stats.accepted,
            "step_age_s": round(self.stalled_for_s or stats.step_age_s, 1),
            "rows": json.dumps([_row(row) for row in engine.rows()[:SHOWN_ROWS]]),
        }


def _row(row: RowStats) -> dict[str, str | int | float]:
    """What the worker's record says of a running sample. It may be read by who may not read the job."""
    return {
        "job": keys.tag(row.job_id),
        "age_s": round(row.age_s, 1),
        "prompt": row.prompt,
        "read": row.read,
        "written": row.written,
        "most": row.most,
    }


def stopping() -> bool:
    """Whether this process was told to end."""
    return any(flag is not None and flag is not False for flag in (state.should_stop, state.should_terminate))
