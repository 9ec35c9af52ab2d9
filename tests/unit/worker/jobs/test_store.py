"""One contract, three stores: in memory, on fakeredis, on a real Redis."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any
from unittest.mock import patch

import fakeredis
import pytest
import redis

from headrace.client.wire import keys
from headrace.client.wire.redis import connect
from headrace.worker.jobs.redis_store import RedisStore
from headrace.worker.jobs.store import Store, Waiting
from tests.unit.worker.jobs.memory_store import MemoryStore


@dataclass
class Case:
    """A store, and the actions of others: a client cancels, Celery stores a result, kombu delivers a message."""

    store: Store
    cancel: Callable[[str], object]
    finish: Callable[[str], object]
    deliver: Callable[[str], object]
    lease: Callable[[str], float | None]
    stored: Callable[[str], object]


def memory_case() -> Case:
    store = MemoryStore()
    deliver = lambda tag: store.leases.update({tag: 0.0})  # noqa: E731
    return Case(
        store,
        store.cancels.add,
        lambda job: store.results.update({job: ""}),
        deliver,
        store.leases.get,
        store.results.get,
    )


def redis_case(connection: redis.Redis) -> Case:
    connection.flushall()
    finished = '{"status": "REVOKED", "result": null}'
    return Case(
        RedisStore(connection, result_ttl_s=60, checkpoint_ttl_s=30),
        lambda job: connection.set(keys.cancel(job), "1"),
        lambda job: connection.set(keys.result(job), finished),
        lambda tag: connection.zadd(keys.unacked_index(), {tag: 0.0}),
        lambda tag: connection.zscore(keys.unacked_index(), tag),  # type: ignore[arg-type, return-value]
        lambda job: connection.get(keys.result(job)),
    )


@pytest.fixture(params=["memory", "fakeredis", "redis"])
def case(request: pytest.FixtureRequest) -> Case:
    if request.param == "memory":
        return memory_case()
    if request.param == "fakeredis":
        return redis_case(fakeredis.FakeStrictRedis(decode_responses=True))
    url = request.getfixturevalue("redis_url").replace("db=0", "db=5")
    return redis_case(connect(url))


def test_a_new_job_is_neither_finished_nor_cancelled(case: Case) -> None:
    (record,) = case.store.lookup(["a"])
    assert (record.finished, record.cancelled) == (False, False)


def test_records_are_in_order_and_show_what_others_did(case: Case) -> None:
    case.finish("b")
    case.cancel("c")
    records = case.store.lookup(["a", "b", "c"])
    assert [(record.finished, record.cancelled) for record in records] == [(False, False), (True, False), (False, True)]


def test_cancelled_names_those_to_be_cancelled_until_they_have_ended(case: Case) -> None:
    case.cancel("b")
    assert case.store.cancelled(["a", "b"]) == {"b"}
    case.store.ended(["b"])
    assert case.store.cancelled(["a", "b"]) == set()


def test_a_stored_end_is_found_and_a_second_one_changes_nothing(case: Case) -> None:
    case.cancel("b")
    case.store.finish({"a": '{"status": "REVOKED", "result": null}', "b": '{"status": "REVOKED", "result": null}'})
    assert [record.finished for record in case.store.lookup(["a", "b", "c"])] == [True, True, False]
    assert case.store.cancelled(["b"]) == set()
    case.store.finish({"a": '{"status": "FAILURE", "result": null}'})
    assert case.stored("a") == '{"status": "REVOKED", "result": null}'


def test_only_leases_that_exist_are_renewed(case: Case) -> None:
    case.deliver("t1")
    case.store.renew(["t1", "gone"])
    assert (case.lease("t1") or 0) > 0
    assert case.lease("gone") is None
    case.store.renew([])


def test_tensors_may_be_saved_twice(case: Case) -> None:
    case.store.save_tensors("a", {"q": b"1", "k": b"2"})
    case.store.save_tensors("a", {"q": b"3"})


def test_started_returned_and_announced_need_no_record_before(case: Case) -> None:
    case.store.started(["a"], "w")
    case.store.returned(["a"], [])
    case.store.heartbeat("w", {"slots": 4, "model": "demo"})
    case.store.deregister("w")
    case.store.deregister("w")


def test_the_redis_records_have_their_fields_and_lifetimes(redis_url: str) -> None:
    connection = connect(redis_url.replace("db=0", "db=6"))
    store = RedisStore(connection, result_ttl_s=60, checkpoint_ttl_s=30)
    assert store.count_attempts(["a"]) == [1]
    assert store.count_attempts(["a"]) == [2]
    store.started(["a"], "w")
    record = connection.hgetall(keys.job("a"))
    assert (record["state"], record["worker"], record["attempts"]) == ("running", "w", "2")  # type: ignore[index]
    assert connection.ttl(keys.job("a")) > 86_400
    store.ended(["a"])
    assert 0 < connection.ttl(keys.job("a")) <= 60  # type: ignore[operator]
    heard = connection.pubsub(ignore_subscribe_messages=True)
    heard.subscribe(keys.result("b"))
    heard.get_message(timeout=1)
    store.finish({"b": "{}"})
    assert 0 < connection.ttl(keys.result("b")) <= 60  # type: ignore[operator]
    assert (heard.get_message(timeout=1) or {})["data"] == "{}"
    heard.close()
    store.heartbeat("w", {"slots": 4, "model": "demo"})
    assert connection.zrange(keys.models(), 0, -1) == ["demo"]
    assert keys.KNOWN_MODEL_S - 60 < connection.ttl(keys.models()) <= keys.KNOWN_MODEL_S  # type: ignore[operator]
    assert 0 < connection.ttl(keys.worker("w")) <= 15  # type: ignore[operator]
    store.deregister("w")
    assert connection.zcard(keys.workers()) == 0


WRITES: list[Callable[[RedisStore], object]] = [
    lambda store: store.started(["a"], "w"),
    lambda store: store.returned(["a"], ["a"]),
    lambda store: store.announce({"a": Waiting("demo", 1.0)}),
    lambda store: store.count_attempts(["a"], "w"),
    lambda store: store.ended(["a"]),
    lambda store: store.finish({"a": '{"status": "REVOKED", "result": null}'}),
]


@pytest.mark.parametrize("write", WRITES, ids=["started", "returned", "announce", "attempts", "ended", "finish"])
def test_no_record_outlives_its_result_whoever_writes_last(
    redis_url: str, write: Callable[[RedisStore], object]
) -> None:
    """The heartbeat says that a job runs just when it ends: else it would run for 30 days, and callers would wait."""
    connection = connect(redis_url.replace("db=0", "db=5"))
    connection.flushdb()
    store = RedisStore(connection, result_ttl_s=60, checkpoint_ttl_s=30)
    store.announce({"a": Waiting("demo", None)})
    assert connection.ttl(keys.job("a")) > 60
    connection.set(keys.result("a"), '{"status": "REVOKED", "result": null}', ex=7)
    connection.expire(keys.job("a"), 7)
    write(store)
    assert 0 < connection.ttl(keys.job("a")) <= 7  # type: ignore[operator]


def test_a_job_that_has_ended_is_not_said_to_run_or_to_wait(redis_url: str) -> None:
    connection = connect(redis_url.replace("db=0", "db=5"))
    connection.flushdb()
    store = RedisStore(connection, result_ttl_s=60, checkpoint_ttl_s=30)
    jobs = [f"job-{i}" for i in range(2500)]  # more than one request changes
    store.count_attempts(jobs, "w")
    store.finish(dict.fromkeys(jobs[::2], '{"status": "REVOKED", "result": null}'))
    store.started(jobs, "w")
    states = [connection.hget(keys.job(job), "state") for job in jobs]
    assert states == [None, "running"] * 1250
    store.returned(jobs, jobs[:3])
    assert [connection.hget(keys.job(job), "state") for job in jobs] == [None, "queued"] * 1250
    assert [connection.hget(keys.job(job), "attempts") for job in jobs[:4]] == ["1", "0", "1", "1"]


def test_attempts_are_counted_and_withdrawn(case: Case) -> None:
    assert [record.attempts for record in case.store.lookup(["a", "b"])] == [0, 0]
    assert case.store.count_attempts(["a", "b"]) == [1, 1]
    assert case.store.count_attempts(["b"]) == [2]
    case.store.returned(["a", "b"], ["a"])
    assert [record.attempts for record in case.store.lookup(["a", "b"])] == [0, 2]


def test_an_attempt_of_a_live_worker_is_told_apart_from_one_that_ended_with_its_process() -> None:
    connection = fakeredis.FakeStrictRedis(decode_responses=True)
    store = RedisStore(connection, result_ttl_s=60, checkpoint_ttl_s=30)

    def begun_elsewhere() -> bool:
        return store.lookup(["a"])[0].begun_elsewhere

    beat: dict[str, str | int | float] = {"model": "demo", "process": "7f", "stalled": 0}
    assert store.count_attempts(["a"], "host-1 7f") == [1]
    assert not begun_elsewhere(), "it has never written a heartbeat"
    store.heartbeat("host-1", beat)
    assert begun_elsewhere()
    assert store.count_attempts(["a"], "host-1 7f", {"a"}) == [1], "two copies of a message are one attempt"
    store.heartbeat("host-1", {**beat, "stalled": 1})
    assert not begun_elsewhere()
    store.heartbeat("host-1", {**beat, "process": "8f"})
    assert not begun_elsewhere(), "another process with the same name"
    store.heartbeat("host-1", beat)
    connection.expire(keys.worker("host-1"), 5)
    assert not begun_elsewhere(), "its last heartbeat is old"
    for spoilt in ("é 1", " ", "x" * 10_000, "host-1"):
        connection.hset(keys.job("a"), "begun_by", spoilt)
        assert not begun_elsewhere()


def test_a_job_without_a_record_gets_one_and_others_keep_theirs() -> None:
    connection = fakeredis.FakeStrictRedis(decode_responses=True)
    store = RedisStore(connection, result_ttl_s=60, checkpoint_ttl_s=30)
    store.announce({"b": Waiting("demo", None)})
    store.started(["b"], "worker")
    store.announce({"a": Waiting("demo", 12.5), "b": Waiting("demo", None)})
    assert connection.hgetall(keys.job("a")) == {"state": "queued", "model": "demo", "waits_until": "12.500000"}
    assert connection.hget(keys.job("b"), "state") == "running"
    assert 0 < connection.ttl(keys.job("a")) <= keys.UNFINISHED_TTL_S  # type: ignore[operator]


def test_lost_leases_and_the_ends_of_waiting_jobs(case: Case) -> None:
    case.deliver("kept")
    assert case.store.lost(["kept", "gone"]) == {"gone"}
    case.finish("b")
    case.cancel("c")
    assert case.store.ends(["a", "b", "c"]) == ({"b"}, {"c"})


@pytest.mark.parametrize("attempts", ["many", "9" * 40, b"\xff", "1.5", None])
def test_a_record_that_a_stranger_spoilt_holds_up_no_job(redis_url: str, attempts: str | bytes | None) -> None:
    connection = connect(redis_url.replace("db=0", "db=6"))
    store = RedisStore(connection, result_ttl_s=60, checkpoint_ttl_s=30, events_ttl_s=40)
    connection.delete(keys.job("spoilt"))
    if attempts is None:
        connection.rpush(keys.job("spoilt"), "x")
    else:
        connection.hset(keys.job("spoilt"), "attempts", attempts)
    assert [record.attempts for record in store.lookup(["well", "spoilt"])] == [0, 0]
    assert store.count_attempts(["spoilt"]) == [1]


def test_events_are_appended_and_a_refused_one_delays_no_other(redis_url: str) -> None:
    for connection in (fakeredis.FakeStrictRedis(decode_responses=True), connect(redis_url.replace("db=0", "db=5"))):
        connection.flushall() if isinstance(connection, fakeredis.FakeStrictRedis) else connection.flushdb()
        store = RedisStore(connection, result_ttl_s=60, checkpoint_ttl_s=30, events_ttl_s=40)
        connection.set(keys.events("bad"), "not a stream")
        assert store.append_events({"a": "one", "bad": "x", "b": "two"}) == ["bad"]
        assert store.append_events({"a": "three"}) == []
        entries = [fields for _, fields in connection.xrange(keys.events("a"))]  # type: ignore[union-attr]
        assert entries == [{"event": "one"}, {"event": "three"}]
        assert 0 < connection.ttl(keys.events("b")) <= 40  # type: ignore[operator]
    memory = MemoryStore()
    assert memory.append_events({"a": "one"}) == memory.append_events({"a": "two"}) == []
    assert memory.events == {"a": ["one", "two"]}


def test_results_that_are_there_are_read_one_after_the_other_and_only_if_they_exist() -> None:
    connection = fakeredis.FakeStrictRedis(decode_responses=True)
    store = RedisStore(connection, result_ttl_s=60, checkpoint_ttl_s=30)
    large = json.dumps({"status": "SUCCESS", "result": {"choices": ["x" * 2**20]}})
    jobs = [f"job-{i}" for i in range(20)]
    connection.mset({keys.result(job_id): large for job_id in jobs[::2]})
    connection.set(keys.result("job-1"), '{"status": "STARTED", "result": null}')
    read: list[str] = []
    mget = redis.Redis.mget

    def noted(self: Any, names: Any, *more: Any) -> Any:
        read.extend(names)
        return mget(self, names, *more)

    with patch.object(redis.Redis, "mget", noted):
        assert [record.finished for record in store.lookup(jobs)] == [i % 2 == 0 for i in range(20)]
        assert store.ends(jobs)[0] == set(jobs[::2])
        store.finish(dict.fromkeys(jobs, '{"status": "REVOKED", "result": null}'))
    assert read == 2 * [keys.cancel(job_id) for job_id in jobs]
    assert connection.get(keys.result("job-0")) == large
    assert all("REVOKED" in str(connection.get(keys.result(job_id))) for job_id in jobs[1::2])
