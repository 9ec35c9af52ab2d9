"""GEMM in int8 on a CPU's vector unit: exact integer sums, so the same bits on every instruction set.

Weights are quantized by column and rows by token, as in gemm_int8_amx.py. A word of 32 bits holds what one instruction
multiplies and adds to a lane:

* AVX-512 VNNI and AVX-VNNI: 4 elements. vpdpbusd multiplies unsigned by signed bytes, so 128 is added to the elements
  of x, and sums begin at -128 times the sum of their column.
* ARM's dot product: 4 elements, signed.
* Without these: 2 elements as int16, vpmaddwd. The weight is stored as bytes and widened when it is read. vpmaddubsw
  would take bytes, but its sums saturate.
"""

from __future__ import annotations

import functools
import logging
from typing import Any

import numpy as np
import torch
from torch import Tensor

from headrace.model.kernels.gemm_blocks import LANES, WORDS, most_rows, multiply_blocks
from headrace.model.kernels.gemm_int8_amx import LARGEST, LEAST, Int8Weight, check_sums, int8_amx_works, quantize
from headrace.model.kernels.intrinsics import cast
from headrace.model.kernels.isa import AMX, Isa, chosen
from headrace.model.kernels.memory import use_huge_pages
from headrace.model.kernels.ops import ARG, OP
from headrace.model.kernels.packed_weight import PackedWeight, pad_columns, padded, steps_of
from headrace.model.kernels.program import GemmBackend, MicroKernel

log = logging.getLogger("headrace.model")


def elements_of_word(isa: Isa) -> int:
    """Elements of a row in a word of 32 bits: 4 bytes where an instruction multiplies them, else 2 int16."""
    return 4 if any(map(isa.has, ("avx512vnni", "avxvnni", "dotprod"))) else 2


def offset_of(isa: Isa) -> int:
    """What is added to the elements of a row: 128 makes bytes unsigned."""
    return 128 if elements_of_word(isa) == 4 and isa.architecture == "x86_64" else 0


class VectorInt8Weight(PackedWeight):
    """A weight [in, out], int8 [blocks, steps, WORDS, NR, elements of a word]; `scales` are followed by first sums."""

    @classmethod
    def of(
        cls, weight: Tensor, bias: Tensor | None, activation: str | None = None, isa: Isa | None = None
    ) -> VectorInt8Weight:
        """Quantize and pack a weight [in, out] with its bias [out] for an instruction set.

        Raises:
            ValueError: `in` is larger than MAX_WIDTH: integer sums could overflow.
        """
        backend = int8_backend(isa or chosen())
        weight, nr, steps = weight.float(), backend.nr, steps_of(len(weight), backend.ku)
        width, out = weight.shape
        check_sums(width)
        blocks, elements = -(-out // nr), backend.ku // WORDS
        scales = pad_columns(weight.abs().amax(0) / LARGEST, blocks * nr)
        quantized = padded(quantize(weight, scales), backend)
        packed = use_huge_pages(torch.empty(blocks, steps, WORDS, nr, elements, dtype=torch.int8))
        packed.copy_(quantized.view(steps, WORDS, elements, blocks, nr).permute(3, 0, 1, 4, 2))
        firsts = -offset_of(backend.isa) * quantized.sum(0, dtype=torch.int32)
        scales = torch.cat([scales, firsts.view(torch.float32)])
        return cls(backend, packed, scales, pad_columns(bias, blocks * nr), bias, width, out, activation)

    @property
    def weight(self) -> Tensor:
        """The dequantized weight, float32 [in, out]; a copy."""
        quantized = self.packed.permute(1, 2, 4, 0, 3).flatten(3).flatten(0, 2)[: self.width, : self.out]
        return quantized * self.scales[: self.out]


@functools.cache
def int8_isa_works(isa: Isa) -> bool:
    """Whether the backend for an instruction set gives exact results. Compiles it."""
    generator = torch.Generator().manual_seed(0)
    weight, x = (torch.randint(-LARGEST, LARGEST + 1, s, generator=generator).float() for s in ((128, 80), (75, 128)))
    weight[0], x[:, 0] = LARGEST, LARGEST
    try:
        found = VectorInt8Weight.of(weight, None, isa=isa)(x.bfloat16())
    except Exception as error:
        log.warning("int8 is not available: %r", error)
        return False
    return bool(torch.equal(found, (x @ weight).bfloat16()))


def int8_works(device: str) -> bool:
    """Whether this machine multiplies int8, with exact results. Compiles the backend; there is no other one."""
    if device != "cpu":
        return False
    return int8_amx_works(device) if chosen().name == AMX.name else int8_isa_works(chosen())


def int8_weight_type() -> type[Int8Weight | VectorInt8Weight]:
    """The packed weight for the instruction set of this process."""
    return Int8Weight if chosen().name == AMX.name else VectorInt8Weight


def _pack(mr: int, elements: int, offset: int) -> Any:
    """Build pack: a row of x, rounded to int8 (to nearest, ties to even), into its panel, and its scale.

    A row that contains NaN or infinity has that as its scale.
    """
    import numba
    from numba import carray, types

    halves, floats = (cast(types.int64, types.CPointer(kind)) for kind in (types.uint16, types.float32))
    numbers = cast(types.int64, types.CPointer(types.uint8 if elements == 4 else types.int16))
    added = np.int32(offset)
    value, least = cast(types.uint32, types.float32), np.float32(LEAST)

    @numba.njit(inline="always")
    def stored(number: Any) -> Any:
        return np.uint8(np.int32(number) + added) if elements == 4 else np.int16(np.int32(number))

    @numba.njit(error_model="numpy")
    def pack(program: Any, op: Any, row: int, source: int) -> None:
        words, width = op[OP.k_steps] * WORDS, op[OP.width]
        panel = program[ARG.packed_rows] + row // mr * words * mr * 4
        target, top = carray(numbers(panel + row % mr * 4), words * mr * elements), np.uint16(0)
        if source == 0:
            for word in range(words):
                for i in range(elements):
                    target[word * mr * elements + i] = 0
            return
        x = carray(halves(source), width)
        for i in range(width):  # compared as bits: a larger magnitude has larger bits, NaN the largest
            top = max(top, x[i] & np.uint16(0x7FFF))
        largest = value(np.uint32(top) << np.uint32(16))
        factor = np.float32(LARGEST) / largest if largest > least else np.float32(0)
        for word in range(width // elements):
            for i in range(elements):
                number = value(np.uint32(x[word * elements + i]) << np.uint32(16)) * factor
                target[word * mr * elements + i] = stored(np.rint(number))
        for at in range(width // elements * elements, words * elements):
            number = value(np.uint32(x[at]) << np.uint32(16)) * factor if at < width else np.float32(0)
            target[at // elements * mr * elements + at % elements] = stored(np.rint(number))
        carray(floats(program[ARG.row_scales] + row * 4), 1)[0] = largest / np.float32(LARGEST)

    return pack


def micro_kernel(isa: Isa, rows: int, lines: int) -> Any:
    """micro_kernel(x, w, steps, sums, soon, quarter), see gemm_fp32.py; sums are int32."""
    from llvmlite import ir

    from headrace.model.kernels.integer_dots import dot_of_bytes, dot_of_shorts
    from headrace.model.kernels.vector_function import VectorFunction
    from headrace.model.kernels.vectors import INT32, INT64, INTEGERS, Value, VectorBuilder

    vectors, bytes_ = isa.nr // LANES, elements_of_word(isa) == 4
    weight_bytes, narrow = 64 if bytes_ else 32, ir.VectorType(ir.IntType(8), 32)
    dot = dot_of_bytes(isa) if bytes_ else dot_of_shorts(isa)

    def body(v: VectorBuilder, x: Value, w: Value, steps: Value, sums: Value, soon: Value, quarter: Value) -> None:
        def word(x: Value, w: Value, now: Value, *rest: Value) -> list[Value]:
            # The four streams take turns. Unrolled, LLVM would regroup integer sums and run out of registers.
            chains = list(rest[3:])
            if bytes_:
                weights = [v.load(w, 64 * j, INTEGERS) for j in range(vectors)]
            else:
                weights = [v.widen_bytes(v.load(w, 32 * j, narrow, 1)) for j in range(vectors)]
            for line in range(lines):
                v.prefetch(now, 64 * line)
            for row in range(rows):
                factor = v.broadcast_word(v.load(x, 4 * row, INT32))
                for j in range(vectors):
                    at = row * vectors + j
                    chains[at] = dot(v, chains[at], factor, weights[j])
            return [
                v.plus(x, 4 * isa.mr),
                v.plus(w, weight_bytes * vectors),
                *rest[:3],
                v.plus(now, 64 * lines),
                *chains,
            ]

        streams = [soon]
        for _ in range(3):
            streams.append(v.builder.add(streams[-1], quarter))
        words = v.builder.mul(steps, INT64(WORDS))
        chains = v.repeat(words, [x, w, *streams, *[v.integers(0)] * (rows * vectors)], word)[6:]
        for i, chain in enumerate(chains):
            v.store(v.builder.add(v.load(sums, 64 * i, INTEGERS), chain), sums, 64 * i)

    parameters = ("x", "w", "steps", "sums", "soon", "quarter")
    return VectorFunction(f"gemm_int8_{rows}_of_{isa.mr}x{isa.nr}_{lines}", parameters, body)


@functools.cache
def int8_backend(isa: Isa) -> GemmBackend:
    """The backend for an instruction set."""
    elements = elements_of_word(isa)

    def build() -> MicroKernel:
        import numba

        kernel, weight_bytes = functools.partial(micro_kernel, isa), LANES * elements
        multiply = multiply_blocks(isa, kernel, bf16=True, int8=True, weight_bytes=weight_bytes)

        @numba.njit
        def nothing(program: Any, scratch: int) -> None:
            pass

        return MicroKernel(nothing, nothing, _pack(isa.mr, elements, offset_of(isa)), multiply)

    return GemmBackend(
        fingerprint="int8",
        isa=isa,
        dtype=torch.bfloat16,
        itemsize=1,
        row_itemsize=4 // elements,
        ku=WORDS * elements,
        nr=isa.nr,
        mr=isa.mr,
        scratch_bytes=(most_rows(isa.mr) + 1) * isa.nr * 4,
        packs_output=False,
        constants=np.zeros(0, np.float32),
        micro_kernel=build,
    )
