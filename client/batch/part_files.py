"""An output in parts: a directory of files, each of which is complete or absent.

Rows that are done wait in memory until they fill a part. After a crash they are in no part, and a resumed batch reads
their results from Redis, or computes them again.
"""

from __future__ import annotations

import os
import re
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import IO, Protocol

from headrace.client.batch.errors import OutputRefused
from headrace.client.batch.folders import Folder, LocalFolder, RemoteRun
from headrace.client.batch.input_files import is_in_input
from headrace.client.batch.output_file import Done
from headrace.client.batch.output_lines import Written
from headrace.client.wire.results import Result
from headrace.client.wire.unicode import printable

#: A part is written when it has this many rows, or this many characters of text, or its oldest row waits this long.
PART_ROWS, PART_CHARACTERS, PART_S = 16_384, 2**25, 60.0


class PartFormat(Protocol):
    """How the requests of a part are written."""

    extension: str

    def encode(self, rows: Sequence[Done]) -> bytes:
        """A file with these requests."""
        ...

    def scan(self, file: IO[bytes]) -> Iterator[Written]:
        """The requests of a part. Raises ValueError, OSError if it is none, KeyError if it has other columns."""
        ...

    def retain(self, file: IO[bytes], keep: Callable[[Written], bool]) -> bytes:
        """The part without the requests that are not kept; empty if none are."""
        ...


class PartFiles:
    """A directory of parts `part-00000.EXTENSION`. It can be scanned, repaired and added to.

    Args:
        folder: of the parts.
        form: how the requests of a part are written.
        clock: monotonic seconds.
    """

    def __init__(self, folder: Folder, form: PartFormat, clock: Callable[[], float] = time.monotonic) -> None:
        self._folder, self._form, self._clock = folder, form, clock
        self._name = re.compile(rf"part-(\d{{5,}})\.{form.extension}")
        self._failed: set[str] = set()  # parts with failures
        self._rows: list[Done] = []
        self._characters, self._since, self._next = 0, 0.0, 0

    def __str__(self) -> str:
        return str(self._folder)

    @property
    def exists(self) -> bool:
        """Whether there are parts. Raises OutputRefused if the directory holds anything else."""
        return bool(self._parts())

    def is_input(self, source: object) -> bool:
        """Whether the input of the batch is in the directory, or the directory is in the input."""
        if not isinstance(source, (str, Path)):
            return False
        own, given = str(self._folder).rstrip("/"), str(source).rstrip("/")
        if isinstance(self._folder, LocalFolder):
            if is_in_input(self._folder.path, source):
                return True
            own, given = os.path.realpath(own), os.path.realpath(given)
        return given == own or given.startswith(f"{own}/")

    def _parts(self) -> list[str]:
        names = self._folder.names()
        ours = {RemoteRun.NAME, *filter(_is_staged, names)}
        if other := [name for name in names if name not in ours and not self._name.fullmatch(name)]:
            raise OutputRefused(
                f"{printable(str(self._folder))} has files of something else ({printable(', '.join(other[:3]))}); "
                "write to a new directory, or remove them"
            )
        return sorted((name for name in names if self._name.fullmatch(name)), key=self._number)

    def _number(self, name: str) -> int:
        found = self._name.fullmatch(name)
        return int(found[1]) if found else -1

    def scan(self) -> Iterator[Written]:
        """The requests whose rows are in the parts.

        Raises:
            OutputRefused: a part is not one of this output.
        """
        self._failed.clear()
        for name in self._parts():
            place = printable(f"{self._folder}/{name}")
            try:
                with self._folder.open(name) as file:
                    for written in self._form.scan(file):
                        if written.failed:
                            self._failed.add(name)
                        yield written
            except KeyError as error:
                raise OutputRefused(
                    f"{place} belongs to another run, with other columns ({error.args[0]}); "
                    "write to another directory, or compute everything again (--overwrite)"
                ) from None
            except (ValueError, OSError) as error:
                raise OutputRefused(
                    f"{place} is not a part of a batch ({printable(str(error))[:200]}); remove it, then resume, or "
                    "write to another directory"
                ) from None

    def repair(self, *, without_failures: bool) -> None:
        """Remove the failures that `scan` found if they are to be computed again. Each part is replaced atomically."""
        for name in sorted(self._failed) if without_failures else ():
            with self._folder.open(name) as file:
                kept = self._form.retain(file, lambda written: not written.failed)
            if kept:
                self._folder.write(name, kept)
            else:
                self._folder.delete(name)

    def clear(self) -> None:
        """Delete all parts."""
        for name in self._parts():
            self._folder.delete(name)

    def open(self) -> None:
        """Begin to add parts, without what a crash left of one."""
        for name in self._folder.names():
            if _is_staged(name):
                self._folder.delete(name)
        self._next = max(map(self._number, self._parts()), default=-1) + 1

    def write(self, rows: Iterable[Done]) -> None:
        """Add requests that are done, each with the id of its job. Raises OutputRefused."""
        for done in rows:
            if not self._rows:
                self._characters, self._since = 0, self._clock()
            self._rows.append(done)
            if isinstance(done[2], Result):
                self._characters += len(done[2].text)
            if len(self._rows) >= PART_ROWS or self._characters >= PART_CHARACTERS:
                self.sync()
        if self._rows and self._clock() - self._since >= PART_S:
            self.sync()

    def sync(self) -> None:
        """Write the rows that wait as a part. Raises OutputRefused."""
        if self._rows:
            self._folder.write(f"part-{self._next:05}.{self._form.extension}", self._form.encode(self._rows))
            self._next += 1
            self._rows = []

    def close(self) -> None:
        """Write what waits. Raises OutputRefused."""
        self.sync()


def _is_staged(name: str) -> bool:
    """Whether a file is a part that was not complete when its process died."""
    return name.startswith(".part-") and name.endswith(".tmp")
