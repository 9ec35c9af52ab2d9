"""The formats of output lines: those of the Batch API, and flat rows as JSON lines, CSV and TSV.

A file of lines can be appended to, and repaired after a crash: after its header, if it has one, each request has a
record.
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterable, Iterator, Sequence
from typing import IO, Protocol

from headrace.client.batch.formats.flat import CUSTOM_ID, DIGEST, ERROR, flat_names, flat_row
from headrace.client.batch.formats.text import as_cell, as_json
from headrace.client.batch.items import BatchItem
from headrace.client.batch.output_lines import Written, output_line, read_digest, read_output_line
from headrace.client.wire.results import Outcome


class LineFormat(Protocol):
    """How requests are written as lines."""

    @property
    def header(self) -> bytes:
        """What a file begins with."""
        ...

    def encode(self, row: BatchItem, job_id: str, outcome: Outcome | Exception) -> bytes:
        """The record of a request that is done."""
        ...

    def records(self, file: IO[bytes]) -> Iterator[bytes]:
        """The header, if the format has one, and the records of a file; the last one may be incomplete."""
        ...

    def parse(self, record: bytes) -> Written | None:
        """Parse a record. Returns None if it is incomplete or not one of this format."""
        ...

    def header_fault(self, record: bytes) -> str | None:
        """What is wrong with a file that begins with this record, if it is an output with another header."""
        ...


class JsonLines:
    """Lines in the format of the OpenAI Batch API."""

    header = b""

    def encode(self, row: BatchItem, job_id: str, outcome: Outcome | Exception) -> bytes:
        return output_line(row, job_id, outcome)

    def records(self, file: IO[bytes]) -> Iterator[bytes]:
        while line := file.readline():
            yield line

    def parse(self, record: bytes) -> Written | None:
        return read_output_line(record)

    def header_fault(self, record: bytes) -> str | None:  # noqa: ARG002
        """There is no header."""
        return None


class FlatJsonLines(JsonLines):
    """Flat rows as JSON lines."""

    def __init__(self, passed: Iterable[str]) -> None:
        self._names = flat_names(passed)

    def encode(self, row: BatchItem, job_id: str, outcome: Outcome | Exception) -> bytes:  # noqa: ARG002
        return as_json(flat_row(row, outcome, self._names))

    def parse(self, record: bytes) -> Written | None:
        if not record.endswith(b"\n"):
            return None
        try:
            fields = json.loads(record)
            custom_id, error, digest = fields[CUSTOM_ID], fields[ERROR], fields[DIGEST]
        except (ValueError, LookupError, TypeError, RecursionError):
            return None
        return Written(custom_id, read_digest(digest), error is not None) if isinstance(custom_id, str) else None


class SeparatedLines:
    """Flat rows as CSV or TSV with a header.

    Args:
        passed: the columns of the input.
        delimiter: between two fields.
    """

    def __init__(self, passed: Iterable[str], delimiter: str) -> None:
        self._delimiter = delimiter
        self._names = flat_names(passed)
        self._columns = list(flat_row(None, None, self._names))
        self._places = [self._columns.index(name) for name in (CUSTOM_ID, ERROR, DIGEST)]

    @property
    def header(self) -> bytes:
        return self._record(self._columns)

    def encode(self, row: BatchItem, job_id: str, outcome: Outcome | Exception) -> bytes:  # noqa: ARG002
        return self._record([as_cell(value) for value in flat_row(row, outcome, self._names).values()])

    def _record(self, fields: Sequence[str]) -> bytes:
        text = io.StringIO()
        csv.writer(text, delimiter=self._delimiter, lineterminator="\n").writerow(fields)
        return text.getvalue().encode("utf-8", "replace")

    def records(self, file: IO[bytes]) -> Iterator[bytes]:
        """A record ends at a line end outside quotes: after an even number of them, since those inside are doubled."""
        record, quotes = [], 0
        while line := file.readline():
            record.append(line)
            quotes += line.count(b'"')
            if quotes % 2 == 0:
                yield b"".join(record)
                record, quotes = [], 0
        if record:
            yield b"".join(record)

    def parse(self, record: bytes) -> Written | None:
        fields = self._fields(record)
        if fields is None or len(fields) != len(self._columns):
            return None
        custom_id, error, digest = (fields[place] for place in self._places)
        return Written(custom_id, read_digest(digest), bool(error))

    def _fields(self, record: bytes) -> list[str] | None:
        if not record.endswith(b"\n"):
            return None
        try:
            (fields,) = csv.reader(io.StringIO(record.decode(), newline=""), delimiter=self._delimiter, strict=True)
        except (csv.Error, UnicodeError, ValueError):
            return None
        return fields

    def header_fault(self, record: bytes) -> str | None:
        found = self._fields(record)
        if found is None or found == self._columns or not {CUSTOM_ID, DIGEST} <= set(found):
            return None
        return f"has other columns than this batch writes: {', '.join(found)[:200]}"
