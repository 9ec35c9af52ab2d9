"""Which tokens a sequence may get next: by its grammar, `allowed_token_ids` and `bad_words`. No tensors.

A mask is a row of words with one bit for each token, and one more for the end of the text.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from headrace.client.wire.grammar_text import panics_as_errors
from headrace.worker.engine.grammars import Grammar
from headrace.worker.engine.mask_budget import MaskBudget

if TYPE_CHECKING:
    from llguidance import LLExecutor, LLMatcher

Words = npt.NDArray[np.uint32]
WORD_BITS = 32


def words_of(vocab_size: int) -> int:
    """The length of a mask in words."""
    return vocab_size // WORD_BITS + 1


def mask_of(tokens: Iterable[int], vocab_size: int) -> Words:
    """The mask of these tokens."""
    mask = np.zeros(words_of(vocab_size), dtype=np.uint32)
    ids = np.fromiter(tokens, dtype=np.int64)
    np.bitwise_or.at(mask, ids // WORD_BITS, np.uint32(1) << (ids % WORD_BITS).astype(np.uint32))
    return mask


def _set(mask: Words, token: int, allowed: bool) -> None:
    word, bit = token // WORD_BITS, np.uint32(1 << token % WORD_BITS)
    mask[word] = mask[word] | bit if allowed else mask[word] & ~bit


class TokenRules:
    """The rules of one sequence, which follow its text.

    Used by one thread at a time: the engine's, or, while it is `late` or the model computes a step, the one that
    computes masks.

    Args:
        vocab_size: every token id is below it.
        eos_ids: the tokens that end the sequence where its grammar allows an end.
        grammar: that the text must match; None for any text.
        allowed: the mask of `allowed_token_ids`.
        bad_words: the token ids of texts that must not be written.
        budget: of the request.
    """

    def __init__(
        self,
        vocab_size: int,
        eos_ids: frozenset[int] = frozenset(),
        *,
        grammar: Grammar | None = None,
        allowed: Words | None = None,
        bad_words: Sequence[list[int]] = (),
        budget: MaskBudget | None = None,
    ) -> None:
        self.vocab_size, self.budget = vocab_size, budget or MaskBudget()
        self.group = self.budget.group if grammar is None else grammar.group
        #: The masks of the next token, computed or being computed.
        self.work: MaskWork | None = None
        self._grammar, self._allowed, self._bad_words = grammar, allowed, bad_words
        self._eos_ids = tuple(token for token in eos_ids if token < vocab_size)
        self._output: list[int] = []
        self._matcher = None if grammar is None else grammar.matcher()
        self._is_own = False  # whether the matcher shares nothing with others

    @property
    def late(self) -> bool:
        """Whether masks are being computed for which the last step did not wait."""
        return self.group.pending > 0

    @property
    def error(self) -> str:
        """Why no mask can be computed; empty if one can."""
        return self.budget.error

    @property
    def matcher(self) -> LLMatcher | None:
        """Follows the grammar; None without one."""
        return self._matcher

    @property
    def first_mask(self) -> Words:
        """The mask of the grammar for the first token."""
        return np.frombuffer(b"" if self._grammar is None else self._grammar.first_mask, dtype=np.uint32)

    @property
    def failed(self) -> bool:
        """Whether the grammar's bounds were exceeded."""
        return self._matcher is not None and bool(self._matcher.is_error())

    @property
    def may_end(self) -> bool:
        """Whether the text so far matches the grammar; True without one."""
        return self._matcher is None or bool(self._matcher.is_accepting())

    def advance(self, token: int) -> bool:
        """Follow the sequence's next token. Returns whether the text matches and nothing can follow."""
        self.work = None
        if self._matcher is None:
            return False
        self._output.append(token)
        self._matcher.consume_token(token)
        return bool(self._matcher.is_stopped()) and not self.failed

    def possible(self, tokens: list[int]) -> int:
        """How many of these tokens the grammar allows to follow each other."""
        return len(tokens) if self._matcher is None else int(self._matcher.validate_tokens(tokens))

    def restart(self) -> bool:
        """Follow the text again with a matcher that shares nothing, because this one has exceeded its bounds.

        What is computed of a grammar is kept and counts for all its matchers. So that no text fails because of others,
        a matcher that has failed is replaced once. Returns whether it was.
        """
        if self._grammar is None or self._is_own:
            return False
        self._is_own, self._grammar.worn = True, True
        self._matcher = self._grammar.compile()
        self._matcher.consume_tokens(self._output)
        return True

    def complete_mask(self, mask: Words, output: list[int]) -> None:
        """Complete the mask of the grammar, or one with all bits set, for the token that follows `output`."""
        if self._matcher is not None:
            end = self.vocab_size
            ends = bool(mask[end // WORD_BITS] >> np.uint32(end % WORD_BITS) & np.uint32(1))
            for token in self._eos_ids:
                _set(mask, token, ends)
        if self._allowed is not None:
            mask &= self._allowed
        for word in self._bad_words:
            if output[len(output) - len(word) + 1 :] == word[:-1]:
                _set(mask, word[-1], False)


class MaskWork:
    """The masks of one sequence: for its next token, and for those that follow each of the proposed ones."""

    def __init__(self, rules: TokenRules, output: list[int], proposed: list[int]) -> None:
        #: Whether it is of the first token of a text: then it takes no time.
        self.first = not output
        self.group = rules.group
        self.error: Exception | None = None
        self._rules, self._output, self._proposed = rules, output, proposed
        self.words = np.full((1 + len(proposed), words_of(rules.vocab_size)), 2**32 - 1, dtype=np.uint32)

    def compute(self) -> None:
        """Compute the masks. They are empty if the rules' request fails."""
        began = time.thread_time()
        try:
            with panics_as_errors():
                self._compute()
        except Exception as error:
            self.error = error
        self._rules.budget.spend(time.thread_time() - began)

    def _compute(self) -> None:
        rules = self._rules
        if rules.matcher is not None and not rules.error:
            self._fill()
            if rules.failed and rules.restart():
                self._fill()
            if rules.failed:
                rules.budget.exceed()
        if rules.error:
            self.words[:] = 0
            return
        for i, mask in enumerate(self.words):
            rules.complete_mask(mask, self._output + self._proposed[:i])

    def _fill(self) -> None:
        """Write the masks of the grammar. After a token that it does not allow, masks stay as they are."""
        matcher, words = self._rules.matcher, self.words
        address, row_bytes = words.ctypes.data, words.shape[1] * words.itemsize
        if matcher is None:
            return
        if self.first:
            words[0] = self._rules.first_mask
        elif self._proposed:
            _executor().unsafe_compute_mask_ptr_with_draft_token(
                [(matcher, 0, self._proposed)], address, row_bytes, len(words)
            )
        else:
            matcher.unsafe_compute_mask_ptr(address, row_bytes)


@functools.cache
def _executor() -> LLExecutor:
    """Computes masks after proposed tokens, which a matcher does not do alone."""
    from llguidance import LLExecutor

    return LLExecutor(1)
