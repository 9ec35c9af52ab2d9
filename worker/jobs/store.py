"""What the worker keeps in Redis beside Celery's own records.

Celery's result record is the truth about how a job ended. Here is what happens before that: the state of a job,
requests to cancel it, the leases of messages, and the records of workers.
"""

from __future__ import annotations

from collections.abc import Container, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

from headrace.client.wire.results import State

#: A worker whose last heartbeat is older than this many seconds counts as gone.
WORKER_TTL_S = 15


@dataclass(frozen=True)
class JobRecord:
    """What Redis knows about a job when its message arrives.

    Attributes:
        finished: it has ended: the message is a repetition, and there is nothing to compute.
        cancelled: a client asked to cancel it.
        attempts: how often it went to an engine that neither ended it nor returned it.
        state: the state of a job that has not ended, as its record says.
        mark: the submitter's `client.wire.signing.mark`, which the record contains if the job is signed.
        begun_elsewhere: a worker that is alive began the last attempt. Unless the message was delivered before, it has
            another copy of the message, and the attempt is not one that ended with its process.
    """

    finished: bool
    cancelled: bool
    attempts: int = 0
    state: str | None = None
    mark: str | None = None
    begun_elsewhere: bool = False


class Waiting(NamedTuple):
    """A job that waits: the model of its queue, and the Unix time of its ETA, if it has one."""

    model: str
    until: float | None


class Store(Protocol):
    """The records of jobs and workers. With Redis, every method but `now` may raise redis.RedisError."""

    def now(self) -> float:
        """Return the Unix time in seconds on the clock that all clients and workers share: that of Redis."""
        ...

    def lookup(self, job_ids: Sequence[str]) -> list[JobRecord]:
        """Return what is known about jobs, in their order."""
        ...

    def count_attempts(self, job_ids: Sequence[str], worker: str = "", shared: Container[str] = ()) -> list[int]:
        """Count an attempt for jobs that are about to go to the engine. Returns how many each has had.

        Args:
            worker: the `WorkerRecord.identity` of the process that begins them.
            shared: jobs that another live worker computes too: they are not counted a second time.
        """
        ...

    def announce(self, jobs: Mapping[str, Waiting]) -> None:
        """Record that jobs are queued, if nobody has: a plain Celery producer writes no record."""
        ...

    def started(self, job_ids: Iterable[str], worker: str) -> None:
        """Record that jobs have a slot."""
        ...

    def returned(self, job_ids: Iterable[str], attempted: Iterable[str]) -> None:
        """Record that jobs return to the queue unfinished. For those in `attempted` the last attempt does not count."""
        ...

    def ended(self, job_ids: Iterable[str], state: State | None = None) -> None:
        """Record that the results of jobs are stored, and how they ended if that is known.

        Their records expire when the results do.
        """
        ...

    def finish(self, records: Mapping[str, str]) -> None:
        """Store Celery's result records by job id, as Celery's backend does, and record that the jobs ended.

        All are stored or none. The result of a job that has ended before is not changed.
        """
        ...

    def save_tensors(self, job_id: str, tensors: Mapping[str, bytes]) -> None:
        """Store the checkpoint tensors of a job, each as safetensors bytes, in place of earlier ones."""
        ...

    def append_events(self, events: Mapping[str, str]) -> list[str]:
        """Append an event, which is JSON, to the stream of each job. Returns the jobs whose event was refused."""
        ...

    def cancelled(self, job_ids: Sequence[str]) -> set[str]:
        """Return those of the jobs that a client asked to cancel."""
        ...

    def ends(self, job_ids: Sequence[str]) -> tuple[set[str], set[str]]:
        """Return those of the jobs that have ended, and those that a client asked to cancel."""
        ...

    def renew(self, delivery_tags: Iterable[str]) -> None:
        """Renew the leases of messages, so that no other worker takes them."""
        ...

    def lost(self, delivery_tags: Sequence[str]) -> set[str]:
        """Return those of the messages that have no lease any more: it ran out, and another worker has the message."""
        ...

    def fill_index(self) -> None:
        """Move the jobs that clients have submitted into the lists of their owners, some thousands at a time."""
        ...

    def prune_index(self) -> bool:
        """Remove expired jobs from the index, some at a time. Returns whether there are likely to be more."""
        ...

    def heartbeat(self, worker: str, record: Mapping[str, str | int | float], adapters: Iterable[str] = ()) -> None:
        """Write the record of a live worker, and that it serves the record's `model` with these adapters."""
        ...

    def fingerprints(self, model_name: str) -> dict[str, str]:
        """Return the fingerprints of the workers that serve a model, by the name of their record."""
        ...

    def queued(self, model_name: str) -> dict[str, int]:
        """Return how many jobs for a model no worker holds, by priority. For a long queue this is an estimate."""
        ...

    def deregister(self, worker: str) -> None:
        """Remove the record of a worker that ends."""
        ...
