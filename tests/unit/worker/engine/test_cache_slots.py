"""Slots of the cache, without tensors."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from headrace.worker.engine.cache_slots import GROWTH, SlotMove, SlotTable
from headrace.worker.engine.prefix_cache import PrefixCache
from headrace.worker.engine.sequence import Sequence, Slot
from tests.unit.worker.engine.engine_helpers import ask

CLASSES = (128, 256, 512, 1024)


def table(budget_positions: int, lengths: tuple[int, ...] = CLASSES, chunk: int = 0) -> SlotTable:
    return SlotTable(lengths, position_bytes=10, budget_bytes=budget_positions * 10, prefixes=PrefixCache(chunk))


def sequence(longest: int, read: int = 1, first: int = 0) -> Sequence:
    prompt = [first] + [0] * (read - 1)
    return Sequence(ask(prompt, max_tokens=longest - read), prompt, 0, 0)


def placed(slots: SlotTable, *lengths: int, first: int = 0) -> list[Sequence]:
    sequences = [sequence(length, first=first) for length in lengths]
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


def leave(slots: SlotTable, longest: int, first: int) -> None:
    """Let a sequence run that leaves a prefix of one token."""
    (each,) = placed(slots, longest, first=first)
    slots.free(each, keep=1)


def cached(slots: SlotTable) -> list[tuple[int, Slot | None]]:
    return [(prefix.tokens[0], prefix.slot) for prefix in slots.prefixes.in_order()]


def test_slots_with_prefixes_are_taken_last_and_the_least_recently_used_first() -> None:
    slots = table(1024, chunk=1)
    for i in range(8):
        leave(slots, 100, i)
    assert (slots.capacity[128], slots.usage) == (8, 0)
    slots.prefixes.find([0])
    running = placed(slots, *[100] * 7)
    assert [s.slot for s in running] == [Slot(128, i) for i in range(1, 8)]
    assert cached(slots) == [(0, Slot(128, 0))]
    slots.free(running[0])
    assert placed(slots, 100)[0].slot == Slot(128, 1), "a free slot before one with a prefix"
    assert placed(slots, 100)[0].slot == Slot(128, 0)
    assert cached(slots) == []
    assert not slots.allocate(sequence(100))


def test_an_arena_of_prefixes_doubles_within_the_budget() -> None:
    slots, capacities = table(40 * 128, lengths=(128,), chunk=1), []
    for i in range(60):
        leave(slots, 100, i)
        capacities.append(slots.capacity[128])
    assert sorted(set(capacities)) == [8, 16, 32, 40]
    assert [token for token, _ in cached(slots)] == list(range(20, 60))


def test_prefixes_make_room_for_a_sequence_of_another_class_but_no_more_than_it_needs() -> None:
    slots = table(2048, chunk=1)
    for i in range(16):
        leave(slots, 100, i)
    (long,) = placed(slots, 1000)
    assert slots.capacity == {128: 8, 256: 0, 512: 0, 1024: 1}
    assert [token for token, _ in cached(slots)] == list(range(8, 16))
    assert not slots.allocate(sequence(1025))
    assert len(cached(slots)) == 8
    running = placed(slots, *[100] * 7)
    assert not slots.allocate(sequence(200))
    assert len(cached(slots)) == 1, "evicting it would not be enough"
    slots.evict_all()
    assert (len(slots.prefixes), slots.arenas[1024]) == (0, [long])
    assert {each for each in slots.arenas[128] if each is not None} == set(running)


def test_memory_goes_to_another_class_only_if_its_prefixes_have_been_unused_for_much_longer() -> None:
    """Moving memory copies arenas: under a mix of both lengths they keep theirs, and a new load takes it by and by."""
    slots = table(32 * 1024, chunk=1)
    sizes = set()
    for i in range(400):
        leave(slots, 1000 if i % 2 else 500, i)
        if i > 100:
            sizes.add((slots.capacity[512], slots.capacity[1024]))
    assert len(sizes) == 1
    before = slots.capacity[1024]
    resized = set()
    for i in range(1000, 2000):
        leave(slots, 500, i)
        resized.add(slots.capacity[1024])
    assert before >= 8
    assert (slots.capacity[1024], len(resized) < 12) == (0, True)


def test_compact_moves_prefixes_behind_sequences_or_evicts_them() -> None:
    slots = table(1024, chunk=1)
    first, second, third = placed(slots, 100, 100, 100)
    third.prefilled = 30
    first.prompt[0] = 9
    slots.free(first, keep=1)
    slots.fitted = dict(slots.capacity)
    slots.compact()
    assert slots.take_moves() == [SlotMove(128, 0, 3, 1), SlotMove(128, 2, 0, 30)]
    assert (third.slot, second.slot, cached(slots)) == (Slot(128, 0), Slot(128, 1), [(9, Slot(128, 3))])
    slots.fitted[128] = 4  # as if the arena had just grown: moves are made before it has the memory
    late = placed(slots, 100, 100)
    assert [s.slot for s in late] == [Slot(128, 2), Slot(128, 4)]
    slots.compact()
    assert (cached(slots), [s.slot for s in late]) == ([], [Slot(128, 2), Slot(128, 3)])


def test_a_budget_below_one_longest_sequence_is_refused_with_both_numbers() -> None:
    with pytest.raises(ValueError, match=r"HEADRACE_KV_CACHE_BYTES is 10230.*1024 tokens needs 10240"):
        table(1023)
    table(1024)


class SlotsMachine(RuleBasedStateMachine):
    """Sequences arrive and end in any order; `contents` simulates the cache, for sequences and what they left."""

    def __init__(self) -> None:
        super().__init__()
        self.running: list[Sequence] = []
        self.contents: dict[Slot, int] = {}
        self.slots = table(2500, chunk=1)

    @rule(longest=st.integers(2, 1024), first=st.integers(0, 9), dense=st.booleans())
    def place(self, longest: int, first: int, dense: bool) -> None:
        each = sequence(longest, first=first)
        length = next(length for length in CLASSES if length >= longest)
        taken = sum(s.slot.length_class for s in self.running if s.slot is not None)
        done = self.slots.allocate(each)
        if dense:
            self.slots.compact()
        self.follow_moves()
        assert done == (taken + length <= 2500), "a sequence waits for running ones only"
        if done:
            assert each.slot is not None
            assert each.slot.length_class == length
            assert each.slot not in {s.slot for s in self.running}
            each.prefilled = 1  # it has something in the cache
            self.running.append(each)
            self.contents[each.slot] = first

    @precondition(lambda self: self.running)
    @rule(data=st.data(), keep=st.booleans())
    def free(self, data: Any, keep: bool) -> None:
        gone = self.running.pop(data.draw(st.integers(0, len(self.running) - 1)))
        self.slots.free(gone, keep=int(keep))

    @precondition(lambda self: self.running)
    @rule()
    def compact(self) -> None:
        self.slots.compact()
        self.follow_moves()
        for rows in self.slots.arenas.values():
            kinds = [isinstance(each, Sequence) for each in rows]
            assert kinds == sorted(kinds, reverse=True)

    def follow_moves(self) -> None:
        for move in self.slots.take_moves():
            assert move.length == 1
            assert move.target < self.slots.fitted[move.length_class]
            self.contents[Slot(move.length_class, move.target)] = self.contents[Slot(move.length_class, move.source)]
        self.slots.fitted = dict(self.slots.capacity)

    @invariant()
    def slots_are_unique_and_inside_the_budget(self) -> None:
        held = {each.slot: each.prompt[0] for each in self.running}
        held |= {each.slot: each.tokens[0] for each in self.slots.prefixes.in_order()}
        assert len(held) == len(self.running) + len(self.slots.prefixes)
        for length, rows in self.slots.arenas.items():
            for i, each in enumerate(rows):
                assert (each is None) == (Slot(length, i) not in held)
                if each is not None:
                    assert each.slot == Slot(length, i)
                    assert self.contents[each.slot] == held[each.slot]
            assert len(rows) <= self.slots.capacity[length]
            assert not rows or rows[-1] is not None
        assert sum(map(len, self.slots.arenas.values())) >= len(held)
        assert self.slots.used_bytes <= self.slots.budget_bytes


TestSlotsMachine = SlotsMachine.TestCase
TestSlotsMachine.settings = settings(max_examples=40, stateful_step_count=40, deadline=None)
