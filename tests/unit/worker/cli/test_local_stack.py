"""When a command uses the workers that run, when it starts a local stack, and which errors pass through."""

from __future__ import annotations

from typing import Any, Self

import pytest

from headrace.client import RedisUnreachable
from headrace.config import Settings, load_settings
from headrace.worker.cli.local_stack import NothingRuns, find_or_start_stack


class StubClient:
    """A client whose Redis has a worker for one model, or does not answer."""

    def __init__(self, served: str | None) -> None:
        self.served, self.workers = served, list[Any]()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.served = None

    def status(self) -> Self:
        if self.served is None:
            raise RedisUnreachable("unix:///none", "it does not exist")
        return self

    def serves(self, model: str) -> bool:
        return model == self.served


def find(settings: Settings, served: str | None) -> Any:
    return find_or_start_stack(settings, lambda _: StubClient(served))  # type: ignore[arg-type, return-value]


def test_workers_that_run_are_used() -> None:
    with find(load_settings(), "demo") as stack:
        assert not stack.local
        stack.supervise()


def test_an_error_of_the_command_passes_through() -> None:
    """Even a RedisUnreachable, which would start a local stack if it were raised before the block."""
    error = RedisUnreachable("unix:///none", "it has gone away")
    with pytest.raises(RedisUnreachable) as caught, find(load_settings(), "demo"):
        raise error
    assert caught.value is error


def test_nothing_is_started_beside_a_redis_that_was_named() -> None:
    settings = load_settings(redis_url="redis://localhost:1/0")
    with pytest.raises(NothingRuns, match=r"no worker serves headrace\.demo"), find(settings, "another"):
        pass
    with pytest.raises(RedisUnreachable), find(settings, None):
        pass
