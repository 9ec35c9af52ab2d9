"""Server-sent events, and cancelling work when the client disconnects.

This is not sse-starlette, because it breaks three promises of `headrace serve`: it sends status 200 before the first
event exists, so that a first error cannot set the status; it replaces `uvicorn.Server.handle_exit` when it is
imported and ends every stream at SIGTERM, where requests have HEADRACE_SOFT_SHUTDOWN_S to finish; and its task group
cancels each `await` in the generator's own cleanup.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable, Coroutine, Iterable
from typing import Any, TypeVar

from starlette.requests import Request
from starlette.types import Receive, Scope, Send

from headrace.client.http.errors import CLIENT_CLOSED_REQUEST, ApiError, translate

T = TypeVar("T")

#: After this many seconds without an event the stream sends a comment, so that proxies keep the connection open. The
#: first comment also sends the headers; until then an error can still become an error response.
KEEPALIVE_S = 10.0
KEEPALIVE = b": keep-alive\n\n"


class ClientDisconnected(ApiError):
    """Raised when the client closed the connection, so that no response can be delivered."""

    def __init__(self) -> None:
        super().__init__(CLIENT_CLOSED_REQUEST, "client_gone", "the connection was closed")


async def _wait_for_disconnect(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


async def _cancel_tasks(tasks: Iterable[asyncio.Task[Any] | None]) -> None:
    pending = [task for task in tasks if task is not None]
    for task in pending:
        task.cancel()
    await asyncio.gather(*pending, return_exceptions=True)


async def run_until_disconnect(request: Request, work: Coroutine[Any, Any, T]) -> T:
    """Await `work`, and cancel it if the client disconnects. The request body must have been read already.

    Raises:
        ClientDisconnected: the connection was closed before `work` had finished.
    """
    task = asyncio.ensure_future(work)
    disconnect = asyncio.ensure_future(_wait_for_disconnect(request.receive))
    try:
        await asyncio.wait({task, disconnect}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise ClientDisconnected
        return task.result()
    finally:
        await _cancel_tasks((task, disconnect))


class EventStream:
    """A response of server-sent events; closes the generator when the client disconnects.

    A slow reader slows the generator down: the next event is requested after the last one was sent.

    Args:
        events: encoded events. An error before the first event is raised, so that it becomes an error response.
        encode_error: encodes a later error as the last event.
        start_immediately: send the headers before the first event exists.
        headers: additional response headers.
    """

    def __init__(
        self,
        events: AsyncGenerator[bytes],
        encode_error: Callable[[ApiError], bytes],
        *,
        start_immediately: bool = False,
        headers: dict[str, str] | None = None,
    ) -> None:
        self._events, self._encode_error, self._started = events, encode_error, False
        self._start_immediately = start_immediately
        self._headers = {"content-type": "text/event-stream; charset=utf-8", "cache-control": "no-store"}
        self._headers |= {"x-accel-buffering": "no", **(headers or {})}  # nginx must not buffer events

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:  # noqa: ARG002
        """Send the stream (ASGI)."""
        disconnect = asyncio.ensure_future(_wait_for_disconnect(receive))
        upcoming: asyncio.Task[bytes] | None = None
        try:
            if self._start_immediately:
                await self._send(send, b"")
            while True:
                upcoming = upcoming or asyncio.ensure_future(_next(self._events))
                await asyncio.wait({upcoming, disconnect}, timeout=KEEPALIVE_S, return_when=asyncio.FIRST_COMPLETED)
                if disconnect.done():
                    return
                if not upcoming.done():
                    await self._send(send, KEEPALIVE)
                    continue
                event, last = self._result_of(upcoming)
                upcoming = None
                await self._send(send, event, last=last)
                if last:
                    return
        finally:
            await _cancel_tasks((upcoming, disconnect))
            await self._events.aclose()

    def _result_of(self, finished: asyncio.Task[bytes]) -> tuple[bytes, bool]:
        """The event, and whether it is the last one. Raises the generator's error if nothing was sent yet."""
        try:
            event = finished.result()
            return event, not event
        except Exception as error:
            if not self._started:
                raise
            return self._encode_error(translate(error)), True

    async def _send(self, send: Send, data: bytes, *, last: bool = False) -> None:
        if not self._started:
            self._started = True
            headers = [(name.encode(), value.encode()) for name, value in self._headers.items()]
            await send({"type": "http.response.start", "status": 200, "headers": headers})
        await send({"type": "http.response.body", "body": data, "more_body": not last})


async def _next(events: AsyncGenerator[bytes]) -> bytes:
    return await anext(events, b"")


def encode_event(data: str, event: str = "") -> bytes:
    """Encode one server-sent event; `data` is a single line."""
    return (f"event: {event}\n" if event else "").encode() + f"data: {data}\n\n".encode()
