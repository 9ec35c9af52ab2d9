"""The window without a worker. tests/integration/test_batch.py tests it with a real Redis."""

from __future__ import annotations

from pathlib import Path

import pytest

from headrace.client import Client, QueueFull, RedisRefused, RedisUnreachable
from headrace.client.batch import window
from headrace.client.batch.window import MAX_INFLIGHT, Window
from headrace.client.jobs.prepared import PreparedJob


class Enough(Exception):
    """Ends a wait that would last forever."""


def wait(client: Client, turns: int = 3) -> list[str]:
    """The notices while one job waits to be submitted."""
    told: list[str] = []
    left = [turns]

    def tick() -> None:
        left[0] -= 1
        if not left[0]:
            raise Enough

    under_test: Window[int] = Window(client, notify=told.append, tick=tick)
    with pytest.raises(Enough):
        list(under_test.run([(1, client.submitter.prepare({"prompt": "a", "id": "a"}))]))
    assert under_test.outstanding == 0
    return told


def test_an_outage_of_redis_is_waited_for_and_reported_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(window, "RETRY_S", 0.0)
    with Client(redis_url=f"unix://{tmp_path}/redis.sock?db=0") as client:
        (said,) = wait(client)
    assert "cannot be reached" in said
    assert said.endswith("waiting for it")


def failing(error: Exception) -> Client:
    """A client whose submissions raise."""

    def fail(jobs: list[PreparedJob]) -> None:
        raise error

    client = Client(redis_url="redis://localhost:1/0")
    client.submitter.submit = fail  # type: ignore[method-assign]
    return client


def test_a_redis_that_is_full_is_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(window, "RETRY_S", 0.0)
    with failing(RedisRefused("redis://localhost:1/0", "OOM command not allowed")) as full:
        (said,) = wait(full)
    assert "OOM" in said
    with failing(QueueFull("headrace.demo", 9, 9)) as queue_full:
        assert wait(queue_full) == []  # not unusual; reported only if it lasts


@pytest.mark.parametrize(
    "error",
    [
        RedisRefused("redis://localhost:1/0", "NOPERM this user has no permissions"),
        RedisUnreachable("rediss://localhost:1/0", "certificate verify failed"),
        RedisUnreachable("redis://localhost:1/0", "invalid username-password pair"),
    ],
)
def test_permanent_errors_are_raised(error: Exception) -> None:
    with failing(error) as client, pytest.raises(type(error)):
        list(Window[int](client).run([(1, client.submitter.prepare({"prompt": "a", "id": "a"}))]))


def test_errors_of_single_jobs_are_returned_in_their_place() -> None:
    with Client(redis_url="redis://localhost:1/0") as client:
        errors = [ValueError(str(number)) for number in range(3 * MAX_INFLIGHT)]
        given = [pair for pairs in Window[int](client, ordered=True).run(enumerate(errors)) for pair in pairs]
    assert given == list(enumerate(errors))
