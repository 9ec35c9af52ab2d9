"""Check the whole input of a batch before the first request is submitted.

Memory does not grow with the input: a temporary database holds the ids and digests of all requests.
"""

from __future__ import annotations

import sqlite3
import weakref
from collections import deque
from collections.abc import Callable, Container, Iterable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

from headrace.client.batch.alike import CheckedParameters
from headrace.client.batch.errors import Fault, InputChanged, InvalidBatch
from headrace.client.batch.formats.arrow_rows import ArrowRow
from headrace.client.batch.formats.flat import why_not_flat
from headrace.client.batch.items import BatchItem
from headrace.client.batch.passed import SeenColumns
from headrace.client.batch.rows import ItemReader
from headrace.client.batch.sources import Source
from headrace.client.wire.errors import InvalidRequest
from headrace.client.wire.values import show

T = TypeVar("T")
#: Checks the jobs of one request, one by one.
Prepare = Callable[[list[dict[str, Any]]], Iterator[T]]

#: How many faults are listed; further ones are only counted.
MAX_FAULTS = 100
#: Rows that are inserted into the database at once.
INSERT_ROWS = 1000

_SCHEMA = """
PRAGMA journal_mode = OFF;
PRAGMA synchronous = OFF;
PRAGMA temp_store = FILE;
PRAGMA cache_size = -2000;
CREATE TABLE items (custom_id BLOB, digest TEXT, line INTEGER);
CREATE TABLE written (custom_id BLOB, digest TEXT);
BEGIN;
"""
_DUPLICATES = """
SELECT line, first FROM (SELECT line, min(line) OVER (PARTITION BY custom_id) AS first FROM items) WHERE line > first
"""
_RENAME = """
UPDATE items SET custom_id = CAST('row-' || line || '-repeated' AS BLOB) WHERE rowid IN (SELECT rowid FROM (
    SELECT rowid, line, min(line) OVER (PARTITION BY custom_id) AS first FROM items) WHERE line > first)
"""
_MATCHES = "SELECT line, written.digest IN ('', items.digest) FROM items JOIN written USING (custom_id)"


class ItemIndex:
    """The requests of a batch by custom id, in a temporary SQLite database on disk. It takes about 5 MB of memory."""

    def __init__(self) -> None:
        # The empty name means a temporary file, which SQLite deletes.
        self._database = sqlite3.connect("", isolation_level=None, check_same_thread=False)
        weakref.finalize(self, self._database.close)
        self._database.executescript(_SCHEMA)
        self._added: list[tuple[bytes, str, int]] = []

    def add(self, custom_id: str, digest: str, line: int) -> None:
        """Add a request of the input."""
        self._added.append((_as_blob(custom_id), digest, line))
        if len(self._added) == INSERT_ROWS:
            self._flush()

    def duplicates(self) -> Iterator[tuple[int, int]]:
        """Lines whose custom id is also in an earlier line, each with the first such line."""
        self._flush()
        yield from self._database.execute(_DUPLICATES)

    def rename_duplicates(self) -> frozenset[int]:
        """Rename the lines whose custom id is also in an earlier line, as `read_items` does. Returns these lines."""
        lines = frozenset(line for line, _ in self.duplicates())
        if lines:
            self._database.execute(_RENAME)
        return lines

    def matches(self, written: Iterable[tuple[str, str]]) -> Iterator[tuple[int, bool]]:
        """Compare the input with an output.

        Args:
            written: custom ids and digests of the requests in the output; the digest is empty if it is not known.

        Yields:
            The line of each request that is in the output, and whether the digests agree or one is not known.
        """
        self._flush()
        self._database.execute("DROP INDEX IF EXISTS written_by_id")
        self._database.execute("DELETE FROM written")
        rows = ((_as_blob(custom_id), digest) for custom_id, digest in written)
        self._database.executemany("INSERT INTO written VALUES (?, ?)", rows)
        self._database.execute("CREATE INDEX written_by_id ON written (custom_id, digest)")
        for line, agrees in self._database.execute(_MATCHES):
            yield line, bool(agrees)

    def _flush(self) -> None:
        self._database.executemany("INSERT INTO items VALUES (?, ?, ?)", self._added)
        self._added.clear()


def _as_blob(custom_id: str) -> bytes:
    # Other programs may write lone surrogates, which SQLite does not accept in text.
    return custom_id.encode("utf-8", "surrogatepass")


class Faults:
    """The first MAX_FAULTS faults that differ, in the order of their lines, and the total number of faults."""

    def __init__(self) -> None:
        self._found: dict[tuple[str, str], Fault] = {}
        self.count = 0

    def add(self, line: int, field: str, message: str) -> None:
        """Add a fault; line 0 means the whole input."""
        self.count += 1
        same = self._found.get((field, message))
        if same is not None:
            others = same.others if len(same.others) == MAX_FAULTS else (*same.others, max(line, same.line))
            first = min(line, same.line)
            self._found[field, message] = same._replace(line=first, times=same.times + 1, others=others)
            return
        if len(self._found) == MAX_FAULTS:
            last = max(self._found.values())
            if last.line <= line:
                return
            del self._found[last.field, last.message]
        self._found[field, message] = Fault(line, field, message)

    def raise_if_any(self, place: Callable[[int], str]) -> None:
        """Raise InvalidBatch if there are faults. `place` tells where a line is."""
        if self.count:
            faults = [
                fault._replace(place=place(fault.line)) if fault.line else fault for fault in self._found.values()
            ]
            raise InvalidBatch(sorted(faults), self.count)


@dataclass
class Checked:
    """What the check found: the number of requests and of lines, and the requests by custom id."""

    rows: int = 0
    lines: int = 0
    index: ItemIndex = field(default_factory=ItemIndex)
    seen: SeenColumns = field(default_factory=SeenColumns)
    #: The lines whose custom id is also in an earlier line, if these are put aside.
    repeated: frozenset[int] = frozenset()
    #: The first line of a request whose result does not fit into a flat row, and the field that makes it so.
    not_flat: tuple[int, str] | None = None

    def add(self, row: BatchItem) -> None:
        """Note a request."""
        self.rows += 1
        self.index.add(row.custom_id, row.digest, row.line)
        if row.columns and not isinstance(row.columns, ArrowRow):  # these have a schema
            self.seen.add(row.line, row.columns)
        if self.not_flat is None and (name := why_not_flat(row)) is not None:
            self.not_flat = row.line, name


def check(
    source: Source,
    reader: ItemReader,
    prepare: Prepare[object],
    *,
    limit: int | None = None,
    on_line: Callable[[int], None] | None = None,
) -> Checked:
    """Read the input once and check that every request can be submitted and that no custom id occurs twice.

    Args:
        prepare: for the jobs of one request; raises InvalidRequest for fields that `Client.submit` would refuse.
        limit: check only this many requests.
        on_line: called with the number of lines read, every 1000 lines.

    Raises:
        InvalidBatch: requests are wrong; it has the first MAX_FAULTS faults.
    """
    checked, faults, known = Checked(), Faults(), CheckedParameters()
    for line, item in source.items():
        if checked.rows == limit:
            break
        checked.lines = line
        if on_line is not None and line % 1000 == 0:
            on_line(line)
        row = None
        try:
            row = reader.read(line, item)
            if row is None:
                continue
            checked.add(row)
            if row.mistake is None and not known.cover(row):
                deque(prepare_row(prepare, row, row.requests()), 0)
                known.add(row)
        except InvalidRequest as error:
            if row is not None and reader.is_default(row, error.field):  # each row would be blamed for it
                faults.add(0, f"params.{error.field}", f"params.{error}; it is for all rows that do not set it")
            elif row is None or not reader.answers(error):
                faults.add(line, error.field, str(error))
    if reader.skip_invalid:
        checked.repeated = checked.index.rename_duplicates()
    for line, first in checked.index.duplicates():
        there, here = source.place(first), source.place(line)
        file, _, number = there.rpartition(", ")
        same = number if here.startswith(f"{file}, ") else there
        faults.add(line, "custom_id", f"custom_id: the same as in {same}; expected one that no other line has")
    if not checked.rows and not faults.count:
        faults.add(0, "input", "the input has no requests; expected at least one line that is not blank")
    faults.raise_if_any(source.place)
    return checked


def prepare_row(prepare: Prepare[T], row: BatchItem, requests: list[dict[str, Any]]) -> Iterator[T]:
    """Prepare the jobs of a request. Raises InvalidRequest that names the prompt of a list by its index."""
    jobs = prepare(requests)
    for index in range(len(requests)):
        try:
            job = next(jobs)
        except InvalidRequest as error:
            if row.prompts is None or error.field != "prompt":
                raise
            raise InvalidRequest(f"prompt[{index}]", error.value, error.expected) from None
        yield job


def read_items(
    source: Source, reader: ItemReader, *, limit: int | None = None, repeated: Container[int] = ()
) -> Iterator[BatchItem]:
    """Read the requests of a checked source again. Raises InputChanged if it has changed.

    Args:
        source: of the requests.
        reader: with which they were checked.
        limit: read only this many.
        repeated: lines that are put aside because their custom id is also in an earlier line.
    """
    count = 0
    for line, item in source.items():
        if count == limit:
            return
        try:
            row = reader.read(line, item)
        except InvalidRequest as error:
            raise InputChanged(line, str(error)) from None
        if row is None:
            continue
        count += 1
        if line in repeated:
            mistake = InvalidRequest("custom_id", show(row.custom_id), "one that no earlier line has")
            row = replace(row, custom_id=f"row-{line}-repeated", mistake=mistake)
        yield row
