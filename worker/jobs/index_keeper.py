"""Keeps the index of jobs: workers fill it with what clients submitted, and remove what has expired."""

from __future__ import annotations

import random
from collections.abc import Mapping
from typing import Any, cast

import redis

from headrace.client.wire import keys
from headrace.client.wire.job_index import ENTRY_JOBS, JobIndex, drain

#: So many entries are looked at in one request, to remove those of expired jobs, and the most requests of one call.
PRUNE_JOBS, PRUNE_REQUESTS = 1000, 10
#: The most requests of one call that move new jobs into the index.
FILL_REQUESTS = 20

#: KEYS: the set of owners. ARGV: how the names of lists, records and results begin, the number of entries to look at,
#: and where among the others to begin, from 0 to 1. Removes entries of jobs without a record and a result, and returns
#: how many.
PRUNE_INDEX = """
local removed, owners = 0, redis.call('ZRANGE', KEYS[1], 0, -1)
local most = math.max(10, math.floor(ARGV[4] / math.max(1, #owners)))
for _, owner in ipairs(owners) do
    local list = ARGV[1] .. owner
    local first = math.floor(math.max(0, redis.call('ZCARD', list) - most) * ARGV[5])
    for _, member in ipairs(redis.call('ZRANGE', list, first, first + most - 1)) do
        local id = string.match(member, '^[^ ]*')
        if redis.call('EXISTS', ARGV[2] .. id, ARGV[3] .. id) == 0 then
            removed = removed + redis.call('ZREM', list, member)
        end
    end
end
return removed
"""


class IndexKeeper:
    """Keeps the index of one Redis. All methods but `add` may raise redis.RedisError."""

    def __init__(self, connection: redis.Redis) -> None:
        self._redis, self._index = connection, JobIndex()

    def add(self, pipe: Any, models: Mapping[str, str], now: float) -> None:
        """Add the commands that list jobs without an owner to a pipeline.

        Args:
            pipe: of redis-py.
            models: the models of the jobs by id.
            now: Unix time in seconds by Redis' clock.
        """
        for model in dict.fromkeys(models.values()):
            job_ids = [job_id for job_id, own in models.items() if own == model]
            for start in range(0, len(job_ids), ENTRY_JOBS):
                self._index.add(pipe, model, job_ids[start : start + ENTRY_JOBS], now)

    def fill(self) -> None:
        """Move the jobs that clients have submitted into the lists of their owners, some thousands at a time."""
        for _ in range(FILL_REQUESTS):
            if not drain(self._redis):
                return

    def prune(self) -> bool:
        """Remove expired jobs from the index, some at a time. Returns whether there are likely to be more."""
        for _ in range(PRUNE_REQUESTS):
            if self._prune(0.0) < PRUNE_JOBS // 2:
                self._prune(random.random())  # noqa: S311  # not all jobs end in the order of their submission
                return False
        return True

    def _prune(self, first: float) -> int:
        begins = [keys.jobs("").removesuffix(keys.NO_OWNER), keys.job(""), keys.result("")]
        removed = self._redis.eval(PRUNE_INDEX, 1, keys.owners(), *begins, str(PRUNE_JOBS), str(first))
        return int(cast("int", removed))
