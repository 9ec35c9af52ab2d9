"""Batch invariance: a job's tokens, text and log probabilities have the same bits in any batch composition."""

from __future__ import annotations

import functools
import random
from collections.abc import Callable
from concurrent.futures import CancelledError
from typing import Any

import pytest
import torch

from headrace.client.wire.requests import GenerateRequest
from headrace.model import Decoder, load_model
from headrace.worker.engine.scheduler import ModelRunnerOutput, SchedulerOutput
from headrace.worker.engine.sequence import Sequence
from headrace.worker.engine.sequence_text import SequenceText
from tests.unit.worker.engine.engine_helpers import (
    WORDS,
    ask,
    build,
    demo_model,
    demo_tokenizer,
    drive,
    idle,
    substance,
    tokens_of,
    torch_model,
)


@functools.cache
def mixed_requests() -> list[GenerateRequest]:
    """64 different requests: lengths around all boundaries of chunks and length classes, all parameters."""
    draw = random.Random(20190214)
    lengths = [1, 2, 3, 15, 16, 17, 60, 100, 120, 127, 128, 129, 140, 200, 256, 257, 300, 513]
    kinds: list[dict[str, Any]] = [
        {"temperature": 0},
        {"temperature": 0, "logprobs": 5},
        {"temperature": 0.9, "top_p": 0.9, "logprobs": 2},
        {"temperature": 1.3, "top_k": 40},
        {"temperature": 1.0, "min_p": 0.05, "logprobs": 0},
        {"temperature": 0.8, "top_k": 100, "top_p": 0.8, "min_p": 0.01},
        {"temperature": 1.1, "presence_penalty": 0.7, "frequency_penalty": 0.4, "logprobs": 1},
        {"temperature": 0, "repetition_penalty": 1.4, "logprobs": 1},
        {"temperature": 1.5, "logit_bias": {11: 3.0, 13: -100.0, 198: -5.0}},
        {"temperature": 1.2, "n": 3, "logprobs": 3},
        {"temperature": 0, "echo": True, "logprobs": 2},
        {"temperature": 1.4, "n": 2, "echo": True, "logprobs": 1},
        {"temperature": 1.0, "stop": ["e", "\n\n"], "echo": True},
        {"temperature": 1.0, "stop_token_ids": [11, 13, 262], "min_tokens": 3},
        {"temperature": 0, "max_tokens": 0, "echo": True, "logprobs": 1},
        {"temperature": 1.9, "ignore_eos": True},
    ]
    requests = []
    for i in range(64):
        fields = {"max_tokens": draw.randint(1, 10), "seed": 2 * i - 60, **kinds[i % len(kinds)]}
        fields["min_tokens"] = min(fields.get("min_tokens", 0), fields["max_tokens"])
        prompt = WORDS[: draw.randint(0, len(WORDS))] if i % 5 == 0 else tokens_of(draw.choice(lengths), seed=i % 20)
        requests.append(ask(prompt, priority=draw.choice(["interactive", "normal", "bulk"]), **fields))
    return requests


@functools.cache
def alone() -> list[dict[str, Any]]:
    """The result of each of the requests, computed alone."""
    engine = build()
    return [substance(drive(engine, engine.submit(request))[0]) for request in mixed_requests()]


@pytest.mark.parametrize(
    "shape",
    [
        pytest.param({}, id="all at once"),
        pytest.param({"slots": 3}, id="three slots"),
        pytest.param({"step_tokens": 16}, id="one chunk a step"),
        pytest.param({"budget_positions": 1024}, id="a cache for one long sequence"),
        pytest.param({"slots": 20, "step_tokens": 150, "budget_positions": 5000}, id="a bit of each"),
    ],
)
def test_64_mixed_jobs_at_once_give_the_same_bits_as_one_by_one(shape: dict[str, int]) -> None:
    engine = build(**shape)
    results = drive(engine, *[engine.submit(request) for request in mixed_requests()])
    for result, expected in zip(results, alone(), strict=True):
        assert substance(result) == expected
    assert idle(engine)


@pytest.mark.parametrize(("threads", "gpt2"), [(2, demo_model), (1, torch_model)])
def test_more_threads_and_torchs_gemms_are_batch_invariant_too(threads: int, gpt2: Callable[[], Decoder]) -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        requests = mixed_requests()[2:7]
        single = build(model=gpt2())
        expected = [substance(drive(single, single.submit(request))[0]) for request in requests]
        crowd = build(model=gpt2())
        assert [substance(r) for r in drive(crowd, *map(crowd.submit, requests))] == expected
    finally:
        torch.set_num_threads(before)


def test_jobs_that_arrive_one_after_another_among_cancelled_ones_give_the_same_bits() -> None:
    draw = random.Random(7)
    engine = build(slots=12, step_tokens=200, budget_positions=12 * 300)
    order = list(enumerate(mixed_requests()))
    draw.shuffle(order)
    futures, doomed = {}, []
    while order or not all(future.done() for future in futures.values()):
        for _ in range(min(len(order), draw.randint(0, 3))):
            i, request = order.pop()
            futures[i] = engine.submit(request)
            # Another request, sometimes with the same prompt, so that it may become the prefix source.
            neighbour = ask(request.prompt, max_tokens=20, temperature=1.0, n=draw.randint(1, 2))
            neighbour = draw.choice([neighbour, ask(tokens_of(200, seed=i), max_tokens=50)])
            job_id = f"neighbour-{i}"
            doomed.append((job_id, engine.submit(neighbour, job_id=job_id)))
        for job_id, future in doomed:
            if draw.random() < 0.2:
                if draw.random() < 0.5:
                    engine.cancel(job_id)
                else:
                    future.cancel()
        engine.step()
    for i, future in futures.items():
        assert substance(future.result(timeout=0)) == alone()[i]
    for job_id, _ in doomed:
        engine.cancel(job_id)
    engine.step()
    assert all(future.done() for _, future in doomed)
    assert idle(engine)


def test_n_samples_are_the_same_bits_as_n_computations_of_one_sample() -> None:
    """Sample i is computed alone: the other samples of its job are removed before the first step."""
    request = ask(tokens_of(150), n=4, temperature=1.3, seed=99, logprobs=2, max_tokens=10)
    engine = build()
    (together,) = drive(engine, engine.submit(request))
    for index, choice in enumerate(together.choices):
        sequence = Sequence(request, list(request.prompt), index, 99, engine.ends.eos_ids)
        text = SequenceText(sequence, demo_tokenizer())
        scheduler = (single := build()).scheduler
        scheduler.add(sequence, priority=0)
        scheduler.admit()
        single.runner.fit(scheduler.slots.capacity)
        while sequence.finish_reason is None:
            step = scheduler.schedule()
            for _, score in single.runner.run(step).tokens:
                assert score is not None
                sequence.append(score)
                text.decode_last_token()
            for chunk in step.chunks:
                scheduler.advance(chunk)
        assert text.choice() == choice


def test_equal_prompts_give_equal_results_however_their_prefill_is_shared() -> None:
    engine = build(slots=6)
    prompt = tokens_of(300)
    requests = [ask(prompt, max_tokens=count, logprobs=1) for count in (4, 400, 8, 100, 1, 8, 30)]
    futures = [engine.submit(requests[0])]
    engine.step()  # the others join while the first one decodes
    futures += [engine.submit(request) for request in requests[1:]]
    longest, *others = sorted((r.choices[0] for r in drive(engine, *futures)), key=lambda c: -len(c.token_ids))
    for choice in others:
        assert choice.logprobs == (longest.logprobs or [])[: len(choice.token_ids)]


def test_cancelled_futures_raise_cancelled_error() -> None:
    engine = build()
    future = engine.submit(ask())
    assert future.cancel()
    engine.step()
    with pytest.raises(CancelledError):
        future.result(timeout=0)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_prompts_with_a_common_prefix_give_the_same_bits_as_alone(dtype: str) -> None:
    begin, model = tokens_of(300), load_model("demo", device="cpu", dtype=dtype)
    kinds = [
        (300, 7, 0.0),
        (300, 90, 1.0),
        (256, 1, 0.0),
        (129, 200, 1.0),
        (300, 7, 0.0),
        (128, 30, 0.5),
        (200, 0, 0.0),
    ]
    requests = [
        ask([*begin[:common], *tokens_of(rest, seed=i)], max_tokens=5, temperature=heat, seed=i, logprobs=3)
        for i, (common, rest, heat) in enumerate(kinds)
    ]
    single, crowd = build(model=model), build(model=model, slots=4, step_tokens=256)
    expected = [substance(drive(single, single.submit(request))[0]) for request in requests]
    rows, run = [], crowd.runner.run

    def counted(step: SchedulerOutput) -> ModelRunnerOutput:
        rows.append(sum(chunk.count for chunk in step.chunks))
        return run(step)

    crowd.runner.run = counted  # type: ignore[method-assign]
    results = drive(crowd, *[crowd.submit(request) for request in requests])
    assert [substance(result) for result in results] == expected
    assert sum(rows) < sum(len(request.prompt) for request in requests) - 5 * 128, "common prefixes were computed again"
    assert idle(crowd)
