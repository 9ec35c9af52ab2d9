"""The index of jobs: a list for each owner, so that jobs can be found without their ids.

A job's id protects its result, so whoever may submit must not be able to read the ids of others. Clients only push
entries to an inbox, from which their Redis user may not read (config/redis-users.acl). Workers, and programs that may
list jobs, move them into the lists. An entry of the inbox has the jobs of one message; one of a list has the id, the
model and the time of a job. States are read from the records of the jobs.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator, Sequence
from contextvars import ContextVar
from typing import Any, cast

import redis

from headrace.client.wire import keys

#: Seconds between two times that a process bounds the inbox.
BOUND_S = 10.0
#: Entries that are moved in one request: a script holds up all other requests.
DRAIN_ENTRIES = 250
#: The most jobs of one entry, and the most bytes of one that is read.
ENTRY_JOBS, ENTRY_BYTES = 64, 10_000

#: KEYS: the inbox, the set of owners. ARGV: how the names of lists begin, the most entries to move, the lifetime of a
#: list, the most jobs of a list, the most owners, and the most bytes of an entry. Moves the oldest entries into the
#: lists of their owners; the jobs of an entry are a microsecond apart, so that they have an order. Returns the number
#: of entries. Anybody may have written them: what cannot be read is dropped.
DRAIN = """
local entries = redis.call('RPOP', KEYS[1], ARGV[2]) or {}
local lists = {}
for _, entry in ipairs(entries) do
    local owner, at, model, ids = string.match(entry, '^([%w-]+) (%d+) (%S+) (.+)$')
    if owner and #at < 17 and #entry <= tonumber(ARGV[6]) then
        local us, list = tonumber(at), ARGV[1] .. owner
        for id in string.gmatch(ids, '%S+') do
            local score = string.format('%d.%06d', math.floor(us / 1000000), us % 1000000)
            us = us + 1
            if type(redis.pcall('ZADD', list, score, id .. ' ' .. model)) == 'number' then
                lists[owner] = score
            end
        end
    end
end
for owner, at in pairs(lists) do
    redis.call('ZREMRANGEBYRANK', ARGV[1] .. owner, 0, -ARGV[4] - 1)
    redis.call('EXPIRE', ARGV[1] .. owner, ARGV[3])
    redis.call('ZADD', KEYS[2], at, owner)
    redis.call('ZREMRANGEBYRANK', KEYS[2], 0, -ARGV[5] - 1)
    redis.call('EXPIRE', KEYS[2], ARGV[3])
end
return #entries
"""

_owner: ContextVar[str] = ContextVar("headrace_owner", default="")


@contextlib.contextmanager
def owned_by(owner: str) -> Iterator[None]:
    """Jobs that are submitted in the block belong to this owner, the name of an API key."""
    token = _owner.set(owner)
    try:
        yield
    finally:
        _owner.reset(token)


class JobIndex:
    """Writes entries. One object for each process is enough; it may be used from any thread."""

    def __init__(self) -> None:
        self._bound_at = 0.0

    def add(self, pipe: Any, model: str, job_ids: Sequence[str], now: float) -> None:
        """Add the commands that list jobs under the owner of this context to a pipeline.

        Args:
            pipe: of redis-py.
            model: the model of the jobs.
            job_ids: in the order of their submission, 1 to ENTRY_JOBS of them.
            now: Unix time in seconds by Redis' clock.
        """
        entry = f"{_owner.get() or keys.NO_OWNER} {int(now * 1e6)} {model} {' '.join(job_ids)}"
        pipe.lpush(keys.submitted(), entry)  # one for all: each argument of a command takes time
        pipe.expire(keys.submitted(), keys.UNFINISHED_TTL_S)
        if time.monotonic() >= self._bound_at:
            self._bound_at = time.monotonic() + BOUND_S
            pipe.ltrim(keys.submitted(), 0, keys.SUBMITTED_ENTRIES - 1)


def drain(connection: redis.Redis) -> bool:
    """Move entries from the inbox into the lists. Returns whether there may be more of them.

    Raises:
        redis.RedisError: Redis does not answer, or the user lacks a right.
    """
    begin = keys.jobs("").removesuffix(keys.NO_OWNER)
    limits = [DRAIN_ENTRIES, keys.UNFINISHED_TTL_S, keys.LISTED_JOBS, keys.LISTED_OWNERS, ENTRY_BYTES]
    moved = connection.eval(DRAIN, 2, keys.submitted(), keys.owners(), begin, *map(str, limits))
    return int(cast("int", moved)) >= DRAIN_ENTRIES


def member(job_id: str, model: str) -> str:
    """The entry of a job in the list of its owner."""
    return f"{job_id} {model}"
