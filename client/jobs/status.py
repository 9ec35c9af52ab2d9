"""The status of the whole system: queues by priority, workers and their slots."""

from __future__ import annotations

import time
from typing import Annotated, Any

import redis
from pydantic import BaseModel, BeforeValidator, ConfigDict, ValidationError

from headrace.client.wire import keys
from headrace.client.wire.adapters import AdapterStatus, differences
from headrace.client.wire.clock import RedisClock
from headrace.client.wire.errors import InvalidRequest
from headrace.client.wire.fingerprints import different_models
from headrace.client.wire.misplaced import Misplaced, find_misplaced
from headrace.client.wire.model_description import ModelDescription
from headrace.client.wire.queue_depth import QueueStatus, count_delivered, execute_typed, queue_status
from headrace.client.wire.suitability import ServerReport
from headrace.client.wire.unicode import check_unicode, parse_json


class RowStatus(BaseModel):
    """A sequence in a slot of a worker: first its prompt is read, then new tokens are generated."""

    model_config = ConfigDict(allow_inf_nan=False)

    #: `keys.tag` of the job id.
    job: str
    #: Seconds since the sequence got its slot.
    age_s: float
    #: Number of prompt tokens, and how many of them have been read.
    prompt: int
    read: int
    #: Number of new tokens, and its maximum.
    written: int
    most: int


class FailureStatus(BaseModel):
    """A job that failed: `keys.tag` of the job id, the error code, and the Unix time in seconds by Redis' clock."""

    model_config = ConfigDict(allow_inf_nan=False)

    job: str
    code: str
    at: float


class EndedCounts(BaseModel):
    """How many jobs ended in each state since a worker started."""

    succeeded: int = 0
    failed: int = 0
    cancelled: int = 0
    expired: int = 0


class LatencyStatus(BaseModel):
    """Latencies of the last jobs that succeeded, from their arrival in the engine: the 50th, 90th and 99th percentile
    in seconds; empty before the first job succeeded.
    """

    model_config = ConfigDict(allow_inf_nan=False)

    #: Number of jobs.
    jobs: int = 0
    #: Until the first token, and until the end.
    first_token_s: list[float] = []
    total_s: list[float] = []


def _parsed(value: Any) -> Any:
    return parse_json(value) if isinstance(value, str) else value


def _described(value: Any) -> Any:
    return (parse_json(value) if value else None) if isinstance(value, str) else value


class WorkerStatus(BaseModel):
    """The last heartbeat of a worker. A worker of several models has one record for each, named HOST-PID@MODEL."""

    model_config = ConfigDict(extra="ignore", allow_inf_nan=False)

    name: str
    model: str
    #: False while the model is unloaded because it was idle.
    loaded: bool = True
    fingerprint: str = ""
    slots: int = 0
    running: int = 0
    waiting: int = 0
    #: Jobs that the worker has taken and that wait for their ETA or countdown, or for a rate limit of Celery.
    scheduled: int = 0
    tokens_per_s: float = 0.0
    #: Tokens proposed by speculative decoding since the worker started, and how many of them were accepted.
    drafted: int = 0
    accepted: int = 0
    #: Unix times in seconds, by Redis' clock.
    started_at: float = 0.0
    beat_at: float = 0.0
    #: How many seconds the clock of the worker's machine is ahead of Redis'.
    clock_skew_s: float = 0.0
    #: Seconds that the engine had spent in its current step; `stalled` if that is more than HEADRACE_STALL_S.
    step_age_s: float = 0.0
    stalled: bool = False
    #: The sequences in its slots.
    rows: Annotated[list[RowStatus], BeforeValidator(_parsed)] = []
    #: The jobs that failed there most recently.
    failures: Annotated[list[FailureStatus], BeforeValidator(_parsed)] = []

    #: How the jobs ended since the worker started, and how long the last ones took. Older workers do not say.
    ended: Annotated[EndedCounts, BeforeValidator(_parsed)] = EndedCounts()
    latency: Annotated[LatencyStatus, BeforeValidator(_parsed)] = LatencyStatus()

    #: What the worker understood of the model's files; None if the model is not loaded, or from an older worker.
    description: Annotated[ModelDescription | None, BeforeValidator(_described)] = None

    #: Its LoRA adapters, those in memory first. None if it does not say: the model has not been loaded since the worker
    #: started, or the worker is of an earlier version.
    adapters: Annotated[list[AdapterStatus] | None, BeforeValidator(_parsed)] = None

    @property
    def host(self) -> str:
        """The host on which the worker runs."""
        return self.name.partition("@")[0].rpartition("-")[0]


class Status(BaseModel):
    """Queues and workers at one moment.

    Attributes:
        delivered: jobs that workers have taken and not finished. For a Redis user without the right to count them it is
            the number of sequences in the heartbeats.
        dead: messages of all queues that no worker could read; None for a Redis user without the right to count them.
        misplaced: lists with messages for these models that no worker reads, as far as the Redis user may read them.
        at: the Unix time in seconds by Redis' clock, to which all times in the status refer.
        redis: what Redis says of itself; only in `headrace status`.
    """

    workers: list[WorkerStatus]
    queues: list[QueueStatus]
    delivered: int
    dead: int | None = None
    misplaced: list[Misplaced] = []
    at: float = 0.0
    redis: ServerReport | None = None

    def serves(self, model_name: str) -> bool:
        """Whether a live worker that is not stalled serves the model."""
        return any(worker.model == model_name and not worker.stalled for worker in self.workers)

    def different_models(self, model_name: str) -> dict[str, list[str]]:
        """The different models that workers serve under this name, with their workers; empty if they are the same."""
        served = {w.name: w.fingerprint for w in self.workers if w.model == model_name}
        return different_models(served)

    def different_adapters(self, model_name: str) -> list[str]:
        """On which adapters the workers of the model disagree, a phrase for each; empty if they have the same."""
        workers = {w.name: w.adapters for w in self.workers if w.model == model_name and w.adapters is not None}
        return differences(workers)

    def stalled(self, model_name: str) -> list[str]:
        """The names of the model's workers whose engine is stalled."""
        return [worker.name for worker in self.workers if worker.model == model_name and worker.stalled]


def read_status(connection: redis.Redis, model_name: str) -> Status:
    """Read the status: all live workers, their queues, and the queue of `model_name`."""
    pipe = connection.pipeline(transaction=False)
    pipe.zrange(keys.workers(), 0, -1)
    (names,) = execute_typed(pipe, [[]])
    clock, sent_at = RedisClock(), time.monotonic()
    pipe.time()
    for name in names:
        pipe.hgetall(keys.worker(name))
    now, *records = pipe.execute(raise_on_error=False)  # a key of another type is not a worker's record
    clock.take(now, sent_at)
    # The record of a dead worker expires before its name is removed from the index.
    workers = [worker for name, record in zip(names, records, strict=True) if (worker := _worker(name, record))]
    models = sorted({model_name, *(worker.model for worker in workers)})
    try:
        delivered = count_delivered(connection)
        pipe.llen(keys.dead())
        (dead,) = execute_typed(pipe, [None])
    except redis.exceptions.NoPermissionError:
        delivered, dead = sum(worker.running + worker.waiting for worker in workers), None
    queues = [queue_status(connection, model) for model in models]
    try:
        misplaced = find_misplaced(connection, models)
    except redis.exceptions.NoPermissionError:
        misplaced = []
    at = round(clock.now(), 3)
    return Status(workers=workers, queues=queues, delivered=delivered, dead=dead, misplaced=misplaced, at=at)


def _worker(name: str, record: Any) -> WorkerStatus | None:
    """The status in a worker's record; None if the record has expired or is not valid."""
    if not isinstance(record, dict) or "model" not in record:
        return None
    try:
        check_unicode([name, record])  # bytes that are not UTF-8 could not be printed
        return WorkerStatus.model_validate({**record, "name": name})
    except (ValidationError, InvalidRequest):
        return None
