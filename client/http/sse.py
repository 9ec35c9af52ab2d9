"""Connections: whoever hangs up ends the work for him; answers as server-sent events."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable, Coroutine, Iterable
from typing import Any, TypeVar

from starlette.requests import Request
from starlette.types import Receive, Scope, Send

from headrace.client.http.errors import CLIENT_GONE, ApiError, translate

T = TypeVar("T")

#: After this long without an event a stream says that it is alive, and sends its headers if it has not yet: until then
#: an error is an answer with a status of its own.
QUIET_S = 10.0


class ClientGone(ApiError):
    """Raised when the connection was closed. Nobody reads the answer."""

    def __init__(self) -> None:
        super().__init__(CLIENT_GONE, "client_gone", "the connection was closed")


async def _hung_up(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


async def _end_tasks(tasks: Iterable[asyncio.Task[Any] | None]) -> None:
    going = [task for task in tasks if task is not None]
    for task in going:
        task.cancel()
    await asyncio.gather(*going, return_exceptions=True)


async def while_connected(request: Request, work: Coroutine[Any, Any, T]) -> T:
    """What the work comes to; it is cancelled when the connection closes. The body has to be read before.

    Raises:
        ClientGone: it did.
    """
    task, gone = asyncio.ensure_future(work), asyncio.ensure_future(_hung_up(request.receive))
    try:
        await asyncio.wait({task, gone}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise ClientGone
        return task.result()
    finally:
        await _end_tasks((task, gone))


class EventStream:
    """An answer of server-sent events; it ends what it reads from when the connection closes.

    Args:
        events: the events as they are sent. An error before anything was sent is raised, with a status of its own.
        failure: an error as an event.
        at_once: send the headers before the first event is there.
    """

    def __init__(
        self,
        events: AsyncGenerator[bytes],
        failure: Callable[[ApiError], bytes],
        *,
        at_once: bool = False,
        headers: dict[str, str] | None = None,
    ) -> None:
        self._events, self._failure, self._started = events, failure, False
        self._at_once = at_once
        self._headers = {"content-type": "text/event-stream; charset=utf-8", "cache-control": "no-store"}
        self._headers |= {"x-accel-buffering": "no", **(headers or {})}  # nginx passes events on as they come

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:  # noqa: ARG002
        """Called by Starlette."""
        gone = asyncio.ensure_future(_hung_up(receive))
        coming: asyncio.Task[bytes] | None = None
        try:
            if self._at_once:
                await self._send(send, b"")
            while True:
                coming = coming or asyncio.ensure_future(_next(self._events))
                await asyncio.wait({coming, gone}, timeout=QUIET_S, return_when=asyncio.FIRST_COMPLETED)
                if gone.done():
                    return
                if not coming.done():
                    await self._send(send, b": still here\n\n")
                    continue
                event, last = self._taken(coming)
                coming = None
                await self._send(send, event, last=last)
                if last:
                    return
        finally:
            await _end_tasks((coming, gone))
            await self._events.aclose()

    def _taken(self, coming: asyncio.Task[bytes]) -> tuple[bytes, bool]:
        """The event, and whether it is the last one."""
        try:
            event = coming.result()
            return event, not event
        except Exception as error:
            if not self._started:
                raise
            return self._failure(translate(error)), True

    async def _send(self, send: Send, data: bytes, *, last: bool = False) -> None:
        if not self._started:
            self._started = True
            headers = [(name.encode(), value.encode()) for name, value in self._headers.items()]
            await send({"type": "http.response.start", "status": 200, "headers": headers})
        await send({"type": "http.response.body", "body": data, "more_body": not last})


async def _next(events: AsyncGenerator[bytes]) -> bytes:
    return await anext(events, b"")


def sse(data: str, event: str = "") -> bytes:
    """A server-sent event of one line of data."""
    return (f"event: {event}\n" if event else "").encode() + f"data: {data}\n\n".encode()
