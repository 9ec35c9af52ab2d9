"""Health check, the status page, and the JSON that the page displays."""

from __future__ import annotations

from starlette.datastructures import QueryParams
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from headrace import __version__
from headrace.client.http.auth import HEALTH_PATH, OPENAPI_PATH, PAGE_FILES, PAGE_PATH, VERSION_PATH
from headrace.client.http.context import context_of, route
from headrace.client.http.errors import ApiError, invalid
from headrace.client.http.openapi import describe
from headrace.client.http.page import page, page_file
from headrace.client.http.responses import JsonResponse
from headrace.client.wire.requests import is_job_id


async def health(request: Request) -> Response:
    """`GET /health`: 200 if a worker serves the server's default model, else 503 with the reason. Needs no key."""
    context = context_of(request)
    try:
        served = await context.jobs.served_models()
    except ApiError:
        return JsonResponse({"status": "no_redis"}, 503)
    ok = context.client.model_name in served
    return JsonResponse({"status": "ok" if ok else "no_worker"}, 200 if ok else 503)


async def show_page(_: Request) -> Response:
    """`GET /`: the status page."""
    return page()


async def show_page_file(request: Request) -> Response:
    """A style sheet or a script of the status page."""
    return page_file(request.url.path)


async def get_status(request: Request) -> Response:
    """`GET /status.json`: workers, queues and recent throughput."""
    return JsonResponse(await context_of(request).status.report())


async def compare_checkpoints(request: Request) -> Response:
    """`GET /checkpoints.json?job=ID&reference=ID`: the largest difference of each tensor of two jobs."""
    job_id, reference_id = (_job_id(request.query_params, name) for name in ("job", "reference"))
    return JsonResponse(await context_of(request).comparison.compare(job_id, reference_id))


def _job_id(query: QueryParams, name: str) -> str:
    value = query.get(name)
    if not is_job_id(value):
        raise invalid(f"{name}: expected the id of a job", name)
    return value


async def get_version(_: Request) -> Response:
    """`GET /version`: the version of the server. Needs no key."""
    return JsonResponse({"version": __version__})


async def get_openapi(request: Request) -> Response:
    """`GET /openapi.json`: this description. Needs no key."""
    state = request.app.state
    if not hasattr(state, "openapi"):  # made once: it takes as long as a hundred other requests, and needs no key
        state.openapi = describe(each for each in request.app.routes if isinstance(each, Route))
    return JsonResponse(state.openapi)


ROUTES = [
    route("GET", VERSION_PATH, get_version),
    route("GET", OPENAPI_PATH, get_openapi),
    route("GET", HEALTH_PATH, health),
    route("GET", PAGE_PATH, show_page),
    *(route("GET", path, show_page_file) for path in PAGE_FILES),
    route("GET", "/status.json", get_status),
    route("GET", "/checkpoints.json", compare_checkpoints),
]
