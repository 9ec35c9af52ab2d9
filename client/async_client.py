"""The client for asyncio: the verbs of `Client`, awaited.

What is short (submit, cancel, status) is `Client`'s own, in one thread of this client. All waiting is one task over one
connection that asks for all jobs together, as `client.jobs.polling` says, and hands to each who waits what is new.
"""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import functools
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from types import TracebackType
from typing import TYPE_CHECKING, Any, ParamSpec, TypeVar, overload

from headrace.client.client import REMIND_S, Client, check_home, check_timeout
from headrace.client.jobs.handle import Handle
from headrace.client.jobs.polling import News, Watch
from headrace.client.jobs.status import Status
from headrace.client.jobs.stream import Event, Reader
from headrace.client.wire.errors import HeadraceError, RedisUnreachable, _RedisFailed
from headrace.client.wire.redis import connect_async
from headrace.client.wire.requests import Result, State
from headrace.client.wire.results import outcome_state
from headrace.config import Settings

if TYPE_CHECKING:
    import numpy as np

#: Redis holds an answer back for events no longer than this: a job that is asked for meanwhile has to wait.
BLOCK_S = 0.1

P = ParamSpec("P")
T = TypeVar("T")
Inbox = asyncio.Queue[News | BaseException]


class AsyncClient:
    """`Client` for asyncio; for one event loop. Use it with `async with`, or await `close`.

    Args and errors are those of `Client` throughout. Ten thousand jobs outstanding take the connections that one takes.
    """

    def __init__(
        self, *, redis_url: str | None = None, model: str | None = None, settings: Settings | None = None
    ) -> None:
        self._client = Client(redis_url=redis_url, model=model, settings=settings)
        self.settings, self.url, self.model_name = self._client.settings, self._client.url, self._client.model_name
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="headrace-client")
        self._redis = connect_async(self.url)
        self._watch = Watch()
        self._inboxes: dict[str, list[Inbox]] = {}
        self._added = asyncio.Event()
        self._task: asyncio.Task[None] | None = None

    async def __aenter__(self) -> AsyncClient:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    async def close(self) -> None:
        """Close the connections. Jobs go on; who waits for one in this client gets a RuntimeError."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.wait([self._task])
        self._give_up(list(self._watch), lambda: RuntimeError("the client was closed"))
        await self._redis.aclose()
        await self._call(self._client.close)
        self._thread.shutdown(wait=False)

    async def submit(self, prompt: str | Sequence[int], *, id: str | None = None, **params: Any) -> AsyncJob:  # noqa: A002
        """Queue one prompt; see `Client.submit`."""
        return AsyncJob((await self._call(self._client.submit, prompt, id=id, **params)).id, self)

    async def submit_many(
        self, requests: Iterable[str | Sequence[int] | Mapping[str, Any]], **params: Any
    ) -> list[AsyncJob]:
        """Queue many prompts; see `Client.submit_many`."""
        return [AsyncJob(job.id, self) for job in await self._call(self._client.submit_many, requests, **params)]

    def job(self, job_id: str) -> AsyncJob:
        """A handle on a job that was submitted anywhere. Nothing is asked of Redis yet."""
        return AsyncJob(job_id, self)

    @overload
    async def cancel(self, jobs: str | Handle) -> bool: ...  # type: ignore[overload-overlap]
    @overload
    async def cancel(self, jobs: Iterable[str | Handle]) -> list[bool]: ...
    async def cancel(self, jobs: str | Handle | Iterable[str | Handle]) -> bool | list[bool]:
        """Ask for a job, or for many, to be cancelled; see `Client.cancel`."""
        return await self._call(self._client.cancel, jobs)

    async def as_completed(self, jobs: Iterable[AsyncJob], timeout: float | None = None) -> AsyncIterator[AsyncJob]:
        """The jobs as they end, in whatever way; see `Client.as_completed`."""
        waiting = {job.id: job for job in jobs}
        check_home(waiting.values(), self.url)
        for job in [job for job in waiting.values() if job._outcome is not None]:
            yield waiting.pop(job.id)
        async with contextlib.aclosing(self._news(waiting, timeout)) as all_news:
            async for news in all_news:
                for job_id, outcome in news.outcomes.items():
                    waiting[job_id]._outcome = outcome
                    yield waiting.pop(job_id)

    async def streams(
        self, jobs: Iterable[AsyncJob], timeout: float | None = None
    ) -> AsyncGenerator[tuple[AsyncJob, Event]]:
        """The text of many jobs as it comes, each event with its job; see `Job.stream`. The first failure ends it."""
        readers = {job.id: (job, Reader(job)) for job in jobs}
        check_home([job for job, _ in readers.values()], self.url)
        for job, reader in readers.values():
            if job._outcome is not None:
                for event in reader.finish(job._answer()):
                    yield job, event
        waiting = [job.id for job, _ in readers.values() if job._outcome is None]
        async with contextlib.aclosing(self._news(waiting, timeout, events=True)) as all_news:
            async for news in all_news:
                for job_id in news.jobs():
                    job, reader = readers[job_id]
                    for entry in news.events.get(job_id, ()):
                        for event in reader.take(entry):
                            yield job, event
                    if (outcome := news.outcomes.get(job_id)) is not None:
                        job._outcome = outcome
                        for event in reader.finish(job._answer()):
                            yield job, event

    async def status(self) -> Status:
        """Queues, workers and slots, now. Raises RedisUnreachable."""
        return await self._call(self._client.status)

    async def models(self) -> set[str]:
        """The models that jobs may name; see `Client.models`."""
        return await self._call(self._client.models)

    # --- waiting ---------------------------------------------------------------------------------------------------

    async def _call(self, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """Let the client do something in its thread, in this context (of traces); jobs in errors become ours."""
        loop, context = asyncio.get_running_loop(), contextvars.copy_context()
        try:
            return await loop.run_in_executor(self._thread, functools.partial(context.run, function, *args, **kwargs))
        except HeadraceError as error:
            if error.job is not None:
                error.job = AsyncJob(error.job.id, self)
            if isinstance(error, _RedisFailed):
                error.accepted = {i: AsyncJob(job.id, self) for i, job in error.accepted.items()}
            raise

    async def _news(
        self, job_ids: Iterable[str], timeout: float | None, *, events: bool = False
    ) -> AsyncGenerator[News]:
        """News of jobs, with their events if asked, until the outcome of each has come."""
        check_timeout(timeout)
        waiting = dict.fromkeys(job_ids)
        inbox: Inbox = asyncio.Queue()
        started, answered = time.monotonic(), False
        self._listen(waiting, inbox, events)
        try:
            while waiting:
                left = REMIND_S if timeout is None else max(0.0, started + timeout - time.monotonic())
                try:
                    async with asyncio.timeout(left if answered else None):  # Redis is asked once at least
                        news = await inbox.get()
                except TimeoutError:
                    if timeout is not None:
                        raise await self._call(self._client._late, next(iter(waiting)), timeout) from None
                    await self._call(self._client._remind, list(waiting))
                    continue
                if isinstance(news, BaseException):
                    raise news
                for job_id in news.unknown:
                    raise self._client._unknown(job_id).about(AsyncJob(job_id, self))
                answered = True
                for job_id in news.outcomes:
                    waiting.pop(job_id, None)
                yield news
        finally:
            self._forget(waiting, inbox)

    def _listen(self, job_ids: Iterable[str], inbox: Inbox, events: bool) -> None:
        for job_id in job_ids:
            self._inboxes.setdefault(job_id, []).append(inbox)
            self._watch.add(job_id, events=events)
        self._added.set()
        if self._watch and (self._task is None or self._task.done()):
            self._task = asyncio.get_running_loop().create_task(self._poll())

    def _forget(self, job_ids: Iterable[str], inbox: Inbox) -> None:
        for job_id in job_ids:
            if inbox in (inboxes := self._inboxes.get(job_id, [])):
                inboxes.remove(inbox)
                if not inboxes:
                    del self._inboxes[job_id]
                    self._watch.drop(job_id)

    async def _poll(self) -> None:
        while self._watch:
            self._added.clear()
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(self._watch.rest_s):
                    await self._added.wait()
            try:
                with self._client._reachable():
                    pipe = self._redis.pipeline(transaction=False)
                    for command in self._watch.request(BLOCK_S):
                        pipe.execute_command(*command)
                    self._deliver(self._watch.answer(await pipe.execute()))
            except RedisUnreachable as error:
                url, reason = error.url, error.reason
                self._give_up(self._watch.failed(), lambda: RedisUnreachable(url, reason))  # noqa: B023
            except Exception as error:
                fault = error
                self._give_up(list(self._watch), lambda: fault)  # noqa: B023

    def _deliver(self, news: News) -> None:
        parts: dict[Inbox, News] = {}
        for mine, job_id in [(parts.setdefault(i, News()), j) for j in news.jobs() for i in self._inboxes.get(j, ())]:
            mine.take(news, job_id)
        for inbox, part in parts.items():
            inbox.put_nowait(part)
        for job_id in (*news.outcomes, *news.unknown):
            self._inboxes.pop(job_id, None)

    def _give_up(self, job_ids: list[str], error: Callable[[], BaseException]) -> None:
        """Tell those who wait for the jobs; each gets an error of its own, with a traceback of its own."""
        for inbox in {inbox: None for job_id in job_ids for inbox in self._inboxes.pop(job_id, ())}:
            inbox.put_nowait(error())
        for job_id in job_ids:
            self._watch.drop(job_id)


class AsyncJob(Handle):
    """One job, as `Job`. Get it from `submit`, or from `AsyncClient.job(id)`."""

    def __init__(self, job_id: str, client: AsyncClient) -> None:
        super().__init__(job_id, client.url)
        self._client = client

    async def status(self) -> State:
        """Where the job is now; see `Job.status`."""
        if self._outcome is None:
            self._outcome, state = await self._client._call(self._client._client._look, self.id)
            if self._outcome is None:
                return state
        return outcome_state(self._outcome)

    async def result(self, timeout: float | None = None) -> Result:
        """Wait for the result; see `Job.result`."""
        await self.wait(timeout)
        return self._answer()

    async def wait(self, timeout: float | None = None) -> State:
        """Wait until the job has ended, in whatever way; see `Job.wait`."""
        if self._outcome is None:
            async with contextlib.aclosing(self._client._news([self.id], timeout)) as all_news:
                async for news in all_news:
                    self._outcome = news.outcomes.get(self.id)
        return await self.status()

    async def stream(self, timeout: float | None = None) -> AsyncIterator[Event]:
        """The text as it comes; see `Job.stream`."""
        async with contextlib.aclosing(self._client.streams([self], timeout)) as events:
            async for _, event in events:
                yield event

    async def checkpoints(self, *, max_bytes: int | None = None) -> dict[str, np.ndarray]:
        """The tensors that the job kept; see `Job.checkpoints`."""
        return await self._client._call(self._client._client._checkpoints, self.id, max_bytes)

    async def cancel(self) -> bool:
        """Ask for the job to be cancelled; see `Job.cancel`."""
        return await self._client.cancel(self)
