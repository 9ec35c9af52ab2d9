"""Waiting for jobs: what to ask Redis next, and what its answers mean. Does no input or output of its own.

`Client` and `AsyncClient` both send what `request` says in one round trip, hand the replies to `answer`, and rest for
`rest_s`. One connection serves however many jobs wait, with no channel for each of them.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

from headrace.client.wire import keys
from headrace.client.wire.results import Outcome, parse_outcome

#: Polling starts often and slows down: a short job is seen at once, a long one costs a request a second.
FIRST_POLL_S, LAST_POLL_S, POLL_GROWTH = 0.01, 1.0, 1.5
#: The share of its time that a client spends asking, at most, unless that made it rest longer than this.
POLL_SHARE, LONGEST_REST_S = 0.05, 0.1
#: Results asked for in one command.
MGET_KEYS = 250
#: A wait goes on through a Redis that is away for at most this long; restarts take less.
PATIENCE_S = 60.0

Command = tuple[str | int, ...]


@dataclass
class News:
    """What one answer brought, by job id."""

    #: Entries of streams of events, in order.
    events: dict[str, list[str]] = field(default_factory=dict)
    outcomes: dict[str, Outcome] = field(default_factory=dict)
    #: Jobs that do not exist.
    unknown: list[str] = field(default_factory=list)
    #: Jobs that Redis has answered for the first time.
    known: list[str] = field(default_factory=list)

    def jobs(self) -> Iterable[str]:
        """All it is about."""
        return dict.fromkeys((*self.events, *self.outcomes, *self.unknown, *self.known))

    def take(self, other: News, job_id: str) -> None:
        """Add what another says of a job."""
        if job_id in other.events:
            self.events[job_id] = other.events[job_id]
        if job_id in other.outcomes:
            self.outcomes[job_id] = other.outcomes[job_id]
        if job_id in other.unknown:
            self.unknown.append(job_id)

    def __bool__(self) -> bool:
        return bool(self.events or self.outcomes or self.unknown)


@dataclass
class _Waiting:
    #: Whether Redis has answered for it.
    known: bool = False
    #: The id of the last entry of its events that was read; None if they are not asked for.
    last_event: str | None = None


class Watch:
    """The jobs that somebody waits for."""

    def __init__(self) -> None:
        self._jobs: dict[str, _Waiting] = {}
        self._due: dict[str, None] = {}  # asked for in the next turn, whatever their place
        # What the last request was about; while it is under way jobs may be added and dropped.
        self._asked: list[str] = []
        self._new: list[str] = []
        self._streams: dict[str, str] = {}
        self._asked_at = 0.0
        self._turn, self._parts = 0, 1
        self._pause_s = FIRST_POLL_S
        self._answered_at = time.monotonic()
        #: Seconds to rest before the next request.
        self.rest_s = 0.0

    def __len__(self) -> int:
        return len(self._jobs)

    def __iter__(self) -> Iterator[str]:
        return iter(self._jobs)

    def add(self, job_id: str, *, events: bool = False) -> None:
        """Wait for a job from now on, and for its events, from the first on, if asked."""
        waiting = self._jobs.setdefault(job_id, _Waiting())
        if events:
            waiting.last_event = "0-0"
        self._due[job_id] = None
        self.rest_s = 0.0

    def drop(self, job_id: str) -> None:
        """Wait for it no more."""
        self._jobs.pop(job_id, None)
        self._due.pop(job_id, None)

    def request(self, block_s: float) -> list[Command]:
        """The commands to send, in this order. Redis may hold the answer back for events, up to `block_s` seconds."""
        self._asked, self._asked_at = self._choose(), time.monotonic()
        self._new = [job_id for job_id in self._asked if not self._jobs[job_id].known]
        self._streams = {job_id: w.last_event for job_id, w in self._jobs.items() if w.last_event is not None}
        wait_ms = 0 if self._due else int(1000 * min(self._pause_s, block_s))
        self._due = {}
        commands: list[Command] = []
        if self._streams:
            blocking = ("BLOCK", wait_ms) if wait_ms > 0 else ()  # BLOCK 0 would wait for ever
            names = map(keys.events, self._streams)
            commands.append(("XREAD", *blocking, "STREAMS", *names, *self._streams.values()))
        for start in range(0, len(self._asked), MGET_KEYS):
            commands.append(("MGET", *map(keys.result, self._asked[start : start + MGET_KEYS])))
        # The result once more: it may have come since.
        commands += [("EXISTS", keys.job(job_id), keys.result(job_id)) for job_id in self._new]
        return commands

    def answer(self, replies: list[Any]) -> News:
        """What the replies to the last request say. Jobs that have ended, or do not exist, are waited for no more."""
        news = News(known=self._new)
        self._answered_at = time.monotonic()
        replies = list(replies)
        self._parts = 1
        if self._streams:
            self._take_events(replies.pop(0), news)
        for start in range(0, len(self._asked), MGET_KEYS):
            self._take_results(self._asked[start : start + MGET_KEYS], replies.pop(0), news)
        news.unknown = [job_id for job_id, exists in zip(self._new, replies, strict=True) if not exists]
        for job_id in self._asked:
            if job_id in self._jobs:
                self._jobs[job_id].known = True
        for job_id in (*news.outcomes, *news.unknown):
            self.drop(job_id)
        self._pace(news)
        return news

    def failed(self) -> list[str]:
        """Redis did not answer: the jobs to be given up. New ones at once, the others when it was away too long."""
        patient = time.monotonic() - self._answered_at < PATIENCE_S
        given_up = [job_id for job_id, waiting in self._jobs.items() if not (patient and waiting.known)]
        self._due.update(dict.fromkeys(self._asked))
        for job_id in given_up:
            self.drop(job_id)
        self._pace(News())
        self.rest_s = max(self.rest_s, self._pause_s)
        return given_up

    def _choose(self) -> list[str]:
        """The jobs to ask for: new ones, those that say they ended, and some of the others.

        Jobs end about in the order they came. So the oldest are asked for, more of them while they end, and one part
        of the rest, another one each time.
        """
        self._turn += 1
        front = self._parts * MGET_KEYS
        chosen = dict(self._due)
        chosen.update(dict.fromkeys(islice(self._jobs, front)))
        if (parts := -(-(len(self._jobs) - front) // MGET_KEYS)) > 0:
            start = front + self._turn % parts * MGET_KEYS
            chosen.update(dict.fromkeys(islice(self._jobs, start, start + MGET_KEYS)))
        return [job_id for job_id in chosen if job_id in self._jobs]

    def _take_events(self, reply: Any, news: News) -> None:
        ids = {keys.events(job_id): job_id for job_id in self._streams}
        for name, entries in reply or ():
            job_id = ids[name]
            waiting = self._jobs.get(job_id)
            if waiting is None or waiting.last_event != self._streams[job_id]:
                continue  # somebody wants it from the start: all of it comes again
            waiting.last_event = entries[-1][0]
            news.events[job_id] = [fields.get("event", "") for _, fields in entries]
            if '"end":' in news.events[job_id][-1]:
                self._due[job_id] = None

    def _take_results(self, part: list[str], records: list[str | None], news: News) -> None:
        before = len(news.outcomes)
        for job_id, record in zip(part, records, strict=True):
            if job_id in self._jobs and (outcome := parse_outcome(record)) is not None:
                news.outcomes[job_id] = outcome
        if len(news.outcomes) > before:
            self._parts += 1

    def _pace(self, news: News) -> None:
        """When to ask again."""
        self._pause_s = FIRST_POLL_S if news else min(self._pause_s * POLL_GROWTH, LAST_POLL_S)
        if self._due:
            self.rest_s = 0.0
        elif self._streams:  # Redis holds the next answer back; a moment here lets the events of others come along
            self.rest_s = FIRST_POLL_S if news else 0.0
        else:
            took_s = time.monotonic() - self._asked_at
            self.rest_s = max(self._pause_s, min(took_s / POLL_SHARE, LONGEST_REST_S))
