"""Requests over HTTP to jobs of the queue and back: whoever hangs up cancels what nobody else waits for."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncGenerator, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from headrace.client.async_client import AsyncClient, AsyncJob
from headrace.client.http.errors import RETRY_S, ApiError, translate
from headrace.client.jobs.status import Status
from headrace.client.jobs.stream import Event
from headrace.client.wire.errors import HeadraceError, InvalidRequest, RedisRefused, RedisUnreachable
from headrace.client.wire.results import Result

#: The status is asked for this often at most.
STATUS_S = 1.0
#: How much longer than the job may take its end is waited for: an expired one is told by the worker.
GRACE_S = 2.0

Prompt = str | list[int]


def named_after_field(error: InvalidRequest, *, listed: bool) -> InvalidRequest:
    """The same where all prompts share their parameters: `requests[3].top_p` is `top_p`, only prompts have a number."""
    place, _, name = error.field.rpartition("].")
    if not place.startswith("requests["):
        return error
    if name == "prompt" and listed:
        name = f"prompt{place.removeprefix('requests')}]"
    return InvalidRequest(name, error.value, error.expected)


@dataclass(frozen=True)
class Submitted:
    """The jobs of a request, one a prompt, and how long they are waited for."""

    model: str
    jobs: list[AsyncJob]
    patience_s: float


class Gateway:
    """Jobs for requests.

    Args:
        timeout_s: no job is of use for longer.
    """

    def __init__(self, client: AsyncClient, timeout_s: float) -> None:
        self._client, self._timeout_s = client, timeout_s
        self._known: Status | HeadraceError | None = None
        self._known_at = -STATUS_S
        self._asking = asyncio.Lock()
        self._endings: set[asyncio.Task[None]] = set()

    async def close(self) -> None:
        """Wait until what was to be cancelled is."""
        while self._endings:
            await asyncio.wait(self._endings)

    async def status(self) -> Status:
        """Workers and queues, as they were a moment ago. Raises ApiError without Redis."""
        async with self._asking:
            if self._known is None or time.monotonic() - self._known_at > STATUS_S:
                try:
                    self._known = await self._client.status()
                except HeadraceError as error:  # kept too: a Redis that is silent takes seconds to give up
                    self._known = error
                self._known_at = time.monotonic()
            if isinstance(self._known, HeadraceError):
                raise translate(self._known)
            return self._known

    # --- models ------------------------------------------------------------------------------------------------------

    async def served(self) -> dict[str, int]:
        """The models that live workers serve, each with the Unix time since which. Raises ApiError without Redis."""
        found: dict[str, int] = {}
        for worker in (await self.status()).workers:
            if not worker.stalled:
                since = int(worker.started_at)
                found[worker.model] = min(found.get(worker.model, since), since)
        return found

    async def find_model(self, named: Any) -> str:
        """The model that a request means, the server's own if it names none. Raises ApiError if nobody serves it."""
        own, served = self._client.model_name, await self.served()
        if named is None:
            named = own
        if not isinstance(named, str):
            raise ApiError(400, "invalid_request", "model: expected the name of a model", param="model")
        for name in (named, named.replace("/", "-")):  # as `config.settings.slug` makes a hub id a name
            if name in served:
                return name
        if named == own or not served or named in await self._named_lately():
            raise ApiError(503, "no_worker", "no worker serves the model; try again later", retry_after_s=RETRY_S)
        names = ", ".join(sorted(served))
        raise ApiError(
            404, "model_not_found", f"model: no worker serves {named[:80]!r}; served: {names}", param="model"
        )

    async def _named_lately(self) -> set[str]:
        """Models whose workers are away, being restarted say. Raises ApiError without Redis."""
        try:
            return await self._client.models()
        except HeadraceError as error:
            raise translate(error) from error

    # --- jobs --------------------------------------------------------------------------------------------------------

    async def submit(self, prompts: Sequence[Prompt], params: Mapping[str, Any], *, listed: bool = False) -> Submitted:
        """Queue prompts that share parameters; `listed` if an error is to say which prompt is wrong.

        Raises:
            ApiError: nobody serves the model.
            InvalidRequest, QueueFull, RedisUnreachable, RedisRefused: as `Client.submit`; nothing is left queued.
        """
        if "id" in params:
            raise InvalidRequest("id", "a name for the job", "no such parameter: jobs get theirs here")
        model = await self.find_model(params.get("model"))
        allowed = params.get("timeout_s")
        if allowed is None or (type(allowed) in (int, float) and allowed > self._timeout_s):
            allowed = self._timeout_s
        fields = {**params, "model": model, "timeout_s": allowed}
        try:
            # As mappings: whatever a field is called, it is no argument of a function here.
            jobs = await self._client.submit_many([{**fields, "prompt": prompt} for prompt in prompts])
        except InvalidRequest as error:
            raise named_after_field(error, listed=listed) from None
        except (RedisUnreachable, RedisRefused) as error:
            self._cancel(error.accepted.values())
            raise
        return Submitted(model, jobs, allowed + GRACE_S)

    @contextlib.contextmanager
    def _held(self, jobs: Sequence[AsyncJob]) -> Iterator[None]:
        """Jobs that have not ended when the block does are cancelled."""
        try:
            yield
        finally:
            self._cancel(job for job in jobs if job.outcome is None)

    def _cancel(self, jobs: Iterable[AsyncJob]) -> None:
        """Cancel jobs, without anybody waiting for it."""
        if job_ids := [job.id for job in jobs]:
            ending = asyncio.get_running_loop().create_task(self._end(job_ids))
            self._endings.add(ending)
            ending.add_done_callback(self._endings.discard)

    async def _end(self, job_ids: list[str]) -> None:
        with contextlib.suppress(HeadraceError):
            await self._client.cancel(job_ids)

    async def results(self, submitted: Submitted) -> list[Result]:
        """The results in the order of the jobs. The first failure is raised, and what still runs is cancelled."""
        jobs = submitted.jobs
        with self._held(jobs):
            async for job in self._client.as_completed(jobs, submitted.patience_s):
                await job.result()
            return [await job.result() for job in jobs]

    async def events(self, submitted: Submitted) -> AsyncGenerator[tuple[int, Event]]:
        """The text as it comes, each event with the place of its job. Errors are those of `results`."""
        jobs = submitted.jobs
        places = {job.id: place for place, job in enumerate(jobs)}
        with self._held(jobs):
            async with contextlib.aclosing(self._client.streams(jobs, submitted.patience_s)) as events:
                async for job, event in events:
                    yield places[job.id], event
