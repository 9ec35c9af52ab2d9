"""Log probabilities of prompts and continuations: their values, their split, and what is computed for them."""

from __future__ import annotations

import math

import pytest
import torch
from transformers import GPT2LMHeadModel

from headrace.client.batch.openai import completion, join_results
from headrace.client.batch.scores import best_answer, score_of
from headrace.client.wire.errors import JobFailed
from headrace.client.wire.requests import GenerateRequest
from headrace.client.wire.results import Result
from headrace.model.hub import DEMO
from headrace.worker.engine import model_runner
from tests.unit.worker.engine.engine_helpers import ask, build, demo_tokenizer, drive, substance, tokens_of


def pair(prompt: str | list[int], continuation: str | list[int], **fields: object) -> GenerateRequest:
    return ask(prompt, continuation=continuation, max_tokens=0, **fields)


@pytest.fixture(scope="module")
def reference() -> GPT2LMHeadModel:
    return GPT2LMHeadModel.from_pretrained(DEMO, dtype=torch.float64).eval()


def compute(*requests: GenerateRequest, **options: int) -> list[Result]:
    engine = build(**options)
    return drive(engine, *[engine.submit(request) for request in requests])


@pytest.mark.parametrize("length", [1, 40, 130, 300])
def test_a_continuation_has_the_log_probabilities_of_transformers(reference: GPT2LMHeadModel, length: int) -> None:
    prompt, continuation = tokens_of(length, seed=3), tokens_of(7, seed=5)
    (result,) = compute(pair(prompt, continuation, logprobs=2))
    with torch.inference_mode():
        rows = reference(torch.tensor([prompt + continuation])).logits[0].double().log_softmax(-1)[length - 1 : -1]
    expected = [float(row[token]) for row, token in zip(rows, continuation, strict=True)]
    score = score_of(result)
    assert score.token_logprobs == pytest.approx(expected, abs=1e-4)
    assert score.logprob == pytest.approx(math.fsum(expected), abs=1e-3)
    ranks = [int((row > row[token]).sum()) + 1 for row, token in zip(rows, continuation, strict=True)]
    assert [token.rank for token in score.tokens] == ranks
    assert [token.top[0].token_id for token in score.tokens] == rows.argmax(-1).tolist()
    assert score.is_greedy == (ranks == [1] * 7)
    assert result.choices[0].token_ids == continuation
    assert result.usage.completion_tokens == 0


def test_the_likeliest_tokens_are_found_only_if_a_request_of_the_step_asks_for_them(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    counts: list[int] = []
    original = model_runner.top_logprobs

    def counted(logits: torch.Tensor, tokens: torch.Tensor, count: int) -> tuple[torch.Tensor, ...]:
        counts.append(count)
        return original(logits, tokens, count)

    monkeypatch.setattr(model_runner, "top_logprobs", counted)
    (alone,) = compute(pair("The king", " and"))
    assert counts[-1] == 0  # those before it are of the self-test when the model is loaded
    beside, asking = compute(pair("The king", " and"), pair("The queen", " and", logprobs=2))
    assert counts[-1] == 20
    assert substance(alone) == substance(beside)
    assert [len(token.top) for token in score_of(asking).tokens] == [2]


def test_what_the_model_writes_itself_is_greedy() -> None:
    (text,) = compute(ask("Once upon a time", max_tokens=5))
    (same, other) = compute(pair("Once upon a time", text.text), pair("Once upon a time", text.text + " zebra"))
    assert score_of(same).is_greedy
    assert not score_of(other).is_greedy
    assert score_of(other).logprob < score_of(same).logprob


@pytest.mark.parametrize(
    ("prompt", "continuation", "before", "after"),
    [
        ("The sky is", " blue and wide", "The sky is", " blue and wide"),
        ("The sky is ", "blue", "The sky is", " blue"),  # a space before a word is part of its token
        ("A: \n", "yes", "A:", " \nyes"),
        ("", "Hello there", "<|endoftext|>", "Hello there"),
        (" ", "Hello", "<|endoftext|>", " Hello"),
    ],
)
def test_prompt_and_continuation_are_split_as_harnesses_do(
    prompt: str, continuation: str, before: str, after: str
) -> None:
    (result,) = compute(pair(prompt, continuation))
    tokenizer = demo_tokenizer()
    context = tokenizer.encode(before, parse_special_tokens=True)
    assert result.choices[0].token_ids == tokenizer.encode(before + after, parse_special_tokens=True)[len(context) :]
    assert result.usage.prompt_tokens == len(context) + len(result.choices[0].token_ids)
    score = score_of(result)
    assert (result.text, score.characters, score.bytes) == (continuation, len(continuation), len(continuation))


def test_a_continuation_without_a_token_of_its_own_is_refused() -> None:
    tokenizer = demo_tokenizer()
    assert len(tokenizer.encode(" king")) == len(tokenizer.encode(" kin")) == 1
    with pytest.raises(JobFailed, match="continuation: it has no token of its own"):
        compute(pair(" kin", "g"))


def test_pairs_that_share_a_prefix_compute_it_once_and_have_the_bits_that_they_have_alone() -> None:
    prompt = tokens_of(140, seed=2)
    requests = [pair(prompt, tokens_of(3 + i, seed=7 + i), logprobs=3) for i in range(4)]
    requests += [ask(prompt, max_tokens=0, prompt_logprobs=2), ask([*prompt, 5], max_tokens=3, prompt_logprobs=0)]
    engine = build(prefill_chunk=32)
    rows = 0
    futures = [engine.submit(request) for request in requests]
    original = engine.runner.run

    def counted(step):  # type: ignore[no-untyped-def]
        nonlocal rows
        rows += sum(chunk.count for chunk in step.chunks)
        return original(step)

    engine.runner.run = counted  # type: ignore[method-assign]
    together = [substance(result) for result in drive(engine, *futures)]
    alone = [substance(compute(request, prefill_chunk=32)[0]) for request in requests]
    assert together == alone
    # The first pair, three that share the 128 tokens of its whole chunks, and two prompts that are scored themselves.
    assert rows == 143 + sum(12 + 3 + i for i in range(1, 4)) + 140 + 141


def test_scores_of_a_prompt_are_those_of_an_echo_in_the_form_of_vllm() -> None:
    prompt = tokens_of(150, seed=4)
    echoed, scored, plain = compute(
        ask(prompt, max_tokens=2, echo=True, logprobs=3), ask(prompt, max_tokens=2, prompt_logprobs=3, n=2), ask(prompt)
    )
    assert scored.prompt_logprobs == (echoed.choices[0].logprobs or [])[:150]
    assert scored.choices[0].logprobs is None
    assert plain.prompt_logprobs is None
    assert "prompt_logprobs" not in plain.model_dump()
    for choice in completion(scored)["choices"]:
        first, *others = choice["prompt_logprobs"]
        assert first is None
        for token, entries in zip(prompt[1:], others, strict=True):
            own = entries[str(token)]
            assert len(entries) in (3, 4)
            assert [e["rank"] for e in entries.values() if e is not own] == [r for r in (1, 2, 3) if r != own["rank"]]
    joined = completion(join_results([scored, plain]))["choices"]
    assert ["prompt_logprobs" in choice for choice in joined] == [True, True, False]


def test_the_best_answer_depends_on_what_lengths_are_worth() -> None:
    short, long = (score_of(each) for each in compute(pair("He went", " zebra"), pair("He went", " to the house")))
    short = short.model_copy(update={"logprob": -6.0})
    long = long.model_copy(update={"logprob": -6.5})
    best = {by: best_answer(["short", "long"], [short, long], by) for by in ("none", "token", "character", "byte")}
    assert best == {"none": "short", "token": "long", "character": "long", "byte": "long"}
    assert (long.normalized("character"), long.normalized("token")) == (-6.5 / 13, -6.5 / 3)
