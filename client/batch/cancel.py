"""Cancel the jobs that a stopped run of a batch has left in the queue."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator

from headrace.client.batch.items import BatchItem
from headrace.client.batch.window import CHUNK
from headrace.client.jobs.reading import JobReader
from headrace.client.wire.errors import UnknownJob


def cancel_rows(reader: JobReader, rows: Iterable[BatchItem], run: str) -> int:
    """Cancel the jobs of requests. Returns how many had not ended.

    Args:
        reader: of the Redis where the jobs are.
        rows: the requests that are not in the output, in the order of the input.
        run: the id of the run.

    Raises:
        RedisUnreachable, RedisRefused: Redis does not answer, or answers with an error.
    """
    cancelled = 0
    job_ids = iter(_job_ids(rows, run))
    while part := list(itertools.islice(job_ids, CHUNK)):
        found = _cancel(reader, part)
        if not found:
            break  # a run submits rows in the order of the input, so it did not come this far
        cancelled += sum(found)
    return cancelled


def _job_ids(rows: Iterable[BatchItem], run: str) -> Iterator[str]:
    for row in rows:
        if row.prompts is None:
            yield row.job_id(run)
        else:
            yield from (f"{row.job_id(run)}.{number}" for number in range(len(row.prompts)))


def _cancel(reader: JobReader, job_ids: list[str]) -> list[bool]:
    """For each of the jobs that exist, whether it had not ended."""
    try:
        return reader.cancel(job_ids)
    except UnknownJob:  # then none was cancelled
        half = len(job_ids) // 2
        return _cancel(reader, job_ids[:half]) + _cancel(reader, job_ids[half:]) if half else []
