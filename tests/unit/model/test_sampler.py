"""Sampling on hand-written probabilities, and compared with transformers' logits processors."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers.generation.logits_process import (
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from headrace.model.sampler import (
    NEVER,
    Draw,
    RowParams,
    adjust,
    draw_tokens,
    filtered,
    keep_top_k,
    keep_top_p,
    sample,
    top_logprobs,
    uniform,
)

P = [0.4, 0.3, 0.2, 0.1]


def logits_of(*rows: list[float]) -> Tensor:
    return torch.tensor(rows).log()


def draw(prompt: tuple[int, ...] = (), output: tuple[int, ...] = (), seed: int = 0, **params: Any) -> Draw:
    return Draw(RowParams(**params), prompt, output, seed, 0)


def probs(**params: Any) -> list[float]:
    return [round(p, 5) for p in filtered(logits_of(P), [RowParams(**params)])[0].tolist()]


# --- by hand --------------------------------------------------------------------------------------------------------


def test_default_parameters_leave_the_probabilities_unchanged() -> None:
    assert probs() == P


def test_temperature_sharpens() -> None:
    squares = [p * p / 0.3 for p in P]
    assert probs(temperature=0.5) == pytest.approx(squares, abs=1e-4)


@pytest.mark.parametrize(("k", "kept"), [(1, 1), (2, 2), (3, 3), (4, 4), (99, 4), (0, 4), (-1, 4)])
def test_top_k_keeps_the_k_likeliest(k: int, kept: int) -> None:
    total = sum(P[:kept])
    assert probs(top_k=k) == pytest.approx([p / total for p in P[:kept]] + [0] * (4 - kept), abs=1e-5)


@pytest.mark.parametrize(
    ("p", "kept"), [(1e-60, 1), (0.01, 1), (0.39, 1), (0.41, 2), (0.69, 2), (0.71, 3), (0.95, 4), (1.0, 4)]
)
def test_top_p_keeps_the_fewest_that_reach_it(p: float, kept: int) -> None:
    total = sum(P[:kept])
    assert probs(top_p=p) == pytest.approx([q / total for q in P[:kept]] + [0] * (4 - kept), abs=1e-5)


@pytest.mark.parametrize(("p", "kept"), [(0.0, 4), (0.24, 4), (0.26, 3), (0.51, 2), (0.76, 1), (1.0, 1)])
def test_min_p_cuts_what_is_below_a_share_of_the_likeliest(p: float, kept: int) -> None:
    assert [q > 0 for q in probs(min_p=p)] == [True] * kept + [False] * (4 - kept)


def test_tokens_equal_to_the_kth_stay() -> None:
    kept = keep_top_k(torch.tensor([[1.0, 3.0, 1.0, 1.0, 0.0]]), [2])
    assert kept[0].tolist() == [1.0, 3.0, 1.0, 1.0, NEVER]


def test_top_p_of_equal_tokens_keeps_the_lowest_ids() -> None:
    kept = keep_top_p(torch.zeros(1, 4), [0.5])
    assert (kept[0] > NEVER).tolist() == [True, True, False, False]


def test_rows_without_filters_are_unchanged_beside_rows_with_filters() -> None:
    logits = torch.randn(3, 50, generator=torch.Generator().manual_seed(0))
    params = [RowParams(), RowParams(top_k=3, top_p=0.5, min_p=0.1), RowParams()]
    together = filtered(logits, params)
    assert torch.equal(together[0], filtered(logits[:1], params[:1])[0])
    assert torch.equal(together[1], filtered(logits[1:2], params[1:2])[0])


def test_presence_and_frequency_look_at_the_output_only() -> None:
    logits = torch.tensor([[1.0, 1.0, 1.0, 1.0]])
    changed = adjust(logits, [draw((0, 1), (1, 1, 2), presence_penalty=0.5, frequency_penalty=0.25)])
    assert changed[0].tolist() == [1.0, 0.0, 0.25, 1.0]
    assert logits[0].tolist() == [1.0] * 4, "the caller's logits are changed"


def test_bias_bans_and_repetition_apply_in_that_order() -> None:
    logits = torch.tensor([[1.0, -1.0, 2.0, 0.5]])
    params = {"logit_bias": {0: 3.0, 1: -1.0}, "banned": (2,), "repetition_penalty": 2.0}
    assert adjust(logits, [draw((0,), (1,), **params)])[0].tolist() == [2.0, -4.0, NEVER, 0.5]


@pytest.mark.parametrize(("u", "token"), [(0.0, 0), (0.39, 0), (0.41, 1), (0.69, 1), (0.71, 2), (0.91, 3)])
def test_the_drawn_token_is_where_the_cumulative_sum_exceeds_the_random_number(u: float, token: int) -> None:
    assert draw_tokens(torch.tensor([P]), torch.tensor([u], dtype=torch.float64)).tolist() == [token]


def test_a_token_with_probability_0_is_never_drawn() -> None:
    table = torch.tensor([[0.0, 0.5, 0.0, 0.5, 0.0]]).expand(3, 5)
    numbers = torch.tensor([0.0, 0.5, 1 - 2**-53], dtype=torch.float64)
    assert draw_tokens(table, numbers).tolist() == [1, 3, 3]


def test_ties_go_to_the_lowest_id() -> None:
    logits = torch.zeros(2, 50257)
    logits[1, [40000, 777, 50256]] = 5.0
    assert sample(logits, [draw(temperature=0.0), draw(temperature=9.9e-7)]).tolist() == [0, 777]


def test_log_probabilities_are_natural_ones_of_the_given_logits() -> None:
    chosen, ids, values = top_logprobs(logits_of(P, P[::-1]), torch.tensor([2, 2]), 2)
    assert chosen.tolist() == pytest.approx([math.log(0.2), math.log(0.3)], abs=1e-6)
    assert ids.tolist() == [[0, 1], [3, 2]]
    assert values[0].tolist() == pytest.approx([math.log(0.4), math.log(0.3)], abs=1e-6)


# --- compared with transformers -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("params", "warper"),
    [
        ({"temperature": 0.37}, TemperatureLogitsWarper(0.37)),
        ({"top_k": 7}, TopKLogitsWarper(7)),
        ({"top_p": 0.83}, TopPLogitsWarper(0.83)),
        ({"top_p": 0.05}, TopPLogitsWarper(0.05)),
        ({"min_p": 0.03}, MinPLogitsWarper(0.03)),
    ],
)
def test_filters_agree_with_transformers(params: dict[str, Any], warper: Any) -> None:
    logits = torch.randn(64, 997, generator=torch.Generator().manual_seed(1)) * 3
    expected = warper(torch.zeros(64, 1, dtype=torch.long), logits.double()).softmax(-1)
    ours = filtered(logits, [RowParams(**params)] * 64)
    ours = ours / ours.sum(-1, keepdim=True)  # after min-p the sum is not 1: drawing takes that into account
    assert torch.equal(ours > 0, expected > 0)
    # The division by the temperature is rounded to float32, the rest is float64: that shifts two logits by as much as
    # one unit roundoff of the largest each, and their probabilities by the same share.
    assert ((ours - expected).abs() <= 2 * 2.0**-24 * logits.abs().max() / params.get("temperature", 1)).all()


def test_filters_in_a_row_agree_with_transformers_order() -> None:
    logits = torch.randn(64, 997, generator=torch.Generator().manual_seed(2)) * 3
    expected = logits.double()
    for warper in (TemperatureLogitsWarper(1.3), TopKLogitsWarper(60), TopPLogitsWarper(0.9), MinPLogitsWarper(0.04)):
        expected = warper(torch.zeros(64, 1, dtype=torch.long), expected)
    ours = filtered(logits, [RowParams(temperature=1.3, top_k=60, top_p=0.9, min_p=0.04)] * 64)
    assert torch.equal(ours > 0, expected > NEVER)


def test_repetition_penalty_agrees_with_transformers() -> None:
    generator = torch.Generator().manual_seed(3)
    logits = torch.randn(8, 100, generator=generator)
    seen = torch.randint(0, 100, (8, 30), generator=generator)
    expected = RepetitionPenaltyLogitsProcessor(1.7)(seen, logits.double())
    draws = [draw(tuple(row[:20]), tuple(row[20:]), repetition_penalty=1.7) for row in seen.tolist()]
    # The penalty and what comes out are rounded to float32.
    torch.testing.assert_close(adjust(logits, draws).double(), expected, rtol=2 * 2.0**-24, atol=0)


# --- random numbers -------------------------------------------------------------------------------------------------


def splitmix(seed: int, sample_index: int, position: int) -> float:
    """The same with numpy's wrapping integers, after the reference splitmix64.c of Sebastiano Vigna."""
    state = np.uint64(0)
    with np.errstate(over="ignore"):
        for value in (seed, sample_index, position):
            z = state + np.uint64(value % 2**64) + np.uint64(0x9E3779B97F4A7C15)
            z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
            z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
            state = z ^ (z >> np.uint64(31))
    return float(state >> np.uint64(11)) / 2**53


@pytest.mark.parametrize("seed", [0, 1, 42, 2**52 - 1, 2**63 - 1, -1, -(2**63)])
def test_uniform_is_splitmix64(seed: int) -> None:
    for index in (0, 1, 127):
        for position in (0, 1, 1023):
            assert uniform(seed, index, position) == splitmix(seed, index, position)


def test_uniform_is_uniform_along_each_of_its_inputs() -> None:
    count = 20_000
    for numbers in (
        [uniform(i, 0, 0) for i in range(count)],
        [uniform(7, i, 0) for i in range(count)],
        [uniform(7, 0, i) for i in range(count)],
    ):
        assert min(numbers) >= 0
        assert max(numbers) < 1
        observed = np.histogram(numbers, bins=100, range=(0, 1))[0]
        chi2 = float(((observed - count / 100) ** 2 / (count / 100)).sum())
        assert 60 < chi2 < 150  # 99 degrees of freedom: outside by chance once in a thousand
        pairs = np.corrcoef(numbers[:-1], numbers[1:])[0, 1]
        assert abs(pairs) < 0.03


def test_different_inputs_give_different_numbers() -> None:
    inputs = [(s, i, p) for s in range(-10, 10) for i in range(10) for p in range(50)]
    assert len({uniform(*each) for each in inputs}) == len(inputs)


def test_draws_follow_the_probabilities() -> None:
    count = 20_000
    draws = [Draw(RowParams(temperature=1.0), [], [], seed, 0) for seed in range(count)]
    tokens = sample(logits_of(P).expand(count, 4), draws)
    shares = torch.bincount(tokens, minlength=4) / count
    assert shares.tolist() == pytest.approx(P, abs=0.012)


# --- batch invariance -----------------------------------------------------------------------------------------------


def mixed_draws(count: int) -> list[Draw]:
    kinds: list[dict[str, Any]] = [
        {},
        {"temperature": 0.0},
        {"top_k": 5, "temperature": 1.7},
        {"top_p": 0.7, "repetition_penalty": 1.3},
        {"min_p": 0.1, "logit_bias": {3: 4.0}, "presence_penalty": -1.0},
        {"banned": (1, 2, 3), "temperature": 0.6},
    ]
    return [draw((1, 2), tuple(range(i % 5)), seed=i, **kinds[i % len(kinds)]) for i in range(count)]


def test_sampling_is_batch_invariant() -> None:
    logits = torch.randn(60, 50257, generator=torch.Generator().manual_seed(4)) * 2
    draws = mixed_draws(60)
    together = sample(logits, draws).tolist()
    assert together == [int(sample(logits[i : i + 1], [d])) for i, d in enumerate(draws)]
    assert sample(logits.flip(0), draws[::-1]).tolist() == together[::-1]


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_rows_with_nan_give_minus_one_and_leave_the_others(bad: float) -> None:
    logits = torch.randn(12, 1000, generator=torch.Generator().manual_seed(5))
    draws = mixed_draws(12)
    expected = sample(logits, draws).tolist()
    broken = logits.clone()
    for row, column in ((0, 0), (1, 999), (4, 3), (9, 17)):
        broken[row, column] = bad
        expected[row] = -1
    assert sample(broken, draws).tolist() == expected
