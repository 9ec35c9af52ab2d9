"""Assigns slots of the key-value cache to sequences. Numbers only, no tensors.

The cache has an arena for each length class. The slots of an arena are a list: the index of a sequence in it is its
slot. A sequence that leaves makes a hole, which the next one fills. All arenas share one memory budget: an arena grows
by blocks of slots, and gives unused slots back when another arena needs room. When an arena shrinks, or when its rows
must be contiguous, the last sequences move into holes.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

from headrace.worker.engine.sequence import Sequence, Slot

#: Length classes of the cache, in positions; those above the maximum context are left out.
LENGTH_CLASSES = (128, 256, 512, 1024, 2048, 4096)

#: Slots by which an arena grows: few enough to share the budget fairly, enough that growing is rare.
GROWTH = 8


def length_classes(max_context: int) -> list[int]:
    """The length classes for sequences of up to `max_context` tokens. The last one is that, rounded up to 16."""
    last = -(-max_context // 16) * 16
    return [length for length in LENGTH_CLASSES if length < last] + [last]


class SlotMove(NamedTuple):
    """Copy `length` positions from slot `source` to slot `target` of the same arena."""

    length_class: int
    source: int
    target: int
    length: int


class SlotTable:
    """The slots of all arenas, inside one memory budget.

    Args:
        lengths: the length classes, in positions.
        position_bytes: bytes of the keys and values of one position, all layers together.
        budget_bytes: limit for all arenas together.

    Raises:
        ValueError: the budget does not hold one slot of the longest class.
    """

    def __init__(self, lengths: Iterable[int], *, position_bytes: int, budget_bytes: int) -> None:
        #: Length class -> the sequence in each slot, None for a hole. A list never ends with a hole.
        self.arenas: dict[int, list[Sequence | None]] = {length: [] for length in sorted(lengths)}
        #: Length class -> slots for which the arena has memory.
        self.capacity = dict.fromkeys(self.arenas, 0)
        self._moves: list[SlotMove] = []
        self.position_bytes = position_bytes
        self.budget_bytes = budget_bytes
        least = max(self.arenas) * position_bytes
        if budget_bytes < least:
            raise ValueError(
                f"HEADRACE_KV_CACHE_BYTES is {budget_bytes}; one sequence of {max(self.arenas)} tokens needs {least}. "
                "Raise it, or lower HEADRACE_MAX_CONTEXT"
            )

    @property
    def used_bytes(self) -> int:
        """Memory of all arenas, whether their slots are in use or not."""
        return sum(length * count * self.position_bytes for length, count in self.capacity.items())

    @property
    def usage(self) -> float:
        """Share of the budget that slots in use take, from 0 to 1."""
        return sum(length * self._in_use(length) for length in self.arenas) * self.position_bytes / self.budget_bytes

    def _in_use(self, length: int) -> int:
        return sum(each is not None for each in self.arenas[length])

    def allocate(self, sequence: Sequence) -> bool:
        """Give the sequence a slot of the shortest class that holds it. Returns whether there was room."""
        length = next((length for length in self.arenas if length >= sequence.max_length), None)
        if length is None or not self._make_room(length):
            return False
        arena = self.arenas[length]
        if None not in arena:
            arena.append(None)
        sequence.slot = Slot(length, arena.index(None))
        arena[sequence.slot.index] = sequence
        return True

    def free(self, sequence: Sequence) -> None:
        """Free the slot of a sequence; does nothing if it has none."""
        if sequence.slot is None:
            return
        arena, index, sequence.slot = self.arenas[sequence.slot.length_class], sequence.slot.index, None
        arena[index] = None
        _drop_holes_at_end(arena)

    def compact(self) -> None:
        """Move sequences so that the slots in use are the first of each arena. `take_moves` says what to copy."""
        for length in self.arenas:
            self._move_below(length, self._in_use(length))

    def take_moves(self) -> list[SlotMove]:
        """The copies to make, in this order, before an arena shrinks or is written. Clears the list."""
        moves, self._moves = self._moves, []
        return moves

    def _move_below(self, length: int, count: int) -> None:
        """Move the last sequences of an arena into holes until only its first `count` slots are in use."""
        arena = self.arenas[length]
        while len(arena) > count:
            last = arena.pop()
            if last is None:
                continue
            target = arena.index(None)
            arena[target], last.slot = last, Slot(length, target)
            if written := min(length, last.prefilled + len(last.output)):
                self._moves.append(SlotMove(length, len(arena), target, written))
        _drop_holes_at_end(arena)

    def _make_room(self, length: int) -> bool:
        """Grow the arena if it has no free slot and the budget allows. Returns whether there is a free slot."""
        if self._in_use(length) < self.capacity[length]:
            return True
        slot_bytes = length * self.position_bytes
        if self.budget_bytes - self.used_bytes < slot_bytes:
            self._shrink_others(slot_bytes, keep=length)
        growth = min(GROWTH, (self.budget_bytes - self.used_bytes) // slot_bytes)
        self.capacity[length] += max(0, growth)
        return growth > 0

    def _shrink_others(self, needed: int, keep: int) -> None:
        """Take just enough unused slots from other arenas; none if all of them would not be enough."""
        unused = {length: self.capacity[length] - self._in_use(length) for length in self.arenas if length != keep}
        missing = needed - (self.budget_bytes - self.used_bytes)
        if missing > sum(length * count for length, count in unused.items()) * self.position_bytes:
            return
        for length, count in unused.items():
            given = min(count, max(0, -(-missing // (length * self.position_bytes))))
            self.capacity[length] -= given
            self._move_below(length, self.capacity[length])
            missing -= given * length * self.position_bytes


def _drop_holes_at_end(arena: list[Sequence | None]) -> None:
    while arena and arena[-1] is None:
        arena.pop()
