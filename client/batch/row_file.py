"""A file of output lines to which a batch appends, and which a resumed batch repairs.

After a crash the file contains everything that is needed to repair it: an incomplete last line is removed, and all
complete lines are kept.
"""

from __future__ import annotations

import contextlib
import gzip
import io
import os
import zlib
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import IO

from headrace.client.batch.errors import OutputRefused, as_refusal
from headrace.client.batch.formats.lines import JsonLines, LineFormat
from headrace.client.batch.input_files import is_in_input, open_lines
from headrace.client.batch.output_file import Done
from headrace.client.batch.output_lines import Written
from headrace.client.wire.unicode import printable


class RowFile:
    """A file of output lines, gzipped if its name ends in `.gz`. It can be scanned, repaired and appended to.

    Args:
        path: of the file.
        form: how requests are written; by default as lines of the Batch API.
    """

    def __init__(self, path: Path, form: LineFormat | None = None) -> None:
        self.path = path
        self._form = form or JsonLines()
        self._zipped = path.suffix == ".gz"
        self._raw: io.FileIO | None = None
        self._gzip: gzip.GzipFile | None = None
        #: Number of decompressed bytes up to the end of the last valid record, and whether something follows it.
        self._valid_bytes, self._torn = 0, False

    def __str__(self) -> str:
        return str(self.path)

    @property
    def exists(self) -> bool:
        """Whether the file has content."""
        return self.path.exists() and self.path.stat().st_size > 0

    def is_input(self, source: object) -> bool:
        """Whether the file is the input of the batch, or one of its files."""
        return is_in_input(self.path, source)

    def scan(self) -> Iterator[Written]:
        """The requests whose lines are in the file. Only its end may be unreadable.

        Raises:
            OutputRefused: the file is not an output of a batch, or has other columns.
        """
        self._valid_bytes, self._torn = 0, False
        if not self.path.exists():
            return
        lines = 0
        for record in self._records():
            is_header = lines == 0 and self._is_header(record)
            written = None if is_header else self._form.parse(record)
            if written is None and not is_header:
                self._torn = True
            elif self._torn:
                raise self._refused(f"is not an output of a batch: line {lines} is not an output line")
            else:
                self._valid_bytes += len(record)
            if written is not None:
                yield written
            lines += record.count(b"\n")
        if self._torn and not self._valid_bytes and any(line.endswith(b"\n") for line in self._records()):
            raise self._refused("is not an output of a batch: it has no output lines")

    def _is_header(self, record: bytes) -> bool:
        """Whether the first record of the file is the header. Raises OutputRefused if it is another one."""
        if (fault := self._form.header_fault(record)) is not None:
            raise self._refused(f"{fault}; write to another file, or compute everything again (--overwrite)")
        return record == self._form.header

    def _refused(self, reason: str) -> OutputRefused:
        return OutputRefused(f"{printable(str(self.path))} {reason}")

    def _opened(self) -> IO[bytes]:
        return open_lines(self.path) if self._zipped else self.path.open("rb")

    def _records(self) -> Iterator[bytes]:
        with self._opened() as file:
            try:
                yield from self._form.records(file)
            except (EOFError, OSError, zlib.error):
                self._torn = True

    def repair(self, *, without_failures: bool) -> None:
        """Remove the incomplete end that `scan` found, and the failures if they are to be computed again.

        A file that must be rewritten is replaced atomically: a crash leaves either the old file or the new one.
        """
        if not self.path.exists() or not (self._torn or without_failures):
            return
        if self._zipped or without_failures:
            self._rewrite(lambda written: not (without_failures and written.failed))
        else:
            os.truncate(self.path, self._valid_bytes)

    def _rewrite(self, keep: Callable[[Written], bool]) -> None:
        staged = RowFile(
            self.path.with_name(f"{self.path.name}.tmp{self.path.suffix if self._zipped else ''}"), self._form
        )
        staged.clear()
        staged.open()
        for record in self._records():
            written = self._form.parse(record)
            if record == self._form.header:
                continue  # `open` has written it
            if written is None:
                break
            if keep(written):
                staged.append([record])
        staged.close()
        staged.path.replace(self.path)

    def clear(self) -> None:
        """Delete the file."""
        self.path.unlink(missing_ok=True)

    def open(self) -> None:
        """Open for appending. Raises OutputRefused."""
        with as_refusal(self.path):
            empty = not self.exists
            self._raw = io.FileIO(self.path, "ab")
            if self._zipped:  # a new gzip member: a gzip file may have several
                self._gzip = gzip.GzipFile(fileobj=self._raw, mode="ab")
        if empty and self._form.header:
            self.append([self._form.header])

    def write(self, rows: Iterable[Done]) -> None:
        """Write requests that are done, each with the id of its job, through to the operating system.

        They survive this process. Raises OutputRefused.
        """
        self.append([self._form.encode(*row) for row in rows])

    def append(self, records: Iterable[bytes]) -> None:
        """Write records as they are. Raises OutputRefused."""
        if self._raw is None:
            raise ValueError(f"{printable(str(self.path))} is not open")
        data = b"".join(records)
        with as_refusal(self.path):
            if self._gzip is not None:
                self._gzip.write(data)
                self._gzip.flush()  # ends a block of the stream, so that all lines can be decompressed
                return
            while data:
                data = data[self._raw.write(data) or 0 :]

    def sync(self) -> None:
        """Wait until the file is on disk. Raises OutputRefused if it cannot be: some file systems say so only now."""
        if self._raw is not None:
            with as_refusal(self.path):
                os.fsync(self._raw.fileno())

    def close(self) -> None:
        """Close the file and wait until it is on disk."""
        if self._raw is None:
            return
        with contextlib.suppress(OSError):
            if self._gzip is not None:
                self._gzip.close()
            os.fsync(self._raw.fileno())
        self._raw.close()
        self._raw = self._gzip = None
