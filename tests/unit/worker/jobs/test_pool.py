"""The pool between Celery and the engine, without either: tests put the messages in, and the store is in memory."""

from __future__ import annotations

import dataclasses
import gc
import json
import signal
import socket
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import redis
from celery.exceptions import InvalidTaskError
from celery.worker import state
from structlog.testing import capture_logs

from headrace.client.wire.celery import GROUP_TASK_NAME
from headrace.client.wire.errors import JobFailed
from headrace.client.wire.signing import mark
from headrace.config import load_settings
from headrace.worker.celery import make_app
from headrace.worker.engine.engine import Engine
from headrace.worker.engine.registry import ModelRegistry
from headrace.worker.jobs.observers import MetricsObserver
from headrace.worker.jobs.pool import EnginePool
from headrace.worker.jobs.service import Service
from headrace.worker.jobs.store import JobRecord
from headrace.worker.observability.metrics import Metrics
from tests.patience import PATIENCE_S
from tests.unit.worker.engine.engine_helpers import build
from tests.unit.worker.jobs.memory_store import MemoryStore
from tests.unit.worker.jobs.test_stall import BlockedRunner, until

REQUEST = {"prompt": "Hello.", "max_tokens": 4, "temperature": 0}
KEY = "key-" * 8

Make = Callable[..., EnginePool]


class Message:
    """Replaces Celery's Request: a group of jobs, and the queue that it came from."""

    def __init__(self, *job_ids: str, queue: str = "headrace.demo") -> None:
        self.type, self.id = GROUP_TASK_NAME, f"message of {job_ids}"
        members = [{"id": job_id, "request": REQUEST} for job_id in job_ids]
        self.request_dict: dict[str, Any] = {"args": [members], "kwargs": {}, "delivery_info": {"routing_key": queue}}
        self.over, self.returned = threading.Event(), threading.Event()

    def on_success(self, _: Any) -> None:
        self.over.set()

    def acknowledge(self) -> None:
        self.over.set()

    def reject(self, requeue: bool) -> None:
        assert requeue
        self.returned.set()


class Kept(dict[str, Any]):
    """A request to which there can be a weak reference."""


@pytest.fixture
def make() -> Iterator[Make]:
    pools = []

    def start(
        store: MemoryStore, engine: Engine | None = None, models: ModelRegistry | None = None, **settings: Any
    ) -> EnginePool:
        app = make_app(load_settings(redis_url="redis://localhost:1/0", slots=4, **settings))
        models = models or ModelRegistry(["demo"], lambda _: engine or build(slots=4))
        pool = EnginePool(limit=6, app=app, service=Service(models, store, checkpoint_max_bytes=0))
        pool.on_start()
        pools.append(pool)
        return pool

    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT, signal.SIGQUIT)}
    yield start
    for pool in pools:
        pool.finish_within(0)
        pool.on_terminate()
        pool.app.close()
    for number, handler in handlers.items():
        signal.signal(number, handler)


def deliver(pool: EnginePool, message: Message) -> Message:
    pool.on_apply(None, (message.type, message.id, message.request_dict), callback=message.on_success)  # type: ignore[arg-type]
    return message


def test_a_job_that_ended_elsewhere_is_not_computed_when_its_message_comes_again(make: Make) -> None:
    store = MemoryStore(results={"before": "as it ended"})
    pool = make(store)
    assert deliver(pool, Message("before", "new")).over.wait(PATIENCE_S)
    assert store.results["before"] == "as it ended"
    assert json.loads(store.results["new"])["status"] == "SUCCESS"
    assert store.attempts == {"new": 1}, "only one went to the engine"
    assert pool.pipeline.counts.finished["succeeded"] == 1
    assert deliver(pool, Message("before", "new")).over.wait(PATIENCE_S)
    assert pool.pipeline.counts.finished["succeeded"] == 1


def test_a_worker_whose_port_is_taken_ends_before_it_loads_a_model() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        app = make_app(load_settings(redis_url="redis://localhost:1/0", model="/nowhere", metrics_port=port))
        with capture_logs() as lines, pytest.raises(SystemExit) as ended:
            EnginePool(limit=6, app=app).on_start()
        app.close()
    assert ended.value.code == 1
    (line,) = lines
    assert f"port {port} (Address already in use)" in line["error"]


def test_a_cold_shutdown_may_begin_before_the_models_are_loaded() -> None:
    app = make_app(load_settings(redis_url="redis://localhost:1/0"))
    pool = EnginePool(limit=6, app=app)
    pool.finish_within(0)  # called in a signal handler, where an error would end the process without a shutdown
    assert pool.pipeline.cold_shutdown.requested
    app.close()


def test_what_ends_and_what_comes_again_is_counted_once(make: Make) -> None:
    metrics = Metrics("demo")
    pool = make(MemoryStore(results={"before": "as it ended"}))
    pool.pipeline.observers.add(MetricsObserver(metrics))
    again = Message("before", "new")
    again.request_dict["delivery_info"] = {"redelivered": True}
    for message in (again, Message("other")):
        assert deliver(pool, message).over.wait(PATIENCE_S)
    text = metrics.render()[1].decode()
    assert 'headrace_redeliveries_total{model_name="demo"} 1.0' in text
    assert 'headrace_request_success_total{finished_reason="length",model_name="demo"} 2.0' in text
    assert 'headrace_request_generation_tokens_sum{model_name="demo"} 8.0' in text


def test_revoking_while_redis_is_silent_does_not_hold_up_the_main_thread(make: Make) -> None:
    """The store answers only when `answers` is set, so the test would hang if the main thread waited for it."""

    class Silent(MemoryStore):
        answers = threading.Event()

        def lookup(self, job_ids: Any) -> list[JobRecord]:
            assert self.answers.wait(PATIENCE_S)
            return super().lookup(job_ids)

        def finish(self, records: Any) -> None:
            assert self.answers.wait(PATIENCE_S)
            super().finish(records)

    store = Silent()
    pool = make(store)
    held, unheard = Message("a", "b"), Message("c")
    deliver(pool, held)
    pool.revoke(held, "terminated")
    pool.revoke(unheard, "revoked")
    assert not store.results
    assert not held.over.is_set()
    store.answers.set()
    assert held.over.wait(PATIENCE_S)
    assert unheard.over.wait(PATIENCE_S)
    assert {json.loads(record)["status"] for record in store.results.values()} == {"REVOKED"}
    assert sorted(store.results) == ["a", "b", "c"]


def test_a_copy_of_a_message_that_a_live_worker_computes_is_not_a_death(make: Make) -> None:
    class Elsewhere(MemoryStore):
        def lookup(self, job_ids: Any) -> list[JobRecord]:
            return [dataclasses.replace(record, begun_elsewhere=True) for record in super().lookup(job_ids)]

    pool = make(store := Elsewhere(attempts={"a": 3, "b": 3}), max_attempts=3)
    again = Message("b")
    again.request_dict["delivery_info"]["redelivered"] = True
    for message in (Message("a"), again):
        assert deliver(pool, message).over.wait(PATIENCE_S)
    assert json.loads(store.results["a"])["status"] == "SUCCESS"
    assert store.attempts["a"] == 3, "both copies are one attempt"
    assert json.loads(store.results["b"])["result"]["exc_message"][0] == "max_attempts", "its lease had run out"


def test_a_job_of_a_plain_producer_has_a_record_while_it_waits_for_its_model(make: Make) -> None:
    pool = make(store := MemoryStore(states={"known": "queued"}))
    assert deliver(pool, Message("plain", "known")).over.wait(PATIENCE_S)
    assert store.waiting == {"plain": ("demo", None)}


def test_no_message_is_kept_when_its_jobs_have_ended(make: Make) -> None:
    pool = make(MemoryStore())
    message = Message("a", "b")
    request = message.request_dict["args"][0][0]["request"] = Kept(REQUEST)
    kept = weakref.ref(request)
    assert deliver(pool, message).over.wait(PATIENCE_S)
    del message, request
    until(lambda: gc.collect() >= 0 and kept() is None)


def test_no_message_is_taken_while_the_engine_is_stalled(make: Make) -> None:
    go_on = threading.Event()
    engine = build(runner=type("Blocked", (BlockedRunner,), {"go_on": go_on}), slots=4)
    pool = make(MemoryStore(), engine, stall_s=1.0)
    message = deliver(pool, Message("a"))
    assert pool.has_room()
    until(lambda: not pool.has_room())
    assert engine.stats().step_age_s > 1.0
    go_on.set()
    assert message.over.wait(PATIENCE_S)
    until(pool.has_room)


def test_jobs_that_others_ended_while_redis_could_not_be_reached_are_let_go_of(make: Make) -> None:
    class Away(MemoryStore):
        away = False

        def renew(self, delivery_tags: Any) -> None:
            if self.away:
                raise redis.ConnectionError("no route")

    go_on = threading.Event()
    engine = build(runner=type("Blocked", (BlockedRunner,), {"go_on": go_on}), slots=4)
    store = Away()
    pool = make(store, engine, lease_s=3)
    message = deliver(pool, Message("a", "b"))
    until(lambda: engine.stats().running + engine.stats().waiting == 2)  # they may start one after the other
    store.away = True
    time.sleep(2)  # over half of the lease
    store.results["a"] = "as it ended"
    store.away = False
    until(lambda: pool.pipeline.book.open_jobs() == ["b"])
    go_on.set()
    assert message.over.wait(PATIENCE_S)
    assert store.results["a"] == "as it ended"
    assert json.loads(store.results["b"])["status"] == "SUCCESS"
    assert pool.pipeline.counts.finished == {"succeeded": 1, "failed": 0, "cancelled": 0, "expired": 0}


def test_a_refused_message_ends_no_job_that_is_here_and_any_other_that_it_names(make: Make) -> None:
    go_on = threading.Event()
    engine = build(runner=type("Blocked", (BlockedRunner,), {"go_on": go_on}), slots=4)
    store = MemoryStore()
    pool = make(store, engine)
    message = deliver(pool, Message("runs"))
    until(lambda: pool.pipeline.book.open_jobs() == ["runs"])
    pool.refuse(["runs", "waits"], JobFailed("unreadable_message", "no task"))
    until(lambda: "waits" in store.results)
    go_on.set()
    assert message.over.wait(PATIENCE_S)
    assert [json.loads(store.results[name])["status"] for name in ("runs", "waits")] == ["SUCCESS", "FAILURE"]


def test_with_a_key_a_refused_message_fails_only_what_a_client_without_the_key_submitted(make: Make) -> None:
    store = MemoryStore(
        states={"unmarked": "queued", "ours": "queued", "theirs": "queued", "elsewhere": "running"},
        marks={"ours": mark(KEY.encode(), "ours"), "theirs": mark(b"another", "theirs"), "unmarked": "\xe9"},
    )
    pool = make(store, signing_key=KEY)
    names = ["unmarked", "ours", "theirs", "elsewhere", "nobody's"]
    pool.refuse(names, JobFailed("bad_signature", "no signature"))
    until(lambda: len(store.results) == 2)
    pool.refuse(names, JobFailed("bad_signature", "no signature"))
    until(lambda: pool.pipeline.counts.finished["failed"] == 4)
    assert sorted(store.results) == ["theirs", "unmarked"]


class Loading:
    """Loads engines of the bundled model under other names; those in `held_up` when `go_on` is set."""

    def __init__(self, *held_up: str) -> None:
        self.loaded: list[str] = []
        self.go_on = {name: threading.Event() for name in held_up}

    def __call__(self, name: str) -> Engine:
        if name in self.go_on:
            assert self.go_on[name].wait(PATIENCE_S)
        self.loaded.append(name)
        return build(slots=4, model_name=name)


def model_of(store: MemoryStore, job_id: str) -> str:
    return str(json.loads(store.results[job_id])["result"]["model"])


def test_jobs_go_to_the_model_of_their_queue_and_have_windows_of_their_own(make: Make) -> None:
    store, go_on = MemoryStore(), threading.Event()
    stuck = build(runner=type("Blocked", (BlockedRunner,), {"go_on": go_on}), slots=4)
    other = build(slots=4, model_name="other")
    pool = make(store, models=ModelRegistry(["demo", "other"], {"demo": stuck, "other": other}.__getitem__))
    first = deliver(pool, Message("a", "b", "c"))
    assert not pool.has_room("demo"), "half of the six that the pool may hold"
    assert pool.has_room("other")
    assert pool.has_room()
    assert pool.pipeline.book.held_jobs("demo") == 3
    deliver(pool, Message("d", queue="headrace.other"))
    until(lambda: "d" in store.attempts)
    go_on.set()  # one thread computes for both
    until(lambda: len(store.results) == 4)
    assert first.over.wait(PATIENCE_S)
    assert [model_of(store, name) for name in "abcd"] == ["demo", "demo", "demo", "other"]


def test_no_model_computes_a_message_of_a_queue_that_is_not_its_own(make: Make) -> None:
    store = MemoryStore()
    pool = make(store, models=ModelRegistry(["demo", "other"], lambda name: build(slots=4, model_name=name)))
    for queue in ("celery", "headrace.third", "demo"):
        with pytest.raises(InvalidTaskError, match=r"expected one that this worker serves: 'demo', 'other'"):
            deliver(pool, Message("a", queue=queue))
    assert not store.attempts
    assert not pool.pipeline.book.deliveries()


def test_a_model_is_loaded_for_its_first_job_and_again_after_it_was_idle(make: Make) -> None:
    store, load = MemoryStore(), Loading("other")
    pool = make(store, models=ModelRegistry(["demo", "other"], load, idle_s=0.2))
    assert load.loaded == ["demo"]
    waits = deliver(pool, Message("w", queue="headrace.other"))
    for name in "ab":
        assert deliver(pool, Message(name)).over.wait(PATIENCE_S), "the loaded model keeps computing"
    assert not waits.over.is_set()
    assert "w" not in store.attempts
    load.go_on["other"].set()
    assert waits.over.wait(PATIENCE_S)
    assert model_of(store, "w") == "other"
    until(lambda: not pool.models.loaded)  # the heartbeat causes this
    assert {record["loaded"] for record in store.workers.values()} <= {0, 1}
    again = [deliver(pool, Message("x", queue="headrace.other")), deliver(pool, Message("y"))]
    assert all(message.over.wait(PATIENCE_S) for message in again)
    assert sorted(load.loaded) == ["demo", "demo", "other", "other"]
    assert pool.pipeline.counts.finished["succeeded"] == 5
    until(lambda: any(record["loaded"] == 0 for record in store.workers.values()))
    names = {pool.pipeline.heartbeat.name + "@demo": "demo", pool.pipeline.heartbeat.name + "@other": "other"}
    assert {name: record["model"] for name, record in store.workers.items()} == names


def test_a_job_is_cancelled_while_its_model_is_being_loaded(make: Make) -> None:
    store, load = MemoryStore(), Loading("other")
    pool = make(store, models=ModelRegistry(["demo", "other"], load, idle_s=60))
    waits = deliver(pool, Message("w", queue="headrace.other"))
    until(lambda: pool.pipeline.quarantine.models() == {"other"})
    store.cancels.add("w")
    assert waits.over.wait(PATIENCE_S)
    assert pool.pipeline.counts.finished["cancelled"] == 1
    load.go_on["other"].set()


def test_a_model_that_cannot_be_loaded_ends_the_process_and_no_job(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    def load(name: str) -> Engine:
        if name == "other":
            raise OSError("its files are gone")
        return build(slots=4)

    monkeypatch.setattr(state, "should_stop", None)
    store = MemoryStore()
    pool = make(store, models=ModelRegistry(["demo", "other"], load, idle_s=60))
    with capture_logs() as lines:
        waits = deliver(pool, Message("w", queue="headrace.other"))
        until(lambda: pool.failed)
        pool.on_stop()
    assert state.should_stop == 1
    assert waits.returned.is_set()
    assert not store.results
    assert "w" not in store.attempts
    (line,) = [line for line in lines if line["event"] == "worker.model_failed"]
    assert (line["error"], line["kind"]) == ("its files are gone", "OSError")
