"""How many tokens a draft model proposes: by a clock that the tests set, and against values worked out by hand."""

from __future__ import annotations

from collections.abc import Mapping

import pytest

from headrace.worker.engine.acceptance import Acceptance
from headrace.worker.engine.draft_proposer import CATCH_UP, DRAFTED_SEQUENCES, RETRY_EVERY, DraftProposer
from headrace.worker.engine.sequence import Sequence
from tests.unit.worker.engine.engine_helpers import ask


class Clock:
    """Seconds that pass only if a test says so."""

    now = 0.0

    def __call__(self) -> float:
        return self.now


class Slow:
    """A draft model that takes a known time for each token that it proposes, and for each that it has to read first."""

    length = 1000

    def __init__(self, clock: Clock, token_s: float, read_s: float = 0.0) -> None:
        self.clock, self.token_s, self.read_s = clock, token_s, read_s
        self.read = 0  # of each text
        self.asked: list[list[int]] = []

    def missing(self, sequence: Sequence) -> int:
        return max(1, len(sequence.prompt) + len(sequence.output) - self.read)

    def propose(self, counts: Mapping[Sequence, int]) -> dict[Sequence, list[int]]:
        self.asked.append(list(counts.values()))
        self.clock.now += max(counts.values()) * self.token_s + sum(map(self.missing, counts)) * self.read_s
        self.read = 10**6
        return {sequence: [7] * count for sequence, count in counts.items()}


def texts(count: int, *, tokens: int = 3, most: int = 200) -> list[Sequence]:
    return [Sequence(ask(max_tokens=most), [5] * tokens, i, 0) for i in range(count)]


def steps(
    proposer: DraftProposer, clock: Clock, sequences: list[Sequence], *, rate: float, seconds: float, count: int = 6
) -> list[int]:
    """Let steps pass, of which each takes so many seconds. Returns how many tokens were proposed for the first text."""
    found = []
    for _ in range(count):
        for sequence in sequences:
            sequence.drafting = Acceptance(rate)
        proposed = proposer.propose(len(sequences), dict.fromkeys(sequences, 5))
        found.append(len(proposed.get(sequences[0], [])))
        clock.now += seconds
    return found


@pytest.mark.parametrize(
    ("rate", "token_s", "expected"),
    [
        (0.9, 0.01, 5),  # (1 + 0.9 + ... + 0.9**5) / (1 + 5 * 0.12) = 2.93, with four 2.77
        (0.5, 0.01, 2),  # 1.5 / 1.12 = 1.34, 1.75 / 1.24 = 1.41, 1.875 / 1.36 = 1.38
        (0.1, 0.01, 0),  # 1.1 / 1.12 < 1
        (0.5, 0.04, 1),  # 1.5 / 1.42 = 1.06, 1.75 / 1.84 < 1: just above the least gain, 1.05
        (0.5, 0.042, 0),  # 1.5 / 1.44 = 1.042
        (0.9, 0.09, 0),  # 1.9 / 1.92 < 1, 4.69 / 5.6 < 1
    ],
)
def test_as_many_tokens_are_proposed_as_make_texts_grow_fastest(rate: float, token_s: float, expected: int) -> None:
    clock = Clock()
    proposer = DraftProposer(Slow(clock, token_s), clock)
    found = steps(proposer, clock, texts(2), rate=rate, seconds=0.1)
    assert found[0] == 5, "the first time is measured"
    assert found[2:] == [expected] * 4


def test_while_it_does_not_pay_one_token_is_proposed_now_and_then() -> None:
    clock = Clock()
    proposer = DraftProposer(Slow(clock, 0.09), clock)
    found = steps(proposer, clock, texts(1), rate=0.9, seconds=0.1, count=2 + 3 * RETRY_EVERY)
    assert (sum(found[2:]), max(found[2:])) == (3, 1)
    assert proposer.acceptance(texts(1)[0]) == 0, "n-grams are asked first"


def test_the_times_of_each_number_of_texts_count_for_themselves() -> None:
    clock = Clock()
    proposer = DraftProposer(Slow(clock, 0.01), clock)
    assert steps(proposer, clock, texts(1), rate=0.9, seconds=0.01)[2:] == [0] * 4
    assert steps(proposer, clock, texts(4), rate=0.9, seconds=0.1)[2:] == [5] * 4


def test_more_texts_than_it_has_slots_for_get_none() -> None:
    clock = Clock()
    slow = Slow(clock, 0.01)
    assert steps(DraftProposer(slow, clock), clock, texts(DRAFTED_SEQUENCES + 1), rate=0.9, seconds=9) == [0] * 6
    assert slow.asked == []


def test_no_more_tokens_are_proposed_than_the_draft_model_has_positions_for() -> None:
    clock = Clock()
    slow = Slow(clock, 0.01)
    near, far = texts(1, tokens=slow.length - 2)[0], texts(1, tokens=slow.length)[0]
    assert DraftProposer(slow, clock).propose(2, {near: 5, far: 5}) == {near: [7, 7]}


@pytest.mark.parametrize(("most", "expected"), [(200, 5), (20, 0)])
def test_a_long_text_is_read_only_if_that_saves_more_time_than_it_takes(most: int, expected: int) -> None:
    """At 0.1 s a step a text becomes 2.93 times as fast: 200 tokens save 13 s, 20 tokens 1.3 s; 400 are read in 4 s."""
    clock = Clock()
    slow = Slow(clock, 0.01, read_s=0.01)
    proposer = DraftProposer(slow, clock)
    first = texts(1, tokens=CATCH_UP + 1)
    steps(proposer, clock, first, rate=0.9, seconds=0.1)  # its first 33 tokens show what reading takes
    slow.read = 0
    slow.read_s = 0.01
    assert steps(proposer, clock, texts(1, tokens=400, most=most), rate=0.9, seconds=0.1, count=1) == [expected]


def test_what_is_accepted_counts_for_the_text_and_for_later_ones() -> None:
    clock = Clock()
    proposer = DraftProposer(Slow(clock, 0.01), clock)
    one, later = texts(2)
    before = proposer.acceptance(one)
    for _ in range(20):
        proposer.propose(1, {one: 4})
        one.note_accepted(4, 4)
        clock.now += 0.1
    assert proposer.acceptance(one) > 0.95 > before
    assert proposer.acceptance(later) == proposer.acceptance(one)
