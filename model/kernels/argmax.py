"""The largest logit of each row and its token, on a CPU: torch's operator takes three to eight times as long."""

from __future__ import annotations

import functools
import logging
from typing import Any

import numpy as np
import torch
from torch import Tensor

from headrace.model.kernels import object_cache as machine_code
from headrace.model.kernels.intrinsics import cast, team, team_functions
from headrace.model.kernels.object_cache import Kernel

log = logging.getLogger("headrace.model")

#: Numbers of a row that are looked at together; the largest is then looked for in the first part that has it.
PART = 1024


def largest(logits: Tensor) -> tuple[Tensor, Tensor]:
    """[R, V] -> the largest of each row [R], NaN where there is one, and the lowest id that has it, LongTensor [R]."""
    kernel = _kernel(logits.dtype) if logits.device.type == "cpu" else None
    if kernel is None or logits.stride(1) != 1:
        best, chosen = logits.max(dim=-1)  # of equal logits the lowest id, as torch documents
        return best, chosen
    return _run(kernel, logits)


def _run(kernel: Kernel, logits: Tensor) -> tuple[Tensor, Tensor]:
    best, chosen = logits.new_empty(len(logits)), torch.empty(len(logits), dtype=torch.long)
    threads = torch.get_num_threads()
    numbers = [logits.data_ptr(), logits.stride(0) * logits.itemsize, *logits.shape, best.data_ptr()]
    team().run(kernel.address, np.array([*numbers, chosen.data_ptr(), threads], dtype=np.int64), threads)
    return best, chosen


@functools.cache
def _kernel(dtype: torch.dtype) -> Kernel | None:
    """Compiled and tried out; None where that cannot be done."""
    if dtype not in (torch.float32, torch.bfloat16):
        return None
    try:
        half = dtype == torch.bfloat16
        kernel = machine_code.kernel(f"largest {half}", lambda: _compiled(half))
        if not _right(kernel, dtype):
            raise RuntimeError("it finds others than torch")
    except Exception as error:  # a speed-up must never be what keeps a model from running
        log.warning("the largest logits are found by torch's operator, more slowly: %r", error)
        return None
    return kernel


def _right(kernel: Kernel, dtype: torch.dtype) -> bool:
    logits = torch.randn(5, 3 * PART, generator=torch.Generator().manual_seed(0)).to(dtype)
    logits[1], logits[2, 7], logits[2, -1] = -0.0, 9, 9
    logits[1, 5] = 0.0
    logits[3, 2] = -float("nan")
    best, chosen = _run(kernel, logits)
    expected = logits.max(dim=-1)
    same = torch.equal(best.nan_to_num(77), expected.values.nan_to_num(77))
    return same and torch.equal(chosen[:3], expected.indices[:3])


def _compiled(half: bool) -> Any:
    """The search as a C function of one pointer, to the int64 numbers that `_run` packs.

    Numbers are compared as whole ones of the same bits, those below zero turned around: so it is done in vectors.
    """
    import numba
    from numba import carray, types

    thread, threads = team_functions()
    number, long = (np.int16, types.int16) if half else (np.int32, types.int32), types.int64
    signed = cast(types.int64, types.CPointer(number[1]))
    whole = cast(types.int64, types.CPointer(long))
    kind, shift = number[0], number[0](15 if half else 31)
    size, infinity, nan = (2, kind(0x7F80), kind(0x7FC0)) if half else (4, kind(0x7F800000), kind(0x7FC00000))
    low = kind(-(2**15) if half else -(2**31))

    @numba.njit(inline="always")
    def key(bits: Any) -> Any:
        turned = kind(bits ^ (kind(bits >> shift) & kind(~low)))
        return kind(0) if turned == kind(-1) else turned  # that is -0, which is 0

    @numba.njit(error_model="numpy")
    def of_part(at: int, count: int) -> Any:
        """The largest key, and the largest bits without the sign: those of NaN are above infinity's."""
        x, top, above = carray(signed(at), count), low, kind(0)
        for i in range(count):
            turned, bare = key(x[i]), kind(x[i] & kind(~low))
            top = turned if turned > top else top
            above = bare if bare > above else above
        return top, above

    @numba.njit(error_model="numpy")
    def work(a: Any) -> None:
        rows, width, shares = a[2], a[3], a[6]
        best, chosen = carray(signed(a[4]), rows), carray(whole(a[5]), rows)
        for share in range(thread(), shares, threads()):
            for row in range(rows * share // shares, rows * (share + 1) // shares):
                x = carray(signed(a[0] + row * a[1]), width)
                top, part, broken = low, 0, False
                for start in range(0, width, PART):
                    found, above = of_part(a[0] + row * a[1] + start * size, min(PART, width - start))
                    broken = broken or above > infinity
                    if start == 0 or found > top:
                        top, part = found, start
                place = part
                while key(x[place]) != top:
                    place += 1
                best[row], chosen[row] = nan if broken else x[place], place

    @numba.cfunc(types.void(types.CPointer(types.int64)), nopython=True)
    def kernel(arguments: Any) -> None:
        work(carray(arguments, 7))

    return kernel
