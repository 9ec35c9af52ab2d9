"""What readers and writers of Arrow tables share."""

from __future__ import annotations

from typing import Any

from headrace.client.batch.formats.tables import unreadable
from headrace.client.wire.errors import InvalidRequest
from headrace.extras import how_to_install

#: Rows that are decoded at once.
BATCH_ROWS = 1024


def import_pyarrow() -> Any:
    """The module `pyarrow`. Raises InvalidRequest if it is not installed."""
    try:
        import pyarrow
        import pyarrow.ipc
    except ImportError:
        raise InvalidRequest("format", "a table that needs pyarrow", how_to_install("tables")) from None
    return pyarrow


def schema_of(schema: Any) -> dict[str, Any]:
    """The names and types of a pyarrow schema. Raises InvalidBatch."""
    check_names(schema.names)
    return {field.name: field.type for field in schema}


def check_names(names: list[str]) -> None:
    """Refuse a table in which two columns have one name. Raises InvalidBatch."""
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise unreadable(0, f"it has a column name twice: {', '.join(twice)[:200]}; rename one of them")
