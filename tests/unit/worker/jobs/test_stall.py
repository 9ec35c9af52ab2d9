"""A stalled engine: its worker's record says so, and its leases are not renewed."""

from __future__ import annotations

import threading
import time
from collections import defaultdict
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest

from headrace.client.jobs.status import Status, WorkerStatus
from headrace.client.wire.errors import JobExpired
from headrace.config import Settings
from headrace.worker.engine.model_runner import ModelRunner
from headrace.worker.engine.scheduler import ModelRunnerOutput, SchedulerOutput
from headrace.worker.jobs.health import Health
from headrace.worker.jobs.heartbeat import Heartbeat
from headrace.worker.jobs.leases import Leases
from headrace.worker.jobs.observers import StartedJobs
from headrace.worker.jobs.worker_record import WorkerRecord
from tests.patience import PATIENCE_S
from tests.unit.worker.engine.engine_helpers import ask, build, models_of
from tests.unit.worker.jobs.memory_store import MemoryStore


class BlockedRunner(ModelRunner):
    """Its device does not answer until `go_on` is set."""

    go_on: threading.Event

    def run(self, step: SchedulerOutput) -> ModelRunnerOutput:
        assert self.go_on.wait(PATIENCE_S)
        return super().run(step)


def until(condition: Callable[[], Any]) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


@pytest.fixture
def go_on() -> threading.Event:
    return threading.Event()


def test_a_stalled_engines_leases_run_out_and_its_record_says_so(go_on: threading.Event) -> None:
    engine = build(runner=type("Blocked", (BlockedRunner,), {"go_on": go_on}))
    delivery = SimpleNamespace(tag="tag", received_at=time.monotonic(), open={"a"})
    book: Any = SimpleNamespace(deliveries=lambda: [delivery], open_jobs=lambda: ["a"])
    cancellation: Any = SimpleNamespace(check_time_limits=lambda _: None, cancel_requested=lambda: None)
    takes: list[bool] = []
    hooks: Any = SimpleNamespace(take_messages=takes.append)
    store, models = MemoryStore(leases={"tag": 0.0}), models_of(engine)
    health = Health(models, 1.0, lambda: True)
    leases = Leases(store, book, 3, pytest.fail)  # type: ignore[arg-type]
    heartbeat = Heartbeat(
        settings=Settings(model="demo", stall_s=1.0, lease_s=3),
        models=models,
        store=store,
        book=book,
        cancellation=cancellation,
        health=health,
        leases=leases,
        record=WorkerRecord(store, models, book, health, slots=4, failures=defaultdict(list)),
        started=StartedJobs(),
        hooks=hooks,
    )
    assert engine.stats().step_age_s == 0.0
    with engine:
        future = engine.submit(ask())
        until(lambda: engine.stats().step_age_s > 0)
        heartbeat.tick()
        assert store.leases["tag"] > 0, "the leases of a working engine are renewed"
        assert store.workers[heartbeat.name]["stalled"] == 0
        until(lambda: engine.stats().step_age_s > 1.0)
        store.leases["tag"] = 0.0
        leases.renew_soon()
        heartbeat.tick()
        assert store.leases["tag"] == 0.0
        record = store.workers[heartbeat.name]
        assert record["stalled"] == 1
        assert float(record["step_age_s"]) >= 1.0
        status = Status(workers=[WorkerStatus(name="w", **record)], queues=[], delivered=0)  # type: ignore[arg-type]
        assert not status.serves("demo")
        assert status.stalled("demo") == ["w"]
        assert takes == [False]
        go_on.set()
        future.result(timeout=PATIENCE_S)
        heartbeat.tick()
        assert store.leases["tag"] > 0
        assert store.workers[heartbeat.name]["stalled"] == 0
    assert engine.stats().step_age_s == 0.0


def test_jobs_whose_time_ran_out_during_a_long_step_end_with_it(go_on: threading.Event) -> None:
    engine = build(runner=type("Blocked", (BlockedRunner,), {"go_on": go_on}), slots=1)
    with engine:
        in_one_second = time.time() + 1
        running = engine.submit(ask(max_tokens=900, ignore_eos=True, expires_at=in_one_second))
        waiting = engine.submit(ask(expires_at=in_one_second))
        other = engine.submit(ask(max_tokens=2))
        until(lambda: time.time() > in_one_second)
        go_on.set()
        for future in (running, waiting):
            with pytest.raises(JobExpired):
                future.result(timeout=PATIENCE_S)
        assert other.result(timeout=PATIENCE_S).text
