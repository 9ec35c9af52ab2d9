"""How many jobs wait in the queues, counted from the messages in Redis."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any, cast

import redis
from pydantic import BaseModel

from headrace.client.wire import keys
from headrace.client.wire.celery import JOBS_HEADER

#: How many messages of a queue are read; the others are assumed to hold as many jobs on average.
SAMPLE = 32
#: The sizes of samples, the next one only if it is likely to be smaller than this. A message may have 2 MiB, and a
#: status is read every second.
GROWING, SAMPLE_CHARACTERS = (2, SAMPLE), 2**20


class QueueStatus(BaseModel):
    """Jobs that wait in Redis and that no worker has taken yet, by priority.

    A message with several jobs counts whole until its last job is done, also while it waits to be delivered again. With
    more than SAMPLE messages, or with large ones, the number is an estimate. For a Redis user without the right to read
    the queue (config/redis-users.acl) each message counts as one job.
    """

    model: str
    interactive: int = 0
    normal: int = 0
    bulk: int = 0

    @property
    def total(self) -> int:
        """Jobs of all priorities."""
        return self.interactive + self.normal + self.bulk


def queue_status(connection: redis.Redis, model: str) -> QueueStatus:
    """The jobs that wait for a model, by priority."""
    # kombu has a priority step 6, which no public priority uses: it counts as bulk.
    interactive, normal, unused, bulk = count_queued(connection, model)
    return QueueStatus(model=model, interactive=interactive, normal=normal, bulk=unused + bulk)


def count_queued(connection: redis.Redis, model: str) -> list[int]:
    """The number of jobs that wait for a model, in each list of `keys.queue_lists`."""
    try:
        return _count_by_samples(connection, keys.queue_lists(model))
    except redis.exceptions.NoPermissionError:
        pipe = connection.pipeline(transaction=False)
        for name in keys.queue_lists(model):
            pipe.llen(name)
        return cast("list[int]", pipe.execute())


def count_delivered(connection: redis.Redis) -> int:
    """The number of jobs in messages that workers have taken and not acknowledged.

    Raises:
        redis.exceptions.NoPermissionError: the Redis user may not read them.
    """
    pipe = connection.pipeline(transaction=False)
    length, sample = 0, list[str]()
    for count in GROWING:
        pipe.hlen(keys.unacked())
        pipe.hrandfield(keys.unacked(), count, withvalues=True)
        length, fields = execute_typed(pipe, (0, []))
        sample = fields[1::2]
        if len(sample) < count or _growth(sample) > SAMPLE_CHARACTERS:
            break
    return _scaled(length, [_jobs_in(entry) for entry in sample])


def _count_by_samples(connection: redis.Redis, names: list[str]) -> list[int]:
    pipe = connection.pipeline(transaction=False)
    counts = dict[str, int]()
    for size in GROWING:
        asked = [name for name in names if name not in counts]
        for name in asked:
            pipe.llen(name)
            pipe.lrange(name, 0, size // 2 - 1)  # both ends: single jobs and groups are often sent one after the other
            pipe.lrange(name, -size // 2, -1)
        answers = execute_typed(pipe, (0, [], []) * len(asked))
        for name, length, newest, oldest in zip(asked, answers[::3], answers[1::3], answers[2::3], strict=True):
            sample = newest[: max(0, length - len(oldest))] + oldest  # in a short list both ends overlap
            if length <= size or size == SAMPLE or _growth(sample) > SAMPLE_CHARACTERS:
                counts[name] = _scaled(length, [_jobs_in(message) for message in sample])
        if len(counts) == len(names):
            break
    return [counts[name] for name in names]


def _growth(sample: Sequence[str]) -> int:
    """About how many characters the next sample has, given this one."""
    return (GROWING[1] // GROWING[0]) * sum(map(len, sample))


def execute_typed(pipe: Any, defaults: Sequence[Any]) -> list[Any]:
    """Execute a pipeline. A command whose key another program has given another type has its default as the answer.

    Raises:
        redis.RedisError: a command failed for another reason.
    """
    answers = pipe.execute(raise_on_error=False)
    for index, answer in enumerate(answers):
        if isinstance(answer, Exception):
            if "WRONGTYPE" not in str(answer):
                raise answer
            answers[index] = defaults[index]
    return cast("list[Any]", answers)


def _scaled(length: int, sample: list[int]) -> int:
    """The number of jobs in `length` messages, from the numbers in some of them."""
    return round(sum(sample) * length / len(sample)) if sample else length


def _jobs_in(message: str) -> int:
    """The number of jobs in a message, in kombu's form of queued or of unacknowledged messages.

    A message that cannot be read counts as one. The number is at most the message's length, whatever its header claims.
    """
    try:
        raw = json.loads(message)
        raw = raw[0] if isinstance(raw, list) else raw
        return max(1, min(int(raw["headers"].get(JOBS_HEADER, 1)), len(message)))
    except (ValueError, LookupError, TypeError, AttributeError, OverflowError, RecursionError):
        return 1
