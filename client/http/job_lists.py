"""Lists of an owner's jobs, from the index in Redis: also those that other programs have sent with the same key."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from typing import Any

from headrace.client.async_client import AsyncClient
from headrace.client.http.errors import ApiError
from headrace.client.jobs.listing import NEEDED_RIGHTS, JobInfo
from headrace.client.wire import keys
from headrace.client.wire.errors import RedisRefused

#: How many seconds the numbers of jobs in each state are kept: an open page asks every two seconds.
COUNTS_S = 10.0
#: Owners whose numbers are kept.
MAX_OWNERS = 1_000


class JobLists:
    """Reads lists for pages that are open for hours."""

    def __init__(self, client: AsyncClient) -> None:
        self._client = client
        self._counts: dict[str, tuple[float, dict[str, int]]] = {}

    async def page(self, owner: str, **wanted: Any) -> dict[str, Any]:
        """A page of an owner's jobs as JSON; see `Client.job_page`.

        Raises:
            InvalidRequest: a condition is wrong.
            ApiError: the server's Redis user may not list jobs.
            RedisUnreachable, RedisRefused: Redis does not answer, or answers with an error.
        """
        with _missing_rights():
            page, counts = await self._client.job_page(owner=owner, **wanted), await self.counts(owner)
        return {
            "data": [public(job, page.now) for job in page.jobs],
            "has_more": bool(page.after),
            "after": page.after,
            "counts": counts,
        }

    async def counts(self, owner: str) -> dict[str, int]:
        """How many of the newest 1,000 jobs of an owner are in each state; at most COUNTS_S old."""
        at, counts = self._counts.get(owner, (float("-inf"), {}))
        if time.monotonic() - at > COUNTS_S:
            counts = await self._client.job_counts(owner)
            self._counts.pop(owner, None)
            self._counts[owner] = time.monotonic(), counts
            while len(self._counts) > MAX_OWNERS:
                del self._counts[next(iter(self._counts))]
        return counts

    async def find(self, job_id: str, owner: str) -> JobInfo | None:
        """A job of this owner; None if there is none, or it is another's. Raises as `page`."""
        with _missing_rights():
            return await self._client.find_job(job_id, owner)


@contextlib.contextmanager
def _missing_rights() -> Iterator[None]:
    """Name the missing rights: other refusals of Redis go away by themselves, and this one does not."""
    try:
        yield
    except RedisRefused as error:
        if NEEDED_RIGHTS not in error.reason:
            raise
        raise ApiError(503, error.code, f"the server's Redis user may not list jobs: {NEEDED_RIGHTS}") from error


def public(job: JobInfo, now: float) -> dict[str, Any]:
    """A job as JSON shows it to its owner. `now` is the Unix time in seconds."""
    ended_after_s = None if job.ended_at is None else round(max(0.0, job.ended_at - job.submitted_at), 2)
    times = {"created_at": round(job.submitted_at, 1), "age_s": round(max(0.0, now - job.submitted_at), 1)}
    return {
        "id": job.id,
        "tag": keys.tag(job.id),
        "model": job.model,
        "adapter": job.adapter or None,
        "state": job.state,
        **times,
        "ended_after_s": ended_after_s,
    }
