"""Celery's Redis result backend, made to keep a finished result until Redis takes it."""

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
    """Retries whatever Redis says.

    The stock backend retries lost connections only; a Redis that is full, loading, or read-only for a moment answers
    with an error of another kind, and a result that took minutes to compute would become a failure.
    """

    #: Set by a pool that ends the process where the user lacks a right, and puts the message back.
    gives_up = False
    #: Called for each failed operation that is tried again.
    on_retry: Callable[[], None] = staticmethod(lambda: None)

    def exception_safe_to_retry(self, exc: BaseException) -> bool:
        """Called by Celery after a failed operation, with `result_backend_always_retry`."""
        if self.gives_up and is_forbidden(exc):
            return False
        again = isinstance(exc, (redis.RedisError, OSError))
        if again:
            self.on_retry()
        return again

    def _store_result(self, task_id: str, result: Any, state: str, *args: Any, **named: Any) -> Any:
        """Called by Celery for each change of a task. One that has ended stays as it ended.

        Stock Celery lets only a success stand: a worker that was cut off from Redis would put its success in the place
        of the cancelling that another has stored meanwhile.
        """
        if state in READY_STATES and self._get_task_meta_for(task_id)["status"] in READY_STATES:
            return result
        return super()._store_result(task_id, result, state, *args, **named)

    def record(self, job_id: str, outcome: Result | BaseException) -> str:
        """The result record of a job, exactly as this backend would store it for a task of that id."""
        if isinstance(outcome, Result):
            state = SUCCESS
            value = outcome.model_dump(mode="json")
        else:
            state = REVOKED if isinstance(outcome, TaskRevokedError) else FAILURE
            value = self.encode_result(outcome, state)
        meta = self._get_result_meta(value, state, traceback=None, request=None)
        record: str = self.encode({**meta, "task_id": job_id})
        if len(record) > self._MAX_STR_VALUE_SIZE:
            return self.record(job_id, JobFailed("result_too_large", "the result is larger than Redis takes"))
        return record


class EmbeddedResultBackend(ResultBackend, EmbeddedBackend):
    """The same where the embedded server is looked up for each connection."""


class SentinelResultBackend(ResultBackend, SentinelBackend):
    """The same where Sentinels say which Redis to write to."""
