"""Errors between the parts of a worker; what users meet is in client/errors.py."""

from client.errors import MillraceError


class EngineStopped(MillraceError):
    """Raised to those who wait when the engine ends before their job does; another worker may do the job."""
