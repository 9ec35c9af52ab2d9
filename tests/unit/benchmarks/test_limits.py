"""The machine's limit, worked out by hand for a tiny model."""

from __future__ import annotations

import pytest

from benchmarks.limits import Rates, Shape, bytes_read, limit_s, operations
from benchmarks.workloads import Item

TINY = Shape(layers=1, width=2, vocabulary=3)
# Two prompt tokens and two new ones: the passes compute [p0 p1] -> n0 and [n0] -> n1.
PAIR = Item([0, 1], 2)
# One prompt token and one new one: one pass.
SINGLE = Item([0], 1)


def test_weights_are_those_of_the_matrices() -> None:
    # queries, keys, values: 2 x 6; output 2 x 2; feed-forward 2 x 8 and 8 x 2; head 3 x 2
    assert TINY.block_weights == 12 + 4 + 16 + 16
    assert TINY.head_weights == 6


def test_bytes_of_one_prompt() -> None:
    # Two passes over 54 weights, and in the second keys and values (2 numbers each) of two positions.
    assert bytes_read(TINY, [PAIR], (4, 4)) == 4 * (2 * 54 + 2 * (2 + 2))


def test_passes_are_shared_by_prompts_that_run_together() -> None:
    assert bytes_read(TINY, [PAIR, SINGLE], (2, 2)) == bytes_read(TINY, [PAIR], (2, 2))


def test_operations_of_one_prompt() -> None:
    blocks = 3 * 2 * 48  # p0, p1 and n0 enter the model
    head = 2 * 2 * 6  # for n0 and n1
    attention = (1 + 2 + 3) * 2 * (2 * 2)  # positions 0 to 2, each with queries times keys and weights times values
    assert operations(TINY, [PAIR]) == blocks + head + attention


def test_operations_add_up_over_prompts() -> None:
    assert operations(TINY, [SINGLE]) == 2 * 48 + 2 * 6 + 8
    assert operations(TINY, [PAIR, SINGLE]) == operations(TINY, [PAIR]) + operations(TINY, [SINGLE])


@pytest.mark.parametrize(
    ("rates", "seconds"),
    [
        (Rates(bytes_per_s=4 * (2 * 54 + 8) / 5, operations_per_s=1e9), 5.0),
        (Rates(bytes_per_s=1e9, operations_per_s=360 / 7), 7.0),
    ],
)
def test_the_limit_is_the_longer_of_reading_and_multiplying(rates: Rates, seconds: float) -> None:
    assert limit_s(TINY, [PAIR], (4, 4), rates) == pytest.approx(seconds)
