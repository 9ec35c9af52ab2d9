"""Errors between the parts of a worker; what users meet is in client/wire/errors.py."""

from __future__ import annotations

from headrace.client.wire.errors import HeadraceError


class EngineStopped(HeadraceError):
    """Raised to those who wait when the engine ends before their job does; another worker may do the job."""


class ModelUnavailable(HeadraceError):
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
