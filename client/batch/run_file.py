"""The file beside an incomplete output that identifies the run and locks it."""

from __future__ import annotations

import errno
import json
import os
import secrets
from pathlib import Path

from filelock import FileLock, Timeout

from headrace.client.batch.errors import OutputRefused
from headrace.client.wire.unicode import parse_json, printable


class RunFile:
    """`<output>.run`: the id of the run, and a lock against other processes that write to the same output.

    Job ids begin with the run's id, so a process that resumes the run finds the jobs that are in Redis. A complete
    output has no such file. A new run has another id, and so new jobs.

    Attributes:
        run: the id of the run.
        existed: whether an earlier process left the run incomplete.

    Raises:
        OutputRefused: another process writes to the output, or the file cannot be written.
    """

    def __init__(self, output: Path) -> None:
        self.path = output.with_name(f"{output.name}.run")
        if not self.path.parent.is_dir():  # FileLock would create it
            raise OutputRefused(f"{printable(str(self.path))} cannot be written: {os.strerror(errno.ENOENT)}")
        # FileLock neither truncates nor removes the file, and ignores a file that its holder has removed.
        self._lock = FileLock(self.path, mode=0o600, thread_local=False, fallback_to_soft=False)
        try:
            self._lock.acquire(blocking=False)
        except Timeout:
            raise OutputRefused(f"another process is writing to {printable(str(output))}") from None
        except OSError as error:
            raise OutputRefused(f"{printable(str(self.path))} cannot be written: {error.strerror}") from None
        self.run = read_run(self.path.read_bytes()[:4096])
        self.existed = bool(self.run)
        if not self.existed:
            self.renew()

    def renew(self) -> None:
        """Give the run another id."""
        self.run = secrets.token_hex(6)
        self.path.write_text(json.dumps({"run": self.run}))

    def remove(self) -> None:
        """Remove the file: the output is complete, or was not begun. The lock is still held."""
        self.path.unlink(missing_ok=True)

    def close(self) -> None:
        """Release the lock."""
        self._lock.release()


def read_run(data: bytes) -> str:
    """The id of the run in the content of its file; empty if there is none."""
    try:
        run = parse_json(data)["run"]
    except (ValueError, LookupError, TypeError):
        return ""
    return run if isinstance(run, str) and run.isascii() and run.isalnum() and len(run) <= 32 else ""
