"""Where the input of a batch comes from: a file, a pipe, standard input, or any iterable.

The input is read twice: first everything is checked, then it is submitted.
"""

from __future__ import annotations

import gzip
import io
import json
import tempfile
import weakref
import zlib
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import IO, Any, Protocol, cast

from headrace.client.batch.errors import Fault, InvalidBatch
from headrace.client.batch.items import is_column
from headrace.client.wire.errors import InvalidRequest
from headrace.client.wire.unicode import printable
from headrace.client.wire.values import json_default, show, to_python
from headrace.extras import how_to_install

#: The longest line. A request at all its limits is shorter, even with every character escaped.
MAX_LINE_BYTES = 2**20

Reader = Callable[[IO[bytes]], Iterator[Any]]


class Source(Protocol):
    """Numbered lines or items that can be read more than once."""

    def items(self) -> Iterator[tuple[int, Any]]:
        """Read from the start. Yields pairs: a number from 1, and a line as bytes or an item of the iterable."""
        ...


class FileSource:
    """Lines of a file, gzipped or not.

    Args:
        opened: opens the file, at its start.
    """

    def __init__(self, opened: Callable[[], IO[bytes]]) -> None:
        self._opened = opened

    def items(self) -> Iterator[tuple[int, Any]]:
        with self._opened() as file:
            yield from numbered_lines(file)


class TableSource:
    """Rows of a table.

    Args:
        opened: opens the file, at its start.
        read: one of `headrace.client.batch.formats.readers`.
    """

    def __init__(self, opened: Callable[[], IO[bytes]], read: Callable[[IO[bytes]], Iterator[Any]]) -> None:
        self._opened, self._read = opened, read

    def items(self) -> Iterator[tuple[int, Any]]:
        with self._opened() as file:
            yield from enumerate(self._read(file), 1)


class ShardSource:
    """Every `count`-th item of a source, from `index`. Items keep the numbers that they have in the whole."""

    def __init__(self, source: Source, index: int, count: int) -> None:
        self._source, self._index, self._count = source, index, count

    def items(self) -> Iterator[tuple[int, Any]]:
        return ((line, item) for line, item in self._source.items() if (line - 1) % self._count == self._index)


class IterableSource:
    """Items of a list, a data set or a column."""

    def __init__(self, items: Iterable[Any]) -> None:
        self._items = items

    def items(self) -> Iterator[tuple[int, Any]]:
        return enumerate(self._items, 1)


def open_source(source: str | Path | IO[bytes] | Iterable[Any], table: Reader | None = None) -> Source:
    """A source for any input, as lines or, with `table`, as rows.

    An input that can be read only once (a pipe, a generator) is copied to a temporary file.

    Raises:
        InvalidBatch: the file does not exist or cannot be read.
        InvalidRequest: it is not a path, a file or an iterable.
    """
    if isinstance(source, str) and "://" in source:
        open_remote(source).close()
        return _source_of(lambda: open_remote(source), table)
    if isinstance(source, (str, Path)):
        path = Path(source)
        try:
            if not path.is_file() and path.exists():  # a named pipe
                with path.open("rb") as pipe:
                    return _copied(iter(lambda: pipe.read(2**16), b""), table)
            open_lines(path).close()
        except (OSError, ValueError) as error:  # ValueError: no file can have this name
            reason = getattr(error, "strerror", None) or printable(str(error))
            raise InvalidBatch([Fault(0, "input", f"{printable(str(path))} cannot be read: {reason}")]) from None
        return _source_of(lambda: open_lines(path), table)
    if not is_column(source):
        raise InvalidRequest("source", f"a {type(source).__name__}", "a path, a file, or an iterable of prompts")
    if hasattr(source, "read"):
        file = cast("IO[bytes]", source)
        return _copied(iter(lambda: file.read(2**16), b""), table)
    if iter(source) is source:
        return _copied(_json_line(item) for item in source)
    return IterableSource(source)


def _source_of(opened: Callable[[], IO[bytes]], table: Reader | None) -> Source:
    return FileSource(opened) if table is None else TableSource(opened, table)


def open_remote(url: str) -> IO[bytes]:
    """Open what fsspec opens. Raises InvalidBatch, InvalidRequest."""
    try:
        import fsspec
    except ImportError:
        raise InvalidRequest("source", show(url), f"a path; for a URL: {how_to_install('tables')}") from None
    try:
        return _unzipped(io.BufferedReader(fsspec.open(url, "rb").open()))
    except Exception as error:  # each file system of fsspec has errors of its own
        raise InvalidBatch([Fault(0, "input", f"{printable(url)} cannot be read: {printable(str(error))}")]) from None


def _json_line(item: Any) -> bytes:
    item = to_python(item)
    try:
        return json.dumps(item, default=json_default).encode() + b"\n"
    except (TypeError, ValueError) as error:
        raise InvalidRequest(
            "prompts", f"an item of type {type(item).__name__}", f"a value that JSON can represent ({error})"
        ) from None


def _copied(pieces: Iterable[bytes], table: Reader | None = None) -> Source:
    copy = tempfile.TemporaryFile()  # noqa: SIM115
    try:
        for piece in pieces:
            copy.write(piece)
    except BaseException:
        copy.close()
        raise

    def rewound() -> IO[bytes]:
        copy.seek(0)
        return _unzipped(io.BufferedReader(_KeptOpen(copy)))

    source = _source_of(rewound, table)
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


def open_lines(path: Path) -> IO[bytes]:
    """Open a file for reading. It is decompressed if its content is gzip, whatever its name."""
    return _unzipped(path.open("rb"))


def _unzipped(file: io.BufferedReader) -> IO[bytes]:
    zipped = file.peek(2)[:2] == b"\x1f\x8b"
    return cast("IO[bytes]", _Unzipped(file)) if zipped else file


class _Unzipped(gzip.GzipFile):
    """A GzipFile that also closes the file which it reads."""

    def __init__(self, file: IO[bytes]) -> None:
        super().__init__(fileobj=file, mode="rb")
        self._zipped_file = file

    def close(self) -> None:
        super().close()
        self._zipped_file.close()


def numbered_lines(file: IO[bytes]) -> Iterator[tuple[int, bytes]]:
    """The lines and their numbers from 1. A line that is too long is cut off after `MAX_LINE_BYTES` + 1.

    Raises:
        InvalidBatch: the file cannot be read to its end, for example because it is an incomplete gzip file.
    """
    number = 0
    try:
        while line := file.readline(MAX_LINE_BYTES + 1):
            number += 1
            yield number, line
            while len(line) > MAX_LINE_BYTES and not line.endswith(b"\n"):
                line = file.readline(MAX_LINE_BYTES + 1)
    except (EOFError, OSError, zlib.error) as error:
        raise InvalidBatch([Fault(number + 1, "line", f"the file cannot be read any further: {error}")]) from None
