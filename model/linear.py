"""Matrix products in the fastest form the machine has, whose rows do not depend on how many rows there are.

On a CPU with AVX-512, float32 goes through kernels/gemm_fp32_avx512.py; bfloat16 on one with a matrix unit through
kernels/gemm_bf16_amx.py, and what is rounded to 8 bits through kernels/gemm_int8_amx.py. They sum a row in one
order whatever its company.

On other CPUs the weight is packed once in the layout oneDNN's kernels read (the private operators behind
`torch.compile`'s CPU backend, taken only where they give what `F.linear` gives); elsewhere it stays as the files store
it. There a kernel is picked by the number of rows M, and kernels add in different orders, so a row's last bits
change with its company. Which M agree is measured when a weight is taken in (`measure_rows`), and a product is never
run outside that range: few rows are padded up, many are cut into near-equal parts.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from headrace.model.kernels.gemm_bf16_amx import Tiled, tiles_work
from headrace.model.kernels.gemm_fp32_avx512 import Floats, floats_work
from headrace.model.kernels.gemm_int8_amx import Int8
from headrace.model.kernels.program import Streamed

#: Rows of one product at most: more gain nothing, and their intermediate results leave the caches.
MAX_ROWS = 512
#: What the full batch of the default 64 slots has; weights are packed for it.
USUAL_ROWS = 64
#: Of the head, which is large and meets few rows, so many at most are looked at.
HEAD_ROWS = 128


@dataclass(frozen=True)
class RowRange:
    """Numbers of rows among which a product gives a row the same bits."""

    least: int = 1
    most: int = MAX_ROWS


@dataclass(frozen=True)
class Linear:
    """x @ weight + bias, then GELU (the tanh approximation) if asked for. [M, in] -> [M, out]."""

    product: Plain | Packed | Streamed
    #: None: a row's bits are the same among any number of rows.
    rows: RowRange | None

    @classmethod
    def of(cls, weight: Tensor, bias: Tensor | None = None, *, gelu: bool = False, int8: bool = False) -> Linear:
        """Take in a weight [in, out], as the files of GPT-2 store it, and a bias [out]; both may be let go of then.

        With `int8` it is rounded to whole numbers, and rows are bfloat16; see `int8_works`.
        """
        if int8:
            return cls(Int8.of(weight, bias, gelu), None)
        ours = own_products(weight.device.type, weight.dtype)
        if ours is not None and weight.shape[0] % ours.step == 0:
            return cls(ours.of(weight, bias, gelu), None)
        product: Packed | Plain = Plain(weight, bias, gelu)
        if packing_works(weight.device.type, weight.dtype):
            product = Packed.of(weight, bias, gelu)
        return cls(product, measured_rows(product, weight))

    @property
    def weight(self) -> Tensor:
        """The weight as it came, [in, out]; a copy if it is packed."""
        return self.product.weight

    @property
    def bias(self) -> Tensor | None:
        """The bias, [out]."""
        return self.product.bias

    def padded_rows(self, count: int) -> int:
        """The number of rows at which `count` of them need no padding here."""
        return count if self.rows is None else padded_rows(count)

    def __call__(self, x: Tensor) -> Tensor:
        return self.product(x) if self.rows is None else matmul_rows(self.product, x, self.rows)


def own_products(device: str, dtype: torch.dtype) -> type[Tiled | Floats] | None:
    """The products of ours for this type on this machine, tried out; None where torch computes them."""
    if tiles_work(device, dtype):
        return Tiled
    return Floats if floats_work(device, dtype) else None


@dataclass(frozen=True)
class Plain:
    """The product by torch's public operators."""

    weight: Tensor  # [in, out]
    bias: Tensor | None  # [out]
    gelu: bool

    def __call__(self, x: Tensor) -> Tensor:
        out = x @ self.weight if self.bias is None else torch.addmm(self.bias, x, self.weight)
        return F.gelu(out, approximate="tanh") if self.gelu else out


@dataclass(frozen=True)
class Packed:
    """The product by oneDNN on a weight in its own layout; bias and GELU are applied before the result is written."""

    packed: Tensor
    bias: Tensor | None  # [out]
    gelu: bool

    @classmethod
    def of(cls, weight: Tensor, bias: Tensor | None, gelu: bool) -> Packed:
        """Pack a weight [in, out] for batches around `USUAL_ROWS` rows."""
        packed: Tensor = torch.ops.mkldnn._reorder_linear_weight(weight.t(), USUAL_ROWS)
        return cls(packed, bias, gelu)

    @property
    def weight(self) -> Tensor:
        """Unpacked, [in, out]."""
        return self.packed.to_dense().t()

    def __call__(self, x: Tensor) -> Tensor:
        name, algorithm = ("gelu", "tanh") if self.gelu else ("none", "")
        out: Tensor = torch.ops.mkldnn._linear_pointwise(x, self.packed, self.bias, name, [], algorithm)
        return out


def matmul_rows(product: Callable[[Tensor], Tensor], x: Tensor, rows: RowRange) -> Tensor:
    """`product` of the rows of x, [M, in] -> [M, out], run only on numbers of rows inside the range."""
    count = len(x)
    if count > rows.most:
        size = min(rows.most, padded_rows(-(-count // -(-count // rows.most))))  # near-equal parts, of sizes looked at
        return torch.cat([matmul_rows(product, part, rows) for part in torch.split(x, size)])
    size = min(rows.most, max(rows.least, padded_rows(count)))
    return product(x) if size == count else product(F.pad(x, (0, 0, 0, size - count)))[:count]


def padded_rows(count: int) -> int:
    """The next of a few numbers of rows. oneDNN generates code for every number it meets, and keeps it: for all of them
    that is hundreds of megabytes, and a step of a new size takes several times as long.
    """
    for most, step in ((1, 1), (2, 2), (4, 4), (32, 8), (128, 16)):
        if count <= most:
            return -(-count // step) * step
    return -(-count // 32) * 32


@functools.cache
def packing_works(device: str, dtype: torch.dtype) -> bool:
    """Whether this torch on this machine has the packed product, and it gives what the plain one gives."""
    if device != "cpu" or dtype not in (torch.float32, torch.bfloat16):
        return False
    try:
        if dtype == torch.bfloat16 and not torch.ops.mkldnn._is_mkldnn_bf16_supported():
            return False
        generator = torch.Generator().manual_seed(0)
        weight, bias, x = (torch.randn(*s, generator=generator).to(dtype) for s in ((96, 160), (160,), (5, 96)))
        ours, plain = Packed.of(weight, bias, True)(x), Plain(weight, bias, True)(x)
    except (AttributeError, RuntimeError):  # another torch: the operators are private, so they may go
        return False
    tolerance = 1e-4 if dtype == torch.float32 else 0.1
    return ours.dtype == dtype and bool(torch.allclose(ours, plain, rtol=tolerance, atol=tolerance))


_measured: dict[tuple[object, ...], RowRange] = {}


def measured_rows(product: Packed | Plain, weight: Tensor) -> RowRange:
    """`measure_rows`, once for each shape; a GPU's kernels are not tamed that way."""
    if weight.device.type != "cpu":
        return RowRange(1, 1 << 30)
    key = (type(product), product.gelu, weight.shape, weight.dtype, torch.get_num_threads())
    if key not in _measured:
        width, out = weight.shape
        _measured[key] = measure_rows(product, width, out, weight.dtype)
    return _measured[key]


def measure_rows(product: Callable[[Tensor], Tensor], width: int, out: int, dtype: torch.dtype) -> RowRange:
    """A range of rows in which every number that is ever run gives a row the same bits; all numbers if there is none.

    product: [M, width] -> [M, out]. The range is the one around `USUAL_ROWS`, or around another number if that is too
    narrow to cut any number of rows into.
    """
    counts = sorted({padded_rows(n) for n in range(1, 1 + (HEAD_ROWS if out > 16 * width else MAX_ROWS))})
    x = torch.randn(counts[-1], width, generator=torch.Generator().manual_seed(0)).to(dtype)
    for anchor in (USUAL_ROWS, 128, 16):
        found = _range_around(anchor, counts, product, x)
        if found.most >= 2 * found.least:
            return found
    return RowRange()


def _range_around(anchor: int, counts: Sequence[int], product: Callable[[Tensor], Tensor], x: Tensor) -> RowRange:
    expected = torch.cat([product(rows) for rows in torch.split(x, anchor)])  # each among so many

    def agrees(count: int) -> bool:
        return torch.equal(product(x[:count]), expected[:count])

    fewer = itertools.takewhile(agrees, (n for n in reversed(counts) if n < anchor))
    more = itertools.takewhile(agrees, (n for n in counts if n > anchor))
    return RowRange(min(fewer, default=anchor), max(more, default=anchor))
