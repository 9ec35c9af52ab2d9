"""The rows of a step: in which order, and which of them have an adapter."""

from __future__ import annotations

from types import SimpleNamespace

from headrace.worker.engine.input_batch import InputBatch
from headrace.worker.engine.scheduler import PromptChunk, SchedulerOutput
from headrace.worker.engine.sequence import Sequence, Slot
from tests.unit.worker.engine.engine_helpers import ask

A, B = SimpleNamespace(digest="a"), SimpleNamespace(digest="b")


def sequence(slot: int, adapter: object = None, *, length: int = 128, decoding: bool = True) -> Sequence:
    """A sequence with a prompt of four tokens, the first of which is the number of its slot."""
    prompt = [slot, 1, 1, 1]
    made = Sequence(ask(prompt, max_tokens=9), prompt, 0, 0, adapter=adapter)
    made.slot = Slot(length, slot)
    if decoding:
        made.prefilled, made.output = 4, [slot]
    return made


def rows(batch: InputBatch) -> list[tuple[object, int, int]]:
    return [(each.adapter, each.first, each.count) for each in batch.adapters]


def test_without_adapters_sequences_are_in_the_order_of_their_slots() -> None:
    batch = InputBatch(SchedulerOutput([sequence(2), sequence(0), sequence(7, length=256), sequence(1)]))
    assert batch.token_ids == [0, 1, 2, 7]
    assert [(group.slots, group.row) for group in batch.decode_groups] == [([0, 1, 2], 0), ([7], 3)]
    assert rows(batch) == []


def test_in_an_arena_rows_of_one_adapter_are_neighbours() -> None:
    decodes = [sequence(i, adapter) for i, adapter in enumerate([A, None, B, A, None, B, A])]
    batch = InputBatch(SchedulerOutput([*decodes, sequence(7, A, length=256), sequence(8, length=256)]))
    assert batch.token_ids == [1, 4, 0, 3, 6, 2, 5, 8, 7]
    assert [group.slots for group in batch.decode_groups] == [[1, 4, 0, 3, 6, 2, 5], [8, 7]]
    assert rows(batch) == [(A, 2, 3), (B, 5, 2), (A, 8, 1)]


def test_rows_of_proposed_tokens_and_of_chunks_have_the_adapter_of_their_sequence() -> None:
    first, second, reading, other = sequence(0, A), sequence(1, A), *(sequence(i, decoding=False) for i in (2, 3))
    reading.adapter, other.adapter = A, None
    batch = InputBatch(
        SchedulerOutput(
            [first, second],
            [PromptChunk(reading, 0, 2), PromptChunk(reading, 2, 2), PromptChunk(other, 0, 4)],
            proposed={first: [5, 6]},
        )
    )
    assert batch.token_ids == [0, 5, 6, 1, 2, 1, 1, 1, 3, 1, 1, 1]
    assert rows(batch) == [(A, 0, 8)]
    batch.pad(16)
    assert rows(batch) == [(A, 0, 8)]


def test_sampled_and_captured_rows_follow_their_sequences() -> None:
    plain, own = sequence(1), sequence(0, A)
    batch = InputBatch(SchedulerOutput([own, plain]))
    assert [(each.sequence, each.row) for each in batch.sampled()] == [(own, 1), (plain, 0)]
    assert batch.spans() == [(own, slice(1, 2)), (plain, slice(0, 1))]
