"""GEMM in int8 on a CPU's matrix unit (Intel AMX): half the bytes to read and twice the speed of bfloat16.

Quantization is symmetric: each column of the weight has a scale, computed when the weight is packed, and each row of x
has one, computed when the row is packed. An element is its scale times an integer from -127 to 127. Integer sums are
exact in any order, so a row's bits depend neither on the other rows nor on the number of threads. The rounding costs
accuracy, which `headrace validate` measures.
"""

from __future__ import annotations

import functools
import logging
from typing import Any

import numpy as np
import torch
from torch import Tensor

from headrace.model.kernels.gemm_bf16_amx import (
    BF16_AMX,
    MR,
    NR,
    bf16_amx_works,
    multiply_partition,
    packed_row,
    tile_configuration,
)
from headrace.model.kernels.intrinsics import cast
from headrace.model.kernels.isa import AMX
from headrace.model.kernels.memory import use_huge_pages
from headrace.model.kernels.ops import ARG, OP
from headrace.model.kernels.packed_weight import PackedWeight, pad_columns, padded, steps_of
from headrace.model.kernels.program import GemmBackend, MicroKernel

log = logging.getLogger("headrace.model")

#: Rows of the weight in a step.
KU = 64
LARGEST = 127
#: The longest sums: 65,536 products of a byte by a signed byte, of at most 255 * 127, fit an int32.
MAX_WIDTH = 2**16
#: Rows whose elements are all smaller count as zeros: 127 / x would overflow.
LEAST = 2.0**-100


class Int8Weight(PackedWeight):
    """A weight [in, out] as tiles, int8 [blocks, in/64, 2, 16, 16, 4]: block, step, tile, four rows, column, row of the
    four.
    """

    @classmethod
    def of(cls, weight: Tensor, bias: Tensor | None, activation: str | None = None) -> Int8Weight:
        """Quantize and pack a weight [in, out] with its bias [out].

        Raises:
            ValueError: `in` is larger than MAX_WIDTH: integer sums could overflow.
        """
        weight = weight.float()
        width, out = weight.shape
        check_sums(width)
        blocks, steps = -(-out // NR), steps_of(width, KU)
        scales = pad_columns(weight.abs().amax(0) / LARGEST, blocks * NR)
        quantized = padded(quantize(weight, scales), INT8_AMX)
        tiles = use_huge_pages(torch.empty(blocks, steps, 2, 16, 16, 4, dtype=torch.int8))
        tiles.copy_(quantized.view(steps, 16, 4, blocks, 2, 16).permute(3, 0, 4, 1, 5, 2))
        return cls(INT8_AMX, tiles, scales, pad_columns(bias, blocks * NR), bias, width, out, activation)

    @property
    def weight(self) -> Tensor:
        """The dequantized weight, float32 [in, out]; a copy."""
        blocks, steps = self.packed.shape[:2]
        quantized = self.packed.permute(1, 3, 5, 0, 2, 4).reshape(steps * KU, blocks * NR)
        return (quantized * self.scales)[: self.width, : self.out]


def quantize(weight: Tensor, scales: Tensor) -> Tensor:
    """A weight [in, out] divided by the scales of its columns, as int8."""
    # A column of zeros has the scale 0; 0 / 0 becomes 0.
    return (weight / scales[: weight.shape[1]]).nan_to_num_(0).round_().to(torch.int8)


def check_sums(width: int) -> None:
    """Raise ValueError if sums of this many products could overflow."""
    if width > MAX_WIDTH:
        raise ValueError(f"a weight in int8 has {width} rows; it must have at most {MAX_WIDTH}: sums could overflow")


@functools.cache
def int8_amx_works(device: str) -> bool:
    """Whether this machine multiplies int8 on its matrix unit and gives exact results. Compiles the backend.

    Without it gemm_int8.py computes the same on the vector unit.
    """
    if not bf16_amx_works(device, torch.bfloat16):
        return False
    try:
        from llvmlite import binding

        return bool(binding.get_host_cpu_features().get("amx-int8")) and _self_test()
    except Exception as error:
        log.warning("int8 is not available: %r", error)
        return False


def _self_test() -> bool:
    """Whether integers, for which nothing is rounded, give exact results."""
    generator = torch.Generator().manual_seed(0)
    weight, x = (torch.randint(-LARGEST, LARGEST + 1, s, generator=generator).float() for s in ((128, 80), (75, 128)))
    weight[0], x[:, 0] = LARGEST, LARGEST
    return bool(torch.equal(Int8Weight.of(weight, None)(x.bfloat16()), (x @ weight).bfloat16()))


def _pack() -> Any:
    """Build pack: a row of x, rounded to int8 (to nearest, ties to even), into its tiles, and its scale.

    A row that contains NaN or infinity has that as its scale.
    """
    import numba
    from numba import carray, types

    halves, bytes_, floats = (
        cast(types.int64, types.CPointer(kind)) for kind in (types.uint16, types.int8, types.float32)
    )
    value, locate_row, least = cast(types.uint32, types.float32), packed_row(), np.float32(LEAST)

    @numba.njit(error_model="numpy")
    def pack(program: Any, op: Any, row: int, source: int) -> None:
        steps, width = op[OP.k_steps], op[OP.width]
        target, top = carray(bytes_(locate_row(program, op, row)), steps * MR * KU), np.uint16(0)
        if source == 0:
            for step in range(steps):
                for i in range(KU):
                    target[step * MR * KU + i] = np.int8(0)
            return
        x = carray(halves(source), width)
        for i in range(width):  # compared as bits: a larger magnitude has larger bits, and NaN has the largest
            top = max(top, x[i] & np.uint16(0x7FFF))
        largest = value(np.uint32(top) << np.uint32(16))
        factor = np.float32(LARGEST) / largest if largest > least else np.float32(0)
        for step in range(width // KU):
            for i in range(KU):
                number = value(np.uint32(x[step * KU + i]) << np.uint32(16)) * factor
                target[step * MR * KU + i] = np.int8(np.int32(np.rint(number)))
        for at in range(width // KU * KU, steps * KU):
            number = value(np.uint32(x[at]) << np.uint32(16)) * factor if at < width else np.float32(0)
            target[at // KU * MR * KU + at % KU] = np.int8(np.int32(np.rint(number)))
        carray(floats(program[ARG.row_scales] + row * 4), 1)[0] = largest / np.float32(LARGEST)

    return pack


def _build() -> MicroKernel:
    begin, end = tile_configuration()
    return MicroKernel(begin, end, _pack(), multiply_partition(int8=True))


INT8_AMX = GemmBackend(
    fingerprint="int8",
    isa=AMX,
    dtype=torch.bfloat16,
    itemsize=1,
    ku=KU,
    nr=NR,
    mr=MR,
    scratch_bytes=BF16_AMX.scratch_bytes,
    packs_output=False,
    constants=BF16_AMX.constants,
    micro_kernel=_build,
)
