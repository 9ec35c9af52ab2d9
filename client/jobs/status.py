"""What goes on: queues by priority, workers and their slots."""

from __future__ import annotations

import json
from typing import Annotated, Any, NamedTuple, cast

import redis
from pydantic import BaseModel, BeforeValidator, ConfigDict, ValidationError

from headrace.client.wire import keys
from headrace.client.wire.requests import JOBS_HEADER
from headrace.config.settings import slug

#: Messages that are looked into for how many jobs they hold; the others are taken to be like them.
SAMPLE = 32


class RowStatus(BaseModel):
    """A sample that a worker computes: it reads its prompt, then it writes."""

    #: `keys.tag` of its job.
    job: str
    #: Seconds since it got its slot.
    age_s: float
    #: Tokens of the prompt, and how many of them have been read.
    prompt: int
    read: int
    #: New tokens, and the most there may be.
    written: int
    most: int


class FailureStatus(BaseModel):
    """A job that could not be computed: `keys.tag` of it, its code, and the Unix time."""

    job: str
    code: str
    at: float


def _parsed(value: Any) -> Any:
    return json.loads(value) if isinstance(value, str) else value


class WorkerStatus(BaseModel):
    """What a worker last said of itself. One that serves several models speaks of each apart, as HOST-PID@MODEL."""

    model_config = ConfigDict(extra="ignore")

    name: str
    model: str
    #: False while the model is out of memory because nobody asked for it.
    loaded: bool = True
    fingerprint: str = ""
    slots: int = 0
    running: int = 0
    waiting: int = 0
    tokens_per_s: float = 0.0
    #: Tokens that were guessed since the worker began, and how many of them turned out right.
    drafted: int = 0
    accepted: int = 0
    started_at: float = 0.0
    beat_at: float = 0.0
    #: How long the engine had been at its present step; `stalled` if that is longer than HEADRACE_STALL_S.
    step_age_s: float = 0.0
    stalled: bool = False
    #: What is in its slots.
    rows: Annotated[list[RowStatus], BeforeValidator(_parsed)] = []
    #: The last jobs that failed there.
    failures: Annotated[list[FailureStatus], BeforeValidator(_parsed)] = []

    @property
    def host(self) -> str:
        """The machine it runs on."""
        return self.name.partition("@")[0].rpartition("-")[0]


class QueueStatus(BaseModel):
    """Jobs that wait in Redis, not yet with a worker, by priority.

    A message of several jobs counts whole until the last of them is done, wherever it waits; where there are more than
    SAMPLE messages the number is an estimate. For a user who may not read the queue (config/redis-users.acl) each
    message counts as one job.
    """

    model: str
    interactive: int = 0
    normal: int = 0
    bulk: int = 0

    @property
    def total(self) -> int:
        """All priorities together."""
        return self.interactive + self.normal + self.bulk


class Status(BaseModel):
    """Everything at one moment. `delivered` are the jobs that workers hold, running or about to; `dead` the messages
    that none could understand, of all queues.

    For a user who may not look at what workers hold, `delivered` are the samples that workers said they had, and
    `dead` is None.
    """

    workers: list[WorkerStatus]
    queues: list[QueueStatus]
    delivered: int
    dead: int | None = None

    def serves(self, model_name: str) -> bool:
        """Whether a live worker takes jobs for the model and comes on with them."""
        return any(worker.model == model_name and not worker.stalled for worker in self.workers)

    def stalled(self, model_name: str) -> list[str]:
        """The workers of the model whose engine does not come on."""
        return [worker.name for worker in self.workers if worker.model == model_name and worker.stalled]


def read_status(connection: redis.Redis, model_name: str) -> Status:
    """Read the status: the queue of `model_name` and those of all live workers."""
    names = cast("list[str]", connection.zrange(keys.workers(), 0, -1))
    pipe = connection.pipeline(transaction=False)
    for name in names:
        pipe.hgetall(keys.worker(name))
    records = pipe.execute(raise_on_error=False)  # what is of another type is no worker's
    # A worker that died has no record any more, though its name may still stand in the index.
    workers = [worker for name, record in zip(names, records, strict=True) if (worker := _worker(name, record))]
    models = sorted({model_name, *(worker.model for worker in workers)})
    try:
        delivered, dead = _count_delivered(connection), connection.llen(keys.dead())
    except redis.exceptions.NoPermissionError:
        delivered, dead = sum(worker.running + worker.waiting for worker in workers), None
    queues = [queue_status(connection, model) for model in models]
    return Status(workers=workers, queues=queues, delivered=delivered, dead=dead)


class Served(NamedTuple):
    """Models by name: those of live workers, and those that some worker served within `keys.KNOWN_MODEL_S`."""

    now: set[str]
    lately: set[str]


def read_served(connection: redis.Redis) -> Served | None:
    """What is served; None if the user may not know. Raises redis.RedisError."""
    try:
        pipe = connection.pipeline(transaction=False)
        pipe.zrange(keys.workers(), 0, -1)
        pipe.zrange(keys.models(), 0, -1)
        names, lately = pipe.execute()
        for name in names:
            pipe.hget(keys.worker(name), "model")
        found = pipe.execute(raise_on_error=False)
    except redis.exceptions.NoPermissionError:
        return None
    return Served(_named(found), _named(lately))


def _named(models: list[Any]) -> set[str]:
    """Without what is no name of a model, which a stranger wrote."""
    return {model for model in models if isinstance(model, str) and model == slug(model)}


def _worker(name: str, record: Any) -> WorkerStatus | None:
    """What a worker said; None if it says nothing any more, or nothing that a worker would."""
    if not isinstance(record, dict) or "model" not in record:
        return None
    try:
        return WorkerStatus.model_validate({**record, "name": name})
    except ValidationError:
        return None


def queue_status(connection: redis.Redis, model: str) -> QueueStatus:
    """Jobs that wait for a model, by priority."""
    first, second, third, fourth = count_queued(connection, model)  # step 6 is nobody's name and counts as bulk
    return QueueStatus(model=model, interactive=first, normal=second, bulk=third + fourth)


def count_queued(connection: redis.Redis, model: str) -> list[int]:
    """Jobs that wait for a model, one number for each of `keys.queue_lists`."""
    try:
        return _count_by_samples(connection, keys.queue_lists(model))
    except redis.exceptions.NoPermissionError:
        pipe = connection.pipeline(transaction=False)
        for name in keys.queue_lists(model):
            pipe.llen(name)
        return cast("list[int]", pipe.execute())


def _count_by_samples(connection: redis.Redis, names: list[str]) -> list[int]:
    pipe = connection.pipeline(transaction=False)
    for name in names:
        pipe.llen(name)
        pipe.lrange(name, 0, SAMPLE // 2 - 1)  # both ends: floods of single jobs and of groups come one after the other
        pipe.lrange(name, -SAMPLE // 2, -1)
    answers = pipe.execute()
    counts = []
    for length, newest, oldest in zip(answers[::3], answers[1::3], answers[2::3], strict=True):
        known = newest[: max(0, length - len(oldest))] + oldest  # a short list would give its middle twice
        counts.append(_scaled(length, [_jobs_in(message) for message in known]))
    return counts


def _count_delivered(connection: redis.Redis) -> int:
    pipe = connection.pipeline(transaction=False)
    pipe.hlen(keys.unacked())
    pipe.hrandfield(keys.unacked(), SAMPLE, withvalues=True)
    length, sample = pipe.execute()
    return _scaled(length, [_jobs_in(entry) for entry in sample[1::2]])


def _scaled(length: int, sample: list[int]) -> int:
    return round(sum(sample) * length / len(sample)) if sample else length


def _jobs_in(message: str) -> int:
    """How many jobs a message holds, as kombu writes it in a queue or in its list of those delivered.

    1 for what cannot be read. A job takes at least a character, whatever the message claims.
    """
    try:
        raw = json.loads(message)
        raw = raw[0] if isinstance(raw, list) else raw
        return max(1, min(int(raw["headers"].get(JOBS_HEADER, 1)), len(message)))
    except (ValueError, LookupError, TypeError, AttributeError, OverflowError, RecursionError):
        return 1
