"""Lists of jobs, read from the index and the jobs' records, in pages."""

from __future__ import annotations

import contextlib
import math
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple, cast

import redis

from headrace.client.jobs.index_reader import Entry, IndexReader, Span
from headrace.client.wire import keys
from headrace.client.wire.clock import RedisClock
from headrace.client.wire.errors import InvalidRequest
from headrace.client.wire.job_index import member
from headrace.client.wire.redis import redis_errors
from headrace.client.wire.requests import is_job_id
from headrace.client.wire.results import STATES, State, has_ended, parse_state, record_state
from headrace.client.wire.values import show

#: Jobs of a page, by default.
PAGE_JOBS = 100
#: Entries that are read at once to find jobs that match, and the most that one page reads.
READ_JOBS, SCAN_JOBS = 1_000, 10_000
NEEDED_RIGHTS = "lists of jobs need the rights of headrace-operator or headrace-worker in config/redis-users.acl"
#: Characters of `JobPage.after`, which may come from outside.
MAX_CURSOR = 400


class JobInfo(NamedTuple):
    """A job in a list.

    Attributes:
        id: the job id.
        model: the served name of its model.
        state: as `Job.status` returns it.
        submitted_at: Unix time in seconds by Redis' clock.
        ended_at: Unix time in seconds; None before the end, and for jobs of workers of earlier versions.
        owner: the name of the API key that it was submitted with; "" without one.
        adapter: the LoRA adapter that it names; "" if it names none, and for jobs sent as Celery signatures.
    """

    id: str
    model: str
    state: State
    submitted_at: float
    ended_at: float | None
    owner: str
    adapter: str = ""


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

    def span(self, now: float) -> Span:
        """The entries that may match. `now` is the Unix time in seconds."""
        earliest = float("-inf") if self.newer_than is None else now - self.newer_than
        latest = float("inf") if self.older_than is None else now - self.older_than
        return Span(earliest, latest, self.model or "")

    def may_take(self, job_id: str, model: str) -> bool:
        """Whether a job with this id and model may match."""
        if self.model is not None and self.model != model:
            return False
        return not self.search or self.search in job_id or self.search in keys.tag(job_id)


ALL_JOBS = JobFilter()


class JobLister:
    """Lists the jobs of one Redis. All methods raise RedisUnreachable and RedisRefused.

    Args:
        connection: to the Redis at `url`.
    """

    def __init__(self, url: str, connection: redis.Redis) -> None:
        self._url, self._redis, self._clock = url, connection, RedisClock()
        self._index = IndexReader(connection)

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
            if not after:
                self._index.update()
            now, found, scanned = self._clock.now(), list[tuple[JobInfo, Entry]](), 0
            span, owners = wanted.span(now), self._index.owners() if owner is None else [owner]
            size, is_end = (READ_JOBS if wanted.is_selective else min(limit, READ_JOBS)), False
            while not is_end and len(found) < limit and scanned < max(SCAN_JOBS, limit):
                entries, is_end = self._index.entries(owners, span, last, size)
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
            self._index.update()
            entry = self._index.find(job_id, self._index.owners() if owner is None else [owner])
            return None if entry is None else next((job for job, _ in self._read([entry])), None)

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

    def _read(self, entries: Sequence[Entry]) -> Iterator[tuple[JobInfo, Entry]]:
        """The jobs of entries. Jobs that have expired are left out, and removed from the index."""
        gone: list[Entry] = []
        for entry in entries:
            state, at = parse_state(entry.said)
            if state is None and entry.said.startswith("{"):
                state = self._ended_state(entry)
            if state is not None:
                job_id, _, model = entry.member.partition(" ")
                yield JobInfo(job_id, model, state, entry.at, at, entry.owner, entry.adapter), entry
            elif not entry.said:
                gone.append(entry)
        if gone:
            self._index.remove(gone)

    def _ended_state(self, entry: Entry) -> State | None:
        """The state of a job with a result whose record does not say that it has ended."""
        if record_state(entry.said) == "succeeded":
            return "succeeded"
        # An error is short, and only the whole record says which one.
        record = cast("str | None", self._redis.get(keys.result(entry.id)))
        return record_state(record) if record is not None and has_ended(record) else "running"


def _parse_cursor(text: str) -> Entry:
    parts = text.split("~") if len(text) < MAX_CURSOR else []
    with contextlib.suppress(ValueError):
        at, job_id, model = parts
        if is_job_id(job_id) and math.isfinite(float(at)):
            return Entry(float(at), member(job_id, model))
    raise InvalidRequest("after", show(text), "the value that the page before gave")
