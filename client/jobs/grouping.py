"""Which jobs share a message."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator

from headrace.client.jobs.prepared import PreparedJob

#: Limits of one message. They are small, so that workers can share many jobs, and a lost message costs little.
GROUP_JOBS, GROUP_BYTES = 16, 65_536


def groups(jobs: Iterable[PreparedJob]) -> Iterator[list[PreparedJob]]:
    """The jobs of each message: of one model and priority, in their order. `jobs` are sorted by urgency."""
    for _, same in itertools.groupby(jobs, lambda job: job.urgency):
        open_groups: dict[str, tuple[list[PreparedJob], int]] = {}
        for job in same:
            group, used = open_groups.get(job.model, ([], 0))
            size = job.size
            if group and (len(group) == GROUP_JOBS or used + size > GROUP_BYTES):
                yield group
                group, used = [], 0
            open_groups[job.model] = ([*group, job], used + size)
        for group, _ in open_groups.values():
            yield group
