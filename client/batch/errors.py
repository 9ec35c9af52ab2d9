"""The errors of batches."""

from __future__ import annotations

import contextlib
import errno
import sqlite3
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from headrace.client.wire.errors import HeadraceError
from headrace.client.wire.unicode import printable


class Fault(NamedTuple):
    """An error in one line of a batch. Line 0 means the whole input.

    Attributes:
        line: the number of the line or row in the whole input; of equal errors, that of the first.
        field: the field at fault.
        message: what is wrong, and what is expected.
        place: the file, and the line or row there.
        times: how many lines have this error.
        others: the first of the further lines with it.
    """

    line: int
    field: str
    message: str
    place: str = ""
    times: int = 1
    others: tuple[int, ...] = ()

    def __str__(self) -> str:
        place = self.place or (f"line {self.line}" if self.line else "")
        more = f" (and {self.times - 1} more with this error)" if self.times > 1 else ""
        return f"{place}: {self.message}{more}" if place else self.message


class InvalidBatch(HeadraceError, ValueError):
    """Raised when lines of a batch are wrong; nothing was queued.

    Attributes:
        faults: the first errors, ordered by line; equal ones once.
        count: the number of all errors.
    """

    code = "invalid_batch"

    def __init__(self, faults: list[Fault], count: int | None = None) -> None:
        self.faults, self.count = faults, sum(fault.times for fault in faults) if count is None else count
        super().__init__(faults, self.count)

    def by_line(self) -> list[Fault]:
        """The errors ordered by line, with an entry for each of the first lines that have the same one."""
        return sorted(
            fault._replace(line=line, times=1, others=())
            for fault in self.faults
            for line in (fault.line, *fault.others)
        )

    def __str__(self) -> str:
        more = self.count - sum(fault.times for fault in self.faults)
        return "\n".join([*map(str, self.faults), *([f"and {more} more"] if more > 0 else [])])


class InputChanged(HeadraceError):
    """Raised when the input of a batch has changed since it was checked."""

    code = "input_changed"

    def __init__(self, line: int, reason: str) -> None:
        super().__init__(line, reason)
        self.line, self.reason = line, reason

    def __str__(self) -> str:
        return f"the input changed while it was read: line {self.line}: {self.reason}; restore it, then resume"


class OutputRefused(HeadraceError):
    """Raised when the output of a batch exists, is the input, is in use, cannot be written, or holds something else."""

    code = "output_refused"


def is_disk_full(error: BaseException | None) -> bool:
    """Whether an error, or one that caused it, is that of a full disk or an exhausted quota."""
    while error is not None:
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            return True
        if isinstance(error, sqlite3.OperationalError) and "full" in str(error):  # the index of a batch
            return True
        error = error.__cause__ or error.__context__
    return False


@contextlib.contextmanager
def as_refusal(path: Path) -> Iterator[None]:
    """Raise OutputRefused where the system refuses to write in the block: it names the output, and what to do."""
    try:
        yield
    except OSError as error:
        advice = "; make room, then resume the batch" if is_disk_full(error) else ""
        raise OutputRefused(f"{printable(str(path))} cannot be written: {error.strerror}{advice}") from error
