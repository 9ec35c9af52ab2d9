"""What the worker keeps in Redis beside Celery's own records, and an in-memory twin for tests.

The truth about how a job ended is Celery's result record; here is the life before that, requests to cancel, leases on
messages, and what workers say of themselves.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, cast

import redis
from redis.client import Pipeline

from headrace.client.wire import keys
from headrace.client.wire.queue_depth import queue_status
from headrace.client.wire.results import parse_outcome

#: A worker that has not spoken for this long is gone.
WORKER_TTL_S = 15


@dataclass(frozen=True)
class Claim:
    """What is known of a job when its message arrives."""

    #: It has ended already: the message is a repetition, and there is nothing to compute.
    finished: bool
    cancelled: bool
    #: How often it went to an engine that neither ended it nor handed it back.
    attempts: int = 0
    #: What its record says: `state` of a job that has not ended, and the submitter's `client.signing.mark`.
    state: str | None = None
    mark: str | None = None


class Store(Protocol):
    """The records of jobs and workers. Every method may raise redis.RedisError where there is a Redis."""

    def claim(self, job_ids: Sequence[str]) -> list[Claim]:
        """What is known of jobs whose messages have just arrived."""
        ...

    def attempt(self, job_ids: Sequence[str]) -> list[int]:
        """Count an attempt for jobs that are about to go to the engine. Returns how many each has had."""
        ...

    def started(self, job_ids: Iterable[str], worker: str) -> None:
        """Note that jobs have got a slot."""
        ...

    def returned(self, job_ids: Iterable[str], attempted: Iterable[str]) -> None:
        """Note that jobs go back into the queue unfinished; for those in `attempted` the last one does not count."""
        ...

    def ended(self, job_ids: Iterable[str]) -> None:
        """Note that the results of jobs are stored: their records may go when the results do."""
        ...

    def finish(self, records: Mapping[str, str]) -> None:
        """Store Celery's result records of jobs, by id, as Celery's backend does, and note that the jobs ended.

        All are stored or none. A job that has ended before stays as it ended.
        """
        ...

    def dump(self, job_id: str, tensors: Mapping[str, bytes]) -> None:
        """Keep the checkpoint tensors of a job, each as safetensors bytes; an earlier dump of it goes."""
        ...

    def tell(self, events: Mapping[str, str]) -> list[str]:
        """Append an event to the streams of jobs, each JSON by id. Returns the jobs whose event was refused."""
        ...

    def cancelled(self, job_ids: Sequence[str]) -> set[str]:
        """Those of the jobs whose cancelling was asked for."""
        ...

    def renew(self, delivery_tags: Iterable[str]) -> None:
        """Renew the leases of messages, so that no other worker takes them for lost."""
        ...

    def announce(self, worker: str, record: Mapping[str, str | int | float]) -> None:
        """Say that a worker lives, what it is doing, and that it serves the record's `model`."""
        ...

    def queued(self, model_name: str) -> dict[str, int]:
        """How many jobs wait for a model that no worker holds, by priority; an estimate where they are many."""
        ...

    def withdraw(self, worker: str) -> None:
        """Say that a worker is gone."""
        ...


#: KEYS: streams. ARGV: their lifetime, then an event for each. Gives the numbers, from 1, of those that were refused.
#: A script, because a pipeline of as many commands takes ten times as long to write in Python.
TELL = """
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
    """The store in Redis. One request to the server a method, whatever the number of jobs."""

    def __init__(
        self, connection: redis.Redis, *, result_ttl_s: int, checkpoint_ttl_s: int, events_ttl_s: int = 3_600
    ) -> None:
        self._redis = connection
        self._ttl_s = result_ttl_s
        self._checkpoint_ttl_s = checkpoint_ttl_s
        self._events_ttl_s = events_ttl_s
        self._tell = connection.register_script(TELL)

    def claim(self, job_ids: Sequence[str]) -> list[Claim]:
        pipe = self._redis.pipeline(transaction=False)
        pipe.mget([keys.result(job_id) for job_id in job_ids])
        pipe.mget([keys.cancel(job_id) for job_id in job_ids])
        for job_id in job_ids:
            pipe.hmget(keys.job(job_id), "attempts", "state", "mark")
        answers = pipe.execute(raise_on_error=False)
        if spoilt := [j for j, fields in zip(job_ids, answers[2:], strict=True) if not _is_record(fields)]:
            self._redis.delete(*map(keys.job, spoilt))  # or each attempt at them would fail, and they would wait here
            return self.claim(job_ids)
        records, cancels, *fields = answers
        return [
            Claim(parse_outcome(record) is not None, bool(cancel), max(0, int(attempts or 0)), state, mark)
            for record, cancel, (attempts, state, mark) in zip(records, cancels, fields, strict=True)
        ]

    def attempt(self, job_ids: Sequence[str]) -> list[int]:
        pipe = self._redis.pipeline(transaction=False)
        for job_id in job_ids:
            pipe.hincrby(keys.job(job_id), "attempts", 1)
            pipe.expire(keys.job(job_id), keys.UNFINISHED_TTL_S)
        return pipe.execute()[::2]

    def started(self, job_ids: Iterable[str], worker: str) -> None:
        pipe = self._redis.pipeline(transaction=False)
        for job_id in job_ids:
            pipe.hset(keys.job(job_id), mapping={"state": "running", "worker": worker, "started_at": time.time()})
            pipe.expire(keys.job(job_id), keys.UNFINISHED_TTL_S)
        pipe.execute()

    def returned(self, job_ids: Iterable[str], attempted: Iterable[str]) -> None:
        pipe = self._redis.pipeline(transaction=False)
        for job_id in job_ids:
            pipe.hset(keys.job(job_id), "state", "queued")
            pipe.expire(keys.job(job_id), keys.UNFINISHED_TTL_S)
        for job_id in attempted:
            pipe.hincrby(keys.job(job_id), "attempts", -1)
            pipe.expire(keys.job(job_id), keys.UNFINISHED_TTL_S)
        pipe.execute()

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
                pipe.publish(keys.result(job_id), record)  # who waits in `AsyncResult.get` hears of it so
        self._end(pipe, list(records))
        pipe.execute()

    def _end(self, pipe: Pipeline, job_ids: list[str]) -> None:
        for job_id in job_ids:
            pipe.expire(keys.job(job_id), self._ttl_s)
        pipe.delete(*[keys.cancel(job_id) for job_id in job_ids])

    def dump(self, job_id: str, tensors: Mapping[str, bytes]) -> None:
        pipe = self._redis.pipeline()
        pipe.delete(keys.checkpoint(job_id))
        for name, data in tensors.items():
            pipe.hset(keys.checkpoint(job_id), name, data)
        pipe.expire(keys.checkpoint(job_id), self._checkpoint_ttl_s)
        pipe.execute()

    def tell(self, events: Mapping[str, str]) -> list[str]:
        job_ids = list(events)
        refused = self._tell(keys=list(map(keys.events, job_ids)), args=[self._events_ttl_s, *events.values()])
        return [job_ids[number - 1] for number in cast("list[int]", refused)]

    def cancelled(self, job_ids: Sequence[str]) -> set[str]:
        flags = cast("list[str | None]", self._redis.mget([keys.cancel(job_id) for job_id in job_ids]))
        return {job_id for job_id, flag in zip(job_ids, flags, strict=True) if flag}

    def renew(self, delivery_tags: Iterable[str]) -> None:
        now = time.time()  # the clock that kombu's sweep uses too
        if leases := dict.fromkeys(delivery_tags, now):
            self._redis.zadd(keys.unacked_index(), leases, xx=True)

    def announce(self, worker: str, record: Mapping[str, str | int | float]) -> None:
        now = time.time()
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

    def withdraw(self, worker: str) -> None:
        pipe = self._redis.pipeline()
        pipe.delete(keys.worker(worker))
        pipe.zrem(keys.workers(), worker)
        pipe.execute()


def _is_record(answer: Any) -> bool:
    """Whether a job's record can be worked with. Raises what Redis answered if that has other reasons."""
    if isinstance(answer, Exception):
        if "WRONGTYPE" in str(answer):
            return False
        raise answer
    attempts = answer[0] or "0"
    return attempts.isascii() and attempts.removeprefix("-").isdecimal() and len(attempts) < 10


@dataclass
class MemoryStore:
    """The same in memory. Tests set `results` and `cancels` as a client and Celery's backend would."""

    results: dict[str, str] = field(default_factory=dict)
    cancels: set[str] = field(default_factory=set)
    states: dict[str, str] = field(default_factory=dict)
    attempts: dict[str, int] = field(default_factory=dict)
    marks: dict[str, str] = field(default_factory=dict)
    leases: dict[str, float] = field(default_factory=dict)
    workers: dict[str, dict[str, str | int | float]] = field(default_factory=dict)
    dumps: dict[str, dict[str, bytes]] = field(default_factory=dict)
    events: dict[str, list[str]] = field(default_factory=dict)

    def claim(self, job_ids: Sequence[str]) -> list[Claim]:
        return [
            Claim(j in self.results, j in self.cancels, self.attempts.get(j, 0), self.states.get(j), self.marks.get(j))
            for j in job_ids
        ]

    def attempt(self, job_ids: Sequence[str]) -> list[int]:
        self.attempts.update({job_id: self.attempts.get(job_id, 0) + 1 for job_id in job_ids})
        return [self.attempts[job_id] for job_id in job_ids]

    def started(self, job_ids: Iterable[str], worker: str) -> None:  # noqa: ARG002
        self.states.update(dict.fromkeys(job_ids, "running"))

    def returned(self, job_ids: Iterable[str], attempted: Iterable[str]) -> None:
        self.states.update(dict.fromkeys(job_ids, "queued"))
        self.attempts.update({job_id: self.attempts[job_id] - 1 for job_id in attempted})

    def ended(self, job_ids: Iterable[str]) -> None:
        self.cancels.difference_update(job_ids)

    def finish(self, records: Mapping[str, str]) -> None:
        for job_id, record in records.items():
            self.results.setdefault(job_id, record)
        self.ended(records)

    def dump(self, job_id: str, tensors: Mapping[str, bytes]) -> None:
        self.dumps[job_id] = dict(tensors)

    def tell(self, events: Mapping[str, str]) -> list[str]:
        for job_id, event in events.items():
            self.events.setdefault(job_id, []).append(event)
        return []

    def cancelled(self, job_ids: Sequence[str]) -> set[str]:
        return self.cancels.intersection(job_ids)

    def renew(self, delivery_tags: Iterable[str]) -> None:
        self.leases.update({tag: time.time() for tag in delivery_tags if tag in self.leases})

    def announce(self, worker: str, record: Mapping[str, str | int | float]) -> None:
        self.workers[worker] = dict(record)

    def queued(self, model_name: str) -> dict[str, int]:  # noqa: ARG002
        return {}

    def withdraw(self, worker: str) -> None:
        self.workers.pop(worker, None)
