"""All targets."""

from __future__ import annotations

from tests.fuzz import jobs

TARGETS = [*jobs.TARGETS]
