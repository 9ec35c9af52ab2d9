"""x @ weight + bias with whole numbers of 8 bits, on a CPU's matrix unit: half the bytes to read, twice the speed.

Each column of the weight has a scale of its own, found once; each row of x has one, found when it comes. A number is
its scale times a whole one from -127 to 127. Sums of whole numbers are exact in any order, so a row's bits depend
neither on its company nor on the number of threads. What is lost is in the rounding: `headrace validate` measures it.
"""

from __future__ import annotations

import functools
import logging
from typing import Any

import numpy as np
import torch
from torch import Tensor

from headrace.model.kernels.gemm_bf16_amx import BLOCK, TILE, TILES, multiplier, row_of_tiles, set_up, tiles_work
from headrace.model.kernels.intrinsics import cast, use_huge_pages
from headrace.model.kernels.program import ROW_SCALES, STEPS, Kind, Parts, Streamed, padded

log = logging.getLogger("headrace.model")

#: Rows of the weight in a step of a block.
STEP = 64
LARGEST = 127


class Int8(Streamed):
    """A weight [in, out] as tiles, int8 [blocks, in/64, 2, 16, 16, 4]: block, step, tile, four rows, column, row of the
    four.
    """

    @classmethod
    def of(cls, weight: Tensor, bias: Tensor | None, gelu: bool) -> Int8:
        """Take in a weight [in, out], `in` a multiple of 64, and a bias [out]."""
        weight = weight.float()
        width, out = weight.shape
        blocks, steps = -(-out // BLOCK), width // STEP
        scales = padded(weight.abs().amax(0) / LARGEST, blocks * BLOCK)
        whole = torch.zeros(width, blocks * BLOCK, dtype=torch.int8)
        # A column of zeros has no scale: nothing divided by nothing is nothing here.
        whole[:, :out] = (weight / scales[:out]).nan_to_num_(0).round_().to(torch.int8)
        tiles = use_huge_pages(torch.empty(blocks, steps, 2, 16, 16, 4, dtype=torch.int8))
        tiles.copy_(whole.view(steps, 16, 4, blocks, 2, 16).permute(3, 0, 4, 1, 5, 2))
        return cls(WHOLE, tiles, scales, padded(bias, blocks * BLOCK), bias, out, gelu)

    @property
    def weight(self) -> Tensor:
        """What it stands for, float32 [in, out]; a copy."""
        blocks, steps = self.stream.shape[:2]
        whole = self.stream.permute(1, 3, 5, 0, 2, 4).reshape(steps * STEP, blocks * BLOCK)
        return (whole * self.scales)[:, : self.out]


@functools.cache
def int8_works(device: str) -> bool:
    """Whether this machine multiplies whole numbers on its matrix unit, and rightly; there is no other way for them.

    Compiles the code.
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


def _pack() -> Any:
    """A row of x as whole numbers, rounded to the nearest and to even between two, into its tiles, and its scale.

    A row with a NaN, or an infinity, has that as its scale.
    """
    import numba
    from numba import carray, types

    halves, bytes_, floats = (
        cast(types.int64, types.CPointer(kind)) for kind in (types.uint16, types.int8, types.float32)
    )
    value, tile_row = cast(types.uint32, types.float32), row_of_tiles()

    @numba.njit(error_model="numpy")
    def pack(h: Any, d: Any, row: int, source: int) -> None:
        steps = d[STEPS]
        target, top = carray(bytes_(tile_row(h, d, row)), steps * TILE * STEP), np.uint16(0)
        if source == 0:
            for step in range(steps):
                for i in range(STEP):
                    target[step * TILE * STEP + i] = np.int8(0)
            return
        x = carray(halves(source), steps * STEP)
        for i in range(steps * STEP):  # as bits: of two sizes the larger has the larger bits, and NaN has the largest
            top = max(top, x[i] & np.uint16(0x7FFF))
        largest = value(np.uint32(top) << np.uint32(16))
        factor = np.float32(LARGEST) / largest if largest > 0 else np.float32(0)
        for step in range(steps):
            for i in range(STEP):
                number = value(np.uint32(x[step * STEP + i]) << np.uint32(16)) * factor
                target[step * TILE * STEP + i] = np.int8(np.int32(np.rint(number)))
        carray(floats(h[ROW_SCALES] + row * 4), 1)[0] = largest / np.float32(LARGEST)

    return pack


def _parts() -> Parts:
    begin, end = set_up()
    return Parts(begin, end, _pack(), multiplier(whole=True))


WHOLE = Kind("int8", torch.bfloat16, 1, STEP, BLOCK, TILE, TILES.own_bytes, False, TILES.constants, _parts)
