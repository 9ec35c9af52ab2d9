"""Estimates how likely the proposed tokens of speculative decoding are to be accepted."""

from __future__ import annotations

#: How fast an estimate of the acceptance rate follows what is observed, and its first value.
LEARNING_RATE, FIRST_ESTIMATE = 0.1, 0.6


class Acceptance:
    """A running estimate of the probability that a proposed token is accepted if the one before it was."""

    def __init__(self, first: float = FIRST_ESTIMATE, rate: float = LEARNING_RATE) -> None:
        self.acceptance = first
        self._rate = rate

    def note(self, proposed: int, accepted: int) -> None:
        """Update the estimate: of the last `proposed` tokens, the first `accepted` were accepted."""
        for _ in range(accepted):
            self.acceptance += self._rate * (1 - self.acceptance)
        if accepted < proposed:
            self.acceptance -= self._rate * self.acceptance
