"""Repeats requests to Redis until it answers."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TypeVar

import redis
import structlog

from headrace.worker.jobs.store import Store
from headrace.worker.queue.permissions import is_forbidden

log = structlog.get_logger("headrace.worker")

T = TypeVar("T")

#: Seconds before a request is repeated that Redis did not answer or refused.
RETRY_S = 0.5


def retry_until_available(
    ask: Callable[[], T],
    *,
    give_up: Callable[[redis.RedisError], bool] = lambda _: False,
    on_retry: Callable[[], None] = lambda: None,
) -> T:
    """Call `ask` until it raises no redis.RedisError; raise the error if `give_up` says so."""
    while True:
        try:
            return ask()
        except redis.RedisError as error:
            if give_up(error):
                raise
            log.warning("redis.unanswered", error=str(error))
            on_retry()
            time.sleep(RETRY_S)


class PatientStore:
    """Asks the store until Redis answers, unless the worker is closing."""

    def __init__(self, store: Store) -> None:
        self._store = store
        #: The worker is closing: each request is sent once.
        self.closing = False

    def ask(self, question: Callable[[Store], T]) -> T | None:
        """Return the answer, or None if the worker is closing and Redis does not answer.

        Raises:
            redis.RedisError: the Redis user lacks a permission.
        """
        try:
            return retry_until_available(
                lambda: question(self._store), give_up=lambda error: self.closing or is_forbidden(error)
            )
        except redis.RedisError:
            if self.closing:
                return None
            raise
