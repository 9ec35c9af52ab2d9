"""Jobs that end early: cancellation, deadlines; and priorities."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from concurrent.futures import CancelledError
from typing import Any

import pytest

from headrace.client.wire.errors import JobCancelled, JobExpired
from headrace.worker.engine.engine import Engine
from headrace.worker.engine.model_runner import ModelRunner
from headrace.worker.engine.scheduler import ModelRunnerOutput, SchedulerOutput
from tests.patience import PATIENCE_S
from tests.unit.worker.engine.engine_helpers import ask, build, drive, expected, idle, substance, tokens_of


def test_cancelling_a_running_job_frees_its_slots_before_the_next_step() -> None:
    engine = build(slots=2)
    running = engine.submit(ask(max_tokens=100, n=2, ignore_eos=True), job_id="running")
    waiting = engine.submit(ask("Next"))
    for _ in range(3):
        engine.step()
    assert (engine.stats().running, engine.stats().waiting) == (2, 1)
    engine.cancel("running")
    engine.step()
    assert (engine.stats().running, engine.stats().waiting) == (1, 0)
    with pytest.raises(JobCancelled) as caught:
        running.result(timeout=0)
    assert len(caught.value.partial) == 2
    assert all(caught.value.partial)
    assert [substance(r) for r in drive(engine, waiting)] == expected(ask("Next"))


def test_cancelling_a_waiting_job_removes_it_from_the_queue() -> None:
    engine = build(slots=1)
    first, second, third = (engine.submit(ask(), job_id=name) for name in ("first", "second", "third"))
    engine.step()
    engine.cancel("second")
    engine.cancel("unheard of")
    engine.step()
    assert engine.stats().waiting == 1
    with pytest.raises(JobCancelled) as caught:
        second.result(timeout=0)
    assert caught.value.partial == []
    drive(engine, first, third)
    engine.cancel("first")
    engine.step()
    assert first.result().text


@pytest.mark.parametrize("steps", [0, 1, 3])
@pytest.mark.parametrize("n", [1, 3])
def test_cancelling_the_future_cancels_the_job(steps: int, n: int) -> None:
    engine = build()
    future = engine.submit(ask(max_tokens=50, n=n, ignore_eos=True))
    other = engine.submit(ask("Next"))
    for _ in range(steps):
        engine.step()
    assert future.cancel()
    engine.step()
    assert engine.stats().running == 1
    drive(engine, other)
    assert idle(engine)
    with pytest.raises(CancelledError):
        future.result(timeout=0)


def test_cancelled_futures_at_the_front_do_not_delay_the_queue() -> None:
    engine = build(slots=2)
    gone = [engine.submit(ask()) for _ in range(5)]
    last = engine.submit(ask("Next"))
    for future in gone:
        future.cancel()
    with engine:
        assert last.result(timeout=PATIENCE_S).text


def test_a_future_cancelled_beside_a_first_admission_in_a_new_arena_harms_nobody() -> None:
    engine = build()
    gone, stays = engine.submit(ask(tokens_of(150))), engine.submit(ask(tokens_of(151)))
    gone.cancel()
    assert [substance(r) for r in drive(engine, stays)] == expected(ask(tokens_of(151)))


def test_jobs_with_the_same_id_are_all_answered() -> None:
    """A message that is delivered twice submits the same job id twice."""
    engine = build()
    futures = [engine.submit(ask("Twice", max_tokens=count), job_id="twice") for count in (3, 9, 3)]
    assert [len(r.choices[0].token_ids) for r in drive(engine, *futures)] == [3, 9, 3]
    both = [engine.submit(ask("Twice", max_tokens=50), job_id="twice") for _ in range(2)]
    engine.step()
    engine.cancel("twice")
    engine.step()
    assert [type(future.exception(timeout=0)) for future in both] == [JobCancelled] * 2
    assert idle(engine)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Callable[[float], None]:
    """Stops the clocks; called, it puts them forward."""
    now = time.time()
    monkeypatch.setattr(time, "time", lambda: now)
    monkeypatch.setattr(time, "monotonic", lambda: now)

    def forward(seconds: float) -> None:
        nonlocal now
        now += seconds

    return forward


def test_a_job_past_its_deadline_expires_waiting_or_running(clock: Callable[[float], None]) -> None:
    engine = build(slots=1)
    now = time.time()
    past = engine.submit(ask("late", expires_at=now - 1))
    running = engine.submit(ask(max_tokens=1000, ignore_eos=True, expires_at=now + 0.5))
    waiting = engine.submit(ask("x", expires_at=now + 0.1))
    patient = engine.submit(ask("Next", expires_at=now + 3600))
    for _ in range(3):
        engine.step()
    assert not running.done()
    assert not waiting.done()
    clock(1)
    drive(engine, patient)
    for future in (past, running, waiting):
        with pytest.raises(JobExpired):
            future.result(timeout=0)
    assert isinstance(error := running.exception(timeout=0), JobExpired)
    assert error.partial
    assert idle(engine)


def test_a_running_engine_expires_jobs_without_being_woken() -> None:
    class Waiting(ModelRunner):
        def run(self, step: SchedulerOutput) -> ModelRunnerOutput:
            time.sleep(0.01)
            return super().run(step)

    with build(runner=Waiting, slots=1) as engine:
        future = engine.submit(ask(max_tokens=1000, ignore_eos=True, expires_at=time.time() + 0.15))
        with pytest.raises(JobExpired):
            future.result(timeout=PATIENCE_S)


def test_the_deadline_of_an_earlier_job_with_the_same_id_does_not_apply(clock: Callable[[float], None]) -> None:
    engine = build()
    drive(engine, engine.submit(ask(max_tokens=1, expires_at=time.time() + 0.2), job_id="again"))
    later = engine.submit(ask(max_tokens=30, ignore_eos=True), job_id="again")
    engine.step()
    clock(1)
    assert drive(engine, later)[0].usage.completion_tokens == 30


def test_urgent_jobs_overtake_those_that_wait_and_none_that_run() -> None:
    engine = build(slots=1)
    done: list[str] = []
    order = ["bulk", "normal", "bulk", "interactive", "normal"]
    futures = []
    for i, priority in enumerate(order):
        future = engine.submit(ask(max_tokens=3, priority=priority))
        future.add_done_callback(lambda _, name=f"{priority}-{i}": done.append(name))
        futures.append(future)
        if i == 0:
            engine.step()
    drive(engine, *futures)
    assert done == ["bulk-0", "interactive-3", "normal-1", "normal-4", "bulk-2"]


def test_many_threads_may_submit_and_cancel_at_once() -> None:
    results: list[list[dict[str, Any]]] = []

    def work(engine: Engine) -> None:
        futures = [engine.submit(ask("Next"), job_id=f"{threading.get_ident()}-{i}") for i in range(10)]
        for i in range(1, 10, 2):
            engine.cancel(f"{threading.get_ident()}-{i}")
        results.append([substance(future.result(timeout=PATIENCE_S)) for future in futures[::2]])

    with build(slots=8) as engine:
        threads = [threading.Thread(target=work, args=(engine,)) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert results == [expected(ask("Next")) * 5] * 4
    assert idle(engine)
