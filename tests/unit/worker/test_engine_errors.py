"""One bad job harms no other: cancels, deadlines, rows that fail, and the end of the engine itself."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from concurrent.futures import CancelledError, Future
from typing import Any

import pytest

from client.errors import JobCancelled, JobExpired, JobFailed
from client.schema import Result
from model import GPT2, load_model
from tests.unit.worker.engine_helpers import ask, build, drive, idle, substance, tokens_of
from worker.engine import Engine, EngineStopped
from worker.runner import Runner
from worker.scheduler import Outcome, Step
from worker.sequence import Sequence, Slot
from worker.slots import Move

#: A job whose prompt or output holds this token is guilty.
GUILTY = 4242


class FaultyRunner(Runner):
    """The real one, which cannot compute guilty sequences."""

    guilty: Callable[[Sequence], bool] = staticmethod(lambda sequence: GUILTY in sequence.prompt)

    def run(self, step: Step) -> Outcome:
        if any(self.guilty(sequence) for sequence in step.sequences):
            raise RuntimeError("the kernel is not in the mood")
        return super().run(step)


class AcceleratorError(RuntimeError):
    """Named like torch's error after which a device answers nothing any more."""


class DyingRunner(Runner):
    """Its device answers for two steps, then to nothing any more."""

    calls = 0

    def run(self, step: Step) -> Outcome:
        self.calls += 1
        if self.calls > 2:
            raise AcceleratorError("device-side assert")
        return super().run(step)

    def clear(self, slot: Slot) -> None:
        raise AcceleratorError("device-side assert, still")

    def move(self, move: Move) -> None:
        raise AcceleratorError("device-side assert, still")


@pytest.fixture(scope="module")
def poisoned() -> GPT2:
    """The bundled model with a NaN in position 600: sequences that get there have NaN logits, others do not."""
    model = load_model("demo", device="cpu", dtype="float32")
    model.wpe[600] = float("nan")
    return model


def expected(*requests: Any) -> list[dict[str, Any]]:
    engine = build()
    return [substance(drive(engine, engine.submit(request))[0]) for request in requests]


def failure(future: Future[Result]) -> JobFailed:
    with pytest.raises(JobFailed) as caught:
        future.result(timeout=0)
    return caught.value


def settle(engine: Engine, *futures: Future[Result]) -> None:
    for _ in range(2000):
        if all(future.done() for future in futures):
            return
        engine.step()
    raise AssertionError("not done")


# --- cancel and deadlines ----------------------------------------------------------------------------------------------


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


def test_cancelling_a_waiting_job_takes_it_out_of_the_line() -> None:
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


def test_cancelled_futures_in_front_do_not_hold_up_the_line() -> None:
    engine = build(slots=2)
    gone = [engine.submit(ask()) for _ in range(5)]
    last = engine.submit(ask("Next"))
    for future in gone:
        future.cancel()
    with engine:
        assert last.result(timeout=20).text


def test_a_future_cancelled_beside_a_first_admission_in_a_new_arena_harms_nobody() -> None:
    engine = build()
    gone, stays = engine.submit(ask(tokens_of(150))), engine.submit(ask(tokens_of(151)))
    gone.cancel()
    assert [substance(r) for r in drive(engine, stays)] == expected(ask(tokens_of(151)))


def test_jobs_of_one_name_are_each_answered() -> None:
    """A message delivered twice puts the same job id in twice."""
    engine = build()
    futures = [engine.submit(ask("Twice", max_tokens=count), job_id="twice") for count in (3, 9, 3)]
    assert [len(r.choices[0].token_ids) for r in drive(engine, *futures)] == [3, 9, 3]
    both = [engine.submit(ask("Twice", max_tokens=50), job_id="twice") for _ in range(2)]
    engine.step()
    engine.cancel("twice")
    engine.step()
    assert [type(future.exception(timeout=0)) for future in both] == [JobCancelled] * 2
    assert idle(engine)


def test_a_job_past_its_deadline_expires_waiting_or_running() -> None:
    engine = build(slots=1)
    now = time.time()
    past = engine.submit(ask("late", expires_at=now - 1))
    running = engine.submit(ask(max_tokens=500, ignore_eos=True, expires_at=now + 0.2))
    waiting = engine.submit(ask("x", expires_at=now + 0.1))
    patient = engine.submit(ask("Next", expires_at=now + 3600))
    drive(engine, patient)
    for future in (past, running, waiting):
        with pytest.raises(JobExpired):
            future.result(timeout=0)
    assert isinstance(error := running.exception(timeout=0), JobExpired)
    assert error.partial
    assert idle(engine)


def test_a_running_engine_expires_jobs_without_being_woken() -> None:
    class Waiting(Runner):
        def run(self, step: Step) -> Outcome:
            time.sleep(0.01)
            return super().run(step)

    with build(runner=Waiting, slots=1) as engine:
        future = engine.submit(ask(max_tokens=1000, ignore_eos=True, expires_at=time.time() + 0.15))
        with pytest.raises(JobExpired):
            future.result(timeout=5)


def test_an_earlier_job_of_that_name_does_not_bring_its_deadline() -> None:
    engine = build()
    drive(engine, engine.submit(ask(max_tokens=1, expires_at=time.time() + 0.2), job_id="again"))
    later = engine.submit(ask(max_tokens=30, ignore_eos=True), job_id="again")
    engine.step()
    time.sleep(0.25)
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


# --- rows that fail ----------------------------------------------------------------------------------------------------


def test_a_job_that_makes_the_step_raise_fails_alone() -> None:
    good = [ask(tokens_of(count, seed=count), logprobs=1) for count in (3, 90, 130, 300)]
    bad = [ask([*tokens_of(count), GUILTY]) for count in (2, 50, 200)]
    engine = build(runner=FaultyRunner)
    futures = [engine.submit(request) for pair in zip(good, [*bad, ask()], strict=True) for request in pair]
    settle(engine, *futures)
    assert [substance(f.result()) for f in futures[::2]] == expected(*good)
    assert [failure(f).code for f in futures[1:7:2]] == ["internal_error"] * 3
    assert idle(engine)


def test_samples_that_share_a_guilty_prompt_fail_together_and_alone() -> None:
    engine = build(runner=FaultyRunner, slots=8)
    bad = engine.submit(ask([*tokens_of(200), GUILTY], n=3))
    good = engine.submit(ask(tokens_of(140), n=2, temperature=1.0, seed=1))
    settle(engine, bad, good)
    assert failure(bad).code == "internal_error"
    assert [substance(good.result())] == expected(ask(tokens_of(140), n=2, temperature=1.0, seed=1))
    assert idle(engine)


@pytest.mark.parametrize("guilty_sample", [0, 1, 2])
def test_one_sample_that_fails_ends_its_job_and_no_other(guilty_sample: int) -> None:
    class OneSample(FaultyRunner):
        guilty = staticmethod(
            lambda s: GUILTY in s.request.stop_token_ids and s.index == guilty_sample and len(s.output) == 3
        )

    engine = build(runner=OneSample)
    bad = engine.submit(ask(n=3, temperature=1.0, max_tokens=9, stop_token_ids=[GUILTY], ignore_eos=True))
    good = engine.submit(ask("Next", n=2))
    settle(engine, bad, good)
    assert failure(bad).code == "internal_error"
    assert [substance(good.result())] == expected(ask("Next", n=2))
    assert idle(engine)


def test_a_row_moved_into_the_place_of_a_failed_one_keeps_its_prompt() -> None:
    """The last row is computed before the guilty one in front of it, whose place it then takes in the same step."""
    first, second = ask(tokens_of(14), max_tokens=1), ask(tokens_of(5, seed=2), logprobs=1)
    engine = build(runner=FaultyRunner, step_tokens=16)
    head, moved, bad = (engine.submit(r) for r in (first, second, ask([*tokens_of(4), GUILTY])))
    drive(engine, head)  # the guilty row, last so far, moves to the front: now it stands before the good one
    settle(engine, moved, bad)
    assert failure(bad).code == "internal_error"
    assert [substance(moved.result())] == expected(second)


def test_a_job_with_nan_logits_fails_alone(poisoned: GPT2) -> None:
    engine = build(model=poisoned)
    good = [ask(tokens_of(count), logprobs=1) for count in (5, 130, 580)]
    bad = [ask(tokens_of(595), max_tokens=20, ignore_eos=True), ask(tokens_of(605)), ask(tokens_of(700), n=2)]
    futures = [engine.submit(request) for pair in zip(good, bad, strict=True) for request in pair]
    settle(engine, *futures)
    assert [substance(f.result()) for f in futures[::2]] == expected(*good)
    assert [failure(f).code for f in futures[1::2]] == ["nan_logits"] * 3
    assert failure(futures[1]).partial == [r["choices"][0]["text"] for r in expected(ask(tokens_of(595), max_tokens=6))]
    assert idle(engine)


def test_one_sample_with_nan_logits_ends_its_job_and_no_other(poisoned: GPT2) -> None:
    class PoisonOne(Runner):
        """Takes one of three samples to the poisoned position by writing a NaN where it reads."""

        def run(self, step: Step) -> Outcome:
            for sequence in step.decodes:
                if len(sequence.prompt) == 7 and sequence.index == 0 and sequence.slot is not None:
                    self.cache.arenas[sequence.slot.length_class].v[0][sequence.slot.index] = float("nan")
            return super().run(step)

    engine = build(runner=PoisonOne)
    bad = engine.submit(ask(tokens_of(7), n=3, temperature=1.0))
    good = engine.submit(ask("Next"))
    settle(engine, bad, good)
    assert failure(bad).code == "nan_logits"
    assert [substance(good.result())] == expected(ask("Next"))
    assert idle(engine)


@pytest.mark.parametrize(
    "bad",
    [
        pytest.param(ask(tokens_of(605)), id="failed"),
        pytest.param(ask(tokens_of(615), max_tokens=0, echo=True), id="echoed"),
        pytest.param(ask(tokens_of(615), max_tokens=0, echo=True, logprobs=1), id="scored"),
        pytest.param(ask(tokens_of(800), max_tokens=10), id="cancelled while its prompt is read"),
    ],
)
def test_what_a_nan_leaves_in_the_cache_does_not_reach_the_next_owner(poisoned: GPT2, bad: Any) -> None:
    good = ask(tokens_of(585), max_tokens=10, logprobs=1)  # reads keys up to the next multiple of 16, which is 608
    engine = build(model=poisoned, slots=1, step_tokens=128)
    first = engine.submit(bad, job_id="bad")
    for _ in range(5):
        engine.step()
    engine.cancel("bad")
    settle(engine, first)
    assert [substance(r) for r in drive(engine, engine.submit(good))] == expected(good)


def test_a_nan_does_not_stay_in_a_place_that_its_row_was_moved_out_of(poisoned: GPT2) -> None:
    engine = build(model=poisoned, slots=2, step_tokens=128)
    head = engine.submit(ask(tokens_of(515, seed=2), max_tokens=12, ignore_eos=True))
    bad = engine.submit(ask(tokens_of(1000), max_tokens=10), job_id="bad")
    while engine.scheduler.running == [] or len(engine.scheduler.running[-1].prompt) != 1000:
        engine.step()
    drive(engine, head)
    moved = engine.scheduler.running[0]
    assert (moved.prefilled, moved.slot) == (896, Slot(1024, 0)), "the case is not the one meant"
    engine.cancel("bad")
    settle(engine, bad)
    good = [ask(tokens_of(585, seed=seed), max_tokens=10, logprobs=1) for seed in (3, 4)]
    assert [substance(r) for r in drive(engine, *map(engine.submit, good))] == expected(*good)


def test_a_prompt_whose_scores_are_nan_is_no_result(poisoned: GPT2) -> None:
    engine = build(model=poisoned)
    future = engine.submit(ask(tokens_of(620), max_tokens=0, echo=True, logprobs=1))
    settle(engine, future)
    assert failure(future).code == "nan_logits"


# --- the end of the engine ---------------------------------------------------------------------------------------------


def test_a_fatal_error_reaches_every_waiter_and_the_owner() -> None:
    fatal: list[BaseException] = []
    engine = build(runner=DyingRunner, slots=3, on_fatal=fatal.append)
    futures = [engine.submit(ask(ignore_eos=True)) for _ in range(6)]
    engine.start()
    for future in futures:
        with pytest.raises(EngineStopped, match="device-side assert"):
            future.result(timeout=10)
    engine.stop()
    assert [type(error) for error in fatal] == [AcceleratorError]
    with pytest.raises(EngineStopped):
        engine.submit(ask())


def test_an_error_outside_the_steps_reaches_every_waiter_too() -> None:
    class NoRoom(Runner):
        def fit(self, capacity: dict[int, int]) -> None:
            raise MemoryError("no room")

    fatal: list[BaseException] = []
    engine = build(runner=NoRoom, on_fatal=fatal.append)
    future = engine.submit(ask())
    with engine, pytest.raises(EngineStopped, match="no room"):
        future.result(timeout=10)
    assert len(fatal) == 1


def test_leaving_the_context_finishes_what_was_taken() -> None:
    engine = build(slots=2)
    with engine:
        futures = [engine.submit(ask(max_tokens=20)) for _ in range(6)]
    assert all(future.result(timeout=0).text for future in futures)
    with pytest.raises(EngineStopped):
        engine.submit(ask())


def test_stopping_without_finishing_tells_those_who_wait() -> None:
    engine = build(slots=1)
    engine.start()
    futures = [engine.submit(ask(max_tokens=1000, ignore_eos=True)) for _ in range(3)]
    engine.stop()
    for future in futures:
        with pytest.raises(EngineStopped):
            future.result(timeout=0)


def test_an_error_inside_the_context_stops_the_engine_at_once() -> None:
    engine = build(slots=1)
    with pytest.raises(ZeroDivisionError), engine:
        future = engine.submit(ask(max_tokens=1000, ignore_eos=True))
        raise ZeroDivisionError
    assert isinstance(future.exception(timeout=0), EngineStopped)


def test_an_engine_that_was_never_started_tells_its_waiters_when_stopped() -> None:
    engine = build()
    future = engine.submit(ask())
    engine.stop()
    assert isinstance(future.exception(timeout=1), EngineStopped)


def test_many_threads_may_submit_and_cancel_at_once() -> None:
    results: list[list[dict[str, Any]]] = []

    def work(engine: Engine) -> None:
        futures = [engine.submit(ask("Next"), job_id=f"{threading.get_ident()}-{i}") for i in range(10)]
        for i in range(1, 10, 2):
            engine.cancel(f"{threading.get_ident()}-{i}")
        results.append([substance(future.result(timeout=30)) for future in futures[::2]])

    with build(slots=8) as engine:
        threads = [threading.Thread(target=work, args=(engine,)) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert results == [expected(ask("Next")) * 5] * 4
    assert idle(engine)
