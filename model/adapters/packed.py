"""An adapter in the form that compiled code reads, and which rows of a pass it is for."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

from headrace.model.adapters.lora import Adapter

if TYPE_CHECKING:
    from headrace.model.decoder import Decoder


@dataclass(frozen=True, eq=False)
class PackedAdapter:
    """An adapter that is ready to run beside a model. Many rows of a pass, or several passes, may use it at once.

    Attributes:
        digest: SHA-256 of its files.
        rank: the largest rank.
        nbytes: the memory that it takes.
    """

    digest: str
    rank: int
    nbytes: int

    @classmethod
    def of(cls, adapter: Adapter, model: Decoder) -> PackedAdapter:
        """Pack an adapter for a model.

        Raises:
            ModelError: torch computes a linear layer of this model on this machine, where adapters are not computed.
        """
        nbytes = sum(4 * (part.a.numel() + part.b.numel()) for parts in adapter.matrices.values() for part in parts)
        return cls(adapter.digest, adapter.rank, nbytes)


class AdapterRows(NamedTuple):
    """The `count` packed rows of a pass from row `first` on, which are of one adapter."""

    adapter: PackedAdapter
    first: int
    count: int
