"""Celery's Redis result backend, changed so that it keeps a finished result until Redis has stored it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import redis
from celery.backends.redis import RedisBackend, SentinelBackend
from celery.exceptions import TaskRevokedError
from celery.states import FAILURE, READY_STATES, REVOKED, SUCCESS

from headrace.client.wire.embedded_redis import EmbeddedBackend
from headrace.client.wire.errors import JobFailed
from headrace.client.wire.results import Result
from headrace.worker.queue.permissions import is_forbidden


class ResultBackend(RedisBackend):
    """Retries every error of Redis.

    The stock backend retries lost connections only. A Redis that is full, loading or briefly read-only answers with
    another kind of error, and a result that took minutes to compute would become a failure.
    """

    #: Do not retry if the Redis user lacks a permission. Set by the pool, which ends the process for this error and
    #: returns the message to its queue.
    fail_fast = False
    #: Called for each failed operation that is retried.
    on_retry: Callable[[], None] = staticmethod(lambda: None)

    def exception_safe_to_retry(self, exc: BaseException) -> bool:
        """Called by Celery after a failed operation, because `result_backend_always_retry` is set."""
        if self.fail_fast and is_forbidden(exc):
            return False
        retry = isinstance(exc, (redis.RedisError, OSError))
        if retry:
            self.on_retry()
        return retry

    def _store_result(self, task_id: str, result: Any, state: str, *args: Any, **named: Any) -> Any:
        """Called by Celery for each change of a task's state. A final state is never overwritten.

        Stock Celery protects a success only: a worker that was cut off from Redis would overwrite a cancellation that
        another worker has stored in the meantime.
        """
        if state in READY_STATES and self._get_task_meta_for(task_id)["status"] in READY_STATES:
            return result
        return super()._store_result(task_id, result, state, *args, **named)

    def record(self, job_id: str, outcome: Result | BaseException) -> str:
        """Encode the result record of a job exactly as this backend would store it for a task with that id."""
        if isinstance(outcome, Result):
            state = SUCCESS
            value = outcome.model_dump(mode="json")
        else:
            state = REVOKED if isinstance(outcome, TaskRevokedError) else FAILURE
            value = self.encode_result(outcome, state)
        meta = self._get_result_meta(value, state, traceback=None, request=None)
        record: str = self.encode({**meta, "task_id": job_id})
        if len(record) > self._MAX_STR_VALUE_SIZE:
            return self.record(job_id, JobFailed("result_too_large", "the result is larger than a Redis string may be"))
        return record


class EmbeddedResultBackend(ResultBackend, EmbeddedBackend):
    """The same backend for the embedded Redis, whose address is looked up for each connection."""


class SentinelResultBackend(ResultBackend, SentinelBackend):
    """The same backend for a Redis that Sentinels monitor."""
