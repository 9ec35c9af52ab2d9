"""Products in bfloat16 on a CPU's matrix unit (Intel AMX), reading the weight at the speed of memory.

The unit multiplies tiles: 16 rows of x by 32 numbers, with 32 numbers by 16 columns of the weight, summed in float32.
The weight is stored once as the stream of tiles in which it is read:

    block n   32 columns, all of the weight's rows; a thread computes whole blocks
        step k   32 of the weight's rows: one tile for each 16 columns, 2 KiB together

A block is asked for while the one before it is multiplied, from four places at a time: one stream of requests does not
fill the way to memory. Meanwhile the sums before it are finished: the matrix unit and the vector units work side by
side. Products are run by model/kernels/program.py.
"""

from __future__ import annotations

import ctypes
import functools
import logging
import os
from typing import Any, ClassVar

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from headrace.model.kernels.intrinsics import assembly, cast, prefetch, use_huge_pages
from headrace.model.kernels.program import (
    BLOCKS,
    CONSTANTS,
    GELU_NUMBERS,
    PACKED,
    READY,
    ROWS,
    SHARES,
    SOURCE,
    STEPS,
    WEIGHT,
    Kind,
    Parts,
    Streamed,
    aimer,
    finisher,
    padded,
    right,
)

log = logging.getLogger("headrace.model")

#: Rows of x in a tile.
TILE = 16
TILE_BYTES = 1024
#: Columns of a block, and rows of the weight in a step of it.
BLOCK = 32
STEP_BYTES = 2 * TILE_BYTES
#: What a thread has for itself: the sums of two blocks, a row of a result, how the unit was set up before.
BLOCK_SUMS = BLOCK * BLOCK * 4
STAGED, BEFORE, OWN_BYTES = 2 * BLOCK_SUMS, 2 * BLOCK_SUMS + 64, 2 * BLOCK_SUMS + 128
#: As many rows as take so many bytes are multiplied with a block before the next one: they stay in the L2 cache.
PANEL_BYTES = 3 * 2**18
#: `arch_prctl` of Linux on x86-64: ask to use the tiles' registers; without it the first use ends the process.
SYS_ARCH_PRCTL, ARCH_REQ_XCOMP_PERM, XTILEDATA = 158, 0x1023, 18


class Tiled(Streamed):
    """A weight [in, out] as tiles, bfloat16 [blocks, in/32, 2, 16, 16, 2]: block, step, tile, pair of rows, column, row
    of the pair.
    """

    #: `in` is a multiple of it.
    step: ClassVar = BLOCK

    @classmethod
    def of(cls, weight: Tensor, bias: Tensor | None, gelu: bool) -> Tiled:
        """Take in a weight [in, out], `in` a multiple of 32, and a bias [out]."""
        width, out = weight.shape
        blocks, steps = -(-out // BLOCK), width // BLOCK
        tiles = use_huge_pages(torch.empty(blocks, steps, 2, 16, 16, 2, dtype=weight.dtype))
        whole = F.pad(weight, (0, blocks * BLOCK - out)) if out % BLOCK else weight
        tiles.copy_(whole.view(steps, 16, 2, blocks, 2, 16).permute(3, 0, 4, 1, 5, 2))
        return cls(TILES, tiles, torch.ones(0), padded(bias, blocks * BLOCK), bias, out, gelu)

    @property
    def weight(self) -> Tensor:
        """As it came, [in, out]; a copy."""
        blocks, steps = self.stream.shape[:2]
        return self.stream.permute(1, 3, 5, 0, 2, 4).reshape(steps * BLOCK, blocks * BLOCK)[:, : self.out]


@functools.cache
def tiles_work(device: str, dtype: torch.dtype) -> bool:
    """Whether this machine has the unit and lets this process use it, and what it gives is right. Compiles the code.

    Where it cannot be had, products are computed by torch.
    """
    if device != "cpu" or dtype != torch.bfloat16 or not _permitted():
        return False
    try:
        return right(Tiled.of, dtype, rtol=2.0**-8, atol=1e-3)
    except Exception as error:  # a speed-up must never be what keeps a model from running
        log.warning("products are computed by torch's operators, more slowly: %r", error)
        return False


def _permitted() -> bool:
    if os.uname().sysname != "Linux" or os.uname().machine != "x86_64":
        return False
    try:
        from llvmlite import binding

        if not {"amx-tile", "amx-bf16", "avx512bf16"} <= {f for f, on in binding.get_host_cpu_features().items() if on}:
            return False
        libc = ctypes.CDLL(None)
        return int(libc.syscall(SYS_ARCH_PRCTL, ARCH_REQ_XCOMP_PERM, XTILEDATA)) == 0
    except (ImportError, AttributeError, RuntimeError):  # no numba for this Python, or another LLVM
        return False


def _constants() -> np.ndarray[Any, np.dtype[np.uint8]]:
    """The numbers of GELU; then what the unit is told before it is used: eight tiles of 16 rows of 64 bytes."""
    shapes = np.zeros(64, np.uint8)
    shapes[0] = 1  # the only palette there is
    shapes[16:32:2] = 64
    shapes[48:56] = TILE
    return np.concatenate([GELU_NUMBERS.view(np.uint8), np.zeros(SHAPES - GELU_NUMBERS.nbytes, np.uint8), shapes])


#: Where the shapes lie among the constants.
SHAPES = 128


def _pack() -> Any:
    """A row of x into its tiles: those of 16 rows after those of 16 rows, step after step."""
    import numba
    from numba import carray, types

    words = cast(types.int64, types.CPointer(types.uint64))

    @numba.njit(error_model="numpy")
    def pack(h: Any, d: Any, row: int, source: int) -> None:
        steps = d[STEPS]
        target = carray(words(tile_row(h, d, row)), steps * 128)
        if source == 0:
            for step in range(steps):
                for word in range(8):
                    target[step * 128 + word] = np.uint64(0)
            return
        x = carray(words(source), steps * 8)
        for step in range(steps):
            for word in range(8):
                target[step * 128 + word] = x[step * 8 + word]

    tile_row = row_of_tiles()
    return pack


def row_of_tiles() -> Any:
    """Where a row begins among the packed rows; its next 64 bytes are 1 KiB further."""
    import numba

    @numba.njit(inline="always")
    def tile_row(h: Any, d: Any, row: int) -> Any:
        return h[PACKED] + row // TILE * d[STEPS] * TILE_BYTES + row % TILE * 64

    return tile_row


def set_up() -> tuple[Any, Any]:
    """What a thread does before and after it uses the unit; other users look whether it is set up as they left it."""
    import numba
    from numba import carray, types

    configure, save = assembly("ldtilecfg ($0)", 1), assembly("sttilecfg ($0)", 1)
    release = assembly("tilerelease", 0)
    octets = cast(types.int64, types.CPointer(types.uint8))

    @numba.njit
    def begin(h: Any, own: int) -> None:
        save(own + BEFORE)
        configure(h[CONSTANTS] + SHAPES)

    @numba.njit
    def end(h: Any, own: int) -> None:  # noqa: ARG001
        if carray(octets(own + BEFORE), 64)[0] == 0:
            release()
        else:
            configure(own + BEFORE)

    return begin, end


def multiplier(*, whole: bool) -> Any:
    """All rows by a share of the blocks, in bfloat16, or of int8 if `whole`."""
    import numba

    group = 0 if whole else TILE
    aim, finish = aimer(BLOCK, half=True, group=group), finisher(BLOCK, half=True, whole=whole, group=group)
    multiply = _multiply(whole, finish)

    @numba.njit(error_model="numpy")
    def multiply_share(h: Any, d: Any, after: Any, share: int, own: int) -> None:
        steps, shares, staged = d[STEPS], h[SHARES], own + STAGED
        first, last = d[BLOCKS] * share // shares, d[BLOCKS] * (share + 1) // shares
        size, count = steps * STEP_BYTES, (h[ROWS] + TILE - 1) // TILE * TILE
        panel = max(BLOCK, PANEL_BYTES // (steps * 64) // BLOCK * BLOCK)
        sums, other, due = own, own + BLOCK_SUMS, aim(h, d, own, 0, 0, 0)
        packed = d[SOURCE] if d[READY] != 0 else h[PACKED]
        for start in range(0, count, panel):
            rows = min(count - start, panel)
            # Of the next block so many lines from each quarter in each step that all are there at the end.
            ahead = -(-8 // ((rows + BLOCK - 1) // BLOCK))
            for block in range(first, last):
                w = d[WEIGHT] + block * size
                soon, quarter = w + size, size // 4
                if block + 1 == last:
                    quarter = after[STEPS] * STEP_BYTES // 4
                    soon = after[WEIGHT] + after[BLOCKS] * share // shares * quarter * 4
                wanted = quarter // 64 if start + panel >= count or (start == 0 and block + 1 < last) else 0
                for done in range(0, rows, BLOCK):
                    row, skip = start + done, min(done // BLOCK * steps * ahead, wanted)
                    next_ = soon + skip * 64, quarter, wanted - skip, ahead
                    x = packed + row * steps * 64
                    multiply(h, d, x, w, done + BLOCK <= rows, next_, sums, due, staged)
                    due = aim(h, d, sums, row, min(BLOCK, h[ROWS] - row), block)
                    sums, other = other, sums
        finish(h, due, 0, BLOCK, staged)

    return multiply_share


def _multiply(whole: bool, finish: Any) -> Any:
    """32 rows of x, or 16, by a block, into sums [32, 32].

    Meanwhile it asks for lines of the next block, and finishes the sums before, row by row.
    """
    import numba

    fetch = prefetch()
    clear = assembly("\n".join(f"tilezero %tmm{i}" for i in range(4)), 0)
    # T1: read once, or again only after much else; so they leave the L1 cache to the sums.
    load = [assembly(f"tileloaddt1 ($0,$1,1), %tmm{i}", 2) for i in range(4, 8)]
    upper_x, lower_x, left_w, right_w = load
    # Registers 0 to 3 hold sums, 4 and 5 rows of x, 6 and 7 columns of the weight.
    product = "tdpbssd" if whole else "tdpbf16ps"
    above = f"{product} %tmm6, %tmm4, %tmm0\n{product} %tmm7, %tmm4, %tmm1"
    below = f"\n{product} %tmm6, %tmm5, %tmm2\n{product} %tmm7, %tmm5, %tmm3"
    multiply_one, multiply_two = assembly(above, 0), assembly(above + below, 0)
    store_0, store_1, store_2, store_3 = (assembly(f"tilestored %tmm{i}, ($0,$1,1)", 2) for i in range(4))

    @numba.njit(error_model="numpy", forceinline=True)
    def multiply(h: Any, d: Any, x: int, w: int, two: bool, next_: Any, sums: int, due: Any, staged: int) -> None:
        steps, (soon, quarter, left, ahead) = d[STEPS], next_
        rows = -(-BLOCK // steps)
        clear()
        for step in range(steps):
            now = min(ahead, left)
            left -= now
            for _ in range(now):
                fetch(soon)
                fetch(soon + quarter)
                fetch(soon + 2 * quarter)
                fetch(soon + 3 * quarter)
                soon += 64
            left_w(w, 64)
            right_w(w + TILE_BYTES, 64)
            upper_x(x, 64)
            if two:
                lower_x(x + steps * TILE_BYTES, 64)
                multiply_two()
            else:
                multiply_one()
            finish(h, due, step * rows, rows, staged)
            x += TILE_BYTES
            w += STEP_BYTES
        store_0(sums, BLOCK * 4)
        store_1(sums + 64, BLOCK * 4)
        if two:
            store_2(sums + TILE * BLOCK * 4, BLOCK * 4)
            store_3(sums + TILE * BLOCK * 4 + 64, BLOCK * 4)

    return multiply


def _parts() -> Parts:
    begin, end = set_up()
    return Parts(begin, end, _pack(), multiplier(whole=False))


TILES = Kind("bfloat16", torch.bfloat16, 2, BLOCK, BLOCK, TILE, OWN_BYTES, True, _constants(), _parts)
