"""Readers of tables: each opens a binary file as its schema and its rows, mappings from column names to values."""

from __future__ import annotations

import contextlib
import csv
import io
import json
import zlib
from collections.abc import Callable, Iterator
from itertools import chain
from pathlib import PurePosixPath
from typing import IO, Any

from headrace.client.batch.formats.arrow_rows import ArrowBatch, ArrowRow
from headrace.client.batch.formats.arrow_types import BATCH_ROWS, check_names, import_pyarrow, schema_of
from headrace.client.batch.formats.line_reader import check_encoding, check_start
from headrace.client.batch.formats.tables import TableRows, unreadable
from headrace.client.wire.errors import InvalidRequest
from headrace.client.wire.unicode import is_unicode
from headrace.client.wire.values import show

#: Bytes of a column of a Parquet file that are read at once.
READ_BYTES = 2**20
#: The longest field of a CSV file in characters.
MAX_FIELD = 2**20
#: The longest JSON array in bytes: unlike the other formats it is read into memory.
MAX_ARRAY_BYTES = 2**28

#: What reading CSV raises.
CSV_ERRORS = (csv.Error, OSError, EOFError, zlib.error)
#: What is expected of a text with a byte order mark inside.
FILES_JOINED = "one only at the start of a file; if files were joined, give the directory of the single files instead"

#: What is expected of a text in another encoding.
IN_UTF8 = "text in UTF-8; convert the file, for example: iconv -f WINDOWS-1252 -t UTF-8"


def read_separated(file: IO[bytes], delimiter: str) -> TableRows:
    """CSV or TSV with a header. An empty field is None. Raises InvalidBatch."""
    csv.field_size_limit(MAX_FIELD)
    check_start(file)
    text = io.TextIOWrapper(file, "utf-8-sig", "surrogateescape", newline="")
    rows = csv.reader(text, delimiter=delimiter, strict=True)
    try:
        names = next(rows, [])
    except CSV_ERRORS as error:
        raise unreadable(0, error) from None
    if not all(map(is_unicode, names)):
        raise unreadable(0, f"its header has bytes that are not UTF-8; expected {IN_UTF8}")
    check_names(names)
    return TableRows(dict.fromkeys(names, "string"), _separated_rows(text, rows, names))


def _separated_rows(text: io.TextIOWrapper, rows: Iterator[list[str]], names: list[str]) -> Iterator[Any]:
    number = 0
    try:
        for fields in rows:
            if not fields:
                continue
            number += 1
            if len(fields) != len(names):
                advice = "a field with a comma, a quote or a line end needs quotes around it"
                yield InvalidRequest("line", f"{len(fields)} fields", f"{len(names)}, as in the header; {advice}")
                continue
            if fields[0].startswith("\ufeff"):
                yield InvalidRequest("line", "a byte order mark at its start", FILES_JOINED)
                continue
            if not all(field.isascii() or is_unicode(field) for field in fields):
                yield InvalidRequest("line", "bytes that are not UTF-8", IN_UTF8)
                continue
            yield {name: value if value else None for name, value in zip(names, fields, strict=True)}
    except CSV_ERRORS as error:
        raise unreadable(number + 1, error) from None
    finally:
        text.detach()  # the caller closes the file


def read_parquet(file: IO[bytes]) -> TableRows:
    """A Parquet file, read in batches. Raises InvalidBatch, InvalidRequest."""
    pyarrow = import_pyarrow()
    from pyarrow import parquet

    with _arrow_errors(pyarrow, 0):
        opened = parquet.ParquetFile(file, buffer_size=READ_BYTES)
        schema = schema_of(opened.schema_arrow)
    # One row group after another: reading them all together, pyarrow keeps more of them in memory than it needs.
    groups = (opened.iter_batches(BATCH_ROWS, row_groups=[group]) for group in range(opened.num_row_groups))
    return TableRows(schema, _arrow_rows(pyarrow, chain.from_iterable(groups)))


def read_arrow(file: IO[bytes]) -> TableRows:
    """An Arrow or Feather file, or an Arrow stream. Raises InvalidBatch, InvalidRequest."""
    pyarrow = import_pyarrow()
    with _arrow_errors(pyarrow, 0):
        is_file = file.read(6) == b"ARROW1"
        file.seek(0)
        reader = pyarrow.ipc.open_file(file) if is_file else pyarrow.ipc.open_stream(file)
        schema = schema_of(reader.schema)
    batches = (reader.get_batch(index) for index in range(reader.num_record_batches)) if is_file else iter(reader)
    return TableRows(schema, _arrow_rows(pyarrow, batches))


def _arrow_rows(pyarrow: Any, batches: Iterator[Any]) -> Iterator[ArrowRow]:
    number = 0
    while True:
        with _arrow_errors(pyarrow, number + 1):
            batch = next(batches, None)
            if batch is None:
                return
            batch.validate(full=True)  # offsets, lengths and texts that are wrong would crash the process later
        for start in range(0, batch.num_rows, BATCH_ROWS):
            yield from ArrowBatch(batch.slice(start, BATCH_ROWS)).rows()
        number += batch.num_rows


@contextlib.contextmanager
def _arrow_errors(pyarrow: Any, row: int) -> Iterator[None]:
    """Turns the errors of a file into InvalidBatch."""
    try:
        yield
    # A spoilt file may name sizes that no memory has, and columns that are no text.
    except (pyarrow.ArrowException, OSError, MemoryError, UnicodeDecodeError) as error:
        reason = str(error).strip().rstrip(".") or type(error).__name__
        raise unreadable(row, f"{reason}; it may be incomplete: compare its size with that of the original") from None


def read_array(file: IO[bytes]) -> TableRows:
    """A JSON array, which is read into memory. Raises InvalidBatch."""
    data = file.read(MAX_ARRAY_BYTES + 1)
    if len(data) > MAX_ARRAY_BYTES:
        raise unreadable(0, f"a JSON array of more than {MAX_ARRAY_BYTES} bytes; expected JSON lines for so many")
    check_encoding(data[:4])
    try:
        items = json.loads(data.decode("utf-8-sig"))
    except (ValueError, RecursionError) as error:
        raise unreadable(0, error) from None
    if not isinstance(items, list):
        raise unreadable(0, f"a {type(items).__name__}; expected an array of objects")
    return TableRows(None, iter(items))


#: By the name of the format, which is also an extension.
READERS: dict[str, Callable[[IO[bytes]], TableRows]] = {
    "csv": lambda file: read_separated(file, ","),
    "tsv": lambda file: read_separated(file, "\t"),
    "parquet": read_parquet,
    "arrow": read_arrow,
    "feather": read_arrow,
    "json": read_array,
}
#: The formats of lines; see `read_lines`.
LINES = ("jsonl", "text")


def format_of(path: str, given: str | None) -> str:
    """The format of a file, `jsonl` where the extension says nothing. Raises InvalidRequest for an unknown one."""
    if given is not None:
        if given not in (*READERS, *LINES):
            raise InvalidRequest("format", show(given), f"one of {', '.join((*LINES, *READERS))}")
        return given
    extension = PurePosixPath(path.removesuffix(".gz")).suffix.removeprefix(".").lower()
    return extension if extension in READERS and extension != "json" else "jsonl"
