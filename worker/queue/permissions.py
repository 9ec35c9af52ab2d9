"""Checks that the worker's Redis user has the permissions that a worker needs.

Retrying does not help against a missing permission. They are checked before the worker takes its first message; if
Redis denies one later, the process ends, and its jobs stay in the queue or return to it.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import redis

from headrace.client.wire import keys
from headrace.client.wire.errors import HeadraceError

#: What Redis 6.2 and 7 answer for a command inside a script; redis-py does not raise NoPermissionError for these.
_IN_SCRIPTS = ("user executing the script can't", "ACL failure in script")

#: How many commands an error names; it counts the others.
NAMED = 4


class MissingPermissions(HeadraceError):
    """Raised when the Redis user lacks permissions that a worker needs.

    Attributes:
        commands: the commands that Redis denies, each with its key.
    """

    def __init__(self, commands: list[str]) -> None:
        super().__init__(commands)
        self.commands = commands

    def __str__(self) -> str:
        more = f" and {len(self.commands) - NAMED} more" if len(self.commands) > NAMED else ""
        return (
            f"the user in HEADRACE_REDIS_URL has no right to {', '.join(self.commands[:NAMED])}{more}; give it the "
            "rights of headrace-worker in config/redis-users.acl. Jobs wait in the queue until then"
        )


def is_forbidden(error: BaseException) -> bool:
    """Whether Redis denied a command because the user lacks a permission."""
    if isinstance(error, redis.exceptions.NoPermissionError):
        return True
    return isinstance(error, redis.ResponseError) and any(words in str(error) for words in _IN_SCRIPTS)


def check_permissions(connection: redis.Redis, model_names: Iterable[str]) -> None:
    """Check that the user may run every command that a worker runs, on the keys it uses. Nothing is executed.

    Redis checks permissions when it queues the commands of a transaction, and this transaction is never executed.

    Raises:
        MissingPermissions: a permission is missing.
        redis.RedisError: Redis does not answer.
    """
    transaction = connection.connection_pool.get_connection()
    try:
        if missing := _denied(transaction, [("MULTI",)]) or _denied(transaction, required_commands(model_names)):
            raise MissingPermissions(missing)
    finally:
        transaction.disconnect()  # type: ignore[no-untyped-call]  # this discards the transaction
        connection.connection_pool.release(transaction)


def _denied(connection: Any, commands: list[tuple[str, ...]]) -> list[str]:
    """The commands for which the user lacks a permission, each with its key."""
    connection.send_packed_command(connection.pack_commands(commands))
    denied = []
    for command in commands:
        try:
            connection.read_response()
        except redis.ResponseError as error:  # other errors, such as a full Redis, say nothing about permissions
            if is_forbidden(error):
                denied.append(" ".join(_with_key(command)))
    return denied


def _with_key(command: tuple[str, ...]) -> tuple[str, ...]:
    """A command's name and its key."""
    if command[0] == "EVALSHA":
        return command[0], command[3]
    return command[:2]


def required_commands(model_names: Iterable[str]) -> list[tuple[str, ...]]:
    """The commands that a worker runs, each once for each kind of key that it uses."""
    queues = [command for name in model_names for command in _queue_commands(name)]
    return [*queues, *_message_commands(), *_job_commands(), *_worker_commands()]


def _queue_commands(model_name: str) -> list[tuple[str, ...]]:
    hint = keys.hint(model_name)
    commands: list[tuple[str, ...]] = [("SCRIPT", "LOAD", "return 1")]
    for name in keys.queue_lists(model_name):
        commands += [("EVALSHA", "0" * 40, "1", name), ("RPOP", name), ("LRANGE", name, "-1", "-1")]
        commands += [("EXISTS", name), ("LLEN", name), ("LPUSH", name, "x"), ("RPUSH", name, "x")]
    return [*commands, ("BRPOP", hint, "1"), ("DEL", hint), ("LPUSH", hint, "1"), ("EXPIRE", hint, "1")]


def _message_commands() -> list[tuple[str, ...]]:
    unacked, index, mutex = keys.unacked(), keys.unacked_index(), f"{keys.PREFIX}unacked_mutex"
    binding = f"{keys.PREFIX}_kombu.binding.headrace"
    return [
        *(("HSET", unacked, "t", "x"), ("HGET", unacked, "t"), ("HDEL", unacked, "t")),
        *(
            ("ZADD", index, "1", "t"),
            ("ZREM", index, "t"),
            ("ZRANGE", index, "0", "1"),
            ("ZSCORE", index, "t"),
            ("WATCH", unacked),
        ),
        *(("SET", mutex, "x"), ("EVALSHA", "0" * 40, "1", mutex)),
        *(("SADD", binding, "x"), ("SMEMBERS", binding)),
        *(("LPUSH", keys.dead(), "x"), ("LTRIM", keys.dead(), "0", "1"), ("EXPIRE", keys.dead(), "1")),
    ]


def _job_commands() -> list[tuple[str, ...]]:
    job, result, cancel, tensors = (key("x") for key in (keys.job, keys.result, keys.cancel, keys.checkpoint))
    events = keys.events("x")
    return [
        *(
            ("HSETNX", job, "state", "x"),
            ("HMGET", job, "state"),
            ("HINCRBY", job, "attempts", "1"),
            ("HSET", job, "state", "x"),
            ("DEL", job),
        ),
        *(("EXPIRE", job, "1"), ("MGET", cancel), ("DEL", cancel), ("MGET", result), ("GET", result)),
        *(("SET", result, "x"), ("SETEX", result, "1", "x"), ("PUBLISH", result, "x")),
        *(("DEL", tensors), ("HSET", tensors, "x", "x"), ("EXPIRE", tensors, "1")),
        *(("EVALSHA", "0" * 40, "1", events), ("XADD", events, "*", "x", "x"), ("EXPIRE", events, "1")),
    ]


def _worker_commands() -> list[tuple[str, ...]]:
    name, names, models = keys.worker("x"), keys.workers(), keys.models()
    inbox, owners, jobs = keys.submitted(), keys.owners(), keys.jobs("")
    return [
        *(
            ("HSET", name, "x", "x"),
            ("EXPIRE", name, "1"),
            ("TTL", name),
            ("HMGET", name, "x"),
            ("DEL", name),
            ("ZADD", names, "1", "x"),
        ),
        *(("ZREMRANGEBYSCORE", names, "0", "1"), ("EXPIRE", names, "1"), ("ZREM", names, "x")),
        *(("ZADD", models, "1", "x"), ("ZREMRANGEBYSCORE", models, "0", "1"), ("EXPIRE", models, "1")),
        *(("LPUSH", inbox, "x"), ("RPOP", inbox), ("EVALSHA", "0" * 40, "1", owners), ("ZRANGE", owners, "0", "1")),
        *(("ZADD", jobs, "1", "x"), ("ZREM", jobs, "x"), ("ZREMRANGEBYRANK", jobs, "0", "0"), ("ZCARD", jobs)),
        *(("PUBLISH", f"{keys.PREFIX}/0.celeryev/worker.heartbeat", "x"),),
    ]
