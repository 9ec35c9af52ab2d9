"""Which jobs may be computed at the same time, so that a prompt that kills the process ends alone.

A job's record counts its attempts: one more before the job goes to the engine, and one less if the worker hands it back
in good order. So a job that comes with attempts has been in a process that died with it, and any of those that were in
there may be the cause. Therefore:

- jobs without attempts are computed together, and never beside one that has some;
- jobs that have some are computed in small groups, those with fewest first, and before their last attempt, alone;
- only the attempts of jobs that went to the engine are counted: what waits here, or for its model, is not.

A job is failed for its attempts only if its last one, which it had alone, did not end. A neighbour of a killer loses at
most the attempts it had in company with it; alone, it ends. A worker that is killed for other reasons (by the kernel,
by an operator) costs some time, as its jobs are computed in smaller company, and fails none.
"""

from __future__ import annotations

import threading
from collections.abc import Container
from dataclasses import dataclass
from typing import Any

#: A group on trial has this share of the slots: two attempts find the one among 64, and the others lose little time.
TRIAL_SHARE = 8


@dataclass(frozen=True)
class Candidate:
    """A job that is to go to the engine of its model, and how many attempts at it have not ended."""

    job_id: str
    wire: Any
    attempts: int
    model: str


class Probation:
    """Holds jobs until they may go to the engine. May be called from any thread."""

    def __init__(self, slots: int, max_attempts: int) -> None:
        self._group, self._max_attempts = max(1, slots // TRIAL_SHARE), max_attempts
        self._lock = threading.RLock()
        self._new: dict[str, Candidate] = {}
        self._suspects: dict[str, Candidate] = {}
        self._inside: set[str] = set()
        self._trial = False

    def put(self, candidate: Candidate) -> None:
        """Put a job in line."""
        with self._lock:
            (self._suspects if candidate.attempts else self._new)[candidate.job_id] = candidate

    def admit(self, models: Container[str]) -> list[Candidate]:
        """The jobs that are to go to these models' engines now. They count as inside until `leave`."""
        with self._lock:
            suspects, new = (
                [candidate for candidate in line.values() if candidate.model in models]
                for line in (self._suspects, self._new)
            )
            if self._inside and (suspects or self._trial):
                return []
            self._trial = bool(suspects)
            admitted = self._next_group(suspects) if suspects else new
            for candidate in admitted:
                self.withdraw(candidate.job_id)
                self._inside.add(candidate.job_id)
            return admitted

    def _next_group(self, suspects: list[Candidate]) -> list[Candidate]:
        fewest = min(candidate.attempts for candidate in suspects)
        size = 1 if fewest + 1 >= self._max_attempts else self._group
        return [candidate for candidate in suspects if candidate.attempts == fewest][:size]

    def models(self) -> set[str]:
        """The models of those in line."""
        with self._lock:
            return {candidate.model for line in (self._suspects, self._new) for candidate in line.values()}

    def leave(self, job_id: str) -> bool:
        """A job has ended, and its end is stored. Says whether it is time to ask for others."""
        with self._lock:
            self._inside.discard(job_id)
            return not self._inside and bool(self._suspects or self._new)

    def withdraw(self, job_id: str) -> bool:
        """Take a job out of the line. Says whether it stood there."""
        with self._lock:
            return bool(self._new.pop(job_id, None) or self._suspects.pop(job_id, None))

    def inside(self) -> set[str]:
        """The jobs that have been admitted and have not ended."""
        with self._lock:
            return set(self._inside)
