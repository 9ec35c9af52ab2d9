"""The consumer for the engine's pool: it takes messages by the number of jobs that the pool holds."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any

from headrace.client.wire import keys
from headrace.client.wire.celery import GROUP_TASK_NAME, TASK_NAME
from headrace.client.wire.errors import JobFailed
from headrace.worker.queue.consumer import SafeConsumer
from headrace.worker.queue.permissions import is_forbidden
from headrace.worker.queue.redaction import RedactedRequest


class JobPool(ABC):
    """What `EngineConsumer` needs of a pool, beside Celery's own interface. Called in the main thread."""

    @abstractmethod
    def has_room(self, model: str | None = None) -> bool:
        """Whether another message may be taken for the model; without a name, for any model."""

    @abstractmethod
    def refuse(self, job_ids: Sequence[str], error: JobFailed) -> None:
        """Fail the jobs that a refused message names."""

    @abstractmethod
    def revoke(self, request: Any, reason: str) -> None:
        """End the jobs of a message that was revoked or has expired."""

    @abstractmethod
    def finish_within(self, seconds: float) -> None:
        """A cold shutdown begins: running jobs may take this many seconds to finish."""

    @abstractmethod
    def end_process(self, error: BaseException) -> None:
        """End the worker process, because it cannot continue."""


class JobRequest(RedactedRequest):
    """Celery's Request for a message of jobs, which leaves the end of a revoked message to the pool.

    Stock Celery stores the end and acknowledges the message at once, in the main thread, which would block while Redis
    is away; and the message's jobs would end after it.
    """

    settle_by_tag: Callable[[Any], None]
    pool: JobPool
    _already_revoked: bool

    def terminate(self, pool: Any, signal: Any = None) -> None:  # noqa: ARG002
        """Called by Celery's remote control, whether the task is running or not."""
        self._announce_revoked("terminated", True, None, False)

    def _announce_revoked(self, reason: str, terminated: bool, signum: int | None, expired: bool) -> None:
        """Called by Celery when it finds that the task is revoked."""
        if not self._already_revoked:
            self._already_revoked = True
            self.settle_by_tag(self)
            self.send_event("task-revoked", terminated=terminated, signum=signum, expired=expired)
            self.pool.revoke(self, reason)


class EngineConsumer(SafeConsumer):
    """A `SafeConsumer` whose pool is a `JobPool`."""

    pool: JobPool
    keeps_time_limits = True

    def _has_room(self, queue: str) -> bool:
        return self.pool.has_room(keys.model_of(queue))

    def _fail_jobs(self, job_ids: Sequence[str], error: JobFailed) -> None:
        self.pool.refuse(job_ids, error)

    def _permission_denied(self, error: BaseException) -> None:
        self.pool.end_process(error)

    def _not_settled(self, error: Exception) -> None:
        if is_forbidden(error):
            self.pool.end_process(error)

    def _request_class(self, task_name: str) -> type[RedactedRequest]:
        if task_name not in (TASK_NAME, GROUP_TASK_NAME):
            return super()._request_class(task_name)
        hooks = {"settle_by_tag": staticmethod(self._settle_by_tag), "pool": self.pool}
        return type("JobRequest", (JobRequest,), hooks)

    def cancel_active_requests(self) -> None:
        """Called by Celery in a cold shutdown before it stops the pool, which returns what is not finished in time."""
        self.pool.finish_within(self.app.headrace_settings.soft_shutdown_s)

    def on_ready(self) -> None:
        """Called by Celery whenever it begins to consume: at the start and after each reconnect."""
        self._limit_by_jobs()
        super().on_ready()

    def _limit_by_jobs(self) -> None:
        """Take messages by the number of jobs that the pool holds. Celery counts messages, which may hold many jobs."""
        qos = self.task_consumer.channel.qos  # of this connection; Celery's `worker_disable_prefetch` does the same
        has_credit = qos.can_consume
        qos.can_consume = lambda: self.pool.has_room() and has_credit()
        self.hub.on_tick.add(self._catch_up)  # a set, so adding it again changes nothing

    def _catch_up(self) -> None:
        channel = getattr(self.task_consumer, "channel", None)
        if channel is not None and not channel.closed:
            channel.catch_up()


def make_consumer(*args: Any, pool: Any, **kwargs: Any) -> SafeConsumer:
    """Celery's setting `worker_consumer`: the consumer that fits the pool."""
    return (EngineConsumer if isinstance(pool, JobPool) else SafeConsumer)(*args, pool=pool, **kwargs)
