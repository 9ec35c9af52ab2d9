"""The ASGI application of `headrace serve`: routes, middleware and background tasks."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.routing import Match
from starlette.types import ASGIApp, Lifespan

from headrace.client.async_client import AsyncClient
from headrace.client.http.auth import AccessMiddleware, Limits
from headrace.client.http.batches import Batches
from headrace.client.http.comparison import Comparison
from headrace.client.http.context import AppContext
from headrace.client.http.errors import ApiError, translate
from headrace.client.http.file_store import FileStore
from headrace.client.http.jobs import JobRunner
from headrace.client.http.page import StatusReporter
from headrace.client.http.request_checks import RequestChecks
from headrace.client.http.routes import batches, completions, execute, files, jobs, models, status, tokens
from headrace.client.http.tracing import TracingMiddleware
from headrace.client.jobs.together import MAX_RESPONSE_RESULTS
from headrace.client.wire.errors import HeadraceError
from headrace.client.wire.tracing import CONTEXT_HEADERS
from headrace.client.wire.values import show
from headrace.config import Settings

#: Default limit for the duration of a job; the openai package waits as long.
TIMEOUT_S = 600.0
#: How often expired files and batches are deleted.
CLEANUP_INTERVAL_S = 3_600.0

_MODULES = (files, batches, completions, tokens, execute, models, jobs, status)
ROUTES = [route for module in _MODULES for route in module.ROUTES]


def make_app(
    settings: Settings,
    limits: Limits,
    file_store: FileStore,
    directory: Path,
    *,
    timeout_s: float = TIMEOUT_S,
) -> ASGIApp:
    """Build the application.

    Args:
        file_store: closed when the application shuts down.
        directory: the directory of `file_store`; the state of batches is stored there too.
        timeout_s: upper limit for the duration of a job.
    """

    @contextlib.asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        async with AsyncClient(settings=settings) as client:
            jobs, batches = (
                JobRunner(client, timeout_s, MAX_RESPONSE_RESULTS * settings.max_result_bytes),
                Batches(directory, file_store, settings),
            )
            reporter = StatusReporter(jobs)
            app.state.context = AppContext(client, jobs, file_store, batches, reporter, Comparison(client))
            batches.start()
            background = [asyncio.create_task(work) for work in (_clean_up(batches), reporter.sample_forever())]
            try:
                yield
            finally:
                for task in background:
                    task.cancel()
                await asyncio.to_thread(batches.stop)
                await jobs.close()
                file_store.close()

    _, protected = make_protected_app(limits, lifespan)
    if not limits.origins:
        return protected
    headers = ["authorization", "content-type", *CONTEXT_HEADERS]
    return CORSMiddleware(protected, allow_origins=limits.origins, allow_methods=["*"], allow_headers=headers)


def make_protected_app(limits: Limits, lifespan: Lifespan[Starlette] | None = None) -> tuple[Starlette, ASGIApp]:
    """The routes, and the same with the middleware of every request: access, traces, checks.

    Args:
        lifespan: sets `app.state.context`.
    """
    app = Starlette(routes=ROUTES, lifespan=lifespan, exception_handlers=exception_handlers())
    app.router.redirect_slashes = False  # `AccessMiddleware` removes them; the host of a redirect would be a guess
    return app, AccessMiddleware(TracingMiddleware(RequestChecks(app)), limits)


async def _clean_up(batches: Batches) -> None:
    while True:
        await asyncio.to_thread(batches.delete_expired)
        await asyncio.sleep(CLEANUP_INTERVAL_S)


async def _error_response(request: Request, error: Exception) -> Response:
    if not isinstance(error, HTTPException) or error.status_code != 405:
        return translate(error).as_response()
    methods = ", ".join(sorted(_methods_of(request)))
    if request.method == "OPTIONS":
        return Response(status_code=204, headers={"allow": methods})
    message = f"method: got {show(request.method)}; expected one of {methods}"
    response = ApiError(405, "method_not_allowed", message, param="method").as_response()
    response.headers["allow"] = methods
    return response


def _methods_of(request: Request) -> set[str]:
    """The methods of all routes with the path of the request."""
    matching = [route for route in ROUTES if route.matches(request.scope)[0] is not Match.NONE]
    return {"OPTIONS"}.union(*(route.methods or () for route in matching))


def exception_handlers() -> Any:
    """Starlette's exception handlers: every exception of a route becomes an error object."""
    return dict.fromkeys((ApiError, HeadraceError, HTTPException, ClientDisconnect, Exception), _error_response)
