"""The largest logit of each row and its token, on a CPU: torch's operator takes three to eight times as long."""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from headrace.model.kernels import object_cache
from headrace.model.kernels.intrinsics import cast
from headrace.model.kernels.object_cache import Kernel
from headrace.model.kernels.openmp import team, thread_functions

#: Elements of a row that are compared together. The largest is then looked for in the first part that contains it.
PART = 1024


class ArgmaxArguments(NamedTuple):
    """The arguments of the compiled function: int64 words; see `ops.py` for how they are used."""

    logits: int  # address
    row_bytes: int  # bytes from one row to the next
    rows: int
    width: int
    best: int  # address of the largest logits [rows]
    chosen: int  # address of their ids, int64 [rows]
    partitions: int  # into how many parts the rows are split: the number of threads


ARG_WORDS = len(ArgmaxArguments._fields)
#: The position of each word.
ARG = ArgmaxArguments(*range(ARG_WORDS))


def largest(logits: Tensor) -> tuple[Tensor, Tensor]:
    """[R, V] -> the largest of each row [R], NaN where there is one, and the lowest id that has it, LongTensor [R]."""
    kernel = _kernel(logits.dtype) if logits.device.type == "cpu" else None
    if kernel is None or logits.stride(1) != 1:
        best, chosen = logits.max(dim=-1)  # of equal logits the lowest id, as torch documents
        return best, chosen
    return _run(kernel, logits)


def _run(kernel: Kernel, logits: Tensor) -> tuple[Tensor, Tensor]:
    best, chosen = logits.new_empty(len(logits)), torch.empty(len(logits), dtype=torch.long)
    rows, width = logits.shape
    arguments = ArgmaxArguments(
        logits=logits.data_ptr(),
        row_bytes=logits.stride(0) * logits.itemsize,
        rows=rows,
        width=width,
        best=best.data_ptr(),
        chosen=chosen.data_ptr(),
        partitions=torch.get_num_threads(),
    )
    team().run(kernel.address, np.array(arguments, dtype=np.int64), arguments.partitions)
    return best, chosen


@functools.cache
def _kernel(dtype: torch.dtype) -> Kernel | None:
    """The kernel, compiled and self-tested; None where torch must be used."""
    if dtype not in (torch.float32, torch.bfloat16):
        return None
    bf16 = dtype == torch.bfloat16
    return object_cache.load_tested(
        f"argmax {'bf16' if bf16 else 'fp32'}",
        lambda: compile_argmax(bf16),
        lambda kernel: _self_test(kernel, dtype),
        "argmax uses torch's operator",
    )


def _self_test(kernel: Kernel, dtype: torch.dtype) -> bool:
    """Whether ties, -0 and NaN are handled as by torch."""
    logits = torch.randn(5, 3 * PART, generator=torch.Generator().manual_seed(0)).to(dtype)
    logits[1], logits[2, 7], logits[2, -1] = -0.0, 9, 9
    logits[1, 5] = 0.0
    logits[3, 2] = -float("nan")
    best, chosen = _run(kernel, logits)
    expected = logits.max(dim=-1)
    same = torch.equal(best.nan_to_num(77), expected.values.nan_to_num(77))
    return same and torch.equal(chosen[:3], expected.indices[:3])


def compile_argmax(bf16: bool) -> Any:
    """Compile a C function of one pointer to `ArgmaxArguments`; returns a `numba.cfunc`.

    Floating-point numbers are compared as integers with the same bits, those of negative numbers inverted, because
    LLVM can vectorise that.
    """
    import numba
    from numba import carray, types

    thread, threads = thread_functions()
    integer, integer_type = (np.int16, types.int16) if bf16 else (np.int32, types.int32)
    signed = cast(types.int64, types.CPointer(integer_type))
    int64s = cast(types.int64, types.CPointer(types.int64))
    shift, itemsize = integer(15 if bf16 else 31), 2 if bf16 else 4
    infinity, nan = (integer(0x7F80), integer(0x7FC0)) if bf16 else (integer(0x7F800000), integer(0x7FC00000))
    low = integer(-(2**15) if bf16 else -(2**31))

    @numba.njit(inline="always")
    def key(bits: Any) -> Any:
        turned = integer(bits ^ (integer(bits >> shift) & integer(~low)))
        return integer(0) if turned == integer(-1) else turned  # -0 counts as 0

    @numba.njit(error_model="numpy")
    def largest_of_part(at: int, count: int) -> Any:
        """The largest key, and the largest bits without the sign: those of NaN are above those of infinity."""
        x, top, above = carray(signed(at), count), low, integer(0)
        for i in range(count):
            turned, bare = key(x[i]), integer(x[i] & integer(~low))
            top = turned if turned > top else top
            above = bare if bare > above else above
        return top, above

    @numba.njit(error_model="numpy")
    def work(args: Any) -> None:
        rows, width, partitions = args[ARG.rows], args[ARG.width], args[ARG.partitions]
        best, chosen = carray(signed(args[ARG.best]), rows), carray(int64s(args[ARG.chosen]), rows)
        for partition in range(thread(), partitions, threads()):
            for row in range(rows * partition // partitions, rows * (partition + 1) // partitions):
                at = args[ARG.logits] + row * args[ARG.row_bytes]
                x = carray(signed(at), width)
                top, part, broken = low, 0, False
                for start in range(0, width, PART):
                    found, above = largest_of_part(at + start * itemsize, min(PART, width - start))
                    broken = broken or above > infinity
                    if start == 0 or found > top:
                        top, part = found, start
                place = part
                while key(x[place]) != top:
                    place += 1
                best[row], chosen[row] = nan if broken else x[place], place

    @numba.cfunc(types.void(types.CPointer(types.int64)), nopython=True)
    def kernel(arguments: Any) -> None:
        work(carray(arguments, ARG_WORDS))

    return kernel
