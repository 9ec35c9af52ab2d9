"""Looks after the jobs whose messages wait inside Celery, for their ETA or countdown, or for a rate limit."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from itertools import islice

from celery.worker import state

from headrace.client.wire.celery import GROUP_TASK_NAME
from headrace.client.wire.errors import JobError
from headrace.worker.jobs.main_thread import MainThread
from headrace.worker.jobs.service import cancelled_early
from headrace.worker.jobs.store import Store, Waiting
from headrace.worker.queue.held import HeldMessage, HeldMessages
from headrace.worker.queue.messages import argument, read_group

#: Seconds between two looks at the waiting messages, and how many jobs each of them asks Redis about.
LOOK_S, LOOK_JOBS = 1.0, 2_000


class WaitingJobs:
    """Writes the records of waiting jobs, and ends those that were cancelled. Used by the heartbeat thread only.

    Args:
        store: has the records, the results and the requests to cancel.
        held: the messages; its `holder` acts on them in the main thread.
        main_thread: calls the holder.
        fail: stores a failure for jobs that belong to no message in the pool.
    """

    def __init__(
        self,
        store: Store,
        held: HeldMessages,
        main_thread: MainThread,
        fail: Callable[[Sequence[str], JobError], None],
    ) -> None:
        self._store, self._held, self._main_thread, self._fail = store, held, main_thread, fail
        self._look_at, self._seen = 0.0, 0

    def look(self, now: float) -> None:
        """Look at the waiting messages if it is time. `now` is the monotonic clock's. Raises redis.RedisError."""
        if now < self._look_at:
            return
        self._look_at = now + LOOK_S
        waiting = self._held.waiting()
        if not waiting:
            return
        self._main_thread.call(self._held.holder.check_revoked)
        self._announce(message for message in waiting if not message.announced)
        self._end_cancelled(self._next_part(waiting))

    def count(self, model: str) -> int:
        """How many jobs for a model wait."""
        return sum(len(message.job_ids or ()) for message in self._held.waiting() if message.model == model)

    def _announce(self, messages: Iterable[HeldMessage]) -> None:
        """Write the records, so that a client finds jobs that a plain Celery producer has sent."""
        jobs: dict[str, Waiting] = {}
        new = []
        for message in messages:
            if message.job_ids is None:
                message.job_ids = _job_ids(message)
            if message.model is not None:
                jobs |= dict.fromkeys(message.job_ids, Waiting(message.model, message.until))
            new.append(message)
        if jobs:
            self._store.announce(jobs)
        for message in new:
            message.announced = True

    def _next_part(self, waiting: list[HeldMessage]) -> list[HeldMessage]:
        """The messages to ask about now: all of them in turn, about LOOK_JOBS each time."""
        start = self._seen % len(waiting)
        part = list(islice(waiting, start, start + LOOK_JOBS))
        self._seen = start + len(part)
        return [message for message in part if message.job_ids]

    def _end_cancelled(self, part: list[HeldMessage]) -> None:
        job_ids = [job_id for message in part for job_id in message.job_ids or ()]
        if not job_ids:
            return
        ended, cancelled = self._store.ends(job_ids)
        cancelled = (cancelled | {job_id for job_id in job_ids if job_id in state.revoked}) - ended
        for message in part:
            jobs = set(message.job_ids or ())
            holder = self._held.holder
            if self._held.waits(message.tag) is None:
                continue  # it was revoked or has expired, and the pool ends its jobs
            if jobs <= ended:
                self._main_thread.call(holder.acknowledge, message.tag)
            elif jobs <= cancelled and message.request is not None:
                self._main_thread.call(holder.release, message.tag)
            elif unwanted := sorted(jobs & cancelled):
                self._fail(unwanted, cancelled_early())


def _job_ids(message: HeldMessage) -> tuple[str, ...]:
    request = message.request
    if request is None:  # given to the pool in the meantime
        return ()
    if request.type != GROUP_TASK_NAME:
        return (request.id,)
    headers = request.request_dict
    return tuple(read_group(argument(request.type, headers.get("args"), headers.get("kwargs"))))
