"""Rows of a product keep their bits whatever their number; the promise of equal answers rests on this."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from model.linear import matmul_rows

COUNTS = [*range(1, 41), 63, 64, 65, *range(120, 137), 191, 192, 193, 255, 256, 257, 258, 300]


@pytest.fixture(autouse=True)
def _threads_as_before() -> Iterator[None]:
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


def addmm(inner: int, outer: int) -> Callable[[Tensor], Tensor]:
    generator = torch.Generator().manual_seed(inner + outer)
    weight, bias = torch.randn(inner, outer, generator=generator), torch.randn(outer, generator=generator)
    return lambda rows: torch.addmm(bias, rows, weight)


@pytest.mark.parametrize(
    ("inner", "outer"), [(128, 384), (128, 128), (128, 512), (512, 128), (768, 2304), (768, 768), (3072, 768)]
)
@pytest.mark.parametrize("threads", [1, 2])
def test_a_row_has_the_same_bits_for_every_number_of_rows(inner: int, outer: int, threads: int) -> None:
    torch.set_num_threads(threads)
    product = addmm(inner, outer)
    x = torch.randn(300, inner, generator=torch.Generator().manual_seed(0))
    expected = matmul_rows(product, x)
    for count in COUNTS:
        assert torch.equal(matmul_rows(product, x[:count]), expected[:count]), f"{count} rows"
        assert torch.equal(matmul_rows(product, x[300 - count :]), expected[300 - count :]), f"the last {count} rows"


@pytest.mark.parametrize("width", [128, 768])
def test_the_head_has_the_same_bits_for_every_number_of_rows(width: int) -> None:
    generator = torch.Generator().manual_seed(1)
    embedding = torch.randn(5003, width, generator=generator)  # no round number of rows
    x = torch.randn(200, width, generator=generator)
    expected = matmul_rows(lambda rows: F.linear(rows, embedding), x)
    for count in COUNTS[:-6]:
        assert torch.equal(matmul_rows(lambda rows: F.linear(rows, embedding), x[:count]), expected[:count]), count


def test_the_product_is_the_product() -> None:
    x, weight = torch.randn(301, 64).double(), torch.randn(64, 48).double()
    assert torch.allclose(matmul_rows(lambda rows: rows @ weight, x), x @ weight, atol=1e-12)


@pytest.mark.parametrize("count", [1, 15, 16, 17, 128, 129, 257, 1024, 1031])
def test_a_product_never_runs_outside_the_measured_range(count: int) -> None:
    seen = []

    def product(rows: Tensor) -> Tensor:
        seen.append(len(rows))
        return rows * 2

    x = torch.arange(count * 3, dtype=torch.float32).view(count, 3)
    assert torch.equal(matmul_rows(product, x), x * 2)
    assert all(16 <= rows <= 128 for rows in seen)
