"""Messages for headrace in lists of Redis that no worker reads: other programs have put them there by mistake."""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from typing import Any

import redis
from pydantic import BaseModel

from headrace.client.wire import keys
from headrace.client.wire.celery import GROUP_TASK_NAME, TASK_NAME

#: How many messages of a list with other tasks are read, from its older end.
SAMPLE = 16
#: Celery's default queue, where messages go that name none.
DEFAULT_QUEUE = "celery"
#: A message names its task in its headers, which are not encoded.
_TASKS = (f'"{TASK_NAME}"', f'"{GROUP_TASK_NAME}"')


class Misplaced(BaseModel):
    """Messages in a list that no worker reads.

    Attributes:
        key: the key of the list in Redis, without kombu's suffix for the priority.
        messages: how many; of Celery's default queue, how many of the oldest `SAMPLE` of each priority.
        advice: what the program that sent them has to change.
    """

    key: str
    messages: int
    advice: str


def find_misplaced(connection: redis.Redis, models: Iterable[str]) -> list[Misplaced]:
    """Look for misplaced messages of these models. Lists that the Redis user may not read are left out.

    Raises:
        redis.exceptions.NoPermissionError: the Redis user may not read lists without the prefix.
        redis.RedisError: Redis does not answer.
    """
    models = list(models)
    places = [(keys.queue(model), "set global_keyprefix", False) for model in models]
    places += [(keys.PREFIX.rstrip(":") + keys.queue(model), "end global_keyprefix in ':'", False) for model in models]
    for model in set(models) - {DEFAULT_QUEUE}:  # such a list may be somebody else's
        places += [(model, "set global_keyprefix and the whole name of the queue", True)]
        places += [(keys.PREFIX + model, "write the whole name of the queue", True)]
    places += [(DEFAULT_QUEUE, "set global_keyprefix and a queue", True)]
    places += [(keys.PREFIX + DEFAULT_QUEUE, "name a queue", True)]
    connection.exists(
        places[0][0]
    )  # Redis logs each command that it denies, so a user without the right sends one only
    pipe = connection.pipeline(transaction=False)
    for key, _, shared in places:
        for name in keys.priority_lists(key):
            if shared:
                pipe.lrange(name, -SAMPLE, -1)
            else:
                pipe.llen(name)
    counts = map(_count, pipe.execute(raise_on_error=False))
    found = []
    for key, missing, _ in places:
        if count := sum(itertools.islice(counts, len(keys.priority_lists(key)))):
            found.append(Misplaced(key=key, messages=count, advice=_advice(missing)))
    return found


def _count(answer: Any) -> int:
    """How many messages for headrace a list has, from its length or its oldest messages; 0 for an error."""
    if isinstance(answer, list):
        return sum(map(_is_ours, answer))
    return answer if isinstance(answer, int) else 0


def _is_ours(message: str | bytes) -> bool:
    text = message if isinstance(message, str) else message.decode(errors="replace")
    return any(name in text for name in _TASKS)


def _advice(missing: str) -> str:
    return (
        f"no worker reads this list: {missing} in the program that sends them (broker_transport_options="
        f"{{'global_keyprefix': '{keys.PREFIX}'}}, queue='{keys.queue('<model>')}')"
    )
