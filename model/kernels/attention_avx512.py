"""Attention of one query, written out in a CPU's vector instructions (AVX-512).

What a compiler makes of the loops takes most of the time in which the keys and values can be read, and little of the
reading goes on beside it. Here sixteen positions are scored together: their products are summed in sixteen registers,
which are then folded into one. bfloat16 is multiplied in pairs and summed in float32.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from headrace.model.kernels.intrinsics import LIBERTIES, assembly, cast, prefetch

#: Positions that are scored together.
BLOCK = 16
#: e**x is 2**n * e**r with n the whole number next to x / ln 2. Here are the least x; 1 / ln 2; ln 2 in two parts, of
#: which the first has so few digits that n times it is exact; and a polynomial for e**r, from the highest power to the
#: lowest, off by 2 in a billion.
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


def can_attend(head_dim: int, half: bool) -> bool:
    """Whether this machine has the instructions, and a key fills whole registers, of which there must be enough."""
    from llvmlite import binding

    features = {name for name, present in binding.get_host_cpu_features().items() if present}
    row_bytes = head_dim * (2 if half else 4)
    return {"avx512f", *(["avx512bf16"] if half else [])} <= features and row_bytes % 64 == 0 and row_bytes <= 512


def attention(head_dim: int, half: bool) -> Any:
    """A function for compiled code with the parameters of that of `model.kernels._attention`."""
    import numba
    from numba import carray, types

    row_bytes = head_dim * (2 if half else 4)
    names = [*(f"xmm{i}" for i in range(32)), "rax", "rcx", "rdx", "rsi", "flags"]
    registers = ",".join(f"~{{{name}}}" for name in names)
    score = assembly(_score(row_bytes // 64, half), 6, registers)
    soften, weigh = assembly(_soften(), 5, registers), assembly(_weigh(row_bytes // 64, half), 6, registers)
    floats = cast(types.int64, types.CPointer(types.float32))
    score_one, fetch = _score_one(head_dim, half), prefetch()

    @numba.njit(error_model="numpy")
    def score_all(q: int, k: int, length: int, scores: int, next_k: int, tops: int) -> None:
        """Each score depends on its key alone; those of the last block may be computed a second time."""
        if length < BLOCK:
            for t in range(length):
                found = score_one(q, k + t * row_bytes)
                carray(floats(scores), length)[t] = found
                top = carray(floats(tops), BLOCK)
                top[t] = found
            return
        score(q, k, length // BLOCK, scores, next_k, tops)
        if length % BLOCK:
            rest = length - BLOCK
            score(q, k + rest * row_bytes, 1, scores + rest * 4, k, tops)

    @numba.njit(error_model="numpy")
    def attend(q: int, k: int, v: int, out: int, length: int, after: Any, own: int, scale: Any) -> None:
        next_k, next_v, positions = after
        tops, scores, asked = own + head_dim * 4, own + head_dim * 8, positions > 0  # else for what is there
        for i in range(BLOCK):
            carray(floats(tops), BLOCK)[i] = np.float32(-np.inf)
        score_all(q, k, length, scores, next_k if asked else k, tops)
        carray(floats(own), 1)[0] = scale
        soften(scores, (length + BLOCK - 1) // BLOCK, scores + length * 4, own, tops)
        weigh(scores, v, length, tops, next_v if asked else v, out)
        for t in range(length // BLOCK * BLOCK, positions):
            for line in range(0, row_bytes, 64):
                fetch(next_k + t * row_bytes + line)
        for t in range(length, positions):
            for line in range(0, row_bytes, 64):
                fetch(next_v + t * row_bytes + line)

    return attend


def _score_one(head_dim: int, half: bool) -> Any:
    """A query by one key."""
    import numba
    from numba import carray, types

    numbers = cast(types.int64, types.CPointer(types.uint16 if half else types.float32))
    value = cast(types.uint32, types.float32)

    @numba.njit(inline="always")
    def read(x: Any) -> Any:
        return value(np.uint32(x) << np.uint32(16)) if half else x

    @numba.njit(fastmath=LIBERTIES, error_model="numpy")
    def score_one(q: int, k: int) -> Any:
        total = np.float32(0)
        for d in range(head_dim):
            total += read(carray(numbers(q), head_dim)[d]) * read(carray(numbers(k), head_dim)[d])
        return total

    return score_one


def _score(vectors: int, half: bool) -> str:
    """The query at $0 by the keys at $1, $2 blocks of 16, into float32 at $3; asks for as many keys at $4.

    At $5 are 16 numbers of which each becomes the largest of itself and some of the scores.
    """
    step = 64 * vectors
    text = ["movq $1, %rax", "movq $2, %rcx", "movq $3, %rdx", "movq $4, %rsi", "vmovups ($5), %zmm28"]
    text += [f"vmovups {64 * i}($0), %zmm{16 + i}" for i in range(vectors)]
    text += ["1:"]
    for position in range(BLOCK):
        to = f"%zmm{position}"
        text += [f"vpxord {to}, {to}, {to}"]
        for i in range(vectors):
            place = f"{position * step + 64 * i}"
            multiply = "vdpbf16ps" if half else "vfmadd231ps"
            text += [f"prefetcht1 {place}(%rsi)", f"{multiply} {place}(%rax), %zmm{16 + i}, {to}"]
    # Of each register the sum of its 16 numbers: pairs of registers become one until one is left, position by position.
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
    text += [f"addq $${BLOCK * step}, %rax", f"addq $${BLOCK * step}, %rsi", "addq $$64, %rdx", "decq %rcx", "jnz 1b"]
    return "\n".join([*text, "vmovups %zmm28, ($5)"])


def _soften() -> str:
    """Scores at $0, $1 blocks of 16, become e**((score - largest) * scale); their end is $2, the scale is at $3.

    At $4 are 16 numbers of which one is the largest score; afterwards each is the sum of what the scores became. What
    is below e**-69 of the largest becomes that.
    """
    text = ["movq $0, %rax", "movq $1, %rcx", "vmovups ($4), %zmm20", "vbroadcastss ($3), %zmm21"]
    for register, number in enumerate((-np.inf, *EXPONENTIAL), 3):
        text += [f"movl $${np.float32(number).view(np.uint32)}, %edx", f"vpbroadcastd %edx, %zmm{register}"]
    least, inverse, high, low, *powers = (f"%zmm{register}" for register in range(4, 4 + len(EXPONENTIAL)))
    x, n, power = "%zmm0", "%zmm1", "%zmm2"
    text += [*_of_all("vmaxps", "%zmm20", x), "vmovups %zmm3, ($2)", "vpxord %zmm30, %zmm30, %zmm30"]
    text += ["1:", f"vmovups (%rax), {x}", f"vsubps %zmm20, {x}, {x}", f"vmulps %zmm21, {x}, {x}"]
    text += [f"vmaxps {x}, {least}, {x}"]  # of a number and NaN the maximum is what is named first here: the score
    text += [f"vmulps {inverse}, {x}, {n}", f"vrndscaleps $$0, {n}, {n}"]
    text += [f"vfnmadd231ps {high}, {n}, {x}", f"vfnmadd231ps {low}, {n}, {x}", f"vmovaps {powers[0]}, {power}"]
    text += [f"vfmadd213ps {each}, {x}, {power}" for each in powers[1:]]
    text += [f"vscalefps {n}, {power}, {power}", f"vmovups {power}, (%rax)", f"vaddps {power}, %zmm30, %zmm30"]
    text += ["addq $$64, %rax", "decq %rcx", "jnz 1b", *_of_all("vaddps", "%zmm30", x)]
    return "\n".join([*text, "vmovups %zmm30, ($4)"])


def _of_all(operation: str, x: str, spare: str) -> list[str]:
    """All 16 numbers of a register become what the operation makes of them: by halves, quarters, pairs, neighbours."""
    swaps = [f"vshuff32x4 $$0x4e, {x}, {x}, {spare}", f"vshuff32x4 $$0xb1, {x}, {x}, {spare}"]
    swaps += [f"vpermilps $$0x4e, {x}, {spare}", f"vpermilps $$0xb1, {x}, {spare}"]
    return [line for swap in swaps for line in (swap, f"{operation} {spare}, {x}, {x}")]


def _weigh(vectors: int, half: bool) -> str:
    """The values at $1, $2 of them, weighted by float32 at $0, summed, and divided by the number at $3, go to $5.

    Asks for as many values at $4.
    """
    step, kinds = 64 * vectors, 2 if half else 1
    text = ["movq $0, %rax", "movq $1, %rcx", "movq $2, %rdx", "movq $4, %rsi"]
    text += [f"vpxord %zmm{i}, %zmm{i}, %zmm{i}" for i in range(kinds * vectors)]
    text += ["vpternlogd $$0xff, %zmm31, %zmm31, %zmm31", "vpslld $$16, %zmm31, %zmm31"]  # the upper halves of words
    text += ["1:", "vbroadcastss (%rax), %zmm30"]
    for i in range(vectors):
        text += [f"prefetcht1 {64 * i}(%rsi)"]
        if half:  # two numbers in a word: those of the even places are the lower halves
            text += [f"vpslld $$16, {64 * i}(%rcx), %zmm28", f"vpandd {64 * i}(%rcx), %zmm31, %zmm29"]
            text += [f"vfmadd231ps %zmm28, %zmm30, %zmm{i}", f"vfmadd231ps %zmm29, %zmm30, %zmm{vectors + i}"]
        else:
            text += [f"vfmadd231ps {64 * i}(%rcx), %zmm30, %zmm{i}"]
    text += ["addq $$4, %rax", f"addq $${step}, %rcx", f"addq $${step}, %rsi", "decq %rdx", "jnz 1b"]
    text += ["vbroadcastss ($3), %zmm30", *(f"vdivps %zmm30, %zmm{i}, %zmm{i}" for i in range(kinds * vectors))]
    for i in range(vectors):
        if half:
            text += [f"vcvtneps2bf16 %zmm{i}, %ymm28", f"vcvtneps2bf16 %zmm{vectors + i}, %ymm29"]
            text += ["vpmovzxwd %ymm28, %zmm28", "vpmovzxwd %ymm29, %zmm29", "vpslld $$16, %zmm29, %zmm29"]
            text += [f"vpord %zmm28, %zmm29, %zmm{i}"]
        text += [f"vmovups %zmm{i}, {64 * i}($5)"]
    return "\n".join([*text, "vzeroupper"])  # see `native.clean_up`
