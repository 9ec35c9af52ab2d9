"""Properties over any mix of prompts, parameters, arrivals, slots, chunks and cancelled neighbours.

A small random model makes an example cost milliseconds; the same is shown on the bundled model with fewer mixes in
tests/unit/worker/engine/test_batch_invariance.py. `make properties` runs 500 examples each.
"""

from __future__ import annotations

import dataclasses
import functools
import tempfile
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from headrace.client.wire.errors import JobCancelled
from headrace.client.wire.requests import parse_request
from headrace.client.wire.results import Choice, Result
from headrace.model.config import ModelConfig
from headrace.model.decoder import Decoder
from headrace.model.generation_config import Ends
from headrace.model.tokenizer import gpt2_tokenizer
from headrace.model.weights import expected_shapes
from headrace.worker.engine.adapters import Adapters
from headrace.worker.engine.cache_slots import SlotTable
from headrace.worker.engine.engine import Engine
from headrace.worker.engine.model_runner import ModelRunner
from headrace.worker.engine.prefix_cache import PrefixCache
from headrace.worker.engine.requests import prepare
from headrace.worker.engine.scheduler import Scheduler
from headrace.worker.engine.sequence_text import TextDelta
from tests.instruction_sets import needs_avx2, needs_avx512
from tests.numerics.jobs import RANKS, adapters_of

VOCABULARY, POSITIONS = 512, 128


CONFIG = ModelConfig(n_layer=2, n_head=2, n_embd=64, n_positions=POSITIONS, vocab_size=VOCABULARY)
#: Multi-query attention with a window, as no family has both; and heads of an odd size in groups of three.
GROUPED = dataclasses.replace(CONFIG, n_head=8, n_kv_head=1, windows=(None, 20), scaled_attention=False)
ODD = dataclasses.replace(CONFIG, n_head=12, n_embd=60, n_kv_head=4, windows=(33, 1), scaled_by_layer=True)
configs = st.sampled_from([CONFIG, GROUPED, ODD])
#: Our own error of a logarithm of a probability, against float64: a tenth of what the checkpoints allow for logits.
TOLERANCE = 1e-4
#: Examples of a property that computes many jobs: fewer in the quick profile only.
COSTLY = 10 if settings.default is not None and settings.default.max_examples < 100 else 500


@functools.cache
def small_model(config: ModelConfig, dtype: torch.dtype = torch.float32) -> Decoder:
    return Decoder(config, {name: tensor.to(dtype) for name, tensor in weights(config).items()})


@functools.cache
def exact_model(config: ModelConfig) -> Decoder:
    """The same weights in float64, without a cache."""
    return Decoder(config, {name: tensor.double() for name, tensor in weights(config).items()})


def exact_logprobs(config: ModelConfig, token_ids: list[int]) -> Tensor:
    """[T, V]."""
    model, ids = exact_model(config), torch.tensor(token_ids)
    hidden = model.forward(ids, torch.arange(len(ids)), functools.partial(causal, config))
    return model.head(hidden).log_softmax(-1)


def causal(config: ModelConfig, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Attention of one sequence by the formula. [T, H, D], [T, KV, D] twice -> [T, H, D]."""
    k, v = (x.repeat_interleave(config.n_head // config.kv_heads, 1) for x in (k, v))
    scores = torch.einsum("thd,shd->hts", q, k) * config.layer_scale(layer)
    window = config.window(layer) or len(q)
    seen = torch.ones(scores.shape[-2:], dtype=torch.bool).tril().triu(1 - window)
    return torch.einsum("hts,shd->thd", scores.masked_fill(~seen, float("-inf")).softmax(-1), v)


def weights(config: ModelConfig) -> dict[str, Tensor]:
    rng = torch.Generator().manual_seed(11)
    made = {name: torch.randn(*shape, generator=rng) * 0.15 for name, shape in expected_shapes(config).items()}
    for name in made:
        if "ln_" in name and name.endswith("weight"):
            made[name] = made[name] + 1
    return made


def engine(
    slots: int = 64,
    step_tokens: int = 512,
    chunk: int = 32,
    drafts: int = 0,
    config: ModelConfig = CONFIG,
    dtype: torch.dtype = torch.float32,
    budget_positions: int = 2**14,
    prefix_cache: bool = True,
) -> Engine:
    runner = ModelRunner(small_model(config, dtype), [32, 64, POSITIONS])
    table = SlotTable(
        [32, 64, POSITIONS],
        position_bytes=runner.position_bytes,
        budget_bytes=budget_positions * runner.position_bytes,
        prefixes=PrefixCache(chunk if prefix_cache else 0),
    )
    scheduler = Scheduler(table, max_rows=slots, step_tokens=step_tokens, prefill_chunk=chunk, draft_tokens=drafts)
    names: dict[str, Any] = {"model_name": "small", "vocab_size": VOCABULARY, "max_context": POSITIONS, "ends": Ends()}
    return Engine(runner, gpt2_tokenizer(), scheduler, adapters=adapters(config, dtype)[0], **names)


@functools.cache
def adapters(config: ModelConfig, dtype: torch.dtype) -> tuple[Adapters, tempfile.TemporaryDirectory[str]]:
    """Adapters for a model, named by their ranks, and the directory of their places."""
    folder = tempfile.TemporaryDirectory()
    model = small_model(config, dtype)
    # Where torch computes the linear layers, adapters are refused.
    ranks = RANKS if model.fused_decoder is not None else ()
    return adapters_of(model, ranks, Path(folder.name)), folder


def finish(running: Engine) -> None:
    while running.step():
        pass


def alone(fields: dict[str, Any], **more: Any) -> list[Choice]:
    single = engine(**more)
    future = single.submit(parse_request(fields))
    finish(single)
    return future.result().choices


tokens = st.integers(0, VOCABULARY - 1)
prompts = st.lists(tokens, min_size=1, max_size=90)
requests = st.fixed_dictionaries(
    {
        "prompt": prompts,
        "max_tokens": st.integers(1, 12),
        "temperature": st.sampled_from([0, 0.6, 1.0, 1.7]),
        "seed": st.integers(0, 2**40),
        "logprobs": st.sampled_from([None, 0, 3]),
        "top_p": st.sampled_from([1.0, 0.8]),
        "top_k": st.sampled_from([0, 1, 20]),
        "min_p": st.sampled_from([0.0, 0.05]),
        "n": st.sampled_from([1, 1, 2, 3]),
        "echo": st.booleans(),
        "frequency_penalty": st.sampled_from([0.0, 0.7]),
        "repetition_penalty": st.sampled_from([1.0, 1.3]),
        "logit_bias": st.dictionaries(tokens, st.floats(-5, 5), max_size=2),
        "min_tokens": st.just(0),
        "stop": st.lists(st.sampled_from(["a", "e", " the", "\n"]), max_size=2),
        "priority": st.sampled_from(["interactive", "normal", "bulk"]),
    }
)
#: Half of the jobs have an adapter.
names = st.sampled_from([None, None, None, *map(str, RANKS)])
adapted = st.tuples(requests, names).map(lambda pair: {**pair[0], "adapter": pair[1]})


@needs_avx2
@settings(deadline=None)
@given(
    jobs=st.lists(st.tuples(adapted, st.integers(0, 4), st.booleans()), min_size=1, max_size=6),
    slots=st.integers(1, 10),
    step_tokens=st.sampled_from([16, 40, 512]),
    chunk=st.sampled_from([16, 32, 64]),
    drafts=st.sampled_from([0, 3, 15]),
    config=configs,
)
def test_each_job_is_the_same_bits_in_any_crowd_as_alone(
    jobs: list[tuple[dict[str, Any], int, bool]],
    slots: int,
    step_tokens: int,
    chunk: int,
    drafts: int,
    config: ModelConfig,
) -> None:
    crowd = engine(slots, step_tokens, chunk, drafts, config)
    futures: list[Future[Result]] = []
    for i, (fields, steps_before, _) in enumerate(jobs):
        for _ in range(steps_before):
            crowd.step()
        futures.append(crowd.submit(parse_request(fields), job_id=str(i)))
    for i, (_, _, cancelled) in enumerate(jobs):
        if cancelled:
            crowd.step()
            crowd.cancel(str(i))
    finish(crowd)
    for (fields, _, cancelled), future in zip(jobs, futures, strict=True):
        if future.exception() is None:
            assert future.result().choices == alone(fields, chunk=chunk, config=config)
        else:
            assert cancelled
            assert isinstance(future.exception(), JobCancelled)


@needs_avx2
@settings(deadline=None)
@given(
    jobs=st.lists(st.tuples(adapted, st.integers(1, 40), st.integers(1, 3)), min_size=1, max_size=4),
    slots=st.integers(1, 6),
    drafts=st.integers(1, 15),
    config=configs,
)
def test_each_job_is_the_same_bits_with_drafts_as_without(
    jobs: list[tuple[dict[str, Any], int, int]], slots: int, drafts: int, config: ModelConfig
) -> None:
    """Prompts that repeat themselves, so that there is something to guess."""
    fields = [{**job, "prompt": job["prompt"][:20] * times, "max_tokens": count} for job, count, times in jobs]
    crowd = engine(slots, drafts=drafts, config=config)
    futures = [crowd.submit(parse_request(each)) for each in fields]
    finish(crowd)
    assert [future.result().choices for future in futures] == [alone(each, config=config) for each in fields]


@needs_avx512
@settings(deadline=None)
@given(jobs=st.lists(requests, min_size=1, max_size=5), slots=st.integers(1, 6), drafts=st.sampled_from([0, 7]))
def test_each_job_is_the_same_bits_in_any_crowd_as_alone_in_bfloat16(
    jobs: list[dict[str, Any]], slots: int, drafts: int
) -> None:
    crowd = engine(slots, drafts=drafts, dtype=torch.bfloat16)
    futures = [crowd.submit(parse_request(each)) for each in jobs]
    finish(crowd)
    assert [future.result().choices for future in futures] == [alone(each, dtype=torch.bfloat16) for each in jobs]


#: Prompts that begin alike: the first tokens of one of two texts, then tokens of their own.
branching = st.builds(
    lambda text, common, own: [*[(7 * i + text) % VOCABULARY for i in range(common)], *own],
    st.integers(0, 1),
    st.sampled_from([0, 15, 16, 31, 33, 64, 80]),
    st.lists(tokens, min_size=1, max_size=12),
)
uses = st.sampled_from(
    [
        {"logprobs": 1},
        {"n": 2, "temperature": 1.0},
        {"prompt_logprobs": 1},
        {"echo": True, "logprobs": 0},
        {"max_tokens": 0, "prompt_logprobs": 0},
        {"max_tokens": 0, "continuation": [5, 6, 7]},
        {"max_tokens": 30, "cancelled": True},
    ]
)


@needs_avx2
@settings(deadline=None, max_examples=COSTLY)
@given(
    jobs=st.lists(st.tuples(branching, uses, names, st.integers(0, 9)), min_size=2, max_size=5),
    slots=st.integers(1, 4),
    chunk=st.sampled_from([16, 32]),
    budget=st.sampled_from([128, 256, 320, 2**14]),
    config=configs,
    by_torch=st.booleans(),
)
def test_each_job_is_the_same_bits_with_cached_prefixes_without_them_and_after_they_were_evicted(
    jobs: list[tuple[list[int], dict[str, Any], str | None, int]],
    slots: int,
    chunk: int,
    budget: int,
    config: ModelConfig,
    by_torch: bool,
) -> None:
    def of(prefix_cache: bool) -> tuple[dict[int, Any], Engine]:
        crowd = engine(slots, 512, chunk, 0, config, budget_positions=budget, prefix_cache=prefix_cache)
        if by_torch:
            crowd.runner.cache.decode_kernel = lambda: None  # type: ignore[attr-defined]
        futures = []
        for i, (prompt, use, name, steps) in enumerate(jobs * 2):
            fields = {"prompt": prompt, "max_tokens": 3, "temperature": 0, "seed": 1, "adapter": name, **use}
            cancelled = fields.pop("cancelled", False)
            futures.append(crowd.submit(parse_request(fields), job_id=str(i)))
            for _ in range(steps):
                crowd.step()
            if cancelled:
                crowd.cancel(str(i))
        finish(crowd)
        ended = {i: future.result() for i, future in enumerate(futures) if future.exception() is None}
        return {i: (result.choices, result.prompt_logprobs) for i, result in ended.items()}, crowd

    (kept, with_cache), (computed, without) = of(True), of(False)
    both = kept.keys() & computed.keys()  # with the cache a job may end before it is cancelled
    assert {i: kept[i] for i in both} == {i: computed[i] for i in both}
    if not any("cancelled" in use for _, use, _, _ in jobs):
        assert len(both) == len(jobs) * 2
        assert with_cache.stats().prompt_tokens <= without.stats().prompt_tokens
    assert with_cache.scheduler.slots.usage == 0


@settings(deadline=None)
@given(prompt=prompts, count=st.integers(1, 20), config=configs)
def test_cached_equals_uncached_in_float64(prompt: list[int], count: int, config: ModelConfig) -> None:
    fields = {"prompt": prompt, "max_tokens": count, "temperature": 0, "logprobs": 2, "echo": True}
    (choice,) = alone(fields, config=config)
    assert choice.logprobs is not None
    exact = exact_logprobs(config, choice.token_ids)
    for i, score in enumerate(choice.logprobs[1:]):
        assert score.logprob is not None
        assert abs(score.logprob - float(exact[i, score.token_id])) < TOLERANCE
    for i in range(len(prompt), len(choice.token_ids)):
        assert exact[i - 1].max() - exact[i - 1, choice.token_ids[i]] < 2 * TOLERANCE, "two logits are off by so much"


@settings(deadline=None)
@given(prompt=prompts, chunks=st.tuples(*[st.integers(1, 100)] * 2), config=configs)
def test_a_prompt_split_anywhere_gives_the_same_logits(
    prompt: list[int], chunks: tuple[int, int], config: ModelConfig
) -> None:
    fields = {"prompt": prompt, "max_tokens": 0, "echo": True, "logprobs": 5}
    exact = exact_logprobs(config, prompt)
    for chunk in chunks:
        (choice,) = alone(fields, chunk=chunk, config=config)
        assert choice.logprobs is not None
        for i, score in enumerate(choice.logprobs[1:]):
            assert score.logprob is not None
            assert abs(score.logprob - float(exact[i, score.token_id])) < TOLERANCE


@settings(deadline=None)
@given(fields=requests, n=st.integers(2, 5))
def test_n_samples_are_n_jobs_with_their_sample_index(fields: dict[str, Any], n: int) -> None:
    together = alone({**fields, "n": n})
    for index in range(n):
        single = engine()
        state = prepare(
            parse_request({**fields, "n": n}),
            "one",
            future := Future(),
            tokenizer=single.tokenizer,
            ends=single.ends,
            vocab_size=single.vocab_size,
            max_context=single.max_context,
        )
        state.sequences = [state.sequences[index]]
        single._inbox.append(state)
        finish(single)
        assert future.result().choices[index] == together[index]


@settings(deadline=None)
@given(fields=requests)
def test_streamed_pieces_are_the_text(fields: dict[str, Any]) -> None:
    pieces: dict[int, list[TextDelta]] = {}
    streaming = engine()
    future = streaming.submit(parse_request(fields), on_text=lambda d: pieces.setdefault(d.index, []).append(d))
    finish(streaming)
    for choice in future.result().choices:
        deltas = pieces[choice.index]
        assert "".join(delta.text for delta in deltas) == choice.text
        assert [token for delta in deltas for token in delta.token_ids] == choice.token_ids
        assert [delta.finish_reason for delta in deltas if delta.finish_reason] == [choice.finish_reason]
        assert deltas[-1].finish_reason is not None


@settings(deadline=None)
@given(st.text())
def test_decoding_what_was_encoded_is_the_text(text: str) -> None:
    assert gpt2_tokenizer().decode(gpt2_tokenizer().encode(text)) == text
