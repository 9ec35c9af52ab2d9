"""A short form of `python -m tests.chaos.batch`."""

from __future__ import annotations

from tests.chaos.batch import storm


def test_a_batch_is_whole_and_right_though_client_worker_and_redis_are_killed() -> None:
    verdict = storm(150, seed=1, deaths=3)
    assert verdict.correct, verdict
    assert dict(verdict.deaths) == {"client": 1, "worker": 1, "redis": 1}
    assert verdict.starts >= 2
    assert verdict.exit_code == 1  # some lines must fail
