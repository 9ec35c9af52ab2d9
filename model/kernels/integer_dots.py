"""Dot products of words of bytes or of int16 on virtual vectors, by the instructions of an instruction set.

Their sums are integers, so all instructions give the same. A word of 32 bits holds the elements of a row that are
multiplied and added to one lane.

| instruction | of | a word of a row | a word of the weight |
|---|---|---|---|
| vpdpbusd | AVX-512 VNNI, AVX-VNNI | 4 unsigned bytes | 4 signed bytes |
| sdot | ARM's dot product | 4 signed bytes | 4 signed bytes |
| vpmaddwd | AVX-512, AVX2 | 2 int16 | 2 int16 |
| smull, smlal | NEON | 2 int16 | 2 int16 |
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from llvmlite import ir

from headrace.model.kernels.isa import Isa
from headrace.model.kernels.vectors import INT16, INT32, LANES, Value, VectorBuilder

#: (builder, sums, words, weights) -> sums: 16 int32 lanes each.
Dot = Callable[[VectorBuilder, Value, Value, Value], Value]
BYTE = ir.IntType(8)


def dot_of_bytes(isa: Isa) -> Dot:
    """Adds the products of 4 by 4 bytes to each lane. Those of rows are unsigned on x86-64."""
    if isa.has("avx512vnni"):
        return _in_parts(1, "llvm.x86.avx512.vpdpbusd.512", BYTE, accumulates=True)
    if isa.has("avxvnni"):
        return _in_parts(2, "llvm.x86.avx512.vpdpbusd.256", BYTE, accumulates=True)
    return _in_parts(4, "llvm.aarch64.neon.sdot.v4i32.v16i8", BYTE, accumulates=True)


def dot_of_shorts(isa: Isa) -> Dot:
    """Adds the products of 2 by 2 int16 to each lane."""
    if isa.has("avx512f"):
        return _in_parts(1, "llvm.x86.avx512.pmaddw.d.512", INT16, accumulates=False)
    if isa.architecture == "x86_64":
        return _in_parts(2, "llvm.x86.avx2.pmadd.wd", INT16, accumulates=False)
    return _dot_of_shorts_by_products


def _in_parts(parts: int, name: str, element: Any, *, accumulates: bool) -> Dot:
    """A dot product by an instruction that takes a part of the 16 lanes, with the sums to add to or without."""
    lanes = LANES // parts
    result = ir.VectorType(INT32, lanes)
    given = ir.VectorType(element, lanes * (32 // element.width))

    def dot(v: VectorBuilder, sums: Value, words: Value, weights: Value) -> Value:
        takes = [result, given, given] if accumulates else [given, given]
        function, found = v.intrinsic(name, result, takes), []
        for first in range(0, LANES, lanes):
            total, *factors = (v.lanes(each, first, lanes) for each in (sums, words, weights))
            factors = [v.builder.bitcast(each, given) for each in factors]
            found.append(v.builder.call(function, [total, *factors] if accumulates else factors))
        whole = v.joined(found)
        return whole if accumulates else v.builder.add(sums, whole)

    return dot


def _dot_of_shorts_by_products(v: VectorBuilder, sums: Value, words: Value, weights: Value) -> Value:
    """The lower halves of the words, multiplied, and the upper ones."""
    half = v.integers(16)
    lower = [v.builder.ashr(v.builder.shl(each, half), half) for each in (words, weights)]
    upper = [v.builder.ashr(each, half) for each in (words, weights)]
    for pair in (lower, upper):
        sums = v.builder.add(sums, v.builder.mul(*pair))
    return sums
