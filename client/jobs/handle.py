"""A handle on a job: small, and rebuilt from its id alone."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from headrace.client.jobs.stream import Event, Reader
from headrace.client.wire.requests import Result, State
from headrace.client.wire.results import Outcome, outcome_state

if TYPE_CHECKING:
    import numpy as np

    from headrace.client.client import Client


class Handle:
    """What a job's handles have in common: its id, and its outcome once that is known."""

    def __init__(self, job_id: str, url: str) -> None:
        self.id = job_id
        self._url = url
        self._outcome: Outcome | None = None

    def __repr__(self) -> str:
        state = outcome_state(self._outcome) if self._outcome is not None else ""
        return f"<{type(self).__name__} {self.id} {state}".rstrip() + ">"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Handle) and other.id == self.id

    def __hash__(self) -> int:
        return hash(self.id)

    def _answer(self) -> Result:
        """The result; raises what the job ended with instead. Its outcome has to be known."""
        if isinstance(self._outcome, Result):
            return self._outcome
        assert self._outcome is not None  # noqa: S101
        raise self._outcome.about(self)


class Job(Handle):
    """One job. Get it from `submit`, or from `Client.job(id)` in any process that reaches the same Redis."""

    def __init__(self, job_id: str, client: Client) -> None:
        super().__init__(job_id, client.url)
        self._client = client

    def status(self) -> State:
        """Where the job is now: queued, running, succeeded, failed, cancelled or expired.

        Raises:
            UnknownJob: there is no such job.
            RedisUnreachable: Redis does not answer.
        """
        if self._outcome is None:
            self._outcome, state = self._client._look(self.id)
            if self._outcome is None:
                return state
        return outcome_state(self._outcome)

    def result(self, timeout: float | None = None) -> Result:
        """Wait for the result, at most `timeout` seconds (None: as long as it takes).

        Raises:
            JobFailed, JobCancelled, JobExpired: the job ended without a result.
            NoWorker: it is not there in time, and no worker serves the queue.
            ResultTimeout: it is not there in time.
            UnknownJob: there is no such job.
            RedisUnreachable: Redis does not answer.
        """
        self.wait(timeout)
        return self._answer()

    def wait(self, timeout: float | None = None) -> State:
        """Wait until the job has ended, in whatever way: succeeded, failed, cancelled or expired.

        Raises:
            NoWorker, ResultTimeout, UnknownJob, RedisUnreachable: as for `result`.
        """
        if self._outcome is None:
            for news in self._client._watch([self.id], timeout):
                self._outcome = news.outcomes.get(self.id)
        return self.status()

    def stream(self, timeout: float | None = None) -> Iterator[Event]:
        """The text as it comes, from the start however late one looks; the last event carries the result.

        Submit with `stream=True` for that. Of another job, or one that has ended, the text comes in one piece a sample.
        Each token comes once and in order, through lost connections and restarts of workers and of Redis.

        Raises:
            StreamChanged: the job was computed again, by a machine that rounds differently.
            JobError, ResultTimeout, UnknownJob, RedisUnreachable: as `result`; `timeout` is for all of it.
        """
        reader = Reader(self)
        if self._outcome is None:
            for news in self._client._watch([self.id], timeout, events=True):
                self._outcome = news.outcomes.get(self.id)
                for entry in news.events.get(self.id, ()):
                    yield from reader.take(entry)
        yield from reader.finish(self._answer())

    def checkpoints(self, *, max_bytes: int | None = None) -> dict[str, np.ndarray]:
        """The tensors that the job kept because it was submitted with `checkpoints`, by name; needs numpy, not torch.

        Arrays named as in `client.wire.requests.CHECKPOINT_TENSORS`, in float32 whatever the model computes in.

        Args:
            max_bytes: what is read at most; None reads all there is, which may be hundreds of megabytes.

        Raises:
            NoCheckpoints: there are none, or not any more.
            InvalidRequest: they take more than `max_bytes`.
            RedisUnreachable: Redis does not answer.
        """
        return self._client._checkpoints(self.id, max_bytes)

    def cancel(self) -> bool:
        """Ask for the job to be cancelled. A running one stops at its next token, a queued one when a worker meets it.

        Returns whether it could still have an effect. Raises UnknownJob, RedisUnreachable.
        """
        return self._client.cancel(self.id)
