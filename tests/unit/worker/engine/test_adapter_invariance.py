"""A job with an adapter has the same bits alone, among rows of the base, and among rows of seven other adapters."""

from __future__ import annotations

import functools
import random
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load

from headrace.client.wire.requests import GenerateRequest
from headrace.config import Settings
from headrace.model.adapters.lora import load_adapter
from headrace.worker.engine.adapters import Adapters
from headrace.worker.engine.build import adapters_of
from headrace.worker.engine.engine import Engine
from tests.adapter_files import SHAPES, write_adapter
from tests.instruction_sets import needs_avx2
from tests.unit.worker.engine.engine_helpers import WORDS, ask, build, demo_model, idle, substance, tokens_of
from tests.unit.worker.engine.test_engine_adapters import finish, ran

pytestmark = needs_avx2

#: Eight adapters: of several ranks, for all layers or for some, one with biases of its own.
NAMES = [f"a{i}" for i in range(8)]
CHANT = "the king and the queen and the king and the queen and the king and"


@functools.cache
def folder() -> Path:
    """The adapters' directory; it is removed at the end of the process."""
    place = tempfile.TemporaryDirectory()
    folder.__dict__["kept"] = place
    for seed, name in enumerate(NAMES):
        targets = tuple(SHAPES) if seed % 2 else ("attn.c_attn", "mlp.c_fc")
        bias = "all" if name == "a3" else "none"
        rank = (1, 4, 16, 20)[seed % 4]
        write_adapter(Path(place.name) / name, seed, rank=rank, targets=targets, std=0.15, bias=bias)
    return Path(place.name)


@functools.cache
def adapters() -> Adapters:
    """One set of them for all engines, in which all stay loaded."""
    return adapters_of(Settings(model="demo", adapters_dir=str(folder())), "demo", demo_model())


def made(**shape: Any) -> Engine:
    return build(adapters=adapters(), fingerprint="f", **shape)


@functools.cache
def requests() -> list[GenerateRequest]:
    """24 requests, each fourth for the base. Prompts of several chunks are the same for several adapters."""
    kinds: list[dict[str, Any]] = [
        {"logprobs": 2},
        {"temperature": 0.9, "top_p": 0.9, "logprobs": 1},
        {"structured_outputs": {"choice": ["the king", "the queen", "a house"]}},
        {"max_tokens": 0, "echo": True, "logprobs": 1},
        {"temperature": 1.2, "n": 3, "presence_penalty": 0.5},
        {"structured_outputs": {"regex": "[a-z ]{3,20}"}, "temperature": 1.0},
        {"prompt_logprobs": 1},
        {"stop": ["e"], "allowed_token_ids": list(range(200, 900))},
        {"ignore_eos": True, "max_tokens": 12},
    ]
    lengths = [1, 3, 17, 127, 128, 129, 260, 300]
    found = []
    for i in range(24):
        prompt: Any = WORDS[: 9 + 4 * i] if i % 5 == 0 else tokens_of(lengths[i % len(lengths)], seed=i % 3)
        name = None if i % 4 == 0 else NAMES[i % len(NAMES)] if i % 3 else NAMES[(i // 2) % len(NAMES)]
        found.append(ask(prompt, **{"seed": i, **kinds[i % len(kinds)]}, adapter=name))
    return found


@functools.cache
def alone() -> list[dict[str, Any]]:
    """The result of each request, computed alone in an engine in which nothing ran before."""
    return [substance(ran(made(), request)[0]) for request in requests()]


def test_adapters_change_texts_and_their_fingerprints() -> None:
    plain, *adapted = ran(made(), *(ask(WORDS, adapter=name) for name in [None, *NAMES]))
    assert len({result.text for result in adapted}) > len(NAMES) // 2
    assert plain.text not in {result.text for result in adapted}
    assert len({result.fingerprint for result in (plain, *adapted)}) == len(NAMES) + 1


@pytest.mark.parametrize(
    "shape",
    [
        pytest.param({}, id="all at once"),
        pytest.param({"step_tokens": 16}, id="one chunk a step"),
        pytest.param({"slots": 20, "step_tokens": 150, "budget_positions": 4000, "draft_tokens": 7}, id="drafts"),
        pytest.param({"slots": 3, "prefix_cache": False}, id="three slots"),
    ],
)
def test_mixed_jobs_at_once_give_the_same_bits_as_one_by_one(shape: dict[str, Any]) -> None:
    engine = made(**shape)
    results = ran(engine, *requests())
    for result, expected in zip(results, alone(), strict=True):
        assert substance(result) == expected
    assert idle(engine)


@pytest.mark.parametrize("seed", range(2))
def test_jobs_that_arrive_in_any_order_and_again_give_the_same_bits(seed: int) -> None:
    """Each comes twice, as if it were delivered again: the second time its prefix may be cached, or evicted."""
    draw = random.Random(seed)
    engine = made(slots=draw.choice([2, 6, 64]), budget_positions=draw.choice([2000, 5000, 64 * 1024]), draft_tokens=3)
    order = list(range(len(requests()))) * 2
    draw.shuffle(order)
    futures = []
    while order:
        for i in [order.pop() for _ in range(min(len(order), draw.randint(0, 5)))]:
            futures.append((i, engine.submit(requests()[i])))
        engine.step()
    finish(engine, *(future for _, future in futures))
    for i, future in futures:
        assert substance(future.result(timeout=0)) == alone()[i]
    assert idle(engine)


@pytest.mark.parametrize("company", [[None] * 15, NAMES[1:] * 2, ["a0"] * 15], ids=["base", "seven others", "its own"])
def test_one_job_in_three_kinds_of_company(company: list[str | None]) -> None:
    request = ask(tokens_of(150), adapter="a0", max_tokens=20, logprobs=3, ignore_eos=True)
    (expected,) = ran(made(), request)
    others = [ask(tokens_of(100 + i, seed=i + 9), adapter=name, max_tokens=25) for i, name in enumerate(company)]
    result, *_ = ran(made(), request, *others)
    assert substance(result) == substance(expected)


def test_a_cached_prefix_is_reused_by_its_own_adapter_only() -> None:
    engine, prompt = made(), tokens_of(300)
    cached = [ran(engine, ask(prompt, adapter=name))[0].usage.cached_tokens for name in ("a0", "a1", None, "a0", "a1")]
    assert cached == [0, 0, 0, 256, 256]


def test_speculative_decoding_accepts_with_adapters() -> None:
    fast, slow = made(draft_tokens=7), made()
    wanted = [ask(CHANT, adapter=name, max_tokens=30, ignore_eos=True) for name in ("a0", None)]
    assert [substance(r) for r in ran(fast, *wanted)] == [substance(r) for r in ran(slow, *wanted)]
    assert fast.stats().proposed > 0


def traced(name: str, prompt: list[int]) -> dict[str, torch.Tensor]:
    """The activations of the model with an adapter, without an engine."""
    packed = demo_model().pack_adapter(load_adapter(folder() / name, demo_model().config))
    return demo_model().trace(torch.tensor([prompt]), packed)


@pytest.mark.parametrize("name", ["a2", "a3"])
def test_scores_of_prompt_and_text_are_those_of_the_model_with_the_adapter(name: str) -> None:
    engine, prompt = made(), tokens_of(40)
    scored = ask(prompt, adapter=name, prompt_logprobs=1, logprobs=1, max_tokens=1)
    result, *_ = ran(engine, scored, ask(prompt), ask(prompt, adapter="a1", prompt_logprobs=1))
    expected = traced(name, prompt)["logits"][0].double().log_softmax(-1)
    assert result.prompt_logprobs is not None
    found = [each.logprob for each in result.prompt_logprobs[1:]]
    assert found == pytest.approx(
        [row[token].item() for row, token in zip(expected, prompt[1:], strict=False)], abs=1e-5
    )
    assert result.choices[0].token_ids == [int(expected[-1].argmax())]
    assert result.choices[0].logprobs is not None
    assert result.choices[0].logprobs[0].logprob == pytest.approx(expected[-1].max().item(), abs=1e-5)


def test_captured_activations_are_those_of_the_model_with_the_adapter() -> None:
    captured: dict[str, bytes] = {}
    engine, prompt = made(), tokens_of(40)
    request = ask(prompt, adapter="a3", checkpoints="all", max_tokens=2)
    future = engine.submit(request, on_activations=captured.update)
    others = [engine.submit(ask(prompt, adapter=name)) for name in (None, "a1", "a3")]
    finish(engine, future, *others)
    expected = traced("a3", prompt)
    for name in ("ln_1", "q", "attn", "mlp", "block_0", "logits", "last_logits", "cache_k"):
        assert torch.equal(load(captured[name])["tensor"], expected[name][0]), name


def test_replaced_files_serve_new_jobs_and_running_ones_end_with_theirs(tmp_path: Path) -> None:
    request = ask(tokens_of(140), adapter="tone", max_tokens=20, ignore_eos=True)

    def engine() -> Engine:
        found = adapters_of(Settings(model="demo", adapters_dir=str(tmp_path)), "demo", demo_model())
        return build(adapters=found, fingerprint="f")

    expected = []
    for seed in (1, 2):
        write_adapter(tmp_path / "tone", seed)
        expected += [substance(each) for each in ran(engine(), request)]
    write_adapter(tmp_path / "tone", 1)
    running = engine()
    ran(running, ask(adapter="tone"))
    old = running.submit(request)
    for _ in range(5):
        running.step()
    write_adapter(tmp_path / "tone", 2)
    (new,) = ran(running, request)
    assert [substance(old.result(timeout=0)), substance(new)] == expected
    assert expected[0]["choices"] != expected[1]["choices"]
    assert expected[0]["fingerprint"] != expected[1]["fingerprint"]
