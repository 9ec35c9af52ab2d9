"""Reads the entries of the index, with what the jobs' records say."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from typing import NamedTuple, cast

import redis

from headrace.client.wire import keys
from headrace.client.wire.adapters import is_adapter_name
from headrace.client.wire.job_index import drain, member
from headrace.client.wire.results import RECORD_START


class Entry(NamedTuple):
    """An entry of the index, in the order of lists: by time, then by id and model.

    `said` is the state in the job's record; or the beginning of its result, if there is one and the record does not say
    that the job has ended; or "" if there is neither. `adapter` is the LoRA adapter in the record, or "".
    """

    at: float
    member: str
    owner: str = ""
    said: str = ""
    adapter: str = ""

    @property
    def id(self) -> str:
        return self.member.partition(" ")[0]

    @property
    def model(self) -> str:
        return self.member.partition(" ")[2]

    @property
    def cursor(self) -> str:
        return f"{self.at!r}~{self.id}~{self.model}"


#: Entries that may have the same time.
SAME_TIME = 1_000

#: KEYS: the list of an owner. ARGV: the latest and the earliest time, how many entries to leave out and to read, the
#: only model or "", how the names of records and results begin, and how much of a result to read. Returns a line for
#: each entry: time, id and model, adapter, and what `Entry.said` has. A script, because a hundred thousand replies of a
#: pipeline take several times as long. The workers of earlier versions did not write into a record that its job has
#: ended, and neither does Celery for a task that it revokes: their results say it.
READ_ENTRIES = r"""
local latest, earliest, skip, most = ARGV[1], ARGV[2], ARGV[3], ARGV[4]
local entries = redis.call('ZRANGE', KEYS[1], latest, earliest, 'BYSCORE', 'REV', 'LIMIT', skip, most, 'WITHSCORES')
local lines = {}
for i = 1, #entries, 2 do
    local id, model = string.match(entries[i], '^(%S*) (.*)$')
    local said, adapter = false, false
    if id and (ARGV[5] == '' or ARGV[5] == model) then
        said = redis.pcall('HGET', ARGV[6] .. id, 'state')
        if type(said) ~= 'string' or not string.find(said, ' ', 1, true) then
            local result = redis.pcall('GETRANGE', ARGV[7] .. id, 0, ARGV[8] - 1)
            said = type(result) == 'string' and result ~= '' and result or said
        end
        adapter = redis.pcall('HGET', ARGV[6] .. id, 'adapter')
    end
    adapter = type(adapter) == 'string' and string.match(adapter, '^[%w._-]+$') or ''
    local text = entries[i] .. '\t' .. adapter .. '\t' .. (type(said) == 'string' and said or '')
    lines[#lines + 1] = entries[i + 1] .. '\t' .. string.gsub(text, '[\r\n]', ' ')
end
return table.concat(lines, '\n')
"""


class Span(NamedTuple):
    """Which entries to read: from when to when, in Unix seconds, and of which model, or "" for all."""

    earliest: float
    latest: float
    model: str = ""


class IndexReader:
    """Reads the index of one Redis. All methods raise redis.RedisError."""

    def __init__(self, connection: redis.Redis) -> None:
        self._redis = connection

    def update(self) -> None:
        """Move all jobs that were submitted so far into the lists of their owners."""
        while drain(self._redis):
            pass

    def owners(self) -> list[str]:
        """The owners whose jobs are listed."""
        names = cast("list[str]", self._redis.zrange(keys.owners(), 0, -1))
        return ["" if name == keys.NO_OWNER else name for name in names]

    def entries(self, owners: Sequence[str], span: Span, last: Entry | None, size: int) -> tuple[list[Entry], bool]:
        """The next entries after `last`, in the order of the list, and whether there are no more after them."""
        entries: list[Entry] = []
        complete_to: Entry | None = None  # of an owner with more entries, nothing older than this was read
        for owner in owners:
            own, is_end = self._entries_of(owner, span, last, size)
            entries += own
            if not is_end and own:
                complete_to = max(own[-1], complete_to or own[-1], key=_order)
        entries.sort(key=_order, reverse=True)
        if complete_to is not None:
            entries = [entry for entry in entries if _order(entry) >= _order(complete_to)]
        return entries[:size], complete_to is None and len(entries) <= size

    def _entries_of(self, owner: str, span: Span, last: Entry | None, size: int) -> tuple[list[Entry], bool]:
        """The next entries of one owner, at least one unless there are none, and whether these are all."""
        latest = span.latest if last is None else min(span.latest, last.at)
        offset = 0
        while True:
            limits = [_bound(latest), _bound(span.earliest), str(offset), str(size + 1), span.model]
            begins = [keys.job(""), keys.result(""), str(RECORD_START)]
            reply = cast("str", self._redis.eval(READ_ENTRIES, 1, keys.jobs(owner), *limits, *begins))
            lines = reply.split("\n") if reply else []
            found = [_parsed(line, owner) for line in lines]
            if last is not None:  # it is among the first, with those of the same time before it
                found = [entry for entry in found if entry.at < last.at or _order(entry) < _order(last)]
            if found or len(lines) <= size:
                return found, len(lines) <= size
            offset += size + 1

    def find(self, job_id: str, owners: Sequence[str]) -> Entry | None:
        """The entry of a job; None if it belongs to none of the owners."""
        name = member(job_id, cast("str | None", self._redis.hget(keys.job(job_id), "model")) or "")
        pipe = self._redis.pipeline(transaction=False)
        for owner in owners:
            pipe.zscore(keys.jobs(owner), name)
        for owner, at in zip(owners, pipe.execute(), strict=True):
            if at is not None:
                entries, _ = self._entries_of(owner, Span(at, at), None, SAME_TIME)
                return next((entry for entry in entries if entry.member == name), None)
        return None

    def remove(self, entries: Sequence[Entry]) -> None:
        """Remove entries of jobs that have expired. Does nothing if the user may only read."""
        pipe = self._redis.pipeline(transaction=False)
        for entry in entries:
            pipe.zrem(keys.jobs(entry.owner), entry.member)
        with contextlib.suppress(redis.ResponseError):
            pipe.execute()


def _order(entry: Entry) -> tuple[float, str]:
    return entry.at, entry.member


def _parsed(line: str, owner: str) -> Entry:
    at, name, adapter, said = line.split("\t", 3)
    return Entry(float(at), name, owner, said, adapter if is_adapter_name(adapter) else "")


def _bound(at: float) -> str:
    return {float("inf"): "+inf", float("-inf"): "-inf"}.get(at) or repr(at)
