"""Every installed contender computes the same tokens as our engine; batches and agreement, worked out by hand."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.contenders import OURS, PEERS, Entry, entries, missing
from benchmarks.models import demo_model
from benchmarks.peers.transformers import batch_plans, batches
from benchmarks.throughput import LEAST_AGREEMENT, Place, agreement, check_items
from benchmarks.workloads import Item

# Prompts of 3, 1 and 2 tokens with 1, 9 and 5 new tokens.
ITEMS = [Item([0] * 3, 1), Item([0], 9), Item([0] * 2, 5)]


@pytest.fixture(scope="module")
def ours(tmp_path_factory: pytest.TempPathFactory) -> list[list[int]]:
    """The tokens of our engine, in a process of its own."""
    folder = demo_model()
    return Place(Entry(OURS, "float32"), 1, tmp_path_factory.mktemp("ours"), folder).generate(folder, check_items())


@pytest.mark.slow
@pytest.mark.parametrize("peer", PEERS)
def test_peers_compute_the_same_tokens_in_float32(peer: str, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    if absent := missing(peer):
        pytest.skip(f"{', '.join(absent)} not installed")
    folder, ours = demo_model(), request.getfixturevalue("ours")
    theirs = Place(Entry(peer, "float32"), 1, tmp_path, folder).generate(folder, check_items())
    assert agreement(theirs, ours) >= LEAST_AGREEMENT


def test_int8_peers_are_compared_with_bfloat16() -> None:
    assert [entry.name for entry in entries("float32", ["llama.cpp"])] == ["headrace float32", "llama.cpp float32"]
    assert [entry.name for entry in entries("bfloat16", ["llama.cpp"])] == [
        "headrace bfloat16",
        "headrace int8",
        "llama.cpp bfloat16",
        "llama.cpp int8",
    ]


def test_batches_hold_prompts_of_similar_length_or_similar_new_tokens() -> None:
    assert batches(ITEMS, "batches of 2 by prompt length") == [[1, 2], [0]]
    assert batches(ITEMS, "batches of 2 by new tokens") == [[0, 2], [1]]


def test_equivalent_plans_are_left_out() -> None:
    assert batch_plans(ITEMS, (2, 3, 64)) == [
        "batches of 2 by prompt length",
        "batches of 2 by new tokens",
        "batches of 3 by prompt length",
    ]
    uniform = [Item([0] * length, 4) for length in (3, 1, 2)]
    assert batch_plans(uniform, (2,)) == ["batches of 2 by prompt length"]


def test_agreement_counts_tokens_before_the_first_difference() -> None:
    assert agreement([[1, 2, 3, 4], [5, 6]], [[1, 2, 9, 4], [5, 6]]) == 4 / 6
