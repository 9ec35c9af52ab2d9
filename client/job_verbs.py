"""The verbs of `Client` and `AsyncClient` for jobs in hand: list them, look at one, cancel some or all."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterable, Iterator
from typing import Any, Protocol, overload

import redis

from headrace.client.jobs.details import JobDetails, read_details
from headrace.client.jobs.handle import Handle, Job, job_id_of, job_in_errors
from headrace.client.jobs.listing import PAGE_JOBS, JobFilter, JobInfo, JobLister, JobPage
from headrace.client.jobs.own_fields import check_model
from headrace.client.jobs.purging import Purger
from headrace.client.jobs.reading import JobReader


class _Client(Protocol):
    url: str
    reader: JobReader
    lister: JobLister
    purger: Purger
    _redis: redis.Redis

    def job(self, job_id: str) -> Job:
        """`Client.job`."""


class JobVerbs:
    """What `Client` offers for jobs in hand."""

    def jobs(
        self: _Client,
        *,
        state: str | None = None,
        model: str | None = None,
        older_than: float | None = None,
        newer_than: float | None = None,
        owner: str | None = None,
        search: str = "",
    ) -> Iterator[JobInfo]:
        """Yield the jobs that Redis knows, whoever submitted them, the newest first. Reads 1,000 of them at a time.

        Args:
            state: only jobs in this state, as `Job.status` returns it.
            model: only jobs of this model.
            older_than: only jobs that were submitted more than so many seconds ago.
            newer_than: only jobs that were submitted less than so many seconds ago.
            owner: only jobs that were submitted with this API key of `headrace serve`, by the name that `JobInfo.owner`
                has; "" for those without a key.
            search: only jobs whose id contains this text, or whose tag, which `Status` has for jobs in slots, does.

        Raises:
            InvalidRequest: a condition cannot be met.
            RedisUnreachable, RedisRefused: Redis does not answer, or answers with an error.
        """
        return self.lister.all(_filter(state, model, older_than, newer_than, search), owner=owner)

    def job_page(
        self: _Client,
        *,
        state: str | None = None,
        model: str | None = None,
        older_than: float | None = None,
        newer_than: float | None = None,
        owner: str | None = None,
        search: str = "",
        limit: int = PAGE_JOBS,
        after: str = "",
    ) -> JobPage:
        """One page of the list of `jobs`.

        Args:
            state: as for `jobs`.
            model: as for `jobs`.
            older_than: as for `jobs`.
            newer_than: as for `jobs`.
            owner: as for `jobs`.
            search: as for `jobs`.
            limit: the most jobs. A page has fewer, even none, if 10,000 jobs were read for it; pass on its `after`.
            after: `JobPage.after` of the page before.

        Raises:
            InvalidRequest: a condition cannot be met, or `after` is not from a page.
            RedisUnreachable, RedisRefused: Redis does not answer, or answers with an error.
        """
        wanted = _filter(state, model, older_than, newer_than, search)
        return self.lister.page(wanted, owner=owner, limit=limit, after=after)

    def find_job(self: _Client, job_id: str, owner: str | None = None) -> JobInfo | None:
        """A job as lists show it; None if there is none with this id, or none of this owner.

        Args:
            job_id: the job.
            owner: as for `jobs`.

        Raises:
            RedisUnreachable, RedisRefused: Redis does not answer, or answers with an error.
        """
        return self.lister.find(job_id, owner)

    def job_counts(self: _Client, owner: str | None = None) -> dict[str, int]:
        """How many of the newest 1,000 jobs are in each state.

        Args:
            owner: as for `jobs`.

        Raises:
            RedisUnreachable, RedisRefused: Redis does not answer, or answers with an error.
        """
        return self.lister.counts(owner)

    def job_details(self: _Client, job: str | Handle, *, texts: bool = False, prompt: bool = False) -> JobDetails:
        """All that is known about a job: its state, times, worker, error, and numbers of tokens.

        Args:
            job: a job, or its id.
            texts: include the texts that it generated.
            prompt: include its prompt, which Redis has until the job has ended. Searches the queue for it, and needs
                the right to read the queue.

        Raises:
            UnknownJob: there is no such job.
            UnreadableRecord: another program has overwritten its record.
            RedisUnreachable, RedisRefused: Redis does not answer, or answers with an error.
        """
        job_id = job_id_of(job)
        with job_in_errors(self.job):
            return read_details(self.url, self._redis, self.reader, self.lister, job_id, texts=texts, prompt=prompt)

    @overload
    def cancel(self: _Client, jobs: str | Handle) -> bool: ...  # type: ignore[overload-overlap]
    @overload
    def cancel(self: _Client, jobs: Iterable[str | Handle]) -> list[bool]: ...
    def cancel(self: _Client, jobs: str | Handle | Iterable[str | Handle]) -> bool | list[bool]:
        """Cancel a job, or many in a few round trips. Takes jobs or their ids.

        A job that waits ends at once, whether or not there is a worker. A running one stops at its next token and frees
        its slot. A job that was sent as a Celery signature, or by another program, ends when a worker has its message.
        Returns whether the job had not ended yet: a bool, or for many a list of them.

        Raises:
            UnknownJob: there is no such job. Of many jobs, those in the same round trip (up to 512) were not cancelled.
            RedisUnreachable, RedisRefused: Redis does not answer, or answers with an error.
        """
        one = isinstance(jobs, (str, Handle))
        given: list[Any] = [jobs] if one or not isinstance(jobs, Iterable) else list(jobs)
        handles = {job.id: job for job in given if isinstance(job, Handle)}
        with job_in_errors(lambda job_id: handles.get(job_id) or self.job(job_id)):
            open_before = self.reader.cancel([job_id_of(job) for job in given])
        return open_before[0] if one else open_before

    def cancel_all(self: _Client, model: str) -> int:
        """Cancel all jobs of a model, whoever submitted them, those that wait and those that run. Returns how many.

        Raises:
            InvalidRequest: this cannot be the name of a model.
            RedisUnreachable, RedisRefused: Redis does not answer, or answers with an error.
        """
        return self.purger.cancel_all(check_model(model))

    def purge(self: _Client, model: str) -> int:
        """End all jobs of a model that wait, whoever submitted them, as cancelled. Jobs that run continue.

        Unlike `celery purge`, which deletes messages and leaves their jobs queued. Returns how many jobs ended.

        Raises:
            InvalidRequest: this cannot be the name of a model.
            RedisUnreachable, RedisRefused: Redis does not answer, or answers with an error.
        """
        return self.purger.purge(check_model(model))


class _AsyncClient(Protocol):
    _client: Any

    async def _run_in_thread(self, function: Any, *args: Any, **kwargs: Any) -> Any:
        """Call a function in the client's thread."""

    async def job_page(self, **conditions: Any) -> JobPage:
        """`AsyncClient.job_page`."""


class AsyncJobVerbs:
    """What `AsyncClient` offers for jobs in hand."""

    async def jobs(self: _AsyncClient, **conditions: Any) -> AsyncIterator[JobInfo]:
        """Yield the jobs that Redis knows, the newest first; see `Client.jobs`."""
        after = ""
        while True:
            page = await self.job_page(**conditions, limit=1_000, after=after)
            for job in page.jobs:
                yield job
            if not (after := page.after):
                return

    async def job_page(self: _AsyncClient, **conditions: Any) -> JobPage:
        """One page of the list of jobs; see `Client.job_page`."""
        page: JobPage = await self._run_in_thread(self._client.job_page, **conditions)
        return page

    async def find_job(self: _AsyncClient, job_id: str, owner: str | None = None) -> JobInfo | None:
        """A job as lists show it; see `Client.find_job`."""
        found: JobInfo | None = await self._run_in_thread(self._client.find_job, job_id, owner)
        return found

    async def job_counts(self: _AsyncClient, owner: str | None = None) -> dict[str, int]:
        """How many of the newest 1,000 jobs are in each state; see `Client.job_counts`."""
        counts: dict[str, int] = await self._run_in_thread(self._client.job_counts, owner)
        return counts

    async def job_details(
        self: _AsyncClient, job: str | Handle, *, texts: bool = False, prompt: bool = False
    ) -> JobDetails:
        """All that is known about a job; see `Client.job_details`."""
        details: JobDetails = await self._run_in_thread(self._client.job_details, job, texts=texts, prompt=prompt)
        return details

    @overload
    async def cancel(self: _AsyncClient, jobs: str | Handle) -> bool: ...  # type: ignore[overload-overlap]
    @overload
    async def cancel(self: _AsyncClient, jobs: Iterable[str | Handle]) -> list[bool]: ...
    async def cancel(self: _AsyncClient, jobs: str | Handle | Iterable[str | Handle]) -> bool | list[bool]:
        """Cancel a job, or many; see `Client.cancel`."""
        open_before: bool | list[bool] = await self._run_in_thread(self._client.cancel, jobs)
        return open_before

    async def cancel_all(self: _AsyncClient, model: str) -> int:
        """Cancel all jobs of a model; see `Client.cancel_all`."""
        return int(await self._run_in_thread(self._client.cancel_all, model))

    async def purge(self: _AsyncClient, model: str) -> int:
        """End all jobs of a model that wait; see `Client.purge`."""
        return int(await self._run_in_thread(self._client.purge, model))


def _filter(
    state: str | None, model: str | None, older_than: float | None, newer_than: float | None, search: str
) -> JobFilter:
    named = None if model is None else check_model(model)
    return JobFilter(state=state, model=named, older_than=older_than, newer_than=newer_than, search=search)
