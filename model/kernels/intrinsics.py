"""Building blocks of compiled kernels: casts, pointers, prefetching, inline assembly.

numba compiles Python functions to machine code. The operations here have no Python equivalent, so each function builds
a numba intrinsic that emits LLVM IR. numba is imported inside the functions, because the import takes half a second.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

Int64Array = np.ndarray[Any, np.dtype[np.int64]]


def cast(source: Any, target: Any) -> Any:
    """A function for compiled code that reinterprets the bits of a value, or turns an address into a pointer."""
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
    """A function for compiled code that prefetches the cache line at an address; an invalid address is allowed."""
    from llvmlite import ir
    from numba import types
    from numba.core import cgutils
    from numba.extending import intrinsic

    @intrinsic
    def prefetch_line(_: Any, _address: Any) -> Any:
        def generate(context: Any, builder: Any, signature: Any, values: Any) -> Any:  # noqa: ARG001
            byte, word = ir.IntType(8).as_pointer(), ir.IntType(32)
            kind = ir.FunctionType(ir.VoidType(), [byte, word, word, word])
            function = cgutils.get_or_insert_function(builder.module, kind, "llvm.prefetch.p0")
            builder.call(function, [builder.inttoptr(values[0], byte), word(0), word(2), word(1)])
            return context.get_dummy_value()

        return types.void(types.int64), generate

    return prefetch_line


def call_pointer() -> Any:
    """A function for compiled code that calls a C function of one pointer, given its address and the pointer."""
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


def assembly(text: str, operands: int, clobbers: str = "") -> Callable[..., Any]:
    """A function for compiled code that executes these instructions (AT&T syntax).

    Args:
        operands: how many int64 parameters the function has; the instructions refer to them as $0, $1 and so on.
        clobbers: the registers that the instructions change, as LLVM writes them: "~{xmm0}", and "~{flags}" for the
            flags that arithmetic and comparisons set.

    Raises:
        ValueError: "~{cc}" is among the clobbers; LLVM accepts it and ignores it.
    """
    from llvmlite import binding, ir
    from numba import types
    from numba.extending import intrinsic

    if "~{cc}" in clobbers:
        raise ValueError("the clobber ~{cc} has no effect in LLVM; use ~{flags}")
    binding.initialize_native_asmparser()
    word = ir.IntType(64)
    constraints = ",".join(["r"] * operands + [part for part in (clobbers, "~{memory}") if part])

    def generate(context: Any, builder: Any, signature: Any, values: Any) -> Any:  # noqa: ARG001
        kind = ir.FunctionType(ir.VoidType(), [word] * operands)
        builder.call(ir.InlineAsm(kind, text, constraints, side_effect=True), values)
        return context.get_dummy_value()

    signature = types.void(*[types.int64] * operands)
    # numba inspects the number of parameters, so each number needs a function of its own.
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


def vzeroupper() -> Any:
    """A function for the end of code with inline assembly: it clears the upper halves of the vector registers.

    The compiler does this only after vector code of its own. Dirty upper halves slow other code down, and the kernel
    saves them at every context switch.
    """
    return assembly("vzeroupper", 0, ",".join(f"~{{xmm{i}}}" for i in range(16)))


#: Round to nearest, keep denormal numbers, raise no exceptions: the default of x86-64.
DEFAULT_MXCSR = 0x1F80


def entry_point(work: Any, words: int, architecture: str) -> Any:
    """A `numba.cfunc` of one pointer that calls `work` with an array of int64 words, under `float_environment`."""
    import numba
    from numba import carray, types

    enter, leave = float_environment(architecture)

    @numba.cfunc(types.void(types.CPointer(types.int64)), nopython=True)
    def kernel(arguments: Any) -> None:
        kept = enter()
        work(carray(arguments, words))
        leave(kept)

    return kernel


def float_environment(architecture: str) -> tuple[Any, Any]:
    """Two functions for compiled code: enter() -> kept sets this thread's default rules, and leave(kept) restores.

    A library that is built with -ffast-math, or `torch.set_flush_denormal`, lets threads flush denormal numbers to
    zero.
    Only x86-64 has such a state here; elsewhere the functions do nothing.
    """
    import numba
    from llvmlite import ir
    from numba import types
    from numba.core import cgutils
    from numba.extending import intrinsic

    if architecture != "x86_64":
        return numba.njit(lambda: 0), numba.njit(lambda _: None)
    word, byte = ir.IntType(32), ir.IntType(8).as_pointer()

    def call(builder: Any, name: str, place: Any) -> None:
        kind = ir.FunctionType(ir.VoidType(), [byte])
        function = cgutils.get_or_insert_function(builder.module, kind, f"llvm.x86.sse.{name}")
        builder.call(function, [builder.bitcast(place, byte)])

    @intrinsic
    def enter(_: Any) -> Any:
        def generate(context: Any, builder: Any, signature: Any, values: Any) -> Any:  # noqa: ARG001
            place = builder.alloca(word)
            call(builder, "stmxcsr", place)
            kept = builder.load(place)
            builder.store(word(DEFAULT_MXCSR), place)
            call(builder, "ldmxcsr", place)
            return kept

        return types.uint32(), generate

    @intrinsic
    def leave(_: Any, _kept: Any) -> Any:
        def generate(context: Any, builder: Any, signature: Any, values: Any) -> Any:  # noqa: ARG001
            place = builder.alloca(word)
            builder.store(values[0], place)
            call(builder, "ldmxcsr", place)
            return context.get_dummy_value()

        return types.void(types.uint32), generate

    return enter, leave
