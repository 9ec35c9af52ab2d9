"""Lists of jobs, read from the index and the jobs' records, in pages."""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, cast

import redis

from headrace.client.jobs.records import read_field
from headrace.client.wire import keys
from headrace.client.wire.clock import RedisClock
from headrace.client.wire.errors import InvalidRequest
from headrace.client.wire.job_index import drain, member
from headrace.client.wire.redis import redis_errors
from headrace.client.wire.requests import is_job_id
from headrace.client.wire.results import RECORD_START, STATES, State, has_ended, parse_state, record_state
from headrace.client.wire.values import show

#: Jobs of a page, by default.
PAGE_JOBS = 100
#: Entries that are read at once to find jobs that match, and the most that one page reads.
READ_JOBS, SCAN_JOBS = 1_000, 10_000
#: Results that one EXISTS asks about.
EXISTS_KEYS = 250
NEEDED_RIGHTS = "lists of jobs need the rights of headrace-operator or headrace-worker in config/redis-users.acl"
#: Characters of `JobPage.after`, which may come from outside.
MAX_CURSOR = 400
_OPEN = ("queued", "running")


class JobInfo(NamedTuple):
    """A job in a list.

    Attributes:
        id: the job id.
        model: the served name of its model.
        state: as `Job.status` returns it.
        submitted_at: Unix time in seconds by Redis' clock.
        ended_at: Unix time in seconds; None before the end, and for jobs of workers of earlier versions.
        owner: the name of the API key that it was submitted with; "" without one.
    """

    id: str
    model: str
    state: State
    submitted_at: float
    ended_at: float | None
    owner: str


class JobPage(NamedTuple):
    """A part of a list, the newest job first.

    Attributes:
        jobs: the jobs. There may be fewer than asked for, or none, although others follow.
        after: pass it on to get the next page; "" if this is the last one.
        now: Unix time in seconds by Redis' clock.
    """

    jobs: list[JobInfo]
    after: str
    now: float


@dataclass(frozen=True, kw_only=True)
class JobFilter:
    """Which jobs a list has. All conditions must be true.

    Attributes:
        state: only jobs in this state.
        model: only jobs of this model.
        older_than: only jobs that were submitted more than so many seconds ago.
        newer_than: only jobs that were submitted less than so many seconds ago.
        search: only jobs whose id, or whose tag on the status page, contains this text.

    Raises:
        InvalidRequest: a condition cannot be met by any job.
    """

    state: str | None = None
    model: str | None = None
    older_than: float | None = None
    newer_than: float | None = None
    search: str = ""

    def __post_init__(self) -> None:
        if self.state is not None and self.state not in STATES:
            raise InvalidRequest("state", show(self.state), f"one of {', '.join(STATES)}")
        for name in ("older_than", "newer_than"):
            value = getattr(self, name)
            if value is not None and (isinstance(value, bool) or not isinstance(value, (int, float)) or not value >= 0):
                raise InvalidRequest(name, show(value), "a number of seconds from 0")
        if self.older_than is not None and self.newer_than is not None and self.older_than >= self.newer_than:
            expected = f"more seconds than older_than, which is {self.older_than:g}"
            raise InvalidRequest("newer_than", show(self.newer_than), expected)

    @property
    def is_selective(self) -> bool:
        """Whether jobs may be left out."""
        return bool(self.state or self.model or self.search)

    def may_take(self, job_id: str, model: str) -> bool:
        """Whether a job with this id and model may match."""
        if self.model is not None and self.model != model:
            return False
        return not self.search or self.search in job_id or self.search in keys.tag(job_id)


class _Entry(NamedTuple):
    """An entry of the index, in the order of lists: by time, then by id and model."""

    at: float
    member: str
    owner: str = ""

    @property
    def id(self) -> str:
        return self.member.partition(" ")[0]

    @property
    def model(self) -> str:
        return self.member.partition(" ")[2]

    @property
    def cursor(self) -> str:
        return f"{self.at!r}~{self.id}~{self.model}"


ALL_JOBS = JobFilter()


class JobLister:
    """Lists the jobs of one Redis. All methods raise RedisUnreachable and RedisRefused.

    Args:
        connection: to the Redis at `url`.
    """

    def __init__(self, url: str, connection: redis.Redis) -> None:
        self._url, self._redis, self._clock = url, connection, RedisClock()

    def page(
        self, wanted: JobFilter = ALL_JOBS, *, owner: str | None = None, limit: int = PAGE_JOBS, after: str = ""
    ) -> JobPage:
        """One page of a list.

        Args:
            wanted: which jobs.
            owner: whose jobs; None for those of all owners.
            limit: the most jobs.
            after: from the page before; "" for the first page.

        Raises:
            InvalidRequest: `after` is not from a page, or `limit` is not a positive number.
        """
        if type(limit) is not int or limit < 1:
            raise InvalidRequest("limit", show(limit), "a whole number from 1")
        last = _parse_cursor(after) if after else None
        with self._errors():
            self._clock.update(self._redis)
            while not after and drain(self._redis):
                pass
            now, found, scanned = self._clock.now(), list[tuple[JobInfo, _Entry]](), 0
            owners = self._owners() if owner is None else [owner]
            size, is_end = (READ_JOBS if wanted.is_selective else min(limit, READ_JOBS)), False
            while not is_end and len(found) < limit and scanned < max(SCAN_JOBS, limit):
                entries, is_end = self._entries(owners, wanted, now, last, size)
                if wanted.is_selective:
                    likely = [entry for entry in entries if wanted.may_take(entry.id, entry.model)]
                    found += [pair for pair in self._read(likely) if wanted.state in (None, pair[0].state)]
                else:
                    found += self._read(entries)
                last, scanned = (entries[-1] if entries else last), scanned + len(entries)
        if len(found) > limit:
            last, is_end = found[limit - 1][1], False
        return JobPage([job for job, _ in found[:limit]], "" if is_end or last is None else last.cursor, now)

    def all(
        self, wanted: JobFilter = ALL_JOBS, *, owner: str | None = None, page_jobs: int = READ_JOBS
    ) -> Iterator[JobInfo]:
        """Yield all jobs of a list, the newest first. Reads `page_jobs` of them at a time."""
        after = ""
        while True:
            page = self.page(wanted, owner=owner, limit=page_jobs, after=after)
            yield from page.jobs
            if not (after := page.after):
                return

    def find(self, job_id: str, owner: str | None = None) -> JobInfo | None:
        """A job by its id.

        Args:
            job_id: of the job.
            owner: whose job it must be; None for anybody's.

        Returns:
            None if there is none, or it belongs to another owner, or the index does not have it.
        """
        if not is_job_id(job_id):
            return None
        with self._errors():
            while drain(self._redis):
                pass
            name = member(job_id, cast("str | None", self._redis.hget(keys.job(job_id), "model")) or "")
            owners = self._owners() if owner is None else [owner]
            pipe = self._redis.pipeline(transaction=False)
            for each in owners:
                pipe.zscore(keys.jobs(each), name)
            times = zip(owners, pipe.execute(), strict=True)
            entries = [_Entry(at, name, each) for each, at in times if at is not None]
            return next((job for job, _ in self._read(entries)), None)

    def counts(self, owner: str | None = None, newest: int = READ_JOBS) -> dict[str, int]:
        """How many of the newest jobs, of one owner or all, are in each state."""
        return dict(Counter(job.state for job in self.page(owner=owner, limit=newest).jobs))

    @contextlib.contextmanager
    def _errors(self) -> Iterator[None]:
        with redis_errors(self._url):
            try:
                yield
            except redis.exceptions.NoPermissionError as error:
                raise redis.ResponseError(f"{error}; {NEEDED_RIGHTS}") from error

    def _owners(self) -> list[str]:
        names = cast("list[str]", self._redis.zrange(keys.owners(), 0, -1))
        return ["" if name == keys.NO_OWNER else name for name in names]

    def _entries(
        self, owners: Sequence[str], wanted: JobFilter, now: float, last: _Entry | None, size: int
    ) -> tuple[list[_Entry], bool]:
        """The next entries after `last`, in the order of the list, and whether there are no more after them."""
        high = float("inf") if wanted.older_than is None else now - wanted.older_than
        low = float("-inf") if wanted.newer_than is None else now - wanted.newer_than
        if last is not None:
            high = min(high, last.at)
        entries: list[_Entry] = []
        complete_to: _Entry | None = None  # of an owner with more entries, nothing older than this was read
        for owner in owners:
            own, is_end = self._entries_of(owner, high, low, last, size)
            entries += own
            if not is_end and own:
                complete_to = max(own[-1], complete_to or own[-1], key=_order)
        entries.sort(key=_order, reverse=True)
        if complete_to is not None:
            entries = [entry for entry in entries if _order(entry) >= _order(complete_to)]
        return entries[:size], complete_to is None and len(entries) <= size

    def _entries_of(
        self, owner: str, high: float, low: float, last: _Entry | None, size: int
    ) -> tuple[list[_Entry], bool]:
        """The next entries of one owner, at least one unless there are none, and whether these are all."""
        offset = 0
        while True:
            reply: Any = self._redis.zrange(
                keys.jobs(owner),
                cast("Any", _bound(high)),
                cast("Any", _bound(low)),
                desc=True,
                byscore=True,
                offset=offset,
                num=size + 1,
                withscores=True,
            )
            found = [_Entry(at, member, owner) for member, at in reply]
            if last is not None:  # it is among the first, with those of the same time before it
                found = [entry for entry in found if entry.at < last.at or _order(entry) < _order(last)]
            if found or len(reply) <= size:
                return found, len(reply) <= size
            offset += size + 1

    def _read(self, entries: Sequence[_Entry]) -> Iterator[tuple[JobInfo, _Entry]]:
        """The jobs of entries. Jobs that have expired are left out, and removed from the index."""
        job_ids = [entry.id for entry in entries]
        ends = [parse_state(text) for text in read_field(self._redis, list(map(keys.job, job_ids)), "state")]
        ended = self._ended_states([j for j, (state, _) in zip(job_ids, ends, strict=True) if state in _OPEN])
        gone: list[_Entry] = []
        for entry, job_id, (said, at) in zip(entries, job_ids, ends, strict=True):
            if state := ended.get(job_id, said):
                yield JobInfo(job_id, entry.model, state, entry.at, at, entry.owner), entry
            else:
                gone.append(entry)
        if gone:
            self._remove(gone)

    def _ended_states(self, job_ids: Sequence[str]) -> dict[str, State]:
        """The states of those of the jobs that have a result, although their records do not say that they ended.

        The workers of earlier versions did not write it, and neither does Celery for a task that it revokes.
        """
        parts = [job_ids[start : start + EXISTS_KEYS] for start in range(0, len(job_ids), EXISTS_KEYS)]
        pipe = self._redis.pipeline(transaction=False)
        for part in parts:
            pipe.exists(*map(keys.result, part))
        some = [job_id for part, count in zip(parts, pipe.execute(), strict=True) if count for job_id in part]
        for job_id in some:
            pipe.getrange(keys.result(job_id), 0, RECORD_START - 1)
        begins = dict(zip(some, pipe.execute(raise_on_error=False), strict=True))
        states = dict[str, State]()
        for job_id, begin in begins.items():
            if not isinstance(begin, str) or not begin:
                continue
            record = begin
            if record_state(begin) != "succeeded":  # an error is short, and only the whole record says which one
                record = cast("str | None", self._redis.get(keys.result(job_id))) or ""
            if record == begin or has_ended(record):
                states[job_id] = record_state(record)
        return states

    def _remove(self, entries: Sequence[_Entry]) -> None:
        pipe = self._redis.pipeline(transaction=False)
        for entry in entries:
            pipe.zrem(keys.jobs(entry.owner), entry.member)
        with contextlib.suppress(redis.ResponseError):  # a user who may only read
            pipe.execute()


def _order(entry: _Entry) -> tuple[float, str]:
    return entry.at, entry.member


def _bound(at: float) -> str:
    return {float("inf"): "+inf", float("-inf"): "-inf"}.get(at) or repr(at)


def _parse_cursor(text: str) -> _Entry:
    parts = text.split("~") if len(text) < MAX_CURSOR else []
    with contextlib.suppress(ValueError):
        at, job_id, model = parts
        if is_job_id(job_id):
            return _Entry(float(at), member(job_id, model))
    raise InvalidRequest("after", show(text), "the value that the page before gave")
