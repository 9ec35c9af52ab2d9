"""Celery's Redis result backend, made to keep a finished result until Redis takes it."""

from __future__ import annotations

import redis
from celery.backends.redis import RedisBackend


class ResultBackend(RedisBackend):
    """Retries whatever Redis says.

    The stock backend retries lost connections only; a Redis that is full, loading, or read-only for a moment answers
    with an error of another kind, and a result that took minutes to compute would become a failure.
    """

    def exception_safe_to_retry(self, exc: BaseException) -> bool:
        """Called by Celery after a failed operation, with `result_backend_always_retry`."""
        return isinstance(exc, (redis.RedisError, OSError))
