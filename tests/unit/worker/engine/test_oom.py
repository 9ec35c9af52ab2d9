"""Running out of memory: fewer rows at once, the same results; a job fails only if it cannot be computed alone."""

from __future__ import annotations

from typing import Any

import pytest

from headrace.worker.engine.model_runner import ModelRunner
from headrace.worker.engine.oom import FIRST_WAIT, AdaptiveLimit, out_of_memory, row_count
from headrace.worker.engine.scheduler import ModelRunnerOutput, SchedulerOutput
from tests.unit.worker.engine.engine_helpers import (
    ask,
    build,
    drive,
    expected,
    failure,
    idle,
    settle,
    substance,
    tokens_of,
)
from tests.unit.worker.engine.test_engine_errors import GUILTY


class OutOfMemoryError(RuntimeError):
    """Has the name of torch's error on a GPU."""


LACKS = [
    MemoryError(),
    OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB"),
    RuntimeError("[enforce fail at alloc_cpu.cpp:127] . DefaultCPUAllocator: can't allocate memory: you tried to"),
]


class SmallRunner(ModelRunner):
    """Has memory for a limited number of rows in a step, and of slots."""

    rows, slots = 10**9, 10**9
    lack: Exception = LACKS[2]

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.computed: list[int] = []

    def run(self, step: SchedulerOutput) -> ModelRunnerOutput:
        outcome = super().run(step)  # the cache contents that it wrote must not matter
        if row_count(step) > self.rows:
            raise self.lack
        self.computed.append(row_count(step))
        return outcome

    def fit(self, capacity: dict[int, int]) -> None:
        if sum(capacity.values()) > self.slots:
            raise self.lack
        super().fit(capacity)


def small(**limits: Any) -> type[SmallRunner]:
    return type("Small", (SmallRunner,), limits)


MIX = [
    *(ask(tokens_of(count, seed=count), logprobs=2, max_tokens=12) for count in (3, 40, 127, 128, 129, 300)),
    ask(tokens_of(200), n=3, temperature=1.0, seed=4),
    ask(tokens_of(150), max_tokens=0, echo=True, logprobs=1),
    ask("Once", checkpoints="all"),
]


@pytest.mark.parametrize("lack", LACKS, ids=lambda error: type(error).__name__)
@pytest.mark.parametrize("rows", [128, 200])
def test_a_step_that_memory_does_not_hold_is_computed_in_parts_to_the_same_bits(lack: Exception, rows: int) -> None:
    engine = build(runner=small(rows=rows, lack=lack))
    futures = [engine.submit(request) for request in MIX]
    assert [substance(r) for r in drive(engine, *futures)] == expected(*MIX)
    assert idle(engine)


def test_rows_that_decode_are_computed_in_parts_too() -> None:
    requests = [ask([seed], logprobs=1) for seed in range(1, 12)]
    engine = build(runner=small(rows=3))
    results = drive(engine, *map(engine.submit, requests))
    assert [substance(r) for r in results] == expected(*requests)


def test_the_full_number_of_rows_is_tried_again_when_memory_is_available() -> None:
    engine = build(runner=small(rows=2))
    runner = engine.runner
    assert isinstance(runner, SmallRunner)
    futures = [engine.submit(ask([seed], max_tokens=250, ignore_eos=True)) for seed in range(1, 9)]
    for _ in range(3):
        engine.step()
    assert max(runner.computed) == 2
    runner.rows = 10**9
    drive(engine, *futures)
    assert runner.computed[-1] == 8


def test_a_job_that_fits_nowhere_fails_with_what_to_set_and_harms_no_other() -> None:
    class Guilty(ModelRunner):
        def run(self, step: SchedulerOutput) -> ModelRunnerOutput:
            if any(GUILTY in sequence.prompt for sequence in step.sequences):
                raise MemoryError
            return super().run(step)

    good = [ask(tokens_of(count, seed=count), logprobs=1) for count in (5, 130)]
    engine = build(runner=Guilty)
    first, bad, second = (engine.submit(r) for r in (good[0], ask([*tokens_of(200), GUILTY], n=2), good[1]))
    settle(engine, first, bad, second)
    assert [substance(f.result()) for f in (first, second)] == expected(*good)
    assert failure(bad).code == "out_of_memory"
    assert "HEADRACE_" in failure(bad).message
    assert idle(engine)


@pytest.mark.parametrize("slots", [1, 2, 5, 9])
def test_if_memory_does_not_hold_the_cache_fewer_jobs_run_at_a_time(slots: int) -> None:
    started: list[int] = []
    engine = build(runner=small(slots=slots))
    futures = [
        engine.submit(request, on_start=lambda number=number: started.append(number))
        for number, request in enumerate(MIX)
    ]
    assert [substance(r) for r in drive(engine, *futures)] == expected(*MIX)
    assert started == list(range(len(MIX))), "jobs start in the order of arrival"
    assert idle(engine)


def test_without_memory_for_one_slot_a_job_fails_and_later_ones_are_computed_when_there_is() -> None:
    engine = build(runner=small(slots=0))
    bad = [engine.submit(ask(tokens_of(count))) for count in (3, 200, 900)]
    settle(engine, *bad)
    assert [failure(f).code for f in bad] == ["out_of_memory"] * 3
    engine.runner.slots = 64  # type: ignore[attr-defined]
    good = [ask(tokens_of(900), max_tokens=9), ask(), *(ask([seed]) for seed in range(9))]
    assert [substance(r) for r in drive(engine, *map(engine.submit, good))] == expected(*good)


def test_a_limit_recovers_slowly_and_more_slowly_after_each_attempt_that_fails() -> None:
    limit = AdaptiveLimit(100)
    limit.lower(25)
    for _ in range(FIRST_WAIT):
        assert limit.current == 25
        limit.note_step()
    assert limit.current == 50
    limit.lower(25)
    for _ in range(2 * FIRST_WAIT):
        assert limit.current == 25
        limit.note_step()
    assert limit.current == 50
    for _ in range(2 * FIRST_WAIT):
        limit.note_step()
    assert limit.current == 100


def test_out_of_memory_errors_are_recognised() -> None:
    assert all(out_of_memory(error) for error in LACKS)
    assert not any(out_of_memory(error) for error in (RuntimeError("shape"), ValueError("out of memory"), KeyError()))
