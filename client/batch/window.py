"""Compute any number of jobs with a bounded number of them in Redis and in memory at a time.

`headrace batch`, `Client.batch` and `Client.map` share this. Job ids follow from the run and the request, so submitting
a request again, even after a crash, finds the job that exists.
"""

from __future__ import annotations

import contextlib
import itertools
import logging
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from typing import Generic, Protocol, TypeVar

from headrace.client.jobs.polling import REMIND_S, PollState
from headrace.client.jobs.prepared import PreparedJob
from headrace.client.jobs.reading import JobReader
from headrace.client.jobs.submission import Submitter
from headrace.client.wire import keys
from headrace.client.wire.connection_advice import connection_advice
from headrace.client.wire.errors import (
    HeadraceError,
    InvalidRequest,
    QueueFull,
    RedisRefused,
    RedisUnreachable,
    UnknownJob,
)
from headrace.client.wire.results import Outcome
from headrace.client.wire.values import show

log = logging.getLogger("headrace.client")

#: Enough to keep a few workers with 64 slots each busy. vLLM's run-batch has the same default.
MAX_INFLIGHT = 1024
#: Jobs that are submitted at once.
CHUNK = 256
#: The longest pause in seconds, and the one after Redis refused or did not answer.
RETRY_S = 0.5
#: Unfinished jobs are submitted again this often. It has no effect unless Redis has lost them.
RESUBMIT_S = 30.0
#: Parts of the messages of Redis errors that are permanent: waiting does not help.
_PERMANENT = ("noperm", "noauth", "wrongpass", "permission")

K = TypeVar("K")
Tick = Callable[[], None]
Notify = Callable[[str], None]


class JobService(Protocol):
    """The part of `Client` that batches use."""

    model_name: str
    submitter: Submitter
    reader: JobReader


def warn(message: str) -> None:
    """Log a warning; the default way to notify the user."""
    log.warning("%s", message)


class Window(Generic[K]):
    """Keeps up to `size` jobs queued or running, and returns the outcome of each, as they end or in order.

    If Redis does not answer, is full, or has restarted and lost data, this waits, reports it, and continues.

    Args:
        size: the maximum number of jobs that were read from the input and whose outcome was not returned yet.
        ordered: return outcomes in the order of the input. An unfinished job then delays all that follow it.
        notify: called with a line of text for the user.
        tick: called at least every RETRY_S.

    Raises:
        InvalidRequest: `size` is not a whole number of at least 1.
    """

    def __init__(
        self,
        client: JobService,
        *,
        size: int = MAX_INFLIGHT,
        ordered: bool = False,
        notify: Notify = warn,
        tick: Tick = lambda: None,
    ) -> None:
        if type(size) is not int or size < 1:
            raise InvalidRequest("max_inflight", show(size), "a whole number of at least 1")
        self._submitter, self._reader = client.submitter, client.reader
        self._size, self._ordered, self._notify, self._tick = size, ordered, notify, tick
        self._waiting: dict[str, tuple[int, K, PreparedJob]] = {}  # submitted jobs
        self._polls = PollState()
        self._unsent: deque[tuple[int, K, PreparedJob]] = deque()
        self._done: dict[int, tuple[K, Outcome | Exception]] = {}  # by index in the input
        self._read = self._returned = 0
        self._chunk = CHUNK
        self._resubmitted_at = self._ended_at = self._reminded_at = time.monotonic()
        self._failing_since: float | None = None

    @property
    def outstanding(self) -> int:
        """Number of jobs that are queued or running."""
        return len(self._waiting)

    def run(self, items: Iterable[tuple[K, PreparedJob | Exception]]) -> Iterator[list[tuple[K, Outcome | Exception]]]:
        """Submit jobs and yield their outcomes, several at a time.

        Args:
            items: prepared jobs, each with a key that is returned with its outcome. An error instead of a job is
                returned as its outcome.

        Raises:
            RedisUnreachable, RedisRefused: the reason is permanent, for example a wrong password.
        """
        source = iter(items)
        more = True
        while True:
            more = self._fill(source) if more else False
            self._submit()
            self._collect()
            if ready := self._ready():
                yield ready
            elif not more and not self._waiting and not self._unsent:
                return
            self._resubmit()
            self._remind()
            self._tick()
            refused = self._unsent or self._failing_since is not None
            time.sleep(RETRY_S if refused else min(self._polls.rest_s, RETRY_S))

    def drop(self) -> None:
        """Cancel all jobs that are queued or running."""
        with contextlib.suppress(RedisUnreachable, RedisRefused):
            try:
                self._reader.cancel(list(self._waiting))
            except UnknownJob:  # Redis has lost some jobs; those of the same round trip were not cancelled
                for job_id in self._waiting:
                    with contextlib.suppress(UnknownJob):
                        self._reader.cancel([job_id])

    def _fill(self, source: Iterator[tuple[K, PreparedJob | Exception]]) -> bool:
        """Fill the window from the input. Returns whether the input may have more."""
        room = self._size - (self._read - self._returned)
        if room < min(CHUNK, self._size // 4):
            return True  # wait for more room: a message with few jobs costs as much as one with many
        for key, job in itertools.islice(source, room):
            if isinstance(job, Exception):
                self._done[self._read] = (key, job)
            else:
                self._unsent.append((self._read, key, job))
            self._read += 1
            room -= 1
        return room == 0

    def _submit(self) -> None:
        while self._unsent:
            part = list(itertools.islice(self._unsent, self._chunk))
            if not self._send([job for *_, job in part]):
                return
            for entry in part:
                self._unsent.popleft()
                self._waiting[entry[2].id] = entry
                self._polls.add(entry[2].id, accepted=True)
            self._chunk = min(self._chunk * 2, CHUNK)

    def _send(self, jobs: list[PreparedJob]) -> bool:
        try:
            self._submitter.submit(jobs)
        except QueueFull as error:
            self._chunk = max(1, self._chunk // 2)  # a smaller part may fit
            self._notify_rate_limited(str(error))
            return False
        except (RedisUnreachable, RedisRefused) as error:
            self._redis_failed(error)
            return False
        self._redis_answered()
        return True

    def _collect(self) -> None:
        if not self._waiting:
            return
        try:
            updates = self._reader.poll_once(self._polls)
        except (RedisUnreachable, RedisRefused) as error:
            for job_id in self._polls.failed():
                self._polls.add(job_id, accepted=True)  # a batch never gives up a job
            self._redis_failed(error)
            return
        self._redis_answered()
        for job_id, outcome in updates.outcomes.items():
            index, key, _ = self._waiting.pop(job_id)
            self._done[index] = (key, outcome)
        # Redis has lost jobs that it had accepted, for example because it restarted without its last second of data.
        self._unsent.extend(self._waiting.pop(job_id) for job_id in (*updates.unknown, *updates.lost))
        if updates.outcomes:
            self._ended_at = self._reminded_at = time.monotonic()

    def _ready(self) -> list[tuple[K, Outcome | Exception]]:
        if not self._ordered:
            ready = list(self._done.values())
            self._done.clear()
        else:
            ready = []
            while (entry := self._done.pop(self._returned + len(ready), None)) is not None:
                ready.append(entry)
        self._returned += len(ready)
        return ready

    def _redis_failed(self, error: RedisUnreachable | RedisRefused) -> None:
        # A missing unix socket means that the server is being started, not that the path is wrong.
        advice = None if error.url.startswith("unix:") else connection_advice(error.reason)
        if advice or any(sign in error.reason.lower() for sign in _PERMANENT):
            raise error
        if self._failing_since is None:
            self._failing_since = time.monotonic()
            self._notify(f"{error}; waiting for it")
            self._reminded_at = time.monotonic()
        else:
            self._notify_rate_limited(f"{error}; waiting for it since {time.monotonic() - self._failing_since:.0f} s")

    def _redis_answered(self) -> None:
        if self._failing_since is not None:
            self._notify(f"Redis answers again, after {time.monotonic() - self._failing_since:.0f} s")
            self._failing_since = None
            self._resubmitted_at = 0.0  # resubmit now: Redis may have lost data that was not on disk yet

    def _resubmit(self) -> None:
        """Submit all unfinished jobs again. Redis ignores those that it has, and queues those that it has lost."""
        now = time.monotonic()
        if now - self._resubmitted_at < RESUBMIT_S or self._failing_since is not None:
            return
        self._resubmitted_at = now
        jobs = [job for *_, job in self._waiting.values()]
        for start in range(0, len(jobs), CHUNK):
            if not self._send(jobs[start : start + CHUNK]):
                return

    def _remind(self) -> None:
        """Notify the user if no job ends because no worker serves the queue."""
        now = time.monotonic()
        if (
            not self._waiting
            or now - max(self._ended_at, self._reminded_at) < REMIND_S
            or self._failing_since is not None
        ):
            return
        self._reminded_at = now
        with contextlib.suppress(HeadraceError):
            if lost := self._reader.find_lost(self._waiting):  # their records are gone, so they are sent again
                self._notify(f"{len(lost)} jobs have lost their messages, as after `celery purge`; they are sent again")
            status = self._reader.status()
            for model in sorted({job.model for *_, job in self._waiting.values()}):
                if not status.serves(model):
                    self._notify(
                        f"{len(self._waiting)} jobs wait and no worker serves queue {keys.queue(model)}; "
                        "start one with `celery -A headrace.worker worker`"
                    )

    def _notify_rate_limited(self, message: str) -> None:
        """Notify the user, but not again within REMIND_S."""
        if time.monotonic() - self._reminded_at >= REMIND_S:
            self._reminded_at = time.monotonic()
            self._notify(message)
