"""The messages that this process holds, and the message that each open job belongs to."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, TypeAlias

from celery.exceptions import TaskRevokedError, TimeLimitExceeded

from headrace.client.wire.celery import GROUP_TASK_NAME

#: Why the jobs of a message end without having been computed.
Verdict: TypeAlias = TaskRevokedError | TimeLimitExceeded


@dataclass(eq=False)
class Delivery:
    """One delivered message on its way through this process."""

    task: str
    #: Celery's tracer and its arguments; the second argument is the message's id, the third its headers.
    target: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    #: Called in the main thread when the message is done, with what Celery's tracer returns.
    on_done: Callable[[Any], None]
    #: Called in the main thread when the first of its jobs starts.
    on_accepted: Callable[[int, float], None] | None
    time_limit_s: float | None
    #: By the monotonic clock.
    received_at: float
    #: The model of all its jobs.
    model: str
    #: The requests by job id.
    jobs: Mapping[str, Any]
    #: Jobs that have not ended and that no newer message has adopted.
    open: set[str] = field(default_factory=set)
    started_at: float | None = None
    #: Set when the message is revoked or Celery's time limit has passed: how its open jobs end.
    verdict: Verdict | None = None
    #: Identifies the message in this process; Celery passes it back as the pid of a task.
    handle: int = 0

    @property
    def message_id(self) -> str:
        """The id of the message, which is the id of its job if the message cannot hold several."""
        message_id: str = self.args[1]
        return message_id

    @property
    def headers(self) -> Mapping[str, Any]:
        """The headers of the message, as Celery passes them on."""
        headers: Mapping[str, Any] = self.args[2]
        return headers

    @property
    def redelivered(self) -> bool:
        """Whether the message was delivered before, so that a lease ran out or a worker returned it."""
        return bool((self.headers.get("delivery_info") or {}).get("redelivered"))

    @property
    def grouped(self) -> bool:
        """Whether the message can hold several jobs; then the result writer stores their results."""
        return self.task == GROUP_TASK_NAME

    @property
    def request(self) -> Any:
        """Celery's Request, which owns the callbacks; None if the callbacks have no owner."""
        return getattr(self.on_done, "__self__", None)

    @property
    def tag(self) -> str | None:
        """The delivery tag, which identifies the lease of the message."""
        message = getattr(self.request, "message", None)
        return getattr(message, "delivery_tag", None)

    def give_back(self) -> None:
        """Return the message to its queue. Call this in the main thread."""
        if (request := self.request) is not None:
            request.reject(requeue=True)


class Adoption(NamedTuple):
    """What changed when a message adopted its jobs.

    Attributes:
        new: the jobs that were not in this process before.
        superseded: older messages that have no open job left.
    """

    new: list[str]
    superseded: list[Delivery]


class DeliveryBook:
    """Keeps the deliveries and, for each open job, the delivery that it belongs to. May be used from any thread."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._handles = itertools.count(1)
        self._deliveries: dict[int, Delivery] = {}
        self._by_job: dict[str, Delivery] = {}

    def add(self, delivery: Delivery) -> None:
        """Enter a message that has just been delivered. Its jobs count as held from now on."""
        delivery.handle = next(self._handles)
        delivery.open = set(delivery.jobs)
        with self._lock:
            self._deliveries[delivery.handle] = delivery

    def adopt(self, delivery: Delivery) -> Adoption:
        """Assign the jobs of a message to it.

        A job that is already here continues, and belongs to this message instead of the older one.
        """
        adoption = Adoption([], [])
        with self._lock:
            for job_id in delivery.jobs:  # in the order of the message
                older = self._by_job.get(job_id)
                self._by_job[job_id] = delivery
                if older is None:
                    adoption.new.append(job_id)
                    continue
                delivery.started_at = delivery.started_at or older.started_at
                if self._close_job(older, job_id):
                    adoption.superseded.append(older)
        return adoption

    def close_jobs(self, job_ids: Iterable[str]) -> list[Delivery]:
        """Remove jobs that have ended. Returns the messages that have no open job left; they are removed as well."""
        with self._lock:
            return [
                delivery
                for job_id in job_ids
                if (delivery := self._by_job.pop(job_id, None)) is not None
                and job_id in delivery.open
                and self._close_job(delivery, job_id)
            ]

    def _close_job(self, delivery: Delivery, job_id: str) -> bool:
        """Remove a job from a message. Returns whether it was the last one. The caller holds the lock."""
        delivery.open.discard(job_id)
        if not delivery.open:
            self._deliveries.pop(delivery.handle, None)
        return not delivery.open

    def drop(self, job_id: str, delivery: Delivery) -> Delivery:
        """Remove a job and its message: `delivery`, unless a newer one has adopted the job. Returns the message."""
        with self._lock:
            current = self._by_job.pop(job_id, delivery)
            self._deliveries.pop(current.handle, None)
            return current

    def of_job(self, job_id: str) -> Delivery | None:
        """The message that an open job belongs to."""
        with self._lock:
            return self._by_job.get(job_id)

    def without_open(self, job_ids: Sequence[str]) -> list[str]:
        """Those of the jobs that are not open here."""
        with self._lock:
            return [job_id for job_id in job_ids if job_id not in self._by_job]

    def deliveries(self) -> list[Delivery]:
        """The messages that this process holds."""
        with self._lock:
            return list(self._deliveries.values())

    def open_jobs(self) -> list[str]:
        """The jobs that have been taken in and have not ended."""
        with self._lock:
            return list(self._by_job)

    def open_items(self) -> list[tuple[str, Delivery]]:
        """The open jobs, each with the message that it belongs to."""
        with self._lock:
            return list(self._by_job.items())

    def held_jobs(self, model: str) -> int:
        """How many jobs for a model are here, whether they are running or not."""
        with self._lock:
            return sum(len(delivery.open) for delivery in self._deliveries.values() if delivery.model == model)

    def held_messages(self, model: str) -> int:
        """How many messages for a model are here."""
        with self._lock:
            return sum(delivery.model == model for delivery in self._deliveries.values())
