"""The record in Redis that says what this worker is doing."""

from __future__ import annotations

import json
import os
import secrets
import socket
import time
from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any

import redis
import structlog

from headrace.client.wire import keys
from headrace.client.wire.adapters import MAX_ADAPTERS, AdapterStatus
from headrace.client.wire.clock import SKEW_S
from headrace.client.wire.fingerprints import different_models
from headrace.worker.jobs.deliveries import DeliveryBook
from headrace.worker.jobs.health import Health
from headrace.worker.jobs.store import Store

if TYPE_CHECKING:
    from headrace.worker.engine.engine import Engine
    from headrace.worker.engine.registry import ModelRegistry
    from headrace.worker.engine.stats import SequenceStats

log = structlog.get_logger("headrace.worker")

#: A record describes this many running samples at most.
SHOWN_ROWS = 256
#: The fields of an engine that is not loaded. The record is a hash, so fields that are not written keep their values.
NOT_LOADED: dict[str, str | int | float] = {
    "fingerprint": "",
    "running": 0,
    "tokens_per_s": 0.0,
    "step_age_s": 0.0,
    "rows": "[]",
    "description": "",
}

#: A failed job as the record shows it: its tag, its error code and the time `at`, by this machine's clock.
Failure = Mapping[str, str | float]


class WorkerRecord:
    """Writes one record for each model, as if each were served by a worker of its own.

    Args:
        store: keeps the records.
        models: the engines.
        book: says how many jobs wait for a model that is not loaded.
        health: says whether an engine is stalled.
        slots: how many samples an engine computes at the same time.
        failures: the last failures by model.
        scheduled: counts the jobs of a model that wait for their ETA or for a rate limit.
        summary: says how jobs of a model ended, and how long they took; see `JobCounts.summary`.
    """

    def __init__(
        self,
        store: Store,
        models: ModelRegistry,
        book: DeliveryBook,
        health: Health,
        *,
        slots: int,
        failures: Mapping[str, Iterable[Failure]],
        scheduled: Callable[[str], int] = lambda _: 0,
        summary: Callable[[str], Mapping[str, Any]] = lambda _: {},
    ) -> None:
        self._store, self._models, self._book, self._health = store, models, book, health
        self._slots, self._failures, self._scheduled = slots, failures, scheduled
        self._summary = summary
        #: The name of this worker.
        self.name = f"{socket.gethostname()}-{os.getpid()}"
        self._began_at = time.monotonic()
        self._process = secrets.token_hex(8)
        self._skew_told = False
        self._compared: dict[str, str] = {}  # model -> the fingerprint that was compared with other workers'
        self._last_tokens: dict[str, int] = {}
        self._adapters: dict[str, list[AdapterStatus]] = {}  # of every model that was ever loaded
        self._written_at = time.monotonic()

    def write(self, now: float, *, stalled: bool) -> None:
        """Write the records. `now` is the monotonic clock's. Raises redis.RedisError."""
        engines, passed_s = self._models.loaded, max(1e-9, now - self._written_at)
        self._written_at = now
        redis_now = self._store.now()
        skew_s = time.time() - redis_now
        self._tell_skew(skew_s)
        for model in self._models.names:
            self._store.heartbeat(
                self._name_for(model),
                {
                    "model": model,
                    "slots": self._slots,
                    "process": self._process,
                    "started_at": round(redis_now - (now - self._began_at)),
                    "clock_skew_s": round(skew_s, 1),
                    "stalled": int(stalled),
                    "scheduled": self._scheduled(model),
                    "loaded": int(model in engines),
                    "failures": json.dumps([_by_redis(failure, skew_s) for failure in self._failures[model]]),
                    **{name: json.dumps(value) for name, value in self._summary(model).items()},
                    **self._engine_fields(model, engines.get(model), passed_s),
                },
                [each.name for each in self._adapters.get(model, ())],
            )
            if model in engines:
                self._compare(model, engines[model].fingerprint)

    def _compare(self, model: str, fingerprint: str) -> None:
        """Log if another worker serves a different model under this name. Once for each model that is loaded."""
        if self._compared.get(model) == fingerprint:
            return
        self._compared[model] = fingerprint
        own = self._name_for(model)
        models = different_models(self._store.fingerprints(model) | {own: fingerprint})
        if here := next((parts for parts, workers in models.items() if own in workers), ""):
            others = "; ".join(f"{parts} by {', '.join(ws)}" for parts, ws in models.items() if parts != here)
            log.warning("model.differs", model=model, here=here, others=others)

    def remove(self) -> None:
        """Remove the records. If Redis does not answer, they expire soon."""
        try:
            for model in self._models.names:
                self._store.deregister(self._name_for(model))
        except redis.RedisError as error:
            log.warning("redis.unanswered", error=str(error))

    def _tell_skew(self, skew_s: float) -> None:
        """Log once that the clocks differ. What Celery itself does, such as `eta`, goes by this machine's."""
        skewed = abs(skew_s) > SKEW_S
        if skewed and not self._skew_told:
            log.warning("clock.differs", skew_s=round(skew_s, 1))
        self._skew_told = skewed

    def identity(self, model: str) -> str:
        """The record's name and a mark of this process: another process on this host may get the same name."""
        return f"{self._name_for(model)} {self._process}"

    def _name_for(self, model: str) -> str:
        return self.name if len(self._models.names) == 1 else keys.worker_of(self.name, model)

    def _engine_fields(self, model: str, engine: Engine | None, passed_s: float) -> dict[str, str | int | float]:
        if engine is None:
            waiting = {"waiting": self._book.held_jobs(model)}
            return {**NOT_LOADED, **waiting, **self._adapter_fields(model, None)}
        stats = engine.stats()
        rate = max(0, stats.tokens - self._last_tokens.get(model, 0)) / passed_s
        self._last_tokens[model] = stats.tokens
        return {
            "fingerprint": engine.fingerprint,
            "description": engine.description.model_dump_json(),
            "running": stats.running,
            "waiting": stats.waiting,
            "tokens_per_s": round(rate, 1),
            "drafted": stats.proposed,
            "accepted": stats.accepted,
            "step_age_s": round(self._health.stalled_for_s or stats.step_age_s, 1),
            "rows": json.dumps([_row_fields(row) for row in engine.running_sequences()[:SHOWN_ROWS]]),
            **self._adapter_fields(model, stats.adapters),
        }

    def _adapter_fields(self, model: str, adapters: Iterable[Any] | None) -> dict[str, str]:
        """The adapters of a model, those in memory first; `adapters` is None while the model is not loaded.

        They are not known before it was loaded for the first time.
        """
        if adapters is not None:
            found = [AdapterStatus.model_validate(each, from_attributes=True) for each in adapters]
            self._adapters[model] = sorted(found, key=lambda each: (not each.loaded, each.name))[:MAX_ADAPTERS]
        elif model in self._adapters:
            self._adapters[model] = [AdapterStatus(name=each.name) for each in self._adapters[model]]
        else:
            return {}
        return {"adapters": json.dumps([each.model_dump(exclude_defaults=True) for each in self._adapters[model]])}


def _by_redis(failure: Failure, skew_s: float) -> Failure:
    return {**failure, "at": round(float(failure["at"]) - skew_s, 1)}


def _row_fields(row: SequenceStats) -> dict[str, str | int | float]:
    """What the record says of a running sample. People who may not read the job may read the record."""
    return {
        "job": keys.tag(row.job_id),
        "age_s": round(row.age_s, 1),
        "prompt": row.prompt,
        "read": row.read,
        "written": row.written,
        "most": row.most,
    }
