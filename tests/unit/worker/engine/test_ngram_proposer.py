"""Tokens proposed from earlier occurrences of the last two tokens, worked out by hand."""

from __future__ import annotations

import pytest

from headrace.worker.engine.ngram_proposer import MIN_PROBABILITY, RETRY_EVERY, NgramProposer


def test_what_followed_the_last_two_tokens_is_proposed() -> None:
    assert NgramProposer([1, 2, 3, 4, 5, 1, 2]).propose([], 3) == [3, 4, 5]
    assert NgramProposer([1, 2, 3, 4, 5, 1, 2]).propose([], 1) == [3]
    assert NgramProposer([9, 2, 3, 4, 5, 1, 2]).propose([], 3) == []
    assert NgramProposer([7]).propose([], 3) == []
    assert NgramProposer([7]).propose([7], 3) == []


def test_the_latest_of_several_occurrences_is_used() -> None:
    assert NgramProposer([1, 2, 3, 1, 2, 4, 1, 2]).propose([], 2) == [4, 1]


def test_for_a_repeating_text_the_repetition_is_proposed() -> None:
    assert NgramProposer([5, 6, 6, 6]).propose([], 4) == [6, 6, 6, 6]
    assert NgramProposer([1, 2, 3, 1, 2]).propose([], 4) == [3, 1, 2, 3]


def test_the_output_is_read_as_it_grows() -> None:
    proposer, output = NgramProposer([1, 2, 3]), [4, 1]
    assert proposer.propose(output, 2) == []
    output.append(2)
    assert proposer.propose(output, 2) == [3, 4]
    output += [8, 9, 4, 1]  # several at once, as when proposed tokens were accepted
    assert proposer.propose(output, 2) == [2, 8]


def test_accepted_tokens_raise_the_number_of_proposals_and_rejected_ones_lower_it() -> None:
    proposer = NgramProposer([6] * 50)
    first = len(proposer.propose([], 15))
    proposer.note(first, first)
    assert len(proposer.propose([], 15)) > first
    for _ in range(3):
        proposer.note(4, 0)
    assert 0 < len(proposer.propose([], 15)) < first


def test_after_many_rejections_one_token_is_proposed_from_time_to_time_until_one_is_accepted() -> None:
    proposer = NgramProposer([6] * 50)
    while proposer.acceptance >= MIN_PROBABILITY:
        proposer.note(1, 0)
    for _ in range(2):
        assert [len(proposer.propose([], 7)) for _ in range(RETRY_EVERY)] == [0] * (RETRY_EVERY - 1) + [1]
    proposer.note(1, 1)
    assert proposer.acceptance >= MIN_PROBABILITY
    assert len(proposer.propose([], 7)) >= 1


@pytest.mark.parametrize("most", [0, 1, 5])
def test_at_most_the_requested_number_is_proposed(most: int) -> None:
    proposer = NgramProposer([6] * 50)
    proposer.note(100, 100)
    assert len(proposer.propose([], most)) == most
