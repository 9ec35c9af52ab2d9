"""What an output is written to."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Protocol

from headrace.client.batch.items import BatchItem
from headrace.client.batch.output_lines import Written
from headrace.client.wire.results import Outcome

#: A request that is done, the id of its job, and its outcome.
Done = tuple[BatchItem, str, Outcome | Exception]


class OutputFile(Protocol):
    """A file of rows, or a directory of parts. The methods raise OutputRefused."""

    @property
    def exists(self) -> bool:
        """Whether it has rows."""
        ...

    def is_input(self, source: object) -> bool:
        """Whether it is the input of the batch."""
        ...

    def scan(self) -> Iterator[Written]:
        """The requests whose rows are in it."""
        ...

    def repair(self, *, without_failures: bool) -> None:
        """Remove what a crash left incomplete, and the failures if they are to be computed again."""
        ...

    def clear(self) -> None:
        """Delete all rows."""
        ...

    def open(self) -> None:
        """Open for adding rows."""
        ...

    def write(self, rows: Iterable[Done]) -> None:
        """Add requests that are done, each with the id of its job."""
        ...

    def sync(self) -> None:
        """Wait until all rows are stored."""
        ...

    def close(self) -> None:
        """Store all rows and close it."""
        ...
