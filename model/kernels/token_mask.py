"""Takes tokens out of rows of logits, by one bit for each token, in place."""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from headrace.model.kernels import object_cache
from headrace.model.kernels.intrinsics import cast, entry_point
from headrace.model.kernels.isa import architecture
from headrace.model.kernels.object_cache import Kernel
from headrace.model.kernels.openmp import team, thread_functions

#: Tokens of a word of a mask.
WORD_BITS = 32
Words = npt.NDArray[np.uint32]


class MaskArguments(NamedTuple):
    """The arguments of the compiled function: int64 words; see `ops.py` for how they are used."""

    logits: int  # address
    row_bytes: int  # bytes from one row to the next
    width: int
    rows: int  # address of the indices of the masked rows, int64
    masked: int  # number of masked rows
    masks: int  # address of the masks, uint32 [masked, words]
    words: int
    kept: int  # address of the table [256, 8] of `_kept`, of the size of a logit
    partitions: int  # into how many parts the rows are split: the number of threads


ARG_WORDS = len(MaskArguments._fields)
#: The position of each word.
ARG = MaskArguments(*range(ARG_WORDS))


def mask_rows(logits: Tensor, rows: list[int], masks: Words) -> None:
    """Set the logits of tokens that are not in the mask of their row to -inf, in place.

    Args:
        logits: [R, V].
        rows: indices of the rows that have a mask.
        masks: [len(rows), words]; bit i % 32 of word i // 32 says whether token i stays. There are at least V bits.
    """
    kernel = _kernel(logits.dtype) if logits.device.type == "cpu" else None
    if kernel is None or logits.stride(1) != 1:
        _with_torch(logits, rows, masks)
    else:
        _run(kernel, logits, rows, masks)


def _with_torch(logits: Tensor, rows: list[int], masks: Words) -> None:
    packed = torch.from_numpy(masks.view(np.uint8)).to(logits.device)
    bits = (packed[:, :, None] >> torch.arange(8, dtype=torch.uint8, device=logits.device)) & 1  # little-endian
    picked = torch.tensor(rows, device=logits.device)
    kept = bits.flatten(1)[:, : logits.shape[1]].bool()
    logits[picked] = logits[picked].masked_fill(~kept, float("-inf"))


def _run(kernel: Kernel, logits: Tensor, rows: list[int], masks: Words) -> None:
    indices = np.array(rows, dtype=np.int64)
    arguments = MaskArguments(
        logits=logits.data_ptr(),
        row_bytes=logits.stride(0) * logits.itemsize,
        width=logits.shape[1],
        rows=indices.ctypes.data,
        masked=len(rows),
        masks=masks.ctypes.data,
        words=masks.shape[1],
        kept=_kept(logits.dtype).ctypes.data,
        partitions=torch.get_num_threads(),
    )
    team().run(kernel.address, np.array(arguments, dtype=np.int64), arguments.partitions)


@functools.cache
def _kept(dtype: torch.dtype) -> npt.NDArray[Any]:
    """For each byte of a mask eight integers of the size of a logit: -1 where a token stays, else 0."""
    bits = np.unpackbits(np.arange(256, dtype=np.uint8)[:, None], axis=1, bitorder="little")
    kept: npt.NDArray[Any] = np.negative(bits, dtype=np.int16 if dtype == torch.bfloat16 else np.int32)
    return kept


@functools.cache
def _kernel(dtype: torch.dtype) -> Kernel | None:
    """The kernel, compiled and self-tested; None where torch must be used."""
    if dtype not in (torch.float32, torch.bfloat16):
        return None
    bf16 = dtype == torch.bfloat16
    return object_cache.load_tested(
        f"token mask {'bf16' if bf16 else 'fp32'}",
        lambda: compile_mask(bf16),
        lambda kernel: _self_test(kernel, dtype),
        "masks use torch's operators",
    )


def _self_test(kernel: Kernel, dtype: torch.dtype) -> bool:
    """Whether the logits are those that torch's operators give."""
    logits = torch.randn(3, 3 * WORD_BITS + 5, generator=torch.Generator().manual_seed(0)).to(dtype)
    expected = logits.clone()
    masks = np.array([[0, 2**32 - 1, 0x80000001, 21], [2**32 - 1, 5, 0, 2**32 - 1]], dtype=np.uint32)
    _run(kernel, logits, [2, 0], masks)
    _with_torch(expected, [2, 0], masks)
    return torch.equal(logits, expected)


def compile_mask(bf16: bool) -> Any:
    """Compile a C function of one pointer to `MaskArguments`; returns a `numba.cfunc`."""
    import numba
    from numba import carray, types

    thread, threads = thread_functions()
    integer, integer_type = (np.int16, types.int16) if bf16 else (np.int32, types.int32)
    elements = cast(types.int64, types.CPointer(integer_type))
    int64s, uint32s = (cast(types.int64, types.CPointer(kind)) for kind in (types.int64, types.uint32))
    itemsize = 2 if bf16 else 4
    every = np.uint32(2**32 - 1)
    removed = integer(-0x80 if bf16 else -0x800000)  # the bits of -inf

    @numba.njit(error_model="numpy")
    def mask_word(at: int, word: Any, kept: Any) -> None:
        """`kept` has for each byte of a mask eight numbers: all bits set where a token stays, else 0."""
        for byte in range(WORD_BITS // 8):
            x = carray(elements(at + byte * 8 * itemsize), 8)
            lanes = carray(elements(kept + ((word >> np.uint32(8 * byte)) & np.uint32(255)) * 8 * itemsize), 8)
            for i in range(8):
                x[i] = (x[i] & lanes[i]) | (removed & ~lanes[i])

    @numba.njit(error_model="numpy")
    def mask_row(at: int, width: int, mask: Any, kept: Any) -> None:
        x, whole = carray(elements(at), width), width // WORD_BITS
        for n in range(whole):
            word = mask[n]
            if word == np.uint32(0):
                for i in range(WORD_BITS):
                    x[n * WORD_BITS + i] = removed
            elif word != every:
                mask_word(at + n * WORD_BITS * itemsize, word, kept)
        for i in range(whole * WORD_BITS, width):
            if not (mask[whole] >> np.uint32(i - whole * WORD_BITS)) & np.uint32(1):
                x[i] = removed

    @numba.njit(error_model="numpy")
    def work(args: Any) -> None:
        width, count, partitions, words = args[ARG.width], args[ARG.masked], args[ARG.partitions], args[ARG.words]
        rows = carray(int64s(args[ARG.rows]), count)
        for partition in range(thread(), partitions, threads()):
            for n in range(count * partition // partitions, count * (partition + 1) // partitions):
                at = args[ARG.logits] + rows[n] * args[ARG.row_bytes]
                mask_row(at, width, carray(uint32s(args[ARG.masks] + n * words * 4), words), args[ARG.kept])

    return entry_point(work, ARG_WORDS, architecture())
