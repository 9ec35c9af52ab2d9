"""Decides when a draft model proposes tokens, and how many: those that save more time than they take. No tensors.

It measures how long the draft model takes for a token, how long a step takes, and which share of the proposed tokens is
accepted. So the clock decides when tokens are proposed; which tokens a text gets does not depend on that.
"""

from __future__ import annotations

import statistics
import time
from collections import defaultdict, deque
from collections.abc import Callable, Mapping
from typing import Protocol

import structlog

from headrace.worker.engine.acceptance import Acceptance
from headrace.worker.engine.sequence import Sequence

log = structlog.get_logger("headrace.engine")

#: A draft model proposes tokens while at most this many sequences decode. Each has a slot in its cache.
DRAFTED_SEQUENCES = 4
#: What a row of a proposed token adds to the time of a step, as a share of it: 1.5 to 2.5 % were measured.
ROW_COST = 0.02
#: Proposed tokens must be expected to speed up the text by this factor, or none are proposed.
LEAST_GAIN = 1.05
#: While proposed tokens do not pay, one is proposed at every 32nd opportunity, to see if that changed.
RETRY_EVERY = 32
#: How fast the estimate of the acceptance follows what is observed; and of how many times the median counts.
LEARNING_RATE, TIMES = 0.05, 15
#: A step cannot take less: no clock that stands still may divide by zero.
SHORTEST_S = 1e-6
#: A text of which the draft model has not seen more tokens than this has to be prefilled.
CATCH_UP = 32


class Drafter(Protocol):
    """Proposes tokens: `draft_model.DraftModel`."""

    @property
    def length(self) -> int:
        """How many tokens of a text, with those proposed, it can read."""
        ...

    def missing(self, sequence: Sequence) -> int:
        """How many tokens of a sequence it has to read before it can propose one."""
        ...

    def propose(self, counts: Mapping[Sequence, int]) -> dict[Sequence, list[int]]:
        """Propose at most so many tokens for each sequence."""
        ...


class _Estimate(Acceptance):
    """The acceptance of one sequence, whose observations also count for the sequences that come later."""

    def __init__(self, overall: Acceptance) -> None:
        super().__init__(overall.acceptance, LEARNING_RATE)
        self._overall = overall

    def note(self, proposed: int, accepted: int) -> None:
        super().note(proposed, accepted)
        self._overall.note(proposed, accepted)


class DraftProposer:
    """Proposes tokens of a draft model for the sequences of a step.

    Args:
        drafter: proposes them.
        clock: in seconds.
    """

    def __init__(self, drafter: Drafter, clock: Callable[[], float] = time.perf_counter) -> None:
        self._drafter: Drafter | None = drafter
        self._clock = clock
        self._overall = Acceptance(rate=LEARNING_RATE)
        #: For each number of decoding sequences: seconds of a step, and of the draft model for one token of each.
        self._step_s, self._draft_s = (defaultdict[int, deque[float]](lambda: deque(maxlen=TIMES)) for _ in range(2))
        self._prefill_s: deque[float] = deque(maxlen=TIMES)  # for one token
        self._previous: tuple[int, float] | None = None  # how many sequences decoded, and when that step began
        self._pays, self._skipped = True, 0

    def acceptance(self, sequence: Sequence) -> float:
        """The probability that a token for a sequence is accepted; 0 while proposed tokens do not pay."""
        return self._estimate(sequence).acceptance if self._pays else 0.0

    def _estimate(self, sequence: Sequence) -> Acceptance:
        if sequence.drafting is None:
            sequence.drafting = _Estimate(self._overall)
        return sequence.drafting

    def propose(self, load: int, most: Mapping[Sequence, int]) -> dict[Sequence, list[int]]:
        """Propose tokens for the next step. Must be called before every step, whether it may propose or not.

        Args:
            load: how many sequences decode in this step.
            most: how many tokens may be proposed for each sequence.
        """
        if self._previous is not None and self._previous[0] == load:
            self._step_s[load].append(self._clock() - self._previous[1])
        proposed = self._propose(load, most) if most and load <= DRAFTED_SEQUENCES else {}
        self._previous = load, self._clock()
        return proposed

    def _propose(self, load: int, most: Mapping[Sequence, int]) -> dict[Sequence, list[int]]:
        counts = self._counts(load, most)
        if not counts or self._drafter is None:
            return {}
        began, missing = self._clock(), sum(map(self._drafter.missing, counts))
        try:
            found = self._drafter.propose(counts)
        except Exception as error:  # no job needs it
            log.error("draft.failed", error=repr(error))
            self._drafter, self._pays = None, False
            return {}
        seconds = self._clock() - began
        if missing > CATCH_UP * len(counts):
            self._prefill_s.append(seconds / missing)
        else:
            self._draft_s[load].append(seconds / max(counts.values()))
        taken = {sequence: sequence.take_proposed(found[sequence], self._estimate(sequence)) for sequence in counts}
        return {sequence: tokens for sequence, tokens in taken.items() if tokens}

    def _counts(self, load: int, most: Mapping[Sequence, int]) -> dict[Sequence, int]:
        """How many tokens to propose for each sequence, without those that get none."""
        if self._drafter is None:
            return {}
        acceptance = statistics.fmean(self._estimate(sequence).acceptance for sequence in most)
        count, gain = self._best(load, acceptance, max(most.values()))
        self._pays = count > 0
        if not count:
            self._skipped = (self._skipped + 1) % RETRY_EVERY
            count = 0 if self._skipped else 1
        counts = {}
        for sequence, limit in most.items():
            room = self._drafter.length - len(sequence.prompt) - len(sequence.output)
            if (number := min(count, limit, room)) > 0 and self._worth_reading(load, sequence, gain):
                counts[sequence] = number
        return counts

    def _best(self, load: int, acceptance: float, most: int) -> tuple[int, float]:
        """How many tokens to propose so that texts grow fastest, and how many times as fast they grow."""
        if not self._step_s[load] or not self._draft_s[load]:
            return most, 2.0  # to measure the times
        step_s = max(statistics.median(self._step_s[load]), SHORTEST_S)
        cost = ROW_COST + statistics.median(self._draft_s[load]) / step_s
        best, tokens, probability = (0, LEAST_GAIN), 1.0, 1.0
        for count in range(1, most + 1):
            probability *= acceptance
            tokens += probability
            if (gain := tokens / (1 + count * cost)) > best[1]:
                best = count, gain
        return best

    def _worth_reading(self, load: int, sequence: Sequence, gain: float) -> bool:
        """Whether the rest of a text saves more time than it takes the draft model to read what it has not seen."""
        missing = self._drafter.missing(sequence) if self._drafter is not None else 0
        if missing <= CATCH_UP or not self._prefill_s or not self._step_s[load]:
            return True
        saved = (sequence.request.max_tokens - len(sequence.output)) * (1 - 1 / gain)
        return missing * statistics.median(self._prefill_s) < saved * statistics.median(self._step_s[load])
