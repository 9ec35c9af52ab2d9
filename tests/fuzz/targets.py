"""All targets."""

from __future__ import annotations

from tests.fuzz import environment, files, http, jobs, messages

TARGETS = [*jobs.TARGETS, *files.TARGETS, *environment.TARGETS, *http.TARGETS, *messages.TARGETS]
