"""Masks that take long hold up the sequences that need them, and no others; texts are the same."""

from __future__ import annotations

import re
import threading
import time
from typing import Any, cast

import pytest

from headrace.client.wire.errors import JobFailed
from headrace.worker.engine import mask_budget, token_masks
from headrace.worker.engine.engine import Engine
from headrace.worker.engine.mask_budget import MaskBudget, MaskGroup
from headrace.worker.engine.token_masks import MaskThreads
from headrace.worker.engine.token_rules import MaskWork
from tests.unit.worker.engine.engine_helpers import ask, build, drive, idle, substance

SLOW, QUICK = {"regex": "( [a-z]+)+"}, {"regex": "( [A-Z]+)+"}


@pytest.fixture
def engine() -> Engine:
    """An engine that has compiled both forms."""
    engine = build(draft_tokens=4)
    for form in (SLOW, QUICK):
        engine.grammars.get(form)
    return engine


@pytest.fixture
def gate(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> threading.Event:
    """Masks of SLOW are computed once it is set."""
    opened, fill, slow = threading.Event(), MaskWork._fill, engine.grammars.get(SLOW).group

    def wait_and_fill(self: MaskWork) -> None:
        if self.group is slow and not self.first:
            assert opened.wait(60)
        fill(self)

    monkeypatch.setattr(MaskWork, "_fill", wait_and_fill)
    return opened


def test_other_jobs_do_not_wait_for_masks(engine: Engine, gate: threading.Event) -> None:
    slow = [ask("The", structured_outputs=SLOW, n=3, seed=i, temperature=1) for i in range(2)]
    other = ask("The", max_tokens=30)
    held, free = [engine.submit(request) for request in slow], engine.submit(other)
    (result,) = drive(engine, free)
    assert len(result.choices[0].token_ids) == 30
    assert not any(future.done() for future in held)
    steps = engine.stats().steps
    drive(engine, engine.submit(other))  # the rows of the slow ones are not computed meanwhile
    assert engine.stats().steps - steps <= 31
    cancelled = engine.submit(slow[0])
    engine.step()
    cancelled.cancel()
    gate.set()
    found = drive(engine, *held)
    assert [substance(each) for each in found] == _computed(build(), slow)[0]
    engine.step()
    assert idle(engine)


def test_late_sequences_make_room_for_others(gate: threading.Event, engine: Engine) -> None:
    engine.scheduler.max_rows = 2
    slow = ask("The", structured_outputs=SLOW, n=3, temperature=1)
    held = engine.submit(slow)
    others = [engine.submit(ask("The", max_tokens=20, seed=i)) for i in range(3)]
    drive(engine, *others)
    assert not held.done()
    gate.set()
    decoding = []
    while not held.done():
        decoding.append(len(engine.scheduler.schedule().decodes))
        engine.step()
    assert max(decoding) <= 2
    assert (
        substance(held.result(timeout=0))
        == _computed(build(), [ask("The", structured_outputs=SLOW, n=3, temperature=1)])[0][0]
    )
    engine.step()
    assert idle(engine)


@pytest.mark.parametrize("draft_tokens", [0, 4])
def test_texts_are_the_same_if_masks_are_late(draft_tokens: int, monkeypatch: pytest.MonkeyPatch) -> None:
    common: dict[str, Any] = {"max_tokens": 6, "temperature": 1, "logprobs": 2}
    requests = [
        ask("The king", seed=1, structured_outputs=SLOW, n=2, **common),
        ask("The king", seed=2, structured_outputs={"regex": "(ab)*"}, checkpoints=[1, 7], **common),
        ask("The king", seed=3, bad_words=["the"], **common),
        ask("The king", seed=4, **{**common, "max_tokens": 20}),
    ]
    expected, tensors = _computed(build(), requests)
    late, fill, wait = [], MaskWork.compute, token_masks.PendingMasks._late

    def slow(self: MaskWork) -> None:
        if not self.first:
            time.sleep(0.02)
        fill(self)

    def count(self: token_masks.PendingMasks) -> frozenset[int]:
        late.append(found := wait(self))
        return found

    monkeypatch.setattr(MaskWork, "compute", slow)
    monkeypatch.setattr(token_masks.PendingMasks, "_late", count)
    monkeypatch.setattr(token_masks, "MIN_WAIT_S", 0)
    monkeypatch.setattr(token_masks, "WAIT", 0)
    assert _computed(build(draft_tokens=draft_tokens), requests) == (expected, tensors)
    assert sum(map(len, late)) > 3


def _computed(engine: Engine, requests: list[Any]) -> tuple[list[dict[str, Any]], dict[str, bytes]]:
    tensors: dict[str, bytes] = {}
    for request in requests:
        if request.structured_outputs:
            engine.grammars.get(request.structured_outputs)
    futures = [engine.submit(request, on_activations=tensors.update) for request in requests]
    return [substance(result) for result in drive(engine, *futures)], tensors


def test_a_job_whose_masks_take_too_long_fails_alone(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(mask_budget, "REQUEST_S", -1.0)
        spent = engine.submit(ask("The", structured_outputs=SLOW, n=3))
    other = engine.submit(ask("The", structured_outputs=SLOW))
    with pytest.raises(JobFailed) as caught:
        drive(engine, spent)
    assert caught.value.code == "grammar_too_complex"
    assert str(caught.value).startswith("structured_outputs.regex: following the text by this grammar takes more time")
    assert re.fullmatch(SLOW["regex"], drive(engine, other)[0].choices[0].text)


def test_the_time_of_masks_is_counted() -> None:
    budget = MaskBudget("structured_outputs.json")
    budget.spend(mask_budget.REQUEST_S)
    assert not budget.error
    budget.spend(2.1 * mask_budget.MASK_S)
    assert budget.error.startswith("structured_outputs.json: ")


def test_the_grammar_that_has_taken_the_least_time_is_next(monkeypatch: pytest.MonkeyPatch) -> None:
    order: list[str] = []
    begun, gate = threading.Event(), threading.Event()

    class Work:
        def __init__(self, name: str, group: MaskGroup) -> None:
            self.name, self.group = name, group

        def compute(self) -> None:
            order.append(self.name)
            begun.set()
            assert gate.wait(60)
            if self.name == "slow":
                time.sleep(2 * token_masks.TURN_S)

    slow, quick = MaskGroup(), MaskGroup()
    threads = MaskThreads(1)
    threads._add(cast("list[MaskWork]", [Work("slow", slow) for _ in range(4)]))
    assert begun.wait(60)
    threads._add(cast("list[MaskWork]", [Work("quick", quick)]))
    gate.set()
    threads._pool.shutdown()
    assert order == ["slow", "quick", "slow", "slow", "slow"]
    assert slow.pending == quick.pending == 0
