"""Where the input of a batch comes from: files, a pipe, standard input, or any iterable.

The input is read twice: first everything is checked, then it is submitted.
"""

from __future__ import annotations

import bisect
import contextlib
import io
import json
import tempfile
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, Any, Protocol, cast

from headrace.client.batch.errors import Fault, InvalidBatch
from headrace.client.batch.formats.line_reader import read_lines
from headrace.client.batch.formats.readers import READERS, format_of
from headrace.client.batch.frames import FrameSource, column_names
from headrace.client.batch.input_files import InputFile, find_files, unzipped
from headrace.client.batch.items import is_column
from headrace.client.wire.errors import InvalidRequest
from headrace.client.wire.values import json_default, to_python


class Source(Protocol):
    """Numbered lines or items that can be read more than once.

    Attributes:
        kind: the name of the format.
    """

    kind: str

    def items(self) -> Iterator[tuple[int, Any]]:
        """Read from the start. Yields pairs: a number from 1, and a line as bytes or an item of the iterable."""
        ...

    def place(self, line: int) -> str:
        """Where an item that was read is, for errors: its file and its number there."""
        ...

    @property
    def schema(self) -> Mapping[str, Any] | None:
        """The columns and their types, after everything was read; None if the items have none."""
        ...


class FilesSource:
    """Lines or rows of files, one file after another.

    Args:
        files: in their order; at least one.
        kind: the name of their format.
        check: called with the names of the columns of a table.
    """

    def __init__(
        self, files: Sequence[InputFile], kind: str, check: Callable[[Mapping[str, Any]], None] | None = None
    ) -> None:
        self.kind = kind
        self._files, self._check = files, check
        self._read, self._unit = READERS.get(kind, read_lines), "row" if kind in READERS else "line"
        self._starts = [0]  # of the files: how many items are before each
        self._schema: dict[str, Any] | None = None

    def items(self) -> Iterator[tuple[int, Any]]:
        count, self._starts, self._schema = 0, [], None
        for file in self._files:
            self._starts.append(count)
            with file.open() as opened:
                try:
                    rows = self._read(opened)
                    if rows.schema is not None:
                        self._merge(rows.schema)
                    for item in rows.rows:
                        count += 1
                        yield count, item
                except InvalidBatch as error:
                    raise InvalidBatch([self._in_file(file, fault) for fault in error.faults]) from None

    def _in_file(self, file: InputFile, fault: Fault) -> Fault:
        if not fault.line:
            return fault._replace(place=file.name)
        line = self._starts[-1] + fault.line
        return fault._replace(line=line, place=self.place(line))

    def _merge(self, schema: dict[str, Any]) -> None:
        """Check that all files have the same columns. A column that is null everywhere has any type."""
        if self._check is not None:
            try:
                self._check(schema)
            except InvalidRequest as error:
                raise InvalidBatch([Fault(0, error.field, str(error))]) from None
        if self._schema is None:
            self._schema = dict(schema)
            return
        for name in {**self._schema, **schema}:
            before, now = (str(each.get(name, "absent")) for each in (self._schema, schema))
            if before == "null" and now != "absent":
                self._schema[name] = schema[name]
            elif now not in (before, "null") or (now == "null" and before == "absent"):
                got = f"column {name!r} is {now}, and {before} in {self._files[0].name}"
                raise InvalidBatch(
                    [Fault(0, name[:80], f"{got}; expected files with one schema; compute each with its own output")]
                )

    def place(self, line: int) -> str:
        file = bisect.bisect_left(self._starts, line) - 1
        name, place = self._files[file].name, f"{self._unit} {line - self._starts[file]}"
        return f"{name}, {place}" if name else place

    @property
    def schema(self) -> Mapping[str, Any] | None:
        return self._schema


class ShardSource:
    """Every `count`-th item of a source, from `index`. Items keep the numbers that they have in the whole."""

    def __init__(self, source: Source, index: int, count: int) -> None:
        self.kind = source.kind
        self._source, self._index, self._count = source, index, count

    def items(self) -> Iterator[tuple[int, Any]]:
        return ((line, item) for line, item in self._source.items() if (line - 1) % self._count == self._index)

    def place(self, line: int) -> str:
        return self._source.place(line)

    @property
    def schema(self) -> Mapping[str, Any] | None:
        return self._source.schema


class IterableSource:
    """Items of a list, a data set or a column."""

    kind, schema = "jsonl", None

    def __init__(self, items: Iterable[Any]) -> None:
        self._items = items

    def items(self) -> Iterator[tuple[int, Any]]:
        return enumerate(self._items, 1)

    def place(self, line: int) -> str:
        return f"line {line}"


def open_source(
    source: str | Path | IO[bytes] | Iterable[Any],
    format: str | None = None,  # noqa: A002 - the name of the option
    check: Callable[[Mapping[str, Any]], None] | None = None,
) -> Source:
    """A source for any input.

    An input that can be read only once (a pipe, a generator) is copied to a temporary file.

    Args:
        source: a path of a file, a directory or a pattern, a URL that fsspec opens, a binary file, a table of pandas,
            polars or pyarrow, or an iterable.
        format: of the files; by default what their extension says.
        check: called with the columns of a table.

    Raises:
        InvalidBatch: the file does not exist or cannot be read.
        InvalidRequest: it is not a path, a file or an iterable, or there is no such format.
    """
    if isinstance(source, (str, Path)):
        pipe = _pipe(source)
        if pipe is not None:
            with pipe:
                return _copied(iter(lambda: pipe.read(2**16), b""), format_of(str(source), format), check)
        files, kind = find_files(source, format)
        files[0].open().close()
        return FilesSource(files, kind, check)
    if column_names(source) is not None:
        return FrameSource(source)
    if not is_column(source):
        raise InvalidRequest("source", f"a {type(source).__name__}", "a path, a file, or an iterable of prompts")
    if hasattr(source, "read"):
        file = cast("IO[bytes]", source)
        return _copied(iter(lambda: file.read(2**16), b""), format_of("", format), check)
    if iter(source) is source:
        return _copied(_json_line(item) for item in source)
    return IterableSource(source)


def _pipe(path: str | Path) -> IO[bytes] | None:
    """A named pipe, opened; None for anything else."""
    with contextlib.suppress(OSError, ValueError):
        if Path(path).exists() and not Path(path).is_file() and not Path(path).is_dir():
            return Path(path).open("rb")
    return None


def _json_line(item: Any) -> bytes:
    item = to_python(item)
    try:
        return json.dumps(item, default=json_default).encode() + b"\n"
    except (TypeError, ValueError) as error:
        raise InvalidRequest(
            "prompts", f"an item of type {type(item).__name__}", f"a value that JSON can represent ({error})"
        ) from None


def _copied(
    pieces: Iterable[bytes], kind: str = "jsonl", check: Callable[[Mapping[str, Any]], None] | None = None
) -> Source:
    copy = tempfile.TemporaryFile()  # noqa: SIM115
    try:
        for piece in pieces:
            copy.write(piece)
    except BaseException:
        copy.close()
        raise

    def rewound() -> IO[bytes]:
        copy.seek(0)
        return unzipped(io.BufferedReader(_KeptOpen(copy)))

    source = FilesSource([InputFile("", rewound)], kind, check)
    weakref.finalize(source, copy.close)
    return source


class _KeptOpen(io.RawIOBase):
    """A file that remains open when its reader is closed."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file = file

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = 0) -> int:
        return self._file.seek(offset, whence)

    def readinto(self, buffer: Any) -> int:
        data = self._file.read(len(buffer))
        buffer[: len(data)] = data
        return len(data)
