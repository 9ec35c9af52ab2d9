"""The output of a batch: rows in the format of the OpenAI Batch API, or flat ones, in a file or in parts."""

from __future__ import annotations

import os
import secrets
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from types import TracebackType

from headrace.client.batch.errors import OutputRefused
from headrace.client.batch.folders import RemoteFolder, RemoteRun
from headrace.client.batch.formats.lines import LineFormat
from headrace.client.batch.formats.writers import Passed, is_remote, line_format, output_file
from headrace.client.batch.items import BatchItem
from headrace.client.batch.output_file import Done, OutputFile
from headrace.client.batch.output_lines import Written
from headrace.client.batch.run_file import RunFile
from headrace.client.wire.results import Outcome, Result
from headrace.client.wire.unicode import printable

STDOUT = "-"


class StandardOutput:
    """Output lines on standard output."""

    def __init__(self, form: LineFormat) -> None:
        self._form, self._begun = form, False

    def write(self, rows: Iterable[Done]) -> None:
        """Write lines and flush."""
        lines = [self._form.encode(*row) for row in rows]
        if not self._begun:
            self._begun = True
            lines.insert(0, self._form.header)
        sys.stdout.buffer.write(b"".join(lines))
        sys.stdout.buffer.flush()


class Output:
    """The files of a batch, as a context manager: results in one file, failures in another if there is one.

    Within the block call `check_free`, `scan` unless everything is overwritten, `open`, `write`, and `finish` when all
    requests are done. Leaving the block closes the files; what was written is kept.

    Args:
        path: a path, a URL that fsspec opens, or `-` for standard output.
        errors: the file for failures; they go to `path` if not given.
        form: the format of `path`; by default what its extension says. That of `errors` follows from its extension.
        passed: the columns of the input that flat rows have, and their types.

    Attributes:
        run: the id of the run; job ids begin with it.
        failed_before: failures that are in the files and remain there. Known after `scan`.

    Raises:
        InvalidRequest: there is no such format, or a package for it is not installed.
        OutputRefused: another process writes to the output, or it cannot be written.
    """

    def __init__(
        self,
        path: str | Path,
        errors: str | Path | None = None,
        *,
        form: str | None = None,
        passed: Passed | None = None,
    ) -> None:
        self.path = path
        for each in (path, errors):
            _check_path(each)
        to_stdout = str(path) == STDOUT
        self._files: list[OutputFile] = [] if to_stdout else [output_file(path, form, passed or {})]
        if errors is not None and str(errors) != str(path):
            self._files.append(output_file(errors, None, passed or {}))
        self._results: OutputFile | StandardOutput
        self._results = StandardOutput(line_format(form, passed or {})) if to_stdout else self._files[0]
        self._failures = self._files[-1] if errors is not None and self._files else self._results
        self._run_file: RunFile | RemoteRun | None = None
        if not to_stdout:
            self._run_file = RemoteRun(RemoteFolder(str(path))) if is_remote(path) else RunFile(Path(path))
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
            if file.is_input(source):
                raise OutputRefused(f"{printable(str(file))} is the input; write to another file")
            if (file.exists or (self._run_file and self._run_file.existed)) and not (resume or overwrite):
                advice = "resume it (--resume), or compute everything again (--overwrite)"
                raise OutputRefused(f"{printable(str(file))} exists; {advice}")

    def scan(self, *, retry_errors: bool) -> Iterator[Written]:
        """Yield the requests whose rows will be kept: all, or with `retry_errors` those that succeeded.

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
                file.clear()
            else:
                file.repair(without_failures=self._retrying)
            file.open()

    def renew(self) -> None:
        """Give the run another id, if it has one: its jobs were cancelled, and resuming it computes them again."""
        if self._run_file is not None and self._run_file.existed:
            self._run_file.renew()
            self.run = self._run_file.run

    def write(self, pairs: Iterable[tuple[BatchItem, Outcome | Exception]]) -> None:
        """Write the rows of requests that are done. Raises OutputRefused."""
        results: list[Done] = []
        failures: list[Done] = results if self._failures is self._results else []
        for row, outcome in pairs:
            (results if isinstance(outcome, Result) else failures).append((row, row.job_id(self.run), outcome))
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
        try:
            for file in self._files:
                file.close()
        finally:
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
