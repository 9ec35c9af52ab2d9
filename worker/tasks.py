"""The Celery tasks: one job in a message, or several. Their bodies work in any pool."""

from __future__ import annotations

from typing import Any

from celery import Celery, Task, signals
from celery.exceptions import Reject

from headrace.client.wire.celery import GROUP_TASK_NAME, TASK_NAME
from headrace.client.wire.errors import JobError
from headrace.config import Settings
from headrace.worker.engine.errors import EngineStopped
from headrace.worker.jobs.service import service_for
from headrace.worker.queue.messages import argument, model_of


def add_tasks(app: Celery, settings: Settings) -> None:
    """Register `headrace.generate` and `headrace.generate_many` with the app."""

    # `shared=False`: another app in this process must not get a task that is bound to these settings.
    # `throws`: a failed job is an expected outcome, so Celery logs it without a traceback.
    @app.task(bind=True, name=TASK_NAME, shared=False, throws=(JobError,), resultrepr_maxsize=1)  # type: ignore[untyped-decorator]
    def generate(self: Task, request: dict[str, Any]) -> dict[str, Any]:
        try:
            model, look_up = model_of(self.request.delivery_info), not self.request.is_eager
            return service_for(settings).generate(self.request.id, request, model, look_up)
        except EngineStopped as stopped:
            raise Reject(str(stopped), requeue=True) from stopped

    # The message itself has no result: each of its jobs has one, under its own id.
    @app.task(bind=True, name=GROUP_TASK_NAME, shared=False, ignore_result=True)  # type: ignore[untyped-decorator]
    def generate_many(self: Task, jobs: list[dict[str, Any]]) -> None:
        try:
            model = model_of(self.request.delivery_info)
            service_for(settings).generate_many(jobs, app.backend.record, model)
        except EngineStopped as stopped:
            raise Reject(str(stopped), requeue=True) from stopped

    def end_jobs(request: Any, **_: Any) -> None:
        service_for(settings).end_revoked(argument(GROUP_TASK_NAME, request.args, request.kwargs), app.backend.record)

    signals.task_revoked.connect(end_jobs, sender=generate_many, weak=False)
