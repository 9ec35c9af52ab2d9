"""Which sequence has which slot of the cache: plain numbers, no tensors.

Each length class is a list of its running sequences; a sequence's place in the list is its slot. Who leaves makes a
hole, which the next one fills. Memory is counted against one budget: a class grows in blocks, and one that holds unused
slots gives them back when another needs room. Then, or where rows should lie at the front, the last ones fill holes.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

from headrace.worker.engine.sequence import Sequence, Slot

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
        #: The last of a list is always a sequence.
        self.rows: dict[int, list[Sequence | None]] = {length: [] for length in sorted(lengths)}
        self.capacity = dict.fromkeys(self.rows, 0)
        self._moves: list[Move] = []
        self.position_bytes = position_bytes
        self.budget_bytes = budget_bytes
        least = max(self.rows) * position_bytes
        if budget_bytes < least:
            raise ValueError(
                f"HEADRACE_KV_CACHE_BYTES is {budget_bytes}; one sequence of {max(self.rows)} tokens needs {least}. "
                "Raise it, or lower HEADRACE_MAX_CONTEXT"
            )

    @property
    def used_bytes(self) -> int:
        """What the arenas take now, whether their slots are in use or not."""
        return sum(length * count * self.position_bytes for length, count in self.capacity.items())

    @property
    def usage(self) -> float:
        """The share of the budget that slots in use take."""
        return sum(length * self._used(length) for length in self.rows) * self.position_bytes / self.budget_bytes

    def _used(self, length: int) -> int:
        return sum(each is not None for each in self.rows[length])

    def place(self, sequence: Sequence) -> bool:
        """Give the sequence a slot of the shortest class that holds it."""
        length = next((length for length in self.rows if length >= sequence.longest), None)
        if length is None or not self._make_room(length):
            return False
        rows = self.rows[length]
        if None not in rows:
            rows.append(None)
        sequence.slot = Slot(length, rows.index(None))
        rows[sequence.slot.index] = sequence
        return True

    def free(self, sequence: Sequence) -> None:
        """Take the sequence's slot back."""
        if sequence.slot is None:
            return
        rows, index, sequence.slot = self.rows[sequence.slot.length_class], sequence.slot.index, None
        rows[index] = None
        _drop_holes_at_end(rows)

    def compact(self) -> None:
        """Let the running rows lie at the front of their arenas. `take_moves` says what the cache must do."""
        for length in self.rows:
            self._fit_into(length, self._used(length))

    def take_moves(self) -> list[Move]:
        """What the cache must move, in this order, before anything of it shrinks or is written; forgets it."""
        moves, self._moves = self._moves, []
        return moves

    def _fit_into(self, length: int, count: int) -> None:
        """Let the last ones fill holes until no slot beyond `count` is used."""
        rows = self.rows[length]
        while len(rows) > count:
            last = rows.pop()
            if last is None:
                continue
            target = rows.index(None)
            rows[target], last.slot = last, Slot(length, target)
            if written := min(length, last.prefilled + len(last.output)):
                self._moves.append(Move(length, len(rows), target, written))
        _drop_holes_at_end(rows)

    def _make_room(self, length: int) -> bool:
        """See that the class has a free slot, if the budget allows."""
        if self._used(length) < self.capacity[length]:
            return True
        slot_bytes = length * self.position_bytes
        if self.budget_bytes - self.used_bytes < slot_bytes:
            self._give_back(slot_bytes, keep=length)
        growth = min(BLOCK, (self.budget_bytes - self.used_bytes) // slot_bytes)
        self.capacity[length] += max(0, growth)
        return growth > 0

    def _give_back(self, needed: int, keep: int) -> None:
        """Shrink other classes' unused slots, just enough; not at all if that would not be enough."""
        unused = {length: self.capacity[length] - self._used(length) for length in self.rows if length != keep}
        missing = needed - (self.budget_bytes - self.used_bytes)
        if missing > sum(length * count for length, count in unused.items()) * self.position_bytes:
            return
        for length, count in unused.items():
            given = min(count, max(0, -(-missing // (length * self.position_bytes))))
            self.capacity[length] -= given
            self._fit_into(length, self.capacity[length])
            missing -= given * length * self.position_bytes


def _drop_holes_at_end(rows: list[Sequence | None]) -> None:
    while rows and rows[-1] is None:
        rows.pop()
