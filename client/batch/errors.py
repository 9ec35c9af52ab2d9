"""The errors of batches."""

from __future__ import annotations

from typing import NamedTuple

from headrace.client.wire.errors import HeadraceError


class Fault(NamedTuple):
    """An error in one line of a batch. Line 0 means the whole input."""

    line: int
    field: str
    message: str


class InvalidBatch(HeadraceError, ValueError):
    """Raised when lines of a batch are wrong; nothing was queued.

    Attributes:
        faults: the first errors, ordered by line.
        count: the number of all errors.
    """

    code = "invalid_batch"

    def __init__(self, faults: list[Fault], count: int | None = None) -> None:
        self.faults, self.count = faults, len(faults) if count is None else count
        super().__init__(faults, self.count)

    def __str__(self) -> str:
        lines = [f"line {fault.line}: {fault.message}" if fault.line else fault.message for fault in self.faults]
        more = [f"and {self.count - len(self.faults)} more"] if self.count > len(self.faults) else []
        return "\n".join(lines + more)


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
