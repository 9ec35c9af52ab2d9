"""Ends jobs before they are computed: cancelled, revoked, over Celery's time limit, or ended by another worker."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import structlog
from celery.exceptions import TaskRevokedError, TimeLimitExceeded
from celery.worker import state

from headrace.worker.jobs.completion import Completion
from headrace.worker.jobs.deliveries import Delivery, DeliveryBook, Verdict
from headrace.worker.jobs.observers import JobObserver
from headrace.worker.jobs.quarantine import Quarantine
from headrace.worker.jobs.service import Service, cancelled_early, failed

log = structlog.get_logger("headrace.worker")


class Cancellation:
    """Ends jobs of this process without disturbing others. May be used from any thread."""

    def __init__(
        self,
        *,
        service: Service,
        book: DeliveryBook,
        quarantine: Quarantine,
        completion: Completion,
        observers: JobObserver,
    ) -> None:
        self._service, self._book, self._quarantine = service, book, quarantine
        self._completion, self._observers = completion, observers

    def cancel(self, job_id: str) -> None:
        """End a waiting job now, and a running one at the next step."""
        if self._quarantine.withdraw(job_id):
            self._completion.computed(job_id, failed(cancelled_early()))
        else:
            self._service.models.cancel(job_id)

    def cancel_requested(self) -> None:
        """Cancel the jobs that a client asked to cancel, and those that were revoked. Raises redis.RedisError."""
        if jobs := self._book.open_jobs():
            for job_id in self._service.store.cancelled(jobs).union(self._revoked_jobs()):
                self.cancel(job_id)

    def _revoked_jobs(self) -> list[str]:
        """Open jobs that were revoked, alone or with their message, or whose time limit has passed."""
        items = self._book.open_items()
        return [job_id for job_id, d in items if d.verdict is not None or (d.grouped and job_id in state.revoked)]

    def revoke(self, request: Any, reason: str) -> bool:
        """End the jobs of a message that was revoked or has expired. Returns whether the message is here.

        As for every job, the ends are stored first, however long Redis takes, and then the message is acknowledged.
        """
        held = [delivery for delivery in self._book.deliveries() if delivery.request is request]
        for delivery in held:
            self._end_jobs(delivery, TaskRevokedError(reason))
        return bool(held)

    def check_time_limits(self, now: float) -> None:
        """End the jobs of messages whose time limit, which Celery sets, has passed. `now` is the monotonic clock's."""
        for delivery in self._book.deliveries():
            limit, started = delivery.time_limit_s, delivery.started_at
            if limit is not None and started is not None and now - started > limit and delivery.verdict is None:
                self._end_jobs(delivery, TimeLimitExceeded(limit))

    def _end_jobs(self, delivery: Delivery, verdict: Verdict) -> None:
        delivery.verdict = verdict
        for job_id in list(delivery.open):
            self.cancel(job_id)

    def let_go(self, job_ids: Sequence[str]) -> None:
        """Drop jobs that another worker has ended after the lease here ran out; nothing of them is stored.

        Raises:
            redis.RedisError: nothing was dropped.
        """
        self._service.store.ended(job_ids)
        log.info("jobs.finished_before", jobs=len(job_ids))
        self._completion.settle(job_ids)  # first: an outcome that the engine reports from now on is ignored
        self._observers.returned(job_ids)
        for job_id in job_ids:
            self.cancel(job_id)
