"""Computes the masks of a step beside it: in a thread of its own, while the model computes the logits."""

from __future__ import annotations

import functools
import os
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from headrace.worker.engine.token_rules import TokenRules, Words, words_of

if TYPE_CHECKING:
    from llguidance import LLExecutor

TOO_COMPLEX = "structured_outputs: following the text by this grammar takes more time or memory than is allowed"


class MaskedRow(NamedTuple):
    """A row that needs a mask: for the token that follows `output`, the last of which are `proposed`."""

    row: int
    rules: TokenRules
    output: list[int]
    proposed: list[int]


class Masks(NamedTuple):
    """The rows that have a mask, and their masks [len(rows), words]."""

    rows: list[int]
    words: Words


class PendingMasks:
    """Masks that are being computed. The rules of their rows must not be used before `wait` or `result` returns."""

    def __init__(self, rows: Sequence[MaskedRow], future: Future[Masks]) -> None:
        self._rows, self._future = rows, future

    def result(self) -> Masks:
        """The masks. If the thread has not begun, for want of a free core, they are computed in this one."""
        return _masks(self._rows) if self._future.cancel() else self._future.result()

    def wait(self) -> None:
        """Wait until the thread no longer uses the rules."""
        if not self._future.cancel():
            wait([self._future])


class MaskThread:
    """Computes the masks of one model in a thread, which starts with the first mask."""

    def __init__(self) -> None:
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="headrace-masks")

    def begin(self, rows: Sequence[MaskedRow]) -> PendingMasks:
        """Begin to compute the masks of some rows. Rows of one sequence follow each other, with longer proposals."""
        return PendingMasks(rows, self._thread.submit(_masks, rows))


#: Threads that compute masks together. Matchers of one grammar wait for each other, so more help little.
_PARALLEL = max(1, min(4, (os.cpu_count() or 1) // 8))


@functools.cache
def _executor() -> LLExecutor:
    from llguidance import LLExecutor

    return LLExecutor(_PARALLEL)


def _masks(rows: Sequence[MaskedRow]) -> Masks:
    words = np.full((len(rows), words_of(rows[0].rules.vocab_size)), 2**32 - 1, dtype=np.uint32)
    firsts = [i for i, each in enumerate(rows) if not each.proposed]
    followed = [(i, rows[i].rules) for i in firsts if rows[i].rules.matcher is not None]
    if followed:
        proposed = {i: rows[end - 1].proposed for i, end in zip(firsts, [*firsts[1:], len(rows)], strict=True)}
        _fill(words, followed, proposed)
        _repair(words, followed, proposed)
    for mask, each in zip(words, rows, strict=True):
        if not each.rules.error:
            each.rules.complete_mask(mask, each.output)
    return Masks([each.row for each in rows], words)


def _repair(words: Words, followed: list[tuple[int, TokenRules]], proposed: dict[int, list[int]]) -> None:
    """Compute masks again whose matchers exceeded their bounds; see `TokenRules.restart`. Those that fail are empty."""
    failed: list[object] = []
    for i, rules in followed:
        if rules.failed and rules.request not in failed and rules.restart():
            _fill(words, [(i, rules)], proposed)
        if rules.failed:
            failed.append(rules.request)
            rules.error = TOO_COMPLEX
            words[i : i + 1 + len(proposed[i])] = 0


def _fill(words: Words, followed: list[tuple[int, TokenRules]], proposed: dict[int, list[int]]) -> None:
    """Write the masks of the grammars. After a token that a grammar does not allow, masks stay as they are."""
    address, row_bytes = words.ctypes.data, words.shape[1] * words.itemsize
    matchers = [(rules.matcher, i) for i, rules in followed if rules.matcher is not None]
    plain = [(matcher, i) for matcher, i in matchers if not proposed[i]]
    if _PARALLEL == 1:  # without the executor, whose thread would have to be woken too
        for matcher, i in plain:
            matcher.unsafe_compute_mask_ptr(address + i * row_bytes, row_bytes)
    elif plain:
        _executor().unsafe_compute_mask_ptr(plain, address, row_bytes, len(words))
    drafted = [(matcher, i, proposed[i]) for matcher, i in matchers if proposed[i]]
    if drafted:
        _executor().unsafe_compute_mask_ptr_with_draft_token(drafted, address, row_bytes, len(words))
