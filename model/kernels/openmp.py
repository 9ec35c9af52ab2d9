"""The OpenMP threads in which torch runs its own operators.

Compiled kernels run in the same threads. A second thread pool would compete with torch's threads, which spin for a
while after each operator to wait for the next one.
"""

from __future__ import annotations

import ctypes
import functools
from pathlib import Path
from typing import Any

from headrace.model.kernels.intrinsics import Int64Array


class Team:
    """A team of OpenMP threads that runs compiled kernels."""

    def __init__(self, runtime: str) -> None:
        from llvmlite import binding

        binding.load_library_permanently(runtime)  # so that compiled code finds `omp_get_thread_num`
        self._parallel = ctypes.CDLL(runtime).GOMP_parallel
        self._parallel.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint]
        self._parallel.restype = None

    def run(self, function: int, arguments: Int64Array, threads: int) -> None:
        """Call the C function at this address, which takes a pointer to `arguments`, once in each of `threads`."""
        self._parallel(function, arguments.ctypes.data, threads, 0)


@functools.cache
def team() -> Team:
    """The team of the OpenMP runtime that torch has loaded.

    Raises:
        RuntimeError: torch has loaded no OpenMP runtime.
        OSError: the runtime cannot be opened, or /proc is missing.
    """
    paths = {line.split()[-1] for line in Path("/proc/self/maps").read_text().splitlines() if "/lib" in line}
    runtimes = sorted(path for path in paths if Path(path).name.startswith(("libgomp", "libiomp", "libomp")))
    of_torch = [path for path in runtimes if "torch" in path]
    if not runtimes:
        raise RuntimeError("torch has loaded no OpenMP runtime")
    return Team((of_torch or runtimes)[0])


def thread_functions() -> tuple[Any, Any]:
    """Two functions for compiled code: the number of this thread in its team, and the size of the team."""
    from numba import types

    return (
        types.ExternalFunction("omp_get_thread_num", types.int32()),
        types.ExternalFunction("omp_get_num_threads", types.int32()),
    )
