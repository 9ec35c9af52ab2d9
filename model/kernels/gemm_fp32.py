"""GEMM in float32 on a CPU's vector unit, close to the speed of memory or of the unit, whichever limits.

One description for AVX-512, AVX2 and NEON, with the same bits on each. The micro-kernel sums MR rows by NR columns at
once, in most of the registers. Each sum is a chain of FMAs from the first row of a part of the weight to the last; the
sums of the parts are added in order. The weight is stored once, in the order in which it is read:

    block n   NR columns, all rows of the weight; a thread computes whole blocks
        step k   KU = 4 rows of the weight

The loop order is that of BLIS: KC steps of a block stay in the L2 cache while all MC rows are multiplied by them, then
come the next KC steps. Meanwhile the weight that is needed next is prefetched, as four streams. Ops are run by
program.py; README.md explains the names.
"""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
import torch
from torch import Tensor

from headrace.model.kernels.gemm_blocks import LANES, most_rows, multiply_blocks
from headrace.model.kernels.intrinsics import cast
from headrace.model.kernels.isa import Isa, chosen
from headrace.model.kernels.memory import use_huge_pages
from headrace.model.kernels.ops import ARG, OP
from headrace.model.kernels.packed_weight import PackedWeight, isa_works, pad_columns, padded, steps_of
from headrace.model.kernels.program import GemmBackend, MicroKernel

#: Rows of the weight in a step.
KU = 4


class Fp32Weight(PackedWeight):
    """A weight [in, out] in blocks of columns, float32 [blocks, in/KU, KU, NR]: block, step, row, column."""

    @classmethod
    def of(
        cls, weight: Tensor, bias: Tensor | None, activation: str | None = None, isa: Isa | None = None
    ) -> Fp32Weight:
        """Pack a weight [in, out] and a bias [out] for an instruction set."""
        backend = fp32_backend(isa or chosen())
        (width, out), nr = weight.shape, backend.nr
        blocks, steps = -(-out // nr), steps_of(width, KU)
        packed = use_huge_pages(torch.empty(blocks, steps, KU, nr))
        packed.copy_(padded(weight, backend).view(steps, KU, blocks, nr).permute(2, 0, 1, 3))
        return cls(backend, packed, torch.ones(0), pad_columns(bias, blocks * nr), bias, width, out, activation)

    @property
    def weight(self) -> Tensor:
        """The weight as it was given, [in, out]; a copy."""
        return self.packed.permute(1, 2, 0, 3).flatten(2).flatten(0, 1)[: self.width, : self.out]


def fp32_works(device: str, dtype: torch.dtype) -> bool:
    """Whether this backend can be used on this machine and passes its self-test. Compiles it.

    Where it cannot, torch's operators are used.
    """
    return device == "cpu" and dtype == torch.float32 and fp32_isa_works(chosen())


@functools.cache
def fp32_isa_works(isa: Isa) -> bool:
    """Whether the backend for an instruction set passes its self-test."""
    return isa_works(Fp32Weight, isa, torch.float32, rtol=1e-5, atol=1e-4)


def _pack(mr: int) -> Any:
    """Build pack: a row of x into its panel, where the first elements of MR rows are followed by their second ones."""
    import numba
    from numba import carray, types

    floats = cast(types.int64, types.CPointer(types.float32))

    @numba.njit(error_model="numpy")
    def pack(program: Any, op: Any, row: int, source: int) -> None:
        count, width = op[OP.k_steps] * KU, op[OP.width] if source != 0 else 0
        panel = program[ARG.packed_rows] + row // mr * count * mr * 4
        target, x = carray(floats(panel + row % mr * 4), count * mr), carray(floats(source), width)
        for i in range(width):
            target[i * mr] = x[i]
        for i in range(width, count):
            target[i * mr] = np.float32(0)

    return pack


def micro_kernel(rows: int, mr: int, nr: int, lines: int, *, weights_in: str = "fp32") -> Any:
    """micro_kernel(x, w, steps, sums, soon, quarter): `rows` rows of a panel of `mr` by `steps` steps of a block.

    A `VectorFunction`. Adds to the sums [rows, nr]: each sum of this call is one chain of FMAs, from 0 on. In each step
    it prefetches `lines` cache lines of each quarter of the memory at `soon`, whose quarters have `quarter` bytes.

    Args:
        weights_in: what a word of x is multiplied by. "fp32", or "bf16", which is widened: words of x are float32.
            "pairs" of bfloat16: words of x are pairs too, and each link of a chain is a vdpbf16ps.
    """
    from headrace.model.kernels.vector_function import VectorFunction
    from headrace.model.kernels.vectors import FLOAT, HALVES, INT32, INT64, INTEGERS, Value, VectorBuilder

    vectors, vector_bytes = nr // LANES, 32 if weights_in == "bf16" else 64

    def weight(v: VectorBuilder, w: Value, offset: int) -> Value:
        if weights_in == "bf16":
            return v.widen(v.load(w, offset, HALVES, 2))
        return v.load(w, offset, INTEGERS) if weights_in == "pairs" else v.load(w, offset)

    def factor_of(v: VectorBuilder, x: Value, offset: int) -> Value:
        if weights_in == "pairs":
            return v.broadcast_word(v.load(x, offset, INT32))
        return v.broadcast(v.load(x, offset, FLOAT))

    def add_product(v: VectorBuilder, factor: Value, weight: Value, total: Value) -> Value:
        return v.dot_bfloat16(total, factor, weight) if weights_in == "pairs" else v.fma(factor, weight, total)

    def body(v: VectorBuilder, x: Value, w: Value, steps: Value, sums: Value, soon: Value, quarter: Value) -> None:
        def step(x: Value, w: Value, near: Value, far: Value, *found: Value) -> list[Value]:
            chains = list(found)
            for k in range(KU):
                weights = [weight(v, w, (k * vectors + j) * vector_bytes) for j in range(vectors)]
                place = (near, v.builder.add(near, quarter), far, v.builder.add(far, quarter))[k]
                for line in range(lines):
                    v.prefetch(place, 64 * line)
                for row in range(rows):
                    factor = factor_of(v, x, 4 * (mr * k + row))
                    for j in range(vectors):
                        at = row * vectors + j
                        chains[at] = add_product(v, factor, weights[j], chains[at])
            moved = [v.plus(address, 64 * lines) for address in (near, far)]
            return [v.plus(x, 4 * mr * KU), v.plus(w, vector_bytes * vectors * KU), *moved, *chains]

        far = v.builder.add(soon, v.builder.shl(quarter, INT64(1)))
        chains = v.repeat(steps, [x, w, soon, far, *[v.constant(0.0)] * (rows * vectors)], step)[4:]
        for i, chain in enumerate(chains):
            v.store(v.add(v.load(sums, 64 * i), chain), sums, 64 * i)

    name = f"gemm_{weights_in}_{rows}_of_{mr}x{nr}_{lines}"
    return VectorFunction(name, ("x", "w", "steps", "sums", "soon", "quarter"), body)


@functools.cache
def fp32_backend(isa: Isa) -> GemmBackend:
    """The backend for an instruction set."""
    mr, nr = isa.mr, isa.nr

    def build() -> MicroKernel:
        import numba

        multiply = multiply_blocks(isa, lambda rows, lines: micro_kernel(rows, mr, nr, lines))

        @numba.njit
        def nothing(program: Any, scratch: int) -> None:
            pass

        return MicroKernel(nothing, nothing, _pack(mr), multiply)

    return GemmBackend(
        fingerprint="floats",
        isa=isa,
        dtype=torch.float32,
        itemsize=4,
        ku=KU,
        nr=nr,
        mr=mr,
        scratch_bytes=(most_rows(mr) + 1) * nr * 4,
        packs_output=False,
        constants=np.zeros(0, np.float32),
        micro_kernel=build,
    )
