"""`headrace status` and its exit codes, which health checks use, with workers that exist as records only."""

from __future__ import annotations

import json
import socket

import pytest
import redis
from click.testing import CliRunner

from headrace.client.wire import keys
from headrace.client.wire.redis import connect
from headrace.worker.cli import main
from headrace.worker.jobs.store import RedisStore

HERE = f"{socket.gethostname()}-7"
STALLED = {"stalled": 1, "step_age_s": 99.0}


@pytest.fixture
def url(redis_url: str, monkeypatch: pytest.MonkeyPatch) -> str:
    own = redis_url.replace("db=0", "db=8")
    connect(own).flushdb()
    monkeypatch.setenv("HEADRACE_REDIS_URL", own)
    return own


@pytest.mark.parametrize(
    ("workers", "everywhere", "here"),
    [
        ({}, 3, 3),
        ({HERE: {}}, 0, 0),
        ({"elsewhere-7": {}}, 0, 3),
        ({HERE: STALLED}, 1, 1),
        ({HERE: {}, "elsewhere-7": STALLED}, 1, 0),
        ({HERE: STALLED, "elsewhere-7": {}}, 1, 1),
        ({HERE: {"model": "another"}}, 3, 3),
        ({HERE: {}, f"{HERE.rpartition('-')[0]}-8": STALLED}, 1, 1),
        ({f"{HERE.rpartition('-')[0]}-and-more-7": {}}, 0, 3),
    ],
    ids=["none", "one", "elsewhere", "stalled", "stalled elsewhere", "stalled here", "another model", "two", "host"],
)
def test_exit_codes_say_who_serves(
    url: str, workers: dict[str, dict[str, str | int | float]], everywhere: int, here: int
) -> None:
    store = RedisStore(connect(url), result_ttl_s=60, checkpoint_ttl_s=60)
    for name, record in workers.items():
        store.heartbeat(name, {"model": "demo", "slots": 4, "running": 0, "waiting": 0, "tokens_per_s": 0.0, **record})
    for flags, code in (([], everywhere), (["--here"], here)):
        shown = CliRunner().invoke(main, ["status", *flags])
        assert shown.exit_code == code, shown.output
        as_json = CliRunner().invoke(main, ["status", "--json", *flags])
        assert as_json.exit_code == code
        own = {name for name in workers if name.rpartition("-")[0] == HERE.rpartition("-")[0]}
        assert {worker["name"] for worker in json.loads(as_json.stdout)["workers"]} == (own if flags else set(workers))
        if code == 1:
            assert "restart the worker" in shown.output


def test_without_redis_it_is_code_3(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HEADRACE_REDIS_URL", "redis://localhost:1/0")
    shown = CliRunner().invoke(main, ["status", "--here"])
    assert shown.exit_code == 3


def test_a_worker_without_a_heartbeat_is_not_listed(url: str) -> None:
    connection: redis.Redis = connect(url)
    RedisStore(connection, result_ttl_s=60, checkpoint_ttl_s=60).heartbeat(HERE, {"model": "demo"})
    connection.delete(keys.worker(HERE))  # as Redis does when its lifetime is over
    assert CliRunner().invoke(main, ["status", "--here"]).exit_code == 3


@pytest.mark.parametrize(
    "spoilt",
    [
        {"fingerprint": b"\xff"},
        {"tokens_per_s": "nan"},
        {"started_at": "inf"},
        {"rows": "[" * 100_000},
        {"rows": '[{"job": "\\ud83d"}]'},
        {"failures": "5"},
        {"slots": "many"},
    ],
)
def test_a_workers_record_that_cannot_be_read_hides_no_other(url: str, spoilt: dict[str, str | bytes]) -> None:
    connection: redis.Redis = connect(url)
    for name in (HERE, "spoilt-1"):
        RedisStore(connection, result_ttl_s=60, checkpoint_ttl_s=60).heartbeat(name, {"model": "demo"})
    connection.hset(keys.worker("spoilt-1"), mapping=dict(spoilt))
    shown = CliRunner().invoke(main, ["status", "--json"])
    assert [worker["name"] for worker in json.loads(shown.stdout)["workers"]] == [HERE], shown.output
    assert CliRunner().invoke(main, ["status"]).exit_code == 0


def test_a_key_that_another_program_has_given_another_type_hides_no_worker(url: str) -> None:
    connection: redis.Redis = connect(url)
    for name, model in ((HERE, "demo"), ("other-1", "other")):
        RedisStore(connection, result_ttl_s=60, checkpoint_ttl_s=60).heartbeat(name, {"model": model})
    for key in (keys.queue_lists("other")[0], keys.dead(), keys.unacked()):
        connection.set(key, "not a list")
    shown = json.loads(CliRunner().invoke(main, ["status", "--json"]).stdout)
    assert {worker["name"] for worker in shown["workers"]} == {HERE, "other-1"}
    assert [queue["model"] for queue in shown["queues"]] == ["demo", "other"]
    assert shown["dead"] is None
    connection.delete(keys.workers())
    connection.set(keys.workers(), "not a set")
    assert json.loads(CliRunner().invoke(main, ["status", "--json"]).stdout)["workers"] == []
