"""The activation functions by torch, with bits that do not depend on the batch.

Compiled GEMMs apply theirs themselves (kernels/vector_math.py), except in bfloat16 on AMX. torch's GEMMs apply none of
these.

torch's operators compute the last elements of a tensor by other code than those before them, and split large tensors
among threads anywhere, so that the bits of an element depend on the size of the tensor. Here a row is computed by the
same code whatever the other rows are.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

#: The names of config.ACTIVATIONS, without the one that every GEMM applies: GELU by its approximation with tanh.
FUNCTIONS: dict[str, Callable[[Tensor], Tensor]] = {"gelu": F.gelu, "relu": F.relu, "silu": F.silu, "tanh": torch.tanh}
#: Rows of a multiple of this many elements are computed together: vectors are not longer, for any type.
VECTOR = 64
#: torch splits tensors of this many elements among threads.
SPLIT = 32768


def activate(name: str, x: Tensor) -> Tensor:
    """Apply an activation function of FUNCTIONS to rows [M, N]; a row's bits do not depend on the others."""
    function, width = FUNCTIONS[name], x.shape[1]
    if x.device.type != "cpu":
        return function(x)
    rows = max(1, (SPLIT - 1) // width) if width % VECTOR == 0 else 1
    if len(x) <= rows:
        return function(x)
    return torch.cat([function(part) for part in torch.split(x, rows)])
