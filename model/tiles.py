"""x @ weight + bias in bfloat16 on a CPU's matrix unit (Intel AMX), reading the weight at the speed of memory.

The unit multiplies tiles: 16 rows of x by 32 numbers, with 32 numbers by 16 columns of the weight, summed in float32.
The weight is stored once as the stream of tiles in which it is read:

    block n   32 columns, all of the weight's rows; a thread computes whole blocks
        step k   32 of the weight's rows: one tile for each 16 columns, 2 KiB together

A block is asked for while the one before it is multiplied, from four places at a time: one stream of requests does not
fill the way to memory. A result is summed in the order of k whatever the other rows are, so a row's bits do not depend
on how many there are.
"""

from __future__ import annotations

import ctypes
import functools
import logging
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from model import machine_code
from model.machine_code import Kernel
from model.native import (
    assembly,
    cast,
    prefetch,
    team,
    team_functions,
    use_huge_pages,
)

log = logging.getLogger("millrace.model")

#: Rows of x in a tile; x is padded to a multiple of it.
TILE = 16
#: Columns of a block, and rows of the weight in a step of it.
BLOCK = 32
STEP_BYTES = BLOCK * BLOCK * 2
#: What a step reads of a row of x: 32 numbers of bfloat16, or 64 of int8.
ROW_BYTES = 64
#: What each thread writes for itself: the sums of a block, a row of its result, how the unit was set up before.
SCRATCH = BLOCK * BLOCK * 4 + 128
#: As many rows of x as take this many bytes are multiplied with a block before the next one: they stay in the L2 cache.
PANEL_BYTES = 3 * 2**18
#: `arch_prctl` of Linux on x86-64: ask to use the tiles' registers; without it the first use ends the process.
SYS_ARCH_PRCTL, ARCH_REQ_XCOMP_PERM, XTILEDATA = 158, 0x1023, 18


@dataclass(frozen=True)
class Tiled:
    """A weight [in, out] as tiles."""

    tiles: Tensor  # bfloat16 [blocks, in/32, 2, 16, 16, 2]: block, step, tile, pair of rows, column, row of the pair
    biases: Tensor  # float32 [blocks * 32], zero where there is none
    bias: Tensor | None  # [out]
    out: int
    gelu: bool

    @classmethod
    def of(cls, weight: Tensor, bias: Tensor | None, gelu: bool) -> Tiled:
        """Take in a weight [in, out], `in` a multiple of 32, and a bias [out]."""
        width, out = weight.shape
        blocks, steps = -(-out // BLOCK), width // BLOCK
        tiles = use_huge_pages(torch.empty(blocks, steps, 2, 16, 16, 2, dtype=weight.dtype))
        padded = F.pad(weight, (0, blocks * BLOCK - out)) if out % BLOCK else weight
        tiles.copy_(padded.view(steps, 16, 2, blocks, 2, 16).permute(3, 0, 4, 1, 5, 2))
        biases = torch.zeros(blocks * BLOCK)
        if bias is not None:
            biases[:out] = bias
        return cls(tiles, biases, bias, out, gelu)

    @property
    def weight(self) -> Tensor:
        """As it came, [in, out]; a copy."""
        blocks, steps = self.tiles.shape[:2]
        return self.tiles.permute(1, 3, 5, 0, 2, 4).reshape(steps * BLOCK, blocks * BLOCK)[:, : self.out]

    def __call__(self, x: Tensor) -> Tensor:
        """[M, in] -> [M, out], with GELU (the tanh approximation) if asked for."""
        count = len(x)
        if x.stride(1) != 1 or count % TILE:
            x = F.pad(x, (0, 0, 0, -count % TILE)).contiguous()
        out = x.new_empty(count, self.out)
        multiply(x, self.tiles, self.biases, out, self.gelu)
        return out


def multiply(x: Tensor, tiles: Tensor, biases: Tensor, out: Tensor, gelu: bool, scales: Sequence[Tensor] = ()) -> None:
    """Write x @ weight + bias into `out`, with GELU if asked for.

    Args:
        x: bfloat16 or int8 [M, in], M a multiple of 16, any distance between rows.
        tiles: the weight, in the type of x; blocks and steps are its first dimensions.
        biases: float32, one for each column of each block.
        out: bfloat16 [up to M, out]; rows of x beyond its end are not written.
        scales: with int8, float32: what a row's whole numbers are to be multiplied by [M], and a column's [out].
    """
    blocks, steps = tiles.shape[:2]
    panel = max(BLOCK, PANEL_BYTES // (steps * ROW_BYTES) // BLOCK * BLOCK)
    threads = torch.get_num_threads()
    numbers = [x.data_ptr(), x.stride(0) * x.itemsize, len(x), tiles.data_ptr(), steps, blocks, biases.data_ptr()]
    numbers += [out.data_ptr(), out.shape[1], len(out), panel, threads, SHAPES.ctypes.data, gelu]
    scratch = np.empty((threads, SCRATCH), np.uint8)
    numbers += [*([scale.data_ptr() for scale in scales] or [0, 0]), GELU_NUMBERS.ctypes.data, scratch.ctypes.data]
    team().run(_kernel(x.dtype == torch.int8).address, np.array(numbers, dtype=np.int64), threads)


@functools.cache
def tiles_work(device: str, dtype: torch.dtype) -> bool:
    """Whether this machine has the unit and lets this process use it, and what it gives is right. Compiles the kernel.

    Where it cannot be had, products are computed by torch.
    """
    if device != "cpu" or dtype != torch.bfloat16 or not _permitted():
        return False
    try:
        return _right()
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


def _right() -> bool:
    """Whether products come out as the formula has them, and a row's bits alone as among others."""
    generator = torch.Generator().manual_seed(0)
    weight, bias, x = (torch.randn(*s, generator=generator).bfloat16() for s in ((96, 80), (80,), (75, 96)))
    for gelu in (False, True):
        product = Tiled.of(weight, bias, gelu)
        expected = torch.addmm(bias.double(), x.double(), weight.double())
        if gelu:
            expected = F.gelu(expected, approximate="tanh")
        found = product(x)
        if not torch.allclose(found.double(), expected, rtol=2.0**-8, atol=1e-3):
            raise RuntimeError("they come out wrong")
        if not all(torch.equal(product(x[at : at + 1])[0], found[at]) for at in (0, 20, 50, 74)):
            raise RuntimeError("a row's bits depend on the others")
    return True


def _shapes() -> np.ndarray[Any, np.dtype[np.uint8]]:
    """What the unit is told before it is used: eight tiles of 16 rows of 64 bytes."""
    shapes = np.zeros(64, np.uint8)
    shapes[0] = 1  # the only palette there is
    shapes[16:32:2] = 64
    shapes[48:56] = TILE
    return shapes


SHAPES = _shapes()


@functools.cache
def _kernel(whole: bool) -> Kernel:
    return machine_code.kernel(f"product {whole}", lambda: _compiled(whole))


def _compiled(whole: bool) -> Any:
    """The product as a C function of one pointer, to the int64 numbers that `multiply` packs; of int8 if `whole`."""
    import numba
    from llvmlite import binding
    from numba import carray, types

    binding.initialize_native_asmparser()
    configure, saved_shapes = assembly("ldtilecfg ($0)", 1), assembly("sttilecfg ($0)", 1)
    release = assembly("tilerelease", 0)
    thread, threads = team_functions()
    multiply, finish = _multiply(whole), _finish(whole)
    octets = cast(types.int64, types.CPointer(types.uint8))

    @numba.njit(error_model="numpy")
    def work(a: Any) -> None:
        """What one thread of the team does: its share of the blocks, or more than one share if the team is small."""
        x, x_row, count, tiles, steps, blocks, biases = a[0], a[1], a[2], a[3], a[4], a[5], a[6]
        out, width, real, panel, shares, shapes = a[7], a[8], a[9], a[10], a[11], a[12]
        sums = a[17] + thread() * SCRATCH
        staged, before = sums + BLOCK * BLOCK * 4, sums + BLOCK * BLOCK * 4 + 64
        saved_shapes(before)  # other users of the unit look whether it is set up as they left it
        configure(shapes)
        for share in range(thread(), shares, threads()):
            for start in range(0, count, panel):
                rows = min(count - start, panel)
                for block in range(blocks * share // shares, blocks * (share + 1) // shares):
                    # Of the next block so many lines from each quarter in each step that all are there at the end.
                    ahead = -(-8 // ((rows + BLOCK - 1) // BLOCK)) if start == 0 else 0
                    first = tiles + block * steps * STEP_BYTES
                    for done in range(0, rows, BLOCK):
                        row = start + done
                        two = done + BLOCK <= rows
                        skip = min(done // BLOCK * steps * ahead, steps * 8)
                        multiply(x + row * x_row, x_row, first, steps, ahead, skip, two, sums)
                        place = out + (row * width + block * BLOCK) * 2
                        columns, left = min(BLOCK, width - block * BLOCK), min(BLOCK if two else TILE, real - row)
                        column = block * BLOCK * 4
                        places = biases + column, a[15] + column, a[14] + row * 4, a[16], staged
                        finish(sums, places, place, width, left, columns, a[13])
        if carray(octets(before), 64)[0] == 0:
            release()
        else:
            configure(before)

    @numba.cfunc(types.void(types.CPointer(types.int64)), nopython=True)
    def kernel(arguments: Any) -> None:
        work(carray(arguments, 18))

    return kernel


def _multiply(whole: bool) -> Any:
    """32 rows of x, or 16, by a block, into sums [32, 32]; asks for lines of the next block meanwhile."""
    import numba

    fetch = prefetch()
    clear = assembly("\n".join(f"tilezero %tmm{i}" for i in range(4)), 0)
    load = [assembly(f"tileloadd ($0,$1,1), %tmm{i}", 2) for i in range(4, 8)]
    upper_x, lower_x, left_w, right_w = load
    # Registers 0 to 3 hold sums, 4 and 5 rows of x, 6 and 7 columns of the weight.
    product = "tdpbssd" if whole else "tdpbf16ps"
    above = f"{product} %tmm6, %tmm4, %tmm0\n{product} %tmm7, %tmm4, %tmm1"
    below = f"\n{product} %tmm6, %tmm5, %tmm2\n{product} %tmm7, %tmm5, %tmm3"
    multiply_one, multiply_two = assembly(above, 0), assembly(above + below, 0)
    store_0, store_1, store_2, store_3 = (assembly(f"tilestored %tmm{i}, ($0,$1,1)", 2) for i in range(4))

    @numba.njit
    def multiply(x: int, x_row: int, w: int, steps: int, ahead: int, skip: int, two: bool, sums: int) -> None:
        quarter = steps * STEP_BYTES // 4
        soon, left = w + steps * STEP_BYTES + skip * 64, steps * 8 - skip
        clear()
        for _ in range(steps):
            now = min(ahead, left)
            left -= now
            for _ in range(now):
                fetch(soon)
                fetch(soon + quarter)
                fetch(soon + 2 * quarter)
                fetch(soon + 3 * quarter)
                soon += 64
            left_w(w, 64)
            right_w(w + STEP_BYTES // 2, 64)
            upper_x(x, x_row)
            if two:
                lower_x(x + TILE * x_row, x_row)
                multiply_two()
            else:
                multiply_one()
            x += ROW_BYTES
            w += STEP_BYTES
        store_0(sums, BLOCK * 4)
        store_1(sums + 64, BLOCK * 4)
        if two:
            store_2(sums + TILE * BLOCK * 4, BLOCK * 4)
            store_3(sums + TILE * BLOCK * 4 + 64, BLOCK * 4)

    return multiply


def _finish(whole: bool) -> Any:
    """Scales, bias, GELU, and rounding of sums [32, 32] into rows of the result; a block may have fewer columns."""
    import numba
    from numba import carray, types

    halves = cast(types.int64, types.CPointer(types.uint16))
    registers = ",".join(f"~{{xmm{i}}}" for i in range(8))
    plain_row, gelu_row = (assembly(_finish_row(whole, gelu), 6, registers) for gelu in (False, True))

    @numba.njit
    def finish(sums: int, places: Any, out: int, width: int, rows: int, columns: int, gelu: int) -> None:
        biases, of_columns, of_rows, numbers, staged = places
        for row in range(rows):
            place = out + row * width * 2
            to = place if columns == BLOCK else staged
            if gelu:
                gelu_row(sums + row * BLOCK * 4, to, biases, of_columns, of_rows + row * 4, numbers)
            else:
                plain_row(sums + row * BLOCK * 4, to, biases, of_columns, of_rows + row * 4, numbers)
            if columns < BLOCK:
                wanted, computed = carray(halves(place), columns), carray(halves(staged), columns)
                for column in range(columns):
                    wanted[column] = computed[column]

    return finish


#: GELU by tanh is x / (1 + 2**t) with t = x * (the first + the second * x**2). The others are those of a polynomial for
#: 2**r, r from -1/2 to 1/2, from the highest power to the lowest; it is off by 4 in a million.
GELU_NUMBERS = np.array(
    [
        -2 * math.sqrt(2 / math.pi) / math.log(2),
        -2 * math.sqrt(2 / math.pi) / math.log(2) * 0.044715,
        *(0.009666368515383477, 0.05592197584225006, 0.24022349038020416, 0.6931210452034274, 1.0),
    ],
    np.float32,
)


def _finish_row(whole: bool, gelu: bool) -> str:
    """Instructions that turn 32 sums at $0 into bfloat16 at $1: scales at $3 and $4 if `whole`, bias at $2, GELU."""
    lines = []
    for half in (0, 1):
        x, at = f"%zmm{half}", 64 * half
        if whole:
            lines += [f"vcvtdq2ps {at}($0), {x}", f"vmulps {at}($3), {x}, {x}", f"vmulps ($4){{1to16}}, {x}, {x}"]
        else:
            lines += [f"vmovups {at}($0), {x}"]
        lines += [f"vaddps {at}($2), {x}, {x}"]
        if gelu:
            lines += _gelu(x, *(f"%zmm{2 + half + 2 * i}" for i in range(3)))
    return "\n".join([*lines, "vcvtne2ps2bf16 %zmm0, %zmm1, %zmm0", "vmovups %zmm0, ($1)"])


def _gelu(x: str, t: str, n: str, power: str) -> list[str]:
    """x becomes GELU of x; the others are registers to work with. GELU_NUMBERS lie at $5.

    Written out, because what a compiler makes of it takes several times as long: as long as the product, in int8.
    """
    lines = [f"vmulps {x}, {x}, {t}", f"vbroadcastss 4($5), {n}", f"vfmadd213ps ($5){{1to16}}, {n}, {t}"]
    lines += [f"vmulps {x}, {t}, {t}", f"vrndscaleps $$0, {t}, {n}", f"vsubps {n}, {t}, {t}"]  # t is r from here
    lines += [f"vbroadcastss 8($5), {power}"]
    lines += [f"vfmadd213ps {at}($5){{1to16}}, {t}, {power}" for at in range(12, 28, 4)]
    lines += [f"vscalefps {n}, {power}, {power}", f"vaddps 24($5){{1to16}}, {power}, {power}"]
    return [*lines, f"vrcp14ps {power}, {power}", f"vmulps {power}, {x}, {x}"]
