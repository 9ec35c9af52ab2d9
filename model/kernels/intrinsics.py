"""What compiled kernels are made of: torch's threads, addresses, memory asked for ahead, assembly, `exp`.

numba compiles Python functions to machine code; what Python has no words for is given to it here in LLVM's. numba is
imported when a kernel is first asked for: it takes half a second.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

#: Sums are taken in vectors, in an order that is fixed when they are compiled. NaN must stay NaN: it is how a broken
#: row is known, so that "nnan" and "ninf" are not among the liberties.
LIBERTIES = {"reassoc", "contract", "nsz", "arcp"}

#: `madvise`: back this memory with pages of 2 MiB.
MADV_HUGEPAGE = 14
PAGE = 4096

Numbers = np.ndarray[Any, np.dtype[np.int64]]


class Team:
    """The OpenMP threads that torch's own operators run in. Threads of another pool would fight with those, which wait
    for their next operator by spinning."""

    def __init__(self, runtime: str) -> None:
        from llvmlite import binding

        binding.load_library_permanently(runtime)  # so that compiled code finds `omp_get_thread_num`
        self._parallel = ctypes.CDLL(runtime).GOMP_parallel
        self._parallel.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint]
        self._parallel.restype = None

    def run(self, function: int, arguments: Numbers, threads: int) -> None:
        """Call a C function of one pointer, to `arguments`, once in each of so many threads."""
        self._parallel(function, arguments.ctypes.data, threads, 0)


@functools.cache
def team() -> Team:
    """torch's team. Raises RuntimeError or OSError where it cannot be had."""
    paths = {line.split()[-1] for line in Path("/proc/self/maps").read_text().splitlines() if "/lib" in line}
    found = sorted(path for path in paths if Path(path).name.startswith(("libgomp", "libiomp", "libomp")))
    ours = [path for path in found if "torch" in path]
    if not found:
        raise RuntimeError("torch has loaded no OpenMP runtime")
    return Team((ours or found)[0])


def use_huge_pages(tensor: Tensor) -> Tensor:
    """Ask for pages of 2 MiB under a tensor that nothing has been written to: memory is then read ahead further."""
    start, end = tensor.data_ptr(), tensor.data_ptr() + tensor.numel() * tensor.itemsize
    start = -(-start // PAGE) * PAGE
    if tensor.device.type == "cpu" and end - start >= 2**21:
        madvise = getattr(ctypes.CDLL(None), "madvise", None)
        if madvise is not None:  # where it fails nothing is lost but speed
            madvise(ctypes.c_void_p(start), ctypes.c_size_t((end - start) // PAGE * PAGE), ctypes.c_int(MADV_HUGEPAGE))
    return tensor


def team_functions() -> tuple[Any, Any]:
    """For compiled code: the number of this thread in its team, and how many there are."""
    from numba import types

    return (
        types.ExternalFunction("omp_get_thread_num", types.int32()),
        types.ExternalFunction("omp_get_num_threads", types.int32()),
    )


def cast(source: Any, target: Any) -> Any:
    """A function for compiled code that reads bits as those of another type, or a number as an address."""
    from numba import types
    from numba.extending import intrinsic

    how = "inttoptr" if isinstance(target, types.CPointer) else "bitcast"

    @intrinsic
    def function(_: Any, _value: Any) -> Any:
        def generate(context: Any, builder: Any, signature: Any, values: Any) -> Any:
            return getattr(builder, how)(values[0], context.get_value_type(signature.return_type))

        return target(source), generate

    return function


def prefetch() -> Any:
    """A function for compiled code that asks for a cache line before it is needed; any address may be named."""
    from llvmlite import ir
    from numba import types
    from numba.core import cgutils
    from numba.extending import intrinsic

    @intrinsic
    def fetch(_: Any, _address: Any) -> Any:
        def generate(context: Any, builder: Any, signature: Any, values: Any) -> Any:  # noqa: ARG001
            byte, word = ir.IntType(8).as_pointer(), ir.IntType(32)
            kind = ir.FunctionType(ir.VoidType(), [byte, word, word, word])
            function = cgutils.get_or_insert_function(builder.module, kind, "llvm.prefetch.p0")
            builder.call(function, [builder.inttoptr(values[0], byte), word(0), word(2), word(1)])
            return context.get_dummy_value()

        return types.void(types.int64), generate

    return fetch


def call() -> Any:
    """A function for compiled code that calls a C function of one pointer: its address, and the pointer."""
    from llvmlite import ir
    from numba import types
    from numba.extending import intrinsic

    @intrinsic
    def function(_: Any, _address: Any, _argument: Any) -> Any:
        def generate(context: Any, builder: Any, signature: Any, values: Any) -> Any:  # noqa: ARG001
            word = ir.IntType(64).as_pointer()
            kind = ir.FunctionType(ir.VoidType(), [word]).as_pointer()
            builder.call(builder.inttoptr(values[0], kind), [builder.inttoptr(values[1], word)])
            return context.get_dummy_value()

        return types.void(types.int64, types.int64), generate

    return function


def assembly(text: str, operands: int, changes: str = "") -> Callable[..., Any]:
    """A function for compiled code of so many int64 operands, $0 and on, that is these instructions (AT&T's order).

    `changes` names the registers they change, as LLVM does: "~{xmm0}"; "~{flags}" for those that arithmetic and
    comparisons set. Raises ValueError for "cc", which LLVM takes and does not heed.
    """
    from llvmlite import binding, ir
    from numba import types
    from numba.extending import intrinsic

    if "~{cc}" in changes:
        raise ValueError("flags are called ~{flags}")
    binding.initialize_native_asmparser()
    word = ir.IntType(64)
    constraints = ",".join(["r"] * operands + [part for part in (changes, "~{memory}") if part])

    def generate(context: Any, builder: Any, signature: Any, values: Any) -> Any:  # noqa: ARG001
        kind = ir.FunctionType(ir.VoidType(), [word] * operands)
        builder.call(ir.InlineAsm(kind, text, constraints, side_effect=True), values)
        return context.get_dummy_value()

    signature = types.void(*[types.int64] * operands)
    # numba counts the parameters, so there is one function for each number of them.
    typed: list[Callable[..., Any]] = [
        lambda _: (signature, generate),
        lambda _, a: (signature, generate),  # noqa: ARG005
        lambda _, a, b: (signature, generate),  # noqa: ARG005
        lambda _, a, b, c: (signature, generate),  # noqa: ARG005
        lambda _, a, b, c, d: (signature, generate),  # noqa: ARG005
        lambda _, a, b, c, d, e: (signature, generate),  # noqa: ARG005
        lambda _, a, b, c, d, e, f: (signature, generate),  # noqa: ARG005
    ]
    function: Callable[..., Any] = intrinsic(typed[operands])
    return function


def clean_up() -> Any:
    """For the end of code that has used assembly: lets go of the upper halves of registers, which the compiler would do
    had it used them itself. What is left in them slows other code, and is saved whenever threads change.
    """
    return assembly("vzeroupper", 0, ",".join(f"~{{xmm{i}}}" for i in range(16)))


def exponential() -> Any:
    """e**x for x up to 0, after Cephes (Moshier 1989), in a form that a compiler turns into vectors."""
    import numba
    from numba import types

    value = cast(types.uint32, types.float32)

    @numba.njit(inline="always", fastmath=LIBERTIES)
    def exp(x: Any) -> Any:
        x = max(x, np.float32(-87.0)) if x == x else x
        n = np.floor(x * np.float32(1.44269504088896341) + np.float32(0.5))
        r = x - n * np.float32(0.693359375) + n * np.float32(2.12194440e-4)
        p = np.float32(1.9875691500e-4)
        p = p * r + np.float32(1.3981999507e-3)
        p = p * r + np.float32(8.3334519073e-3)
        p = p * r + np.float32(4.1665795894e-2)
        p = p * r + np.float32(1.6666665459e-1)
        p = p * r + np.float32(5.0000001201e-1)
        return (p * r * r + r + np.float32(1)) * value(np.uint32((np.int32(n) + np.int32(127)) << np.int32(23)))

    return exp


def round_to_bfloat16() -> Any:
    """A float32 as the 16 bits of a bfloat16: rounded to the nearest, of two equally near to the even one."""
    import numba
    from numba import types

    bits = cast(types.float32, types.uint32)

    @numba.njit(inline="always")
    def rounded(x: Any) -> Any:
        raw = bits(x)
        nearest = (raw + np.uint32(0x7FFF) + ((raw >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)
        return np.uint16(nearest) if x == x else np.uint16(0x7FC0)

    return rounded
