"""Checks for every compiled GEMM."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from headrace.model.kernels.packed_weight import PackedWeight

#: Each activation function in float64; how many units in the last place of float32 it may be off, and by how much more
#: where its results vanish.
EXACT: dict[str, tuple[Callable[[Tensor], Tensor], int, float]] = {
    "gelu_tanh": (functools.partial(F.gelu, approximate="tanh"), 16, 1e-7),
    "gelu": (lambda x: x * torch.special.erfc(-x / 2**0.5) / 2, 6, 1e-36),
    "relu": (F.relu, 0, 0.0),
    "silu": (F.silu, 6, 1e-35),
    "tanh": (torch.tanh, 4, 0.0),
}


def check_batch_invariance(product: PackedWeight, x: Tensor, threads: int, counts: Sequence[int]) -> None:
    """A row has the same bits for every number of rows and threads."""
    torch.set_num_threads(2)
    expected = product(x)
    torch.set_num_threads(threads)
    for count in counts:
        assert torch.equal(product(x[:count]), expected[:count]), f"{count} rows"
        assert torch.equal(product(x[len(x) - count :]), expected[len(x) - count :]), f"the last {count} rows"


def check_strides(product: PackedWeight, x: Tensor) -> None:
    """Rows may have any stride, or be transposed. x: [M, more than 128], `in` is 64."""
    expected = product(x[:, 64:128].contiguous())
    assert torch.equal(product(x[:, 64:128]), expected)
    assert torch.equal(product(x[:, 64:128].t().contiguous().t()), expected)


def check_nan_and_infinity(made: Callable[[str | None], PackedWeight], x: Tensor, bad: float) -> None:
    """NaN and infinity stay in their row and are visible there, with and without an activation function."""
    for activation in (None, "gelu_tanh"):
        product = made(activation)
        clean = product(x)
        broken = x.clone()
        broken[7, 3] = bad
        found = product(broken)
        assert not found[7].isfinite().all()
        assert math.isinf(bad) or found[7].isnan().all()
        assert torch.equal(found[:7], clean[:7])
        assert torch.equal(found[8:], clean[8:])
