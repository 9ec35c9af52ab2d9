"""Whether the worker's Redis user may do all that a worker does, and what is said where it may not.

A right that is missing does not come by waiting. So it is asked for before anything is taken from the queue, and where
Redis refuses for want of one later, the process ends: jobs stay in the queue, or go back there.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import redis

from headrace.client.wire import keys
from headrace.client.wire.errors import HeadraceError

#: How Redis 6.2 and 7 say it of a command in a script, where it is no NoPermissionError.
_IN_SCRIPTS = ("user executing the script can't", "ACL failure in script")

#: Commands that an error names; the others are counted.
NAMED = 4


class RightsMissing(HeadraceError):
    """Raised when the Redis user may not do what a worker does.

    Attributes:
        commands: those that Redis refuses, each with its key.
    """

    def __init__(self, commands: list[str]) -> None:
        super().__init__(commands)
        self.commands = commands

    def __str__(self) -> str:
        more = f" and {len(self.commands) - NAMED} more" if len(self.commands) > NAMED else ""
        return (
            f"the user in HEADRACE_REDIS_URL has no right to {', '.join(self.commands[:NAMED])}{more}; give it the "
            "rights of headrace-worker in config/redis-users.acl. Jobs wait in the queue meanwhile"
        )


def is_forbidden(error: BaseException) -> bool:
    """Whether Redis refused because the user lacks a right."""
    if isinstance(error, redis.exceptions.NoPermissionError):
        return True
    return isinstance(error, redis.ResponseError) and any(words in str(error) for words in _IN_SCRIPTS)


def check_rights(connection: redis.Redis, model_names: Iterable[str]) -> None:
    """See whether the user may run what a worker runs, on the keys it runs it on. Nothing is carried out.

    Redis checks rights when it queues a command of a transaction, and this one is never executed.

    Raises:
        RightsMissing: it may not.
        redis.RedisError: Redis does not answer.
    """
    asked = connection.connection_pool.get_connection()
    try:
        if missing := _refused(asked, [("MULTI",)]) or _refused(asked, needed(model_names)):
            raise RightsMissing(missing)
    finally:
        asked.disconnect()  # type: ignore[no-untyped-call]  # the transaction goes with it
        connection.connection_pool.release(asked)


def _refused(connection: Any, commands: list[tuple[str, ...]]) -> list[str]:
    """The commands for which the user lacks a right, each with its key."""
    connection.send_packed_command(connection.pack_commands(commands))
    refused = []
    for command in commands:
        try:
            connection.read_response()
        except redis.ResponseError as error:  # full, loading and so on are no matter of rights
            if is_forbidden(error):
                refused.append(" ".join(_shown(command)))
    return refused


def _shown(command: tuple[str, ...]) -> tuple[str, ...]:
    """The command with its key, as one writes it."""
    if command[0] == "EVALSHA":
        return command[0], command[3]
    return command[:2]


def needed(model_names: Iterable[str]) -> list[tuple[str, ...]]:
    """What a worker runs, each command once for each kind of key it is run on."""
    queues = [command for name in model_names for command in _on_queue(name)]
    return [*queues, *_on_messages(), *_on_records(), *_on_itself()]


def _on_queue(model_name: str) -> list[tuple[str, ...]]:
    hint = keys.hint(model_name)
    commands: list[tuple[str, ...]] = [("SCRIPT", "LOAD", "return 1")]
    for name in keys.queue_lists(model_name):
        commands += [("EVALSHA", "0" * 40, "1", name), ("RPOP", name), ("LRANGE", name, "-1", "-1")]
        commands += [("EXISTS", name), ("LLEN", name), ("LPUSH", name, "x"), ("RPUSH", name, "x")]
    return [*commands, ("BRPOP", hint, "1"), ("DEL", hint), ("LPUSH", hint, "1"), ("EXPIRE", hint, "1")]


def _on_messages() -> list[tuple[str, ...]]:
    unacked, index, mutex = keys.unacked(), keys.unacked_index(), f"{keys.PREFIX}unacked_mutex"
    binding = f"{keys.PREFIX}_kombu.binding.headrace"
    return [
        *(("HSET", unacked, "t", "x"), ("HGET", unacked, "t"), ("HDEL", unacked, "t")),
        *(("ZADD", index, "1", "t"), ("ZREM", index, "t"), ("ZRANGE", index, "0", "1"), ("WATCH", unacked)),
        *(("SET", mutex, "x"), ("EVALSHA", "0" * 40, "1", mutex)),
        *(("SADD", binding, "x"), ("SMEMBERS", binding)),
        *(("LPUSH", keys.dead(), "x"), ("LTRIM", keys.dead(), "0", "1"), ("EXPIRE", keys.dead(), "1")),
    ]


def _on_records() -> list[tuple[str, ...]]:
    job, result, cancel, tensors = (of("x") for of in (keys.job, keys.result, keys.cancel, keys.checkpoint))
    events = keys.events("x")
    return [
        *(("HMGET", job, "state"), ("HINCRBY", job, "attempts", "1"), ("HSET", job, "state", "x"), ("DEL", job)),
        *(("EXPIRE", job, "1"), ("MGET", cancel), ("DEL", cancel), ("MGET", result), ("GET", result)),
        *(("SET", result, "x"), ("SETEX", result, "1", "x"), ("PUBLISH", result, "x")),
        *(("DEL", tensors), ("HSET", tensors, "x", "x"), ("EXPIRE", tensors, "1")),
        *(("EVALSHA", "0" * 40, "1", events), ("XADD", events, "*", "x", "x"), ("EXPIRE", events, "1")),
    ]


def _on_itself() -> list[tuple[str, ...]]:
    name, names, models = keys.worker("x"), keys.workers(), keys.models()
    return [
        *(("HSET", name, "x", "x"), ("EXPIRE", name, "1"), ("DEL", name), ("ZADD", names, "1", "x")),
        *(("ZREMRANGEBYSCORE", names, "0", "1"), ("EXPIRE", names, "1"), ("ZREM", names, "x")),
        *(("ZADD", models, "1", "x"), ("ZREMRANGEBYSCORE", models, "0", "1"), ("EXPIRE", models, "1")),
        *(("PUBLISH", f"{keys.PREFIX}/0.celeryev/worker.heartbeat", "x"),),
    ]
