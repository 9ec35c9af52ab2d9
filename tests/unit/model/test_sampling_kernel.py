"""Compiled sampling: the tokens of a plain float64 computation, and the same bits on every CPU."""

from __future__ import annotations

import hashlib
import math

import numpy as np
import pytest
import torch
from torch import Tensor

from headrace.model.kernels import sampling
from headrace.model.kernels.argmax import largest
from headrace.model.kernels.isa import find
from headrace.model.kernels.object_cache import load_or_compile
from headrace.model.kernels.sampling import DrawnRows, compile_sampling, draw, log_sums
from tests.instruction_sets import needs_avx2

#: SHA-256 of tokens and sums that `digest` computes for each type; made by an AMD EPYC (Zen 4).
DIGEST = "e745cf1667a0073e14a8688fc790521a1b1fa22d526966bf2cbe87214e52b457"
BFLOAT16_DIGEST = "e8c1f3fbcdc76f19891383086e32a9f565c2844b7b54d960b21d30dfda05df9e"


def logits_of(rows: int, width: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Numbers from -8 to 8 that are the same on every machine: multiples of 2**-28, scrambled by multiplication."""
    scrambled = np.arange(1, rows * width + 1, dtype=np.uint64) * 2654435761 % 2**32
    whole = (scrambled ^ scrambled >> 15).astype(np.int64) - 2**31
    return torch.from_numpy((whole / 2**28).astype(np.float32)).view(rows, width).to(dtype)


def drawn(count: int, **given: float) -> DrawnRows:
    """Rows in reverse order, each with a random number of its own."""
    values = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0} | given
    numbers = [(n * 0.6180339887) % 1 for n in range(count)]
    lists = [[values[name]] * count for name in ("temperature", "top_p", "min_p")]
    return DrawnRows([*range(count)][::-1], lists[0], [int(values["top_k"])] * count, lists[1], lists[2], numbers)


def expected(logits: Tensor, rows: DrawnRows) -> list[int]:
    """The tokens by the definition, with numpy in float64 and a sort."""
    tokens = []
    for row, temperature, k, p, floor, number in zip(*rows, strict=True):
        x = (logits[row].float().numpy() / np.float32(temperature)).astype(np.float64)
        weights = np.exp(x - x.max())
        if 0 < k < len(x):
            weights[x < np.sort(x)[-k]] = 0
        order = np.argsort(-x, kind="stable")
        before = np.cumsum(weights[order]) - weights[order]
        weights[order[(before >= p * weights.sum()) & (p < 1)]] = 0
        weights[weights < floor] = 0
        total = np.cumsum(weights)
        tokens.append(int(np.searchsorted(total, number * total[-1], side="right")))
    return tokens


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("width", [1, 2, 511, 512, 513, 50257])
@pytest.mark.parametrize(
    "given",
    [
        {},
        {"temperature": 0.3},
        {"temperature": 1e-5},
        {"top_k": 1},
        {"top_k": 40},
        {"top_p": 0.9},
        {"top_p": 1e-60},
        {"top_p": 0.9999999},
        {"min_p": 0.2},
        {"min_p": 1.0},
        {"temperature": 1.4, "top_k": 100, "top_p": 0.8, "min_p": 0.01},
    ],
    ids=str,
)
def test_tokens_are_those_of_the_definition(dtype: torch.dtype, width: int, given: dict[str, float]) -> None:
    torch.set_num_threads(2)
    logits = logits_of(9, width, dtype)
    found = draw(logits, largest(logits)[0], drawn(9, **given))
    assert found is not None, "the kernel is not used"
    assert found.tolist() == expected(logits, drawn(9, **given))


def test_of_equal_logits_top_p_keeps_the_first_and_top_k_keeps_all() -> None:
    logits = torch.zeros(64, 1000)
    logits[:, 500:] = -0.0
    for given, kept in (({"top_p": 0.25}, range(250)), ({"top_k": 3}, range(1000))):
        found = draw(logits, largest(logits)[0], drawn(64, **given))
        assert found is not None
        assert found.tolist() == expected(logits, drawn(64, **given))
        assert found.min() < kept[len(kept) // 10]
        assert kept[len(kept) * 9 // 10] < found.max() <= kept[-1]


def test_removed_tokens_are_never_drawn() -> None:
    logits = torch.full((3, 2000), -math.inf)
    logits[:, [600, 601, 1999]] = torch.tensor([1.0, -800.0, 1.0])
    rows = DrawnRows([0, 1, 2], [1.0] * 3, [0] * 3, [1.0] * 3, [0.0] * 3, [0.0, 0.5, 1 - 2**-53])
    found = draw(logits, largest(logits)[0], rows)
    assert found is not None
    assert found.tolist() == [600, 1999, 1999]


def test_rows_that_are_no_numbers_give_a_token_and_disturb_no_other() -> None:
    logits = logits_of(5, 3000)
    alone = [draw(logits[i : i + 1], logits[i : i + 1].amax(1), drawn(1, top_p=0.7)) for i in range(5)]
    logits[1, 5], logits[3, 2999] = math.nan, math.inf
    rows = drawn(5, top_p=0.7)._replace(rows=[*range(5)], uniforms=[0.0] * 5)
    found = draw(logits, largest(logits)[0], rows)
    assert found is not None
    assert all(0 <= token < 3000 for token in found.tolist())
    assert [found[i] for i in (0, 2, 4)] == [alone[i] for i in (0, 2, 4)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_logarithms_of_sums_are_exact_to_the_last_digits(dtype: torch.dtype) -> None:
    logits = torch.cat([logits_of(4, 50257, dtype), torch.full((1, 50257), -math.inf, dtype=dtype)])
    logits[4, 7] = 3.0
    found = log_sums(logits, largest(logits)[0])
    assert found is not None
    exact = [math.log(math.fsum(map(math.exp, row.double().tolist()))) for row in logits]
    np.testing.assert_allclose(found.numpy(), exact, rtol=1e-15 * 4, atol=0)


def test_float16_and_other_layouts_use_torch() -> None:
    for logits in (torch.zeros(2, 4, dtype=torch.float16), torch.zeros(4, 2).t()):
        assert draw(logits, logits.amax(1), drawn(2)) is None
        assert log_sums(logits, logits.amax(1)) is None


def digest(*dtypes: torch.dtype) -> str:
    """A digest of tokens and of the bits of sums."""
    parts = []
    for dtype in dtypes:
        logits = logits_of(16, 50257, dtype)
        top = largest(logits)[0]
        for given in ({"temperature": 0.7}, {"top_p": 0.9}, {"top_k": 50}, {"min_p": 0.05}):
            tokens = draw(logits, top, drawn(16, **given))
            assert tokens is not None
            parts.append(tokens.numpy().tobytes())
        sums = log_sums(logits, top)
        assert sums is not None
        parts.append(sums.numpy().tobytes())
    return hashlib.sha256(b"".join(parts)).hexdigest()


def test_the_bits_are_those_of_another_machine() -> None:
    assert digest(torch.float32) == DIGEST
    assert digest(torch.bfloat16) == BFLOAT16_DIGEST


@needs_avx2
def test_code_for_a_lower_instruction_set_gives_the_same_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    kernel = load_or_compile("sampling fp32", lambda: compile_sampling(bf16=False), find("avx2"))
    monkeypatch.setattr(sampling, "_kernel", lambda _: kernel)
    assert digest(torch.float32) == DIGEST
