"""Vectors of 16 float32 lanes, and functions of compiled code that use them, the same on every CPU.

A kernel is described once, as LLVM code on vectors of 16 lanes. LLVM keeps such a vector in one register of AVX-512,
two of AVX2 or four of NEON. Every operation is exact by IEEE 754 or has one written order, so the bits of a result do
not depend on the registers:

* `fma`, `add`, `subtract`, `multiply`, `divide`, `square_root` round once, to nearest, ties to even.
* A sum over an array has 16 partial sums: lane i adds the elements i, i + 16, ... Then `sum` adds lanes i and i + 8,
  i + 4, i + 2, i + 1.
* `nearest` and `power_of_two` are additions and shifts, not the processor's conversions.

LLVM neither reorders nor fuses these operations, because they have no fast-math flags. Denormal numbers are kept:
a thread of torch does not flush them by default, and the tests compare them on every instruction set.

vector_function.py makes functions of such code. Addresses are int64 and need no alignment beyond that of an element.
This module imports llvmlite, so import it only in functions that compile.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from llvmlite import ir

LANES = 16
INT64, INT32, INT16, FLOAT = ir.IntType(64), ir.IntType(32), ir.IntType(16), ir.FloatType()
VECTOR = ir.VectorType(FLOAT, LANES)
INTEGERS = ir.VectorType(INT32, LANES)
HALVES = ir.VectorType(INT16, LANES)
MASK = ir.VectorType(ir.IntType(1), LANES)
#: Added to a number between -2**22 and 2**22 it leaves the nearest integer, ties to even, in the lowest bits.
ROUNDER = 1.5 * 2.0**23
ROUNDER_BITS = 0x4B400000

Value = Any
"""A value of LLVM code: an address or a count (int64), a float32, or a vector."""


class VectorBuilder:
    """Writes LLVM code on vectors, one operation for each call."""

    def __init__(self, builder: Any) -> None:
        self.builder = builder

    # Memory

    def load(self, address: Value, offset: int = 0, kind: Any = VECTOR, alignment: int = 4) -> Value:
        """Read 16 float32, or another type."""
        load = self.builder.load(self._pointer(address, offset, kind), typ=kind)
        load.align = alignment
        return load

    def store(self, value: Value, address: Value, offset: int = 0, alignment: int = 4) -> None:
        """Write a value."""
        self.builder.store(value, self._pointer(address, offset, value.type)).align = alignment

    def load_first(self, address: Value, count: Value, kind: Any = VECTOR) -> Value:
        """Read the first `count` elements (1 to 15); the other lanes are 0. Memory behind them is not read."""
        takes, name = [kind.as_pointer(), INT32, MASK, kind], f"{_suffix(kind)}.p0"
        pointer, zeros = self._pointer(address, 0, kind), ir.Constant(kind, [0] * LANES)
        function = self._intrinsic("llvm.masked.load", kind, takes, name)
        return self.builder.call(function, [pointer, INT32(_itemsize(kind)), self.first(count), zeros])

    def store_first(self, value: Value, address: Value, count: Value) -> None:
        """Write the first `count` elements (1 to 15). Memory behind them is not written."""
        kind = value.type
        takes, name = [kind, kind.as_pointer(), INT32, MASK], f"{_suffix(kind)}.p0"
        function = self._intrinsic("llvm.masked.store", ir.VoidType(), takes, name)
        pointer = self._pointer(address, 0, kind)
        self.builder.call(function, [value, pointer, INT32(_itemsize(kind)), self.first(count)])

    def prefetch(self, address: Value, offset: int = 0) -> None:
        """Request a cache line for the L2 cache; an invalid address is allowed."""
        byte = ir.IntType(8).as_pointer()
        function = self._intrinsic("llvm.prefetch", ir.VoidType(), [byte, INT32, INT32, INT32], "p0")
        pointer = self.builder.inttoptr(self.plus(address, offset), byte)
        self.builder.call(function, [pointer, INT32(0), INT32(2), INT32(1)])

    # float32

    def constant(self, number: float) -> Value:
        """A vector of 16 times the float32 nearest to a number."""
        return ir.Constant(VECTOR, [ir.Constant(FLOAT, number)] * LANES)

    def broadcast(self, scalar: Value) -> Value:
        """A vector of 16 times the same float32."""
        undefined = ir.Constant(VECTOR, ir.Undefined)
        first = self.builder.insert_element(undefined, scalar, INT32(0))
        return self.builder.shuffle_vector(first, undefined, ir.Constant(INTEGERS, [0] * LANES))

    def fma(self, a: Value, b: Value, c: Value) -> Value:
        """a * b + c, rounded once."""
        return self.builder.call(self._intrinsic("llvm.fma", VECTOR, [VECTOR] * 3, _suffix(VECTOR)), [a, b, c])

    def add(self, a: Value, b: Value) -> Value:
        """The sum."""
        return self.builder.fadd(a, b)

    def subtract(self, a: Value, b: Value) -> Value:
        """The difference."""
        return self.builder.fsub(a, b)

    def multiply(self, a: Value, b: Value) -> Value:
        """The product."""
        return self.builder.fmul(a, b)

    def divide(self, a: Value, b: Value) -> Value:
        """The quotient."""
        return self.builder.fdiv(a, b)

    def square_root(self, a: Value) -> Value:
        """The square root."""
        return self.builder.call(self._intrinsic("llvm.sqrt", a.type, [a.type], _suffix(a.type)), [a])

    def maximum(self, a: Value, b: Value) -> Value:
        """The larger of two numbers in each lane; a NaN in `a` is kept, one in `b` is not."""
        return self.builder.select(self.builder.fcmp_ordered("<", a, b), b, a)

    def minimum(self, a: Value, b: Value) -> Value:
        """The smaller of two numbers in each lane; a NaN in `a` is kept, one in `b` is not."""
        return self.builder.select(self.builder.fcmp_ordered(">", a, b), b, a)

    def negative(self, a: Value) -> Value:
        """The number with the other sign."""
        return self.numbers(self.builder.xor(self.bits(a), self.integers(-(2**31))))

    def absolute(self, a: Value) -> Value:
        """The number without its sign."""
        return self.numbers(self.builder.and_(self.bits(a), self.integers(2**31 - 1)))

    def floor(self, a: Value) -> Value:
        """The largest integer that is not larger, as a float32."""
        return self.builder.call(self._intrinsic("llvm.floor", VECTOR, [VECTOR], _suffix(VECTOR)), [a])

    def nearest(self, a: Value) -> tuple[Value, Value]:
        """The nearest integer, ties to even, as a float32 and as an int32; `a` is between -2**22 and 2**22."""
        moved = self.add(a, self.constant(ROUNDER))
        number = self.builder.sub(self.bits(moved), self.integers(ROUNDER_BITS))
        return self.subtract(moved, self.constant(ROUNDER)), number

    def power_of_two(self, exponent: Value) -> Value:
        """2 to the power of an int32 from -126 to 127; infinity for 128."""
        biased = self.builder.add(exponent, self.integers(127))
        return self.numbers(self.builder.shl(biased, self.integers(23)))

    def scale(self, a: Value, exponent: Value) -> Value:
        """a * 2**exponent for an int32 from -252 to 254, by two exact factors; it may become infinity or denormal."""
        half = self.builder.ashr(exponent, self.integers(1))
        other = self.builder.sub(exponent, half)
        return self.multiply(self.multiply(a, self.power_of_two(half)), self.power_of_two(other))

    def sum(self, a: Value) -> Value:
        """The sum of the lanes, a float32: lanes i and i + 8, then i + 4, i + 2, i + 1."""
        return self._fold(a, self.add)

    def largest(self, a: Value) -> Value:
        """The largest lane, a float32."""
        return self._fold(a, self.maximum)

    def _fold(self, a: Value, combine: Callable[[Value, Value], Value]) -> Value:
        undefined = ir.Constant(VECTOR, ir.Undefined)
        for distance in (8, 4, 2, 1):
            order = [lane + distance if lane < distance else lane for lane in range(LANES)]
            a = combine(a, self.builder.shuffle_vector(a, undefined, ir.Constant(INTEGERS, order)))
        return self.builder.extract_element(a, INT32(0))

    # Integers and bfloat16

    def dot_bfloat16(self, sums: Value, words: Value, weights: Value) -> Value:
        """float32 lanes plus the dot products of 2 by 2 bfloat16 each: vdpbf16ps of AVX-512. It flushes denormals."""
        # llvmlite has no bfloat16. LLVM still accepts the older form, with int32 lanes, and converts it.
        function = self._intrinsic("llvm.x86.avx512bf16.dpbf16ps", VECTOR, [VECTOR, INTEGERS, INTEGERS], "512")
        return self.builder.call(function, [sums, words, weights])

    def lanes(self, a: Value, first: int, count: int) -> Value:
        """Some of the lanes, as a vector of `count` lanes."""
        if count == LANES:
            return a
        order = ir.Constant(ir.VectorType(INT32, count), list(range(first, first + count)))
        return self.builder.shuffle_vector(a, ir.Constant(a.type, ir.Undefined), order)

    def joined(self, parts: Sequence[Value]) -> Value:
        """One vector of the lanes of 1, 2 or 4 vectors."""
        while len(parts) > 1:
            order = ir.Constant(ir.VectorType(INT32, 2 * parts[0].type.count), list(range(2 * parts[0].type.count)))
            pairs = zip(parts[::2], parts[1::2], strict=True)
            parts = [self.builder.shuffle_vector(low, high, order) for low, high in pairs]
        return parts[0]

    def widen_bytes(self, a: Value) -> Value:
        """32 signed bytes as 32 int16, held as 16 int32 lanes."""
        return self.builder.bitcast(self.builder.sext(a, ir.VectorType(INT16, 2 * LANES)), INTEGERS)

    def broadcast_word(self, word: Value) -> Value:
        """A vector of 16 times the same int32."""
        undefined = ir.Constant(INTEGERS, ir.Undefined)
        first = self.builder.insert_element(undefined, word, INT32(0))
        return self.builder.shuffle_vector(first, undefined, ir.Constant(INTEGERS, [0] * LANES))

    def integers(self, number: int) -> Value:
        """A vector of 16 times the same int32."""
        return ir.Constant(INTEGERS, [number] * LANES)

    def bits(self, a: Value) -> Value:
        """The bits of float32 lanes."""
        return self.builder.bitcast(a, INTEGERS)

    def numbers(self, a: Value) -> Value:
        """Bits as float32 lanes."""
        return self.builder.bitcast(a, VECTOR)

    def from_integers(self, a: Value) -> Value:
        """int32 lanes as float32, rounded to nearest, ties to even."""
        return self.builder.sitofp(a, VECTOR)

    def widen(self, halves: Value) -> Value:
        """16 bfloat16 as float32: exact."""
        return self.numbers(self.builder.shl(self.builder.zext(halves, INTEGERS), self.integers(16)))

    def narrow(self, a: Value) -> Value:
        """float32 lanes as bfloat16, rounded to nearest, ties to even; denormals are kept, NaN becomes 0x7FC0."""
        raw = self.bits(a)
        odd = self.builder.and_(self.builder.lshr(raw, self.integers(16)), self.integers(1))
        moved = self.builder.add(self.builder.add(raw, self.integers(0x7FFF)), odd)
        rounded = self.builder.lshr(moved, self.integers(16))
        kept = self.builder.select(self.builder.fcmp_ordered("==", a, a), rounded, self.integers(0x7FC0))
        return self.builder.trunc(kept, HALVES)

    # Addresses, counts and loops

    def plus(self, address: Value, offset: int) -> Value:
        """An address, some bytes further."""
        return self.builder.add(address, INT64(offset)) if offset else address

    def repeat(self, count: Value, carried: Sequence[Value], body: Callable[..., Sequence[Value]]) -> list[Value]:
        """Write a loop: `count` times, at least once, the carried values become those that `body` returns for them."""
        builder = self.builder
        before, loop = builder.block, builder.append_basic_block("loop")
        after = builder.append_basic_block("after")
        builder.branch(loop)
        builder.position_at_end(loop)
        number = builder.phi(INT64)
        values = [builder.phi(value.type) for value in carried]
        following = list(body(*values))
        next_number = builder.add(number, INT64(1))
        for value, first, then in zip((number, *values), (INT64(0), *carried), (next_number, *following), strict=True):
            value.add_incoming(first, before)
            value.add_incoming(then, builder.block)
        builder.cbranch(builder.icmp_signed("<", next_number, count), loop, after)
        builder.position_at_end(after)
        return following

    def when(self, count: Value, carried: Sequence[Value], body: Callable[..., Sequence[Value]]) -> list[Value]:
        """Write code that runs if `count` is positive: the carried values become what `body` returns for them."""
        builder = self.builder
        before, then = builder.block, builder.append_basic_block("then")
        after = builder.append_basic_block("after")
        builder.cbranch(builder.icmp_signed(">", count, INT64(0)), then, after)
        builder.position_at_end(then)
        following = list(body(*carried))
        end = builder.block
        builder.branch(after)
        builder.position_at_end(after)
        merged = []
        for value, changed in zip(carried, following, strict=True):
            merged.append(builder.phi(value.type))
            merged[-1].add_incoming(value, before)
            merged[-1].add_incoming(changed, end)
        return merged

    def over(self, width: Value, carried: Sequence[Value], body: Callable[..., Sequence[Value]]) -> list[Value]:
        """Write a loop over an array of `width` elements, 16 at a time, and a last part of fewer.

        `body(at, count, *carried)` returns the carried values that follow. `at` is the first element; `count` is None
        for 16 elements, else their number, for `read` and `write`.
        """
        full, left = self.builder.ashr(width, INT64(4)), self.builder.and_(width, INT64(LANES - 1))

        def whole(*values: Value) -> Sequence[Value]:
            def step(at: Value, *values: Value) -> Sequence[Value]:
                return [self.plus(at, LANES), *body(at, None, *values)]

            return self.repeat(full, [INT64(0), *values], step)[1:]

        def rest(*values: Value) -> Sequence[Value]:
            return body(self.builder.shl(full, INT64(4)), left, *values)

        return self.when(left, self.when(full, carried, whole), rest)

    def read(self, address: Value, count: Value | None, kind: Any = VECTOR) -> Value:
        """16 elements, or the first `count` and zeros."""
        return (
            self.load(address, kind=kind, alignment=_itemsize(kind))
            if count is None
            else self.load_first(address, count, kind)
        )

    def write(self, value: Value, address: Value, count: Value | None) -> None:
        """Write 16 elements, or the first `count`."""
        if count is None:
            self.store(value, address, alignment=_itemsize(value.type))
        else:
            self.store_first(value, address, count)

    def first(self, count: Value) -> Value:
        """A mask of the first `count` lanes."""
        undefined = ir.Constant(INTEGERS, ir.Undefined)
        first = self.builder.insert_element(undefined, self.builder.trunc(count, INT32), INT32(0))
        limit = self.builder.shuffle_vector(first, undefined, ir.Constant(INTEGERS, [0] * LANES))
        return self.builder.icmp_signed("<", ir.Constant(INTEGERS, list(range(LANES))), limit)

    def keep(self, mask: Value, a: Value) -> Value:
        """The lanes of a mask; 0 in the others."""
        return self.builder.select(mask, a, self.constant(0.0))

    def _pointer(self, address: Value, offset: int, kind: Any) -> Value:
        return self.builder.inttoptr(self.plus(address, offset), kind.as_pointer())

    def _intrinsic(self, name: str, returns: Any, takes: Sequence[Any], suffix: str) -> Any:
        return self.intrinsic(f"{name}.{suffix}", returns, takes)

    def intrinsic(self, name: str, returns: Any, takes: Sequence[Any]) -> Any:
        """One of LLVM's intrinsic functions, by its whole name."""
        module = self.builder.module
        return module.globals.get(name) or ir.Function(module, ir.FunctionType(returns, takes), name)


def _suffix(kind: Any) -> str:
    """How LLVM names a type in the names of its intrinsics."""
    if isinstance(kind, ir.VectorType):
        return f"v{kind.count}{_suffix(kind.element)}"
    return "f32" if kind == FLOAT else f"i{kind.width}"


def _itemsize(kind: Any) -> int:
    """Bytes of an element of a vector."""
    return {HALVES: 2}.get(kind, 4)
