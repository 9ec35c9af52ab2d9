"""OpenTelemetry: a server span for each POST request, the parent of the spans of its jobs."""

from __future__ import annotations

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from headrace.client.wire.tracing import context_of
from headrace.config.tracing import find_tracer


class TracingMiddleware:
    """ASGI middleware; continues the trace of a `traceparent` header. Does nothing if OpenTelemetry is not set up."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one request (ASGI)."""
        is_post = scope["type"] == "http" and scope["method"] == "POST"
        if not is_post or (tracer := find_tracer()) is None:
            await self._app(scope, receive, send)
            return
        from opentelemetry.trace import SpanKind, StatusCode, use_span

        attributes = {"http.request.method": "POST", "url.path": scope["path"], "url.scheme": scope["scheme"]}
        span = tracer.start_span("POST", context_of(Headers(scope=scope)), SpanKind.SERVER, attributes)

        async def send_and_record(message: Message) -> None:
            if (status := message.get("status")) is not None:
                span.set_attribute("http.response.status_code", status)
                if status >= 500:
                    span.set_status(StatusCode.ERROR)
            await send(message)

        # An exception's message may contain a user's prompt, so the span records only its type.
        with use_span(span, end_on_exit=True, record_exception=False, set_status_on_exception=False):
            try:
                await self._app(scope, receive, send_and_record)
            except BaseException as error:
                span.set_attribute("error.type", type(error).__name__)
                span.set_status(StatusCode.ERROR)
                raise
            finally:
                if (route := scope.get("route")) is not None:
                    span.update_name(f"POST {route.path}")
                    span.set_attribute("http.route", route.path)
