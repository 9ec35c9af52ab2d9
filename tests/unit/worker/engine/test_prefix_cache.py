"""Prefixes that outlive their jobs: what is kept, found and evicted, and that results do not depend on it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from headrace.client.wire.requests import GenerateRequest
from headrace.client.wire.results import Result
from headrace.worker.engine.engine import Engine
from headrace.worker.engine.model_runner import ModelRunner
from headrace.worker.engine.prefix_cache import PrefixCache
from headrace.worker.engine.sequence import Slot
from tests.unit.worker.engine.engine_helpers import ask, build, drive, expected, failure, settle, substance, tokens_of


def slot(index: int = 0) -> Slot:
    return Slot(128, index)


def test_the_longest_prefix_of_whole_chunks_is_found_and_the_newest_of_equals() -> None:
    cache = PrefixCache(chunk=2)
    short = cache.add([1, 2, 3], slot(0))
    other = cache.add([1, 2, 5, 6], slot(1))
    longest = cache.add([1, 2, 5, 6, 7, 8], slot(2))
    assert short is not None
    assert short.tokens == [1, 2]
    assert cache.find([1, 2, 5, 6, 7, 8, 9]) == (longest, 6)
    assert cache.find([1, 2, 5, 6, 7]) == (longest, 4)
    assert cache.find([1, 2, 9, 9]) == (longest, 2)
    assert cache.find([1]) == cache.find([2, 1, 5, 6]) == (None, 0)
    assert longest is not None
    assert cache.continued_by(longest) == [short, other]


def test_the_least_recently_used_prefix_is_first() -> None:
    cache = PrefixCache(chunk=1)
    first, second, third = (cache.add([i], slot(i)) for i in range(3))
    cache.find([0, 9])
    assert cache.add([1], slot(9)) is None, "it is cached, which is a use"
    assert cache.in_order() == [third, first, second]
    assert first is not None
    cache.remove(first)
    assert (len(cache), first.slot, cache.find([0])) == (2, None, (None, 0))


@pytest.mark.parametrize("collide", [False, True])
def test_each_adapter_has_prefixes_of_its_own(monkeypatch: pytest.MonkeyPatch, collide: bool) -> None:
    if collide:
        monkeypatch.setattr("hashlib.blake2b", lambda **_: Constant())
    cache = PrefixCache(chunk=2)
    plain, own = cache.add([1, 2], slot(0)), cache.add([1, 2], slot(1), "digest")
    assert plain is not own
    assert (cache.find([1, 2]), cache.find([1, 2], "digest")) == ((plain, 2), (own, 2))
    assert cache.find([1, 2], "other") == (None, 0)
    longer = cache.add([1, 2, 3, 4], slot(2), "digest")
    assert longer is not None
    assert plain not in cache.continued_by(longer)
    assert own in cache.continued_by(longer)


def test_tokens_are_compared_if_hashes_collide(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hashlib.blake2b", lambda **_: Constant())
    cache = PrefixCache(chunk=2)
    wrong, right = cache.add([1, 2], slot(0)), cache.add([3, 4], slot(1))
    assert (cache.find([1, 2]), cache.find([3, 4]), cache.find([5, 6])) == ((wrong, 2), (right, 2), (None, 0))


class Constant:
    """A hash that is the same for everything."""

    def update(self, data: bytes) -> None: ...

    def digest(self) -> bytes:
        return b"same"


def test_a_cache_without_chunks_keeps_nothing() -> None:
    assert (PrefixCache().add([1, 2, 3], slot()), PrefixCache().find([1, 2, 3])) == (None, (None, 0))


# --- in the engine ---------------------------------------------------------------------------------------------------


def one_by_one(engine: Engine, *requests: GenerateRequest) -> list[Result]:
    return [drive(engine, engine.submit(request))[0] for request in requests]


def branches(count: int, common: int = 300, rest: int = 20, **fields: Any) -> list[GenerateRequest]:
    begin = tokens_of(common)
    return [ask([*begin, *tokens_of(rest, seed=5 + i)], max_tokens=4, logprobs=2, **fields) for i in range(count)]


def test_a_prompt_reuses_what_an_ended_job_has_left() -> None:
    requests = branches(3)
    engine, without = build(), build(prefix_cache=False)
    found = one_by_one(engine, *requests)
    assert [result.usage.cached_tokens for result in found] == [0, 256, 256]
    assert [substance(result) for result in found] == expected(*requests)
    assert engine.stats().prompt_tokens == 320 + 2 * 64
    assert (engine.stats().prefix_queries, engine.stats().prefix_hits) == (3 * 320, 2 * 256)
    assert [result.usage.cached_tokens for result in one_by_one(without, *requests)] == [0, 0, 0]
    assert len(engine.scheduler.slots.prefixes) == 1, "a prefix is kept once"
    assert len(without.scheduler.slots.prefixes) == 0


def test_what_samples_of_one_job_share_was_computed_for_it() -> None:
    engine = build()
    several = ask(tokens_of(300), n=3, temperature=1, max_tokens=3)
    first, again = one_by_one(engine, several, several)
    assert (first.usage.cached_tokens, again.usage.cached_tokens) == (0, 256)
    same = ask(tokens_of(140, seed=9))
    both = drive(engine, engine.submit(same), engine.submit(same))
    assert [result.usage.cached_tokens for result in both] == [0, 140], "the whole prefill of a running job"
    assert "prompt_tokens_details" not in first.model_dump()["usage"]
    assert first.usage.as_openai()["prompt_tokens_details"] == {"cached_tokens": 0}


@pytest.mark.parametrize("torch_attention", [False, True])
def test_prefixes_are_evicted_for_running_sequences_and_results_stay_the_same(torch_attention: bool) -> None:
    """The cache holds four sequences of this length; three prompts run at a time, of five that share nothing."""
    engine = build(budget_positions=2048, slots=3)
    if torch_attention:
        assert isinstance(engine.runner, ModelRunner)
        engine.runner.cache.decode_kernel = lambda: None  # type: ignore[method-assign]
    requests = [ask(tokens_of(300, seed=seed), max_tokens=3, logprobs=1) for seed in (1, 2, 3, 4, 5)]
    requests += [ask(tokens_of(length, seed=length), max_tokens=3) for length in (130, 700, 40)]
    reference = [substance(result) for result in one_by_one(build(), *requests)] if not torch_attention else []
    rounds = []
    for _ in range(3):
        futures = [engine.submit(request) for request in requests]
        rounds.append([substance(result) for result in drive(engine, *futures)])
        kept = engine.scheduler.slots.prefixes.in_order()
        assert 0 < len(kept) <= 4
        assert engine.scheduler.slots.used_bytes <= engine.scheduler.slots.budget_bytes
    assert rounds[0] == rounds[1] == rounds[2]
    if reference:
        assert rounds[0] == reference


def test_a_cache_for_one_sequence_reuses_the_prefix_in_its_own_slot() -> None:
    engine = build(budget_positions=1024, slots=1)
    requests = branches(3, common=600)
    found = one_by_one(engine, *requests)
    assert [result.usage.cached_tokens for result in found] == [0, 512, 512]
    assert [substance(result) for result in found] == expected(*requests)


def test_the_memory_of_prefixes_goes_to_sequences_of_another_length() -> None:
    engine = build(budget_positions=2048)
    one_by_one(engine, *[ask(tokens_of(200, seed=seed)) for seed in range(1, 9)])
    assert len(engine.scheduler.slots.prefixes) == 8, "all of the budget"
    long, again = one_by_one(engine, *[ask(tokens_of(1000, seed=11))] * 2)
    assert (long.usage.cached_tokens, again.usage.cached_tokens) == (0, 896)
    assert len(engine.scheduler.slots.prefixes) == 5, "half of the budget is of the long one"


def test_a_conversation_keeps_its_last_turn() -> None:
    engine = build()
    turns = [tokens_of(length) for length in (150, 300, 450)]
    found = one_by_one(engine, *[ask(turn, max_tokens=2) for turn in turns])
    assert [result.usage.cached_tokens for result in found] == [0, 128, 256]
    assert [len(prefix.tokens) for prefix in engine.scheduler.slots.prefixes.in_order()] == [384]


@pytest.mark.parametrize("fields", [{"prompt_logprobs": 2}, {"echo": True, "logprobs": 2}, {"checkpoints": "all"}])
def test_a_prompt_whose_rows_are_all_needed_computes_them_and_leaves_them(fields: dict[str, Any]) -> None:
    engine = build()
    prompt = tokens_of(300)
    requests = [ask(prompt, max_tokens=3), ask(prompt, max_tokens=3, **fields), ask([*prompt, 1, 2], max_tokens=3)]
    kept = one_by_one(engine, *requests)
    assert [result.usage.cached_tokens for result in kept] == [0, 0, 256]
    alone = build()
    assert one_by_one(alone, requests[1])[0].usage.cached_tokens == 0
    assert one_by_one(alone, requests[2])[0].usage.cached_tokens == 256
    assert [substance(result) for result in kept] == expected(*requests)


def test_pairs_to_score_reuse_their_prompt_and_leave_it() -> None:
    """What was not shown to be free of a NaN is cleared, and the rest kept: 292 of the first prompt's tokens."""
    prompt = tokens_of(290)
    requests = [ask(prompt, continuation=tokens_of(3 + i, seed=7), max_tokens=0) for i in range(3)]
    requests.append(ask([*prompt, 7], max_tokens=0, prompt_logprobs=0))
    requests.append(ask([*prompt, *prompt[:30]], max_tokens=2))
    engine = build()
    found = one_by_one(engine, *requests)
    assert [result.usage.cached_tokens for result in found] == [0, 256, 256, 0, 256]
    assert [substance(result) for result in found] == expected(*requests)


def test_a_failed_or_cancelled_job_leaves_nothing() -> None:
    engine = build()
    cancelled = engine.submit(ask(tokens_of(300), max_tokens=50, ignore_eos=True), job_id="a")
    for _ in range(3):
        engine.step()
    engine.cancel("a")
    settle(engine, cancelled)
    run: Callable[..., Any] = engine.runner.run

    def broken(step: Any) -> Any:
        raise ValueError("broken")

    engine.runner.run = broken  # type: ignore[method-assign]
    failed = engine.submit(ask(tokens_of(300), max_tokens=5))
    settle(engine, failed)
    assert failure(failed).code == "internal_error"
    engine.runner.run = run  # type: ignore[method-assign]
    assert len(engine.scheduler.slots.prefixes) == 0
    assert one_by_one(engine, ask(tokens_of(300)))[0].usage.cached_tokens == 0


def test_the_slot_of_a_prefix_may_be_given_away_before_it_was_copied() -> None:
    """Two prompts are admitted at once: the second needs the slot from which the first would have copied."""
    engine = build(budget_positions=2048, slots=2)
    first = branches(1, common=600)[0]
    one_by_one(engine, first)
    requests = [*branches(2, common=600)[1:], ask(tokens_of(1000, seed=4), max_tokens=3, logprobs=2)]
    found = drive(engine, *map(engine.submit, requests))
    assert [substance(result) for result in found] == expected(*requests)


def test_a_prefix_that_a_sequence_takes_over_is_copied_from_there_by_those_admitted_before_it() -> None:
    engine = build(budget_positions=8 * 512, step_tokens=1024)
    requests = branches(16, common=300, rest=30)
    one_by_one(engine, requests[0])
    futures = [engine.submit(request) for request in requests]
    engine.step()
    assert len(engine.scheduler.running) == 8, "seven in free slots, and one in that of the prefix"
    assert engine.stats().prompt_tokens == 330 + 8 * 74
    results = drive(engine, *futures)
    assert [substance(result) for result in results] == expected(*requests)
    assert [result.usage.cached_tokens for result in results] == [256] * 16


def test_memory_that_runs_out_is_taken_from_prefixes_first(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = build(budget_positions=16 * 1024)
    assert isinstance(engine.runner, ModelRunner)
    fit, refused = engine.runner.fit, []

    def limited(capacity: dict[int, int]) -> None:
        if sum(length * count for length, count in capacity.items()) > 4096:
            refused.append(dict(capacity))
            raise MemoryError
        fit(capacity)

    monkeypatch.setattr(engine.runner, "fit", limited)
    requests = [ask(tokens_of(400, seed=seed), max_tokens=2) for seed in range(1, 13)]
    assert [substance(result) for result in one_by_one(engine, *requests)] == expected(*requests)
    assert refused
