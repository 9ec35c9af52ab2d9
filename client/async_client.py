"""`AsyncClient`: the methods of `Client` for asyncio.

Short calls (submit, cancel, status) run in one thread of the client; submitting many prompts takes longer and has a
thread of its own. One task waits for all jobs over one connection: it polls them together (see `client.jobs.polling`)
and passes each update to the callers that wait for it.
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
from typing import TYPE_CHECKING, Any, ParamSpec, TypeVar

from headrace.client.client import Client
from headrace.client.job_verbs import AsyncJobVerbs
from headrace.client.jobs.async_replies import parse_large, send
from headrace.client.jobs.handle import Handle, by_id, check_same_redis, job_in_errors
from headrace.client.jobs.polling import REMIND_S, PollState, Updates
from headrace.client.jobs.prepared import PreparedJob
from headrace.client.jobs.reading import check_timeout
from headrace.client.jobs.status import Status
from headrace.client.jobs.stream import Event, StreamReader
from headrace.client.jobs.tokens import TIMEOUT_S, detokenize_job, tokenize_job, tokenized
from headrace.client.scoring import AsyncScoringVerbs
from headrace.client.wire.errors import RedisUnreachable
from headrace.client.wire.redis import connect_async, redis_errors
from headrace.client.wire.results import Result, State, Tokenized, outcome_state
from headrace.config import Settings

if TYPE_CHECKING:
    import numpy as np

#: How many seconds Redis may delay a reply to wait for events. A job added in the meantime is polled after that.
BLOCK_S = 0.1

#: So many jobs are submitted in the thread for short calls.
FEW_JOBS = 16

P = ParamSpec("P")
T = TypeVar("T")
Inbox = asyncio.Queue[Updates | BaseException]


class AsyncClient(AsyncScoringVerbs, AsyncJobVerbs):
    """`Client` for asyncio, for one event loop. Use it with `async with`, or await `close`.

    Arguments and errors are those of `Client`. The number of connections does not grow with the number of
    unfinished jobs.
    """

    def __init__(
        self, *, redis_url: str | None = None, model: str | None = None, settings: Settings | None = None
    ) -> None:
        self._client = Client(redis_url=redis_url, model=model, settings=settings)
        self.settings, self.url, self.model_name = self._client.settings, self._client.url, self._client.model_name
        self._redis = connect_async(self.url)
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="headrace-client")
        self._submitting = ThreadPoolExecutor(1, thread_name_prefix="headrace-submit")
        self._polls = PollState()
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
        """Close the connections. Submitted jobs continue; code that is still waiting for one gets a RuntimeError."""
        self._give_up(list(self._polls), lambda: RuntimeError("the client was closed"))
        while self._task is not None and not self._task.done():
            self._task.cancel()  # `asyncio.wait_for`, which redis-py uses, loses a cancellation that meets its result
            await asyncio.wait([self._task], timeout=BLOCK_S)
        await self._redis.aclose()
        await self._run_in_thread(self._client.close)
        self._thread.shutdown(wait=False)
        self._submitting.shutdown(wait=False)

    async def submit(
        self,
        prompt: str | Sequence[int] | None = None,
        *,
        messages: Sequence[Mapping[str, Any]] | None = None,
        id: str | None = None,  # noqa: A002
        **params: Any,
    ) -> AsyncJob:
        """Queue one prompt, or the messages of a chat; see `Client.submit`."""
        job = await self._run_in_thread(self._client.submit, prompt, messages=messages, id=id, **params)
        return AsyncJob(job.id, self, accepted=True)

    async def submit_many(
        self, requests: Iterable[str | Sequence[int] | Mapping[str, Any]], **params: Any
    ) -> list[AsyncJob]:
        """Queue many prompts; see `Client.submit_many`."""
        call = functools.partial(self._client.submit_many, requests, **params)
        few = isinstance(requests, Sequence) and len(requests) <= FEW_JOBS
        jobs = await self._run_in(self._thread if few else self._submitting, call)
        return [AsyncJob(job.id, self, accepted=True) for job in jobs]

    def job(self, job_id: str) -> AsyncJob:
        """A handle on a job, wherever it was submitted. Sends nothing to Redis."""
        return AsyncJob(job_id, self)

    async def as_completed(self, jobs: Iterable[AsyncJob], timeout: float | None = None) -> AsyncIterator[AsyncJob]:
        """Yield the jobs as they end; see `Client.as_completed`."""
        waiting = by_id(jobs)
        check_same_redis(waiting.values(), self.url)
        for job in [job for job in waiting.values() if job.outcome is not None]:
            yield waiting.pop(job.id)
        async with contextlib.aclosing(self._updates(list(waiting.values()), timeout)) as all_updates:
            async for updates in all_updates:
                for job_id, outcome in updates.outcomes.items():
                    waiting[job_id].outcome = outcome
                    yield waiting.pop(job_id)

    async def streams(
        self, jobs: Iterable[AsyncJob], timeout: float | None = None
    ) -> AsyncGenerator[tuple[AsyncJob, Event]]:
        """Yield the text of many jobs, each event with its job; see `Job.stream`. The first failed job ends it."""
        readers = {job_id: (job, StreamReader(job_id)) for job_id, job in by_id(jobs).items()}
        check_same_redis([job for job, _ in readers.values()], self.url)
        with job_in_errors(lambda job_id: readers[job_id][0]):
            for job, reader in readers.values():
                if job.outcome is not None:
                    for event in reader.finish(job.answer()):
                        yield job, event
            waiting = [job for job, _ in readers.values() if job.outcome is None]
            async with contextlib.aclosing(self._updates(waiting, timeout, events=True)) as all_updates:
                async for updates in all_updates:
                    for job_id in updates.jobs():
                        job, reader = readers[job_id]
                        for entry in updates.events.get(job_id, ()):
                            for event in reader.take(entry):
                                yield job, event
                        if (outcome := updates.outcomes.get(job_id)) is not None:
                            job.outcome = outcome
                            for event in reader.finish(job.answer()):
                                yield job, event

    async def tokenize(
        self,
        prompt: str | Sequence[int] | None = None,
        *,
        timeout: float | None = TIMEOUT_S,
        **params: Any,
    ) -> Tokenized:
        """The token ids of a prompt or of messages; see `Client.tokenize`."""
        job = tokenize_job(self._client.submitter, {"prompt": prompt, **params}, timeout)
        return tokenized(await self._answer(job, timeout))

    async def detokenize(self, token_ids: Sequence[int], *, timeout: float | None = TIMEOUT_S, **params: Any) -> str:
        """The text of token ids; see `Client.detokenize`."""
        fields = {"skip_special_tokens": False, **params}
        job = detokenize_job(self._client.submitter, token_ids, fields, timeout)
        return (await self._answer(job, timeout)).text

    async def _answer(self, prepared: PreparedJob, timeout: float | None) -> Result:
        (job,) = await self._run_in_thread(self._client._submit, [prepared])
        return await AsyncJob(job.id, self, accepted=True).result(timeout)

    async def status(self) -> Status:
        """The current status: queues, workers and slots. Raises RedisUnreachable."""
        return await self._run_in_thread(self._client.status)

    async def models(self) -> set[str]:
        """The models that jobs may name; see `Client.models`."""
        return await self._run_in_thread(self._client.models)

    async def adapters(self) -> dict[str, set[str]]:
        """The LoRA adapters of each model; see `Client.adapters`."""
        return await self._run_in_thread(self._client.adapters)

    # --- used by AsyncJob --------------------------------------------------------------------------------------------

    async def _poll(self, job: AsyncJob) -> State:
        """The state of a job. Sets `outcome` if it has ended."""
        with job_in_errors(lambda _: job):
            job.outcome, state = await self._run_in_thread(self._client.reader.poll, job.id)
        job.accepted = True
        return state if job.outcome is None else outcome_state(job.outcome)

    async def _waits_until(self, job_id: str) -> float | None:
        return await self._run_in_thread(self._client.reader.waits_until, job_id)

    async def _checkpoints(self, job_id: str, max_bytes: int | None) -> dict[str, np.ndarray]:
        """The captured tensors of a job; see `Job.checkpoints`."""
        return await self._run_in_thread(self._client.reader.checkpoints, job_id, max_bytes)

    async def _updates(
        self, jobs: Iterable[AsyncJob], timeout: float | None, *, events: bool = False
    ) -> AsyncGenerator[Updates]:
        """Wait for jobs: yield updates until every job has ended; see `JobReader.updates`."""
        check_timeout(timeout)
        waiting = {job.id: job for job in jobs}
        inbox: Inbox = asyncio.Queue()
        started, answered = time.monotonic(), False
        self._subscribe(waiting.values(), inbox, events)
        try:
            while waiting:
                left = REMIND_S if timeout is None else max(0.0, started + timeout - time.monotonic())
                try:
                    async with asyncio.timeout(left if answered else None):  # poll Redis at least once
                        updates = await inbox.get()
                except TimeoutError:
                    if timeout is not None:
                        job = next(iter(waiting.values()))
                        with job_in_errors(lambda _: job):  # noqa: B023
                            raise await self._run_in_thread(
                                self._client.reader.timeout_error, job.id, timeout
                            ) from None
                    await self._run_in_thread(self._client.reader.warn_without_worker, list(waiting))
                    continue
                if isinstance(updates, BaseException):
                    raise updates
                answered = True
                for job_id in updates.outcomes:
                    waiting.pop(job_id, None)
                yield updates
                if missing := updates.missing_error():
                    with job_in_errors(waiting.__getitem__):
                        raise missing
        finally:
            self._unsubscribe(waiting, inbox)

    # --- waiting -----------------------------------------------------------------------------------------------------

    async def _run_in_thread(self, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """Call a function in the client's thread, in the caller's context. Jobs in errors become `AsyncJob`."""
        return await self._run_in(self._thread, functools.partial(function, *args, **kwargs))

    async def _run_in(self, thread: ThreadPoolExecutor, call: Callable[[], T]) -> T:
        loop, context = asyncio.get_running_loop(), contextvars.copy_context()
        with job_in_errors(self.job):
            return await loop.run_in_executor(thread, context.run, call)

    def _subscribe(self, jobs: Iterable[AsyncJob], inbox: Inbox, events: bool) -> None:
        for job in jobs:
            self._inboxes.setdefault(job.id, []).append(inbox)
            self._polls.add(job.id, events=events, accepted=job.accepted)
        self._added.set()
        if self._polls and (self._task is None or self._task.done()):
            self._task = asyncio.get_running_loop().create_task(self._poll_all())

    def _unsubscribe(self, job_ids: Iterable[str], inbox: Inbox) -> None:
        for job_id in job_ids:
            if inbox in (inboxes := self._inboxes.get(job_id, [])):
                inboxes.remove(inbox)
                if not inboxes:
                    del self._inboxes[job_id]
                    self._polls.drop(job_id)

    async def _poll_all(self) -> None:
        """Poll until there is no job left to wait for."""
        while self._polls:
            self._added.clear()
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(self._polls.rest_s):
                    await self._added.wait()
            try:
                with redis_errors(self.url):
                    replies = await send(self._redis, self._polls.request(BLOCK_S))
                    self._deliver(self._polls.answer([await parse_large(reply) for reply in replies]))
            except RedisUnreachable as error:
                given = error.args
                self._give_up(self._polls.failed(), lambda: RedisUnreachable(*given))  # noqa: B023
            except Exception as error:
                fault = error
                self._give_up(list(self._polls), lambda: fault)  # noqa: B023

    def _deliver(self, updates: Updates) -> None:
        """Put the updates into the inboxes of the callers that wait for these jobs."""
        parts: dict[Inbox, Updates] = {}
        for job_id in updates.jobs():
            for inbox in self._inboxes.get(job_id, ()):
                parts.setdefault(inbox, Updates()).take(updates, job_id)
        for inbox, part in parts.items():
            inbox.put_nowait(part)
        for job_id in (*updates.outcomes, *updates.unknown, *updates.lost):
            self._inboxes.pop(job_id, None)

    def _give_up(self, job_ids: list[str], error: Callable[[], BaseException]) -> None:
        """Raise an error in every call that waits for the jobs. Each gets its own exception: tracebacks differ."""
        for inbox in {inbox: None for job_id in job_ids for inbox in self._inboxes.pop(job_id, ())}:
            inbox.put_nowait(error())
        for job_id in job_ids:
            self._polls.drop(job_id)


class AsyncJob(Handle):
    """A job, like `Job` but for asyncio. `AsyncClient.submit` and `AsyncClient.job(id)` return one."""

    def __init__(self, job_id: str, client: AsyncClient, *, accepted: bool = False) -> None:
        super().__init__(job_id, client.url, accepted=accepted)
        self._client = client

    async def status(self) -> State:
        """The state of the job; see `Job.status`."""
        return await self._client._poll(self) if self.outcome is None else outcome_state(self.outcome)

    async def waits_until(self) -> float | None:
        """The Unix time of the job's ETA or countdown; see `Job.waits_until`."""
        return await self._client._waits_until(self.id) if await self.status() == "queued" else None

    async def result(self, timeout: float | None = None) -> Result:
        """Wait for the result; see `Job.result`."""
        await self.wait(timeout)
        return self.answer()

    async def wait(self, timeout: float | None = None) -> State:
        """Wait until the job has ended; see `Job.wait`."""
        if self.outcome is None:
            async with contextlib.aclosing(self._client._updates([self], timeout)) as all_updates:
                async for updates in all_updates:
                    self.outcome = updates.outcomes.get(self.id)
        return await self.status()

    async def stream(self, timeout: float | None = None) -> AsyncIterator[Event]:
        """Yield the text while it is generated; see `Job.stream`."""
        async with contextlib.aclosing(self._client.streams([self], timeout)) as events:
            async for _, event in events:
                yield event

    async def checkpoints(self, *, max_bytes: int | None = None) -> dict[str, np.ndarray]:
        """The captured tensors of the job; see `Job.checkpoints`."""
        return await self._client._checkpoints(self.id, max_bytes)

    async def cancel(self) -> bool:
        """Cancel the job; see `Job.cancel`."""
        return await self._client.cancel(self)
