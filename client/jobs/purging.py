"""Ends all jobs of a model: those that wait, or those that run too."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Sequence
from typing import cast

import redis

from headrace.client.jobs.cancelling import CANCEL_JOBS, Canceller
from headrace.client.jobs.listing import JobFilter, JobLister
from headrace.client.jobs.queued import READ_MESSAGES, Message, read_message
from headrace.client.wire import keys
from headrace.client.wire.errors import UnknownJob
from headrace.client.wire.queue_depth import queue_status
from headrace.client.wire.redis import redis_errors


class Purger:
    """Ends many jobs on one Redis. All methods raise RedisUnreachable and RedisRefused.

    Args:
        connection: to the Redis at `url`.
        lister: finds the jobs that the messages do not show.
        canceller: ends them.
    """

    def __init__(self, url: str, connection: redis.Redis, lister: JobLister, canceller: Canceller) -> None:
        self._url, self._redis, self._lister, self._canceller = url, connection, lister, canceller

    def count_queued(self, model: str) -> int:
        """About how many jobs of a model wait in the queue; without the right to read it, how many messages."""
        with redis_errors(self._url):
            return queue_status(self._redis, model).total

    def purge(self, model: str) -> int:
        """End the jobs of a model that wait, as cancelled. Returns how many.

        Jobs that run continue. Messages are removed if the Redis user may read the queue; otherwise they stay until a
        worker takes them and finds that their jobs have ended.
        """
        return len(self._purge(model))

    def cancel_all(self, model: str) -> int:
        """Cancel all jobs of a model, also those that run. Returns how many."""
        return len(self._purge(model) | self._cancel(JobFilter(model=model, state="running")))

    def _purge(self, model: str) -> set[str]:
        ended: set[str] = set()
        with redis_errors(self._url):
            try:
                for name in keys.queue_lists(model):
                    ended |= self._purge_list(name)
            except redis.exceptions.NoPermissionError:
                pass
        # Those that a worker has taken and not begun, and all of them without the right to read the queue.
        return ended | self._cancel(JobFilter(model=model, state="queued"))

    def _purge_list(self, name: str) -> set[str]:
        """End the jobs of the messages in a list, from the oldest on, and remove these messages."""
        ended, kept = set[str](), 0
        while texts := cast("list[str]", self._redis.lrange(name, -(kept + READ_MESSAGES), -(kept + 1))):
            messages = [message for text in reversed(texts) if (message := read_message(text, name)) is not None]
            alone = [message for message in messages if not message.is_followed]
            for part in _parts(_jobs_of(alone)):
                ended |= self._canceller.end_waiting(part)
            # Only a worker knows how to end a job that other tasks follow.
            followed = [message for message in messages if message.is_followed]
            for part in _parts(_jobs_of(followed)):
                self._canceller.request(part)
                ended |= set(part)
            kept += len(texts) - self._remove(name, [message.text for message in alone])
        return ended

    def _remove(self, name: str, texts: Sequence[str]) -> int:
        """Remove messages from the end of a list. Returns how many are no longer there."""
        pipe = self._redis.pipeline(transaction=False)
        for text in texts:
            pipe.lrem(name, -1, text)
        answers = pipe.execute(raise_on_error=False)
        return sum(not isinstance(answer, Exception) for answer in answers)

    def _cancel(self, wanted: JobFilter) -> set[str]:
        cancelled: set[str] = set()
        for part in _parts(job.id for job in self._lister.all(wanted)):
            cancelled |= self._cancel_known(part)
        return cancelled

    def _cancel_known(self, job_ids: list[str]) -> set[str]:
        try:
            open_before = self._canceller.cancel(job_ids)
        except UnknownJob as error:  # it has expired since it was listed; none of them was cancelled
            left = [job_id for job_id in job_ids if job_id != error.job_id]
            return self._cancel_known(left) if left else set()
        return {job_id for job_id, was_open in zip(job_ids, open_before, strict=True) if was_open}


def _parts(job_ids: Iterable[str]) -> Iterator[list[str]]:
    source = iter(job_ids)
    return iter(lambda: list(itertools.islice(source, CANCEL_JOBS)), [])


def _jobs_of(messages: Iterable[Message]) -> Iterator[str]:
    return (job_id for message in messages for job_id in message.jobs)
