"""All targets."""

from __future__ import annotations

from tests.fuzz import environment, files, http, jobs, messages, tokenizers

TARGETS = [*jobs.TARGETS, *files.TARGETS, *tokenizers.TARGETS, *environment.TARGETS, *http.TARGETS, *messages.TARGETS]
