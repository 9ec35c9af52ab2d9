"""Celery's Redis result backend, changed so that it keeps a finished result until Redis has stored it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import redis
from celery.backends.redis import RedisBackend, SentinelBackend
from celery.exceptions import TaskRevokedError
from celery.states import FAILURE, READY_STATES, REVOKED, SUCCESS

from headrace.client.wire.celery import TASK_NAME
from headrace.client.wire.embedded_redis import EmbeddedBackend
from headrace.client.wire.errors import JobError, JobFailed
from headrace.client.wire.results import Result
from headrace.worker.queue.permissions import is_forbidden


class ResultBackend(RedisBackend):
    """Retries every error of Redis, and records the end of every job.

    The stock backend retries lost connections only. A Redis that is full, loading or briefly read-only answers with
    another kind of error, and a result that took minutes to compute would become a failure.

    For a message that was sent with `ignore_result=True` the stock backend stores nothing. Without a record nobody
    knows that the job has ended: it would stay `running`, and would be computed again if its message is redelivered.
    So a record is stored that contains the state and the error, and no text.
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

    def mark_as_done(
        self, task_id: str, result: Any, request: Any = None, store_result: bool = True, state: str = SUCCESS
    ) -> None:
        """Called by Celery's tracer for a task that succeeded; without `store_result` the sender ignores the result."""
        ignored = not store_result or (request is not None and request.ignore_result)
        if ignored and _is_job(request):
            self.store_result(task_id, None, state, request=request)
        super().mark_as_done(task_id, result, request=request, store_result=store_result, state=state)

    def mark_as_failure(
        self,
        task_id: str,
        exc: BaseException,
        traceback: Any = None,
        request: Any = None,
        store_result: bool = True,
        call_errbacks: bool = True,
        state: str = FAILURE,
    ) -> None:
        """Called by Celery for a task that failed; without `store_result` the sender ignores the result."""
        if not store_result and _is_job(request):
            without_text = type(exc)(exc.code, exc.message) if isinstance(exc, JobError) else exc
            self.store_result(task_id, without_text, state, traceback=traceback, request=request)
        super().mark_as_failure(task_id, exc, traceback, request, store_result, call_errbacks, state)

    def mark_as_revoked(
        self, task_id: str, reason: str = "", request: Any = None, store_result: bool = True, state: str = REVOKED
    ) -> None:
        """Called by Celery for a task that was revoked or has expired, whether or not the sender ignores the result."""
        super().mark_as_revoked(task_id, reason, request, store_result or _is_job(request), state)

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


def _is_job(request: Any) -> bool:
    """Whether a task is one job of a queue: not a task of Celery's own, and not run without a broker."""
    return request is not None and request.task == TASK_NAME and not request.is_eager


class EmbeddedResultBackend(ResultBackend, EmbeddedBackend):
    """The same backend for the embedded Redis, whose address is looked up for each connection."""


class SentinelResultBackend(ResultBackend, SentinelBackend):
    """The same backend for a Redis that Sentinels monitor."""
