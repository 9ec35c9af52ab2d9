"""N-gram speculative decoding, also called prompt lookup (Saxena 2023): proposes tokens from the text so far.

The proposed tokens are those that followed the last two tokens at their latest earlier occurrence. The model computes
all of them in one step, and keeps those that it would have sampled itself, up to the first that differs. So proposals
never change a text, only the number of steps that it takes. No tensors.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

from headrace.worker.engine.acceptance import Acceptance

#: A proposed token is worth its row if it and all before it are accepted with at least this probability: the relative
#: cost of one more row in a step of few rows.
MIN_PROBABILITY = 0.1
#: While proposals are not worth their rows, one token is proposed at every 16th opportunity, to see if that changed.
RETRY_EVERY = 16


class NgramProposer(Acceptance):
    """Proposes tokens for one text. Reads the prompt at once, and the output as it grows."""

    def __init__(self, prompt: Sequence[int]) -> None:
        super().__init__()
        self._prompt_length = len(prompt)
        self._tokens: list[int] = []
        self._next: dict[tuple[int, int], int] = {}  # two tokens -> the index after their latest earlier occurrence
        self._skipped = 0
        self._read(prompt)

    def _read(self, tokens: Sequence[int]) -> None:
        for token in tokens:
            if len(self._tokens) >= 2:
                self._next[self._tokens[-2], self._tokens[-1]] = len(self._tokens)
            self._tokens.append(token)

    def propose(self, output: Sequence[int], most: int) -> list[int]:
        """Up to `most` tokens that may follow `output`, which must begin with the output of earlier calls."""
        self._read(output[len(self._tokens) - self._prompt_length :])
        if len(self._tokens) < 2 or (start := self._next.get((self._tokens[-2], self._tokens[-1]))) is None:
            return []
        count = self._worthwhile(most)
        # Past the end of the text the proposal repeats itself: a text that repeats itself is likely to do so again.
        found = self._tokens[start : start + count]
        return list(itertools.islice(itertools.cycle(found), count))

    def _worthwhile(self, most: int) -> int:
        """How many proposed tokens, at most `most`, are worth their rows."""
        if self.acceptance < MIN_PROBABILITY:
            self._skipped = (self._skipped + 1) % RETRY_EVERY
            return 0 if self._skipped else min(1, most)
        count, probability = 0, self.acceptance
        while probability >= MIN_PROBABILITY and count < most:
            count, probability = count + 1, probability * self.acceptance
        return count
