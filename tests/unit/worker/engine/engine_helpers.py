"""Engines around the bundled model, and requests for them."""

from __future__ import annotations

import functools
from concurrent.futures import Future
from types import SimpleNamespace
from typing import Any

import pytest

from headrace.client.wire.errors import JobFailed
from headrace.client.wire.requests import GenerateRequest, parse_request
from headrace.client.wire.results import Result
from headrace.config import Settings
from headrace.model import Decoder, Tokenizer, load_model
from headrace.worker.engine.build import load_engine
from headrace.worker.engine.cache_slots import SlotTable, length_classes
from headrace.worker.engine.engine import Engine
from headrace.worker.engine.model_runner import ModelRunner
from headrace.worker.engine.prefix_cache import PrefixCache
from headrace.worker.engine.scheduler import Scheduler

WORDS = (
    "the king and his people had gone out to see what was in the house of a man who would not say where he came from"
)


@functools.cache
def demo_engine() -> Engine:
    """The engine for the default settings; all other engines here share its model and tokenizer.

    It uses one thread: threads that wait for each other are slow while other processes use the cores.
    """
    return load_engine(Settings(model="demo", device="cpu", dtype="float32", threads=1))


def demo_model() -> Decoder:
    runner = demo_engine().runner
    assert isinstance(runner, ModelRunner)
    return runner.model


@functools.cache
def torch_model() -> Decoder:
    """The bundled model without compiled GEMMs, as on an unsupported device."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("headrace.model.linear.fp32_works", lambda *_: False)
        return load_model("demo", device="cpu", dtype="float32")


def demo_tokenizer() -> Tokenizer:
    return demo_engine().tokenizer


def build(
    *,
    slots: int = 64,
    step_tokens: int = 512,
    prefill_chunk: int = 128,
    draft_tokens: int = 0,
    budget_positions: int = 64 * 1024,
    prefix_cache: bool = True,
    runner: type[ModelRunner] = ModelRunner,
    model: Decoder | None = None,
    model_name: str = "demo",
    **more: Any,
) -> Engine:
    """Create an engine that is not started. `budget_positions` is the budget of the cache, in positions."""
    gpt2 = model or demo_model()
    lengths = length_classes(gpt2.config.n_positions)
    tensors = runner(gpt2, lengths)
    table = SlotTable(
        lengths,
        position_bytes=tensors.position_bytes,
        budget_bytes=budget_positions * tensors.position_bytes,
        prefixes=PrefixCache(prefill_chunk if prefix_cache else 0),
    )
    return Engine(
        tensors,
        demo_tokenizer(),
        Scheduler(
            table, max_rows=slots, step_tokens=step_tokens, prefill_chunk=prefill_chunk, draft_tokens=draft_tokens
        ),
        model_name=model_name,
        vocab_size=gpt2.config.vocab_size,
        max_context=gpt2.config.n_positions,
        **{"ends": demo_engine().ends, **more},
    )


def models_of(engine: Any, name: str = "demo") -> Any:
    """A registry with one loaded model; the engine may be a test double."""
    return SimpleNamespace(
        names=(name,),
        loaded={name: engine},
        get=lambda _: engine,
        stats=lambda: {name: engine.stats()},
        unloads=False,
    )


def ask(prompt: str | list[int] = "Hello.", **fields: Any) -> GenerateRequest:
    """A request for eight greedy tokens, unless `fields` say otherwise."""
    return parse_request({"prompt": prompt, "max_tokens": 8, "temperature": 0, "seed": 0, **fields})


def tokens_of(count: int, seed: int = 1) -> list[int]:
    """A prompt of `count` ordinary tokens; different seeds give different ones."""
    words = demo_tokenizer().encode(" " + WORDS)
    return [words[(i * i * seed + i + seed) % len(words)] for i in range(count)]


def drive(engine: Engine, *futures: Future[Result], steps: int = 5000) -> list[Result]:
    """Run steps until the futures are done, and return their results."""
    for _ in range(steps):
        if all(future.done() for future in futures):
            return [future.result(timeout=0) for future in futures]
        engine.step()
    raise AssertionError(f"not done after {steps} steps")


def substance(result: Result) -> dict[str, Any]:
    """A result without its id, its timings, and how much of its prompt was reused."""
    return result.model_dump(exclude={"id": True, "timings": True, "usage": {"prompt_tokens_details"}})


def idle(engine: Engine) -> bool:
    """Whether the engine is empty: no sequence, no slot in use but by cached prefixes, no waiting request."""
    scheduler = engine.scheduler
    return not scheduler.running and scheduler.waiting == 0 and scheduler.slots.usage == 0


def expected(*requests: GenerateRequest) -> list[dict[str, Any]]:
    """The result of each request, computed alone."""
    engine = build()
    return [substance(drive(engine, engine.submit(request))[0]) for request in requests]


def failure(future: Future[Result]) -> JobFailed:
    """The error of a job that must have failed."""
    with pytest.raises(JobFailed) as caught:
        future.result(timeout=0)
    return caught.value


def settle(engine: Engine, *futures: Future[Result]) -> None:
    """Run steps until the futures are done, whether they succeed or fail."""
    for _ in range(2000):
        if all(future.done() for future in futures):
            return
        engine.step()
    raise AssertionError("not done")
