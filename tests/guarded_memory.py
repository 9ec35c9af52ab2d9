"""Memory between pages that must not be touched: a kernel that reads or writes past its end ends the process."""

from __future__ import annotations

import ctypes
import mmap
from typing import Any

import numpy as np
import torch
from torch import Tensor

PAGE = mmap.PAGESIZE
_libc = ctypes.CDLL(None, use_errno=True)
_libc.mprotect.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]


def guarded(tensor: Tensor, *, at_start: bool = False) -> Tensor:
    """A copy of a contiguous tensor that ends where a forbidden page begins, or begins where one ends."""
    size = tensor.numel() * tensor.itemsize
    pages = -(-size // PAGE) * PAGE
    area = mmap.mmap(-1, pages + 2 * PAGE)
    whole: Any = np.frombuffer(area, dtype=np.uint8)
    address = whole.ctypes.data
    for place in (address, address + PAGE + pages):
        if _libc.mprotect(place, PAGE, 0) != 0:
            raise OSError(ctypes.get_errno(), "mprotect")
    start = PAGE if at_start else PAGE + pages - size
    copy = torch.from_numpy(whole[start : start + size]).view(tensor.dtype).view(tensor.shape)
    return copy.copy_(tensor)
