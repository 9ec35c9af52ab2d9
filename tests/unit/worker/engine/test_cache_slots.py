"""Slots of the cache, without tensors."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from headrace.worker.engine.cache_slots import GROWTH, SlotMove, SlotTable
from headrace.worker.engine.sequence import Sequence, Slot
from tests.unit.worker.engine.engine_helpers import ask

CLASSES = (128, 256, 512, 1024)


def table(budget_positions: int, lengths: tuple[int, ...] = CLASSES) -> SlotTable:
    return SlotTable(lengths, position_bytes=10, budget_bytes=budget_positions * 10)


def sequence(longest: int, read: int = 1) -> Sequence:
    request = ask([0] * read, max_tokens=longest - read)
    return Sequence(request, [0] * read, 0, 0)


def placed(slots: SlotTable, *lengths: int) -> list[Sequence]:
    sequences = [sequence(length) for length in lengths]
    assert all(slots.allocate(each) for each in sequences)
    return sequences


@pytest.mark.parametrize(("longest", "goes_to"), [(2, 128), (128, 128), (129, 256), (513, 1024), (1024, 1024)])
def test_a_sequence_goes_to_the_shortest_class_that_holds_it(longest: int, goes_to: int) -> None:
    slots = table(100_000)
    assert [s.slot for s in placed(slots, longest, longest)] == [Slot(goes_to, 0), Slot(goes_to, 1)]


def test_an_arena_grows_in_blocks() -> None:
    slots = table(100_000)
    placed(slots, *[100] * GROWTH)
    assert slots.capacity[128] == GROWTH
    placed(slots, 100)
    assert slots.capacity[128] == 2 * GROWTH
    assert slots.used_bytes == 2 * GROWTH * 128 * 10


def test_an_arena_grows_by_less_where_the_budget_ends() -> None:
    slots = table(1024 + 3 * 128)
    placed(slots, 1024, 100, 100, 100)
    assert slots.capacity == {128: 3, 256: 0, 512: 0, 1024: 1}
    assert not slots.allocate(late := sequence(100))
    assert late.slot is None


def test_the_next_sequence_fills_the_hole_and_none_moves() -> None:
    slots = table(100_000)
    first, second, third = placed(slots, 100, 100, 100)
    slots.free(first)
    slots.free(first)  # a second time is no error
    (late, later) = placed(slots, 100, 100)
    assert [s.slot for s in (first, second, third, late, later)] == [None, *(Slot(128, i) for i in (1, 2, 0, 3))]
    assert slots.take_moves() == []
    for each in (third, second, late, later):
        slots.free(each)
    assert slots.arenas[128] == []


def test_compact_moves_the_last_sequences_into_holes() -> None:
    slots = table(100_000)
    first, second, third, fourth = placed(slots, 100, 100, 100, 100)
    for each in (second, third, fourth):
        each.prefilled, each.output = 40, [0, 0]
    slots.free(first)
    slots.free(third)
    slots.compact()
    assert slots.take_moves() == [SlotMove(128, source=3, target=0, length=42)]
    assert slots.take_moves() == []
    assert (second.slot, fourth.slot) == (Slot(128, 1), Slot(128, 0))
    assert slots.arenas[128] == [fourth, second]


def test_a_row_with_nothing_in_the_cache_needs_no_move() -> None:
    slots = table(100_000)
    first, second = placed(slots, 100, 100)
    slots.free(first)
    slots.compact()
    assert (second.slot, slots.take_moves()) == (Slot(128, 0), [])


def test_a_move_copies_no_more_than_the_arena_is_long() -> None:
    slots = table(100_000)
    first, second = placed(slots, 128, 128)
    second.prefilled, second.output = 100, [0] * 29
    slots.free(first)
    slots.compact()
    assert [move.length for move in slots.take_moves()] == [128]


def test_sequences_move_when_their_arena_must_shrink() -> None:
    slots = table(1024)
    short = placed(slots, *[100] * 8)
    for each in short:
        each.prefilled = 10
    for each in short[:4]:
        slots.free(each)
    placed(slots, 200)  # two of the short slots
    assert slots.capacity == {128: 6, 256: 1, 512: 0, 1024: 0}
    assert slots.take_moves() == [
        SlotMove(128, source=7, target=0, length=10),
        SlotMove(128, source=6, target=1, length=10),
    ]


def test_unused_slots_are_freed_when_another_class_needs_memory() -> None:
    slots = table(1024)
    short = placed(slots, *[100] * 8)
    assert not slots.allocate(sequence(1024))
    for each in short:
        slots.free(each)
    assert slots.capacity[128] == 8
    placed(slots, 1024)
    assert slots.capacity == {128: 0, 256: 0, 512: 0, 1024: 1}


def test_only_as_many_slots_are_freed_as_needed() -> None:
    slots = table(8 * 1024)
    short = placed(slots, *[100] * 64)  # all of the budget
    for each in short[10:]:
        slots.free(each)
    placed(slots, 200)
    assert slots.capacity[128] == 62
    assert slots.capacity[256] == 1


def test_a_longer_slot_that_is_free_becomes_short_ones() -> None:
    slots = table(1024 + 128)
    long, _ = placed(slots, 1024, 100)
    assert not slots.allocate(sequence(100))
    slots.free(long)
    assert [s.slot for s in placed(slots, 90, 200)] == [Slot(128, 1), Slot(256, 0)]


def test_no_slots_are_freed_if_that_would_not_be_enough() -> None:
    """Shrinking copies an arena, which must not happen for every sequence that ends while a long one waits."""
    slots = table(1024)
    short = placed(slots, *[100] * 8)
    for i, each in enumerate(short):
        assert not slots.allocate(sequence(1024))
        assert slots.capacity[128] == 8, i
        slots.free(each)
    placed(slots, 1024)


def test_a_sequence_longer_than_every_class_gets_no_slot() -> None:
    assert not table(9999).allocate(sequence(1025))


def test_a_budget_below_one_longest_sequence_is_refused_with_both_numbers() -> None:
    with pytest.raises(ValueError, match=r"HEADRACE_KV_CACHE_BYTES is 10230.*1024 tokens needs 10240"):
        table(1023)
    table(1024)


class SlotsMachine(RuleBasedStateMachine):
    """Sequences arrive and end in any order; `contents` simulates the cache."""

    def __init__(self) -> None:
        super().__init__()
        self.running: list[Sequence] = []
        self.contents: dict[Slot, Sequence] = {}

    @rule(longest=st.integers(2, 1024))
    def place(self, longest: int) -> None:
        if not hasattr(self, "slots"):
            self.slots = table(2500)
        each = sequence(longest)
        done = self.slots.allocate(each)
        self.follow_moves()
        if done:
            assert each.slot is not None
            assert each.slot.length_class >= longest
            assert each.slot not in self.contents
            each.prefilled = 1  # it has something in the cache
            self.running.append(each)
            self.contents[each.slot] = each
        else:
            assert self.running, "nothing runs, and still there is no room"

    @precondition(lambda self: self.running)
    @rule(data=st.data())
    def free(self, data: Any) -> None:
        gone = self.running.pop(data.draw(st.integers(0, len(self.running) - 1)))
        assert gone.slot is not None
        del self.contents[gone.slot]
        self.slots.free(gone)

    @precondition(lambda self: self.running)
    @rule()
    def compact(self) -> None:
        self.slots.compact()
        self.follow_moves()
        assert [each for rows in self.slots.arenas.values() for each in rows if each is None] == []

    def follow_moves(self) -> None:
        for move in self.slots.take_moves():
            mover = self.contents.pop(Slot(move.length_class, move.source))
            assert Slot(move.length_class, move.target) not in self.contents
            self.contents[Slot(move.length_class, move.target)] = mover
            assert move.length == mover.prefilled

    @invariant()
    def slots_are_unique_and_inside_the_budget(self) -> None:
        if not hasattr(self, "slots"):
            return
        assert {each.slot: each for each in self.running} == self.contents
        for length, rows in self.slots.arenas.items():
            assert all(each is None or each.slot == Slot(length, i) for i, each in enumerate(rows))
            assert len(rows) <= self.slots.capacity[length]
            assert not rows or rows[-1] is not None
        assert self.slots.used_bytes <= self.slots.budget_bytes


TestSlotsMachine = SlotsMachine.TestCase
TestSlotsMachine.settings = settings(max_examples=40, stateful_step_count=40, deadline=None)
