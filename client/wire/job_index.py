"""The index of jobs: a list for each owner, so that jobs can be found without their ids.

A job's id protects its result, so whoever may submit must not be able to read the ids of others. Clients only push
entries to an inbox, from which their Redis user may not read (config/redis-users.acl). Workers, and programs that may
list jobs, move them into the lists. An entry has the id, the model and the time; states are read from the records of
the jobs.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator, Mapping
from contextvars import ContextVar
from typing import Any, cast

import redis

from headrace.client.wire import keys

#: Seconds between two times that a process bounds the inbox.
BOUND_S = 10.0
#: Entries that are moved in one request: a script holds up all other requests.
DRAIN_JOBS = 1_000

#: KEYS: the inbox, the set of owners. ARGV: how the names of lists begin, the most entries to move, the lifetime of a
#: list, the most entries of a list, and the most owners. Moves the oldest entries into the lists of their owners.
#: Returns how many. Anybody may have written an entry: one that cannot be read is dropped.
DRAIN = """
local entries = redis.call('RPOP', KEYS[1], ARGV[2]) or {}
local lists = {}
for _, entry in ipairs(entries) do
    local owner, at, member = string.match(entry, '^([%w-]+) ([%d.]+) (%S+ %S+)$')
    if owner and #entry < 512 and tonumber(at) and redis.pcall('ZADD', ARGV[1] .. owner, at, member) == 1 then
        lists[owner] = math.max(lists[owner] or 0, tonumber(at))
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

    def add(self, pipe: Any, jobs: Mapping[str, str], now: float) -> None:
        """Add the commands that list jobs under the owner of this context to a pipeline.

        Args:
            pipe: of redis-py.
            jobs: the models of the jobs by id, in the order of their submission, at least one.
            now: Unix time in seconds by Redis' clock.
        """
        owner, at_us = _owner.get() or keys.NO_OWNER, int(now * 1e6)
        # A microsecond apart, so that jobs that are submitted together have an order.
        times = (f"{us // 10**6}.{us % 10**6:06}" for us in range(at_us, at_us + len(jobs)))
        pipe.lpush(
            keys.submitted(), *(f"{owner} {at} {member(*job)}" for at, job in zip(times, jobs.items(), strict=True))
        )
        pipe.expire(keys.submitted(), keys.UNFINISHED_TTL_S)
        if time.monotonic() >= self._bound_at:
            self._bound_at = time.monotonic() + BOUND_S
            pipe.ltrim(keys.submitted(), 0, keys.LISTED_JOBS - 1)


def drain(connection: redis.Redis) -> bool:
    """Move entries from the inbox into the lists. Returns whether there may be more of them.

    Raises:
        redis.RedisError: Redis does not answer, or the user lacks a right.
    """
    begin = keys.jobs("").removesuffix(keys.NO_OWNER)
    limits = [DRAIN_JOBS, keys.UNFINISHED_TTL_S, keys.LISTED_JOBS, keys.LISTED_OWNERS]
    moved = connection.eval(DRAIN, 2, keys.submitted(), keys.owners(), begin, *map(str, limits))
    return int(cast("int", moved)) >= DRAIN_JOBS


def member(job_id: str, model: str) -> str:
    """The entry of a job in the list of its owner."""
    return f"{job_id} {model}"
