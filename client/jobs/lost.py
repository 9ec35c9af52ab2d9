"""Finds jobs that wait for ever: their records say that they are queued, and no queue and no worker has their message.

`celery purge` and everything else that deletes messages leaves the records of their jobs.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Iterable, Sequence
from itertools import chain
from typing import Any

import redis

from headrace.client.jobs.queued import Message, delivered_messages, queued_messages
from headrace.client.wire import keys
from headrace.client.wire.clock import RedisClock
from headrace.client.wire.queue_depth import execute_typed

#: Jobs are not looked for before they are this old in seconds: a client may still be sending their message.
SENDING_S = 10.0
#: Seconds between two looks that must both find no message: a worker may be returning it.
CONFIRM_S = 0.5
#: Most jobs of one look. The messages of a longer queue are not read: the job's turn will come, or the queue shortens.
LOOK_JOBS, LOOK_MESSAGES = 512, 2_000


def find_lost(connection: redis.Redis, job_ids: Iterable[str]) -> list[str]:
    """Those of the jobs that are queued and have no message. Their records are removed, so that everybody learns it.

    A message moves in single steps between a queue and the workers' unacknowledged messages. One that is moved while
    this reads both could be missed, so they are read twice, the queue before and after; and a worker that has had the
    job in between has changed its record.

    Returns:
        Nothing if the Redis user may not read the messages, or there are too many to read.

    Raises:
        redis.RedisError: Redis does not answer.
    """
    before = _waiting(connection, list(job_ids)[:LOOK_JOBS])
    try:
        left = _without_message(connection, before)
        if not left:
            return []
        time.sleep(CONFIRM_S)
        left = _without_message(connection, left)
    except redis.exceptions.NoPermissionError:
        return []
    after = _waiting(connection, list(left))
    lost = [job_id for job_id, record in after.items() if record == before[job_id]]
    pipe = connection.pipeline(transaction=False)
    for job_id in lost:
        pipe.expire(keys.job(job_id), 0)  # not DEL: the Redis user of clients may not use it
    pipe.execute()
    return lost


def _waiting(connection: redis.Redis, job_ids: Sequence[str]) -> dict[str, list[Any]]:
    """The records of those of the jobs that are queued, whose messages were sent, and that have no result."""
    clock = RedisClock()
    clock.update(connection)
    pipe = connection.pipeline(transaction=False)
    for job_id in job_ids:
        pipe.hmget(keys.job(job_id), "model", "state", "submitted_at", "attempts", "begun_by", "started_at")
        pipe.ttl(keys.job(job_id))
        pipe.exists(keys.result(job_id))
    try:
        answers = execute_typed(pipe, ([], 0, 1) * len(job_ids))
    except redis.exceptions.NoPermissionError:  # an older config/redis-users.acl
        return {}
    found = {}
    for job_id, record, ttl_s, ended in zip(job_ids, answers[::3], answers[1::3], answers[2::3], strict=True):
        if not record or not record[0] or record[1] != "queued" or ended:
            continue
        # Until its message was sent, a record lives for a minute.
        if ttl_s > keys.UNSENT_TTL_S and _age_s(record[2], clock.now()) > SENDING_S:
            found[job_id] = record
    return found


def _age_s(submitted_at: str | None, now: float) -> float:
    try:
        return now - float(submitted_at or now)
    except ValueError:
        return 0.0


def _without_message(connection: redis.Redis, waiting: dict[str, list[Any]]) -> dict[str, list[Any]]:
    """Those of the jobs that no message has."""
    by_model = defaultdict[str, dict[str, list[Any]]](dict)
    for job_id, record in waiting.items():
        by_model[record[0]][job_id] = record
    left = dict[str, list[Any]]()
    for model, jobs in by_model.items():
        pipe = connection.pipeline(transaction=False)
        for name in keys.queue_lists(model):
            pipe.llen(name)
        pipe.hlen(keys.unacked())
        if sum(execute_typed(pipe, (0,) * (len(keys.queue_lists(model)) + 1))) > LOOK_MESSAGES:
            continue
        messages = chain(
            queued_messages(connection, model), delivered_messages(connection), queued_messages(connection, model)
        )
        left |= _remove_found(jobs, messages)
    return left


def _remove_found(jobs: dict[str, list[Any]], messages: Iterable[Message]) -> dict[str, list[Any]]:
    left = dict(jobs)
    for message in messages:
        for job_id in message.jobs:
            left.pop(job_id, None)
        if not left:
            break
    return left
