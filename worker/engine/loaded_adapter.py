"""One LoRA adapter in memory, and what tells its files from others that replace them."""

from __future__ import annotations

import os
from concurrent.futures import Future
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from headrace.client.wire.results import Result

#: The files of an adapter.
FILES = ("adapter_config.json", "adapter_model.safetensors")

#: What the file system says of the files of an adapter; None if one is missing.
Version = tuple[int, ...] | None


class Packed(Protocol):
    """An adapter in the form that the model runner takes: model.adapters.packed.PackedAdapter."""

    @property
    def digest(self) -> str:
        """SHA-256 of its files."""
        ...

    @property
    def rank(self) -> int:
        """The largest rank."""
        ...

    @property
    def nbytes(self) -> int:
        """The memory that it takes."""
        ...


@dataclass(eq=False)
class LoadedAdapter:
    """An adapter in memory.

    Attributes:
        name: how jobs name it.
        packed: what sequences take.
        version: what the file system says of its files, by which replaced ones are noticed; None if that is unknown.
        jobs: those that hold it, by their futures.
    """

    name: str
    packed: Packed
    version: Version
    jobs: set[Future[Result]] = field(default_factory=set)


def version_of(place: Path | None) -> Version:
    """What tells the files of an adapter from others that replace them; None if one is missing."""
    if place is None:
        return None
    try:
        found = [os.stat(place / name) for name in FILES]
    except OSError:
        return None
    return tuple(number for each in found for number in (each.st_dev, each.st_ino, each.st_size, each.st_mtime_ns))
