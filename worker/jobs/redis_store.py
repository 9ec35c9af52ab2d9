"""The store in Redis: see `worker.jobs.store` for what it keeps."""

from __future__ import annotations

import contextlib
from collections.abc import Container, Iterable, Mapping, Sequence
from typing import Any, cast

import redis
from redis.client import Pipeline

from headrace.client.wire import keys
from headrace.client.wire.clock import RedisClock
from headrace.client.wire.queue_depth import execute_typed, queue_status
from headrace.client.wire.results import State, ended_state, has_ended, record_state
from headrace.worker.jobs.index_keeper import IndexKeeper
from headrace.worker.jobs.store import WORKER_TTL_S, JobRecord, Waiting

#: A worker that has written a heartbeat within this many seconds is alive; it writes one every two seconds.
RECENT_BEAT_S = 5
#: A `WorkerRecord.identity` in a job's record is shorter; anybody may have written another one there.
MAX_IDENTITY = 512
#: One request changes at most this many records: a script holds up all other requests.
UPDATE_JOBS = 1000
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
#: KEYS: the record and the result of each job. ARGV: the lifetime of records, the number of the values that follow,
#: fields and values, then for each job what its attempts change by. Changes those that exist and have no result. A
#: script, because a job may end between a question and its answer: its record would say for 30 days that it is running.
UPDATE_OPEN = """
local count = tonumber(ARGV[2])
for i = 1, #KEYS, 2 do
    if redis.call('EXISTS', KEYS[i]) == 1 and redis.call('EXISTS', KEYS[i + 1]) == 0 then
        redis.pcall('HSET', KEYS[i], unpack(ARGV, 3, 2 + count))
        local change = ARGV[3 + count + (i - 1) / 2]
        if change ~= '0' then
            redis.pcall('HINCRBY', KEYS[i], 'attempts', change)
        end
        redis.call('EXPIRE', KEYS[i], ARGV[1])
    end
end
"""
#: KEYS: the same. ARGV: the lifetime of the records of jobs without a result, then for each job that has ended its
#: state with the time, or "". Other records live as long as the result: one that outlives it says that the job is
#: running, and its caller would wait. The first end counts, as it does for the result.
KEEP_RECORDS = """
for i = 1, #KEYS, 2 do
    local left = redis.call('TTL', KEYS[i + 1])
    local ended = ARGV[1 + (i + 1) / 2]
    if ended and ended ~= '' then
        local state = redis.pcall('HGET', KEYS[i], 'state')
        if state == 'queued' or state == 'running' then
            redis.call('HSET', KEYS[i], 'state', ended)
        end
    end
    redis.call('EXPIRE', KEYS[i], left >= 0 and math.max(left, 1) or ARGV[1])
end
"""


class RedisStore:
    """The store in Redis. Each method sends one request (two at most), however many jobs it is about.

    Results of jobs that had ended before are an exception: one is read after the other, because they may be large.

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
        self._update_open = connection.register_script(UPDATE_OPEN)
        self._clock = RedisClock()
        self._index = IndexKeeper(connection)

    def now(self) -> float:
        with contextlib.suppress(redis.RedisError):  # the last answer is good enough
            self._clock.update(self._redis)
        return self._clock.now()

    def lookup(self, job_ids: Sequence[str]) -> list[JobRecord]:
        self._clock.update(self._redis)  # the deadlines of these jobs are compared with it next
        pipe = self._redis.pipeline(transaction=False)
        pipe.mget([keys.cancel(job_id) for job_id in job_ids])
        for job_id in job_ids:
            pipe.exists(keys.result(job_id))
        for job_id in job_ids:
            pipe.hmget(keys.job(job_id), "attempts", "state", "mark", "begun_by")
        answers = pipe.execute(raise_on_error=False)
        cancels, exist, fields = answers[0], answers[1 : 1 + len(job_ids)], answers[1 + len(job_ids) :]
        for answer in (cancels, *exist):
            if isinstance(answer, Exception):
                raise answer
        if invalid := [j for j, values in zip(job_ids, fields, strict=True) if not _is_valid(values)]:
            self._redis.delete(*map(keys.job, invalid))  # otherwise each attempt would fail, and the jobs wait for ever
            return self.lookup(job_ids)
        ended = self._ended_among(job_ids, exist)
        begun = {begun_by for attempts, _, _, begun_by in fields if int(attempts or 0) > 0 and begun_by}
        alive = self._alive({identity for identity in begun if identity.isascii() and len(identity) < MAX_IDENTITY})
        return [
            JobRecord(
                job_id in ended,
                bool(cancel),
                max(0, int(attempts or 0)),
                state,
                mark,
                begun_by in alive,
            )
            for job_id, cancel, (attempts, state, mark, begun_by) in zip(job_ids, cancels, fields, strict=True)
        ]

    def _ended_among(self, job_ids: Sequence[str], exist: Sequence[int]) -> set[str]:
        """Those of the jobs that have ended, given for each whether a result exists."""
        found = [job_id for job_id, exists in zip(job_ids, exist, strict=True) if exists]
        return {job_id for job_id in found if has_ended(cast("str | None", self._redis.get(keys.result(job_id))))}

    def _alive(self, workers: set[str]) -> set[str]:
        """Those of the workers, by `WorkerRecord.identity`, that have written a heartbeat recently."""
        if not workers:
            return set()
        pipe = self._redis.pipeline(transaction=False)
        named = sorted(workers)
        for identity in named:
            name = identity.rpartition(" ")[0]
            pipe.hmget(keys.worker(name), "process", "stalled")
            pipe.ttl(keys.worker(name))
        answers = pipe.execute(raise_on_error=False)
        return {
            identity
            for identity, fields, ttl_s in zip(named, answers[::2], answers[1::2], strict=True)
            if fields == [identity.rpartition(" ")[2], "0"] and ttl_s >= WORKER_TTL_S - RECENT_BEAT_S
        }

    def announce(self, jobs: Mapping[str, Waiting]) -> None:
        pipe = self._redis.pipeline(transaction=False)
        for job_id, waiting in jobs.items():
            name = keys.job(job_id)
            pipe.hsetnx(name, "state", "queued")
            pipe.hsetnx(name, "model", waiting.model)
            if waiting.until is not None:
                pipe.hset(name, keys.WAITS_UNTIL, f"{waiting.until:.6f}")
        _keep_records(pipe, list(jobs), keys.UNFINISHED_TTL_S)
        self._index.add(pipe, {job_id: waiting.model for job_id, waiting in jobs.items()}, self._clock.now())
        pipe.execute()

    def count_attempts(self, job_ids: Sequence[str], worker: str = "", shared: Container[str] = ()) -> list[int]:
        pipe = self._redis.pipeline(transaction=False)
        for job_id in job_ids:
            pipe.hincrby(keys.job(job_id), "attempts", int(job_id not in shared))
            pipe.hset(keys.job(job_id), "begun_by", worker)
        _keep_records(pipe, job_ids, keys.UNFINISHED_TTL_S)
        return pipe.execute()[:-1:2]

    def started(self, job_ids: Iterable[str], worker: str) -> None:
        self._update(list(job_ids), {"state": "running", "worker": worker, "started_at": self.now()})

    def returned(self, job_ids: Iterable[str], attempted: Iterable[str]) -> None:
        self._update(list(job_ids), {"state": "queued"}, set(attempted))

    def _update(self, job_ids: list[str], fields: Mapping[str, str | float], attempted: Container[str] = ()) -> None:
        """Change the records of those jobs that have one and have not ended.

        If Redis has lost a record, it has lost the message too. A record that is written again would say that the job
        is queued or running, and its caller would wait for ever.
        """
        values = [part for field in fields.items() for part in field]
        for start in range(0, len(job_ids), UPDATE_JOBS):
            part = job_ids[start : start + UPDATE_JOBS]
            changes = [-1 if job_id in attempted else 0 for job_id in part]
            self._update_open(
                keys=_records_and_results(part), args=[keys.UNFINISHED_TTL_S, len(values), *values, *changes]
            )

    def ended(self, job_ids: Iterable[str], state: State | None = None) -> None:
        pipe = self._redis.pipeline(transaction=False)
        self._end(pipe, dict.fromkeys(job_ids, state))
        pipe.execute()

    def finish(self, records: Mapping[str, str]) -> None:
        job_ids = list(records)
        asked = self._redis.pipeline(transaction=False)
        for job_id in job_ids:
            asked.exists(keys.result(job_id))
        ended = self._ended_among(job_ids, asked.execute())
        pipe = self._redis.pipeline()
        for job_id, record in records.items():
            if job_id not in ended:
                pipe.set(keys.result(job_id), record, ex=self._ttl_s)
                pipe.publish(keys.result(job_id), record)  # `AsyncResult.get` is subscribed to it
        self._end(pipe, {j: None if j in ended else record_state(record) for j, record in records.items()})
        pipe.execute()

    def _end(self, pipe: Pipeline, states: Mapping[str, State | None]) -> None:
        now = self._clock.now()
        ends = [ended_state(state, now) if state else "" for state in states.values()]
        _keep_records(pipe, list(states), self._ttl_s, ends)
        pipe.delete(*[keys.cancel(job_id) for job_id in states])

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

    def ends(self, job_ids: Sequence[str]) -> tuple[set[str], set[str]]:
        pipe = self._redis.pipeline(transaction=False)
        pipe.mget([keys.cancel(job_id) for job_id in job_ids])
        for job_id in job_ids:
            pipe.exists(keys.result(job_id))
        flags, *exist = pipe.execute()
        return (
            self._ended_among(job_ids, exist),
            {job_id for job_id, flag in zip(job_ids, flags, strict=True) if flag},
        )

    def lost(self, delivery_tags: Sequence[str]) -> set[str]:
        pipe = self._redis.pipeline(transaction=False)
        for tag in delivery_tags:
            pipe.zscore(keys.unacked_index(), tag)
        return {tag for tag, renewed_at in zip(delivery_tags, pipe.execute(), strict=True) if renewed_at is None}

    def fill_index(self) -> None:
        self._index.fill()

    def prune_index(self) -> bool:
        return self._index.prune()

    def heartbeat(self, worker: str, record: Mapping[str, str | int | float], adapters: Iterable[str] = ()) -> None:
        now = self.now()
        pipe = self._redis.pipeline()
        fields: dict[Any, Any] = {**record, "beat_at": now}
        pipe.hset(keys.worker(worker), mapping=fields)
        pipe.expire(keys.worker(worker), WORKER_TTL_S)
        pipe.zadd(keys.workers(), {worker: now})
        pipe.zremrangebyscore(keys.workers(), 0, now - 20 * WORKER_TTL_S)
        pipe.expire(keys.workers(), 20 * WORKER_TTL_S)
        model = str(record["model"])
        pipe.zadd(keys.models(), dict.fromkeys([model, *(keys.adapter_of(model, name) for name in adapters)], now))
        pipe.zremrangebyscore(keys.models(), 0, now - keys.KNOWN_MODEL_S)
        pipe.expire(keys.models(), keys.KNOWN_MODEL_S)
        pipe.execute()

    def fingerprints(self, model_name: str) -> dict[str, str]:
        pipe = self._redis.pipeline(transaction=False)
        pipe.zrange(keys.workers(), 0, -1)
        (names,) = execute_typed(pipe, [[]])
        for name in names:
            pipe.hmget(keys.worker(name), "model", "fingerprint")
        answers = pipe.execute(raise_on_error=False)
        records = [(name, answer) for name, answer in zip(names, answers, strict=True) if isinstance(answer, list)]
        return {name: fingerprint or "" for name, (model, fingerprint) in records if model == model_name}

    def queued(self, model_name: str) -> dict[str, int]:
        return queue_status(self._redis, model_name).model_dump(exclude={"model"})

    def deregister(self, worker: str) -> None:
        pipe = self._redis.pipeline()
        pipe.delete(keys.worker(worker))
        pipe.zrem(keys.workers(), worker)
        pipe.execute()


def _records_and_results(job_ids: Iterable[str]) -> list[str]:
    return [name for job_id in job_ids for name in (keys.job(job_id), keys.result(job_id))]


def _keep_records(pipe: Pipeline, job_ids: Sequence[str], ttl_s: int, ends: Sequence[str] = ()) -> None:
    names = _records_and_results(job_ids)
    if names:  # with its text: a registered script costs a request to ask whether Redis has it
        pipe.eval(KEEP_RECORDS, len(names), *names, str(ttl_s), *ends)


def _is_valid(fields: Any) -> bool:
    """Whether the record of a job can be used; anybody may have written it. Raises any other error of Redis."""
    if isinstance(fields, Exception):
        if "WRONGTYPE" in str(fields):
            return False
        raise fields
    attempts = fields[0] or "0"
    return attempts.isascii() and attempts.removeprefix("-").isdecimal() and len(attempts) < 10
