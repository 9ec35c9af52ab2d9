"""Memory of large tensors: huge pages, and zeros that cost nothing until they are used."""

from __future__ import annotations

import ctypes
import math

import numpy as np
import torch
from torch import Tensor

#: `madvise`: back this memory with pages of 2 MiB.
MADV_HUGEPAGE = 14
PAGE_BYTES = 4096
HUGE_PAGE_BYTES = 2**21
#: Tensors begin at a multiple of this, as torch's do: a cache line.
LINE_BYTES = 64


def zeros(count: int, like: Tensor) -> Tensor:
    """Zeros [count, ...], of the type, the device and the other sizes of `like`.

    On a CPU the system makes them when they are used first, so a large tensor holds nobody up.

    Raises:
        MemoryError: there is not enough memory; on a GPU, torch's error.
    """
    shape = (count, *like.shape[1:])
    if like.device.type != "cpu" or 0 in shape:
        return like.new_zeros(shape)
    size = math.prod(shape) * like.itemsize
    memory = torch.from_numpy(np.zeros(size + LINE_BYTES, dtype=np.uint8))
    start = -memory.data_ptr() % LINE_BYTES
    return use_huge_pages(memory[start : start + size]).view(like.dtype).view(shape)


def use_huge_pages(tensor: Tensor) -> Tensor:
    """Request pages of 2 MiB for a tensor that has not been written to yet; returns the tensor.

    The hardware prefetcher stops at the end of a page, so larger pages are read faster.
    """
    start, end = tensor.data_ptr(), tensor.data_ptr() + tensor.numel() * tensor.itemsize
    start = -(-start // PAGE_BYTES) * PAGE_BYTES
    if tensor.device.type == "cpu" and end - start >= HUGE_PAGE_BYTES:
        madvise = getattr(ctypes.CDLL(None), "madvise", None)
        if madvise is not None:  # a failure costs nothing but speed
            length = (end - start) // PAGE_BYTES * PAGE_BYTES
            madvise(ctypes.c_void_p(start), ctypes.c_size_t(length), ctypes.c_int(MADV_HUGEPAGE))
    return tensor
