"""What goes on: queues by priority, workers and their slots."""

from __future__ import annotations

from typing import Any, cast

import redis
from pydantic import BaseModel, ConfigDict

from client import keys


class WorkerStatus(BaseModel):
    """What a worker last said of itself."""

    model_config = ConfigDict(extra="ignore")

    name: str
    model: str
    fingerprint: str = ""
    slots: int = 0
    running: int = 0
    waiting: int = 0
    tokens_per_s: float = 0.0
    started_at: float = 0.0
    beat_at: float = 0.0


class QueueStatus(BaseModel):
    """Jobs that wait in Redis, not yet with a worker, by priority."""

    model: str
    interactive: int = 0
    normal: int = 0
    bulk: int = 0

    @property
    def total(self) -> int:
        """All priorities together."""
        return self.interactive + self.normal + self.bulk


class Status(BaseModel):
    """Everything at one moment. `delivered` are the jobs that workers hold, running or about to."""

    workers: list[WorkerStatus]
    queues: list[QueueStatus]
    delivered: int

    def serves(self, model_name: str) -> bool:
        """Whether a live worker takes jobs for the model."""
        return any(worker.model == model_name for worker in self.workers)


def read_status(connection: redis.Redis, model_name: str) -> Status:
    """Read the status: the queue of `model_name` and those of all live workers."""
    names = cast("list[str]", connection.zrange(keys.workers(), 0, -1))
    pipe = connection.pipeline(transaction=False)
    for name in names:
        pipe.hgetall(keys.worker(name))
    records = cast("list[dict[str, Any]]", pipe.execute())
    # A worker that died has no record any more, though its name may still stand in the index.
    workers = [WorkerStatus(name=name, **rec) for name, rec in zip(names, records, strict=True) if "model" in rec]
    models = sorted({model_name, *(worker.model for worker in workers)})
    pipe = connection.pipeline(transaction=False)
    for model in models:
        for queue_list in keys.queue_lists(model):
            pipe.llen(queue_list)
    pipe.hlen(keys.unacked())
    *depths, delivered = cast("list[int]", pipe.execute())
    return Status(workers=workers, queues=_queues(models, depths), delivered=delivered)


def _queues(models: list[str], depths: list[int]) -> list[QueueStatus]:
    """Depths come four to a model, one for each priority step; step 6 is nobody's name and counts as bulk."""
    queues = []
    for i, model in enumerate(models):
        first, second, third, fourth = depths[4 * i : 4 * i + 4]
        queues.append(QueueStatus(model=model, interactive=first, normal=second, bulk=third + fourth))
    return queues
