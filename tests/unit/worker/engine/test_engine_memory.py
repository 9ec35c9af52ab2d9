"""What of a job stays in the engine's process when the job has ended: nothing, without a collection of garbage."""

from __future__ import annotations

import gc
import time
import weakref
from collections.abc import Iterator
from typing import Any

import pytest

from headrace.worker.engine.build import release_memory
from tests.unit.worker.engine.engine_helpers import ask, build, settle


@pytest.fixture
def no_collection() -> Iterator[None]:
    """The collector counts objects, not bytes: a worker's next full collection may be some thousand jobs away."""
    gc.collect()
    gc.disable()
    yield
    gc.enable()


@pytest.mark.parametrize("end", ["succeeds", "is cancelled", "is cancelled by its future", "expires"])
@pytest.mark.parametrize(
    "fields",
    [{}, {"expires_at": time.time() + 3600}, {"checkpoints": "all"}, {"n": 3, "temperature": 1, "logprobs": 5}],
    ids=["plain", "deadline", "checkpoints", "samples"],
)
@pytest.mark.usefixtures("no_collection")
def test_a_job_that_has_ended_is_freed_at_once(end: str, fields: dict[str, Any]) -> None:
    engine, tensors = build(), dict[str, bytes]()
    long = end != "succeeds"
    if end == "expires":
        fields = {**fields, "expires_at": time.time() + 0.05}
    request = ask(max_tokens=500 if long else 4, ignore_eos=True, **fields)
    future = engine.submit(request, job_id="a", on_activations=tensors.update)
    state = weakref.ref(engine._inbox[0])
    engine.step()
    if end == "is cancelled":
        engine.cancel("a")
    elif end == "is cancelled by its future":
        future.cancel()
    settle(engine, future)
    engine.step()
    del future
    assert state() is None
    assert bool(tensors) == ("checkpoints" in fields and end == "succeeds")


def test_the_activations_of_an_ended_job_are_freed_while_its_result_waits_to_be_stored() -> None:
    engine = build()
    future = engine.submit(ask(max_tokens=2, checkpoints="all"))
    (sequence,) = engine._inbox[0].sequences
    engine.step()
    assert sequence.activations is not None
    settle(engine, future)
    assert sequence.activations is None


def test_an_engine_that_was_built_at_the_start_is_freed_when_its_model_is_unloaded() -> None:
    engine: Any = build()
    cycle = [engine]
    cycle.append(cycle)
    gone = weakref.ref(engine)
    gc.freeze()  # as when the worker is ready
    del engine, cycle
    gc.collect()
    assert gone() is not None, "it is not looked at"
    release_memory()
    assert gone() is None
