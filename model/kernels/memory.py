"""Huge pages under tensors that are streamed from memory."""

from __future__ import annotations

import ctypes

from torch import Tensor

#: `madvise`: back this memory with pages of 2 MiB.
MADV_HUGEPAGE = 14
PAGE_BYTES = 4096
HUGE_PAGE_BYTES = 2**21


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
