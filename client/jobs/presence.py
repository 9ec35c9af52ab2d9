"""Finding jobs that Redis has lost: it had their records, and has them no more. Performs no I/O itself.

A Redis that was flushed, restarted or promoted, or that evicts keys, loses records without an error, so the client has
to look. One command counts the records of many jobs. Only where some are missing, the next request asks for each job. A
job is lost if it is missing, and still missing after CONFIRM_S: a record may be absent for a moment, for example on a
replica that lags.
"""

from __future__ import annotations

import time
from collections.abc import Collection, Iterable, Sequence
from itertools import islice
from typing import Any

from headrace.client.wire import keys

#: Seconds between two looks at the records of jobs that are waited for.
LOOK_S = 1.0
#: A job is lost if its record is missing, and still missing this many seconds later.
CONFIRM_S = 1.0
#: Most jobs of one look, and of one command. With more jobs, each look takes the next ones.
LOOK_JOBS, COMMAND_JOBS = 2_048, 256

Command = tuple[str | int, ...]


class Presence:
    """The records that `PollState` expects in Redis. The replies are those to the commands of the last request."""

    def __init__(self) -> None:
        self._look_at = time.monotonic() + LOOK_S
        self._start = 0  # index of the first job of the next look
        #: Jobs that may be missing, each with the time when Redis first said so; None if it has not yet.
        self._doubtful: dict[str, float | None] = {}
        self._counted: list[list[str]] = []
        self._asked: list[str] = []

    def doubt(self, job_id: str) -> None:
        """Redis has just said that this job's record is missing."""
        self._doubtful[job_id] = time.monotonic()

    def drop(self, job_id: str) -> None:
        """Nobody waits for this job any more."""
        self._doubtful.pop(job_id, None)

    def request(self, jobs: Collection[str]) -> list[Command]:
        """The commands to send now, often none. `jobs` are those whose records Redis has had."""
        now = time.monotonic()
        due = now - CONFIRM_S
        self._asked = [job_id for job_id, since in self._doubtful.items() if since is None or since <= due]
        self._counted = []
        if now >= self._look_at and jobs:
            self._look_at = now + LOOK_S
            looked = [job_id for job_id in self._choose(jobs) if job_id not in self._doubtful]
            self._counted = [looked[start : start + COMMAND_JOBS] for start in range(0, len(looked), COMMAND_JOBS)]
        counts: list[Command] = [("EXISTS", *map(keys.job, part)) for part in self._counted]
        return counts + [("EXISTS", keys.job(job_id), keys.result(job_id)) for job_id in self._asked]

    def answer(self, replies: Sequence[Any]) -> list[str]:
        """The jobs that are lost, by the replies to the last request."""
        now = time.monotonic()
        for part, count in zip(self._counted, replies, strict=False):
            if count < len(part):
                self._doubtful.update(dict.fromkeys(part))
        asked = zip(self._asked, replies[len(self._counted) :], strict=True)
        return [job_id for job_id, count in asked if self._is_lost(job_id, count, now)]

    def _is_lost(self, job_id: str, count: int, now: float) -> bool:
        if job_id not in self._doubtful:
            return False  # dropped in the meantime
        if count:
            del self._doubtful[job_id]
            return False
        if self._doubtful[job_id] is not None:
            return True
        self._doubtful[job_id] = now
        return False

    def _choose(self, jobs: Collection[str]) -> Iterable[str]:
        """The jobs of this look: all, or the next LOOK_JOBS of many."""
        start = self._start if self._start < len(jobs) else 0
        self._start = start + LOOK_JOBS
        return islice(jobs, start, start + LOOK_JOBS)
