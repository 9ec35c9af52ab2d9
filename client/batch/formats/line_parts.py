"""Parts of an output that are files of lines, for file systems to whose files nothing can be appended."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import IO

from headrace.client.batch.formats.lines import LineFormat
from headrace.client.batch.output_file import Done
from headrace.client.batch.output_lines import Written


class LineParts:
    """Parts as files of lines.

    Args:
        extension: of the files.
        form: how requests are written.
    """

    def __init__(self, extension: str, form: LineFormat) -> None:
        self.extension, self._form = extension, form

    def encode(self, rows: Sequence[Done]) -> bytes:
        """A file with these requests."""
        return self._form.header + b"".join(self._form.encode(*row) for row in rows)

    def scan(self, file: IO[bytes]) -> Iterator[Written]:
        """The requests of a part.

        Raises:
            ValueError: no batch wrote the file.
            KeyError: it has other columns; the argument says which.
        """
        for written, _ in self._records(file):
            yield written

    def retain(self, file: IO[bytes], keep: Callable[[Written], bool]) -> bytes:
        """The part without the requests that are not kept; empty if none are."""
        kept = b"".join(record for written, record in self._records(file) if keep(written))
        return self._form.header + kept if kept else b""

    def _records(self, file: IO[bytes]) -> Iterator[tuple[Written, bytes]]:
        for number, record in enumerate(self._form.records(file)):
            if number == 0:
                if (fault := self._form.header_fault(record)) is not None:
                    raise KeyError(fault)
                if record == self._form.header:
                    continue
            written = self._form.parse(record)
            if written is None:
                raise ValueError("it has a line that no batch wrote")
            yield written, record
