"""Who may ask, how often and how much: looked at before any route sees a request.

Prompts and texts are in no line of the log: of a request it has method, path, status and seconds.
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

log = structlog.get_logger("headrace.http")

#: A JSON body; the largest prompt takes a third of it even if every character is escaped.
MAX_BODY_BYTES = 4 * 2**20
#: An uploaded file; that of the OpenAI API.
MAX_FILE_BYTES = 200 * 2**20
#: What the other parts of an upload take.
FORM_BYTES = 2**16
#: Read, beyond what is allowed, so that who sends too much reads our answer instead of a broken connection.
DRAIN_BYTES = 8 * 2**20

HEALTH, UPLOAD, PAGE = "/health", "/v1/files", "/"
#: Addresses that tell nothing that is anybody's; they need no key.
OPEN = (HEALTH, PAGE)
#: Where the guard leaves the name of a request's owner.
OWNER = "headrace.owner"


@dataclass(frozen=True, kw_only=True)
class Limits:
    """What a server allows.

    Attributes:
        keys: one of them has to come with each request; none are needed if there are none.
        origins: pages of these may ask, from a browser.
        any_host: also requests under names of other machines are answered where no key is needed.
    """

    keys: tuple[str, ...] = field(default=(), repr=False)
    origins: tuple[str, ...] = ()
    any_host: bool = False
    requests_per_minute: int | None = None
    max_body_bytes: int = MAX_BODY_BYTES
    max_file_bytes: int = MAX_FILE_BYTES


class Guard:
    """The outermost layer of the application."""

    def __init__(self, app: ASGIApp, limits: Limits, clock: Callable[[], float] = time.monotonic) -> None:
        self._app, self._limits, self._clock = app, limits, clock
        self._digests = [hashlib.sha256(key.encode()).digest() for key in limits.keys]
        self._buckets: dict[str, _Bucket] = {}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Called by the server."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        started, status = self._clock(), 0

        async def sending(message: Message) -> None:
            nonlocal status
            status = message.get("status", status)
            await send(message)

        limit = self._limits.max_body_bytes
        if scope["path"] == UPLOAD:
            limit = self._limits.max_file_bytes + FORM_BYTES
        body = _Body(receive, limit)
        try:
            await self._answer(scope, body, sending)
        except Exception as error:  # its message may hold what somebody wrote: only its kind and its place are told
            _log_fault(scope, error)
            if not status:
                failed = ApiError(500, "internal_error", "something failed here; see the server's log")
                await failed.as_response()(scope, receive, sending)
        finally:
            tell = log.debug if scope["path"] == HEALTH else log.info
            seconds = round(self._clock() - started, 3)
            tell("http.request", method=scope["method"], path=scope["path"], status=status, seconds=seconds)

    async def _answer(self, scope: Scope, body: _Body, send: Send) -> None:
        try:
            headers = Headers(scope=scope)
            scope[OWNER] = self._admit(scope["path"], headers)
            body.announce(headers.get("content-length", ""))
        except ApiError as error:
            await body.drain()
            await error.as_response()(scope, body.receive, send)
            return
        await self._app(scope, body.receive, send)

    def _admit(self, path: str, headers: Headers) -> str:
        """The owner of what the request makes. Raises ApiError."""
        if path in OPEN:
            return ""
        owner = self._owner(headers.get("authorization", ""))
        if not self._digests:
            self._check_page(headers)
        if (rate := self._limits.requests_per_minute) is not None:
            bucket = self._buckets.setdefault(owner, _Bucket(rate, self._clock()))
            if wait_s := bucket.take(self._clock()):
                message = f"more than {rate} requests in a minute; try again in {wait_s} s"
                raise ApiError(429, "rate_limit_exceeded", message, retry_after_s=wait_s)
        return owner

    def _owner(self, authorization: str) -> str:
        if not self._digests:
            return ""
        scheme, _, key = authorization.partition(" ")
        given = hashlib.sha256(key.strip().encode("utf-8", "surrogateescape")).digest()
        # All are compared, each in a time that does not hang on where the two differ.
        known = sum(hmac.compare_digest(given, digest) for digest in self._digests)
        if scheme.lower() != "bearer" or not known:
            raise ApiError(401, "invalid_api_key", "no valid key; send one as `Authorization: Bearer KEY`")
        return given.hex()[:16]

    def _check_page(self, headers: Headers) -> None:
        """Where no key is needed, a page that somebody looks at in a browser here could ask in his name."""
        host, origin = headers.get("host", ""), headers.get("origin")
        if not self._limits.any_host and not is_loopback(_parts(f"//{host}")[1]):
            raise ApiError(403, "wrong_host", "without keys only this machine is answered, under its own names")
        if origin is not None and origin not in self._limits.origins and _parts(origin)[0] != host:
            raise ApiError(403, "wrong_origin", "pages of other sites may not ask; --cors ORIGIN allows one")


class _Body:
    """A request's body, up to a limit."""

    def __init__(self, receive: Receive, limit: int) -> None:
        self._receive, self._limit, self._read, self._ended = receive, limit, 0, False

    def announce(self, length: str) -> None:
        """What the header says. Raises ApiError."""
        if length.isascii() and length.isdecimal() and int(length[:20]) > self._limit:
            raise self._too_large()

    async def receive(self) -> Message:
        """As the server's, counted. Raises ApiError."""
        message = await self._next()
        if self._read > self._limit:
            await self.drain()
            raise self._too_large()
        return message

    async def _next(self) -> Message:
        message = await self._receive()
        self._read += len(message.get("body", b""))
        self._ended = message["type"] == "http.disconnect" or not message.get("more_body", False)
        return message

    async def drain(self) -> None:
        """Read on, to a point."""
        until = self._read + DRAIN_BYTES
        while not self._ended and self._read < until:
            await self._next()

    def _too_large(self) -> ApiError:
        return ApiError(413, "too_large", f"the request is larger than {self._limit} bytes")


class _Bucket:
    """Holds a minute's worth of requests, and fills evenly."""

    def __init__(self, per_minute: int, now: float) -> None:
        self._per_minute, self._left, self._at = per_minute, float(per_minute), now

    def take(self, now: float) -> int:
        """0 if there was one, else the seconds after which there will be."""
        rate = self._per_minute / 60
        self._left = min(float(self._per_minute), self._left + (now - self._at) * rate)
        self._at = now
        if self._left >= 1:
            self._left -= 1
            return 0
        return int((1 - self._left) / rate) + 1


def is_loopback(host: str) -> bool:
    """Whether a name or an address is this machine's own, which no other machine can reach."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _parts(url: str) -> tuple[str, str]:
    """Network location and host name in a URL, empty where it is none."""
    try:
        parts = urlsplit(url)
        return parts.netloc, parts.hostname or ""
    except ValueError:
        return "", ""


def _log_fault(scope: Scope, error: Exception) -> None:
    trace, places = error.__traceback__, []
    while trace is not None:
        places.append(f"{trace.tb_frame.f_code.co_filename}:{trace.tb_lineno}")
        trace = trace.tb_next
    log.error("http.failed", path=scope["path"], error=type(error).__name__, places=places[-6:])
