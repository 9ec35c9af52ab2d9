"""Tables in memory: data frames of pandas and polars, and tables of pyarrow."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from headrace.client.batch.formats.arrow_rows import ArrowBatch
from headrace.client.batch.formats.arrow_types import BATCH_ROWS, import_pyarrow, schema_of
from headrace.client.wire.errors import InvalidRequest
from headrace.client.wire.unicode import printable


def column_names(value: Any) -> list[str] | None:
    """The names of the columns of a table, which iterates over them or their arrays; None for any other value."""
    if type(value).__name__ not in ("DataFrame", "Table", "RecordBatch"):
        return None
    names = getattr(value, "column_names", None) or getattr(value, "columns", None)
    return None if names is None else [str(name) for name in names]


class FrameSource:
    """The rows of a table in memory.

    Args:
        frame: of pandas, polars or pyarrow.

    Raises:
        InvalidRequest: pyarrow is not installed, or cannot convert the table.
    """

    kind = "arrow"

    def __init__(self, frame: Any) -> None:
        pyarrow = import_pyarrow()
        try:
            if hasattr(frame, "iloc"):
                table = pyarrow.Table.from_pandas(frame, preserve_index=False)
            else:
                table = frame.to_arrow() if hasattr(frame, "to_arrow") else pyarrow.table(frame)
        except (pyarrow.ArrowException, TypeError, ValueError) as error:
            expected = f"columns that each have values of one type ({printable(str(error))[:200]})"
            raise InvalidRequest("source", f"a {type(frame).__name__}", expected) from None
        self._table = table
        self.schema: Mapping[str, Any] | None = schema_of(table.schema)

    def items(self) -> Iterator[tuple[int, Any]]:
        rows = (row for data in self._table.to_batches(BATCH_ROWS) for row in ArrowBatch(data).rows())
        return enumerate(rows, 1)

    def place(self, line: int) -> str:
        return f"row {line}"
