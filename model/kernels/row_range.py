"""Numbers of rows for which torch's GEMM gives a row the same bits.

oneDNN chooses a kernel by the number of rows M, and kernels add in different orders, so the last bits of a row can
depend on the batch composition. Which M agree is measured when a weight is packed, and a GEMM is run only on numbers of
rows in that range: few rows are padded, many are split into nearly equal parts.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from headrace.model.kernels.onednn import USUAL_ROWS, OneDnnWeight, TorchWeight

#: The most rows of one GEMM: more rows are not faster, and their intermediate results do not fit the caches.
MAX_ROWS = 512
#: The most rows that are measured for the head, which is large and gets few rows.
HEAD_ROWS = 128


@dataclass(frozen=True)
class RowRange:
    """Numbers of rows among which a GEMM gives a row the same bits."""

    least: int = 1
    most: int = MAX_ROWS


def matmul_rows(gemm: Callable[[Tensor], Tensor], x: Tensor, rows: RowRange) -> Tensor:
    """`gemm` of the rows of x, [M, in] -> [M, out], run only on numbers of rows inside the range."""
    count = len(x)
    if count > rows.most:
        size = min(
            rows.most, padded_rows(-(-count // -(-count // rows.most)))
        )  # nearly equal parts, of sizes that were measured
        return torch.cat([matmul_rows(gemm, part, rows) for part in torch.split(x, size)])
    size = min(rows.most, max(rows.least, padded_rows(count)))
    return gemm(x) if size == count else gemm(F.pad(x, (0, 0, 0, size - count)))[:count]


def padded_rows(count: int) -> int:
    """The number of rows to pad `count` rows to, out of a small set.

    oneDNN generates and keeps code for every number of rows: for all of them that is hundreds of megabytes, and the
    first step of a new size takes several times as long.
    """
    for most, step in ((1, 1), (2, 2), (4, 4), (32, 8), (128, 16)):
        if count <= most:
            return -(-count // step) * step
    return -(-count // 32) * 32


_measured: dict[tuple[object, ...], RowRange] = {}


def measured_rows(gemm: OneDnnWeight | TorchWeight, weight: Tensor) -> RowRange:
    """`measure_rows`, once for each shape. On a GPU nothing is measured, and any number of rows is allowed."""
    if weight.device.type != "cpu":
        return RowRange(1, 1 << 30)
    key = (type(gemm), gemm.gelu, weight.shape, weight.dtype, torch.get_num_threads())
    if key not in _measured:
        width, out = weight.shape
        _measured[key] = measure_rows(gemm, width, out, weight.dtype)
    return _measured[key]


def measure_rows(gemm: Callable[[Tensor], Tensor], width: int, out: int, dtype: torch.dtype) -> RowRange:
    """Measure a range of rows in which every number that is ever run gives a row the same bits.

    gemm: [M, width] -> [M, out]. The range is the one around `USUAL_ROWS`, or around another number if that is too
    narrow to split any number of rows into. If there is none, the range contains all numbers.
    """
    counts = sorted({padded_rows(n) for n in range(1, 1 + (HEAD_ROWS if out > 16 * width else MAX_ROWS))})
    x = torch.randn(counts[-1], width, generator=torch.Generator().manual_seed(0)).to(dtype)
    for anchor in (USUAL_ROWS, 128, 16):
        found = _range_around(anchor, counts, gemm, x)
        if found.most >= 2 * found.least:
            return found
    return RowRange()


def _range_around(anchor: int, counts: Sequence[int], gemm: Callable[[Tensor], Tensor], x: Tensor) -> RowRange:
    expected = torch.cat([gemm(rows) for rows in torch.split(x, anchor)])

    def agrees(count: int) -> bool:
        return torch.equal(gemm(x[:count]), expected[:count])

    fewer = itertools.takewhile(agrees, (n for n in reversed(counts) if n < anchor))
    more = itertools.takewhile(agrees, (n for n in counts if n > anchor))
    return RowRange(min(fewer, default=anchor), max(more, default=anchor))
