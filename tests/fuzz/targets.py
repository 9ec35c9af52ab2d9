"""All targets."""

from __future__ import annotations

from tests.fuzz import adapters, environment, files, forms, http, jobs, messages, tokenizers

TARGETS = [
    *jobs.TARGETS,
    *forms.TARGETS,
    *files.TARGETS,
    *adapters.TARGETS,
    *tokenizers.TARGETS,
    *environment.TARGETS,
    *http.TARGETS,
    *messages.TARGETS,
]
