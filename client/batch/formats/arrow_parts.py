"""Flat rows as tables of Arrow: a Parquet or Arrow file for each part of an output. The columns keep their types."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import IO, Any

from headrace.client.batch.formats.arrow_rows import ArrowRow
from headrace.client.batch.formats.arrow_types import import_pyarrow
from headrace.client.batch.formats.flat import CUSTOM_ID, DIGEST, ERROR, FIRST, LAST, flat_names, own_fields
from headrace.client.batch.formats.text import as_json_text
from headrace.client.batch.output_file import Done
from headrace.client.batch.output_lines import Written, read_digest
from headrace.client.wire.errors import InvalidRequest

#: The entry of a schema's metadata that tells parts of batches from other files.
MARK = {b"headrace": b"batch"}
#: The type of columns of nested values from JSON: a text.
JSON = "json"
#: The type of times with a time zone.
UTC = "timestamp[us, tz=UTC]"


class ArrowParts:
    """Parts as files of Arrow or Parquet.

    Args:
        extension: parquet or arrow.
        types: the columns of the input and their types: those of pyarrow, their names, or JSON.

    Raises:
        InvalidRequest: pyarrow is not installed, or a column has a type that the files cannot have.
    """

    def __init__(self, extension: str, types: Mapping[str, Any]) -> None:
        pyarrow = import_pyarrow()
        self._pyarrow, self.extension = pyarrow, extension
        self._names, self._types = flat_names(types), types
        other = {JSON: "string", UTC: pyarrow.timestamp("us", "UTC")}
        passed = {self._names[name]: other.get(kind, kind) for name, kind in types.items()}
        self._schema = pyarrow.schema({**FIRST, **passed, **LAST}.items(), metadata=MARK)
        self._try_types()

    def _try_types(self) -> None:
        """Write an empty column of each type, so that a type which cannot be written is refused now."""
        for field in self._schema:
            try:
                empty = self._pyarrow.chunked_array([], field.type).take(self._pyarrow.array([], "int64"))
                self._file(self._pyarrow.table({field.name: empty}))
            except self._pyarrow.ArrowException as error:
                shown = f"column {field.name!r} of type {field.type}"
                expected = f"a type that {self.extension} has ({str(error)[:100]}); convert it, or write JSON lines"
                raise InvalidRequest("output_format", shown, expected) from None

    def encode(self, rows: Sequence[Done]) -> bytes:
        """A file with these requests."""
        own = [own_fields(row, outcome) for row, _, outcome in rows]
        arrays = [[fields.get(name) for fields in own] for name in FIRST]
        columns = [self._pyarrow.array(_valid(values), self._schema.field(i).type) for i, values in enumerate(arrays)]
        columns += self._passed([row.columns for row, *_ in rows])
        columns.append(self._pyarrow.array([row.digest for row, *_ in rows], "string"))
        return self._file(self._pyarrow.table(columns, schema=self._schema))

    def _passed(self, rows: Sequence[Mapping[str, Any]]) -> list[Any]:
        if rows and all(isinstance(row, ArrowRow) for row in rows):
            return self._taken(rows)  # type: ignore[arg-type]
        return [
            self._pyarrow.array(
                [_as_json(row.get(name)) if kind == JSON else row.get(name) for row in rows],
                self._schema.field(new).type,
            )
            for (name, kind), new in zip(self._types.items(), self._names.values(), strict=True)
        ]

    def _taken(self, rows: Sequence[ArrowRow]) -> list[Any]:
        """The columns of the record batches that have these rows, without a way through Python's values."""
        starts: dict[int, int] = {}
        batches: list[Any] = []
        count = 0
        for row in rows:
            if id(row.batch) not in starts:
                starts[id(row.batch)] = count
                batches.append(row.batch.data)
                count += row.batch.data.num_rows
        places = self._pyarrow.array([starts[id(row.batch)] + row.index for row in rows], "int64")
        columns = []
        for name, new in self._names.items():
            kind = self._schema.field(new).type
            whole = self._pyarrow.chunked_array([batch.column(name).cast(kind) for batch in batches], kind)
            columns.append(whole.take(places))
        return columns

    def _file(self, table: Any) -> bytes:
        file = io.BytesIO()
        if self.extension == "parquet":
            from pyarrow import parquet

            parquet.write_table(table, file)
        else:
            with self._pyarrow.ipc.new_file(file, table.schema) as writer:
                writer.write_table(table)
        return file.getvalue()

    def scan(self, file: IO[bytes]) -> Iterator[Written]:
        """The requests of a part.

        Raises:
            ValueError, OSError: the file cannot be read, or no batch wrote it.
            KeyError: it has other columns; the argument says which.
        """
        table = self._read(file)
        columns = (table.column(name).to_pylist() for name in (CUSTOM_ID, DIGEST, ERROR))
        for custom_id, digest, error in zip(*columns, strict=True):
            yield Written(custom_id, read_digest(digest), error is not None)

    def retain(self, file: IO[bytes], keep: Callable[[Written], bool]) -> bytes:
        """The part without the requests that are not kept; empty if none are."""
        table = self._read(file)
        file.seek(0)
        kept = [keep(written) for written in self.scan(file)]
        return self._file(table.filter(self._pyarrow.array(kept, "bool"))) if any(kept) else b""

    def _read(self, file: IO[bytes]) -> Any:
        from pyarrow import parquet

        try:
            is_parquet = self.extension == "parquet"
            table = parquet.ParquetFile(file).read() if is_parquet else self._pyarrow.ipc.open_file(file).read_all()
            table.validate(full=True)  # a spoilt file would crash the process later
        except (self._pyarrow.ArrowException, MemoryError, UnicodeDecodeError) as error:
            raise ValueError(str(error) or type(error).__name__) from None
        if not (table.schema.metadata or {}).items() >= MARK.items():
            raise ValueError("no batch wrote it")
        if not table.schema.equals(self._schema):
            changed = {field.name for field in set(table.schema) ^ set(self._schema)}
            raise KeyError(", ".join(sorted(changed))[:200])
        return table


def _as_json(value: Any) -> str | None:
    return None if value is None else as_json_text(value)


def _valid(values: list[Any]) -> list[Any]:
    """Texts without lone surrogates, which a model's message could have and Arrow refuses."""
    return [value.encode("utf-8", "replace").decode() if isinstance(value, str) else value for value in values]
