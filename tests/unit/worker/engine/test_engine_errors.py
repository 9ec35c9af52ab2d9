"""A faulty job affects no other: rows that raise exceptions, and rows with NaN."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from headrace.model import Decoder, load_model
from headrace.model.generation_config import Ends
from headrace.model.kv_cache import KVCache
from headrace.worker.engine.model_runner import ModelRunner
from headrace.worker.engine.scheduler import ModelRunnerOutput, SchedulerOutput
from headrace.worker.engine.sequence import Sequence, Slot
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

#: A job whose prompt or output contains this token is faulty.
GUILTY = 4242


class FaultyRunner(ModelRunner):
    """The real model runner, which raises an exception for faulty sequences."""

    guilty: Callable[[Sequence], bool] = staticmethod(lambda sequence: GUILTY in sequence.prompt)

    def run(self, step: SchedulerOutput) -> ModelRunnerOutput:
        if any(self.guilty(sequence) for sequence in step.sequences):
            raise RuntimeError("the kernel is not in the mood")
        return super().run(step)


@pytest.fixture(scope="module")
def poisoned() -> Decoder:
    """The bundled model with a NaN in position 600: sequences that get there have NaN logits, others do not."""
    model = load_model("demo", device="cpu", dtype="float32")
    model.wpe[600] = float("nan")
    return model


def test_a_job_that_makes_the_step_raise_fails_alone() -> None:
    good = [ask(tokens_of(count, seed=count), logprobs=1) for count in (3, 90, 130, 300)]
    bad = [ask([*tokens_of(count), GUILTY]) for count in (2, 50, 200)]
    engine = build(runner=FaultyRunner)
    futures = [engine.submit(request) for pair in zip(good, [*bad, ask()], strict=True) for request in pair]
    settle(engine, *futures)
    assert [substance(f.result()) for f in futures[::2]] == expected(*good)
    assert [failure(f).code for f in futures[1:7:2]] == ["internal_error"] * 3
    assert idle(engine)


def test_samples_of_a_faulty_prompt_fail_together_and_fail_no_other_job() -> None:
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


@pytest.fixture
def dense(monkeypatch: pytest.MonkeyPatch) -> None:
    """Use torch's attention, which reads beyond a row's positions and needs the first slots of an arena."""
    monkeypatch.setattr(KVCache, "decode_kernel", lambda _: None)


@pytest.mark.usefixtures("dense")
def test_a_sequence_moved_into_the_slot_of_a_failed_one_keeps_its_prompt() -> None:
    """The last sequence is computed before the faulty one in front of it, whose slot it then takes."""
    first, second = ask(tokens_of(14), max_tokens=1), ask(tokens_of(5, seed=2), logprobs=1)
    engine = build(runner=FaultyRunner, step_tokens=16)
    head, moved, bad = (engine.submit(r) for r in (first, second, ask([*tokens_of(4), GUILTY])))
    drive(engine, head)  # the faulty sequence moves to the front, before the good one
    settle(engine, moved, bad)
    assert failure(bad).code == "internal_error"
    assert [substance(moved.result())] == expected(second)


def test_a_job_with_nan_logits_fails_alone(poisoned: Decoder) -> None:
    engine = build(model=poisoned)
    good = [ask(tokens_of(count), logprobs=1) for count in (5, 130, 580)]
    bad = [ask(tokens_of(595), max_tokens=20, ignore_eos=True), ask(tokens_of(605)), ask(tokens_of(700), n=2)]
    futures = [engine.submit(request) for pair in zip(good, bad, strict=True) for request in pair]
    settle(engine, *futures)
    assert [substance(f.result()) for f in futures[::2]] == expected(*good)
    assert [failure(f).code for f in futures[1::2]] == ["nan_logits"] * 3
    assert failure(futures[1]).partial == [r["choices"][0]["text"] for r in expected(ask(tokens_of(595), max_tokens=6))]
    assert idle(engine)


def test_one_sample_with_nan_logits_ends_its_job_and_no_other(poisoned: Decoder) -> None:
    class PoisonOne(ModelRunner):
        """Writes a NaN to a position that one of three samples reads."""

        def run(self, step: SchedulerOutput) -> ModelRunnerOutput:
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


@pytest.mark.usefixtures("dense")
@pytest.mark.parametrize(
    "bad",
    [
        pytest.param(ask(tokens_of(605)), id="failed"),
        pytest.param(ask(tokens_of(615), max_tokens=0, echo=True), id="echoed"),
        pytest.param(ask(tokens_of(615), max_tokens=0, echo=True, logprobs=1), id="scored"),
        pytest.param(ask(tokens_of(800), max_tokens=10), id="cancelled while its prompt is read"),
    ],
)
def test_a_nan_in_the_cache_does_not_reach_the_next_sequence_of_the_slot(poisoned: Decoder, bad: Any) -> None:
    good = ask(tokens_of(585), max_tokens=10, logprobs=1)  # reads keys up to the next multiple of 16, which is 608
    engine = build(model=poisoned, slots=1, step_tokens=128)
    first = engine.submit(bad, job_id="bad")
    for _ in range(5):
        engine.step()
    engine.cancel("bad")
    settle(engine, first)
    assert [substance(r) for r in drive(engine, engine.submit(good))] == expected(good)


@pytest.mark.usefixtures("dense")
def test_a_nan_does_not_stay_in_a_slot_that_its_sequence_was_moved_from(poisoned: Decoder) -> None:
    engine = build(model=poisoned, slots=2, step_tokens=128)
    head = engine.submit(ask(tokens_of(515, seed=2), max_tokens=7, ignore_eos=True))
    bad = engine.submit(ask(tokens_of(1000), max_tokens=10), job_id="bad")
    drive(engine, head)
    engine.step()
    moved = engine.scheduler.running[0]
    assert (moved.prefilled, moved.slot) == (896, Slot(1024, 0)), "the case is not the one meant"
    engine.cancel("bad")
    settle(engine, bad)
    good = [ask(tokens_of(585, seed=seed), max_tokens=10, logprobs=1) for seed in (3, 4)]
    assert [substance(r) for r in drive(engine, *map(engine.submit, good))] == expected(*good)


def test_a_prompt_whose_scores_are_nan_fails_its_job(poisoned: Decoder) -> None:
    engine = build(model=poisoned)
    future = engine.submit(ask(tokens_of(620), max_tokens=0, echo=True, logprobs=1))
    settle(engine, future)
    assert failure(future).code == "nan_logits"


@pytest.mark.parametrize(
    ("request_", "scores"),
    [
        ({"n": 128, "max_tokens": 300, "logprobs": 20}, 128 * 300 * 21),
        ({"n": 128, "max_tokens": 300, "logprobs": 20, "echo": True}, 128 * 310 * 21),
        ({"n": 128, "max_tokens": 0, "logprobs": 20, "echo": True, "prompt": tokens_of(200)}, 128 * 200 * 21),
    ],
    ids=["new tokens", "with the prompt", "the prompt alone"],
)
def test_a_job_for_gigabytes_of_log_probabilities_is_refused(request_: dict[str, Any], scores: int) -> None:
    engine = build()
    future = engine.submit(ask(**{"prompt": tokens_of(10), **request_}))
    assert failure(future).code == "too_many_logprobs"
    assert f"ask for {scores} log probabilities" in str(failure(future))
    assert idle(engine)


def test_the_empty_prompt_needs_a_token_with_which_texts_begin() -> None:
    engine = build(ends=Ends((50256,), None))
    refused = failure(engine.submit(ask("")))
    assert refused.code == "empty_prompt"
    assert "set bos_token_id in generation_config.json" in str(refused)
