"""Redis' replies to many commands, without holding up the event loop."""

from __future__ import annotations

import asyncio
from typing import Any

import redis.asyncio

from headrace.client.jobs.presence import Command
from headrace.client.wire.results import parse_outcome

#: Commands in one round trip to Redis: their replies hold up the event loop for about 10 ms.
COMMANDS_AT_ONCE = 256
#: A longer result record is parsed in a thread: it would hold up the event loop.
LARGE_RECORD = 262_144


async def send(connection: redis.asyncio.Redis, commands: list[Command]) -> list[Any]:
    """The replies to commands, or the exceptions. They are sent in parts, so that others run in between."""
    replies: list[Any] = []
    for start in range(0, len(commands), COMMANDS_AT_ONCE):
        pipe = connection.pipeline(transaction=False)
        for command in commands[start : start + COMMANDS_AT_ONCE]:
            pipe.execute_command(*command)
        replies += await pipe.execute(raise_on_error=False)
    return replies


async def parse_large(reply: Any) -> Any:
    """A reply of Redis with large result records replaced by their outcomes."""
    if not isinstance(reply, list):
        return reply
    large = [isinstance(record, str) and len(record) > LARGE_RECORD for record in reply]
    return [
        await asyncio.to_thread(parse_outcome, record) if is_large else record
        for record, is_large in zip(reply, large, strict=True)
    ]
