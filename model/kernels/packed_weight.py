"""Weights that are packed for a GEMM backend, and the test that a backend passes before it is used."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from headrace.model.kernels.epilogue import ACTIVATION_CODES
from headrace.model.kernels.isa import NONE, Isa
from headrace.model.kernels.ops import Op
from headrace.model.kernels.program import GemmBackend, Program

log = logging.getLogger("headrace.model")


class RowNorm(NamedTuple):
    """A layer norm of the rows of x before a GEMM: float32 [in] each, contiguous. The bias may be [M, in]."""

    weight: Tensor
    bias: Tensor
    epsilon: float


@dataclass(frozen=True)
class PackedWeight:
    """A weight [in, out] in the order in which the micro-kernel reads it, with its bias.

    Must not be copied with `copy.deepcopy`: `op` contains the addresses of the tensors.
    """

    backend: GemmBackend
    packed: Tensor  # its first dimensions are the blocks and the steps
    scales: Tensor  # float32, one for each column of each block; only for int8
    biases: Tensor  # float32, one for each column of each block, zero without a bias
    bias: Tensor | None  # [out]
    width: int  # elements of a row of x; the packed weight is filled up with rows of zeros
    out: int
    activation: str | None = None  # what is applied after the bias, one of `activations`

    #: The activation functions that this kind of weight applies.
    activations: ClassVar[frozenset[str]] = frozenset(ACTIVATION_CODES[1:])

    @property
    def weight(self) -> Tensor:
        """The weight, [in, out]; a copy."""
        raise NotImplementedError

    @functools.cached_property
    def op(self) -> Op:
        """The GEMM with this weight, without the addresses of its rows and its result."""
        return Op(
            weight=self.packed.data_ptr(),
            width=self.width,
            k_steps=self.packed.shape[1],
            n_blocks=self.packed.shape[0],
            bias=self.biases.data_ptr(),
            bias_block_bytes=4 * self.backend.nr,
            column_scales=self.scales.data_ptr(),
            columns=self.out,
            activation=ACTIVATION_CODES.index(self.activation or ""),
        )

    def check(self, x: Tensor) -> None:
        """Raise ValueError unless x is a CPU tensor [M, in] of the right type: compiled code reads it by address."""
        backend = self.backend
        if x.dim() != 2 or x.shape[1] != self.width or x.dtype != backend.dtype or x.device.type != "cpu":
            raise ValueError(f"rows are {x.dtype} {list(x.shape)}; they must be {backend.dtype} [M, {self.width}]")

    def __call__(self, x: Tensor, norm: RowNorm | None = None) -> Tensor:
        """[M, in] -> [M, out], with the activation function. Raises ValueError like `check`.

        Args:
            norm: a layer norm that is applied to the rows first.
        """
        self.check(x)
        if x.stride(1) != 1:
            x = x.contiguous()
        out = x.new_empty(len(x), self.out)
        op = self.op._replace(
            source=x.data_ptr(),
            source_row_bytes=x.stride(0) * x.itemsize,
            out=out.data_ptr(),
            out_row_bytes=out.stride(0) * x.itemsize,
        )
        if norm is not None:
            op = op._replace(
                norm_weight=norm.weight.data_ptr(),
                norm_bias=norm.bias.data_ptr(),
                norm_bias_row_bytes=4 * norm.bias.stride(0) if norm.bias.dim() == 2 else 0,
                epsilon_bits=int(np.float64(norm.epsilon).view(np.int64)),
            )
        Program(self.backend, len(x), self.width).run(np.array([op], dtype=np.int64))
        return out


def steps_of(width: int, ku: int) -> int:
    """The steps of KU rows that a weight of `width` rows takes."""
    return -(-width // ku)


def padded(weight: Tensor, backend: GemmBackend) -> Tensor:
    """A weight [in, out], filled up with zeros to whole steps of rows and whole blocks of columns."""
    width, out = weight.shape
    return F.pad(weight, (0, -out % backend.nr, 0, -width % backend.ku))


def pad_columns(values: Tensor | None, count: int) -> Tensor:
    """float32 [count]: the values, then zeros."""
    out = torch.zeros(count)
    if values is not None:
        out[: len(values)] = values
    return out


def isa_works(kind: Any, isa: Isa, dtype: torch.dtype, *, rtol: float, atol: float) -> bool:
    """Whether a kind of packed weight passes its self-test on an instruction set. Compiles its backend."""
    if isa.name == NONE:
        return False
    try:
        return self_test(functools.partial(kind.of, isa=isa), dtype, rtol=rtol, atol=atol)
    except Exception as error:  # an optimization must never keep a model from running
        log.warning("matrix products use torch's operators, which are slower: %r", error)
        return False


def self_test(
    pack: Callable[[Tensor, Tensor | None, str | None], PackedWeight], dtype: torch.dtype, *, rtol: float, atol: float
) -> bool:
    """Check a backend against the formula in float64, and that a row's bits do not depend on the other rows.

    Returns True. Raises RuntimeError where the backend fails.
    """
    generator = torch.Generator().manual_seed(0)
    weight, bias, x = (torch.randn(*s, generator=generator).to(dtype) for s in ((96, 80), (80,), (75, 96)))
    for activation in (None, "gelu_tanh"):
        gemm = pack(weight, bias, activation)
        expected = torch.addmm(bias.double(), x.double(), weight.double())
        if activation:
            expected = F.gelu(expected, approximate="tanh")
        found = gemm(x)
        if not torch.allclose(found.double(), expected, rtol=rtol, atol=atol):
            raise RuntimeError("the results are wrong")
        if not all(torch.equal(gemm(x[at : at + 1])[0], found[at]) for at in (0, 20, 50, 74)):
            raise RuntimeError("a row's bits depend on the other rows")
    return True
