"""What a reader returns, and its errors."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

from headrace.client.batch.errors import Fault, InvalidBatch
from headrace.client.wire.unicode import printable


class TableRows(NamedTuple):
    """An open table, or a file of lines.

    Attributes:
        schema: its columns and their types, those of pyarrow or their names; None if the rows have no schema.
        rows: its rows; an InvalidRequest in place of a row that cannot be read.
    """

    schema: dict[str, Any] | None
    rows: Iterator[Any]


def unreadable(row: int, reason: object) -> InvalidBatch:
    """The error of a file that cannot be read at this row (0: at all)."""
    return InvalidBatch([Fault(row, "input", f"the file cannot be read: {printable(str(reason))}")])
