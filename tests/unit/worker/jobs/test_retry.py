"""Requests to Redis are repeated until it answers, except where that would not help."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import redis

from headrace.worker.jobs import retry
from headrace.worker.jobs.retry import PatientStore, retry_until_available
from tests.unit.worker.jobs.memory_store import MemoryStore

AWAY = redis.ConnectionError("away")
DENIED = redis.exceptions.NoPermissionError("this user has no permissions")


@pytest.fixture(autouse=True)
def _fast(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(retry, "RETRY_S", 0.0)


def after(*errors: redis.RedisError) -> Callable[..., str]:
    """A request that raises these errors first and then succeeds."""
    left = list(errors)

    def ask(*_: Any) -> str:
        if left:
            raise left.pop(0)
        return "answer"

    return ask


def test_requests_are_repeated_until_redis_answers() -> None:
    retries: list[None] = []
    errors = (AWAY, redis.ResponseError("OOM"), AWAY)
    assert retry_until_available(after(*errors), on_retry=lambda: retries.append(None)) == "answer"
    assert len(retries) == 3


def test_an_error_for_which_give_up_is_true_is_raised() -> None:
    with pytest.raises(redis.ResponseError, match="OOM"):
        retry_until_available(
            after(AWAY, redis.ResponseError("OOM")), give_up=lambda error: isinstance(error, redis.ResponseError)
        )


def test_a_closing_worker_sends_each_request_once() -> None:
    store = PatientStore(MemoryStore())
    assert store.ask(after(AWAY, AWAY)) == "answer"
    store.closing = True
    assert store.ask(after(AWAY)) is None
    assert store.ask(after(DENIED)) is None
    assert store.ask(after()) == "answer"


def test_a_missing_permission_is_raised_at_once() -> None:
    with pytest.raises(redis.exceptions.NoPermissionError):
        PatientStore(MemoryStore()).ask(after(DENIED))
