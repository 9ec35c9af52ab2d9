"""Speculative decoding changes only the number of steps: results have the same bits with and without it."""

from __future__ import annotations

import functools
from typing import Any

import pytest

from headrace.client.wire.requests import GenerateRequest
from headrace.model import Decoder, load_model
from headrace.worker.engine.engine import Engine
from headrace.worker.engine.model_runner import ModelRunner
from headrace.worker.engine.oom import row_count
from headrace.worker.engine.scheduler import ModelRunnerOutput, SchedulerOutput
from headrace.worker.engine.sequence_text import TextDelta
from tests.unit.worker.engine.engine_helpers import ask, build, drive, failure, idle, settle, substance, tokens_of
from tests.unit.worker.engine.test_batch_invariance import alone, mixed_requests

#: " said the King, said the King, ...": the bundled model repeats this, and accepts most proposed tokens.
CHANT = [531, 262, 2677, 11] * 8


@functools.cache
def half() -> Decoder:
    return load_model("demo", device="cpu", dtype="bfloat16")


@functools.cache
def repetitive() -> list[GenerateRequest]:
    """Requests with repetitive texts, so that proposed tokens are accepted, and with every kind of end."""
    kinds: list[dict[str, Any]] = [
        {"max_tokens": 90, "logprobs": 3},
        {"temperature": 0.5, "n": 3, "logprobs": 1},
        {"temperature": 0.7, "top_p": 0.8, "logprobs": 0},
        {"temperature": 0.3, "top_k": 5, "min_p": 0.1},
        {"repetition_penalty": 1.02, "logprobs": 2},
        {"presence_penalty": 0.6, "frequency_penalty": 0.05, "temperature": 0.4, "logprobs": 2},
        {"logit_bias": {11: -1.5, 262: 0.5}, "logprobs": 1},
        {"stop": ["King, said the"]},
        {"stop": [", s"], "min_tokens": 9},
        {"stop_token_ids": [2677], "min_tokens": 6, "logprobs": 1},
        {"max_tokens": 2},
        {"max_tokens": 1},
        {"echo": True, "logprobs": 1},
        {"max_tokens": 128 - len(CHANT)},  # to the very end of its slot
    ]
    return [ask(CHANT, **{"max_tokens": 40, "ignore_eos": True, "seed": i, **kind}) for i, kind in enumerate(kinds)]


def texts(engine: Engine, requests: list[GenerateRequest]) -> list[dict[str, Any]]:
    return [substance(result) for result in drive(engine, *map(engine.submit, requests))]


@functools.cache
def without_drafts(dtype: str = "float32") -> list[dict[str, Any]]:
    """The results of the requests without speculative decoding."""
    return texts(build(model=half() if dtype == "bfloat16" else None), repetitive())


@pytest.mark.parametrize(("dtype", "slots"), [("float32", 1), ("float32", 12), ("bfloat16", 3)])
def test_tokens_and_log_probabilities_have_the_same_bits_with_speculative_decoding(dtype: str, slots: int) -> None:
    model = half() if dtype == "bfloat16" else None
    engine = build(model=model, slots=slots, draft_tokens=7)
    expected = without_drafts(dtype)
    assert texts(engine, repetitive()) == expected
    assert idle(engine)
    assert engine.stats().tokens == sum(result["usage"]["completion_tokens"] for result in expected)
    assert 0 < engine.stats().accepted < engine.stats().proposed


@pytest.mark.parametrize("slots", [2, 9])
def test_mixed_jobs_have_the_same_bits_with_speculative_decoding(slots: int) -> None:
    engine = build(slots=slots, draft_tokens=7, step_tokens=200)
    assert texts(engine, mixed_requests()) == alone()


def test_streamed_text_has_the_same_pieces() -> None:
    told: list[list[TextDelta]] = []
    for drafts in (0, 7):
        engine = build(draft_tokens=drafts)
        deltas: list[TextDelta] = []
        request = ask(CHANT, max_tokens=40, stop=["King, King"], ignore_eos=True)
        drive(engine, engine.submit(request, on_text=deltas.append))
        told.append(deltas)
    assert told[0] == told[1]
    assert len(told[0]) > 5


def test_each_accepted_token_saves_a_step() -> None:
    engine = build(draft_tokens=7)
    drive(engine, engine.submit(ask(CHANT, max_tokens=80, ignore_eos=True)))
    assert engine.stats().steps == 80 - engine.stats().accepted
    assert engine.stats().accepted > 40


def test_the_slot_of_a_job_cancelled_during_speculation_does_not_affect_the_next_job() -> None:
    (expected,) = texts(build(), [ask(tokens_of(30), max_tokens=60, logprobs=1, ignore_eos=True)])
    engine = build(draft_tokens=7, slots=1)
    chant = engine.submit(ask(CHANT, max_tokens=90, ignore_eos=True))
    while engine.stats().accepted < 10:
        engine.step()
    chant.cancel()
    assert texts(engine, [ask(tokens_of(30), max_tokens=60, logprobs=1, ignore_eos=True)]) == [expected]


def test_a_captured_job_proposes_no_tokens_and_gets_an_empty_slot() -> None:
    request = ask(CHANT, max_tokens=20, checkpoints="all", ignore_eos=True)
    traces: list[dict[str, bytes]] = []
    for drafts in (0, 7):
        engine = build(draft_tokens=drafts, slots=1)
        drive(engine, engine.submit(ask(CHANT, max_tokens=40, ignore_eos=True)))
        before = engine.stats().proposed
        drive(engine, engine.submit(request, on_activations=traces.append))
        assert engine.stats().proposed == before
        assert bool(before) == bool(drafts)
    assert traces[0] == traces[1]


def test_a_nan_in_rows_of_proposed_tokens_fails_no_job() -> None:
    """The position after the first text has a NaN, and the rows of its proposed tokens reach it."""
    meets = ask(CHANT, max_tokens=90, ignore_eos=True)
    stops = ask(CHANT, max_tokens=90, min_tokens=60, stop=[" "], logprobs=1, ignore_eos=True)
    written = texts(build(), [stops])[0]["usage"]["completion_tokens"]
    beyond = len(CHANT) + written - 1  # the last token itself is not read
    later = ask(tokens_of(9), max_tokens=beyond - 9, logprobs=1, ignore_eos=True)
    model = load_model("demo", device="cpu", dtype="float32")
    model.wpe[beyond] = float("nan")
    expected = texts(build(), [stops, later])
    partial: list[list[str]] = []
    for drafts in (0, 7):
        engine = build(model=model, draft_tokens=drafts, slots=1)
        reached: list[int] = []
        _watch(engine, reached)
        first, bad, after = (engine.submit(request) for request in (stops, meets, later))
        settle(engine, first, bad, after)
        assert substance(first.result()) == expected[0]
        assert substance(after.result()) == expected[1]
        assert failure(bad).code == "nan_logits"
        partial.append(failure(bad).partial)
        assert (max(reached) >= beyond) == bool(drafts), "the first job's rows"
    assert partial[0] == partial[1]


def _watch(engine: Engine, reached: list[int]) -> None:
    """Record the last position that the first job's rows reach."""
    run = engine.runner.run
    first: list[object] = []

    def watched(step: SchedulerOutput) -> ModelRunnerOutput:
        for sequence in step.decodes:
            first[:] = first or [sequence]
            if sequence is first[0]:
                reached.append(len(sequence.prompt) + len(sequence.output) - 1 + len(step.proposed.get(sequence, [])))
        return run(step)

    engine.runner.run = watched  # type: ignore[method-assign]


def test_a_step_that_fails_with_proposed_tokens_is_computed_without_them() -> None:
    class NoDrafts(ModelRunner):
        def run(self, step: SchedulerOutput) -> ModelRunnerOutput:
            if step.proposed:
                raise RuntimeError("the kernel is not in the mood")
            return super().run(step)

    engine = build(runner=NoDrafts, draft_tokens=7)
    assert texts(engine, repetitive()) == without_drafts()
    assert engine.stats().accepted == 0


def test_if_memory_holds_one_row_no_tokens_are_proposed_and_no_job_fails() -> None:
    class OneRow(ModelRunner):
        def run(self, step: SchedulerOutput) -> ModelRunnerOutput:
            if step.decodes and row_count(step) > 1:
                raise MemoryError
            return super().run(step)

    engine = build(runner=OneRow, draft_tokens=7)
    assert texts(engine, repetitive()) == without_drafts()
    assert idle(engine)
