"""Rows of Arrow tables, whose columns become Python values only where these are needed."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from typing import Any


class ArrowBatch:
    """A record batch, and the columns of it that were read as Python values."""

    __slots__ = ("_rests", "_values", "data", "names")

    def __init__(self, data: Any) -> None:
        self.data = data
        self.names: dict[str, None] = dict.fromkeys(data.schema.names)
        self._values: dict[str, list[Any]] = {}
        self._rests: dict[Collection[str], dict[str, None]] = {}

    def column(self, name: str) -> list[Any]:
        """The values of a column."""
        values = self._values.get(name)
        if values is None:
            values = self._values[name] = _values_of(self.data.column(name))
        return values

    def rest(self, used: Collection[str]) -> dict[str, None]:
        """The names of all columns but these."""
        rest = self._rests.get(used)
        if rest is None:
            rest = self._rests[used] = {name: None for name in self.names if name not in used}
        return rest

    def rows(self) -> Iterator[ArrowRow]:
        """The rows."""
        for index in range(self.data.num_rows):
            yield ArrowRow(self, index, self.names)


class ArrowRow(Mapping[str, Any]):
    """A row of a record batch, or some of its columns.

    Attributes:
        batch: the record batch.
        index: of the row, from 0.
    """

    __slots__ = ("_names", "batch", "index")

    def __init__(self, batch: ArrowBatch, index: int, names: dict[str, None]) -> None:
        self.batch, self.index, self._names = batch, index, names

    def __getitem__(self, name: str) -> Any:
        if name not in self._names:
            raise KeyError(name)
        return self.batch.column(name)[self.index]

    def __contains__(self, name: object) -> bool:
        return name in self._names

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)

    def without(self, names: tuple[str, ...]) -> ArrowRow:
        """The row without these columns."""
        return ArrowRow(self.batch, self.index, self.batch.rest(names))


def _values_of(column: Any) -> list[Any]:
    try:
        return list(column.to_pylist())
    except (ValueError, OverflowError):  # times that Python's datetime cannot hold, such as nanoseconds
        return list(column.cast("string").to_pylist())
