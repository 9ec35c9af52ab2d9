"""The application: which address does what."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncGenerator, AsyncIterator
from pathlib import Path
from typing import Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.types import ASGIApp

from headrace.client.async_client import AsyncClient
from headrace.client.http.auth import HEALTH, PAGE, Guard, Limits
from headrace.client.http.batches import Batches
from headrace.client.http.comparison import Comparison
from headrace.client.http.context import Parts, parts_of, read_json, route
from headrace.client.http.errors import ApiError, translate
from headrace.client.http.file_store import FileStore
from headrace.client.http.jobs import Gateway, Submitted
from headrace.client.http.page import Overview, page
from headrace.client.http.routes.completions import Chunks, completions, read_order
from headrace.client.http.routes.files import ROUTES as STORAGE
from headrace.client.http.sse import EventStream, sse, while_connected
from headrace.client.http.tracing import Traced
from headrace.client.wire.errors import HeadraceError, InvalidRequest
from headrace.client.wire.tracing import CONTEXT_HEADERS
from headrace.config import Settings

#: No job of a request is of use for longer; the openai package waits as long.
TIMEOUT_S = 600.0
SWEEP_S = 3_600.0


def make_app(
    settings: Settings,
    limits: Limits,
    files: FileStore,
    directory: Path,
    *,
    timeout_s: float = TIMEOUT_S,
) -> ASGIApp:
    """The application with everything around it.

    Args:
        files: closed when the application ends.
        directory: that of `files`; batches lie in it too.
        timeout_s: how long a job of a request may take.
    """

    @contextlib.asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        async with AsyncClient(settings=settings) as client:
            gateway, batches = Gateway(client, timeout_s), Batches(directory, files, settings)
            parts = Parts(client, gateway, files, batches, Overview(gateway), Comparison(client))
            app.state.parts = parts
            parts.batches.start()
            background = [asyncio.create_task(work) for work in (_sweep(parts.batches), parts.overview.watch())]
            try:
                yield
            finally:
                for task in background:
                    task.cancel()
                await asyncio.to_thread(parts.batches.stop)
                await parts.gateway.close()
                files.close()

    app = Starlette(routes=ROUTES, lifespan=lifespan, exception_handlers=exception_handlers())
    guarded = Guard(Traced(app), limits)
    if not limits.origins:
        return guarded
    headers = ["authorization", "content-type", *CONTEXT_HEADERS]
    return CORSMiddleware(guarded, allow_origins=limits.origins, allow_methods=["*"], allow_headers=headers)


async def _sweep(batches: Batches) -> None:
    while True:
        await asyncio.to_thread(batches.sweep)
        await asyncio.sleep(SWEEP_S)


async def _failed(_: Request, error: Exception) -> Response:
    return translate(error).as_response()


def exception_handlers() -> Any:
    """What Starlette does with exceptions of routes: all become error objects."""
    return dict.fromkeys((ApiError, HeadraceError, HTTPException, Exception), _failed)


# --- completions -------------------------------------------------------------------------------------------------


async def create_completion(request: Request) -> Any:
    """`POST /v1/completions`."""
    gateway, order = parts_of(request).gateway, read_order(await read_json(request))
    params = {**order.params, **({"stream": True} if order.stream else {})}
    submitted = await gateway.submit(order.prompts, params, listed=order.listed)
    request_id = submitted.jobs[0].id
    headers = {"x-request-id": request_id}
    if not order.stream:
        results = await while_connected(request, gateway.results(submitted))
        return JSONResponse(completions(results), headers=headers)
    samples = order.params.get("n", 1)
    chunks = Chunks(request_id, submitted.model, samples, include_usage=order.include_usage)
    return EventStream(_chunks(gateway, submitted, chunks), _chunk_of_failure, headers=headers)


async def _chunks(gateway: Gateway, submitted: Submitted, chunks: Chunks) -> AsyncGenerator[bytes]:
    async with contextlib.aclosing(gateway.events(submitted)) as events:
        async for place, event in events:
            if event.result is None:
                yield chunks.piece(place, event)
    yield chunks.end([await job.result() for job in submitted.jobs])


def _chunk_of_failure(error: ApiError) -> bytes:
    """Without `[DONE]`: the stream is not whole."""
    return sse(json.dumps(error.as_dict()))


async def execute(request: Request) -> Any:
    """`POST /execute`: one prompt, the fields of `Client.submit`; events `started`, `token`, `end`, `error`."""
    gateway, fields = parts_of(request).gateway, await read_json(request)
    if fields.pop("stream", True) is not True:
        raise InvalidRequest("stream", "another value", "True: events are what this address gives")
    if "prompt" not in fields:
        raise InvalidRequest("prompt", "nothing", "a text, or a list of token ids")
    submitted = await gateway.submit([fields.pop("prompt")], {**fields, "stream": True})
    return EventStream(_events(gateway, submitted), _event_of_failure, at_once=True)


async def _events(gateway: Gateway, submitted: Submitted) -> AsyncGenerator[bytes]:
    yield sse(json.dumps({"id": submitted.jobs[0].id, "model": submitted.model}), "started")
    async with contextlib.aclosing(gateway.events(submitted)) as events:
        async for _, event in events:
            if event.result is not None:
                yield sse(event.result.model_dump_json(), "end")
                return
            scores = None if event.logprobs is None else [score.model_dump() for score in event.logprobs]
            piece = {"index": event.index, "text": event.text, "token_ids": event.token_ids, "logprobs": scores}
            yield sse(json.dumps({**piece, "finish_reason": event.finish_reason}), "token")


def _event_of_failure(error: ApiError) -> bytes:
    return sse(json.dumps(error.as_dict()), "error")


# --- models and health ---------------------------------------------------------------------------------------------


def _model(name: str, since: int) -> dict[str, Any]:
    return {"id": name, "object": "model", "created": since, "owned_by": "headrace"}


async def list_models(request: Request) -> Response:
    """`GET /v1/models`: those that live workers serve."""
    served = await parts_of(request).gateway.served()
    return JSONResponse({"object": "list", "data": [_model(name, served[name]) for name in sorted(served)]})


async def get_model(request: Request) -> Response:
    """`GET /v1/models/{id}`."""
    gateway, name = parts_of(request).gateway, request.path_params["model"]
    found = await gateway.find_model(name)
    return JSONResponse(_model(found, (await gateway.served())[found]))


async def health(request: Request) -> Response:
    """`GET /health`: 200 if a worker serves the server's own model, else 503 with what is missing. Needs no key."""
    parts = parts_of(request)
    try:
        served = await parts.gateway.served()
    except ApiError:
        return JSONResponse({"status": "no_redis"}, 503)
    ok = parts.client.model_name in served
    return JSONResponse({"status": "ok" if ok else "no_worker"}, 200 if ok else 503)


async def show_page(_: Request) -> Response:
    """`GET /`."""
    return page()


async def tell_status(request: Request) -> Response:
    """`GET /status.json`: what the page shows."""
    return JSONResponse(await parts_of(request).overview.tell())


async def tell_checkpoints(request: Request) -> Response:
    """`GET /checkpoints.json?job=ID&reference=ID`: how far the tensors of two jobs are apart."""
    return JSONResponse(await parts_of(request).comparison.tell(request.query_params))


ROUTES = [
    *STORAGE,
    route("POST", "/v1/completions", create_completion),
    route("GET", "/v1/models", list_models),
    route("GET", "/v1/models/{model:path}", get_model),
    route("POST", "/execute", execute),
    route("GET", HEALTH, health),
    route("GET", PAGE, show_page),
    route("GET", "/status.json", tell_status),
    route("GET", "/checkpoints.json", tell_checkpoints),
]
