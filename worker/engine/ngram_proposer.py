"""Guesses at the next tokens of a text: what followed its last two tokens when they last stood together.

Known as prompt lookup (Saxena 2023). The model computes all guesses in one step and those before the first wrong one
are kept, so a guess never changes a text, only how many steps it takes. No tensors.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

#: A guess is worth its row while it and all before it are right with at least this probability: what a row more costs
#: in a step of few rows.
WORTH = 0.1
#: How fast the estimate of that probability follows what is seen, and where it begins.
RATE, FIRST = 0.1, 0.6
#: Where guessing is not worth it, every how many chances one guess is made to see whether that still holds.
RETRY = 16


class Drafter:
    """Guesses for one text. Its prompt is read at once, its output as it grows."""

    def __init__(self, prompt: Sequence[int]) -> None:
        #: The probability that a guess is right after a right one, as far as seen.
        self.chance = FIRST
        self._prompt_length = len(prompt)
        self._tokens: list[int] = []
        self._after: dict[tuple[int, int], int] = {}  # two tokens -> the latest place after them where a token stands
        self._left_out = 0
        self._read(prompt)

    def _read(self, tokens: Sequence[int]) -> None:
        for token in tokens:
            if len(self._tokens) >= 2:
                self._after[self._tokens[-2], self._tokens[-1]] = len(self._tokens)
            self._tokens.append(token)

    def propose(self, output: Sequence[int], most: int) -> list[int]:
        """Up to `most` guesses at what follows the output, which begins with what it was at earlier calls."""
        self._read(output[len(self._tokens) - self._prompt_length :])
        if len(self._tokens) < 2 or (place := self._after.get((self._tokens[-2], self._tokens[-1]))) is None:
            return []
        count = self._worth(most)
        # Where the earlier text ends the guesses themselves go on: a text that repeats itself does so again.
        found = self._tokens[place : place + count]
        return list(itertools.islice(itertools.cycle(found), count))

    def _worth(self, most: int) -> int:
        """How many guesses are worth their rows, at most so many."""
        if self.chance < WORTH:
            self._left_out = (self._left_out + 1) % RETRY
            return 0 if self._left_out else min(1, most)
        count, likely = 0, self.chance
        while likely >= WORTH and count < most:
            count, likely = count + 1, likely * self.chance
        return count

    def note(self, drafted: int, right: int) -> None:
        """Learn how many of the last guesses were right, counted to the first wrong one."""
        for _ in range(right):
            self.chance += RATE * (1 - self.chance)
        if right < drafted:
            self.chance -= RATE * self.chance
