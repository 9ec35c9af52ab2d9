"""Ends the process when it cannot continue. Its unacknowledged messages go to another worker."""

from __future__ import annotations

import traceback
from collections.abc import Callable

import redis
import structlog
from celery.platforms import EX_FAILURE
from celery.worker import state

from headrace.client.wire.errors import RedisUnsuitable
from headrace.client.wire.redis import connect, resolve_url
from headrace.config import Settings
from headrace.worker.engine.errors import ModelUnavailable
from headrace.worker.queue.permissions import MissingPermissions, check_permissions, is_forbidden

log = structlog.get_logger("headrace.worker")


class ProcessFailure:
    """Records that this process failed, and tells Celery to end it with an exit code other than 0."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._forbidden = False
        #: The process cannot continue: it must not end as if nothing was wrong.
        self.failed = False
        #: The cause is known not to be a job: the jobs inside the engine need not keep their attempts.
        self.crash_is_ours = False
        #: Called with the reason when a model cannot be loaded.
        self.on_unavailable: Callable[[str], None] = lambda _: None

    def end_process(self, error: BaseException) -> None:
        """End this process because of an error. May be called from any thread, and repeatedly."""
        known, self._forbidden = self._forbidden, is_forbidden(error)
        self.crash_is_ours = self._forbidden or isinstance(error, (ModelUnavailable, RedisUnsuitable))
        self.failed = True
        state.should_stop = EX_FAILURE  # Celery turns `should_terminate` into exit code 0
        if isinstance(error, ModelUnavailable):
            self.log_unavailable(error)
        elif isinstance(error, RedisUnsuitable):
            log.error("redis.unsuitable", error=str(error))
        elif not self._forbidden:
            log.error("worker.failed", error=repr(error), trace=traceback.format_exc())
        elif not known:
            log.error("redis.forbidden", error=str(error), hint=self._missing_rights())

    def log_unavailable(self, error: ModelUnavailable) -> None:
        """Log that a model cannot be loaded. The error says what to do, so no traceback is needed."""
        model, kind = self._settings.models.get(error.name, error.name), type(error.reason).__name__
        log.error("worker.model_failed", model=model, error=str(error), kind=kind)
        self.on_unavailable(str(error))

    def _missing_rights(self) -> str:
        """What to do about a missing permission. It names all missing ones if Redis still answers."""
        try:
            with connect(resolve_url(self._settings)) as connection:
                check_permissions(connection, self._settings.models)
        except (MissingPermissions, redis.RedisError) as missing:
            return str(missing)
        return str(MissingPermissions(["do that"]))
