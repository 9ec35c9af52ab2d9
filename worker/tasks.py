"""The tasks: one job a message, or several. Their bodies do not know which pool runs them."""

from __future__ import annotations

from typing import Any

from celery import Celery, Task, signals
from celery.exceptions import Reject

from headrace.client.wire import keys
from headrace.client.wire.celery import GROUP_TASK_NAME, TASK_NAME
from headrace.client.wire.errors import JobError
from headrace.config import Settings
from headrace.worker.engine.errors import EngineStopped
from headrace.worker.jobs.service import service_for


def add_tasks(app: Celery, settings: Settings) -> None:
    """Register `headrace.generate` and `headrace.generate_many` with the app."""

    # `shared=False`: another app in this process must not get a task that is bound to this one's settings.
    # `throws`: a failed job is an outcome, not an accident of the worker; Celery logs it without a traceback.
    @app.task(bind=True, name=TASK_NAME, shared=False, throws=(JobError,), resultrepr_maxsize=1)  # type: ignore[untyped-decorator]
    def generate(self: Task, request: dict[str, Any]) -> dict[str, Any]:
        try:
            return service_for(settings).generate(self.request.id, request, model_of(self.request.delivery_info))
        except EngineStopped as stopped:
            raise Reject(str(stopped), requeue=True) from stopped

    # The results are those of its jobs, under their ids; the message itself has none.
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


def model_of(delivery_info: Any) -> str | None:
    """The model of the queue by which a message came, if it came by one; anybody may have written the message."""
    queue = delivery_info.get("routing_key") if isinstance(delivery_info, dict) else None
    return keys.model_of(queue) if isinstance(queue, str) else None


def argument(task: str, args: Any, kwargs: Any) -> Any:
    """What a message gives to a task of ours, or None; anybody may have written it."""
    if isinstance(args, (list, tuple)) and args:
        return args[0]
    return kwargs.get("jobs" if task == GROUP_TASK_NAME else "request") if isinstance(kwargs, dict) else None
