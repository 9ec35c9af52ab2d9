"""Products of a CPU that follow each other, run as one call: x @ weight + bias, each after a norm or onto a residual.

Between two calls from Python a core waits for code and data that the weights have pushed out of its caches, tens of
microseconds each time, while memory, which limits most steps, has nothing to do. So a call runs several products, and
each asks for the beginning of the next one's weight while it multiplies its own last block.

    table    one row of numbers for each product, see the fields below
    thread   packs its share of the rows, normed if asked for | waits | multiplies all rows by its blocks | waits | next

How a weight is stored, rows are packed and a block is multiplied depends on the type: see the `gemm_*` modules. All sum
a row's products in one order whatever the other rows are, so a row's bits do not depend on how many there are, nor on
the number of threads.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from headrace.model.kernels import object_cache as machine_code
from headrace.model.kernels.intrinsics import (
    LIBERTIES,
    Numbers,
    assembly,
    call,
    cast,
    clean_up,
    prefetch,
    round_to_bfloat16,
    team,
    team_functions,
)
from headrace.model.kernels.object_cache import Kernel

#: The fields of a product: addresses, 0 for what is not wanted, but for bytes between rows, the steps of a block, how
#: many blocks and columns there are, 1 for GELU, and the bits of a float64 for epsilon. READY is 1 where the rows at
#: SOURCE are packed, HAND_ON where those at OUT shall be, for the next product. Instead of a product, CALL is a C
#: function of one pointer that every thread calls with ARGUMENT.
FIELDS = 20
(
    SOURCE,
    SOURCE_ROW,
    NORM_WEIGHT,
    NORM_BIAS,
    EPSILON,
    NORMED,
    WEIGHT,
    STEPS,
    BLOCKS,
    BIASES,
    SCALES,
    RESIDUAL,
    OUT,
    OUT_ROW,
    COLUMNS,
    GELU,
    READY,
    HAND_ON,
    CALL,
    ARGUMENT,
) = range(FIELDS)
#: What all products of a call have in common.
TABLE, COUNT, ROWS, SHARES, OWN, OWN_BYTES, PACKED, ROW_SCALES, CONSTANTS = range(9)
#: Of a weight that comes after a call so much is asked for by each thread while it waits for the others.
ASKED_BYTES = 2**16


class Parts(NamedTuple):
    """What a type brings, as functions for compiled code; `h` holds the numbers of the call, `d` those of a product."""

    #: (h, own): before and after a thread's products.
    begin: Any
    end: Any
    #: (h, d, row, source): one row as it is multiplied; `source` is its address, 0 for a row that does not exist.
    pack: Any
    #: (h, d, after, share, own): all rows by a share of the blocks; `after` are the numbers of the next product.
    multiply: Any


@dataclass(frozen=True)
class Kind:
    """A way to multiply."""

    name: str
    #: The type of rows and results.
    dtype: torch.dtype
    #: The bytes of a number as it is multiplied, the rows of the weight in a step, the columns of a block.
    itemsize: int
    step: int
    block: int
    #: Rows are packed by so many.
    group: int
    #: What a thread has for itself, sums and what else is needed, before the room for a row; a multiple of 64.
    own_bytes: int
    #: Whether a result can be packed as it is finished: a row of a block is then what a step reads of it.
    hands_on: bool
    #: Numbers that the code reads.
    constants: np.ndarray[Any, np.dtype[Any]]
    parts: Callable[[], Parts]

    @functools.cached_property
    def kernel(self) -> Kernel:
        """Compiled when it is first asked for."""
        return machine_code.kernel(f"products {self.name}", lambda: _compiled(self))


@dataclass(frozen=True)
class Streamed:
    """A weight [in, out] in the order in which it is read, with its bias."""

    kind: Kind
    stream: Tensor  # blocks and steps are the first dimensions
    scales: Tensor  # float32, one for each column of each block, of whole numbers
    biases: Tensor  # float32, one for each column of each block, zero where there is none
    bias: Tensor | None  # [out]
    out: int
    gelu: bool

    @property
    def weight(self) -> Tensor:
        """The weight, [in, out]; a copy."""
        raise NotImplementedError

    @property
    def width(self) -> int:
        """Numbers of a row of x."""
        return self.stream.shape[1] * self.kind.step

    @functools.cached_property
    def numbers(self) -> list[int]:
        """Its row of a table, without what changes from call to call."""
        numbers = [0] * FIELDS
        numbers[WEIGHT], numbers[STEPS], numbers[BLOCKS] = self.stream.data_ptr(), *self.stream.shape[1::-1]
        numbers[BIASES], numbers[SCALES] = self.biases.data_ptr(), self.scales.data_ptr()
        numbers[COLUMNS], numbers[GELU] = self.out, self.gelu
        return numbers

    def check(self, x: Tensor) -> None:
        """Raise ValueError for rows of another width or type: what reads them goes by addresses."""
        if x.dim() != 2 or x.shape[1] != self.width or x.dtype != self.kind.dtype or x.device.type != "cpu":
            raise ValueError(f"rows are {x.dtype} {list(x.shape)}; they must be {self.kind.dtype} [M, {self.width}]")

    def __deepcopy__(self, _: dict[int, object]) -> Streamed:
        """Itself, for it never changes. A copy of `numbers` would hold addresses of the original."""
        return self

    def __call__(self, x: Tensor) -> Tensor:
        """[M, in] -> [M, out], with GELU (the tanh approximation) if asked for. Raises ValueError like `check`."""
        self.check(x)
        if x.stride(1) != 1:
            x = x.contiguous()
        out = x.new_empty(len(x), self.out)
        table = np.array([self.numbers], dtype=np.int64)
        table[0, [SOURCE, SOURCE_ROW]] = x.data_ptr(), x.stride(0) * x.itemsize
        table[0, [OUT, OUT_ROW]] = out.data_ptr(), out.stride(0) * x.itemsize
        Workspace(self.kind, len(x), self.width).run(table)
        return out


def padded(values: Tensor | None, count: int) -> Tensor:
    """float32 [count], zero beyond the values."""
    out = torch.zeros(count)
    if values is not None:
        out[: len(values)] = values
    return out


def right(
    of: Callable[[Tensor, Tensor | None, bool], Streamed], dtype: torch.dtype, *, rtol: float, atol: float
) -> bool:
    """Whether products come out as the formula has them, and a row's bits alone as among others; else RuntimeError."""
    generator = torch.Generator().manual_seed(0)
    weight, bias, x = (torch.randn(*s, generator=generator).to(dtype) for s in ((96, 80), (80,), (75, 96)))
    for gelu in (False, True):
        product = of(weight, bias, gelu)
        expected = torch.addmm(bias.double(), x.double(), weight.double())
        if gelu:
            expected = F.gelu(expected, approximate="tanh")
        found = product(x)
        if not torch.allclose(found.double(), expected, rtol=rtol, atol=atol):
            raise RuntimeError("they come out wrong")
        if not all(torch.equal(product(x[at : at + 1])[0], found[at]) for at in (0, 20, 50, 74)):
            raise RuntimeError("a row's bits depend on the others")
    return True


class Workspace:
    """Where the products of so many rows, of up to `width` numbers, keep what they need while they run."""

    def __init__(self, kind: Kind, rows: int, width: int) -> None:
        self._kernel, self._threads = kind.kernel, torch.get_num_threads()
        whole, own = -(-rows // kind.group) * kind.group, kind.own_bytes + -(-width // 16) * 64
        self._packed = torch.empty(whole * width * kind.itemsize, dtype=torch.uint8)
        self._own = torch.empty(self._threads * own, dtype=torch.uint8)
        self._scales = torch.empty(whole)
        addresses = self._packed.data_ptr(), self._scales.data_ptr(), kind.constants.ctypes.data
        self._numbers = np.array([0, 0, rows, self._threads, self._own.data_ptr(), own, *addresses], dtype=np.int64)

    def run(self, table: Numbers) -> None:
        """Run the products of a table, [products, FIELDS] end to end, one after the other."""
        self._numbers[TABLE], self._numbers[COUNT] = table.ctypes.data, len(table)
        team().run(self._kernel.address, self._numbers, self._threads)


def _compiled(kind: Kind) -> Any:
    """The products as a C function of one pointer, to the numbers of a `Workspace`."""
    import numba
    from numba import carray, types

    thread, threads = team_functions()
    barrier = types.ExternalFunction("GOMP_barrier", types.void())
    whole = cast(types.int64, types.CPointer(types.int64))
    begin, end, pack, multiply = kind.parts()
    clean = clean_up()
    run, fetch, line_bytes = call(), prefetch(), kind.step * kind.block * kind.itemsize
    norm, group = _norm(kind.dtype == torch.bfloat16, kind.step), kind.group
    row_at = kind.own_bytes

    @numba.njit(error_model="numpy")
    def take_in(h: Any, d: Any, share: int, own: int) -> None:
        """A share of the rows, as they are multiplied; up to a whole group, zeros beyond the last."""
        count = (h[ROWS] + group - 1) // group * group
        for row in range(count * share // h[SHARES], count * (share + 1) // h[SHARES]):
            source = d[SOURCE] + row * d[SOURCE_ROW]
            if row >= h[ROWS]:
                source = 0
            elif d[NORM_WEIGHT] != 0:
                source = norm(d, row, source, own + row_at)
            pack(h, d, row, source)

    @numba.njit(error_model="numpy")
    def ask(h: Any, d: Any, share: int) -> None:
        """Ask for the beginning of a share of a weight."""
        at = d[WEIGHT] + d[BLOCKS] * share // h[SHARES] * d[STEPS] * line_bytes
        for line in range(0, min(d[STEPS] * line_bytes, ASKED_BYTES), 64):
            fetch(at + line)

    @numba.njit(error_model="numpy")
    def work(h: Any) -> None:
        """What one thread of the team does: its share, or more than one share if the team is small."""
        own = h[OWN] + thread() * h[OWN_BYTES]
        begin(h, own)
        for product in range(h[COUNT]):
            d = carray(whole(h[TABLE] + product * FIELDS * 8), FIELDS)
            after = carray(whole(h[TABLE] + min(product + 1, h[COUNT] - 1) * FIELDS * 8), FIELDS)
            if d[CALL] != 0:
                run(d[CALL], d[ARGUMENT])
                ask(h, after, thread())
            else:
                if d[READY] == 0:
                    for share in range(thread(), h[SHARES], threads()):
                        take_in(h, d, share, own)
                    barrier()
                for share in range(thread(), h[SHARES], threads()):
                    multiply(h, d, after, share, own)
            barrier()
        end(h, own)
        clean()

    @numba.cfunc(types.void(types.CPointer(types.int64)), nopython=True)
    def kernel(arguments: Any) -> None:
        work(carray(arguments, 9))

    return kernel


def _norm(half: bool, step: int) -> Any:
    """Layer norm of a row: biased variance, epsilon inside the root. Gives the address of the result.

    The result is of the type of the row; a copy goes where NORMED says.
    """
    import numba
    from numba import carray, types

    numbers = cast(types.int64, types.CPointer(types.uint16 if half else types.float32))
    floats, real = cast(types.int64, types.CPointer(types.float32)), cast(types.int64, types.float64)
    value, rounded, size = cast(types.uint32, types.float32), round_to_bfloat16(), 2 if half else 4

    @numba.njit(inline="always")
    def read(x: Any) -> Any:
        return value(np.uint32(x) << np.uint32(16)) if half else x

    @numba.njit(inline="always")
    def store(x: Any) -> Any:
        return rounded(x) if half else x

    @numba.njit(fastmath=LIBERTIES, error_model="numpy")
    def moments(x: Any, width: int) -> Any:
        total = np.float32(0)
        for i in range(width):
            total += read(x[i])
        mean, squares = total / np.float32(width), np.float32(0)
        for i in range(width):
            squares += (read(x[i]) - mean) * (read(x[i]) - mean)
        return mean, squares / np.float32(width)

    @numba.njit(error_model="numpy")
    def norm(d: Any, row: int, source: int, target: int) -> int:
        width = d[STEPS] * step
        x, out = carray(numbers(source), width), carray(numbers(target), width)
        weight, bias = carray(floats(d[NORM_WEIGHT]), width), carray(floats(d[NORM_BIAS]), width)
        mean, variance = moments(x, width)
        scale = np.float32(1) / np.float32(np.sqrt(variance + np.float32(real(d[EPSILON]))))
        for i in range(width):
            out[i] = store((read(x[i]) - mean) * scale * weight[i] + bias[i])
        if d[NORMED] != 0:
            copy = carray(numbers(d[NORMED] + row * width * size), width)
            for i in range(width):
                copy[i] = out[i]
        return target

    return norm


def aimer(block: int, *, half: bool, group: int = 0) -> Any:
    """Where sums [rows, block] go, for `finisher`.

    aim(h, d, sums, start, rows, number): `sums` is their address, `start` the row of the first of them, `number` the
    block's. Results can be handed on, packed by so many rows as `group` says, unless that is 0; `start` is a multiple
    of it.
    """
    import numba

    size = 2 if half else 4

    @numba.njit(error_model="numpy", forceinline=True)
    def aim(h: Any, d: Any, sums: int, start: int, rows: int, number: int) -> Any:
        column = number * block
        place, apart, onto = start * d[OUT_ROW] + column * size, d[OUT_ROW], 0
        jump = apart * group
        if group and d[HAND_ON] != 0:
            apart, jump = block * size, d[BLOCKS] * group * block * size
            place = start // group * jump + number * group * apart
        if d[RESIDUAL] != 0:
            onto = d[RESIDUAL] - d[OUT]
        then = RESIDUAL if d[RESIDUAL] != 0 else GELU if d[GELU] != 0 else 0
        columns = min(block, d[COLUMNS] - column)
        biases, scales, of_rows = d[BIASES] + column * 4, d[SCALES] + column * 4, h[ROW_SCALES] + start * 4
        return sums, rows, columns, d[OUT] + place, apart, jump, onto, biases, scales, of_rows, then

    return aim


def finisher(block: int, *, half: bool, whole: bool, group: int = 0) -> Any:
    """Scales, bias, GELU or residual, and rounding of some rows of sums [rows, block] into the result.

    finish(h, due, first, count, staged): `due` is what `aim` gave (see `aimer`), and `staged` room for a row, for a
    last block that has fewer columns.
    """
    import numba
    from numba import carray, types

    numbers = cast(types.int64, types.CPointer(types.uint16 if half else types.float32))
    changes = ",".join(f"~{{xmm{i}}}" for i in range(12))
    text = ["\n".join(_finish_row(block // 16, half, whole, then)) for then in ("", "gelu", "residual")]
    plain, gelu, residual = (assembly(each, 6, changes) for each in text)

    @numba.njit(error_model="numpy", forceinline=True)
    def finish(h: Any, due: Any, first: int, count: int, staged: int) -> None:
        sums, rows, columns, begin, apart, jump, away, biases, scales, of_rows, then = due
        for row in range(first, min(first + count, rows)):
            place = begin + (row // group * jump + row % group * apart if group else row * apart)
            to, onto, line, of_row = place, place + away, sums + row * block * 4, of_rows + row * 4
            if columns < block:
                to = staged
                if then == RESIDUAL:
                    given, copy = carray(numbers(onto), columns), carray(numbers(staged), columns)
                    for i in range(columns):
                        copy[i] = given[i]
                    onto = staged
            if then == RESIDUAL:
                residual(line, to, biases, scales, of_row, onto)
            elif then == GELU:
                gelu(line, to, biases, scales, of_row, h[CONSTANTS])
            else:
                plain(line, to, biases, scales, of_row, 0)
            if columns < block:
                wanted, computed = carray(numbers(place), columns), carray(numbers(staged), columns)
                for i in range(columns):
                    wanted[i] = computed[i]

    return finish


def _finish_row(vectors: int, half: bool, whole: bool, then: str) -> list[str]:
    """Instructions that turn the sums at $0 into a row at $1, bias at $2; if `whole` with scales at $3 and $4.

    What comes after the bias has its address at $5: the numbers of GELU, or what the row is added to.
    """
    lines = []
    for i in range(vectors):
        x, at, spare = f"%zmm{i}", 64 * i, [f"%zmm{3 + 3 * i + j}" for j in range(3)]
        if whole:
            lines += [f"vcvtdq2ps {at}($0), {x}", f"vmulps {at}($3), {x}, {x}", f"vmulps ($4){{1to16}}, {x}, {x}"]
        else:
            lines += [f"vmovups {at}($0), {x}"]
        lines += [f"vaddps {at}($2), {x}, {x}"]
        if then == "gelu":
            lines += _gelu(x, *spare, exact=not half)
        elif then == "residual" and half:
            lines += [f"vpmovzxwd {at // 2}($5), {spare[0]}", f"vpslld $$16, {spare[0]}, {spare[0]}"]
            lines += [f"vaddps {spare[0]}, {x}, {x}"]
        elif then == "residual":
            lines += [f"vaddps {at}($5), {x}, {x}"]
    if half:
        return [*lines, "vcvtne2ps2bf16 %zmm0, %zmm1, %zmm0", "vmovups %zmm0, ($1)"]
    return [*lines, *(f"vmovups %zmm{i}, {64 * i}($1)" for i in range(vectors))]


#: GELU by tanh is x / (1 + 2**t) with t = x * (the first + the second * x**2), no less than the third: below it the
#: processor would take a hundred times as long for 2**t, and 1 + 2**t is 1 there anyway. The others are those of two
#: polynomials for 2**r, r from -1/2 to 1/2, from the highest power to the lowest, off by 3 in a million and by 2 in a
#: billion.
GELU_NUMBERS = np.array(
    [
        -2 * math.sqrt(2 / math.pi) / math.log(2),
        -2 * math.sqrt(2 / math.pi) / math.log(2) * 0.044715,
        -100.0,
        *(0.00958285293508711, 0.05590642482350801, 0.2402409861467386, 0.6931241933769179, 1.0),
        *(0.00015353361852507902, 0.0013398874432624655, 0.009618437358045436, 0.05550332471067313),
        *(0.24022647913623332, 0.6931472028551032, 1.0),
    ],
    np.float32,
)


def _gelu(x: str, t: str, n: str, power: str, *, exact: bool) -> list[str]:
    """x becomes GELU of x, off by little beside what bfloat16 holds, or float32 if `exact`; GELU_NUMBERS lie at $5.

    Written out, because what a compiler makes of it takes several times as long: as long as the product, in int8.
    """
    first, last = (32, 56) if exact else (12, 28)
    lines = [f"vmulps {x}, {x}, {t}", f"vbroadcastss 4($5), {n}", f"vfmadd213ps ($5){{1to16}}, {n}, {t}"]
    # Of a number and NaN the maximum is what is named first here: t.
    lines += [f"vmulps {x}, {t}, {t}", f"vbroadcastss 8($5), {n}", f"vmaxps {t}, {n}, {t}"]
    lines += [f"vrndscaleps $$0, {t}, {n}", f"vsubps {n}, {t}, {t}"]  # t is r from here
    lines += [f"vbroadcastss {first}($5), {power}"]
    lines += [f"vfmadd213ps {at}($5){{1to16}}, {t}, {power}" for at in range(first + 4, last + 4, 4)]
    lines += [f"vscalefps {n}, {power}, {power}", f"vaddps {last}($5){{1to16}}, {power}, {power}"]
    if exact:
        return [*lines, f"vdivps {power}, {x}, {x}"]
    return [*lines, f"vrcp14ps {power}, {power}", f"vmulps {power}, {x}, {x}"]
