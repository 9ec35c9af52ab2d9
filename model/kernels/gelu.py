"""The constants of GELU by tanh, x / (1 + 2**t).

t = x * (e0 + e1 * x**2), where e0 and e1 are GELU_EXPONENT. 2**t is 2**n * 2**r, where n is the integer nearest to t
and 2**r a polynomial.
"""

from __future__ import annotations

import math

import numpy as np

GELU_EXPONENT = (-2 * math.sqrt(2 / math.pi) / math.log(2), -2 * math.sqrt(2 / math.pi) / math.log(2) * 0.044715)
#: The least t. Below it 1 + 2**t is 1 in any case, and denormal numbers would be a hundred times slower.
LEAST_EXPONENT = -100.0
#: The largest t that matters: 2**t is infinite from 128 on.
MOST_EXPONENT = 254.0
#: The coefficients of polynomials for 2**r with r from -1/2 to 1/2, highest power first: to the precision of bfloat16
#: (relative error 3e-6) and of float32 (2e-9).
COARSE_POWER = (0.00958285293508711, 0.05590642482350801, 0.2402409861467386, 0.6931241933769179, 1.0)
POWER = (
    *(0.00015353361852507902, 0.0013398874432624655, 0.009618437358045436, 0.05550332471067313),
    *(0.24022647913623332, 0.6931472028551032, 1.0),
)
#: The constants as the assembly of epilogue.py reads them.
GELU_CONSTANTS = np.array([*GELU_EXPONENT, LEAST_EXPONENT, *COARSE_POWER, *POWER], np.float32)
