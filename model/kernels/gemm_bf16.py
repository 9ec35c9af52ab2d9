"""GEMM in bfloat16 on a CPU's vector unit: rows and results in bfloat16, sums in float32.

Blocks, steps and parts along K are those of gemm_fp32.py. There are two kinds, which round differently, so that the
fingerprint names them:

* `bf16-dot`, AVX-512 with BF16: a word of 32 bits holds 2 elements of a row. vdpbf16ps adds 2 products to a lane, and
  takes denormal numbers as zeros.
* `bf16-fma`, all others: the weight is stored in bfloat16 and widened when it is read, packed rows are float32. Each
  sum is a chain of FMAs, with the same bits on every instruction set.
"""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
import torch
from torch import Tensor

from headrace.model.kernels.gemm_blocks import LANES, WORDS, most_rows, multiply_blocks
from headrace.model.kernels.gemm_fp32 import micro_kernel
from headrace.model.kernels.intrinsics import cast
from headrace.model.kernels.isa import Isa, chosen
from headrace.model.kernels.memory import use_huge_pages
from headrace.model.kernels.ops import ARG, OP
from headrace.model.kernels.packed_weight import PackedWeight, isa_works, pad_columns, padded, steps_of
from headrace.model.kernels.program import GemmBackend, MicroKernel


def elements_of_word(isa: Isa) -> int:
    """Elements of a row in a word of 32 bits: 2 for vdpbf16ps, 1 that is widened for FMAs."""
    return 2 if isa.has("avx512bf16") else 1


class VectorBf16Weight(PackedWeight):
    """A weight [in, out] in blocks of columns, bfloat16 [blocks, steps, WORDS, NR, elements of a word]."""

    @classmethod
    def of(
        cls, weight: Tensor, bias: Tensor | None, activation: str | None = None, isa: Isa | None = None
    ) -> VectorBf16Weight:
        """Pack a weight [in, out] and a bias [out] for an instruction set."""
        backend = bf16_backend(isa or chosen())
        (width, out), nr, elements = weight.shape, backend.nr, backend.ku // WORDS
        blocks, steps = -(-out // nr), steps_of(width, backend.ku)
        packed = use_huge_pages(torch.empty(blocks, steps, WORDS, nr, elements, dtype=weight.dtype))
        packed.copy_(padded(weight, backend).view(steps, WORDS, elements, blocks, nr).permute(3, 0, 1, 4, 2))
        return cls(backend, packed, torch.ones(0), pad_columns(bias, blocks * nr), bias, width, out, activation)

    @property
    def weight(self) -> Tensor:
        """The weight as it was given, [in, out]; a copy."""
        return self.packed.permute(1, 2, 4, 0, 3).flatten(3).flatten(0, 2)[: self.width, : self.out]


def bf16_works(device: str, dtype: torch.dtype) -> bool:
    """Whether this backend can be used on this machine and passes its self-test. Compiles it.

    Where it cannot, torch's operators are used.
    """
    return device == "cpu" and dtype == torch.bfloat16 and bf16_isa_works(chosen())


@functools.cache
def bf16_isa_works(isa: Isa) -> bool:
    """Whether the backend for an instruction set passes its self-test."""
    return isa_works(VectorBf16Weight, isa, torch.bfloat16, rtol=2.0**-8, atol=1e-3)


def _pack(mr: int, elements: int) -> Any:
    """Build pack: a row of x into its panel, where the first words of MR rows are followed by their second ones."""
    import numba
    from numba import carray, types

    words, halves = (cast(types.int64, types.CPointer(kind)) for kind in (types.uint32, types.uint16))
    given = words if elements == 2 else halves
    shift = np.uint32(0 if elements == 2 else 16)

    @numba.njit(error_model="numpy")
    def pack(program: Any, op: Any, row: int, source: int) -> None:
        count, width = op[OP.k_steps] * WORDS, op[OP.width] if source != 0 else 0
        panel = program[ARG.packed_rows] + row // mr * count * mr * 4
        target, whole = carray(words(panel + row % mr * 4), count * mr), width // elements
        x = carray(given(source), whole)
        for i in range(whole):
            target[i * mr] = np.uint32(x[i]) << shift
        for i in range(whole, count):
            target[i * mr] = np.uint32(0)
        if whole * elements < width:  # the last word has one element
            target[whole * mr] = np.uint32(carray(halves(source), width)[width - 1])

    return pack


@functools.cache
def bf16_backend(isa: Isa) -> GemmBackend:
    """The backend for an instruction set."""
    mr, nr, elements = isa.mr, isa.nr, elements_of_word(isa)
    weights_in = "pairs" if elements == 2 else "bf16"

    def build() -> MicroKernel:
        import numba

        def kernel(rows: int, lines: int) -> Any:
            return micro_kernel(rows, mr, nr, lines, weights_in=weights_in)

        @numba.njit
        def nothing(program: Any, scratch: int) -> None:
            pass

        multiply = multiply_blocks(isa, kernel, bf16=True, weight_bytes=2 * LANES * elements)
        return MicroKernel(nothing, nothing, _pack(mr, elements), multiply)

    return GemmBackend(
        fingerprint="bf16-dot" if elements == 2 else "bf16-fma",
        isa=isa,
        dtype=torch.bfloat16,
        itemsize=2,
        row_itemsize=4 // elements,
        ku=WORDS * elements,
        nr=nr,
        mr=mr,
        scratch_bytes=(most_rows(mr) + 1) * nr * 4,
        packs_output=False,
        constants=np.zeros(0, np.float32),
        micro_kernel=build,
    )
