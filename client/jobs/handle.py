"""Handles on jobs. A handle is small, and can be made from a job id in any process."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING, Any, TypeVar

from headrace.client.jobs.reading import JobReader
from headrace.client.jobs.stream import Event, StreamReader
from headrace.client.wire.errors import HeadraceError, InvalidRequest, JobLost, RedisFailed, ResultTimeout, UnknownJob
from headrace.client.wire.requests import is_job_id
from headrace.client.wire.results import Outcome, Result, State, outcome_state
from headrace.client.wire.unicode import check_unicode
from headrace.client.wire.values import show

if TYPE_CHECKING:
    import numpy as np


class Handle:
    """The common part of `Job` and `AsyncJob`.

    Attributes:
        id: the job id.
        url: the Redis where the job is.
        outcome: the result or the error of the job; None until this handle has read it.
        accepted: Redis had the job when this handle submitted or read it; if it has it no more, the job is lost.

    Raises:
        InvalidRequest: the id is not valid Unicode.
    """

    def __init__(self, job_id: str, url: str, *, accepted: bool = False) -> None:
        check_unicode(job_id, "job")
        self.id = job_id
        self.url = url
        self.accepted = accepted
        self.outcome: Outcome | None = None

    def __repr__(self) -> str:
        state = outcome_state(self.outcome) if self.outcome is not None else ""
        return f"<{type(self).__name__} {self.id} {state}".rstrip() + ">"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Handle) and other.id == self.id

    def __hash__(self) -> int:
        return hash(self.id)

    def answer(self) -> Result:
        """The result of a job whose outcome is known. Raises JobError if it ended without one."""
        if isinstance(self.outcome, Result):
            return self.outcome
        assert self.outcome is not None  # noqa: S101
        raise self.outcome.about(self)


class Job(Handle):
    """A job. `submit` returns one, and so does `Client.job(id)` in any process that reaches the same Redis."""

    def __init__(self, job_id: str, reader: JobReader, *, accepted: bool = False) -> None:
        super().__init__(job_id, reader.url, accepted=accepted)
        self._reader = reader

    def status(self) -> State:
        """The state of the job: queued, running, succeeded, failed, cancelled or expired.

        Raises:
            UnknownJob: there is no such job.
            JobLost: there was one when this handle was used before, and Redis has lost it.
            RedisUnreachable: Redis does not answer.
        """
        if self.outcome is None:
            with self._in_errors():
                self.outcome, state = self._reader.poll(self.id)
            self.accepted = True
            if self.outcome is None:
                return state
        return outcome_state(self.outcome)

    def waits_until(self) -> float | None:
        """The Unix time of the ETA or countdown that the job was sent to Celery with; None if it does not wait for one.

        Until then the job is `queued`, and no worker begins it. Raises RedisUnreachable.
        """
        if self.status() != "queued":
            return None
        with self._in_errors():
            return self._reader.waits_until(self.id)

    def result(self, timeout: float | None = None) -> Result:
        """Wait for the result, for at most `timeout` seconds; None waits without limit.

        Raises:
            JobFailed, JobCancelled, JobExpired: the job ended without a result.
            NoWorker: it has not ended in time, and no worker serves its queue.
            ResultTimeout: it has not ended in time.
            UnknownJob: there is no such job.
            JobLost: there was one, and Redis has lost it: it was flushed, has restarted without its data, or evicts.
            RedisUnreachable: Redis does not answer.
        """
        self.wait(timeout)
        return self.answer()

    def wait(self, timeout: float | None = None) -> State:
        """Wait until the job has succeeded, failed, was cancelled or has expired. Returns that state.

        Raises:
            NoWorker, ResultTimeout, UnknownJob, JobLost, RedisUnreachable: as for `result`.
        """
        if self.outcome is None:
            with self._in_errors():
                for updates in self._reader.updates([self.id], timeout, accepted=self._accepted_ids()):
                    self.outcome = updates.outcomes.get(self.id)
        return self.status()

    def stream(self, timeout: float | None = None) -> Iterator[Event]:
        """Yield the text while it is generated, always from its beginning. The last event has the result.

        Submit the job with `stream=True`. The text of any other job arrives when the job has ended, in one event for
        each sample. Each token arrives once and in order, even if connections are lost and workers or Redis restart.

        Raises:
            StreamChanged: the job was computed again, on a machine that rounds differently.
            JobError, ResultTimeout, UnknownJob, JobLost, RedisUnreachable: as for `result`; `timeout` is for the whole
                stream.
        """
        reader = StreamReader(self.id)
        with self._in_errors():
            if self.outcome is None:
                for updates in self._reader.updates([self.id], timeout, events=True, accepted=self._accepted_ids()):
                    self.outcome = updates.outcomes.get(self.id)
                    for entry in updates.events.get(self.id, ()):
                        yield from reader.take(entry)
            yield from reader.finish(self.answer())

    def checkpoints(self, *, max_bytes: int | None = None) -> dict[str, np.ndarray]:
        """The captured tensors of a job that was submitted with `checkpoints`, by name. Needs numpy, not torch.

        The names are those of `client.wire.activations.CHECKPOINT_TENSORS`. All arrays are float32, whatever dtype the
        model computes in.

        Args:
            max_bytes: read at most this many bytes; None reads all, which may be hundreds of megabytes.

        Raises:
            NoCheckpoints: the job has none, or they have expired.
            InvalidRequest: they take more than `max_bytes`.
            RedisUnreachable: Redis does not answer.
        """
        with self._in_errors():
            return self._reader.checkpoints(self.id, max_bytes)

    def cancel(self) -> bool:
        """Cancel the job: a running one stops at its next token, and one that waits ends at once; see `Client.cancel`.

        Returns whether the job had not ended yet. Raises UnknownJob, JobLost, RedisUnreachable.
        """
        with self._in_errors():
            return self._reader.cancel([self.id])[0]

    def _accepted_ids(self) -> list[str]:
        return [self.id] if self.accepted else []

    def _in_errors(self) -> contextlib.AbstractContextManager[None]:
        return job_in_errors(lambda _: self)


@contextlib.contextmanager
def job_in_errors(make_job: Callable[[str], Handle]) -> Iterator[None]:
    """In errors that are raised in the block, replace job ids with handles: in `job`, and in `accepted` of RedisFailed.

    An unknown job whose handle says that Redis had it is a lost job.

    Args:
        make_job: makes or finds a handle from a job id.
    """
    try:
        yield
    except HeadraceError as error:
        job_id = error.job.id if error.job is not None else getattr(error, "job_id", None)
        if job_id is not None:
            error.about(make_job(job_id))
            error.job.accepted |= isinstance(error, (ResultTimeout, JobLost))
            if type(error) is UnknownJob and error.job.accepted:
                raise JobLost(error.job_id).about(error.job) from None
        if isinstance(error, RedisFailed):
            error.accepted = {index: make_job(job_id_of(job)) for index, job in error.accepted.items()}
        raise


def job_id_of(job: Any) -> str:
    """The id of a job, or the id itself. Raises InvalidRequest for anything else."""
    job_id = job.id if isinstance(job, Handle) else job
    if not is_job_id(job_id):
        raise InvalidRequest("job", show(job_id), "a job, or its id")
    return job_id


H = TypeVar("H", bound=Handle)


def by_id(jobs: Iterable[H]) -> dict[str, H]:
    """Jobs by their ids. Raises InvalidRequest if they are no jobs."""
    try:
        given = list(jobs)
    except TypeError:
        raise InvalidRequest("jobs", show(jobs), "a list of jobs") from None
    for job in given:
        if not isinstance(job, Handle):
            raise InvalidRequest("jobs", show(job), "jobs; client.job(id) makes one of an id")
    return {job.id: job for job in given}


def check_same_redis(jobs: Iterable[Handle], url: str) -> None:
    """Refuse jobs of another Redis. Raises InvalidRequest."""
    for job in jobs:
        if job.url != url:
            raise InvalidRequest("jobs", f"job {job.id} of another Redis", "jobs of this client")
