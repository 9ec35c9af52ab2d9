"""The one task. Its body does not know which pool runs it."""

from __future__ import annotations

from typing import Any

from celery import Celery, Task
from celery.exceptions import Reject

from client.errors import JobError
from client.schema import TASK_NAME
from config import Settings
from worker.errors import EngineStopped
from worker.service import service_for


def add_tasks(app: Celery, settings: Settings) -> None:
    """Register `millrace.generate` with the app."""

    # `shared=False`: another app in this process must not get a task that is bound to this one's settings.
    # `throws`: a failed job is an outcome, not an accident of the worker; Celery logs it without a traceback.
    @app.task(bind=True, name=TASK_NAME, shared=False, throws=(JobError,), resultrepr_maxsize=1)  # type: ignore[untyped-decorator]
    def generate(self: Task, request: dict[str, Any]) -> dict[str, Any]:
        try:
            return service_for(settings).generate(self.request.id, request)
        except EngineStopped as stopped:
            raise Reject(str(stopped), requeue=True) from stopped
