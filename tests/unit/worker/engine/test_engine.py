"""Results of an engine for one job or a few, compared with Hugging Face transformers on the bundled model."""

from __future__ import annotations

import functools
import time

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from transformers import GPT2LMHeadModel

from headrace.client.batch.openai import completion
from headrace.client.wire.errors import JobFailed
from headrace.client.wire.requests import MAX_LOGPROBS
from headrace.model import Decoder
from headrace.model.hub import DEMO
from headrace.worker.engine.sequence_text import TextDelta
from tests.unit.worker.engine.engine_helpers import (
    ask,
    build,
    demo_model,
    demo_tokenizer,
    drive,
    idle,
    substance,
    tokens_of,
)


@pytest.fixture(scope="module")
def reference() -> GPT2LMHeadModel:
    return GPT2LMHeadModel.from_pretrained(DEMO, dtype=torch.float64).eval()


def greedy(reference: GPT2LMHeadModel, prompt: list[int], count: int) -> list[int]:
    """What transformers generates, end-of-text included."""
    ids = torch.tensor([prompt])
    out = reference.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=count,
        do_sample=False,
        pad_token_id=50256,
        eos_token_id=50256,
    )
    tokens: list[int] = out[0, len(prompt) :].tolist()
    return tokens


def test_a_mixed_batch_gives_the_tokens_of_transformers_generate(reference: GPT2LMHeadModel) -> None:
    texts = ["Hello.", "The quick brown", "Once upon a time", "Ünïcode — 東京", "  ", "A" * 40]
    prompts = [demo_tokenizer().encode(text) for text in texts]
    prompts += [tokens_of(count, seed=count) for count in (1, 5, 16, 100, 127, 128, 129, 300, 700)]
    engine = build()
    futures = [engine.submit(ask(prompt, max_tokens=12)) for prompt in prompts]
    results = drive(engine, *futures)
    assert [r.choices[0].token_ids for r in results] == [greedy(reference, prompt, 12) for prompt in prompts]
    assert idle(engine)


def test_the_empty_prompt_stands_for_end_of_text(reference: GPT2LMHeadModel) -> None:
    (result,) = drive(engine := build(), engine.submit(ask("")))
    assert result.choices[0].token_ids == greedy(reference, [50256], 8)
    assert result.usage.prompt_tokens == 1
    assert result.usage.total_tokens == 9


@pytest.mark.parametrize(("read", "write"), [(1023, 1), (1, 1), (900, 124)])
def test_prompt_and_new_tokens_may_fill_all_positions(reference: GPT2LMHeadModel, read: int, write: int) -> None:
    prompt = tokens_of(read)
    count = min(write, 20)  # of the long one, the first tokens are compared and the rest only counted
    (result,) = drive(engine := build(), engine.submit(ask(prompt, max_tokens=write, ignore_eos=True)))
    assert result.choices[0].token_ids[:count] == greedy(reference, prompt, count)
    assert result.usage.completion_tokens == write
    assert result.choices[0].finish_reason == "length"


def test_a_prompt_of_1024_tokens_can_be_scored_but_not_continued() -> None:
    engine = build()
    scored = engine.submit(ask(tokens_of(1024), max_tokens=0, echo=True, logprobs=1))
    refused = engine.submit(ask(tokens_of(1024), max_tokens=1))
    (result,) = drive(engine, scored)
    assert len(result.choices[0].logprobs or []) == 1024
    with pytest.raises(JobFailed, match=r"1024 tokens and max_tokens is 1, together 1025.* at most 1024") as caught:
        refused.result(timeout=0)
    assert caught.value.code == "context_length_exceeded"


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"prompt": [1, 50257]}, "prompt names token id 50257"),
        ({"prompt": "x", "logit_bias": {60000: 1.0}}, "logit_bias names token id 60000"),
        ({"prompt": "x", "stop_token_ids": [1, 99999]}, "stop_token_ids names token id 99999"),
    ],
)
def test_token_ids_outside_the_vocabulary_are_refused_at_once(fields: dict[str, object], named: str) -> None:
    engine = build()
    with pytest.raises(JobFailed, match=f"{named}.*ends at 50256") as caught:
        engine.submit(ask(**fields)).result(timeout=0)  # type: ignore[arg-type]
    assert caught.value.code == "invalid_token_id"
    assert engine.stats().waiting == 0


@pytest.mark.parametrize("length", [2, 40, 130, 300])
def test_scoring_a_prompt_gives_the_log_probabilities_of_transformers(reference: GPT2LMHeadModel, length: int) -> None:
    prompt = tokens_of(length, seed=3)
    (result,) = drive(
        engine := build(), engine.submit(ask(prompt, max_tokens=0, echo=True, logprobs=3, temperature=0.7))
    )
    with torch.inference_mode():
        expected = reference(torch.tensor([prompt])).logits[0].log_softmax(-1)
    scores = result.choices[0].logprobs or []
    assert [s.token_id for s in scores] == prompt == result.choices[0].token_ids
    assert scores[0].logprob is None
    for i, score in enumerate(scores[1:]):
        assert score.logprob == pytest.approx(float(expected[i, prompt[i + 1]]), abs=1e-4)
        assert [t.logprob for t in score.top] == pytest.approx(expected[i].topk(3).values.tolist(), abs=1e-4)
    assert result.text == demo_tokenizer().decode(prompt)
    assert result.usage.completion_tokens == 0


def test_logprobs_of_new_tokens_are_those_of_the_model_itself(reference: GPT2LMHeadModel) -> None:
    prompt = tokens_of(9)
    fields = {"temperature": 1.7, "top_k": 50, "presence_penalty": 1.0, "logit_bias": {11: 20.0}, "seed": 5}
    (result,) = drive(engine := build(), engine.submit(ask(prompt, logprobs=MAX_LOGPROBS, max_tokens=10, **fields)))
    choice = result.choices[0]
    with torch.inference_mode():
        expected = reference(torch.tensor([prompt + choice.token_ids])).logits[0].log_softmax(-1)[len(prompt) - 1 :]
    for row, token, score in zip(expected, choice.token_ids, choice.logprobs or [], strict=False):
        assert score.token_id == token
        assert score.logprob == pytest.approx(float(row[token]), abs=1e-4)
        assert [t.logprob for t in score.top] == pytest.approx(row.topk(20).values.tolist(), abs=1e-4)
        assert all(t.token == demo_tokenizer().token_name(t.token_id) for t in score.top)


@functools.cache
def model_of_bytes() -> Decoder:
    """The bundled model, with the embeddings of frequent tokens exchanged for those of tokens without whole characters.

    So its likeliest tokens have no text of their own.
    """
    tokenizer = demo_tokenizer()
    parts = [i for i in range(tokenizer.vocab_size) if tokenizer.token_name(i).startswith("bytes:")]
    order = torch.arange(tokenizer.vocab_size)
    frequent = torch.arange(256, 256 + len(parts))
    order[parts], order[frequent] = frequent, torch.tensor(parts)
    weights = {
        name.removeprefix("transformer."): t.float() for name, t in load_file(DEMO / "model.safetensors").items()
    }
    weights["wte.weight"] = weights["wte.weight"][order].contiguous()
    return Decoder(demo_model().config, weights)


@settings(max_examples=12, deadline=None)
@given(
    prompt=st.one_of(
        st.text("its — “so” 😀漢字 é", min_size=2, max_size=20).map(lambda text: demo_tokenizer().encode(text)),
        st.lists(st.integers(0, 50256), min_size=1, max_size=20),
    ),
    greedy=st.booleans(),
    logprobs=st.sampled_from([1, 2, 5, 20]),
)
def test_evaluation_tools_see_which_tokens_are_the_likeliest(prompt: list[int], greedy: bool, logprobs: int) -> None:
    """lm-eval calls a continuation greedy if each token has the largest value in its map."""
    engine = build(model=model_of_bytes())
    if greedy:
        (free,) = drive(engine, engine.submit(ask(prompt, max_tokens=6, echo=True, ignore_eos=True)))
        prompt = free.choices[0].token_ids
    (result,) = drive(engine, engine.submit(ask(prompt, max_tokens=1, echo=True, logprobs=logprobs)))
    found = completion(result)["choices"][0]["logprobs"]
    assert found["top_logprobs"][0] is None
    for at, score in enumerate(result.choices[0].logprobs or []):
        if at:
            values = found["top_logprobs"][at]
            assert values[found["tokens"][at]] == found["token_logprobs"][at] == score.logprob
            assert len(values) == len({score.token_id, *(top.token_id for top in score.top)})
            likeliest = score.logprob == score.top[0].logprob
            assert (found["token_logprobs"][at] == max(values.values())) == likeliest
            assert likeliest == (score.token_id == score.top[0].token_id)


def test_samples_of_one_job_differ_and_carry_their_index() -> None:
    (result,) = drive(engine := build(), engine.submit(ask("Once", n=5, temperature=1.5, seed=1, max_tokens=12)))
    assert [choice.index for choice in result.choices] == [0, 1, 2, 3, 4]
    assert len({tuple(choice.token_ids) for choice in result.choices}) == 5
    assert result.usage.completion_tokens == sum(len(choice.token_ids) for choice in result.choices)


def test_a_seed_can_be_replayed_from_the_result_that_named_it() -> None:
    engine = build()
    (first,) = drive(engine, engine.submit(ask("Once", temperature=1.2, seed=None)))
    (second,) = drive(engine, engine.submit(ask("Once", temperature=1.2, seed=first.seed)))
    (other,) = drive(engine, engine.submit(ask("Once", temperature=1.2, seed=None)))
    assert substance(first) == substance(second)
    assert other.seed != first.seed


def test_a_stop_string_ends_the_text_where_it_begins() -> None:
    engine = build()
    (free,) = drive(engine, engine.submit(ask("Once upon a time", max_tokens=30)))
    stop = free.text[20:26]
    (result,) = drive(engine, engine.submit(ask("Once upon a time", max_tokens=30, stop=[stop, "never there"])))
    choice = result.choices[0]
    assert choice.text == free.text[: free.text.index(stop)]
    assert (choice.finish_reason, choice.stop_reason) == ("stop", stop)
    assert choice.token_ids == free.choices[0].token_ids[: len(choice.token_ids)]


def test_a_stop_token_ends_the_text_and_is_counted() -> None:
    engine = build()
    (free,) = drive(engine, engine.submit(ask("Once upon a time", max_tokens=12)))
    token = free.choices[0].token_ids[5]
    first = free.choices[0].token_ids.index(token)
    (result,) = drive(engine, engine.submit(ask("Once upon a time", max_tokens=12, stop_token_ids=[token])))
    assert result.choices[0].token_ids == free.choices[0].token_ids[: first + 1]
    assert result.choices[0].stop_reason == token
    assert result.usage.completion_tokens == first + 1


def test_min_tokens_bans_end_of_text_until_then() -> None:
    engine = build()
    push = {"logit_bias": {50256: 100.0}, "max_tokens": 9}
    results = drive(
        engine,
        engine.submit(ask("Once", **push)),
        engine.submit(ask("Once", min_tokens=4, **push)),
        engine.submit(ask("Once", ignore_eos=True, **push)),
    )
    tokens = [r.choices[0].token_ids for r in results]
    assert tokens[0] == [50256]
    assert tokens[1].index(50256) == 4
    assert len(tokens[1]) == 5
    assert tokens[2] == [50256] * 9
    assert [r.choices[0].finish_reason for r in results] == ["stop", "stop", "length"]
    assert [r.choices[0].stop_reason for r in results] == [None, None, None]


def test_deltas_make_up_the_text_of_every_sample() -> None:
    deltas: list[TextDelta] = []
    engine = build()
    request = ask("Once upon", n=3, temperature=1.8, seed=2, max_tokens=25, stop=["e", "zz"])
    (result,) = drive(engine, engine.submit(request, on_text=deltas.append))
    for choice in result.choices:
        mine = [delta for delta in deltas if delta.index == choice.index]
        assert "".join(delta.text for delta in mine) == choice.text
        assert [token for delta in mine for token in delta.token_ids] == choice.token_ids
        assert [delta.finish_reason for delta in mine[:-1]] == [None] * (len(mine) - 1)
        assert mine[-1].finish_reason == choice.finish_reason


def test_with_text_every_s_the_first_and_last_deltas_are_sent_at_once() -> None:
    deltas: list[TextDelta] = []
    engine = build()
    request = ask("Once upon", n=2, temperature=1, seed=2, max_tokens=25, echo=True, logprobs=1, ignore_eos=True)
    (result,) = drive(engine, engine.submit(request, on_text=deltas.append, text_every_s=3600.0))
    for choice in result.choices:
        first, last = [delta for delta in deltas if delta.index == choice.index]
        assert (first.at, first.text_at, last.at) == (0, 0, len(first.token_ids))
        assert first.text.startswith("Once upon")
        assert last.text_at == len(first.text)
        assert first.text + last.text == choice.text
        assert first.token_ids + last.token_ids == choice.token_ids
        assert (first.logprobs or []) + (last.logprobs or []) == choice.logprobs


def test_on_start_is_called_once_when_the_job_gets_its_first_slot() -> None:
    started: list[str] = []
    engine = build(slots=2)
    first = engine.submit(ask("One", n=3), on_start=lambda: started.append("first"))
    second = engine.submit(ask("Two"), on_start=lambda: started.append("second"))
    assert started == []
    engine.step()
    assert started == ["first"]
    drive(engine, first, second)
    assert started == ["first", "second"]


def test_results_have_timings_and_counts() -> None:
    engine = build()
    before = time.monotonic()
    (result,) = drive(engine, engine.submit(ask(tokens_of(50), max_tokens=5, ignore_eos=True)))
    took = time.monotonic() - before
    timings = result.timings
    assert min(timings.waiting_s, timings.prefill_s, timings.decode_s) >= 0
    assert 0 < timings.waiting_s + timings.prefill_s + timings.decode_s <= took
    stats = engine.stats()
    assert (stats.tokens, stats.steps, stats.running, stats.waiting) == (5, 5, 0, 0)


def test_running_sequences_report_their_progress() -> None:
    engine = build(slots=2)
    engine.submit(ask(tokens_of(200), max_tokens=9, ignore_eos=True), job_id="long")
    engine.submit(ask(tokens_of(3), max_tokens=5, ignore_eos=True), job_id="short")
    engine.submit(ask(tokens_of(4), max_tokens=5), job_id="waits")
    for _ in range(3):
        engine.step()
    long, short = engine.running_sequences()
    assert (long.job_id, long.prompt, long.read, long.most) == ("long", 200, 200, 9)
    assert (short.job_id, short.prompt, short.read, short.most) == ("short", 3, 3, 5)
    assert 0 < long.written <= short.written < 5
    assert 0 <= long.age_s < 60
