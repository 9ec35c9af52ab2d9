"""Errors between the parts of a worker; what users meet is in client/errors.py."""

from __future__ import annotations

from client.errors import MillraceError


class EngineStopped(MillraceError):
    """Raised to those who wait when the engine ends before their job does; another worker may do the job."""


class ModelUnavailable(MillraceError):
    """Raised when a model cannot be loaded here. No job is to blame: those for it wait in its queue.

    Attributes:
        name: the model's.
        reason: what was raised.
    """

    def __init__(self, name: str, reason: Exception) -> None:
        super().__init__(name, reason)
        self.name, self.reason = name, reason

    def __str__(self) -> str:
        return str(self.reason)
