"""x @ weight + bias with whole numbers of 8 bits, on a CPU's matrix unit: half the bytes to read, twice the speed.

Each column of the weight has a scale of its own, found once; each row of x has one, found when it comes. A number is
its scale times a whole one from -127 to 127. Sums of whole numbers are exact in any order, so a row's bits depend
neither on its company nor on the number of threads. What is lost is in the rounding: `millrace validate` measures it.
"""

from __future__ import annotations

import functools
import logging
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from model import machine_code, tiles
from model.machine_code import Kernel
from model.native import cast, team, team_functions, use_huge_pages
from model.tiles import BLOCK, TILE, tiles_work

log = logging.getLogger("millrace.model")

#: Rows of the weight in a step of a block.
STEP = 64
LARGEST = 127


@dataclass(frozen=True)
class Int8:
    """A weight [in, out] as tiles of whole numbers."""

    tiles: Tensor  # int8 [blocks, in/64, 2, 16, 16, 4]: block, step, tile, four rows, column, row of the four
    scales: Tensor  # float32 [blocks * 32]
    biases: Tensor  # float32 [blocks * 32], zero where there is none
    bias: Tensor | None  # [out]
    out: int
    gelu: bool

    @classmethod
    def of(cls, weight: Tensor, bias: Tensor | None, gelu: bool) -> Int8:
        """Take in a weight [in, out], `in` a multiple of 64, and a bias [out]."""
        weight = weight.float()
        width, out = weight.shape
        blocks, steps = -(-out // BLOCK), width // STEP
        scales = torch.zeros(blocks * BLOCK)
        scales[:out] = weight.abs().amax(0) / LARGEST
        whole = torch.zeros(width, blocks * BLOCK, dtype=torch.int8)
        # A column of zeros has no scale: nothing divided by nothing is nothing here.
        whole[:, :out] = (weight / scales[:out]).nan_to_num_(0).round_().to(torch.int8)
        packed = use_huge_pages(torch.empty(blocks, steps, 2, 16, 16, 4, dtype=torch.int8))
        packed.copy_(whole.view(steps, 16, 4, blocks, 2, 16).permute(3, 0, 4, 1, 5, 2))
        biases = torch.zeros(blocks * BLOCK)
        if bias is not None:
            biases[:out] = bias
        return cls(packed, scales, biases, bias, out, gelu)

    @property
    def weight(self) -> Tensor:
        """What it stands for, float32 [in, out]; a copy."""
        blocks, steps = self.tiles.shape[:2]
        whole = self.tiles.permute(1, 3, 5, 0, 2, 4).reshape(steps * STEP, blocks * BLOCK)
        return (whole * self.scales)[:, : self.out]

    def __call__(self, x: Tensor) -> Tensor:
        """bfloat16 [M, in] -> [M, out], with GELU (the tanh approximation) if asked for."""
        out = x.new_empty(len(x), self.out)
        whole, scales = round_rows(x)
        tiles.multiply(whole, self.tiles, self.biases, out, self.gelu, (scales, self.scales))
        return out


@functools.cache
def int8_works(device: str) -> bool:
    """Whether this machine multiplies whole numbers on its matrix unit, and rightly; there is no other way for them.

    Compiles the kernels.
    """
    if not tiles_work(device, torch.bfloat16):
        return False
    try:
        from llvmlite import binding

        return bool(binding.get_host_cpu_features().get("amx-int8")) and _right()
    except Exception as error:
        log.warning("whole numbers are not multiplied: %r", error)
        return False


def _right() -> bool:
    """Whether whole numbers, with nothing to round, come out exactly."""
    generator = torch.Generator().manual_seed(0)
    weight, x = (torch.randint(-LARGEST, LARGEST + 1, s, generator=generator).float() for s in ((128, 80), (75, 128)))
    weight[0], x[:, 0] = LARGEST, LARGEST
    return bool(torch.equal(Int8.of(weight, None, False)(x.bfloat16()), (x @ weight).bfloat16()))


def round_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """bfloat16 [M, in] as whole numbers and scales: int8 [M up to a multiple of 16, in], float32 as many.

    A row with a NaN, or an infinity, has that as its scale. Rows beyond M are left as they are.
    """
    if x.stride(1) != 1:
        x = x.contiguous()
    count = -(-len(x) // TILE) * TILE
    whole, scales = x.new_empty(count, x.shape[1], dtype=torch.int8), x.new_empty(count, dtype=torch.float32)
    threads = min(torch.get_num_threads(), len(x))
    numbers = [x.data_ptr(), x.stride(0) * 2, len(x), x.shape[1], whole.data_ptr(), scales.data_ptr(), threads]
    team().run(_rounding().address, np.array(numbers, dtype=np.int64), threads)
    return whole, scales


@functools.cache
def _rounding() -> Kernel:
    return machine_code.kernel("rounding", _compiled)


def _compiled() -> Any:
    """`round_rows` as a C function of one pointer, to the int64 numbers that it packs."""
    import numba
    from numba import carray, types

    thread, threads = team_functions()
    pointer = {kind: cast(types.int64, types.CPointer(kind)) for kind in (types.uint16, types.int8, types.float32)}
    halves, bytes_, floats = pointer[types.uint16], pointer[types.int8], pointer[types.float32]
    value = cast(types.uint32, types.float32)

    @numba.njit(error_model="numpy")
    def round_row(x: Any, out: Any, width: int) -> Any:
        top = np.uint16(0)
        for column in range(width):  # as bits: of two sizes the larger has the larger bits, and NaN has the largest
            top = max(top, x[column] & np.uint16(0x7FFF))
        largest = value(np.uint32(top) << np.uint32(16))
        factor = np.float32(LARGEST) / largest if largest > 0 else np.float32(0)
        for column in range(width):
            number = value(np.uint32(x[column]) << np.uint32(16)) * factor
            out[column] = np.int8(np.int32(np.rint(number)))
        return largest / np.float32(LARGEST)

    @numba.njit(error_model="numpy")
    def work(a: Any) -> None:
        x, x_row, count, width, out, scales, shares = a[0], a[1], a[2], a[3], a[4], a[5], a[6]
        for share in range(thread(), shares, threads()):
            for row in range(count * share // shares, count * (share + 1) // shares):
                from_row, to_row = carray(halves(x + row * x_row), width), carray(bytes_(out + row * width), width)
                carray(floats(scales), count)[row] = round_row(from_row, to_row, width)

    @numba.cfunc(types.void(types.CPointer(types.int64)), nopython=True)
    def kernel(arguments: Any) -> None:
        work(carray(arguments, 7))

    return kernel
