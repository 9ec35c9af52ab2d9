"""Computes the masks of a step beside it: in threads of their own, while the model computes the logits.

A step does not wait long for masks. A sequence whose mask is late gets no token in this step and takes part in later
ones when its mask is there; its text is the same. So a grammar that is slow to follow holds up its own sequences only.
"""

from __future__ import annotations

import bisect
import itertools
import os
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import numpy as np

from headrace.worker.engine.mask_budget import MaskGroup
from headrace.worker.engine.token_rules import MaskWork, TokenRules, Words

#: Threads that compute masks. Those of one grammar wait for each other.
THREADS = max(1, min(4, (os.cpu_count() or 1) // 8))
#: A step waits for masks at most for this part of the time that it takes without them, or for so many seconds.
WAIT, MIN_WAIT_S = 0.25, 0.004
#: If nothing else is computed, it waits for one of them, but for no longer than this: other jobs may have come.
MAX_WAIT_S = 0.05
#: After so many seconds a thread turns to the grammar that has taken the least time so far.
TURN_S = 0.002


class MaskedRow(NamedTuple):
    """A row that needs a mask: for the token that follows `output`, the last of which are `proposed`."""

    row: int
    rules: TokenRules
    output: list[int]
    proposed: list[int]


class Masks(NamedTuple):
    """The masks [len(rows), words] of rows, which are counted without those that are late."""

    rows: list[int]
    words: Words
    late: frozenset[int]


class PendingMasks:
    """The masks of a step, some of which are being computed.

    Args:
        rows: those of one sequence follow each other.
        works: the masks of each row's sequence.
        changed: notified when masks have been computed.
        others: whether the step computes something that needs no mask.
    """

    def __init__(
        self, rows: Sequence[MaskedRow], works: list[MaskWork], changed: threading.Condition, *, others: bool
    ) -> None:
        self._rows, self._works, self._changed = rows, works, changed
        self._others = others or any(work.first for work in works)
        self._began = time.monotonic()

    def result(self) -> Masks:
        """The masks that are there in time."""
        late = self._late()
        ready = [each for each in zip(self._rows, self._works, strict=True) if each[0].row not in late]
        if error := next((work.error for _, work in ready if work.error), None):
            raise error
        before = sorted(late)
        return Masks(
            [each.row - bisect.bisect(before, each.row) for each, _ in ready],
            np.array([work.words[len(each.proposed)] for each, work in ready], dtype=np.uint32),
            late,
        )

    def _late(self) -> frozenset[int]:
        """Wait for the masks. Returns the rows that are not waited for longer."""
        groups = {each.rules.group for each, work in zip(self._rows, self._works, strict=True) if not work.first}
        took = time.monotonic() - self._began
        with self._changed:
            self._changed.wait_for(lambda: not any(g.pending for g in groups), max(MIN_WAIT_S, took * WAIT))
            if not self._others:
                self._changed.wait_for(lambda: not all(g.pending for g in groups), MAX_WAIT_S)
            busy = {group for group in groups if group.pending}
        for group in groups:
            group.slow = group in busy
        pairs = zip(self._rows, self._works, strict=True)
        return frozenset(each.row for each, work in pairs if each.rules.group in busy and not work.first)


class MaskThreads:
    """Computes the masks of one model. Its threads start with the first mask.

    The grammar whose masks have taken the least time is next, so that none waits for a slow one for long.
    """

    def __init__(self, threads: int = THREADS) -> None:
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="headrace-masks")
        self._idle = threads
        self._changed = threading.Condition()
        self._waiting: set[MaskGroup] = set()  # have work, and no thread does it
        self._floor_s = 0.0  # the time of the group that was chosen last: one that was idle has no advantage over it

    def begin(self, rows: Sequence[MaskedRow], *, others: bool) -> PendingMasks:
        """Begin to compute the masks of some rows. Rows of one sequence follow each other, with longer proposals.

        Masks that were late, or of a step that has failed, are there already or are being computed.

        Args:
            rows: those that need a mask.
            others: whether the step computes something that needs none.
        """
        works: list[MaskWork] = []
        new: list[MaskWork] = []
        for rules, each in itertools.groupby(rows, key=lambda row: row.rules):
            own = list(each)
            if rules.work is None:
                rules.work = MaskWork(rules, own[0].output, own[-1].proposed)
                new.append(rules.work)
            works += [rules.work] * len(own)
        pending = PendingMasks(rows, works, self._changed, others=others)
        self._add([work for work in new if not work.first])
        for work in new:
            if work.first:
                work.compute()
        return pending

    def _add(self, new: list[MaskWork]) -> None:
        with self._changed:
            for work in new:
                group = work.group
                if not group.pending:
                    group.spent_s = max(group.spent_s, self._floor_s)
                group.pending += 1
                group.works.append(work.compute)
                if not group.active:
                    self._waiting.add(group)
            started = min(self._idle, len(self._waiting))
            self._idle -= started
        for _ in range(started):
            self._pool.submit(self._work)

    def _work(self) -> None:
        """Compute masks until no grammar needs any."""
        while True:
            with self._changed:
                if not self._waiting:
                    self._idle += 1
                    return
                group = min(self._waiting, key=lambda group: group.spent_s)
                self._waiting.remove(group)
                self._floor_s, group.active = group.spent_s, True
            count = _turn(group)
            with self._changed:
                group.active = False
                group.pending -= count
                if group.pending:
                    self._waiting.add(group)
                self._changed.notify_all()


def _turn(group: MaskGroup) -> int:
    """Compute masks of a grammar for some time. Returns how many."""
    began, count = time.monotonic(), 0
    while group.works and time.monotonic() - began < TURN_S:
        group.works.popleft()()
        count += 1
    group.spent_s += time.monotonic() - began
    return count
