"""Where the rows of a batch go: lines in the form of the OpenAI Batch API, each written and flushed when it is done.

What a dead process left is made good from the files alone: a torn end is cut off, and all rows that stand are kept.
"""

from __future__ import annotations

import contextlib
import fcntl
import gzip
import io
import json
import os
import secrets
import sys
import time
import zlib
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import IO, Any, NamedTuple

from headrace.client.batch.rows import Index, Row, open_lines
from headrace.client.wire.errors import OutputRefused
from headrace.client.wire.requests import Choice, Result, TokenLogprob
from headrace.client.wire.results import Outcome

STDOUT = "-"
#: Before the digest of a row in the `id` of its output line.
ROW_ID = "batch_req_"


class Written(NamedTuple):
    """A row that stands in a file."""

    custom_id: str
    #: Of the request that it answers; empty where another program wrote the line.
    digest: str
    failed: bool


def output_line(row: Row, job_id: str, outcome: Outcome | Exception) -> bytes:
    """A row's line. A job has no HTTP status of its own: it succeeds with 200, or has an `error` and no response."""
    line: dict[str, Any] = {"id": ROW_ID + row.digest, "custom_id": row.custom_id, "response": None, "error": None}
    if isinstance(outcome, Result):
        line["response"] = {"status_code": 200, "request_id": job_id, "body": completion(outcome)}
    else:
        message = getattr(outcome, "message", None) or str(outcome)
        line["error"] = {"code": failure_code(outcome), "message": message}
    return json.dumps(line, ensure_ascii=False).encode("utf-8", "replace") + b"\n"


def failure_code(error: Exception) -> str:
    """The word by which failures are counted."""
    return getattr(error, "code", None) or "invalid_request"


def completion(result: Result) -> dict[str, Any]:
    """A result as the completions API writes it, with vLLM's `stop_reason`, and the seed."""
    return {
        "id": f"cmpl-{result.id}",
        "object": "text_completion",
        "created": int(time.time()),
        "model": result.model,
        "choices": [_choice(choice) for choice in result.choices],
        "usage": result.usage.model_dump(),
        "system_fingerprint": result.fingerprint,
        "seed": result.seed,
    }


def _choice(choice: Choice) -> dict[str, Any]:
    scores = None if choice.logprobs is None else logprobs_fields(choice.logprobs)
    fields = choice.model_dump(include={"index", "text", "finish_reason", "stop_reason"})
    return {**fields, "logprobs": scores}


def logprobs_fields(scores: list[TokenLogprob], at: int = 0) -> dict[str, Any]:
    """Log probabilities as the completions API writes them, of tokens from character `at` of the text on."""
    offsets = []
    for score in scores:
        offsets.append(at)
        at += len(score.token)
    return {
        "tokens": [score.token for score in scores],
        "token_logprobs": [score.logprob for score in scores],
        "top_logprobs": [
            None if s.logprob is None else {s.token: s.logprob} | {top.token: top.logprob for top in s.top}
            for s in scores
        ],
        "text_offset": offsets,
    }


# --- files ---------------------------------------------------------------------------------------------------------


class RowFile:
    """A file of output lines, gzipped if its name ends in `.gz`: read for what stands in it, made good, appended to."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._zipped = path.suffix == ".gz"
        self._raw: io.FileIO | None = None
        self._gzip: gzip.GzipFile | None = None
        #: Bytes up to the end of the last line that could be read, unzipped; and whether more comes after it.
        self._sound, self._torn = 0, False

    def scan(self) -> Iterator[Written]:
        """The rows that stand here. Only the end may be unreadable.

        Raises:
            OutputRefused: the file holds something else.
        """
        self._sound, self._torn = 0, False
        if not self.path.exists():
            return
        for number, line in enumerate(self._lines(), 1):
            written = _read_line(line)
            if written is None:
                self._torn = True
            elif self._torn:
                raise OutputRefused(f"{self.path} is no output of a batch: the line before {number} is not one of its")
            else:
                self._sound += len(line)
                yield written
        if self._torn and not self._sound and any(line.endswith(b"\n") for line in self._lines()):
            raise OutputRefused(f"{self.path} is no output of a batch: nothing in it is one of its lines")

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
        """Cut off the torn end that `scan` saw, and the failures if they are to be computed again.

        A file that has to be written anew is replaced in one step: a death in between leaves the old one.
        """
        if not self.path.exists() or not (self._torn or without_failures):
            return
        if self._zipped or without_failures:
            self._rewrite(lambda written: not (without_failures and written.failed))
        else:
            os.truncate(self.path, self._sound)

    def _rewrite(self, keep: Callable[[Written], bool]) -> None:
        staged = RowFile(self.path.with_name(f"{self.path.name}.tmp{self.path.suffix if self._zipped else ''}"))
        staged.path.unlink(missing_ok=True)
        staged.open()
        for line in self._lines():
            written = _read_line(line)
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
            if self._zipped:  # a member of its own: gzip files may be laid end to end
                self._gzip = gzip.GzipFile(fileobj=self._raw, mode="ab")

    def write(self, lines: Iterable[bytes]) -> None:
        """Write lines and hand them to the operating system: they survive this process. Raises OutputRefused."""
        if self._raw is None:
            raise ValueError(f"{self.path} is not open")
        data = b"".join(lines)
        with self._as_refusal():
            if self._gzip is not None:
                self._gzip.write(data)
                self._gzip.flush()  # ends a block of the stream, so that all of it can be read
                return
            while data:
                data = data[self._raw.write(data) or 0 :]

    def close(self) -> None:
        """End the file, and wait until it is on disk."""
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
            raise OutputRefused(f"{self.path} cannot be written: {error.strerror}") from None


class StandardOutput:
    """Lines for whoever reads our standard output."""

    def write(self, lines: Iterable[bytes]) -> None:
        """Write and flush."""
        sys.stdout.buffer.write(b"".join(lines))
        sys.stdout.buffer.flush()

    def open(self) -> None:
        """Nothing to do."""

    def close(self) -> None:
        """Nothing to do."""


def _read_line(line: bytes) -> Written | None:
    if not line.endswith(b"\n"):
        return None  # whole or not, its last byte is missing
    try:
        fields = json.loads(line)
        custom_id, row_id = fields["custom_id"], fields["id"]
        failed = fields["error"] is not None or fields["response"]["status_code"] != 200
    except (ValueError, LookupError, TypeError, RecursionError):
        return None
    if not isinstance(custom_id, str) or not isinstance(row_id, str):
        return None
    digest = row_id.removeprefix(ROW_ID)
    ours = row_id.startswith(ROW_ID) and len(digest) == 16 and set(digest) <= set("0123456789abcdef")
    return Written(custom_id, digest if ours else "", failed)


# --- a run ---------------------------------------------------------------------------------------------------------


class RunFile:
    """`<output>.run`, which lies beside an output that is not complete: the run's id, and a lock.

    Jobs are named after the run, so that a process that resumes it finds those which are in Redis. A run that is
    complete has none, and one that is started anew has another id: its jobs are new.
    """

    def __init__(self, output: Path) -> None:
        self.path = output.with_name(f"{output.name}.run")
        self._descriptor = self._locked(output)
        self.existed = bool(self._read())
        self.run = self._read() or self.renew()

    def _locked(self, output: Path) -> int:
        while True:
            try:
                descriptor = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
            except OSError as error:
                raise OutputRefused(f"{self.path} cannot be written: {error.strerror}") from None
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                os.close(descriptor)
                raise OutputRefused(f"another process writes to {output} at this moment") from None
            with contextlib.suppress(FileNotFoundError):
                if os.stat(self.path).st_ino == os.fstat(descriptor).st_ino:
                    return descriptor
            os.close(descriptor)  # its holder has taken it away meanwhile

    def _read(self) -> str:
        try:
            run = json.loads(os.pread(self._descriptor, 4096, 0))["run"]
        except (ValueError, LookupError, TypeError):
            return ""
        return run if isinstance(run, str) and run.isalnum() and len(run) <= 32 else ""

    def renew(self) -> str:
        """Give the run another id."""
        self.run = secrets.token_hex(6)
        os.ftruncate(self._descriptor, 0)
        os.pwrite(self._descriptor, json.dumps({"run": self.run}).encode(), 0)
        return self.run

    def remove(self) -> None:
        """The output is complete, or nothing was begun."""
        self.path.unlink(missing_ok=True)

    def close(self) -> None:
        """Let go of the lock."""
        os.close(self._descriptor)


class Output:
    """The files of a batch: rows in one, failures in another if there is one.

    Args:
        path: a path, or `-` for standard output.
        errors: where failures go; with the others if not given.
    """

    def __init__(self, path: str | Path, errors: str | Path | None = None) -> None:
        self.path = path
        self._files = [] if str(path) == STDOUT else [RowFile(Path(path))]
        if errors is not None and str(errors) != str(path):
            self._files.append(RowFile(Path(errors)))
        self._rows: RowFile | StandardOutput = self._files[0] if str(path) != STDOUT else StandardOutput()
        self._failures = self._files[-1] if errors is not None and self._files else self._rows
        self._run = RunFile(Path(path)) if str(path) != STDOUT else None
        self.run = self._run.run if self._run else secrets.token_hex(6)
        self._retrying = False
        #: Failures that stand in the files and stay there; known after `done`.
        self.failed_before = 0

    def check_free(self, source: object, *, resume: bool, overwrite: bool) -> None:
        """See that nothing is lost by writing here.

        Raises:
            OutputRefused: an output is the input, or exists and is neither to be resumed nor overwritten.
        """
        for file in self._files:
            if isinstance(source, (str, Path)) and os.path.realpath(source) == os.path.realpath(file.path):
                self.abandon()
                raise OutputRefused(f"{file.path} is the input; write to another file")
            there = file.path.exists() and file.path.stat().st_size > 0
            if (there or (self._run and self._run.existed)) and not (resume or overwrite):
                self.abandon()
                raise OutputRefused(f"{file.path} exists; resume it (--resume), or compute all again (--overwrite)")

    def abandon(self) -> None:
        """Let go of a run that was not begun."""
        if self._run is not None and not self._run.existed:
            self._run.remove()
        self.close()

    def done(self, *, retry_errors: bool) -> Index:
        """The rows that stand in the files and stay there. Raises OutputRefused."""
        found = Index()
        for file in self._files:
            for written in file.scan():
                if written.failed and retry_errors:
                    self._retrying = True
                else:
                    self.failed_before += written.failed
                    found.add(written.custom_id, written.digest, 1)
        return found

    def open(self, *, overwrite: bool) -> None:
        """Make the files good after `done` has read them, or empty, and be ready for rows. Raises OutputRefused."""
        if self._run is not None and (overwrite or self._retrying):
            self.run = self._run.renew()  # else the jobs that failed would be found, and fail again
        for file in self._files:
            if overwrite:
                file.path.unlink(missing_ok=True)
            else:
                file.repair(without_failures=self._retrying)
            file.open()

    def write(self, pairs: Iterable[tuple[Row, Outcome | Exception]]) -> None:
        """Write the rows that are done. Raises OutputRefused."""
        rows: list[bytes] = []
        failures: list[bytes] = rows if self._failures is self._rows else []
        for row, outcome in pairs:
            line = output_line(row, row.job_id(self.run), outcome)
            (rows if isinstance(outcome, Result) else failures).append(line)
        if rows:
            self._rows.write(rows)
        if failures and failures is not rows:
            self._failures.write(failures)

    def finish(self) -> None:
        """All rows are there: nothing is left to be resumed."""
        if self._run is not None:
            self._run.remove()

    def close(self) -> None:
        """Close the files. What is written stands."""
        for file in self._files:
            file.close()
        if self._run is not None:
            self._run.close()
            self._run = None
