"""GEMM by torch's operators: on a weight that oneDNN has packed, or on the unpacked weight.

The packed GEMM uses the private operators behind `torch.compile`'s CPU backend. It is used only if it agrees with
the public operators.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

#: A full batch of the default 64 slots; weights are packed for this number of rows.
USUAL_ROWS = 64


@dataclass(frozen=True)
class TorchWeight:
    """x @ weight + bias by torch's public operators, for any device."""

    #: How the fingerprint of a model names this backend. Results are compared by it, so it never changes.
    fingerprint: ClassVar = "plain"

    weight: Tensor  # [in, out]
    bias: Tensor | None  # [out]
    gelu: bool

    def __call__(self, x: Tensor) -> Tensor:
        out = x @ self.weight if self.bias is None else torch.addmm(self.bias, x, self.weight)
        return F.gelu(out, approximate="tanh") if self.gelu else out


@dataclass(frozen=True)
class OneDnnWeight:
    """x @ weight + bias by oneDNN on a weight in oneDNN's layout, with bias and GELU as its epilogue."""

    #: See `TorchWeight.fingerprint`.
    fingerprint: ClassVar = "packed"

    packed: Tensor
    bias: Tensor | None  # [out]
    gelu: bool

    @classmethod
    def of(cls, weight: Tensor, bias: Tensor | None, gelu: bool) -> OneDnnWeight:
        """Pack a weight [in, out] for batches around `USUAL_ROWS` rows."""
        packed: Tensor = torch.ops.mkldnn._reorder_linear_weight(weight.t(), USUAL_ROWS)
        return cls(packed, bias, gelu)

    @property
    def weight(self) -> Tensor:
        """The weight as it was given, [in, out]; a copy."""
        return self.packed.to_dense().t()

    def __call__(self, x: Tensor) -> Tensor:
        name, algorithm = ("gelu", "tanh") if self.gelu else ("none", "")
        out: Tensor = torch.ops.mkldnn._linear_pointwise(x, self.packed, self.bias, name, [], algorithm)
        return out


@functools.cache
def packing_works(device: str, dtype: torch.dtype) -> bool:
    """Whether this torch on this machine has the packed GEMM, and it agrees with the public operators."""
    if device != "cpu" or dtype not in (torch.float32, torch.bfloat16):
        return False
    try:
        if dtype == torch.bfloat16 and not torch.ops.mkldnn._is_mkldnn_bf16_supported():
            return False
        generator = torch.Generator().manual_seed(0)
        weight, bias, x = (torch.randn(*s, generator=generator).to(dtype) for s in ((96, 160), (160,), (5, 96)))
        ours, plain = OneDnnWeight.of(weight, bias, True)(x), TorchWeight(weight, bias, True)(x)
    except (AttributeError, RuntimeError):  # another version of torch: private operators may disappear
        return False
    tolerance = 1e-4 if dtype == torch.float32 else 0.1
    return ours.dtype == dtype and bool(torch.allclose(ours, plain, rtol=tolerance, atol=tolerance))
