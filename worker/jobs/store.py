"""What the worker keeps in Redis beside Celery's own records.

Celery's result record is the truth about how a job ended. Here is what happens before that: the state of a job,
requests to cancel it, the leases of messages, and the records of workers.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, cast

import redis
from redis.client import Pipeline

from headrace.client.wire import keys
from headrace.client.wire.clock import RedisClock
from headrace.client.wire.queue_depth import queue_status
from headrace.client.wire.results import parse_outcome

#: A worker whose last heartbeat is older than this many seconds counts as gone.
WORKER_TTL_S = 15


@dataclass(frozen=True)
class JobRecord:
    """What Redis knows about a job when its message arrives.

    Attributes:
        finished: it has ended: the message is a repetition, and there is nothing to compute.
        cancelled: a client asked to cancel it.
        attempts: how often it went to an engine that neither ended it nor returned it.
        state: the state of a job that has not ended, as its record says.
        mark: the submitter's `client.wire.signing.mark`, which the record contains if the job is signed.
    """

    finished: bool
    cancelled: bool
    attempts: int = 0
    state: str | None = None
    mark: str | None = None


class Store(Protocol):
    """The records of jobs and workers. With Redis, every method but `now` may raise redis.RedisError."""

    def now(self) -> float:
        """Return the Unix time in seconds on the clock that all clients and workers share: that of Redis."""
        ...

    def lookup(self, job_ids: Sequence[str]) -> list[JobRecord]:
        """Return what is known about jobs, in their order."""
        ...

    def count_attempts(self, job_ids: Sequence[str]) -> list[int]:
        """Count an attempt for jobs that are about to go to the engine. Returns how many each has had."""
        ...

    def started(self, job_ids: Iterable[str], worker: str) -> None:
        """Record that jobs have a slot."""
        ...

    def returned(self, job_ids: Iterable[str], attempted: Iterable[str]) -> None:
        """Record that jobs return to the queue unfinished. For those in `attempted` the last attempt does not count."""
        ...

    def ended(self, job_ids: Iterable[str]) -> None:
        """Record that the results of jobs are stored: their records expire when the results do."""
        ...

    def finish(self, records: Mapping[str, str]) -> None:
        """Store Celery's result records by job id, as Celery's backend does, and record that the jobs ended.

        All are stored or none. The result of a job that has ended before is not changed.
        """
        ...

    def save_tensors(self, job_id: str, tensors: Mapping[str, bytes]) -> None:
        """Store the checkpoint tensors of a job, each as safetensors bytes, in place of earlier ones."""
        ...

    def append_events(self, events: Mapping[str, str]) -> list[str]:
        """Append an event, which is JSON, to the stream of each job. Returns the jobs whose event was refused."""
        ...

    def cancelled(self, job_ids: Sequence[str]) -> set[str]:
        """Return those of the jobs that a client asked to cancel."""
        ...

    def renew(self, delivery_tags: Iterable[str]) -> None:
        """Renew the leases of messages, so that no other worker takes them."""
        ...

    def heartbeat(self, worker: str, record: Mapping[str, str | int | float]) -> None:
        """Write the record of a live worker, and that it serves the record's `model`."""
        ...

    def queued(self, model_name: str) -> dict[str, int]:
        """Return how many jobs for a model no worker holds, by priority. For a long queue this is an estimate."""
        ...

    def deregister(self, worker: str) -> None:
        """Remove the record of a worker that ends."""
        ...


#: KEYS: streams. ARGV: their lifetime in seconds, then an event for each. Returns the numbers, from 1, of those that
#: Redis refused. A script, because redis-py takes ten times as long to encode a pipeline of as many commands.
APPEND_EVENTS = """
local refused = {}
for i = 1, #KEYS do
    local answer = redis.pcall('XADD', KEYS[i], '*', 'event', ARGV[i + 1])
    if type(answer) == 'table' and answer.err then
        refused[#refused + 1] = i
    else
        redis.call('EXPIRE', KEYS[i], ARGV[1])
    end
end
return refused
"""


class RedisStore:
    """The store in Redis. Each method sends one request (two at most), however many jobs it is about.

    Args:
        connection: a client that decodes responses.
        result_ttl_s: lifetime of results, and of the records of ended jobs, in seconds.
        checkpoint_ttl_s: lifetime of checkpoint tensors in seconds.
        events_ttl_s: lifetime of a stream after its last event in seconds.
    """

    def __init__(
        self, connection: redis.Redis, *, result_ttl_s: int, checkpoint_ttl_s: int, events_ttl_s: int = 3_600
    ) -> None:
        self._redis = connection
        self._ttl_s = result_ttl_s
        self._checkpoint_ttl_s = checkpoint_ttl_s
        self._events_ttl_s = events_ttl_s
        self._append_events = connection.register_script(APPEND_EVENTS)
        self._clock = RedisClock()

    def now(self) -> float:
        with contextlib.suppress(redis.RedisError):  # the last answer is good enough
            self._clock.update(self._redis)
        return self._clock.now()

    def lookup(self, job_ids: Sequence[str]) -> list[JobRecord]:
        self._clock.update(self._redis)  # the deadlines of these jobs are compared with it next
        pipe = self._redis.pipeline(transaction=False)
        pipe.mget([keys.result(job_id) for job_id in job_ids])
        pipe.mget([keys.cancel(job_id) for job_id in job_ids])
        for job_id in job_ids:
            pipe.hmget(keys.job(job_id), "attempts", "state", "mark")
        answers = pipe.execute(raise_on_error=False)
        if invalid := [j for j, fields in zip(job_ids, answers[2:], strict=True) if not _is_valid(fields)]:
            self._redis.delete(*map(keys.job, invalid))  # otherwise each attempt would fail, and the jobs wait for ever
            return self.lookup(job_ids)
        records, cancels, *fields = answers
        return [
            JobRecord(parse_outcome(record) is not None, bool(cancel), max(0, int(attempts or 0)), state, mark)
            for record, cancel, (attempts, state, mark) in zip(records, cancels, fields, strict=True)
        ]

    def count_attempts(self, job_ids: Sequence[str]) -> list[int]:
        pipe = self._redis.pipeline(transaction=False)
        for job_id in job_ids:
            pipe.hincrby(keys.job(job_id), "attempts", 1)
            pipe.expire(keys.job(job_id), keys.UNFINISHED_TTL_S)
        return pipe.execute()[::2]

    def started(self, job_ids: Iterable[str], worker: str) -> None:
        now = self.now()
        present = self._present(job_ids)
        pipe = self._redis.pipeline(transaction=False)
        for job_id in present:
            pipe.hset(keys.job(job_id), mapping={"state": "running", "worker": worker, "started_at": now})
            pipe.expire(keys.job(job_id), keys.UNFINISHED_TTL_S)
        pipe.execute()

    def returned(self, job_ids: Iterable[str], attempted: Iterable[str]) -> None:
        present = self._present(job_ids)
        pipe = self._redis.pipeline(transaction=False)
        for job_id in present:
            pipe.hset(keys.job(job_id), "state", "queued")
            pipe.expire(keys.job(job_id), keys.UNFINISHED_TTL_S)
        for job_id in present.intersection(attempted):
            pipe.hincrby(keys.job(job_id), "attempts", -1)
            pipe.expire(keys.job(job_id), keys.UNFINISHED_TTL_S)
        pipe.execute()

    def _present(self, job_ids: Iterable[str]) -> set[str]:
        """Those of the jobs that have a record. If Redis has lost it, it has lost the message too.

        A record that is written again would say that the job is queued or running, and its caller would wait for ever.
        """
        job_ids = list(job_ids)
        pipe = self._redis.pipeline(transaction=False)
        for job_id in job_ids:
            pipe.exists(keys.job(job_id))
        return {job_id for job_id, exists in zip(job_ids, pipe.execute(), strict=True) if exists}

    def ended(self, job_ids: Iterable[str]) -> None:
        pipe = self._redis.pipeline(transaction=False)
        self._end(pipe, list(job_ids))
        pipe.execute()

    def finish(self, records: Mapping[str, str]) -> None:
        earlier = cast("list[str | None]", self._redis.mget([keys.result(job_id) for job_id in records]))
        pipe = self._redis.pipeline()
        for (job_id, record), before in zip(records.items(), earlier, strict=True):
            if parse_outcome(before) is None:
                pipe.set(keys.result(job_id), record, ex=self._ttl_s)
                pipe.publish(keys.result(job_id), record)  # `AsyncResult.get` is subscribed to it
        self._end(pipe, list(records))
        pipe.execute()

    def _end(self, pipe: Pipeline, job_ids: list[str]) -> None:
        for job_id in job_ids:
            pipe.expire(keys.job(job_id), self._ttl_s)
        pipe.delete(*[keys.cancel(job_id) for job_id in job_ids])

    def save_tensors(self, job_id: str, tensors: Mapping[str, bytes]) -> None:
        pipe = self._redis.pipeline()
        pipe.delete(keys.checkpoint(job_id))
        for name, data in tensors.items():
            pipe.hset(keys.checkpoint(job_id), name, data)
        pipe.expire(keys.checkpoint(job_id), self._checkpoint_ttl_s)
        pipe.execute()

    def append_events(self, events: Mapping[str, str]) -> list[str]:
        job_ids = list(events)
        refused = self._append_events(keys=list(map(keys.events, job_ids)), args=[self._events_ttl_s, *events.values()])
        return [job_ids[number - 1] for number in cast("list[int]", refused)]

    def cancelled(self, job_ids: Sequence[str]) -> set[str]:
        flags = cast("list[str | None]", self._redis.mget([keys.cancel(job_id) for job_id in job_ids]))
        return {job_id for job_id, flag in zip(job_ids, flags, strict=True) if flag}

    def renew(self, delivery_tags: Iterable[str]) -> None:
        now = self.now()  # `worker.queue.transport` finds leases that have ended by the same clock
        if leases := dict.fromkeys(delivery_tags, now):
            self._redis.zadd(keys.unacked_index(), leases, xx=True)

    def heartbeat(self, worker: str, record: Mapping[str, str | int | float]) -> None:
        now = self.now()
        pipe = self._redis.pipeline()
        fields: dict[Any, Any] = {**record, "beat_at": now}
        pipe.hset(keys.worker(worker), mapping=fields)
        pipe.expire(keys.worker(worker), WORKER_TTL_S)
        pipe.zadd(keys.workers(), {worker: now})
        pipe.zremrangebyscore(keys.workers(), 0, now - 20 * WORKER_TTL_S)
        pipe.expire(keys.workers(), 20 * WORKER_TTL_S)
        pipe.zadd(keys.models(), {str(record["model"]): now})
        pipe.zremrangebyscore(keys.models(), 0, now - keys.KNOWN_MODEL_S)
        pipe.expire(keys.models(), keys.KNOWN_MODEL_S)
        pipe.execute()

    def queued(self, model_name: str) -> dict[str, int]:
        return queue_status(self._redis, model_name).model_dump(exclude={"model"})

    def deregister(self, worker: str) -> None:
        pipe = self._redis.pipeline()
        pipe.delete(keys.worker(worker))
        pipe.zrem(keys.workers(), worker)
        pipe.execute()


def _is_valid(fields: Any) -> bool:
    """Whether the record of a job can be used; anybody may have written it. Raises any other error of Redis."""
    if isinstance(fields, Exception):
        if "WRONGTYPE" in str(fields):
            return False
        raise fields
    attempts = fields[0] or "0"
    return attempts.isascii() and attempts.removeprefix("-").isdecimal() and len(attempts) < 10
