"""The checkpoint tensors are read where jobs are computed: packed, cached, in chunks, among other jobs."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load

from headrace.client.wire.activations import CHECKPOINT_TENSORS
from headrace.client.wire.requests import parse_request
from headrace.config import Settings
from headrace.model.hub import DEMO
from headrace.worker.engine.build import load_engine
from headrace.worker.engine.engine import Engine
from headrace.worker.fidelity.judge import judge
from headrace.worker.fidelity.references.float64 import Float64

CROWD = [{"prompt": "The house " * n, "max_tokens": 12, "ignore_eos": True, "seed": n} for n in (1, 3, 40, 90)]


@pytest.fixture(scope="module")
def engine() -> Engine:
    return load_engine(Settings(model="demo", prefill_chunk=32, step_tokens=64))


def traced(engine: Engine, prompt: list[int], crowd: bool, **params: Any) -> dict[str, torch.Tensor]:
    """The tensors of a job, computed alone or while others are decoding and reading their prompts."""
    tensors: dict[str, bytes] = {}
    if crowd:
        for request in CROWD:
            engine.submit(parse_request(request))
        for _ in range(3):
            engine.step()
    fields = {"prompt": prompt, "max_tokens": 4, "temperature": 0, "checkpoints": "all", **params}
    future = engine.submit(parse_request(fields), on_activations=tensors.update)
    while engine.step():
        pass
    assert future.result()
    return {name: load(data)["tensor"] for name, data in tensors.items()}


@pytest.mark.parametrize("length", [1, 2, 31, 33, 100])
def test_a_trace_in_a_crowd_is_within_every_checkpoint(engine: Engine, length: int) -> None:
    prompt = [(7919 * i) % 50257 for i in range(1, length + 1)]
    ours, arbiter = traced(engine, prompt, crowd=True), Float64(DEMO)
    arrays = {name: tensor.numpy() for name, tensor in ours.items()}
    (margins,) = arbiter.margins([prompt], [ours["tokens"].tolist()])
    exact = arbiter.trace(prompt)
    assert [row for row in judge(arrays, exact, margins) if not row.ok] == []
    assert np.abs(arrays["hidden"] - exact["hidden"]).max() < 1e-4
    assert torch.equal(ours["cache_k"], ours["k"])
    assert torch.equal(ours["cache_v"], ours["v"])
    assert float(ours["cache_rest"]) == 0.0
    assert torch.equal(ours["last_logits"], ours["logits"][-1])
    assert int(ours["next_token"]) == int(ours["tokens"][0])


def test_the_cache_after_each_new_token_holds_what_was_written(engine: Engine) -> None:
    ours = traced(engine, [15496, 13], crowd=True, max_tokens=6)
    assert ours["k_new"].shape[0] == 5  # the last token is never fed back
    assert torch.equal(ours["cache_k_end"], torch.cat([ours["k"], ours["k_new"]]))
    assert torch.equal(ours["cache_v_end"], torch.cat([ours["v"], ours["v_new"]]))


def test_a_trace_is_the_same_bits_alone_and_in_a_crowd(engine: Engine) -> None:
    prompt = [(31 * i) % 50257 for i in range(70)]
    alone, crowd = traced(engine, prompt, crowd=False), traced(engine, prompt, crowd=True)
    assert alone.keys() == crowd.keys() == {name for names in CHECKPOINT_TENSORS.values() for name in names}
    for name in alone:
        assert torch.equal(alone[name], crowd[name]), name


def test_tracing_changes_no_answer(engine: Engine) -> None:
    fields = {"prompt": "Once upon a time", "max_tokens": 8, "seed": 3, "logprobs": 2}
    plain, with_trace = (engine.submit(parse_request({**fields, **more})) for more in ({}, {"checkpoints": [1, 8]}))
    while engine.step():
        pass
    assert plain.result().choices == with_trace.result().choices


def test_only_the_checkpoints_asked_for_are_kept(engine: Engine) -> None:
    assert traced(engine, [15496, 13], crowd=False, checkpoints=[4, 9]).keys() == {"scores", "last_logits"}


def test_the_slot_of_a_traced_job_was_empty_whoever_had_it_before(engine: Engine) -> None:
    for _ in range(3):
        traced(engine, [(13 * i) % 50257 for i in range(90)], crowd=True)
    assert float(traced(engine, [15496, 13], crowd=True)["cache_rest"]) == 0.0


def test_samples_beside_a_traced_one_are_right(engine: Engine) -> None:
    fields = {"prompt": "Once upon a time", "max_tokens": 8, "seed": 3, "n": 3}
    plain, with_trace = (engine.submit(parse_request({**fields, **more})) for more in ({}, {"checkpoints": "all"}))
    while engine.step():
        pass
    assert plain.result().choices == with_trace.result().choices
