"""A handle on a job: small, and rebuilt from its id alone."""

from __future__ import annotations

from typing import TYPE_CHECKING

from client.records import Outcome, outcome_state
from client.schema import Result, State

if TYPE_CHECKING:
    import numpy as np

    from client.client import Client


class Job:
    """One job. Get it from `submit`, or from `Client.job(id)` in any process that reaches the same Redis."""

    def __init__(self, job_id: str, client: Client) -> None:
        self.id = job_id
        self._client = client
        self._outcome: Outcome | None = None

    def __repr__(self) -> str:
        return f"<Job {self.id} {outcome_state(self._outcome) if self._outcome is not None else ''}".rstrip() + ">"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Job) and other.id == self.id

    def __hash__(self) -> int:
        return hash(self.id)

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
        if self._outcome is None:
            self._outcome = self._client._wait(self.id, timeout)
        if isinstance(self._outcome, Result):
            return self._outcome
        self._outcome.job = self
        raise self._outcome

    def checkpoints(self) -> dict[str, np.ndarray]:
        """The tensors that the job kept because it was submitted with `checkpoints`, by name; needs numpy, not torch.

        Arrays named as in `client.schema.CHECKPOINT_TENSORS`, in float32 whatever the model computes in.

        Raises:
            NoCheckpoints: there are none, or not any more.
            RedisUnreachable: Redis does not answer.
        """
        return self._client._checkpoints(self.id)

    def cancel(self) -> bool:
        """Ask for the job to be cancelled. A running one stops at its next token, a queued one when a worker meets it.

        Returns whether it could still have an effect. Raises UnknownJob, RedisUnreachable.
        """
        return self._client.cancel(self.id)
