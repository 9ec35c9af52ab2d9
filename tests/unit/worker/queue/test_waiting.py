"""Messages that wait inside Celery for an ETA or a rate limit: the real consumer, timer and requests, no Redis."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime, timedelta
from types import SimpleNamespace
from typing import Any

import pytest
from celery.concurrency.base import BasePool
from celery.worker import state
from kombu.asynchronous.timer import Timer
from kombu.message import Message

from headrace.client.wire.celery import GROUP_TASK_NAME, TASK_NAME
from headrace.client.wire.errors import JobError, JobFailed
from headrace.config import load_settings
from headrace.worker.celery import make_app
from headrace.worker.jobs.main_thread import MainThread
from headrace.worker.jobs.waiting import WaitingJobs
from headrace.worker.queue import held as held_module
from headrace.worker.queue.engine_consumer import EngineConsumer, JobPool
from headrace.worker.queue.held import HeldMessages
from tests.unit.worker.jobs.memory_store import MemoryStore


class Pool(BasePool, JobPool):
    """A pool that keeps what it is given."""

    def __init__(self, app: Any) -> None:
        super().__init__(limit=6, app=app)
        self.held = HeldMessages()
        self.applied: list[str] = []
        self.revoked: list[tuple[str, str]] = []
        self.refused: list[str] = []
        self.room = True

    def on_apply(self, target: Any, args: Any = (), kwargs: Any = None, **_: Any) -> None:
        self.applied.append(args[1])

    def has_room(self, model: str | None = None) -> bool:
        return self.room

    def refuse(self, job_ids: Sequence[str], error: JobFailed) -> None:
        self.refused += job_ids

    def revoke(self, request: Any, reason: str) -> None:
        self.revoked.append((request.id, reason))

    def finish_within(self, seconds: float) -> None: ...

    def end_process(self, error: BaseException) -> None: ...


class Delivered(Message):
    """A message as the transport delivers it."""

    _raw: Any = {}  # noqa: RUF012


class Channel:
    """Records what is acknowledged and returned; without a connection it raises an error."""

    def __init__(self) -> None:
        self.acknowledged: list[str] = []
        self.returned: list[str] = []
        self.connected = True
        self.pool = SimpleNamespace()

    def basic_ack(self, tag: str) -> None:
        self._check()
        self.acknowledged.append(tag)

    def basic_reject(self, tag: str, requeue: bool) -> None:
        self._check()
        assert requeue
        self.returned.append(tag)

    def _check(self) -> None:
        if not self.connected:
            raise ConnectionError


class Worker:
    """The consumer of a worker, and its surroundings."""

    def __init__(self) -> None:
        self.app = make_app(load_settings(redis_url="redis://localhost:1/0"))
        self.pool = Pool(self.app)
        self.consumer = EngineConsumer(
            self._execute,
            pool=self.pool,
            app=self.app,
            timer=Timer(),
            controller=SimpleNamespace(use_eventloop=False, state=state, semaphore=None),
        )
        self.credit = 0
        self.channel = Channel()
        self.consumer.task_consumer = SimpleNamespace(channel=self.channel)
        self.consumer.qos = SimpleNamespace(increment_eventually=self._increment, decrement_eventually=self._decrement)
        self.consumer.event_dispatcher = None
        self.consumer.update_strategies()
        self.receive = self.consumer.create_task_handler()
        self.store, self.failed = MemoryStore(), list[str]()
        self.jobs = WaitingJobs(self.store, self.pool.held, MainThread(), self._fail)
        self._now = 0.0

    def _execute(self, request: Any) -> None:
        request.execute_using_pool(self.pool)

    def _increment(self) -> None:
        self.credit += 1

    def _decrement(self) -> None:
        self.credit -= 1

    def _fail(self, job_ids: Sequence[str], error: JobError) -> None:
        self.failed += job_ids

    def deliver(self, job_id: str, countdown: float | None = None, **headers: Any) -> str:
        """Deliver the message of a job. Returns its delivery tag."""
        if countdown is not None:
            headers["eta"] = (datetime.now(UTC) + timedelta(seconds=countdown)).isoformat()
        group = headers.get("task") == GROUP_TASK_NAME
        request = {"prompt": "A secret.", "max_tokens": 1}
        argument = [{"id": name, "request": request} for name in job_id.split()] if group else request
        tag = f"tag of {job_id}"
        self.receive(
            Delivered(
                body=json.dumps([[argument], {}, {}]),
                content_type="application/json",
                content_encoding="utf-8",
                headers={"task": TASK_NAME, "id": job_id, "lang": "py", **headers},
                properties={},
                delivery_tag=tag,
                delivery_info={"exchange": "", "routing_key": "headrace.demo"},
                channel=self.channel,
            )
        )
        return tag

    def fire(self) -> None:
        """Let the time of all entries of the timer come."""
        for scheduled in self.consumer.timer.queue:
            if not scheduled.entry.canceled:
                scheduled.entry.canceled = True
                scheduled.entry()

    def look(self) -> None:
        """A round of the heartbeat thread."""
        self._now += 60
        self.jobs.look(self._now)

    def tags(self) -> list[str]:
        return self.pool.held.tags()


@pytest.fixture
def worker() -> Iterator[Worker]:
    state.reset_state()
    made = Worker()
    yield made
    state.reset_state()
    state.revoked.clear()
    made.app.close()


def test_a_message_is_held_from_its_delivery_to_its_acknowledgement(worker: Worker) -> None:
    tag = worker.deliver("a", 60)
    assert (worker.tags(), worker.pool.applied) == ([tag], [])
    (message,) = worker.pool.held.waiting()
    assert "secret" not in str(message.request.info()), "`inspect scheduled` shows no prompt"
    worker.fire()
    assert (worker.pool.applied, worker.credit) == (["a"], 0)
    assert (worker.tags(), worker.pool.held.waiting()) == ([tag], []), "the pool has it, and its lease is still ours"
    worker.channel.connected = False
    worker.consumer.acknowledge_message(tag)
    assert worker.tags() == [tag], "without Redis it is not acknowledged yet"
    worker.channel.connected = True
    worker.consumer._settle_all()
    assert (worker.tags(), worker.channel.acknowledged) == ([], [tag])


def test_a_message_whose_time_has_come_returns_if_there_is_no_room(worker: Worker) -> None:
    tag = worker.deliver("a", 60)
    worker.pool.room = False
    worker.fire()
    assert (worker.pool.applied, worker.channel.returned, worker.tags()) == ([], [tag], [])
    assert (worker.credit, state.requests) == (0, {})


@pytest.mark.parametrize("connected", [True, False], ids=["shutdown", "connection lost"])
def test_waiting_messages_are_returned_when_celery_forgets_them(worker: Worker, connected: bool) -> None:
    worker.app.tasks[TASK_NAME].rate_limit = "1/h"
    worker.consumer.reset_rate_limits()
    running, limited = worker.deliver("running"), worker.deliver("limited")
    waiting = worker.deliver("waiting", 60)
    assert worker.pool.applied == ["running"]
    worker.channel.connected = connected
    worker.consumer.on_close()
    assert set(worker.tags()) == ({running} if connected else {running, limited, waiting})
    worker.channel.connected = True
    worker.consumer._settle_all()
    assert sorted(worker.channel.returned) == sorted([limited, waiting])
    assert not any(scheduled.entry.args for scheduled in worker.consumer.timer.queue if scheduled.entry.canceled)
    assert worker.tags() == [running]
    worker.fire()
    assert worker.pool.applied == ["running"], "nothing that was returned is computed here"


def test_messages_that_wait_for_a_rate_limit_wait_for_the_new_one_when_it_changes(worker: Worker) -> None:
    task = worker.app.tasks[TASK_NAME]
    task.rate_limit = "1/h"
    worker.consumer.reset_rate_limits()
    for name in "abc":
        worker.deliver(name)
    assert worker.pool.applied == ["a"]
    task.rate_limit = "2/h"
    worker.consumer.reset_rate_limits()
    assert worker.pool.applied == ["a", "b"], "a new bucket begins with one token"
    task.rate_limit = None
    worker.consumer.reset_rate_limits()
    assert worker.pool.applied == ["a", "b", "c"]
    assert not worker.pool.held.waiting()


def test_a_revoked_and_an_expired_job_end_while_they_wait(worker: Worker) -> None:
    worker.deliver("revoked", 60)
    worker.deliver("expired", 60, expires=(datetime.now(UTC) + timedelta(seconds=0.05)).isoformat())
    worker.deliver("kept", 60)
    state.revoked.add("revoked")
    time.sleep(0.06)
    worker.look()
    assert sorted(worker.pool.revoked) == [("expired", "expired"), ("revoked", "revoked")]
    assert worker.failed == [], "the pool ends them, with the reason"
    worker.fire()
    assert worker.pool.applied == ["kept"]
    assert worker.credit == 0


def test_a_cancelled_job_goes_to_the_pool_at_once_which_ends_it(worker: Worker) -> None:
    worker.deliver("cancelled", 60)
    worker.deliver("kept", 60)
    worker.store.cancels.add("cancelled")
    worker.look()
    assert worker.pool.applied == ["cancelled"]
    worker.fire()
    assert worker.pool.applied == ["cancelled", "kept"]


def test_a_member_of_a_waiting_group_is_cancelled_alone(worker: Worker) -> None:
    tag = worker.deliver("a b", 60, task=GROUP_TASK_NAME)
    worker.store.cancels.add("b")
    worker.look()
    assert (worker.failed, worker.pool.applied) == (["b"], [])
    worker.store.results |= {"a": "ended elsewhere", "b": "cancelled"}
    worker.look()
    assert (worker.channel.acknowledged, worker.tags()) == ([tag], []), "all its jobs have ended"
    worker.fire()
    assert worker.pool.applied == []


def test_the_records_say_until_when_jobs_wait(worker: Worker) -> None:
    worker.deliver("a", 60)
    worker.look()
    assert worker.store.states == {"a": "queued"}
    model, until = worker.store.waiting["a"]
    assert model == "demo"
    assert until == pytest.approx(time.time() + 60, abs=5)
    assert worker.jobs.count("demo") == 1
    assert worker.jobs.count("other") == 0


def test_a_message_that_another_worker_has_taken_is_dropped(worker: Worker) -> None:
    tag = worker.deliver("a", 60)
    worker.pool.held.holder.forget(tag)
    worker.fire()
    assert (worker.tags(), worker.pool.applied, worker.channel.acknowledged, worker.channel.returned) == (
        [],
        [],
        [],
        [],
    )


def test_of_many_waiting_messages_only_the_tags_are_kept(worker: Worker, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(held_module, "MAX_WAITING", 2)
    monkeypatch.setattr(held_module, "MAX_PARKED", 4)
    tags = [worker.deliver(name, 60) for name in "abcd"]
    assert [message.request is None for message in worker.pool.held.waiting()] == [False, False, True, True]
    assert worker.tags() == tags
    assert worker.pool.held.full
    worker.look()
    assert worker.store.states == dict.fromkeys("abcd", "queued")
    worker.store.cancels.add("d")
    worker.look()
    assert worker.failed == ["d"]
    assert worker.deliver("now") in worker.tags()
    assert worker.pool.applied == ["now"], "jobs without an ETA are not put aside"
    worker.fire()
    assert (worker.pool.applied, worker.channel.returned) == (["now", "a", "b"], tags[2:])
    assert not worker.pool.held.full


def test_stamps_that_cannot_be_compared_fail_the_job_and_delay_no_other(worker: Worker) -> None:
    worker.consumer._dead_letter = lambda *_: None  # type: ignore[method-assign]
    worker.deliver("bad", 60, stamped_headers=5, stamps=3)
    worker.deliver("revoked", 60)
    state.revoked.add("revoked")
    worker.look()
    assert worker.pool.refused == ["bad"]
    assert worker.pool.revoked == [("revoked", "revoked")]
    worker.fire()
    assert worker.pool.applied == []


@pytest.mark.parametrize(
    "eta", ["soon", "0001-01-01T00:00:00+14:00", "9999-12-31T23:59:59-14:00", 1e300, ["2030-01-01"], ""]
)
@pytest.mark.parametrize("task", [TASK_NAME, GROUP_TASK_NAME])
def test_an_eta_that_is_no_time_fails_the_jobs(worker: Worker, eta: Any, task: str) -> None:
    worker.consumer._dead_letter = lambda *_: None  # type: ignore[method-assign]
    tag = worker.deliver("a", eta=eta, task=task)
    assert (worker.pool.refused, worker.pool.applied) == (["a"], [])
    assert (worker.channel.acknowledged, worker.tags()) == ([tag], [])
