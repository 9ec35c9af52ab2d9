"""ASGI middleware: authentication, rate limit, body limit.

The log of a request holds its method, path, status and duration, never a prompt or a generated text.
"""

from __future__ import annotations

import hashlib
import hmac
import ipaddress
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from urllib.parse import urlsplit

import structlog
from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from headrace.client.http.errors import ApiError
from headrace.client.wire.unicode import printable

log = structlog.get_logger("headrace.http")

#: Requests that are answered at the same time.
MAX_REQUESTS = 1_000
#: Limit of a JSON body, in bytes. The longest prompt takes a third of it even if every character is escaped.
MAX_BODY_BYTES = 4 * 2**20
#: Limit of an uploaded file, in bytes; the OpenAI API has the same.
MAX_FILE_BYTES = 200 * 2**20
#: Bytes that an upload may have besides the file: form fields and multipart boundaries.
MULTIPART_OVERHEAD_BYTES = 2**16
#: Bytes that are read and discarded after a request was refused. A client that is still sending would otherwise see a
#: broken connection instead of the error.
DRAIN_BYTES = 8 * 2**20

HEALTH_PATH, UPLOAD_PATH, PAGE_PATH = "/health", "/v1/files", "/"
#: What the page consists of besides its HTML, and the media types.
PAGE_FILES = {
    "/page.css": "text/css",
    **{f"/page{part}.js": "text/javascript" for part in ("", "-parts", "-chart", "-jobs", "-try", "-compare")},
}
VERSION_PATH, OPENAPI_PATH = "/version", "/openapi.json"
#: Paths that need no key: they reveal nothing about anybody's requests.
PUBLIC_PATHS = (HEALTH_PATH, PAGE_PATH, *PAGE_FILES, VERSION_PATH, OPENAPI_PATH)
#: The key under which the middleware stores the owner's name in the ASGI scope.
OWNER_KEY = "headrace.owner"


@dataclass(frozen=True, kw_only=True)
class Limits:
    """Access rules of the server, and limits on its use.

    Attributes:
        keys: each request must send one of them; empty if no key is needed.
        origins: web origins whose pages may send requests from a browser (CORS).
        any_host: without keys, also accept `Host` headers that do not name this machine.
        requests_per_minute: rate limit of each key; None for no limit.
        max_body_bytes: limit of a request body.
        max_file_bytes: limit of an uploaded file.
        max_requests: limit of requests at the same time, except those to public paths.
    """

    keys: tuple[str, ...] = field(default=(), repr=False)
    origins: tuple[str, ...] = ()
    any_host: bool = False
    requests_per_minute: int | None = None
    max_body_bytes: int = MAX_BODY_BYTES
    max_file_bytes: int = MAX_FILE_BYTES
    max_requests: int = MAX_REQUESTS


class AccessMiddleware:
    """Checks key, origin, rate and size of each request, and logs it. The outermost middleware except CORS."""

    def __init__(self, app: ASGIApp, limits: Limits, clock: Callable[[], float] = time.monotonic) -> None:
        self._app, self._limits, self._clock = app, limits, clock
        self._key_digests = [hashlib.sha256(key.encode()).digest() for key in limits.keys]
        self._buckets: dict[str, _TokenBucket] = {}
        self._requests = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one request (ASGI)."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        if len(scope["path"]) > 1 and scope["path"].endswith("/"):
            scope = {**scope, "path": scope["path"].rstrip("/") or "/"}
        started, status = self._clock(), 0

        async def send_and_note_status(message: Message) -> None:
            nonlocal status
            status = message.get("status", status)
            await send(message)

        body = _LimitedBody(receive, self._body_limit(scope["path"]))
        self._requests += 1
        try:
            await self._handle(scope, body, send_and_note_status)
        except Exception as error:  # its message may contain a user's prompt: only its type and place are logged
            _log_exception(scope, error)
            if not status:
                failure = ApiError(500, "internal_error", "internal server error; see the server's log")
                await failure.as_response()(scope, receive, send_and_note_status)
        finally:
            self._requests -= 1
            log_request = log.debug if scope["path"] == HEALTH_PATH else log.info
            seconds, shown = round(self._clock() - started, 3), printable(scope["path"])
            log_request("http.request", method=scope["method"], path=shown, status=status, seconds=seconds)

    def _body_limit(self, path: str) -> int:
        if path == UPLOAD_PATH:
            return self._limits.max_file_bytes + MULTIPART_OVERHEAD_BYTES
        return self._limits.max_body_bytes

    async def _handle(self, scope: Scope, body: _LimitedBody, send: Send) -> None:
        try:
            headers = Headers(scope=scope)
            scope[OWNER_KEY] = self._authorize(scope["path"], headers)
            body.check_content_length(headers.get("content-length", ""))
        except ApiError as error:
            await body.drain()
            await error.as_response()(scope, body.receive, send)
            return
        await self._app(scope, body.receive, send)

    def _authorize(self, path: str, headers: Headers) -> str:
        """The owner of files and batches that the request creates. Raises ApiError if the request is refused."""
        if path in PUBLIC_PATHS:
            return ""
        if self._requests > self._limits.max_requests:
            raise ApiError(503, "too_many_requests", "too many requests at once; try again later", retry_after_s=1)
        owner = self._authenticate(headers.get("authorization", ""))
        if not self._key_digests:
            self._check_host_and_origin(headers)
        if (rate := self._limits.requests_per_minute) is not None:
            bucket = self._buckets.setdefault(owner, _TokenBucket(rate, self._clock()))
            if wait_s := bucket.take(self._clock()):
                message = f"more than {rate} requests in a minute; try again in {wait_s} s"
                raise ApiError(429, "rate_limit_exceeded", message, retry_after_s=wait_s)
        return owner

    def _authenticate(self, authorization: str) -> str:
        if not self._key_digests:
            return ""
        scheme, _, key = authorization.partition(" ")
        # Headers are bytes, which ASGI's users read as Latin-1; a key outside ASCII arrives in UTF-8 or in Latin-1.
        encodings = (key.strip().encode("latin-1", "replace"), key.strip().encode("utf-8", "replace"))
        digests = [hashlib.sha256(encoded).digest() for encoded in encodings]
        # Compare with every key, each in constant time, so that the duration says nothing about the keys.
        matches = [known for known in self._key_digests for given in digests if hmac.compare_digest(given, known)]
        if scheme.lower() != "bearer" or not matches:
            raise ApiError(401, "invalid_api_key", "no valid API key; send one as `Authorization: Bearer KEY`")
        return matches[0].hex()[:16]

    def _check_host_and_origin(self, headers: Headers) -> None:
        """Without keys, refuse pages of other sites: opened in a browser on this machine, they could send requests."""
        host, origin = headers.get("host", ""), headers.get("origin")
        if not self._limits.any_host and not is_loopback(_split_url(f"//{host}")[1]):
            raise ApiError(403, "wrong_host", "without API keys the server answers only requests to localhost")
        if origin is not None and origin not in self._limits.origins and _split_url(origin)[0] != host:
            raise ApiError(403, "wrong_origin", "pages of other sites may not send requests; --cors ORIGIN allows one")


class _LimitedBody:
    """Wraps ASGI's `receive`: counts the bytes of the request body and enforces a limit."""

    def __init__(self, receive: Receive, limit: int) -> None:
        self._receive, self._limit, self._read, self._complete = receive, limit, 0, False

    def check_content_length(self, header: str) -> None:
        """Raises ApiError if the Content-Length header exceeds the limit."""
        if header.isascii() and header.isdecimal():
            digits = header.lstrip("0")[:20] or "0"
            if int(digits) > self._limit:
                raise self._too_large()

    async def receive(self) -> Message:
        """The next ASGI message. Raises ApiError if the body exceeds the limit."""
        message = await self._next()
        if self._read > self._limit:
            await self.drain()
            raise self._too_large()
        return message

    async def _next(self) -> Message:
        message = await self._receive()
        self._read += len(message.get("body", b""))
        self._complete = message["type"] == "http.disconnect" or not message.get("more_body", False)
        return message

    async def drain(self) -> None:
        """Read and discard the rest of the body, at most `DRAIN_BYTES` of it."""
        stop_at = self._read + DRAIN_BYTES
        while not self._complete and self._read < stop_at:
            await self._next()

    def _too_large(self) -> ApiError:
        return ApiError(413, "too_large", f"the request is larger than {self._limit} bytes")


class _TokenBucket:
    """Rate limiter: holds a minute's worth of requests and refills evenly."""

    def __init__(self, per_minute: int, now: float) -> None:
        self._per_minute, self._tokens, self._updated_at = per_minute, float(per_minute), now

    def take(self, now: float) -> int:
        """Take one token. Returns 0, or the seconds to wait if the bucket is empty."""
        per_second = self._per_minute / 60
        self._tokens = min(float(self._per_minute), self._tokens + (now - self._updated_at) * per_second)
        self._updated_at = now
        if self._tokens >= 1:
            self._tokens -= 1
            return 0
        return int((1 - self._tokens) / per_second) + 1


def is_loopback(host: str) -> bool:
    """Whether `host` is localhost or a loopback address, which other machines cannot reach."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _split_url(url: str) -> tuple[str, str]:
    """Network location and host name of a URL; empty strings if it is not a URL."""
    try:
        parts = urlsplit(url)
        return parts.netloc, parts.hostname or ""
    except ValueError:
        return "", ""


def _log_exception(scope: Scope, error: Exception) -> None:
    traceback, places = error.__traceback__, []
    while traceback is not None:
        places.append(f"{traceback.tb_frame.f_code.co_filename}:{traceback.tb_lineno}")
        traceback = traceback.tb_next
    log.error("http.failed", path=printable(scope["path"]), error=type(error).__name__, places=places[-6:])
