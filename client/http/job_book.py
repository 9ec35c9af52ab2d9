"""The jobs that came over HTTP to this server, for lists: whose they are and how far they are, never what they say."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from headrace.client.wire import keys
from headrace.client.wire.results import State

#: Jobs that are remembered, the newest ones. Each takes about half a kilobyte.
MAX_JOBS = 5_000


@dataclass
class JobEntry:
    """A job.

    Attributes:
        created_at: Unix time in seconds, by this machine's clock.
        state: `queued` until the request has ended; a worker's record says whether the job runs.
        ended_at: Unix time in seconds; None before the end.
    """

    id: str
    owner: str
    model: str
    created_at: float
    state: State = "queued"
    ended_at: float | None = None

    def public(self, now: float) -> dict[str, Any]:
        """The entry as JSON shows it to its owner."""
        ended_after_s = None if self.ended_at is None else round(self.ended_at - self.created_at, 2)
        times = {"created_at": round(self.created_at, 1), "age_s": round(now - self.created_at, 1)}
        return {
            "id": self.id,
            "tag": keys.tag(self.id),
            "model": self.model,
            "state": self.state,
            **times,
            "ended_after_s": ended_after_s,
        }


class JobBook:
    """Remembers the newest `MAX_JOBS` jobs. A job over HTTP lives as long as its request, so nobody else is asked."""

    def __init__(self, clock: Callable[[], float] = time.time, size: int = MAX_JOBS) -> None:
        self._clock, self._size = clock, size
        self._entries: dict[str, JobEntry] = {}

    def add(self, job_ids: Iterable[str], *, owner: str, model: str) -> None:
        """Jobs were queued; the oldest ones are forgotten."""
        now = self._clock()
        for job_id in job_ids:
            self._entries[job_id] = JobEntry(job_id, owner, model, now)
        while len(self._entries) > self._size:
            del self._entries[next(iter(self._entries))]

    def end(self, states: Mapping[str, State]) -> None:
        """Jobs have ended. The first end counts."""
        for job_id, state in states.items():
            entry = self._entries.get(job_id)
            if entry is not None and entry.ended_at is None:
                entry.state, entry.ended_at = state, self._clock()

    def find(self, job_id: str, owner: str) -> JobEntry | None:
        """A job of this owner; None if there is none, or it is another's."""
        entry = self._entries.get(job_id)
        return entry if entry is not None and entry.owner == owner else None

    def select(
        self, owner: str, running: Collection[str], *, state: str = "", model: str = "", search: str = ""
    ) -> tuple[list[JobEntry], dict[str, int]]:
        """The jobs of an owner, the newest first, and how many there are in each state before the filter by state.

        Args:
            running: the tags of jobs that are in a slot of a worker.
            state, model: exact; "" for all.
            search: a part of the id or of the tag.
        """
        found = [
            self._current(entry, running)
            for entry in reversed(self._entries.values())
            if entry.owner == owner and model in ("", entry.model)
        ]
        if search:
            found = [entry for entry in found if search in entry.id or search in keys.tag(entry.id)]
        counts: Counter[str] = Counter(entry.state for entry in found)
        return [entry for entry in found if state in ("", entry.state)], dict(counts)

    @staticmethod
    def _current(entry: JobEntry, running: Collection[str]) -> JobEntry:
        if entry.ended_at is None:
            entry.state = "running" if keys.tag(entry.id) in running else entry.state
        return entry
