"""Errors between the parts of a worker. The errors that users see are in client/wire/errors.py."""

from __future__ import annotations

from headrace.client.wire.errors import HeadraceError


class EngineStopped(HeadraceError):
    """The engine ended before the job did, or takes no more jobs. Another worker may compute the job."""


class ModelUnavailable(HeadraceError):
    """A model cannot be loaded in this process. This is no fault of a job: jobs for the model stay in its queue.

    Attributes:
        name: of the model.
        reason: the error that loading it raised.
    """

    def __init__(self, name: str, reason: Exception) -> None:
        super().__init__(name, reason)
        self.name, self.reason = name, reason

    def __str__(self) -> str:
        return str(self.reason)
