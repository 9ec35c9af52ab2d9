"""Readers of tables: each yields the rows of a binary file as mappings from column names to values."""

from __future__ import annotations

import csv
import io
import json
import zlib
from collections.abc import Callable, Iterator
from pathlib import PurePosixPath
from typing import IO, Any

from headrace.client.batch.errors import Fault, InvalidBatch
from headrace.client.wire.errors import InvalidRequest
from headrace.client.wire.unicode import printable
from headrace.client.wire.values import show
from headrace.extras import how_to_install

#: Rows that are decoded at once from Parquet and Arrow.
BATCH_ROWS = 1024
#: The longest field of a CSV file in characters.
MAX_FIELD = 2**20
#: The longest JSON array in bytes: unlike the other formats it is read into memory.
MAX_ARRAY_BYTES = 2**28

Rows = Iterator[dict[str, Any]]


def unreadable(row: int, reason: object) -> InvalidBatch:
    """The error of a file that cannot be read at this row (0: at all)."""
    return InvalidBatch([Fault(row, "input", f"the file cannot be read: {printable(str(reason))}")])


def read_separated(file: IO[bytes], delimiter: str) -> Rows:
    """The rows of CSV or TSV with a header. An empty field is None. Raises InvalidBatch."""
    csv.field_size_limit(MAX_FIELD)
    text = io.TextIOWrapper(file, "utf-8-sig", newline="")
    rows, number = csv.reader(text, delimiter=delimiter, strict=True), 0
    try:
        names = next(rows, [])
        if len(set(names)) < len(names):
            raise unreadable(0, f"the header has a name twice: {', '.join(names)[:200]}")
        for fields in rows:
            if not fields:
                continue
            number += 1
            if len(fields) != len(names):
                raise unreadable(number, f"{len(fields)} fields; expected {len(names)}, as in the header")
            yield {name: value if value else None for name, value in zip(names, fields, strict=True)}
    except (csv.Error, UnicodeError, OSError, EOFError, zlib.error) as error:
        advice = "; expected text in UTF-8" if isinstance(error, UnicodeError) else ""
        raise unreadable(number + 1, f"{error}{advice}") from None
    finally:
        text.detach()  # the caller closes the file


def read_parquet(file: IO[bytes]) -> Rows:
    """The rows of a Parquet file, read in batches. Raises InvalidBatch, InvalidRequest."""
    pyarrow = _pyarrow()
    from pyarrow import parquet

    number = 0
    try:
        for batch in parquet.ParquetFile(file).iter_batches(batch_size=BATCH_ROWS):
            yield from batch.to_pylist()
            number += batch.num_rows
    except (pyarrow.ArrowException, OSError) as error:
        raise unreadable(number, error) from None


def read_arrow(file: IO[bytes]) -> Rows:
    """The rows of an Arrow or Feather file, or of an Arrow stream. Raises InvalidBatch, InvalidRequest."""
    pyarrow = _pyarrow()
    from pyarrow import ipc

    number = 0
    try:
        is_file = file.read(6) == b"ARROW1"
        file.seek(0)
        reader = ipc.open_file(file) if is_file else ipc.open_stream(file)
        for index in range(reader.num_record_batches) if is_file else iter(int, 1):
            try:
                batch = reader.get_batch(index) if is_file else reader.read_next_batch()
            except StopIteration:
                return
            for start in range(0, batch.num_rows, BATCH_ROWS):
                yield from batch.slice(start, BATCH_ROWS).to_pylist()
            number += batch.num_rows
    except (pyarrow.ArrowException, OSError) as error:
        raise unreadable(number, error) from None


def read_array(file: IO[bytes]) -> Rows:
    """The items of a JSON array, which is read into memory. Raises InvalidBatch."""
    data = file.read(MAX_ARRAY_BYTES + 1)
    if len(data) > MAX_ARRAY_BYTES:
        raise unreadable(0, f"a JSON array of more than {MAX_ARRAY_BYTES} bytes; expected JSON lines for so many")
    try:
        items = json.loads(data.decode("utf-8-sig"))
    except (ValueError, RecursionError) as error:
        raise unreadable(0, error) from None
    if not isinstance(items, list):
        raise unreadable(0, f"a {type(items).__name__}; expected an array of objects")
    yield from items


def _pyarrow() -> Any:
    try:
        import pyarrow
    except ImportError:
        raise InvalidRequest("format", "a table that needs pyarrow", how_to_install("tables")) from None
    return pyarrow


#: By the name of the format, which is also an extension.
READERS: dict[str, Callable[[IO[bytes]], Rows]] = {
    "csv": lambda file: read_separated(file, ","),
    "tsv": lambda file: read_separated(file, "\t"),
    "parquet": read_parquet,
    "arrow": read_arrow,
    "feather": read_arrow,
    "json": read_array,
}
#: The formats of lines, which `headrace.client.batch.sources` reads.
LINES = ("jsonl", "text")


def format_of(path: str, given: str | None) -> str:
    """The format of a file, `jsonl` where the extension says nothing. Raises InvalidRequest for an unknown one."""
    if given is not None:
        if given not in (*READERS, *LINES):
            raise InvalidRequest("format", show(given), f"one of {', '.join((*LINES, *READERS))}")
        return given
    extension = PurePosixPath(path.removesuffix(".gz")).suffix.removeprefix(".").lower()
    return extension if extension in READERS and extension != "json" else "jsonl"
