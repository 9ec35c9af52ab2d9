"""Jobs of HTTP requests: submit them, wait for results, and cancel them if the client disconnects."""

from __future__ import annotations

import asyncio
import contextlib
import math
import time
from collections.abc import AsyncGenerator, Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, TypeVar

from headrace.client.async_client import AsyncClient, AsyncJob
from headrace.client.batch.adapters import check_one_adapter, model_of_adapter
from headrace.client.http.errors import ApiError, no_worker, translate
from headrace.client.http.job_lists import JobLists
from headrace.client.jobs.status import Status
from headrace.client.jobs.stream import Event
from headrace.client.jobs.together import MAX_RESPONSE_RESULTS, check_copies, check_response
from headrace.client.wire.adapters import listed
from headrace.client.wire.errors import HeadraceError, InvalidRequest, RedisRefused, RedisUnreachable
from headrace.client.wire.job_index import owned_by
from headrace.client.wire.results import Result
from headrace.client.wire.start_advice import start_worker_here
from headrace.client.wire.values import show
from headrace.config.model_names import served_name

#: For how many seconds the status of the workers is cached.
STATUS_CACHE_S = 1.0
#: A job's timeout is enforced by the worker; the server waits this much longer to receive the worker's answer.
TIMEOUT_GRACE_S = 2.0

T = TypeVar("T")


def as_request_field(error: InvalidRequest, *, is_list: bool) -> InvalidRequest:
    """Rename the field of an error from `submit_many` to the one in the HTTP request.

    All prompts of a request share their parameters: `requests[3].top_p` becomes `top_p`, and `requests[3].prompt`
    becomes `prompt[3]` if the request has a list of prompts.
    """
    place, _, name = error.field.partition("].")
    if not name or not place.startswith("requests["):
        return error
    if name == "prompt" and is_list:
        name = f"prompt{place.removeprefix('requests')}]"
    return InvalidRequest(name, error.value, error.expected)


class NamedModel(NamedTuple):
    """What a request names as its model: a model that workers serve, or one of its LoRA adapters."""

    model: str
    adapter: str | None = None


@dataclass(frozen=True)
class SubmittedJobs:
    """The jobs of one request, one for each prompt.

    Attributes:
        wait_s: how long to wait for the results.
        adapter: the LoRA adapter of the model with which they are computed.
    """

    model: str
    jobs: list[AsyncJob]
    wait_s: float
    adapter: str | None = None

    @property
    def openai_model(self) -> str:
        """What the OpenAI API calls the model; see `Result.openai_model`."""
        return self.adapter or self.model


class JobRunner:
    """Submits and awaits the jobs of HTTP requests.

    Args:
        timeout_s: upper limit for the `timeout_s` of a job.
        max_response_bytes: limit of the results of one request together.
    """

    def __init__(
        self, client: AsyncClient, timeout_s: float, max_response_bytes: int = MAX_RESPONSE_RESULTS * 8 * 2**20
    ) -> None:
        self._client, self._timeout_s, self._max_response_bytes = client, timeout_s, max_response_bytes
        self._cached_status: Status | HeadraceError | None = None
        self._cached_at = -STATUS_CACHE_S
        self._status_lock = asyncio.Lock()
        self.lists = JobLists(client)
        self._cancellations: set[asyncio.Task[None]] = set()

    async def close(self) -> None:
        """Wait for pending cancellations."""
        while self._cancellations:
            await asyncio.wait(self._cancellations)

    async def status(self) -> Status:
        """Workers and queues, at most `STATUS_CACHE_S` old. Raises ApiError if Redis cannot be reached."""
        async with self._status_lock:
            if self._cached_status is None or time.monotonic() - self._cached_at > STATUS_CACHE_S:
                try:
                    self._cached_status = await self._client.status()
                except HeadraceError as error:  # cached too: an unreachable Redis takes seconds to time out
                    self._cached_status = error
                self._cached_at = time.monotonic()
            if isinstance(self._cached_status, HeadraceError):
                raise translate(self._cached_status)
            return self._cached_status

    # --- models ------------------------------------------------------------------------------------------------------

    async def served_models(self) -> dict[str, int]:
        """Model names that live workers serve -> Unix time of the oldest worker's start. Raises ApiError."""
        found: dict[str, int] = {}
        for worker in (await self.status()).workers:
            if not worker.stalled:
                since = int(worker.started_at)
                found[worker.model] = min(found.get(worker.model, since), since)
        return found

    async def find_model(self, requested: Any) -> NamedModel:
        """The model or the adapter that workers serve under the requested name; None means the server's default model.

        Raises:
            ApiError: 404 if the name is unknown, 503 if its workers are temporarily unavailable.
            InvalidRequest: several models have an adapter of this name.
        """
        default, served = self._client.model_name, await self.served_models()
        if requested is None:
            requested = default
        if not isinstance(requested, str):
            raise ApiError(400, "invalid_request", "model: expected the name of a model", param="model")
        name = served_name(requested)
        if name is not None and name in served:
            return NamedModel(name)
        if (model := model_of_adapter(requested, await self.adapters())) is not None:
            if model not in served:
                raise no_worker(start_worker_here(self._client.url, [model]))
            return NamedModel(model, requested)
        if name is not None and (name == default or not served or name in await self._recently_served()):
            raise no_worker(start_worker_here(self._client.url, [name]))
        adapters = sorted(set().union(*(await self.adapters()).values()))
        names = ", ".join(sorted(served)) + (f"; adapters: {listed(adapters)}" if adapters else "")
        raise ApiError(
            404, "model_not_found", f"model: no worker serves {show(requested)}; served: {names}", param="model"
        )

    async def adapters(self) -> dict[str, set[str]]:
        """The adapters of each model; see `Client.adapters`. Raises ApiError if Redis cannot be reached."""
        try:
            return await self._client.adapters()
        except HeadraceError as error:
            raise translate(error) from error

    async def _recently_served(self) -> set[str]:
        """Models including those whose workers are restarting. Raises ApiError if Redis cannot be reached."""
        try:
            return await self._client.models()
        except HeadraceError as error:
            raise translate(error) from error

    # --- jobs --------------------------------------------------------------------------------------------------------

    async def submit(
        self,
        prompts: Sequence[Any],
        params: Mapping[str, Any],
        *,
        field: Literal["prompt", "messages"] = "prompt",
        is_list: bool = False,
        owner: str = "",
    ) -> SubmittedJobs:
        """Queue one job for each prompt, all with the same parameters.

        Args:
            prompts: texts and lists of token ids, or one list of messages.
            field: which of the two they are.
            is_list: whether the request had a list of prompts, so that an error names the index of the wrong one.
            owner: whose key the request had; the jobs are listed to it.

        Raises:
            ApiError: no worker serves the model.
            InvalidRequest, QueueFull, RedisUnreachable, RedisRefused: as `Client.submit`; no job stays in the queue.
        """
        check_copies(len(prompts), params)
        check_response(prompts, params, self._max_response_bytes)
        if "id" in params:
            raise InvalidRequest("id", "a name for the job", "no such parameter: the server names jobs")
        model, adapter = await self.find_model(params.get("model"))
        if adapter is not None:
            check_one_adapter(params, adapter)
            params = {**params, "adapter": adapter}
        timeout_s = params.get("timeout_s")
        if timeout_s is None or (type(timeout_s) in (int, float) and self._timeout_s < timeout_s < math.inf):
            timeout_s = self._timeout_s
        fields = {**params, "model": model, "timeout_s": timeout_s}
        try:
            # Mappings, not keyword arguments: a field of the request may have any name.
            with owned_by(owner):
                jobs = await self._client.submit_many([{**fields, field: prompt} for prompt in prompts])
        except InvalidRequest as error:
            raise as_request_field(error, is_list=is_list) from None
        except (RedisUnreachable, RedisRefused) as error:
            self._cancel(error.accepted.values())
            raise
        adapter = params.get("adapter") or None
        return SubmittedJobs(model, jobs, timeout_s + TIMEOUT_GRACE_S, adapter)

    @contextlib.contextmanager
    def _cancel_unfinished(self, jobs: Sequence[AsyncJob]) -> Iterator[None]:
        """At the end of the block, cancel the jobs that are still queued or running."""
        try:
            yield
        finally:
            self._cancel(job for job in jobs if job.outcome is None)

    def _cancel(self, jobs: Iterable[AsyncJob]) -> None:
        """Cancel jobs in the background."""
        if job_ids := [job.id for job in jobs]:
            task = asyncio.get_running_loop().create_task(self._cancel_now(job_ids))
            self._cancellations.add(task)
            task.add_done_callback(self._cancellations.discard)

    async def _cancel_now(self, job_ids: list[str]) -> None:
        with contextlib.suppress(HeadraceError):
            await self._client.cancel(job_ids)

    async def results(self, submitted: SubmittedJobs, convert: Callable[[int, Result], T]) -> list[T]:
        """Wait for all results and convert each when it arrives, in a thread. None is kept: an object takes ten times
        the memory of its JSON.

        Args:
            convert: called with the index of the job and its result.

        Returns:
            What `convert` returned, in the order of the jobs.

        Raises the first failure; the other jobs are cancelled.
        """
        index_of = {job.id: index for index, job in enumerate(submitted.jobs)}
        converted: dict[int, T] = {}
        waiting = {job.id: job for job in submitted.jobs}
        try:
            async for job in self._client.as_completed(submitted.jobs, submitted.wait_s):
                index = index_of[job.id]
                del waiting[job.id]
                converted[index] = await asyncio.to_thread(convert, index, await job.result())
                job.outcome = None
        finally:
            self._cancel(waiting.values())
        return [converted[index] for index in range(len(submitted.jobs))]

    async def events(self, submitted: SubmittedJobs) -> AsyncGenerator[tuple[int, Event]]:
        """Stream the jobs: (index of the job, event). Raises like `results`; closing it cancels unfinished jobs."""
        jobs = submitted.jobs
        index_of = {job.id: index for index, job in enumerate(jobs)}
        with self._cancel_unfinished(jobs):
            async with contextlib.aclosing(self._client.streams(jobs, submitted.wait_s)) as events:
                async for job, event in events:
                    yield index_of[job.id], event
