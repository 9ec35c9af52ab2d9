"""Assigns slots of the key-value cache to sequences. Numbers only, no tensors.

The cache has an arena for each length class. The slots of an arena are a list: the index of a sequence in it is its
slot. A sequence that leaves makes a hole, which the next one fills. All arenas share one memory budget: an arena grows
by blocks of slots, and gives unused slots back when another arena needs room. When an arena shrinks, or when its rows
must be contiguous, the last sequences move into holes.

A finished sequence may leave a prefix in its slot (`prefix_cache.py`). Such slots are taken last, the least recently
used first, but no sequence ever waits for one.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from typing import NamedTuple

from headrace.worker.engine.prefix_cache import PrefixCache
from headrace.worker.engine.sequence import CachedPrefix, Sequence, Slot

#: Length classes of the cache, in positions; those above the maximum context are left out.
LENGTH_CLASSES = (128, 256, 512, 1024, 2048, 4096)

#: Slots by which an arena grows: few enough to share the budget fairly, enough that growing is rare.
GROWTH = 8

#: An arena takes cached prefixes from another one only if they have been unused for this many times as long as its own
#: least recently used one: moving memory between arenas copies both.
STALE = 4


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
        prefixes: what finished sequences leave in their slots; by default nothing.

    Raises:
        ValueError: the budget does not hold one slot of the longest class.
    """

    def __init__(
        self, lengths: Iterable[int], *, position_bytes: int, budget_bytes: int, prefixes: PrefixCache | None = None
    ) -> None:
        #: Length class -> what is in each slot, None for a hole. A list never ends with a hole.
        self.arenas: dict[int, list[Sequence | CachedPrefix | None]] = {length: [] for length in sorted(lengths)}
        #: Length class -> slots for which the arena has memory.
        self.capacity = dict.fromkeys(self.arenas, 0)
        #: Length class -> slots that the arena had when it was resized last. Moves are made before the next time.
        self.fitted = dict.fromkeys(self.arenas, 0)
        self.prefixes = PrefixCache() if prefixes is None else prefixes
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
        """Share of the budget that slots of sequences take, from 0 to 1."""
        return sum(length * self._running(length) for length in self.arenas) * self.position_bytes / self.budget_bytes

    def _running(self, length: int) -> int:
        return sum(isinstance(each, Sequence) for each in self.arenas[length])

    def _in_use(self, length: int) -> int:
        return sum(each is not None for each in self.arenas[length])

    def allocate(self, sequence: Sequence, prefix: CachedPrefix | None = None) -> bool:
        """Give the sequence a slot of the shortest class that holds it. Returns whether there was room.

        Args:
            prefix: cached tokens that the sequence begins with. If there is no free slot, theirs is the first to be
                taken: nothing has to be copied.
        """
        length = next((length for length in self.arenas if length >= sequence.max_length), None)
        if length is None or not self._make_room(length, prefix):
            return False
        arena = self.arenas[length]
        if None not in arena:
            arena.append(None)
        sequence.slot = Slot(length, arena.index(None))
        arena[sequence.slot.index] = sequence
        return True

    def free(self, sequence: Sequence, keep: int = 0) -> None:
        """Free the slot of a sequence; does nothing if it has none.

        Args:
            keep: tokens of its prompt whose whole chunks are cached in the slot, if they are not cached already.
        """
        if sequence.slot is None:
            return
        slot, sequence.slot = sequence.slot, None
        arena = self.arenas[slot.length_class]
        prefix = self.prefixes.add(sequence.prompt[:keep], slot, sequence.adapter_digest)
        arena[slot.index] = prefix
        for part in self.prefixes.continued_by(prefix) if prefix is not None else ():
            self._evict(part)
        _drop_holes_at_end(arena)

    def evict_all(self) -> None:
        """Free the slots of all cached prefixes."""
        for prefix in self.prefixes.in_order():
            self._evict(prefix)

    def compact(self) -> None:
        """Move sequences so that theirs are the first slots of each arena. `take_moves` says what to copy."""
        for length, arena in self.arenas.items():
            count = self._running(length)
            for index, each in enumerate(arena[:count]):
                if isinstance(each, CachedPrefix):
                    self._move_or_evict(each, length, index, first=count)
            for index in range(len(arena) - 1, count - 1, -1):
                if isinstance(arena[index], Sequence):
                    self._move(length, index, arena.index(None))
            _drop_holes_at_end(arena)

    def _move_or_evict(self, prefix: CachedPrefix, length: int, index: int, first: int) -> None:
        """Move a cached prefix to a free slot from `first` on, or evict it if there is none."""
        arena = self.arenas[length]
        free = next((i for i in range(first, len(arena)) if arena[i] is None), len(arena))
        if free < min(self.fitted[length], self.capacity[length]):
            arena += [None] * (free + 1 - len(arena))
            self._move(length, index, free)
        else:
            self._evict(prefix)

    def _move(self, length: int, source: int, target: int) -> None:
        arena = self.arenas[length]
        moved = arena[source]
        if moved is None:
            return
        arena[source], arena[target], moved.slot = None, moved, Slot(length, target)
        if written := min(length, moved.written):
            self._moves.append(SlotMove(length, source, target, written))

    def take_moves(self) -> list[SlotMove]:
        """The copies to make, in this order, before an arena shrinks or is written. Clears the list."""
        moves, self._moves = self._moves, []
        return moves

    def _move_below(self, length: int, count: int) -> None:
        """Move the last entries of an arena into holes until only its first `count` slots are in use."""
        arena = self.arenas[length]
        for index in range(len(arena) - 1, count - 1, -1):
            if arena[index] is not None:
                self._move(length, index, arena.index(None))
        _drop_holes_at_end(arena)

    def _make_room(self, length: int, prefix: CachedPrefix | None) -> bool:
        """Make sure that an arena has a free slot. Returns whether it has one."""
        if self._in_use(length) < self.capacity[length]:
            return True
        if prefix is not None and _class_of(prefix) == length:
            self._evict(prefix)
            return True
        slot_bytes = length * self.position_bytes
        if self.budget_bytes - self.used_bytes < slot_bytes:
            self._shrink_others(slot_bytes, keep=length)
        return self._grow(length) or self._evict_for(length)

    def _grow(self, length: int) -> bool:
        """Add slots to an arena within the budget. Returns whether there was room for any.

        An arena of cached prefixes doubles, because growing copies it.
        """
        cached = self._in_use(length) - self._running(length)
        affordable = (self.budget_bytes - self.used_bytes) // (length * self.position_bytes)
        growth = max(0, min(max(GROWTH, cached), affordable))
        self.capacity[length] += growth
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

    # --- cached prefixes -------------------------------------------------------------------------------------------

    def _evict(self, prefix: CachedPrefix) -> None:
        if prefix.slot is not None:
            arena = self.arenas[prefix.slot.length_class]
            arena[prefix.slot.index] = None
            self.prefixes.remove(prefix)
            _drop_holes_at_end(arena)

    def _evict_for(self, length: int) -> bool:
        """Free a slot by evicting cached prefixes of this arena or of others. Returns whether there were any."""
        prefixes, now = self.prefixes.in_order(), self.prefixes.now
        own = next((prefix for prefix in prefixes if _class_of(prefix) == length), None)
        if own is None or now - prefixes[0].used_at > STALE * (now - own.used_at):
            older = itertools.takewhile(lambda prefix: prefix is not own, prefixes)
            if self._evict_others(list(older), length):
                return self._grow(length)
        if own is None:
            return False
        self._evict(own)
        return True

    def _evict_others(self, prefixes: list[CachedPrefix], length: int) -> bool:
        """Take the memory of cached prefixes of other arenas. Returns whether it was enough for a slot.

        It is an eighth of the budget at most if a slot is not larger, so that arenas are seldom copied.

        Args:
            prefixes: those that may be evicted, in this order.
            length: the length class that needs slots.
        """
        slot_bytes = length * self.position_bytes
        unused = sum(n * (self.capacity[n] - self._in_use(n)) for n in self.arenas if n != length)
        free = unused * self.position_bytes + self.budget_bytes - self.used_bytes
        if free + sum(map(_class_of, prefixes)) * self.position_bytes < slot_bytes:
            return False
        wanted = max(1, min(GROWTH, self.budget_bytes // 8 // slot_bytes)) * slot_bytes
        for prefix in prefixes:
            if free >= wanted:
                break
            free += _class_of(prefix) * self.position_bytes
            self._evict(prefix)
        self._shrink_others(min(wanted, free // slot_bytes * slot_bytes), keep=length)
        return True


def _class_of(prefix: CachedPrefix) -> int:
    return 0 if prefix.slot is None else prefix.slot.length_class


def _drop_holes_at_end(arena: list[Sequence | CachedPrefix | None]) -> None:
    while arena and arena[-1] is None:
        arena.pop()
