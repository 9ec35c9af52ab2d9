"""Linear layers by the fastest GEMM that the machine has, with results that do not depend on the number of rows.

| type | CPU | implementation |
|---|---|---|
| float32 | AVX-512, AVX2 | kernels/gemm_fp32.py |
| bfloat16 | Intel AMX | kernels/gemm_bf16_amx.py |
| bfloat16 | AVX-512, AVX2 | kernels/gemm_bf16.py |
| int8 | Intel AMX | kernels/gemm_int8_amx.py |
| int8 | AVX-512, AVX2 | kernels/gemm_int8.py |
| any | others, and GPUs | torch's operators, kernels/onednn.py |

The first five are batch-invariant by construction. For torch's operators the numbers of rows that give the same bits
are measured (kernels/row_range.py).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from headrace.model.activation_functions import activate
from headrace.model.kernels.gemm_bf16 import VectorBf16Weight, bf16_works
from headrace.model.kernels.gemm_bf16_amx import Bf16Weight, bf16_amx_works
from headrace.model.kernels.gemm_fp32 import Fp32Weight, fp32_works
from headrace.model.kernels.gemm_int8 import int8_weight_type
from headrace.model.kernels.onednn import OneDnnWeight, TorchWeight, packing_works
from headrace.model.kernels.packed_weight import PackedWeight
from headrace.model.kernels.row_range import RowRange, matmul_rows, measured_rows, padded_rows


@dataclass(frozen=True)
class Linear:
    """x @ weight + bias, then an activation function if requested. [M, in] -> [M, out]."""

    gemm: TorchWeight | OneDnnWeight | PackedWeight
    #: The numbers of rows that may be run; None if a row's bits are the same for any number of rows.
    rows: RowRange | None
    #: What is applied to the result of the GEMM (activation_functions.FUNCTIONS); None if there is nothing, or if the
    #: GEMM applies it itself.
    then: str | None = None

    @classmethod
    def of(
        cls, weight: Tensor, bias: Tensor | None = None, *, activation: str | None = None, int8: bool = False
    ) -> Linear:
        """Pack a weight [in, out], as the files of GPT-2 store it, and a bias [out]. Neither is needed afterwards.

        Args:
            activation: one of config.ACTIVATIONS.
            int8: quantize the weight; rows are bfloat16. See `int8_works`.
        """
        packed = int8_weight_type() if int8 else packed_weight_type(weight.device.type, weight.dtype)
        applied = activation if activation in (packed.activations if packed else {"gelu_tanh"}) else None
        then = None if applied else activation
        if packed is not None:
            return cls(packed.of(weight, bias, applied), None, then)
        gemm: OneDnnWeight | TorchWeight = TorchWeight(weight, bias, applied is not None)
        if packing_works(weight.device.type, weight.dtype):
            gemm = OneDnnWeight.of(weight, bias, applied is not None)
        return cls(gemm, measured_rows(gemm, weight), then)

    @property
    def weight(self) -> Tensor:
        """The weight as it was given, [in, out]; a copy if it is packed."""
        return self.gemm.weight

    @property
    def bias(self) -> Tensor | None:
        """The bias, [out]."""
        return self.gemm.bias

    @property
    def fingerprint(self) -> str:
        """How the fingerprint of a model names the GEMM: `int8`, `tiled`, `bf16-dot`, `bf16-fma`, `floats`, `packed`
        or `plain`.
        """
        return self.gemm.backend.fingerprint if isinstance(self.gemm, PackedWeight) else self.gemm.fingerprint

    def padded_rows(self, count: int) -> int:
        """The number of rows to which `count` rows have to be padded."""
        return count if self.rows is None else padded_rows(count)

    def __call__(self, x: Tensor) -> Tensor:
        out = self.gemm(x) if self.rows is None else matmul_rows(self.gemm, x, self.rows)
        return out if self.then is None else activate(self.then, out)


def packed_weight_type(device: str, dtype: torch.dtype) -> type[Bf16Weight | VectorBf16Weight | Fp32Weight] | None:
    """The compiled GEMM for this type on this machine, self-tested; None where torch's operators are used."""
    if bf16_amx_works(device, dtype):
        return Bf16Weight
    if bf16_works(device, dtype):
        return VectorBf16Weight
    return Fp32Weight if fp32_works(device, dtype) else None
