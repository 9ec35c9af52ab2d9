"""The exponential and the activation functions of models on virtual vectors: the same bits on every instruction set.

All are made of FMAs, IEEE divisions and shifts of exponents (vectors.py). A NaN stays a NaN.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from headrace.model.kernels.gelu import GELU_EXPONENT, LEAST_EXPONENT, MOST_EXPONENT, POWER
from headrace.model.kernels.vectors import Value, VectorBuilder

#: e**x is 2**n * e**r, where n is the integer nearest to x / ln 2.
INVERSE_LN2 = 1.4426950408889634
#: ln 2 in two parts, the first with so few digits that n times it is exact.
LN2_HIGH, LN2_LOW = 0.693359375, -2.12194440e-4
#: A polynomial for e**r with a relative error of 2e-9, highest power first.
POWERS = (
    *(0.001384364409056063, 0.008374163383777078, 0.0416680025751824, 0.16666431170030976, 0.49999994205558146),
    *(1.0, 1.0),
)
#: e**x is 0 below it: results are never denormal.
LEAST = -86.0
#: The share of the normal distribution beyond a is e**(-a**2 / 2) * t * p(t), where t is 1 / (1 + TAIL_SCALE * a) and p
#: this polynomial, highest power first. Fitted with a relative error of 4e-9 for a from 0 to 13.5.
TAIL_SCALE = 0.3
TAIL = (
    *(-0.020594622112064982, 0.11227328271242847, -0.2278169827850923, 0.1912333686263373, -0.07894437442662669),
    *(0.09588724209514725, 0.07848762191712533, 0.11021330021321979, 0.11957462506386336, 0.11968653698210793),
)
#: Beyond it e**(-a**2 / 2) counts as 0.
FAR = 16.0
#: Below it tanh(a) is a + a**3 * q(a**2), where q is TANH, highest power first: the polynomial of Cephes.
NEAR = 0.625
TANH = (-5.70498872745e-3, 2.06390887954e-2, -5.37397155531e-2, 1.33314422036e-1, -3.33332819422e-1)


def exponential(v: VectorBuilder, x: Value) -> Value:
    """e**x for x <= 0, with a relative error of 2e-7; 0 below LEAST, NaN for NaN."""
    bounded = v.maximum(x, v.constant(LEAST))
    whole, n = v.nearest(v.multiply(bounded, v.constant(INVERSE_LN2)))
    r = v.fma(whole, v.constant(-LN2_HIGH), bounded)
    r = v.fma(whole, v.constant(-LN2_LOW), r)
    found = v.multiply(_polynomial(v, POWERS, r), v.power_of_two(n))
    return v.builder.select(v.builder.fcmp_ordered("<", x, v.constant(LEAST)), v.constant(0.0), found)


def gelu_tanh(v: VectorBuilder, x: Value) -> Value:
    """GELU by its approximation with tanh, as x / (1 + 2**t): t is a polynomial in x, see gelu.py."""
    t = v.fma(v.constant(GELU_EXPONENT[1]), v.multiply(x, x), v.constant(GELU_EXPONENT[0]))
    t = v.maximum(v.multiply(x, t), v.constant(LEAST_EXPONENT))
    t = v.minimum(t, v.constant(MOST_EXPONENT))
    n, exponent = v.nearest(t)
    power = _polynomial(v, POWER, v.subtract(t, n))
    return v.divide(x, v.add(v.scale(power, exponent), v.constant(1.0)))


def gelu(v: VectorBuilder, x: Value) -> Value:
    """GELU, x times the share of the normal distribution below x: max(x, 0) - a * (the share beyond a), a = |x|."""
    a = v.minimum(v.absolute(x), v.constant(FAR))
    t = v.divide(v.constant(1.0), v.fma(a, v.constant(TAIL_SCALE), v.constant(1.0)))
    square = v.multiply(a, a)
    rest = v.fma(a, a, v.negative(square))  # what the rounding of the square has lost: it matters in the exponent
    power = exponential(v, v.multiply(square, v.constant(-0.5)))
    power = v.fma(v.multiply(rest, v.constant(-0.5)), power, power)
    beyond = v.multiply(v.multiply(_polynomial(v, TAIL, t), t), power)
    return v.subtract(v.maximum(x, v.constant(0.0)), v.multiply(a, beyond))


def relu(v: VectorBuilder, x: Value) -> Value:
    """max(x, 0)."""
    return v.maximum(x, v.constant(0.0))


def silu(v: VectorBuilder, x: Value) -> Value:
    """x / (1 + e**-x). For x < 0 it is x * e**x / (1 + e**x), which cannot overflow; -infinity becomes -0."""
    power, negative = exponential(v, v.negative(v.absolute(x))), v.builder.fcmp_ordered("<", x, v.constant(0.0))
    bounded = v.maximum(x, v.constant(2 * LEAST))
    numerator = v.builder.select(negative, v.multiply(bounded, power), x)
    return v.divide(numerator, v.add(power, v.constant(1.0)))


def tanh(v: VectorBuilder, x: Value) -> Value:
    """The hyperbolic tangent: a polynomial below NEAR, beyond it (1 - u) / (1 + u), where u is e**(-2 |x|)."""
    a, square = v.absolute(x), v.multiply(x, x)
    near = v.fma(v.multiply(square, x), _polynomial(v, TANH, square), x)
    u = exponential(v, v.multiply(a, v.constant(-2.0)))
    far = v.divide(v.subtract(v.constant(1.0), u), v.add(v.constant(1.0), u))
    far = v.builder.select(v.builder.fcmp_ordered("<", x, v.constant(0.0)), v.negative(far), far)
    return v.builder.select(v.builder.fcmp_ordered("<", a, v.constant(NEAR)), near, far)


#: By their names in config.json's terms (config.ACTIVATIONS).
ACTIVATIONS: Mapping[str, Callable[[VectorBuilder, Value], Value]] = {
    "gelu_tanh": gelu_tanh,
    "gelu": gelu,
    "relu": relu,
    "silu": silu,
    "tanh": tanh,
}


def _polynomial(v: VectorBuilder, coefficients: Sequence[float], x: Value) -> Value:
    """A polynomial by Horner's rule in FMAs, highest power first."""
    found = v.constant(coefficients[0])
    for coefficient in coefficients[1:]:
        found = v.fma(found, x, v.constant(coefficient))
    return found
