"""An adapter in the form that compiled code reads, and which rows of a pass it is for."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from headrace.model.kernels.intrinsics import Int64Array


@dataclass(frozen=True, eq=False)
class PackedAdapter:
    """An adapter that is ready to run beside its base model. Any number of passes may use it at once.

    Attributes:
        digest: SHA-256 of its files.
        rank: the largest rank.
        segments: for each op of the decoder what a `Segment` says after its rows, int64 [layers + 1, ops, 4].
        norm_biases: of layer norms, by the op after them: float32 [E].
        final_norm_bias: of the norm before the head; None: that of the base.
        tensors: the memory that `segments` refers to.
    """

    digest: str
    rank: int
    segments: Int64Array
    norm_biases: dict[tuple[int, int], Tensor]
    final_norm_bias: Tensor | None
    tensors: tuple[Tensor, ...]

    @property
    def nbytes(self) -> int:
        """The memory that it takes."""
        return sum(tensor.nbytes for tensor in self.tensors)


@dataclass(frozen=True)
class AdapterRows:
    """The `count` packed rows of a pass from row `first` on, which are of one adapter."""

    adapter: PackedAdapter
    first: int
    count: int
