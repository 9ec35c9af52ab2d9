"""Waiting for jobs: which commands to send to Redis next, and what the replies mean. Performs no I/O itself.

`JobReader` and `AsyncClient` send the commands of `PollState.request` in one round trip, pass the replies to `answer`,
and sleep for `rest_s`. One connection is enough for any number of jobs; jobs need no separate channels.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

import redis

from headrace.client.jobs.presence import Command, Presence
from headrace.client.wire import keys
from headrace.client.wire.errors import JobLost, UnknownJob
from headrace.client.wire.results import Outcome, parse_outcome

#: The pause between polls grows from the first to the last value: the end of a short job is noticed at once, and
#: a long job costs one request a second.
FIRST_POLL_S, LAST_POLL_S, POLL_GROWTH = 0.01, 1.0, 1.5
#: A client spends at most this share of its time on polling, as long as its pauses need not be longer than this.
POLL_SHARE, LONGEST_REST_S = 0.05, 0.1
#: Number of jobs that a request asks about at least, if so many are waited for.
MGET_KEYS = 250
#: Number of new jobs in one request. Each holds up an event loop for about 40 us.
NEW_JOBS = 250
#: Bytes of results in one reply, unless a single one is larger. Objects made of a result take about ten times its size.
READ_BYTES = 8 * 2**20
#: Entries of event streams in one reply: of all streams together, and of one at least and at most. The entries of the
#: largest job that is allowed have 200 KB; of a job that has ended the result has the rest.
READ_ENTRIES, FEWEST_ENTRIES, MOST_ENTRIES = 256, 4, 64
#: How many seconds a wait continues without an answer from Redis. A restart of Redis takes less.
PATIENCE_S = 60.0
#: How often in seconds a warning is repeated: that no worker serves a queue, or that Redis does not answer.
REMIND_S = 30.0


@dataclass
class Updates:
    """The contents of the replies to one request, by job id."""

    #: New entries of the event streams, in order.
    events: dict[str, list[str]] = field(default_factory=dict)
    outcomes: dict[str, Outcome] = field(default_factory=dict)
    #: Jobs that do not exist.
    unknown: list[str] = field(default_factory=list)
    #: Jobs that existed and that Redis has lost.
    lost: list[str] = field(default_factory=list)
    #: Jobs that were part of the request for the first time.
    known: list[str] = field(default_factory=list)

    def jobs(self) -> Iterable[str]:
        """The ids of all jobs in these updates."""
        return dict.fromkeys((*self.events, *self.outcomes, *self.unknown, *self.lost, *self.known))

    def take(self, other: Updates, job_id: str) -> None:
        """Copy the part about one job from other updates."""
        if job_id in other.events:
            self.events[job_id] = other.events[job_id]
        if job_id in other.outcomes:
            self.outcomes[job_id] = other.outcomes[job_id]
        if job_id in other.unknown:
            self.unknown.append(job_id)
        if job_id in other.lost:
            self.lost.append(job_id)

    def missing_error(self) -> UnknownJob | None:
        """The error for the first job that Redis does not have."""
        for job_id in self.lost:
            return JobLost(job_id)
        for job_id in self.unknown:
            return UnknownJob(job_id)
        return None

    def __bool__(self) -> bool:
        return bool(self.events or self.outcomes or self.unknown or self.lost)


@dataclass
class _Waiting:
    #: Whether Redis has answered for this job.
    known: bool = False
    #: The job was accepted before: if Redis does not have it, it is lost.
    accepted: bool = False
    #: The id of the last entry that was read of its event stream; None if the stream is not read.
    last_event: str | None = None


class PollState:
    """The jobs that are waited for, and how far each has been read."""

    def __init__(self) -> None:
        self._jobs: dict[str, _Waiting] = {}
        self._due: dict[str, None] = {}  # jobs that the next request must include
        # The jobs of the last request. Until its replies come, jobs may be added and dropped.
        self._requested: list[str] = []
        self._new: list[str] = []
        self._reading: list[str] = []  # jobs whose results the last request reads
        self._sizes: dict[str, int] = {}  # jobs whose results are known to exist -> their sizes in bytes
        self._may_measure = True
        self._streams: dict[str, str] = {}
        self._has_more = False  # entries of a stream that the last reply left out
        self._requested_at = 0.0
        self._round, self._parts = 0, 1
        self._pause_s = FIRST_POLL_S
        self._answered_at = time.monotonic()
        self._presence = Presence()
        #: Seconds to sleep before the next request.
        self.rest_s = 0.0

    def __len__(self) -> int:
        return len(self._jobs)

    def __iter__(self) -> Iterator[str]:
        return iter(self._jobs)

    def add(self, job_id: str, *, events: bool = False, accepted: bool = False) -> None:
        """Start waiting for a job, and with `events` for its event stream from the first entry.

        Args:
            accepted: Redis has had the job: if it does not have it now, the job is lost and not unknown.
        """
        waiting = self._jobs.setdefault(job_id, _Waiting())
        waiting.accepted |= accepted
        if events:
            waiting.last_event = "0-0"
        self._due[job_id] = None
        self.rest_s = 0.0

    def drop(self, job_id: str) -> None:
        """Stop waiting for a job."""
        self._jobs.pop(job_id, None)
        self._due.pop(job_id, None)
        self._presence.drop(job_id)
        self._sizes.pop(job_id, None)

    def request(self, block_s: float) -> list[Command]:
        """The commands to send, in this order. Redis may delay the replies by `block_s` seconds to wait for events.

        A request asks for the sizes of results, and the next ones read those that exist, up to READ_BYTES at a time.
        """
        self._reading, self._requested_at, any_due = self._take_sized(), time.monotonic(), bool(self._due)
        self._requested = [] if self._reading else self._choose()
        if len(self._requested) == 1 or not self._may_measure:
            self._reading = self._requested
        self._new = [job_id for job_id in self._requested if not self._jobs[job_id].known]
        self._streams = {job_id: w.last_event for job_id, w in self._jobs.items() if w.last_event is not None}
        commands: list[Command] = []
        if self._streams:
            wait_ms = 0 if any_due or not self._requested else int(1000 * min(self._pause_s, block_s))
            blocking = ("BLOCK", wait_ms) if wait_ms > 0 else ()  # BLOCK 0 would wait without limit
            names = map(keys.events, self._streams)
            commands.append(("XREAD", "COUNT", self._entries(), *blocking, "STREAMS", *names, *self._streams.values()))
        if self._reading:
            for start in range(0, len(self._reading), MGET_KEYS):
                commands.append(("MGET", *map(keys.result, self._reading[start : start + MGET_KEYS])))
        else:
            commands += [("STRLEN", keys.result(job_id)) for job_id in self._requested]
        # Checks the result again, because it may have been stored after the MGET.
        commands += [("EXISTS", keys.job(job_id), keys.result(job_id)) for job_id in self._new]
        return commands + self._presence.request(self._jobs if not self._new else self._known_jobs())

    def answer(self, replies: list[Any]) -> Updates:
        """The updates in the replies to the last request. Jobs that have ended, or do not exist, are dropped.

        Args:
            replies: of an exception for a command that Redis refused. In place of a record there may be its outcome.

        Raises:
            redis.RedisError: Redis refused a command.
        """
        updates = Updates(known=self._new)
        self._answered_at = time.monotonic()
        replies = list(replies)
        if self._requested:
            self._parts = 1
        if self._requested and not self._reading:
            start = 1 if self._streams else 0
            self._take_sizes(replies[start : start + len(self._requested)])
            del replies[start : start + len(self._requested)]
        for reply in replies:
            if isinstance(reply, redis.RedisError):
                raise reply
        if self._streams:
            self._take_events(replies.pop(0), updates)
        for start in range(0, len(self._reading), MGET_KEYS):
            self._take_results(self._reading[start : start + MGET_KEYS], replies.pop(0), updates)
        for job_id, exists in zip(self._new, replies, strict=False):
            if not exists and job_id not in updates.outcomes:
                self._take_missing(job_id, updates)
        updates.lost = [j for j in self._presence.answer(replies[len(self._new) :]) if j not in updates.outcomes]
        for job_id in self._requested:
            if job_id in self._jobs:
                self._jobs[job_id].known = True
        for job_id in (*updates.outcomes, *updates.unknown, *updates.lost):
            self.drop(job_id)
        self._pace(updates)
        return updates

    def failed(self) -> list[str]:
        """Redis did not answer: drop and return the jobs to give up.

        These are jobs for which Redis has never answered, and after PATIENCE_S without an answer all jobs.
        """
        patient = time.monotonic() - self._answered_at < PATIENCE_S
        given_up = [job_id for job_id, waiting in self._jobs.items() if not (patient and waiting.known)]
        self._due.update(dict.fromkeys((*self._requested, *self._reading)))
        for job_id in given_up:
            self.drop(job_id)
        self._pace(Updates())
        self.rest_s = max(self.rest_s, self._pause_s)
        return given_up

    def _choose(self) -> list[str]:
        """The jobs of the next request: new ones, those whose event stream has ended, and some of the others.

        Jobs end roughly in the order in which they were submitted. So each request has the oldest ones, more of them
        while many end, and another part of the rest each time.
        """
        self._round += 1
        front = self._parts * MGET_KEYS
        chosen = dict.fromkeys(islice(self._due, NEW_JOBS))
        chosen.update(dict.fromkeys(islice(self._jobs, front)))
        if (parts := -(-(len(self._jobs) - front) // MGET_KEYS)) > 0:
            start = front + self._round % parts * MGET_KEYS
            chosen.update(dict.fromkeys(islice(self._jobs, start, start + MGET_KEYS)))
        for job_id in chosen:
            self._due.pop(job_id, None)
        return [job_id for job_id in chosen if job_id in self._jobs]

    def _take_sized(self) -> list[str]:
        """The next jobs whose results are to be read: READ_BYTES of them, at least one."""
        taken: list[str] = []
        left = READ_BYTES
        while self._sizes and len(taken) < MGET_KEYS:
            job_id, size = next(iter(self._sizes.items()))
            if taken and size > left:
                break
            left -= self._sizes.pop(job_id)
            taken.append(job_id)
        return taken

    def _take_sizes(self, sizes: list[Any]) -> None:
        """Note which results exist."""
        for job_id, size in zip(self._requested, sizes, strict=True):
            if isinstance(size, redis.exceptions.NoPermissionError):
                self._may_measure = False  # an older config/redis-users.acl; read as many as were asked for
                self._due[job_id] = None
            elif isinstance(size, int) and size and job_id in self._jobs:
                self._sizes[job_id] = size
            elif isinstance(size, redis.RedisError) and "WRONGTYPE" not in str(size):
                raise size
        self._parts += -(-len(self._sizes) // MGET_KEYS)

    def _take_events(self, reply: Any, updates: Updates) -> None:
        ids, self._has_more = {keys.events(job_id): job_id for job_id in self._streams}, False
        for name, entries in reply or ():
            job_id = ids[name]
            waiting = self._jobs.get(job_id)
            if waiting is None or waiting.last_event != self._streams[job_id]:
                continue  # added again in the meantime: the next request reads its stream from the first entry
            waiting.last_event = entries[-1][0]
            self._has_more |= len(entries) == self._entries()
            updates.events[job_id] = [fields.get("event", "") for _, fields in entries]
            if '"end":' in updates.events[job_id][-1]:
                self._due[job_id] = None

    def _entries(self) -> int:
        """The most entries of each stream in the reply to the last request."""
        return min(MOST_ENTRIES, max(FEWEST_ENTRIES, READ_ENTRIES // len(self._streams)))

    def _take_missing(self, job_id: str, updates: Updates) -> None:
        if job_id in self._jobs and self._jobs[job_id].accepted:
            self._presence.doubt(job_id)
        else:
            updates.unknown.append(job_id)

    def _known_jobs(self) -> list[str]:
        return [job_id for job_id, waiting in self._jobs.items() if waiting.known]

    def _take_results(self, part: list[str], records: list[str | Outcome | None], updates: Updates) -> None:
        before = len(updates.outcomes)
        for job_id, record in zip(part, records, strict=True):
            if job_id in self._jobs and (outcome := _outcome_of(record)) is not None:
                updates.outcomes[job_id] = outcome
        if len(updates.outcomes) > before and self._requested:
            self._parts += 1

    def _pace(self, updates: Updates) -> None:
        """Set the time until the next request."""
        self._pause_s = FIRST_POLL_S if updates else min(self._pause_s * POLL_GROWTH, LAST_POLL_S)
        if self._due or self._sizes or (self._streams and self._has_more and updates):
            self.rest_s = 0.0
        elif self._streams:  # Redis delays the next replies; a short sleep collects the events of several jobs
            self.rest_s = FIRST_POLL_S if updates else 0.0
        else:
            took_s = time.monotonic() - self._requested_at
            self.rest_s = max(self._pause_s, min(took_s / POLL_SHARE, LONGEST_REST_S))


def _outcome_of(record: str | Outcome | None) -> Outcome | None:
    return parse_outcome(record) if record is None or isinstance(record, str) else record
