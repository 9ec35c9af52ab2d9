"""Reads messages: those in the queue of a model, and those that workers have.

The Redis user of clients (config/redis-users.acl) has no right to it, because messages contain prompts.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Iterator
from typing import Any, NamedTuple, cast

import redis

from headrace.client.wire import keys
from headrace.client.wire.celery import GROUP_TASK_NAME, TASK_NAME
from headrace.client.wire.requests import is_job_id

#: Messages that are read at once; one may have 2 MiB.
READ_MESSAGES = 32


class Message(NamedTuple):
    """A message with jobs.

    Attributes:
        place: the Redis list that has it; "" if a worker has it.
        text: as Redis has it.
        jobs: the requests by job id.
        is_followed: it is part of a canvas, or calls other tasks at its end.
    """

    place: str
    text: str
    jobs: dict[str, Any]
    is_followed: bool


def queued_messages(connection: redis.Redis, model: str) -> Iterator[Message]:
    """The readable messages in the queue of a model.

    New messages come at the beginning of a list, which is where this begins: one that is there all the time is found.
    A message may be yielded twice.

    Raises:
        redis.RedisError: Redis does not answer, or the user may not read the queue.
    """
    for name in keys.queue_lists(model):
        start = 0
        while texts := cast("list[str]", connection.lrange(name, start, start + READ_MESSAGES - 1)):
            start += len(texts)
            yield from filter(None, (read_message(text, name) for text in texts))


def delivered_messages(connection: redis.Redis) -> Iterator[Message]:
    """The readable messages that workers have and have not acknowledged, of all models.

    Raises:
        redis.RedisError: Redis does not answer, or the user may not read them.
    """
    for _, entry in connection.hscan_iter(keys.unacked(), count=READ_MESSAGES):
        yield from filter(None, [read_message(entry, "")])


def read_message(text: str, place: str) -> Message | None:
    """Parse a message in kombu's form of queued or of unacknowledged messages; None if it has no readable jobs."""
    try:
        raw = json.loads(text)
        raw = raw if place else raw[0]
        headers, task = raw["headers"], raw["headers"]["task"]
        arguments, named, follow = json.loads(base64.b64decode(raw["body"]))
        if task == GROUP_TASK_NAME:
            members = arguments[0] if arguments else named["jobs"]
            jobs = {member["id"]: member.get("request") for member in members if is_job_id(member["id"])}
        elif task == TASK_NAME and is_job_id(headers["id"]):
            jobs = {headers["id"]: arguments[0] if arguments else named.get("request")}
        else:
            return None
        return Message(place, text, jobs, any(follow.values()) or headers.get("group") is not None)
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
        return None
