"""The version of the wire schema.

`SCHEMA_VERSION` is raised when an older worker could misread a new request. New optional fields have defaults, so that
messages and results that are already in Redis can still be decoded after an upgrade.
"""

from __future__ import annotations

from typing import Any

SCHEMA_VERSION = 1


def is_readable(version: Any) -> bool:
    """Whether this release can read a request of this schema version: the current one and all earlier ones."""
    return isinstance(version, int) and 1 <= version <= SCHEMA_VERSION
