"""Stopping an engine: every future is completed."""

from __future__ import annotations

import pytest

from headrace.worker.engine.cache_slots import SlotMove
from headrace.worker.engine.errors import EngineStopped
from headrace.worker.engine.model_runner import ModelRunner
from headrace.worker.engine.scheduler import ModelRunnerOutput, SchedulerOutput
from headrace.worker.engine.sequence import Slot
from tests.patience import PATIENCE_S
from tests.unit.worker.engine.engine_helpers import ask, build


class AcceleratorError(RuntimeError):
    """Has the name of torch's error after which a device is unusable."""


class DyingRunner(ModelRunner):
    """A model runner whose device fails after two steps."""

    calls = 0

    def run(self, step: SchedulerOutput) -> ModelRunnerOutput:
        self.calls += 1
        if self.calls > 2:
            raise AcceleratorError("device-side assert")
        return super().run(step)

    def clear(self, slot: Slot) -> None:
        raise AcceleratorError("device-side assert, still")

    def move(self, move: SlotMove) -> None:
        raise AcceleratorError("device-side assert, still")


def test_a_fatal_error_reaches_every_waiter_and_the_owner() -> None:
    fatal: list[BaseException] = []
    engine = build(runner=DyingRunner, slots=3, on_fatal=fatal.append)
    futures = [engine.submit(ask(ignore_eos=True)) for _ in range(6)]
    engine.start()
    for future in futures:
        with pytest.raises(EngineStopped, match="device-side assert"):
            future.result(timeout=PATIENCE_S)
    engine.stop()
    assert [type(error) for error in fatal] == [AcceleratorError]
    with pytest.raises(EngineStopped):
        engine.submit(ask())


def test_an_error_outside_the_steps_reaches_every_waiter_too() -> None:
    class NoRoom(ModelRunner):
        def fit(self, capacity: dict[int, int]) -> None:
            raise RuntimeError("no room")

    fatal: list[BaseException] = []
    engine = build(runner=NoRoom, on_fatal=fatal.append)
    future = engine.submit(ask())
    with engine, pytest.raises(EngineStopped, match="no room"):
        future.result(timeout=PATIENCE_S)
    assert len(fatal) == 1


def test_leaving_the_context_finishes_the_accepted_jobs() -> None:
    engine = build(slots=2)
    with engine:
        futures = [engine.submit(ask(max_tokens=20)) for _ in range(6)]
    assert all(future.result(timeout=0).text for future in futures)
    with pytest.raises(EngineStopped):
        engine.submit(ask())


def test_stopping_without_finishing_fails_the_waiting_jobs() -> None:
    engine = build(slots=1)
    engine.start()
    futures = [engine.submit(ask(max_tokens=1000, ignore_eos=True)) for _ in range(3)]
    engine.stop()
    for future in futures:
        with pytest.raises(EngineStopped):
            future.result(timeout=0)


def test_an_error_inside_the_context_stops_the_engine_at_once() -> None:
    engine = build(slots=1)
    futures = []

    def work() -> None:
        with engine:
            futures.append(engine.submit(ask(max_tokens=1000, ignore_eos=True)))
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        work()
    (future,) = futures
    assert isinstance(future.exception(timeout=0), EngineStopped)


def test_an_engine_that_was_never_started_tells_its_waiters_when_stopped() -> None:
    engine = build()
    future = engine.submit(ask())
    engine.stop()
    assert isinstance(future.exception(timeout=1), EngineStopped)
