"""`exp` and `log` in float64 for compiled code, with the same bits on every CPU.

They use nothing but additions, multiplications and divisions, which IEEE 754 defines exactly, in one written order. The
functions of libm and of vector libraries give other bits on other CPUs. The compiler may not reorder or fuse operations
here, so none of these functions is compiled with `fastmath`; LLVM still vectorises loops around them.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from headrace.model.kernels.intrinsics import cast

#: ln 2 in two parts. The first has 32 significant bits, so that its product with an exponent is exact.
LN2_HIGH = 6.93147180369123816490e-01
LN2_LOW = 1.90821492927058770002e-10
#: Below it, e**x is taken as 0: results are never denormal.
LEAST = -708.0


def exponential64() -> Any:
    """A function for compiled code: e**x for x <= 0, with a relative error of 3e-16; 0 below LEAST and for NaN.

    e**x is 2**n * e**r, where n is the integer nearest to x / ln 2. e**r is its Taylor polynomial of degree 13, whose
    truncation error is 4e-18.
    """
    import numba
    from numba import types

    value = cast(types.int64, types.float64)
    inverse, high, low, least = 1 / math.log(2), LN2_HIGH, LN2_LOW, LEAST
    c = tuple(1 / math.factorial(k) for k in range(14))

    @numba.njit(inline="always")
    def exp(x: Any) -> Any:
        bounded = x if x > least else least
        n = np.floor(bounded * inverse + 0.5)
        r = (bounded - n * high) - n * low
        p = c[13] * r + c[12]
        p = p * r + c[11]
        p = p * r + c[10]
        p = p * r + c[9]
        p = p * r + c[8]
        p = p * r + c[7]
        p = p * r + c[6]
        p = p * r + c[5]
        p = p * r + c[4]
        p = p * r + c[3]
        p = p * r + c[2]
        p = p * r + c[1]
        p = p * r + c[0]
        power = value((np.int64(np.int32(n)) + np.int64(1023)) << np.int64(52))
        return p * power if x > least else 0.0

    return exp


def logarithm64() -> Any:
    """A function for compiled code: the natural logarithm of x >= 1, with an error below one unit in the last place.

    After FDLIBM's e_log.c (Sun Microsystems 1993): x is 2**n * (1 + f), and log(1 + f) is a polynomial in f / (2 + f).
    """
    import numba
    from numba import types

    value, bits = cast(types.int64, types.float64), cast(types.float64, types.int64)
    high, low, root = LN2_HIGH, LN2_LOW, math.sqrt(2)
    c = (
        *(6.666666666666735130e-01, 3.999999999940941908e-01, 2.857142874366239149e-01, 2.222219843214978396e-01),
        *(1.818357216161805012e-01, 1.531383769920937332e-01, 1.479819860511658591e-01),
    )

    @numba.njit(inline="always")
    def log(x: Any) -> Any:
        raw = bits(x)
        n = (raw >> np.int64(52)) - np.int64(1023)
        fraction = value((raw & np.int64(2**52 - 1)) | np.int64(1023 << 52))
        if fraction > root:
            fraction, n = fraction * 0.5, n + np.int64(1)
        f, k = fraction - 1.0, np.float64(n)
        s = f / (2.0 + f)
        z = s * s
        p = c[6] * z + c[5]
        p = p * z + c[4]
        p = p * z + c[3]
        p = p * z + c[2]
        p = p * z + c[1]
        p = p * z + c[0]
        half = 0.5 * f * f
        return k * high - ((half - (s * (half + p * z) + k * low)) - f)

    return log
