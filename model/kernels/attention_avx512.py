"""Attention of one query over one head, in AVX-512 assembly.

Compiled loops (attention_loops.py) take most of the time in which the keys and values could be read from memory, and
hardly overlap with the reading. Here sixteen positions are scored together: their products are summed in sixteen
registers, which are then reduced to one. bfloat16 is multiplied in pairs and summed in float32.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from headrace.model.kernels.intrinsics import FAST_MATH, assembly, cast, prefetch
from headrace.model.kernels.isa import chosen

#: Positions that are scored together.
POSITIONS = 16
#: e**x is 2**n * e**r, where n is the integer nearest to x / ln 2. The constants: the least x; 1 / ln 2; ln 2 in two
#: parts, the first with so few digits that n times it is exact; the coefficients of a polynomial for e**r with a
#: relative error of 2e-9, highest power first.
EXPONENTIAL = (
    *(-69.0, 1.4426950408889634, 0.693359375, -2.12194440e-4),
    *(
        0.001384364409056063,
        0.008374163383777078,
        0.0416680025751824,
        0.16666431170030976,
        0.49999994205558146,
        1.0,
        1.0,
    ),
)


def is_supported(head_dim: int, bf16: bool) -> bool:
    """Whether this CPU has the instructions, and a key fills whole registers, of which there are enough."""
    isa = chosen()
    row_bytes = head_dim * (2 if bf16 else 4)
    wanted = ["avx512f", *(["avx512bf16"] if bf16 else [])]
    return all(map(isa.has, wanted)) and row_bytes % 64 == 0 and row_bytes <= 512


def attention(head_dim: int, bf16: bool) -> Any:
    """Build attend, with the parameters of the one in attention_loops.py."""
    import numba
    from numba import carray, types

    row_bytes = head_dim * (2 if bf16 else 4)
    names = [*(f"xmm{i}" for i in range(32)), "rax", "rcx", "rdx", "rsi", "flags"]
    registers = ",".join(f"~{{{name}}}" for name in names)
    score = assembly(_score(row_bytes // 64, bf16), 6, registers)
    softmax, weighted_sum = (
        assembly(_softmax(), 5, registers),
        assembly(_weighted_sum(row_bytes // 64, bf16), 6, registers),
    )
    floats = cast(types.int64, types.CPointer(types.float32))
    score_one, prefetch_line = _score_one(head_dim, bf16), prefetch()

    @numba.njit(error_model="numpy")
    def score_all(q: int, k: int, length: int, scores: int, next_k: int, tops: int) -> None:
        """Scores of all positions. Each depends only on its key, so those of the last 16 may be computed twice."""
        if length < POSITIONS:
            for t in range(length):
                found = score_one(q, k + t * row_bytes)
                carray(floats(scores), length)[t] = found
                top = carray(floats(tops), POSITIONS)
                top[t] = found
            return
        score(q, k, length // POSITIONS, scores, next_k, tops)
        if length % POSITIONS:
            rest = length - POSITIONS
            score(q, k + rest * row_bytes, 1, scores + rest * 4, k, tops)

    @numba.njit(error_model="numpy")
    def attend(q: int, k: int, v: int, out: int, length: int, following: Any, scratch: int, scale: Any) -> None:
        next_k, next_v, positions = following
        tops, scores, ahead = scratch + head_dim * 4, scratch + head_dim * 8, positions > 0
        for i in range(POSITIONS):
            carray(floats(tops), POSITIONS)[i] = np.float32(-np.inf)
        score_all(q, k, length, scores, next_k if ahead else k, tops)
        carray(floats(scratch), 1)[0] = scale
        softmax(scores, (length + POSITIONS - 1) // POSITIONS, scores + length * 4, scratch, tops)
        weighted_sum(scores, v, length, tops, next_v if ahead else v, out)
        for t in range(length // POSITIONS * POSITIONS, positions):
            for line in range(0, row_bytes, 64):
                prefetch_line(next_k + t * row_bytes + line)
        for t in range(length, positions):
            for line in range(0, row_bytes, 64):
                prefetch_line(next_v + t * row_bytes + line)

    return attend


def _score_one(head_dim: int, bf16: bool) -> Any:
    """Build score_one: a query by one key."""
    import numba
    from numba import carray, types

    elements = cast(types.int64, types.CPointer(types.uint16 if bf16 else types.float32))
    value = cast(types.uint32, types.float32)

    @numba.njit(inline="always")
    def read(x: Any) -> Any:
        return value(np.uint32(x) << np.uint32(16)) if bf16 else x

    @numba.njit(fastmath=FAST_MATH, error_model="numpy")
    def score_one(q: int, k: int) -> Any:
        total = np.float32(0)
        for d in range(head_dim):
            total += read(carray(elements(q), head_dim)[d]) * read(carray(elements(k), head_dim)[d])
        return total

    return score_one


def _score(vectors: int, bf16: bool) -> str:
    """Scores of the query at $0 with the keys at $1, $2 times 16 of them, float32 at $3; prefetches as many at $4.

    At $5 are 16 running maxima; each is updated with some of the scores.
    """
    step = 64 * vectors
    text = ["movq $1, %rax", "movq $2, %rcx", "movq $3, %rdx", "movq $4, %rsi", "vmovups ($5), %zmm28"]
    text += [f"vmovups {64 * i}($0), %zmm{16 + i}" for i in range(vectors)]
    text += ["1:"]
    for position in range(POSITIONS):
        to = f"%zmm{position}"
        text += [f"vpxord {to}, {to}, {to}"]
        for i in range(vectors):
            place = f"{position * step + 64 * i}"
            multiply = "vdpbf16ps" if bf16 else "vfmadd231ps"
            text += [f"prefetcht1 {place}(%rsi)", f"{multiply} {place}(%rax), %zmm{16 + i}, {to}"]
    # Sum the 16 elements of each register: pairs of registers are merged until one is left, with one sum per position.
    for low, high, count in (("vunpcklps", "vunpckhps", 8), ("vunpcklpd", "vunpckhpd", 4)):
        for i in range(count):
            a, b = f"%zmm{2 * i}", f"%zmm{2 * i + 1}"
            text += [f"{low} {b}, {a}, %zmm24", f"{high} {b}, {a}, %zmm25", f"vaddps %zmm24, %zmm25, %zmm{i}"]
    for count in (2, 1):
        for i in range(count):
            a, b = f"%zmm{2 * i}", f"%zmm{2 * i + 1}"
            text += [f"vshuff32x4 $$0x88, {b}, {a}, %zmm24", f"vshuff32x4 $$0xdd, {b}, {a}, %zmm25"]
            text += [f"vaddps %zmm24, %zmm25, %zmm{i}"]
    text += ["vmaxps %zmm0, %zmm28, %zmm28", "vmovups %zmm0, (%rdx)"]
    text += [
        f"addq $${POSITIONS * step}, %rax",
        f"addq $${POSITIONS * step}, %rsi",
        "addq $$64, %rdx",
        "decq %rcx",
        "jnz 1b",
    ]
    return "\n".join([*text, "vmovups %zmm28, ($5)"])


def _softmax() -> str:
    """Replace the scores at $0, $1 times 16, by e**((score - largest) * scale); they end at $2, the scale is at $3.

    At $4 are 16 elements, one of which is the largest score; afterwards each is the sum of the new scores. Results
    are at least e**-69.
    """
    text = ["movq $0, %rax", "movq $1, %rcx", "vmovups ($4), %zmm20", "vbroadcastss ($3), %zmm21"]
    for register, number in enumerate((-np.inf, *EXPONENTIAL), 3):
        text += [f"movl $${np.float32(number).view(np.uint32)}, %edx", f"vpbroadcastd %edx, %zmm{register}"]
    least, inverse, high, low, *powers = (f"%zmm{register}" for register in range(4, 4 + len(EXPONENTIAL)))
    x, n, power = "%zmm0", "%zmm1", "%zmm2"
    text += [*_reduce("vmaxps", "%zmm20", x), "vmovups %zmm3, ($2)", "vpxord %zmm30, %zmm30, %zmm30"]
    text += ["1:", f"vmovups (%rax), {x}", f"vsubps %zmm20, {x}, {x}", f"vmulps %zmm21, {x}, {x}"]
    text += [
        f"vmaxps {x}, {least}, {x}"
    ]  # of a number and NaN, vmaxps gives its first operand in this syntax: the score
    text += [f"vmulps {inverse}, {x}, {n}", f"vrndscaleps $$0, {n}, {n}"]
    text += [f"vfnmadd231ps {high}, {n}, {x}", f"vfnmadd231ps {low}, {n}, {x}", f"vmovaps {powers[0]}, {power}"]
    text += [f"vfmadd213ps {each}, {x}, {power}" for each in powers[1:]]
    text += [f"vscalefps {n}, {power}, {power}", f"vmovups {power}, (%rax)", f"vaddps {power}, %zmm30, %zmm30"]
    text += ["addq $$64, %rax", "decq %rcx", "jnz 1b", *_reduce("vaddps", "%zmm30", x)]
    return "\n".join([*text, "vmovups %zmm30, ($4)"])


def _reduce(operation: str, x: str, spare: str) -> list[str]:
    """Reduce the 16 elements of a register with an operation; each element becomes the result."""
    swaps = [f"vshuff32x4 $$0x4e, {x}, {x}, {spare}", f"vshuff32x4 $$0xb1, {x}, {x}, {spare}"]
    swaps += [f"vpermilps $$0x4e, {x}, {spare}", f"vpermilps $$0xb1, {x}, {spare}"]
    return [line for swap in swaps for line in (swap, f"{operation} {spare}, {x}, {x}")]


def _weighted_sum(vectors: int, bf16: bool) -> str:
    """Sum the values at $1, $2 of them, weighted by float32 at $0, divide by the number at $3, and write to $5.

    Prefetches as many values at $4.
    """
    step, kinds = 64 * vectors, 2 if bf16 else 1
    text = ["movq $0, %rax", "movq $1, %rcx", "movq $2, %rdx", "movq $4, %rsi"]
    text += [f"vpxord %zmm{i}, %zmm{i}, %zmm{i}" for i in range(kinds * vectors)]
    text += [
        "vpternlogd $$0xff, %zmm31, %zmm31, %zmm31",
        "vpslld $$16, %zmm31, %zmm31",
    ]  # a mask of the upper halves of words
    text += ["1:", "vbroadcastss (%rax), %zmm30"]
    for i in range(vectors):
        text += [f"prefetcht1 {64 * i}(%rsi)"]
        if bf16:  # a word holds two elements, the even index in its lower half
            text += [f"vpslld $$16, {64 * i}(%rcx), %zmm28", f"vpandd {64 * i}(%rcx), %zmm31, %zmm29"]
            text += [f"vfmadd231ps %zmm28, %zmm30, %zmm{i}", f"vfmadd231ps %zmm29, %zmm30, %zmm{vectors + i}"]
        else:
            text += [f"vfmadd231ps {64 * i}(%rcx), %zmm30, %zmm{i}"]
    text += ["addq $$4, %rax", f"addq $${step}, %rcx", f"addq $${step}, %rsi", "decq %rdx", "jnz 1b"]
    text += ["vbroadcastss ($3), %zmm30", *(f"vdivps %zmm30, %zmm{i}, %zmm{i}" for i in range(kinds * vectors))]
    for i in range(vectors):
        if bf16:
            text += [f"vcvtneps2bf16 %zmm{i}, %ymm28", f"vcvtneps2bf16 %zmm{vectors + i}, %ymm29"]
            text += ["vpmovzxwd %ymm28, %zmm28", "vpmovzxwd %ymm29, %zmm29", "vpslld $$16, %zmm29, %zmm29"]
            text += [f"vpord %zmm28, %zmm29, %zmm{i}"]
        text += [f"vmovups %zmm{i}, {64 * i}($5)"]
    return "\n".join([*text, "vzeroupper"])  # see `intrinsics.vzeroupper`
