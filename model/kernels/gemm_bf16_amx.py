"""GEMM in bfloat16 on a CPU's matrix unit (Intel AMX), reading the weight at the speed of memory.

The unit multiplies tiles: 16 rows of x by 32 elements, with 32 elements by 16 columns of the weight, summed in float32.
The micro-kernel computes two panels of MR = 16 rows by NR = 32 columns, in four tiles. The weight is stored once as the
stream of tiles in which it is read:

    block n   NR = 32 columns, all rows of the weight; a thread computes whole blocks
        step k   KU = 32 rows of the weight: one tile for each 16 columns, together 2 KiB

While one block is multiplied, the next one is prefetched as four streams: a single stream does not saturate memory. The
epilogue of the sums before them runs at the same time, because the matrix unit and the vector units work in parallel.
Ops are run by program.py; README.md explains the names.
"""

from __future__ import annotations

import functools
import logging
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from headrace.model.kernels.epilogue import epilogue, epilogue_target
from headrace.model.kernels.gelu import GELU_CONSTANTS
from headrace.model.kernels.intrinsics import assembly, cast, prefetch
from headrace.model.kernels.isa import AMX, chosen
from headrace.model.kernels.memory import use_huge_pages
from headrace.model.kernels.ops import ARG, OP
from headrace.model.kernels.packed_weight import PackedWeight, pad_columns, padded, self_test, steps_of
from headrace.model.kernels.program import GemmBackend, MicroKernel

log = logging.getLogger("headrace.model")

#: Rows of x in a packed panel, which are those of a tile.
MR = 16
TILE_BYTES = 1024
#: Columns of a block, and rows of the weight in a step.
NR = 32
KU = 32
STEP_BYTES = 2 * TILE_BYTES
#: Rows of x that the micro-kernel multiplies at once.
TWO_PANELS = 2 * MR
#: Scratch memory of a thread: the sums of two calls of the micro-kernel, a spare row for the epilogue, and the tile
#: configuration that was in place before.
SUMS_BYTES = TWO_PANELS * NR * 4
SPARE, SAVED_CONFIG, SCRATCH_BYTES = 2 * SUMS_BYTES, 2 * SUMS_BYTES + 64, 2 * SUMS_BYTES + 128
#: MC, in bytes: rows of this size are multiplied by a block before the next block, because they stay in the L2 cache.
MC_BYTES = 3 * 2**18


class Bf16Weight(PackedWeight):
    """A weight [in, out] as tiles, bfloat16 [blocks, in/32, 2, 16, 16, 2]: block, step, tile, pair of rows, column, row
    of the pair.
    """

    #: Written in assembly (epilogue.py).
    activations: ClassVar = frozenset({"gelu_tanh"})

    @classmethod
    def of(cls, weight: Tensor, bias: Tensor | None, activation: str | None = None) -> Bf16Weight:
        """Pack a weight [in, out] and a bias [out]."""
        width, out = weight.shape
        blocks, steps = -(-out // NR), steps_of(width, KU)
        tiles = use_huge_pages(torch.empty(blocks, steps, 2, 16, 16, 2, dtype=weight.dtype))
        tiles.copy_(padded(weight, BF16_AMX).view(steps, 16, 2, blocks, 2, 16).permute(3, 0, 4, 1, 5, 2))
        return cls(BF16_AMX, tiles, torch.ones(0), pad_columns(bias, blocks * NR), bias, width, out, activation)

    @property
    def weight(self) -> Tensor:
        """The weight as it was given, [in, out]; a copy."""
        blocks, steps = self.packed.shape[:2]
        return self.packed.permute(1, 3, 5, 0, 2, 4).reshape(steps * KU, blocks * NR)[: self.width, : self.out]


@functools.cache
def bf16_amx_works(device: str, dtype: torch.dtype) -> bool:
    """Whether this backend can be used on this machine and passes its self-test. Compiles it.

    Where it cannot, torch's operators are used.
    """
    if device != "cpu" or dtype != torch.bfloat16 or not _permitted():
        return False
    try:
        return self_test(Bf16Weight.of, dtype, rtol=2.0**-8, atol=1e-3)
    except Exception as error:  # an optimization must never keep a model from running
        log.warning("matrix products use torch's operators, which are slower: %r", error)
        return False


def _permitted() -> bool:
    """Whether this process uses AMX: the CPU has it, Linux permits it, and HEADRACE_CPU_ISA does not rule it out."""
    return chosen().name == "amx"


#: Where the tile configuration is among the constants.
TILE_CONFIG = 128


def _constants() -> np.ndarray[Any, np.dtype[np.uint8]]:
    """The constants of GELU, then the tile configuration: eight tiles of 16 rows of 64 bytes."""
    config = np.zeros(64, np.uint8)
    config[0] = 1  # the palette; there is only this one
    config[16:32:2] = 64
    config[48:56] = MR
    padding = np.zeros(TILE_CONFIG - GELU_CONSTANTS.nbytes, np.uint8)
    return np.concatenate([GELU_CONSTANTS.view(np.uint8), padding, config])


def _pack() -> Any:
    """Build pack: a row of x into its tiles. A panel of 16 rows is stored tile by tile, one tile for each step."""
    import numba
    from numba import carray, types

    words, halves = (cast(types.int64, types.CPointer(kind)) for kind in (types.uint64, types.uint16))

    @numba.njit(error_model="numpy")
    def pack(program: Any, op: Any, row: int, source: int) -> None:
        steps, width = op[OP.k_steps], op[OP.width] if source != 0 else 0
        target, whole = carray(words(locate_row(program, op, row)), steps * 128), width // KU
        x = carray(words(source), whole * 8)
        for step in range(whole):
            for word in range(8):
                target[step * 128 + word] = x[step * 8 + word]
        for step in range(whole, steps):
            for word in range(8):
                target[step * 128 + word] = np.uint64(0)
        last = carray(halves(locate_row(program, op, row) + whole * TILE_BYTES), KU)
        for i in range(width - whole * KU):
            last[i] = carray(halves(source), width)[whole * KU + i]

    locate_row = packed_row()
    return pack


def packed_row() -> Any:
    """Build locate_row: where a row begins among the packed rows. Each following 64 bytes are 1 KiB further."""
    import numba

    @numba.njit(inline="always")
    def locate_row(program: Any, op: Any, row: int) -> Any:
        return program[ARG.packed_rows] + row // MR * op[OP.k_steps] * TILE_BYTES + row % MR * 64

    return locate_row


def tile_configuration() -> tuple[Any, Any]:
    """Build begin and end: configure the tiles, and restore the configuration that other users of the unit expect."""
    import numba
    from numba import carray, types

    configure, save = assembly("ldtilecfg ($0)", 1), assembly("sttilecfg ($0)", 1)
    release = assembly("tilerelease", 0)
    octets = cast(types.int64, types.CPointer(types.uint8))

    @numba.njit
    def begin(program: Any, scratch: int) -> None:
        save(scratch + SAVED_CONFIG)
        configure(program[ARG.constants] + TILE_CONFIG)

    @numba.njit
    def end(program: Any, scratch: int) -> None:  # noqa: ARG001
        if carray(octets(scratch + SAVED_CONFIG), 64)[0] == 0:
            release()
        else:
            configure(scratch + SAVED_CONFIG)

    return begin, end


def multiply_partition(*, int8: bool) -> Any:
    """Build multiply: all rows by one partition of the blocks, in bfloat16 or int8."""
    import numba

    mr = 0 if int8 else MR
    locate = epilogue_target(NR, bf16=True, mr=mr)
    finish = epilogue(NR, int8=int8, mr=mr)
    micro_kernel = _micro_kernel(int8, finish)

    @numba.njit(error_model="numpy")
    def multiply(program: Any, op: Any, next_op: Any, partition: int, scratch: int) -> None:
        steps, partitions, spare = op[OP.k_steps], program[ARG.partitions], scratch + SPARE
        first, last = op[OP.n_blocks] * partition // partitions, op[OP.n_blocks] * (partition + 1) // partitions
        block_bytes, count = steps * STEP_BYTES, (program[ARG.rows] + MR - 1) // MR * MR
        mc = max(TWO_PANELS, MC_BYTES // (steps * 64) // TWO_PANELS * TWO_PANELS)
        sums, other, pending = scratch, scratch + SUMS_BYTES, locate(program, op, scratch, 0, 0, 0)
        packed = op[OP.source] if op[OP.in_packed] != 0 else program[ARG.packed_rows]
        for start in range(0, count, mc):
            rows = min(count - start, mc)
            # Prefetch so many lines of each quarter of the next block in each step that the block is complete in time.
            lines = -(-8 // ((rows + TWO_PANELS - 1) // TWO_PANELS))
            for block in range(first, last):
                w = op[OP.weight] + block * block_bytes
                soon, quarter = w + block_bytes, block_bytes // 4
                if block + 1 == last:
                    quarter = next_op[OP.k_steps] * STEP_BYTES // 4
                    soon = next_op[OP.weight] + next_op[OP.n_blocks] * partition // partitions * quarter * 4
                wanted = quarter // 64 if start + mc >= count or (start == 0 and block + 1 < last) else 0
                for done in range(0, rows, TWO_PANELS):
                    row, skip = start + done, min(done // TWO_PANELS * steps * lines, wanted)
                    prefetched = soon + skip * 64, quarter, wanted - skip, lines
                    x = packed + row * steps * 64
                    micro_kernel(program, op, x, w, done + TWO_PANELS <= rows, prefetched, sums, pending, spare)
                    pending = locate(program, op, sums, row, min(TWO_PANELS, program[ARG.rows] - row), block)
                    sums, other = other, sums
        finish(program, pending, 0, TWO_PANELS, spare)

    return multiply


def _micro_kernel(int8: bool, finish: Any) -> Any:
    """Build micro_kernel: one or two panels of x by a block, into sums [32, NR].

    Between the tile instructions it prefetches lines of the next block and finishes the previous sums row by row.
    """
    import numba

    prefetch_line = prefetch()
    clear = assembly("\n".join(f"tilezero %tmm{i}" for i in range(4)), 0)
    # The T1 hint: tiles are read once, or much later again, so they should leave the L1 cache to the sums.
    load = [assembly(f"tileloaddt1 ($0,$1,1), %tmm{i}", 2) for i in range(4, 8)]
    load_upper_x, load_lower_x, load_left_w, load_right_w = load
    # Registers 0 to 3 hold sums, 4 and 5 rows of x, 6 and 7 columns of the weight.
    product = "tdpbssd" if int8 else "tdpbf16ps"
    upper = f"{product} %tmm6, %tmm4, %tmm0\n{product} %tmm7, %tmm4, %tmm1"
    lower = f"\n{product} %tmm6, %tmm5, %tmm2\n{product} %tmm7, %tmm5, %tmm3"
    multiply_one, multiply_two = assembly(upper, 0), assembly(upper + lower, 0)
    store_0, store_1, store_2, store_3 = (assembly(f"tilestored %tmm{i}, ($0,$1,1)", 2) for i in range(4))

    @numba.njit(error_model="numpy", forceinline=True)
    def micro_kernel(
        program: Any, op: Any, x: int, w: int, two: bool, prefetched: Any, sums: int, pending: Any, spare: int
    ) -> None:
        steps, (soon, quarter, left, lines) = op[OP.k_steps], prefetched
        rows = -(-TWO_PANELS // steps)
        clear()
        for step in range(steps):
            now = min(lines, left)
            left -= now
            for _ in range(now):
                prefetch_line(soon)
                prefetch_line(soon + quarter)
                prefetch_line(soon + 2 * quarter)
                prefetch_line(soon + 3 * quarter)
                soon += 64
            load_left_w(w, 64)
            load_right_w(w + TILE_BYTES, 64)
            load_upper_x(x, 64)
            if two:
                load_lower_x(x + steps * TILE_BYTES, 64)
                multiply_two()
            else:
                multiply_one()
            finish(program, pending, step * rows, rows, spare)
            x += TILE_BYTES
            w += STEP_BYTES
        store_0(sums, NR * 4)
        store_1(sums + 64, NR * 4)
        if two:
            store_2(sums + MR * NR * 4, NR * 4)
            store_3(sums + MR * NR * 4 + 64, NR * 4)

    return micro_kernel


def _build() -> MicroKernel:
    begin, end = tile_configuration()
    return MicroKernel(begin, end, _pack(), multiply_partition(int8=False))


BF16_AMX = GemmBackend(
    fingerprint="tiled",
    isa=AMX,
    dtype=torch.bfloat16,
    itemsize=2,
    ku=KU,
    nr=NR,
    mr=MR,
    scratch_bytes=SCRATCH_BYTES,
    packs_output=True,
    constants=_constants(),
    micro_kernel=_build,
)
