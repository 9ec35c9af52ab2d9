"""Which sequence has which slot of the cache: plain numbers, no tensors.

Each length class is a list of its running sequences; a sequence's place in the list is its slot, so the running rows of
an arena always lie at its front. Memory is counted against one budget: a class grows in blocks, and one that holds
unused slots gives them back when another needs room.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

from worker.sequence import Sequence, Slot

#: Slots an arena grows by: few enough to share the budget fairly, enough that growing is rare.
BLOCK = 8


class Move(NamedTuple):
    """The cache must copy `length` positions of slot `source` to slot `target` of an arena."""

    length_class: int
    source: int
    target: int
    length: int


class SlotTable:
    """Length classes, their sequences and capacities, inside a budget.

    Args:
        lengths: the length classes, in positions.
        position_bytes: bytes of keys and values that one position takes, all layers together.
        budget_bytes: what all arenas together may take.

    Raises:
        ValueError: the budget does not hold even one slot of the longest class.
    """

    def __init__(self, lengths: Iterable[int], *, position_bytes: int, budget_bytes: int) -> None:
        self.rows: dict[int, list[Sequence]] = {length: [] for length in sorted(lengths)}
        self.capacity = dict.fromkeys(self.rows, 0)
        self.position_bytes = position_bytes
        self.budget_bytes = budget_bytes
        least = max(self.rows) * position_bytes
        if budget_bytes < least:
            raise ValueError(
                f"MILLRACE_KV_CACHE_BYTES is {budget_bytes}; one sequence of {max(self.rows)} tokens needs {least}. "
                "Raise it, or lower MILLRACE_MAX_CONTEXT"
            )

    @property
    def used_bytes(self) -> int:
        """What the arenas take now, whether their slots are in use or not."""
        return sum(length * count * self.position_bytes for length, count in self.capacity.items())

    @property
    def usage(self) -> float:
        """The share of the budget that slots in use take."""
        return sum(length * len(rows) for length, rows in self.rows.items()) * self.position_bytes / self.budget_bytes

    def place(self, sequence: Sequence) -> bool:
        """Give the sequence a slot of the shortest class that holds it."""
        length = next((length for length in self.rows if length >= sequence.longest), None)
        if length is None or not self._make_room(length):
            return False
        rows = self.rows[length]
        sequence.slot = Slot(length, len(rows))
        rows.append(sequence)
        return True

    def free(self, sequence: Sequence) -> Move | None:
        """Take the sequence's slot back; the last one of its arena moves into the hole."""
        if sequence.slot is None:
            return None
        length, index = sequence.slot.length_class, sequence.slot.index
        rows, sequence.slot = self.rows[length], None
        last = rows.pop()
        if last is sequence:
            return None
        rows[index] = last
        last.slot = Slot(length, index)
        return Move(length, source=len(rows), target=index, length=min(length, last.prefilled + len(last.output)))

    def _make_room(self, length: int) -> bool:
        """See that the class has a free slot, if the budget allows."""
        if len(self.rows[length]) < self.capacity[length]:
            return True
        slot_bytes = length * self.position_bytes
        if self.budget_bytes - self.used_bytes < slot_bytes:
            self._give_back(slot_bytes, keep=length)
        growth = min(BLOCK, (self.budget_bytes - self.used_bytes) // slot_bytes)
        self.capacity[length] += max(0, growth)
        return growth > 0

    def _give_back(self, needed: int, keep: int) -> None:
        """Shrink other classes' unused slots, just enough; not at all if that would not be enough."""
        unused = {length: self.capacity[length] - len(rows) for length, rows in self.rows.items() if length != keep}
        missing = needed - (self.budget_bytes - self.used_bytes)
        if missing > sum(length * count for length, count in unused.items()) * self.position_bytes:
            return
        for length, count in unused.items():
            given = min(count, max(0, -(-missing // (length * self.position_bytes))))
            self.capacity[length] -= given
            missing -= given * length * self.position_bytes
