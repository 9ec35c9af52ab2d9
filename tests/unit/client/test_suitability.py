"""A Redis that loses jobs is refused with the line to change, before a job is accepted."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import fakeredis
import pytest
import redis
from celery import signals
from celery.exceptions import WorkerShutdown
from celery.platforms import EX_FAILURE
from celery.worker import state
from click.testing import CliRunner

from headrace.client import Client, RedisUnsuitable
from headrace.client.batch.window import Window
from headrace.client.jobs import server_check
from headrace.client.wire import keys
from headrace.client.wire.clock import RedisClock
from headrace.client.wire.redis import connect
from headrace.client.wire.suitability import ServerReport, judge, read_report
from headrace.config import load_settings
from headrace.worker.celery import make_app
from headrace.worker.cli import main
from headrace.worker.queue.consumer import SafeConsumer
from tests.integration.servers import redis_on_a_port

GOOD: dict[str, Any] = {
    "redis_version": "7.2.4",
    "maxmemory_policy": "noeviction",
    "aof_enabled": 1,
    "cluster_enabled": 0,
}

NO_CLUSTER = r"cluster mode.*`cluster-enabled no`"


@pytest.fixture(scope="module")
def port(tmp_path_factory: pytest.TempPathFactory) -> Iterator[int]:
    """A server without persistence. Tests change its policy."""
    with redis_on_a_port(tmp_path_factory.mktemp("cache")) as number:
        yield number


@pytest.fixture
def admin(port: int) -> Iterator[redis.Redis]:
    with connect(f"redis://127.0.0.1:{port}/0") as made:
        yield made
        made.config_set("maxmemory-policy", "noeviction")
        made.config_set("maxmemory", "0")


@pytest.fixture
def url(port: int, admin: redis.Redis, monkeypatch: pytest.MonkeyPatch) -> str:
    """The server's address, which this process has not used yet."""
    monkeypatch.setattr(server_check, "_servers", {})
    monkeypatch.setattr("headrace.worker.queue.server_check._logged", set())
    return f"redis://127.0.0.1:{port}/0"


def report_of(connection: redis.Redis) -> ServerReport:
    return read_report(connection, RedisClock())


@pytest.mark.parametrize("policy", ["allkeys-lru", "allkeys-random", "volatile-lru", "volatile-ttl"])
def test_jobs_are_not_sent_to_a_redis_that_evicts_keys(url: str, admin: redis.Redis, policy: str) -> None:
    admin.config_set("maxmemory-policy", policy)
    admin.config_set("maxmemory", "4mb")
    with Client(redis_url=url) as client:
        for submit in (
            lambda: client.submit("Hello."),
            lambda: client.submit_many(["a"] * 20),
            lambda: next(client.map(["a"])),
            lambda: list(Window[int](client).run([(1, client.submitter.prepare({"prompt": "a"}))])),
        ):
            with pytest.raises(RedisUnsuitable, match=rf"{policy}.*`maxmemory-policy noeviction`.*_UNSUITABLE=allow"):
                submit()
        assert admin.dbsize() == 0, "nothing was queued"
        admin.config_set("maxmemory-policy", "noeviction")
        client.submit("Hello.")  # the client sees that it was mended
    admin.flushdb()


def test_a_client_that_may_use_it_sends_its_jobs(url: str, admin: redis.Redis) -> None:
    admin.config_set("maxmemory-policy", "allkeys-lru")
    with Client(settings=load_settings(redis_url=url, redis_unsuitable="allow")) as client:
        assert client.submit("Hello.").status() == "queued"
    admin.flushdb()


def test_a_cluster_is_refused_by_client_and_worker(tmp_path: Path) -> None:
    with redis_on_a_port(tmp_path, "--cluster-enabled", "yes") as number:
        url = f"redis://127.0.0.1:{number}/0"
        with (
            Client(redis_url=url) as client,
            pytest.raises(RedisUnsuitable, match=NO_CLUSTER),
        ):
            client.submit("Hello.")
        with pytest.raises(SystemExit, match=NO_CLUSTER):
            start_worker(url)


def start_worker(url: str, **more: Any) -> None:
    """What Celery does first when a worker starts."""
    settings = load_settings(redis_url=url, **more)
    worker = SimpleNamespace(app=SimpleNamespace(headrace_settings=settings))
    signals.celeryd_init.send(sender="worker@here", instance=worker, conf=None, options={"pool": "solo"})


def logged(caplog: pytest.LogCaptureFixture) -> list[str]:
    """The events of the worker's log."""
    return [record.msg["event"] for record in caplog.records if isinstance(record.msg, dict)]


def test_a_worker_refuses_it_and_logs_what_is_dangerous_once(
    url: str, admin: redis.Redis, caplog: pytest.LogCaptureFixture
) -> None:
    admin.config_set("maxmemory-policy", "volatile-lru")
    with pytest.raises(SystemExit, match=r"headrace: Redis at .* volatile-lru.*`maxmemory-policy noeviction`"):
        start_worker(url)
    start_worker(url, redis_unsuitable="allow")
    start_worker(url, redis_unsuitable="allow")
    assert logged(caplog) == ["redis.not_durable", "redis.loses_jobs"]


def test_a_worker_that_reconnects_to_another_primary_looks_again(
    url: str, admin: redis.Redis, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After a failover the address leads to another server."""
    app = make_app(load_settings(redis_url=url))
    consumer = SafeConsumer(lambda _: None, app=app, pool=None, controller=SimpleNamespace(use_eventloop=False))
    consumer.connection_for_read().close()
    admin.config_set("maxmemory-policy", "allkeys-lfu")
    monkeypatch.setattr(state, "should_stop", None)
    with pytest.raises(WorkerShutdown) as ended:
        consumer.connection_for_read()
    assert ended.value.code == EX_FAILURE
    app.close()


def test_status_shows_it_and_fails(url: str, admin: redis.Redis, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HEADRACE_REDIS_URL", url)
    shown = CliRunner().invoke(main, ["status"])
    assert shown.exit_code == 3, "no worker"
    assert "maxmemory-policy noeviction, on disk: none" in shown.output
    assert "Redis may lose jobs: it writes nothing to disk" in shown.output
    admin.config_set("maxmemory-policy", "allkeys-lru")
    shown = CliRunner().invoke(main, ["status"])
    assert shown.exit_code == 1
    assert "Redis loses jobs: its maxmemory-policy is allkeys-lru" in shown.output
    as_json = json.loads(CliRunner().invoke(main, ["status", "--json"]).stdout)["redis"]
    assert as_json["eviction"] == "allkeys-lru"
    assert "`maxmemory-policy noeviction`" in as_json["problems"][0]["fix"]


def test_a_client_warns_once_where_nothing_is_written_to_disk(
    url: str, admin: redis.Redis, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            with Client(redis_url=url) as client:
                client.submit("Hello.")
    (said,) = [record.message for record in caplog.records if "disk" in record.message]
    assert "`appendonly yes`" in said
    admin.flushdb()


def test_the_embedded_redis_passes_silently(redis_url: str) -> None:
    with connect(redis_url) as connection:
        report = report_of(connection)
    assert (report.problems, report.warnings, report.unchecked) == ([], [], "")
    assert report.persistence == "append-only file"


def test_many_jobs_cost_one_look(url: str, admin: redis.Redis) -> None:
    def asked() -> int:
        stats: Any = admin.info("commandstats")
        return sum(stats.get(f"cmdstat_{name}", {"calls": 0})["calls"] for name in ("time", "info", "config|get"))

    with Client(redis_url=url) as client:
        client.submit("Hello.")
        before = asked()
        for _ in range(5):
            client.submit("Hello.", timeout_s=60)
        with Client(redis_url=url) as another:
            another.submit("Hello.")
        assert asked() - before == 1, "the question of this test itself"
    admin.flushdb()


@pytest.mark.parametrize(
    ("more", "problem"),
    [
        ({}, ""),
        ({"redis_version": "6.2.0"}, ""),
        ({"redis_version": "255.255.255"}, ""),
        ({"redis_version": "6.0.16"}, "version 6.0"),
        ({"redis_version": "3.0.504"}, "version 3.0"),
        ({"redis_version": "unknown"}, ""),
        ({"server_name": "valkey", "valkey_version": "8.1.0"}, ""),
        (
            {"redis_version": "7.4.0", "dragonfly_version": "df-v1.30", "maxmemory_policy": "eviction"},
            "policy is eviction",
        ),
        ({"maxmemory_policy": "volatile-lru"}, "policy is volatile-lru"),
        ({"cluster_enabled": 1}, "cluster mode"),
        ({"role": "slave", "slave_read_only": 0}, "replica that can be written to"),
        ({"role": "slave", "slave_read_only": 1}, ""),
        ({"role": "master", "slave_read_only": 0}, ""),
        ({"cluster_enabled": 1, "maxmemory_policy": "allkeys-lru"}, "allkeys-lru"),
    ],
)
def test_servers_are_judged_by_what_they_say(more: dict[str, Any], problem: str) -> None:
    problems = "; ".join(map(str, judge({**GOOD, **more}, None).problems))
    assert problem in problems
    assert bool(problem) == bool(problems)


def test_a_server_that_says_little_is_used() -> None:
    report = judge({}, None)
    assert (report.server, report.problems, report.warnings) == (None, [], [])
    assert judge({"valkey_version": "8.1.0", "redis_version": "7.2.4"}, None).server == "valkey 8.1.0"
    assert judge({"aof_enabled": 0}, None).persistence == "snapshots", "where CONFIG is denied"
    assert judge({"aof_enabled": 0}, "3600 1").persistence == "snapshots"
    assert judge({"aof_enabled": 0}, "").persistence == "none"


def test_who_cannot_be_asked_is_used(url: str, admin: redis.Redis, caplog: pytest.LogCaptureFixture) -> None:
    """A user without the right, or a stand-in for tests that has no INFO."""
    assert "unknown command" in report_of(fakeredis.FakeStrictRedis(decode_responses=True)).unchecked
    rights = ["+@all", "-info", "-time", "-config"]
    admin.execute_command("ACL", "SETUSER", "poor", "on", ">secret", "~*", "&*", *rights)
    with connect(url.replace("127", "poor:secret@127")) as poor:
        assert "permissions" in report_of(poor).unchecked
    with Client(redis_url=url.replace("127", "poor:secret@127")) as client:
        job = client.submit("Hello.", timeout_s=60)
        assert job.status() == "queued"
    start_worker(url.replace("127", "poor:secret@127"))
    assert logged(caplog) == ["redis.unchecked"]
    assert admin.exists(keys.job(job.id))
    admin.flushdb()
