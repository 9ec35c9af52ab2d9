"""The output of a batch: lines in the format of the OpenAI Batch API, each written when its request is done.

After a crash the output files contain everything that is needed to repair them: an incomplete last line is removed, and
all complete lines are kept.
"""

from __future__ import annotations

import contextlib
import errno
import gzip
import io
import os
import secrets
import sqlite3
import sys
import zlib
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from types import TracebackType
from typing import IO

from headrace.client.batch.errors import OutputRefused
from headrace.client.batch.items import BatchItem
from headrace.client.batch.output_lines import Written, output_line, read_output_line
from headrace.client.batch.run_file import RunFile
from headrace.client.batch.sources import open_lines
from headrace.client.wire.results import Outcome, Result
from headrace.client.wire.unicode import printable

STDOUT = "-"


def is_disk_full(error: BaseException | None) -> bool:
    """Whether an error, or one that caused it, is that of a full disk or an exhausted quota."""
    while error is not None:
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            return True
        if isinstance(error, sqlite3.OperationalError) and "full" in str(error):  # the index of a batch
            return True
        error = error.__cause__ or error.__context__
    return False


class RowFile:
    """A file of output lines, gzipped if its name ends in `.gz`. It can be scanned, repaired and appended to."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._zipped = path.suffix == ".gz"
        self._raw: io.FileIO | None = None
        self._gzip: gzip.GzipFile | None = None
        #: Number of decompressed bytes up to the end of the last valid line, and whether something follows it.
        self._valid_bytes, self._torn = 0, False

    def scan(self) -> Iterator[Written]:
        """The requests whose lines are in the file. Only its end may be unreadable.

        Raises:
            OutputRefused: the file is not an output of a batch.
        """
        self._valid_bytes, self._torn = 0, False
        if not self.path.exists():
            return
        for number, line in enumerate(self._lines(), 1):
            written = read_output_line(line)
            if written is None:
                self._torn = True
            elif self._torn:
                raise OutputRefused(
                    f"{printable(str(self.path))} is not an output of a batch: line {number - 1} is not an output line"
                )
            else:
                self._valid_bytes += len(line)
                yield written
        if self._torn and not self._valid_bytes and any(line.endswith(b"\n") for line in self._lines()):
            raise OutputRefused(f"{printable(str(self.path))} is not an output of a batch: it has no output lines")

    def _opened(self) -> IO[bytes]:
        return open_lines(self.path) if self._zipped else self.path.open("rb")

    def _lines(self) -> Iterator[bytes]:
        with self._opened() as file:
            try:
                while line := file.readline():
                    yield line
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
        staged = RowFile(self.path.with_name(f"{self.path.name}.tmp{self.path.suffix if self._zipped else ''}"))
        staged.path.unlink(missing_ok=True)
        staged.open()
        for line in self._lines():
            written = read_output_line(line)
            if written is None:
                break
            if keep(written):
                staged.write([line])
        staged.close()
        staged.path.replace(self.path)

    def open(self) -> None:
        """Open for appending. Raises OutputRefused."""
        with self._as_refusal():
            self._raw = io.FileIO(self.path, "ab")
            if self._zipped:  # a new gzip member: a gzip file may have several
                self._gzip = gzip.GzipFile(fileobj=self._raw, mode="ab")

    def write(self, lines: Iterable[bytes]) -> None:
        """Write lines through to the operating system, so that they survive this process. Raises OutputRefused."""
        if self._raw is None:
            raise ValueError(f"{printable(str(self.path))} is not open")
        data = b"".join(lines)
        with self._as_refusal():
            if self._gzip is not None:
                self._gzip.write(data)
                self._gzip.flush()  # ends a block of the stream, so that all lines can be decompressed
                return
            while data:
                data = data[self._raw.write(data) or 0 :]

    def sync(self) -> None:
        """Wait until the file is on disk. Raises OutputRefused if it cannot be: some file systems say so only now."""
        if self._raw is not None:
            with self._as_refusal():
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

    @contextlib.contextmanager
    def _as_refusal(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            advice = "; make room, then resume the batch" if is_disk_full(error) else ""
            raise OutputRefused(f"{printable(str(self.path))} cannot be written: {error.strerror}{advice}") from error


class StandardOutput:
    """Output lines on standard output."""

    def write(self, lines: Iterable[bytes]) -> None:
        """Write lines and flush."""
        sys.stdout.buffer.write(b"".join(lines))
        sys.stdout.buffer.flush()


class Output:
    """The files of a batch, as a context manager: results in one file, failures in another if there is one.

    Within the block call `check_free`, `scan` unless everything is overwritten, `open`, `write`, and `finish` when all
    requests are done. Leaving the block closes the files; what was written is kept.

    Args:
        path: a path, or `-` for standard output.
        errors: the file for failures; they go to `path` if not given.

    Attributes:
        run: the id of the run; job ids begin with it.
        failed_before: failures that are in the files and remain there. Known after `scan`.

    Raises:
        OutputRefused: another process writes to the output, or it cannot be written.
    """

    def __init__(self, path: str | Path, errors: str | Path | None = None) -> None:
        self.path = path
        for each in (path, errors):
            _check_path(each)
        to_stdout = str(path) == STDOUT
        self._files = [] if to_stdout else [RowFile(Path(path))]
        if errors is not None and str(errors) != str(path):
            self._files.append(RowFile(Path(errors)))
        self._results: RowFile | StandardOutput = StandardOutput() if to_stdout else self._files[0]
        self._failures = self._files[-1] if errors is not None and self._files else self._results
        self._run_file = None if to_stdout else RunFile(Path(path))
        self.run = self._run_file.run if self._run_file else secrets.token_hex(6)
        self.failed_before = 0
        self._retrying = self._begun = False

    def __enter__(self) -> Output:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def check_free(self, source: object, *, resume: bool, overwrite: bool) -> None:
        """Check that no data is lost by writing here.

        Raises:
            OutputRefused: a file is the input, or exists and is neither to be resumed nor to be overwritten.
        """
        for file in self._files:
            if isinstance(source, (str, Path)) and os.path.realpath(source) == os.path.realpath(file.path):
                raise OutputRefused(f"{printable(str(file.path))} is the input; write to another file")
            exists = file.path.exists() and file.path.stat().st_size > 0
            if (exists or (self._run_file and self._run_file.existed)) and not (resume or overwrite):
                advice = "resume it (--resume), or compute everything again (--overwrite)"
                raise OutputRefused(f"{printable(str(file.path))} exists; {advice}")

    def scan(self, *, retry_errors: bool) -> Iterator[Written]:
        """Yield the requests whose lines will be kept: all, or with `retry_errors` those that succeeded.

        Exhaust the iterator before calling `open`.

        Raises:
            OutputRefused: a file is not an output of a batch.
        """
        self.failed_before = 0
        for file in self._files:
            for written in file.scan():
                if written.failed and retry_errors:
                    self._retrying = True
                else:
                    self.failed_before += written.failed
                    yield written

    def open(self, *, overwrite: bool) -> None:
        """Repair the files after `scan`, or empty them, and open them for writing. Raises OutputRefused."""
        self._begun = True
        if self._run_file is not None and (overwrite or self._retrying):
            self._run_file.renew()  # under its old id a failed job would not be computed again
            self.run = self._run_file.run
        for file in self._files:
            if overwrite:
                file.path.unlink(missing_ok=True)
            else:
                file.repair(without_failures=self._retrying)
            file.open()

    def renew(self) -> None:
        """Give the run another id, if it has one: its jobs were cancelled, and resuming it computes them again."""
        if self._run_file is not None and self._run_file.existed:
            self._run_file.renew()
            self.run = self._run_file.run

    def write(self, pairs: Iterable[tuple[BatchItem, Outcome | Exception]]) -> None:
        """Write the lines of requests that are done. Raises OutputRefused."""
        results: list[bytes] = []
        failures: list[bytes] = results if self._failures is self._results else []
        for row, outcome in pairs:
            line = output_line(row, row.job_id(self.run), outcome)
            (results if isinstance(outcome, Result) else failures).append(line)
        if results:
            self._results.write(results)
        if failures and failures is not results:
            self._failures.write(failures)

    def finish(self) -> None:
        """Mark the output as complete: all requests are done, and nothing is left to resume. Raises OutputRefused."""
        for file in self._files:
            file.sync()
        if self._run_file is not None:
            self._run_file.remove()

    def close(self) -> None:
        """Close the files. If the files of a new run were never opened, no run file remains."""
        for file in self._files:
            file.close()
        if self._run_file is not None:
            if not self._begun and not self._run_file.existed:
                self._run_file.remove()
            self._run_file.close()
            self._run_file = None


def _check_path(path: str | Path | None) -> None:
    """Refuse a path that no file can have. Raises OutputRefused."""
    try:
        if path is not None and b"\0" in os.fsencode(path):
            raise ValueError("embedded null byte")
    except ValueError as error:
        raise OutputRefused(f"{printable(str(path))} cannot be written: {printable(str(error))}") from None
