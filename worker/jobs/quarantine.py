"""Quarantine of poison messages: which jobs run at the same time, so that a prompt that kills the process dies alone.

The record of a job counts its attempts: it rises by one before the job goes to the engine, and falls by one if the
worker returns the job to the queue. A job that arrives with attempts was therefore in a process that ended with it, and
any job that ran in that process may be the cause. Hence:

- jobs without attempts run together, and never at the same time as a job with attempts;
- jobs with attempts run in small groups, those with the fewest first, and alone before their last attempt;
- only jobs that went to the engine are counted, not jobs in quarantine or jobs that wait for their model.

A job fails for its attempts only if its last attempt, in which it ran alone, did not end. The neighbour of a poison
message loses at most the attempts that it shared with it, and succeeds when it runs alone. If a worker is killed for
another reason (by the kernel, by an operator), its jobs run in smaller groups for a while, and none of them fails.
"""

from __future__ import annotations

import threading
from collections.abc import Container
from dataclasses import dataclass
from typing import Any

#: A quarantined group gets 1/8 of the slots: two attempts find one poison message among 64 jobs.
QUARANTINE_SHARE = 8


@dataclass(frozen=True)
class Candidate:
    """A job that waits for the engine of its model, with the number of attempts that did not end.

    `shared` means that another live worker computes it too, from another copy of its message.
    """

    job_id: str
    wire: Any
    attempts: int
    model: str
    shared: bool = False


class Quarantine:
    """Holds jobs until they may go to the engine. May be used from any thread."""

    def __init__(self, slots: int, max_attempts: int) -> None:
        self._group_size, self._max_attempts = max(1, slots // QUARANTINE_SHARE), max_attempts
        self._lock = threading.RLock()
        self._new: dict[str, Candidate] = {}
        self._quarantined: dict[str, Candidate] = {}
        self._inside: set[str] = set()
        #: Whether the jobs inside the engine are quarantined ones.
        self._isolating = False

    def put(self, candidate: Candidate) -> None:
        """Append a job to the waiting jobs."""
        with self._lock:
            (self._quarantined if candidate.attempts else self._new)[candidate.job_id] = candidate

    def admit(self, models: Container[str]) -> list[Candidate]:
        """Take out the jobs that go to the engines of these models now. They count as inside until `leave`."""
        with self._lock:
            quarantined, new = (
                [candidate for candidate in waiting.values() if candidate.model in models]
                for waiting in (self._quarantined, self._new)
            )
            if self._inside and (quarantined or self._isolating):
                return []
            self._isolating = bool(quarantined)
            admitted = self._next_group(quarantined) if quarantined else new
            for candidate in admitted:
                self.withdraw(candidate.job_id)
                self._inside.add(candidate.job_id)
            return admitted

    def _next_group(self, quarantined: list[Candidate]) -> list[Candidate]:
        fewest = min(candidate.attempts for candidate in quarantined)
        size = 1 if fewest + 1 >= self._max_attempts else self._group_size
        return [candidate for candidate in quarantined if candidate.attempts == fewest][:size]

    def models(self) -> set[str]:
        """The models of the waiting jobs."""
        with self._lock:
            return {candidate.model for waiting in (self._quarantined, self._new) for candidate in waiting.values()}

    def leave(self, job_id: str) -> bool:
        """A job has ended and its result is stored. Returns whether `admit` should be called."""
        with self._lock:
            self._inside.discard(job_id)
            return not self._inside and bool(self._quarantined or self._new)

    def withdraw(self, job_id: str) -> bool:
        """Remove a waiting job. Returns whether it was waiting."""
        with self._lock:
            return bool(self._new.pop(job_id, None) or self._quarantined.pop(job_id, None))

    def inside(self) -> set[str]:
        """The jobs that have been admitted and have not left."""
        with self._lock:
            return set(self._inside)
