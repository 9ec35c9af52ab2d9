"""A span for each request that asks for work: within the trace that its `traceparent` names, and around its jobs."""

from __future__ import annotations

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from headrace.client.wire.tracing import context_of
from headrace.config.tracing import find_tracer


class Traced:
    """A layer around the routes; it does nothing where OpenTelemetry is not set up."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Called by the layer around it."""
        asks = scope["type"] == "http" and scope["method"] == "POST"
        if not asks or (tracer := find_tracer()) is None:
            await self._app(scope, receive, send)
            return
        from opentelemetry.trace import SpanKind, StatusCode, use_span

        attributes = {"http.request.method": "POST", "url.path": scope["path"], "url.scheme": scope["scheme"]}
        span = tracer.start_span("POST", context_of(Headers(scope=scope)), SpanKind.SERVER, attributes)

        async def sending(message: Message) -> None:
            if (status := message.get("status")) is not None:
                span.set_attribute("http.response.status_code", status)
                if status >= 500:
                    span.set_status(StatusCode.ERROR)
            await send(message)

        # What an exception says may hold what somebody wrote: of that no more than its kind.
        with use_span(span, end_on_exit=True, record_exception=False, set_status_on_exception=False):
            try:
                await self._app(scope, receive, sending)
            except BaseException as error:
                span.set_attribute("error.type", type(error).__name__)
                span.set_status(StatusCode.ERROR)
                raise
            finally:
                if (route := scope.get("route")) is not None:
                    span.update_name(f"POST {route.path}")
                    span.set_attribute("http.route", route.path)
