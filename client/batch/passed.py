"""The columns of the input that are passed through to flat rows, and their types."""

from __future__ import annotations

import datetime
from collections.abc import Mapping
from typing import Any

from headrace.client.batch.errors import Fault, InvalidBatch
from headrace.client.batch.formats.arrow_parts import JSON, UTC

#: The largest number of columns of a flat row.
MAX_COLUMNS = 10_000
#: Types of Python -> types of Arrow.
_TYPES: dict[type, str] = {
    str: "string",
    bool: "bool",
    int: "int64",
    float: "double",
    bytes: "binary",
    datetime.date: "date32",
    dict: JSON,
    list: JSON,
}
#: Types of different values in one column -> the type of the column.
_COMMON = {frozenset({"int64", "double"}): "double"}


class SeenColumns:
    """The columns of rows that come without a schema, such as those of JSON lines, by their names and types."""

    def __init__(self) -> None:
        self._seen: dict[str, dict[str, int]] = {}  # by column and type the first line

    def add(self, line: int, columns: Mapping[str, Any]) -> None:
        """Note the columns of a row."""
        for name, value in columns.items():
            kinds = self._seen.get(name)
            if kinds is None:
                if len(self._seen) > MAX_COLUMNS:
                    continue
                kinds = self._seen[name] = {}
            if value is not None:
                kind = _kind(value)
                if kind not in kinds:
                    kinds[kind] = line

    def types(self, *, one_type: bool) -> dict[str, Any]:
        """The columns and their types.

        Args:
            one_type: whether all values of a column must have one type.

        Raises:
            InvalidBatch: they have not, or there are more than MAX_COLUMNS columns.
        """
        if len(self._seen) > MAX_COLUMNS:
            message = f"columns: got more than {MAX_COLUMNS}; expected fewer, or an output of JSON lines"
            raise InvalidBatch([Fault(0, "columns", message)])
        return {name: self._type(name, kinds) if one_type else "string" for name, kinds in self._seen.items()}

    def _type(self, name: str, kinds: dict[str, int]) -> str:
        if len(kinds) < 2:
            return next(iter(kinds), "string")
        if (common := _COMMON.get(frozenset(kinds))) is not None:
            return common
        seen = ", ".join(f"{kind} in line {line}" for kind, line in kinds.items())
        expected = "values of one type in each column; or an output of JSON lines or CSV, which has no types"
        raise InvalidBatch([Fault(max(kinds.values()), name, f"{name}: got {seen}; expected {expected}")])


def _kind(value: Any) -> str:
    if isinstance(value, int) and not isinstance(value, bool) and not -(2**63) <= value < 2**63:
        return JSON
    if isinstance(value, datetime.datetime):
        return "timestamp[us]" if value.tzinfo is None else UTC
    return _TYPES.get(type(value), JSON)
