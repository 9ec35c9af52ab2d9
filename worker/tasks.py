"""The Celery tasks: one job in a message, or several. Their bodies work in any pool."""

from __future__ import annotations

from typing import Any

from celery import Celery, Task, signals
from celery._state import get_current_worker_task
from celery.exceptions import Reject

from headrace.client.wire.celery import GROUP_TASK_NAME, TASK_NAME
from headrace.client.wire.errors import JobError
from headrace.config import Settings
from headrace.worker.engine.errors import EngineStopped
from headrace.worker.jobs.service import service_for
from headrace.worker.queue.messages import argument, model_of


class JobTask(Task):  # type: ignore[misc]
    """A task whose queue names the model that computes it."""

    def apply(self, *args: Any, queue: Any = None, **options: Any) -> Any:
        """Compute the task in this process. Celery would ignore the queue."""
        if queue is not None:
            options["routing_key"] = getattr(queue, "name", queue)
        return super().apply(*args, **options)


def _model(request: Any) -> str | None:
    """The model of a task's queue, or of the queue of the task that calls it (`celery.map` calls it directly)."""
    caller = get_current_worker_task() if request.called_directly else None
    return model_of(caller.request.delivery_info if caller is not None else request.delivery_info)


def add_tasks(app: Celery, settings: Settings) -> None:
    """Register `headrace.generate` and `headrace.generate_many` with the app."""

    # `shared=False`: another app in this process must not get a task that is bound to these settings.
    # `throws`: a failed job is an expected outcome, so Celery logs it without a traceback.
    @app.task(bind=True, base=JobTask, name=TASK_NAME, shared=False, throws=(JobError,), resultrepr_maxsize=1)  # type: ignore[untyped-decorator]
    def generate(self: Task, request: dict[str, Any]) -> dict[str, Any]:
        try:
            return service_for(settings).generate(self.request.id, request, _model(self.request))
        except EngineStopped as stopped:
            raise Reject(str(stopped), requeue=True) from stopped

    # The message itself has no result: each of its jobs has one, under its own id.
    @app.task(bind=True, base=JobTask, name=GROUP_TASK_NAME, shared=False, ignore_result=True)  # type: ignore[untyped-decorator]
    def generate_many(self: Task, jobs: list[dict[str, Any]]) -> None:
        try:
            model = _model(self.request)
            service_for(settings).generate_many(jobs, app.backend.record, model)
        except EngineStopped as stopped:
            raise Reject(str(stopped), requeue=True) from stopped

    def end_jobs(request: Any, **_: Any) -> None:
        service_for(settings).end_revoked(argument(GROUP_TASK_NAME, request.args, request.kwargs), app.backend.record)

    signals.task_revoked.connect(end_jobs, sender=generate_many, weak=False)
