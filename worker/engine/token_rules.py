"""Which tokens a sequence may get next: by its grammar, `allowed_token_ids` and `bad_words`. No tensors.

A mask is a row of words with one bit for each token, and one more for the end of the text.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from headrace.worker.engine.grammars import Grammar

if TYPE_CHECKING:
    from llguidance import LLMatcher

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

    Used by one thread at a time: the engine's, or, while the model computes a step, the one that computes masks.

    Args:
        vocab_size: every token id is below it.
        eos_ids: the tokens that end the sequence where its grammar allows an end.
        grammar: that the text must match; None for any text.
        allowed: the mask of `allowed_token_ids`.
        bad_words: the token ids of texts that must not be written.
        request: the same object for all sequences of a request, which fail together.
    """

    def __init__(
        self,
        vocab_size: int,
        eos_ids: frozenset[int] = frozenset(),
        *,
        grammar: Grammar | None = None,
        allowed: Words | None = None,
        bad_words: Sequence[list[int]] = (),
        request: object = None,
    ) -> None:
        self.vocab_size, self.request = vocab_size, request
        #: Why no mask can be computed; empty if one can.
        self.error = ""
        self._grammar, self._allowed, self._bad_words = grammar, allowed, bad_words
        self._eos_ids = tuple(token for token in eos_ids if token < vocab_size)
        self._output: list[int] = []
        self._matcher = None if grammar is None else grammar.matcher()
        self._is_own = False  # whether the matcher shares nothing with others

    @property
    def matcher(self) -> LLMatcher | None:
        """Follows the grammar; None without one."""
        return self._matcher

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
