"""The application: which address does what."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.datastructures import UploadFile
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import Request
from starlette.responses import FileResponse, JSONResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp

from client.aio import AsyncClient
from client.errors import InvalidRequest, MillraceError
from client.http.batches import Batches
from client.http.completions import Chunks, completions, read_order
from client.http.errors import ApiError, not_found, translate
from client.http.files import LIFE_S, SHORTEST_LIFE_S, FileStore
from client.http.gateway import EventStream, Gateway, Submitted, sse, while_connected
from client.http.guard import HEALTH, OWNER, PAGE, UPLOAD, Guard, Limits
from client.http.page import Overview, page
from config import Settings

#: No job of a request is of use for longer; the openai package waits as long.
TIMEOUT_S = 600.0
SWEEP_S = 3_600.0


@dataclass
class Parts:
    """What routes work with, while the server runs."""

    client: AsyncClient
    gateway: Gateway
    files: FileStore
    batches: Batches
    overview: Overview


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
            parts = Parts(client, gateway, files, batches, Overview(client))
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
    guarded = Guard(app, limits)
    if not limits.origins:
        return guarded
    headers = ["authorization", "content-type"]
    return CORSMiddleware(guarded, allow_origins=limits.origins, allow_methods=["*"], allow_headers=headers)


async def _sweep(batches: Batches) -> None:
    while True:
        await asyncio.to_thread(batches.sweep)
        await asyncio.sleep(SWEEP_S)


async def _failed(_: Request, error: Exception) -> Response:
    return translate(error).as_response()


def exception_handlers() -> Any:
    """What Starlette does with exceptions of routes: all become error objects."""
    return dict.fromkeys((ApiError, MillraceError, HTTPException, Exception), _failed)


def _parts(request: Request) -> Parts:
    parts: Parts = request.app.state.parts
    return parts


def _owner(request: Request) -> str:
    owner: str = request.scope[OWNER]
    return owner


async def _read_json(request: Request) -> dict[str, Any]:
    try:
        body = json.loads(await request.body())
    except (ValueError, RecursionError) as error:
        raise ApiError(400, "invalid_json", f"the body is no JSON: {str(error)[:80]}") from None
    if not isinstance(body, dict):
        raise ApiError(400, "invalid_json", "the body has to be a JSON object")
    return body


# --- completions -------------------------------------------------------------------------------------------------


async def create_completion(request: Request) -> Any:
    """`POST /v1/completions`."""
    gateway, order = _parts(request).gateway, read_order(await _read_json(request))
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
    gateway, fields = _parts(request).gateway, await _read_json(request)
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
    return {"id": name, "object": "model", "created": since, "owned_by": "millrace"}


async def list_models(request: Request) -> Response:
    """`GET /v1/models`: those that live workers serve."""
    served = await _parts(request).gateway.served()
    return JSONResponse({"object": "list", "data": [_model(name, served[name]) for name in sorted(served)]})


async def get_model(request: Request) -> Response:
    """`GET /v1/models/{id}`."""
    gateway, name = _parts(request).gateway, request.path_params["model"]
    found = await gateway.find_model(name)
    return JSONResponse(_model(found, (await gateway.served())[found]))


async def health(request: Request) -> Response:
    """`GET /health`: 200 if a worker serves the server's own model, else 503 with what is missing. Needs no key."""
    parts = _parts(request)
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
    return JSONResponse(await _parts(request).overview.tell())


# --- files -----------------------------------------------------------------------------------------------------------


async def upload_file(request: Request) -> Response:
    """`POST /v1/files`."""
    if not request.headers.get("content-type", "").startswith("multipart/form-data"):
        raise ApiError(400, "invalid_request", "a file is uploaded as multipart/form-data")
    async with request.form(max_files=1, max_fields=8, max_part_size=1024) as form:
        file, purpose = form.get("file"), form.get("purpose")
        if not isinstance(file, UploadFile):
            raise ApiError(400, "invalid_request", "file: expected the file itself", param="file")
        if purpose != "batch":
            raise ApiError(400, "invalid_request", "purpose: only 'batch' is offered here", param="purpose")
        life_s = _life(form.get("expires_after[anchor]"), form.get("expires_after[seconds]"))
        name = file.filename or "file"
        add = _parts(request).files.add
        stored = await run_in_threadpool(add, file.file, filename=name, owner=_owner(request), life_s=life_s)
    return JSONResponse(stored.public())


def _life(anchor: Any, seconds: Any) -> int:
    if anchor is None and seconds is None:
        return LIFE_S
    right = anchor == "created_at" and isinstance(seconds, str) and seconds.isascii() and seconds.isdecimal()
    if not right or not SHORTEST_LIFE_S <= int(seconds[:12]) <= LIFE_S:
        expected = f"anchor 'created_at', and seconds from {SHORTEST_LIFE_S} to {LIFE_S}"
        raise ApiError(400, "invalid_request", f"expires_after: expected {expected}", param="expires_after")
    return int(seconds)


def list_files(request: Request) -> Response:
    """`GET /v1/files`."""
    order, purpose = request.query_params.get("order", "desc"), request.query_params.get("purpose")
    if order not in ("asc", "desc"):
        raise ApiError(400, "invalid_request", "order: expected 'asc' or 'desc'", param="order")
    files = [f for f in _parts(request).files.owned_by(_owner(request)) if purpose in (None, f.purpose)]
    if order == "desc":
        files.reverse()
    return JSONResponse(_page(request, [file.public() for file in files], 10_000, 10_000))


def get_file(request: Request) -> Response:
    """`GET /v1/files/{id}`."""
    file = _parts(request).files.get(request.path_params["id"], _owner(request))
    return JSONResponse(file.public())


def get_content(request: Request) -> Response:
    """`GET /v1/files/{id}/content`. Never as something that a browser would show or run."""
    parts = _parts(request)
    file = parts.files.get(request.path_params["id"], _owner(request))
    headers = {"x-content-type-options": "nosniff"}
    kind = "application/octet-stream"
    return FileResponse(parts.files.path(file.id), media_type=kind, filename=file.filename, headers=headers)


def delete_file(request: Request) -> Response:
    """`DELETE /v1/files/{id}`."""
    parts = _parts(request)
    file = parts.files.get(request.path_params["id"], _owner(request))
    if parts.batches.uses(file.id):
        raise ApiError(409, "file_in_use", "a batch that is not complete reads the file; cancel it first", param="id")
    parts.files.delete(file.id)
    return JSONResponse({"id": file.id, "object": "file", "deleted": True})


def _page(request: Request, items: list[dict[str, Any]], default: int, most: int) -> dict[str, Any]:
    """The part of a list that is asked for, from the one behind `after` on."""
    given, after = request.query_params.get("limit", str(default)), request.query_params.get("after")
    if not (given.isascii() and given.isdecimal() and 1 <= int(given[:12]) <= most):
        raise ApiError(400, "invalid_request", f"limit: expected a whole number from 1 to {most}", param="limit")
    places = {item["id"]: place for place, item in enumerate(items)}
    if after is not None and after not in places:
        raise not_found("object", after[:80])
    start = 0 if after is None else places[after] + 1
    page = items[start : start + int(given)]
    ends = {"first_id": page[0]["id"] if page else None, "last_id": page[-1]["id"] if page else None}
    return {"object": "list", "data": page, **ends, "has_more": start + len(page) < len(items)}


# --- batches -------------------------------------------------------------------------------------------------------


async def create_batch(request: Request) -> Response:
    """`POST /v1/batches`."""
    body = await _read_json(request)
    state = await run_in_threadpool(_parts(request).batches.create, body, _owner(request))
    return JSONResponse(state.public())


def list_batches(request: Request) -> Response:
    """`GET /v1/batches`, the newest first."""
    states = _parts(request).batches.owned_by(_owner(request))
    return JSONResponse(_page(request, [state.public() for state in reversed(states)], 20, 100))


def get_batch(request: Request) -> Response:
    """`GET /v1/batches/{id}`."""
    return JSONResponse(_parts(request).batches.get(request.path_params["id"], _owner(request)).public())


def cancel_batch(request: Request) -> Response:
    """`POST /v1/batches/{id}/cancel`."""
    return JSONResponse(_parts(request).batches.cancel(request.path_params["id"], _owner(request)).public())


def _route(method: str, path: str, endpoint: Callable[[Request], Any]) -> Route:
    return Route(path, endpoint, methods=[method])


ROUTES = [
    _route("POST", "/v1/completions", create_completion),
    _route("GET", "/v1/models", list_models),
    _route("GET", "/v1/models/{model:path}", get_model),
    _route("POST", UPLOAD, upload_file),
    _route("GET", UPLOAD, list_files),
    _route("GET", "/v1/files/{id}", get_file),
    _route("DELETE", "/v1/files/{id}", delete_file),
    _route("GET", "/v1/files/{id}/content", get_content),
    _route("POST", "/v1/batches", create_batch),
    _route("GET", "/v1/batches", list_batches),
    _route("GET", "/v1/batches/{id}", get_batch),
    _route("POST", "/v1/batches/{id}/cancel", cancel_batch),
    _route("POST", "/execute", execute),
    _route("GET", HEALTH, health),
    _route("GET", PAGE, show_page),
    _route("GET", "/status.json", tell_status),
]
