"""Cancels jobs: those that wait end at once, and workers end the others."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import redis

from headrace.client.jobs.polling import READ_BYTES
from headrace.client.wire import keys
from headrace.client.wire.clock import RedisClock
from headrace.client.wire.redis import redis_errors
from headrace.client.wire.results import Outcome, cancelled_record, ended_state

#: Number of jobs that are cancelled in one round trip.
CANCEL_JOBS = 512


class Canceller:
    """Cancels jobs on one Redis.

    A request to cancel is stored for each job, and the worker that has the job reads it. A job that waits also gets its
    result here, because there may be no worker. If a worker begins it at that moment, it finds the request, and the
    result that exists is kept; if its message comes later, the worker finds the result and drops the message.

    Args:
        connection: to the Redis at `url`.
        poll_many: reads the outcomes and the states of jobs; raises UnknownJob.
        result_ttl_s: lifetime in seconds of the results that are stored here.
    """

    def __init__(
        self,
        url: str,
        connection: redis.Redis,
        poll_many: Callable[[Sequence[str]], list[tuple[Outcome | None, str | None]]],
        *,
        result_ttl_s: int,
    ) -> None:
        self._url, self._redis, self._poll_many, self._ttl_s = url, connection, poll_many, result_ttl_s
        self._clock = RedisClock()

    def cancel(self, job_ids: Sequence[str]) -> list[bool]:
        """Cancel jobs. Returns for each whether it had not ended yet.

        Raises:
            UnknownJob: one does not exist. None of the up to CANCEL_JOBS jobs of its round trip was cancelled.
            RedisUnreachable, RedisRefused: Redis does not answer, or answers with an error.
        """
        parts = [job_ids[start : start + CANCEL_JOBS] for start in range(0, len(job_ids), CANCEL_JOBS)]
        return [flag for part in parts for flag in self._cancel_part(part)]

    def request(self, job_ids: Sequence[str]) -> None:
        """Ask the workers that have the jobs, or that will have them, to end them.

        Raises:
            redis.RedisError: Redis does not answer, or answers with an error.
        """
        pipe = self._redis.pipeline(transaction=False)
        for job_id in job_ids:
            pipe.set(keys.cancel(job_id), "1", ex=keys.UNFINISHED_TTL_S)
        pipe.execute()

    def end_waiting(self, job_ids: Sequence[str]) -> set[str]:
        """End jobs that wait, now. Returns those that had not ended before.

        Raises:
            redis.RedisError: Redis does not answer, or answers with an error.
        """
        return self._end(job_ids, job_ids)[0]

    def _cancel_part(self, job_ids: Sequence[str]) -> list[bool]:
        open_jobs = [j for j, has_ended in zip(job_ids, self._has_ended(job_ids), strict=True) if not has_ended]
        ended = set(job_ids).difference(open_jobs)
        if open_jobs:
            with redis_errors(self._url):
                _, stored = self._end(open_jobs, self._those_that_wait(open_jobs))
            # If a job ended in between, no worker will delete its key.
            late = [j for j, has_ended in zip(stored, self._has_ended(stored), strict=True) if has_ended]
            with redis_errors(self._url):
                pipe = self._redis.pipeline(transaction=False)
                for job_id in late:
                    pipe.expire(keys.cancel(job_id), 0)  # not DEL: the Redis user of clients may not use it
                pipe.execute()
            ended.update(late)
        return [job_id not in ended for job_id in job_ids]

    def _those_that_wait(self, job_ids: Sequence[str]) -> list[str]:
        """The jobs that wait and that no worker has begun, and whose ends nobody else needs to see.

        A worker notes that a job runs some time after it has begun it.

        Other tasks may follow a job of a canvas, and only a worker knows them. A job that another program sent has no
        time of submission in its record.
        """
        pipe = self._redis.pipeline(transaction=False)
        for job_id in job_ids:
            pipe.hmget(keys.job(job_id), "state", "submitted_at", "begun_by", keys.CANVAS)
        records = zip(job_ids, pipe.execute(raise_on_error=False), strict=True)
        return [job_id for job_id, record in records if isinstance(record, list) and _waits(*record)]

    def _end(self, job_ids: Sequence[str], waiting: Sequence[str]) -> tuple[set[str], list[str]]:
        """Store requests to cancel, and the ends of those jobs that wait, in one round trip.

        Returns:
            The jobs whose ends were stored here, and those of the others that have a result.
        """
        self._clock.update(self._redis)
        records = {job_id: cancelled_record(job_id) for job_id in waiting}
        others = [job_id for job_id in job_ids if job_id not in records]
        pipe = self._redis.pipeline(transaction=False)
        for job_id in job_ids:
            pipe.set(keys.cancel(job_id), "1", ex=keys.UNFINISHED_TTL_S)
        for job_id, record in records.items():
            pipe.set(keys.result(job_id), record, nx=True, ex=self._ttl_s)
        for job_id in others:
            pipe.exists(keys.result(job_id))
        answers = dict(zip([*records, *others], pipe.execute()[len(job_ids) :], strict=True))
        new = {job_id for job_id in records if answers[job_id]}
        self._announce({job_id: records[job_id] for job_id in new})
        return new, [*(j for j in records if j not in new), *(j for j in others if answers[j])]

    def _announce(self, records: Mapping[str, str]) -> None:
        """Note in the records of jobs that they have ended, and tell those who wait for a message about it."""
        ended = ended_state("cancelled", self._clock.now())
        pipe = self._redis.pipeline(transaction=False)
        for job_id in records:
            pipe.hset(keys.job(job_id), "state", ended)
            pipe.expire(keys.job(job_id), self._ttl_s)
            pipe.expire(keys.cancel(job_id), self._ttl_s)
        pipe.execute()
        for job_id, record in records.items():
            pipe.publish(keys.result(job_id), record)  # Celery's `AsyncResult.get` is subscribed to it
        pipe.execute(raise_on_error=False)  # without the right to it, a later look finds the result

    def _has_ended(self, job_ids: Sequence[str]) -> list[bool]:
        """Whether each job has ended. Reads READ_BYTES of results at a time and keeps none of them.

        Raises:
            UnknownJob, UnreadableRecord: as `poll`.
        """
        with redis_errors(self._url):
            pipe = self._redis.pipeline(transaction=False)
            for job_id in job_ids:
                pipe.execute_command("STRLEN", keys.result(job_id))  # type: ignore[no-untyped-call]
            sizes = pipe.execute(raise_on_error=False)
        ended: list[bool] = []
        part: list[str] = []
        total = 0
        for job_id, size in zip(job_ids, sizes, strict=True):
            size = size if isinstance(size, int) else 0  # another type, or a user without the right to ask
            if part and total + size > READ_BYTES:
                ended += [outcome is not None for outcome, _ in self._poll_many(part)]
                part, total = [], 0
            part.append(job_id)
            total += size
        return ended + [outcome is not None for outcome, _ in self._poll_many(part)]


def _waits(state: str | None, submitted_at: str | None, begun_by: str | None, canvas: str | None) -> bool:
    return state == "queued" and submitted_at is not None and not begun_by and canvas is None
