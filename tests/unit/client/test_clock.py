"""Clocks of clients and workers that differ by hours, or jump: deadlines, leases and heartbeats go by Redis' clock."""

from __future__ import annotations

import base64
import json
import time
from collections.abc import Callable
from concurrent.futures import Future
from types import SimpleNamespace
from typing import Any

import fakeredis
import pytest
import redis
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st
from kombu.transport import redis as kombu_redis

from headrace.client import Client
from headrace.client.jobs import server_check
from headrace.client.wire import clock as clocks
from headrace.client.wire import keys
from headrace.client.wire.clock import RedisClock
from headrace.client.wire.redis import connect
from headrace.client.wire.requests import GenerateRequest
from headrace.client.wire.results import Result
from headrace.worker.cli import main
from headrace.worker.jobs.redis_store import RedisStore
from headrace.worker.jobs.service import Service
from headrace.worker.jobs.worker_record import WorkerRecord
from headrace.worker.queue.transport import Channel, QoS
from tests.unit.worker.jobs.memory_store import MemoryStore

HOUR_S = 3_600.0
OFFSETS = pytest.mark.parametrize("offset_s", [-HOUR_S, -700.0, 0.0, HOUR_S, 40 * 365 * 86_400.0])
real_time = time.time


@pytest.fixture
def url(url: str, monkeypatch: pytest.MonkeyPatch) -> str:
    """A Redis that this process has not asked for its time yet."""
    monkeypatch.setattr(server_check, "_servers", {})
    return url


@pytest.fixture
def skew(monkeypatch: pytest.MonkeyPatch) -> Callable[[float], None]:
    """Sets how far the clock of this machine is ahead; Redis, in a process of its own, keeps the right time."""

    def shift(seconds: float) -> None:
        for module in (time, kombu_redis):  # kombu has imported the function
            monkeypatch.setattr(module, "time", lambda: real_time() + seconds)

    return shift


def sent(connection: redis.Redis, model: str) -> list[dict[str, Any]]:
    """The requests in the queue, oldest first."""
    messages = [json.loads(text) for text in reversed(connection.lrange(keys.queue_lists(model)[1], 0, -1))]  # type: ignore[arg-type]
    return [json.loads(base64.b64decode(message["body"]))[0][0] for message in messages]


@OFFSETS
def test_a_deadline_is_by_redis_clock_whatever_the_clients_is(
    url: str, connection: redis.Redis, skew: Callable[[float], None], offset_s: float
) -> None:
    skew(offset_s)
    with Client(redis_url=url, model="unit-clock") as client:
        job = client.submit("Hello.", timeout_s=600)
        signature = client.signature("Hello.", timeout_s=600)
    (request,) = sent(connection, "unit-clock")
    for wire in (request, signature.args[0]):
        assert abs(wire["expires_at"] - (real_time() + 600)) < 2
    assert abs(float(connection.hget(keys.job(job.id), "submitted_at") or 0) - real_time()) < 2  # type: ignore[arg-type]


def test_a_client_whose_clock_jumps_asks_again_or_need_not(
    url: str, connection: redis.Redis, skew: Callable[[float], None]
) -> None:
    with Client(redis_url=url, model="unit-clock") as client:
        for offset_s in (0.0, HOUR_S, -HOUR_S):
            skew(offset_s)
            client.submit("Hello.", timeout_s=60)
    assert all(abs(request["expires_at"] - real_time() - 60) < 3 for request in sent(connection, "unit-clock"))


def test_a_job_that_waits_to_be_sent_loses_that_time(url: str) -> None:
    with Client(redis_url=url) as client:
        prepared = client.submitter.prepare({"prompt": "Hello.", "timeout_s": 60})
        prepared._prepared_at -= 50
        assert abs(prepared.wire["expires_at"] - real_time() - 10) < 2


@OFFSETS
def test_a_worker_compares_deadlines_with_redis_clock(offset_s: float) -> None:
    """The engine uses the worker's clock, so the service converts."""
    given: list[float] = []

    def submit(request: GenerateRequest, **_: Any) -> Future[Result]:
        given.append(request.expires_at or 0)
        return Future()

    models: Any = SimpleNamespace(names=("demo",), get=lambda _: SimpleNamespace(submit=submit))
    service = Service(models, MemoryStore(ahead_s=-offset_s), checkpoint_max_bytes=0)
    for left_s in (-5.0, 30.0):
        expires_at = time.time() - offset_s + left_s
        service.submit("a", {"schema_version": 1, "prompt": "x", "expires_at": expires_at})
        assert abs(given[-1] - (time.time() + left_s)) < 2


@OFFSETS
def test_leases_of_a_worker_are_by_redis_clock(
    connection: redis.Redis, skew: Callable[[float], None], offset_s: float
) -> None:
    """Otherwise a worker that is behind loses its jobs to others, and one that is ahead takes theirs."""
    skew(offset_s)
    store = RedisStore(connection, result_ttl_s=60, checkpoint_ttl_s=60)
    connection.zadd(keys.unacked_index(), {"tag": 1})
    store.renew(["tag"])
    assert abs(float(connection.zscore(keys.unacked_index(), "tag") or 0) - real_time()) < 2  # type: ignore[arg-type]
    channel = SimpleNamespace(visibility_timeout=120, pool=connection.connection_pool)
    channel.redis_time = lambda: Channel.redis_time(channel)
    qos: Any = QoS.__new__(QoS)
    qos.channel = channel
    ceiling = kombu_redis.time() - qos.visibility_timeout  # as kombu's sweep computes it
    assert abs(ceiling - (real_time() - 120)) < 2


@OFFSETS
def test_a_worker_whose_clock_is_wrong_hides_no_other_and_says_so(
    connection: redis.Redis, url: str, skew: Callable[[float], None], offset_s: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    RedisStore(connection, result_ttl_s=60, checkpoint_ttl_s=60).heartbeat("right-1", {"model": "demo"})
    skew(offset_s)
    store = RedisStore(connection, result_ttl_s=60, checkpoint_ttl_s=60)
    models: Any = SimpleNamespace(names=("demo",), loaded={})
    failures = {"demo": [{"job": "x", "code": "y", "at": time.time()}]}
    book: Any = SimpleNamespace(held_jobs=lambda _: 0)
    health: Any = SimpleNamespace()
    record = WorkerRecord(store, models, book, health, slots=1, failures=failures)
    record.write(time.monotonic(), stalled=False)
    monkeypatch.undo()  # whoever reads the status has the right time
    with Client(redis_url=url) as client:
        status = client.status()
    found = {worker.name: worker for worker in status.workers}
    assert set(found) == {"right-1", record.name}
    assert abs(status.at - real_time()) < 2
    wrong = found[record.name]
    for when in (wrong.started_at, wrong.beat_at, wrong.failures[0].at):
        assert abs(when - real_time()) < 2
    assert abs(wrong.clock_skew_s - offset_s) < 2
    monkeypatch.setenv("HEADRACE_REDIS_URL", url)
    shown = CliRunner().invoke(main, ["status"]).output
    assert ("ahead of Redis'" in shown or "behind Redis'" in shown) == bool(offset_s)


# --- the measurement -------------------------------------------------------------------------------------------------


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """A machine whose clocks the test sets."""
    now = SimpleNamespace(wall=1_000_000.0, monotonic=50.0)
    monkeypatch.setattr(clocks, "time", SimpleNamespace(time=lambda: now.wall, monotonic=lambda: now.monotonic))
    return now


def test_a_measurement_outlives_jumps_of_this_machines_clock(machine: SimpleNamespace) -> None:
    clock = RedisClock()
    assert clock.is_due()
    assert clock.now() == machine.wall, "the best there is"
    clock.take((2_000_000, 0), machine.monotonic)
    assert (clock.now(), clock.is_due()) == (2_000_000, False)
    machine.wall += HOUR_S
    assert clock.now() == 2_000_000
    assert clock.is_due(), "it may also have been suspended"
    clock.take((2_000_000, 0), machine.monotonic)
    machine.wall += 30
    machine.monotonic += 30
    assert (clock.now(), clock.is_due()) == (2_000_030, False)
    machine.wall += 31
    machine.monotonic += 31
    assert clock.is_due()


def test_a_slow_reply_does_not_replace_a_quick_one_unless_redis_clock_has_jumped(machine: SimpleNamespace) -> None:
    clock = RedisClock()
    clock.take((2_000_000, 0), machine.monotonic - 0.001)
    quick = clock.now()
    clock.take((1_999_994, 0), machine.monotonic - 8)  # it says: between 1,999,994 and 2,000,002
    assert clock.now() == quick
    clock.take((2_000_500, 0), machine.monotonic - 8)
    assert clock.now() == 2_000_504


step = st.tuples(st.floats(0, 90), st.floats(-1e6, 1e6) | st.just(0.0), st.floats(0, 5), st.floats(0, 5))


@given(st.lists(step, min_size=1, max_size=12), st.floats(-1e9, 1e9))
def test_the_time_is_as_exact_as_the_replies_whatever_the_clocks_do(
    steps: list[tuple[float, float, float, float]], ahead_s: float
) -> None:
    """Each step: time passes, this machine's clock jumps, and TIME is asked, with the delays of request and reply."""
    now = SimpleNamespace(wall=1.8e9, monotonic=50.0)

    def passes(seconds: float) -> None:
        now.wall += seconds
        now.monotonic += seconds

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(clocks, "time", SimpleNamespace(time=lambda: now.wall, monotonic=lambda: now.monotonic))
        clock = RedisClock()
        for rest_s, jump_s, there_s, back_s in steps:
            passes(rest_s)
            now.wall += jump_s
            sent_at = now.monotonic
            passes(there_s)
            seconds, part = divmod(2e9 + ahead_s + now.monotonic, 1)
            passes(back_s)
            clock.take((int(seconds), int(part * 1e6)), sent_at)
            assert abs(clock.now() - (2e9 + ahead_s + now.monotonic)) <= 5.001


@pytest.mark.parametrize("reply", [redis.exceptions.NoPermissionError("no"), None, ("x", "y"), [1]], ids=repr)
def test_without_an_answer_this_machines_clock_is_used_and_not_asked_for_each_job(
    machine: SimpleNamespace, reply: Any
) -> None:
    clock = RedisClock()
    clock.take(reply, machine.monotonic)
    assert (clock.now(), clock.is_due()) == (machine.wall, False)
    machine.wall += 6
    machine.monotonic += 6
    assert clock.is_due()


def test_a_user_without_the_right_or_a_stand_in_gives_no_error(connection: redis.Redis) -> None:
    clock = RedisClock()
    clock.update(fakeredis.FakeStrictRedis(decode_responses=True))
    assert abs(clock.now() - real_time()) < 2
    with pytest.raises(redis.ConnectionError):
        RedisClock().update(connect("redis://localhost:1/0"))
