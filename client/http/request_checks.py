"""ASGI middleware: what holds for every request before a route sees it, whatever the route reads of it."""

from __future__ import annotations

from urllib.parse import unquote_to_bytes

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from headrace.client.http.errors import ApiError, invalid
from headrace.client.wire.unicode import is_unicode


class RequestChecks:
    """Refuses URLs that are not valid Unicode, and bodies with a content encoding, which no route decodes."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one request (ASGI)."""
        if scope["type"] == "http":
            try:
                _check(scope)
            except ApiError as error:
                await error.as_response()(scope, receive, send)
                return
        await self._app(scope, receive, send)


def _check(scope: Scope) -> None:
    raw_path = scope.get("raw_path")
    path_is_valid = is_unicode(scope["path"]) if raw_path is None else _is_utf8(raw_path)
    # Servers decode a path with replacement characters, so another object than the one that was named might be found.
    if not path_is_valid or not _is_utf8(scope.get("query_string", b"")):
        raise invalid("url: expected text in UTF-8, percent-encoded", "url")
    encoding = Headers(scope=scope).get("content-encoding", "identity").strip().lower()
    if encoding not in ("", "identity"):
        message = f"content-encoding: got {encoding[:40]!r}; send the body as it is, without an encoding"
        raise ApiError(415, "unsupported_media_type", message, param="content-encoding")


def _is_utf8(quoted: bytes) -> bool:
    try:
        unquote_to_bytes(quoted.replace(b"+", b" ")).decode()
    except UnicodeDecodeError:
        return False
    return True
