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
from starlette.types import ASGIApp

from headrace.client.async_client import AsyncClient
from headrace.client.http.auth import AccessMiddleware, Limits
from headrace.client.http.batches import Batches
from headrace.client.http.comparison import Comparison
from headrace.client.http.context import AppContext
from headrace.client.http.errors import ApiError, translate
from headrace.client.http.file_store import FileStore
from headrace.client.http.jobs import MAX_RESPONSE_RESULTS, JobRunner
from headrace.client.http.page import StatusReporter
from headrace.client.http.routes import batches, completions, files, models, status
from headrace.client.http.tracing import TracingMiddleware
from headrace.client.wire.errors import HeadraceError
from headrace.client.wire.tracing import CONTEXT_HEADERS
from headrace.config import Settings

#: Default limit for the duration of a job; the openai package waits as long.
TIMEOUT_S = 600.0
#: How often expired files and batches are deleted.
CLEANUP_INTERVAL_S = 3_600.0

ROUTES = [*files.ROUTES, *batches.ROUTES, *completions.ROUTES, *models.ROUTES, *status.ROUTES]


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

    app = Starlette(routes=ROUTES, lifespan=lifespan, exception_handlers=exception_handlers())
    protected = AccessMiddleware(TracingMiddleware(app), limits)
    if not limits.origins:
        return protected
    headers = ["authorization", "content-type", *CONTEXT_HEADERS]
    return CORSMiddleware(protected, allow_origins=limits.origins, allow_methods=["*"], allow_headers=headers)


async def _clean_up(batches: Batches) -> None:
    while True:
        await asyncio.to_thread(batches.delete_expired)
        await asyncio.sleep(CLEANUP_INTERVAL_S)


async def _error_response(_: Request, error: Exception) -> Response:
    return translate(error).as_response()


def exception_handlers() -> Any:
    """Starlette's exception handlers: every exception of a route becomes an error object."""
    return dict.fromkeys((ApiError, HeadraceError, HTTPException, ClientDisconnect, Exception), _error_response)
