"""`/v1/batches`. `BatchRequest` (batch_objects.py) is the body of a create request."""

from __future__ import annotations

from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import Response

from headrace.client.http.batch_objects import parse_batch_request
from headrace.client.http.context import context_of, owner_of, paginate, read_json, route
from headrace.client.http.responses import JsonResponse


async def create_batch(request: Request) -> Response:
    """`POST /v1/batches`."""
    batch_request = parse_batch_request(await read_json(request))
    state = await run_in_threadpool(context_of(request).batches.create, batch_request, owner_of(request))
    return JsonResponse(state.public())


def list_batches(request: Request) -> Response:
    """`GET /v1/batches`, the newest first."""
    states = context_of(request).batches.owned_by(owner_of(request))
    return JsonResponse(paginate(request, states[::-1], default_limit=20, max_limit=100))


def get_batch(request: Request) -> Response:
    """`GET /v1/batches/{id}`."""
    return JsonResponse(context_of(request).batches.get(request.path_params["id"], owner_of(request)).public())


def cancel_batch(request: Request) -> Response:
    """`POST /v1/batches/{id}/cancel`."""
    return JsonResponse(context_of(request).batches.cancel(request.path_params["id"], owner_of(request)).public())


ROUTES = [
    route("POST", "/v1/batches", create_batch),
    route("GET", "/v1/batches", list_batches),
    route("GET", "/v1/batches/{id}", get_batch),
    route("POST", "/v1/batches/{id}/cancel", cancel_batch),
]
