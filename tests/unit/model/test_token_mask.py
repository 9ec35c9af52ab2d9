"""Masks of tokens: the logits that numpy's definition gives, and no other bit changes."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from headrace.model.kernels import token_mask
from headrace.model.kernels.token_mask import WORD_BITS, mask_rows
from headrace.model.sampler import NO_TOKEN, NOT_A_NUMBER, Draw, RowParams, TokenMasks, sample


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("width", [1, 31, 32, 33, 50257])
def test_a_row_loses_the_tokens_that_its_mask_does_not_name(dtype: torch.dtype, width: int) -> None:
    assert dtype == torch.float16 or token_mask._kernel(dtype) is not None
    torch.set_num_threads(2)
    numbers, words = np.random.default_rng(width), width // WORD_BITS + 1
    logits = torch.from_numpy(numbers.normal(size=(5, width))).to(dtype)
    logits[:, 0] = float("nan")
    masks = numbers.integers(0, 2**32, (3, words), dtype=np.uint32)
    masks[1, : words // 2], masks[1, words // 2 :] = 0, 2**32 - 1
    expected = logits.clone()
    for row, mask in zip((4, 0, 2), masks, strict=True):
        kept = np.unpackbits(mask.view(np.uint8), bitorder="little")[:width].astype(bool)
        expected[row, torch.from_numpy(~kept)] = -torch.inf
    mask_rows(logits, [4, 0, 2], masks)
    bits = torch.int32 if dtype == torch.float32 else torch.int16
    assert torch.equal(logits.view(bits), expected.view(bits))


def test_a_row_without_a_token_says_so() -> None:
    params = [RowParams(temperature=0), RowParams(), RowParams(), RowParams(temperature=0), RowParams()]
    logits = torch.tensor([[1.0, 2.0, 3.0]] * 5)
    logits[2, 1] = torch.nan
    masks = TokenMasks([0, 1, 3, 4], np.array([[0], [0], [3], [4]], dtype=np.uint32))
    found = sample(logits, [Draw(each, [], [], 1, 0) for each in params], masks)
    assert found.tolist() == [NO_TOKEN, NO_TOKEN, NOT_A_NUMBER, 1, 2]
