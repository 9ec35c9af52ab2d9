"""Connections of `headrace serve`: how many there may be, and how long a slow client may keep one.

uvicorn limits neither the time that a request takes to arrive nor the time that a response takes to be read, and a
process without free descriptors accepts nothing and logs each attempt. `ConnectionLimits` says what is allowed,
`Connection` is uvicorn's protocol with the limits, and `Server` applies them once a second.
"""

from __future__ import annotations

import asyncio
import json
import logging
import resource
import socket
import time
from dataclasses import dataclass
from typing import Any

import h11
import structlog
import uvicorn
from h11._connection import DEFAULT_MAX_INCOMPLETE_EVENT_SIZE
from uvicorn.protocols.http.h11_impl import H11Protocol

from headrace.client.http.auth import MAX_REQUESTS
from headrace.client.http.errors import ApiError
from headrace.client.wire.errors import InvalidRequest

log = structlog.get_logger("headrace.http")

#: Connections besides those of MAX_REQUESTS, for the requests that get 503, and for health checks.
SPARE_CONNECTIONS = 100
#: Descriptors for everything else: Redis, batches, libraries.
RESERVED_DESCRIPTORS = 128
#: A connection may need a second descriptor, for a file that is uploaded or downloaded.
DESCRIPTORS_EACH = 2
#: The fewest connections with which the server starts.
MIN_CONNECTIONS = 16
#: The limit of descriptors is raised to this number if it is lower and the system allows it.
WANTED_DESCRIPTORS = 65_536
#: Connections that are accepted in one turn of the event loop, before the oldest ones are closed.
ACCEPT_AT_ONCE = 16
#: Connections are checked every so many ticks of uvicorn, of which there are ten in a second.
CHECK_TICKS = 10
#: A warning about the same thing is logged once in this time.
LOG_EVERY_S = 60.0
#: A chunk costs as much time as a hundred bytes or more. So many may be of any size; in all of a body they must have
#: MIN_CHUNK_BYTES on average, as a file has that is sent line by line.
FREE_CHUNKS, MIN_CHUNK_BYTES = 1_024, 48


@dataclass(frozen=True)
class ConnectionLimits:
    """What a client may take.

    Attributes:
        connections: how many may be open.
        head_s: seconds until the head of a request is complete, from the connection or the last response.
        body_s, read_s: in each period of so many seconds the client must send the rest of the body, or read what waits
            for it; or as many bytes of it as `min_rate` allows.
        min_rate: bytes per second.
    """

    connections: int = MAX_REQUESTS + SPARE_CONNECTIONS
    head_s: float = 15.0
    body_s: float = 30.0
    read_s: float = 30.0
    min_rate: int = 1_024


def make_room(wanted: int = MAX_REQUESTS + SPARE_CONNECTIONS) -> int:
    """Raise the limit of descriptors, and return for how many connections it is enough: at most `wanted`.

    Raises:
        InvalidRequest: it is too low for MIN_CONNECTIONS.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    allowed = _at_most(hard, WANTED_DESCRIPTORS)
    if soft != resource.RLIM_INFINITY and soft < allowed:
        resource.setrlimit(resource.RLIMIT_NOFILE, (allowed, hard))
        soft = allowed
    room = (_at_most(soft, 2**31) - RESERVED_DESCRIPTORS) // DESCRIPTORS_EACH - ACCEPT_AT_ONCE
    if room < MIN_CONNECTIONS:
        needed = RESERVED_DESCRIPTORS + DESCRIPTORS_EACH * (MIN_CONNECTIONS + ACCEPT_AT_ONCE)
        raise InvalidRequest("open files", f"a limit of {soft}", f"at least {needed}; raise it with `ulimit -n 4096`")
    return min(wanted, room)


def _at_most(limit: int, largest: int) -> int:
    return largest if limit == resource.RLIM_INFINITY else min(limit, largest)


class Requests(h11.Connection):
    """The requests of a connection. A body in tiny chunks is refused: each holds up the event loop."""

    def __init__(self, max_incomplete_event_size: int) -> None:
        super().__init__(h11.SERVER, max_incomplete_event_size)
        self._chunks = self._chunk_bytes = 0

    def next_event(self) -> Any:
        """Called by uvicorn. Raises h11.RemoteProtocolError."""
        event = super().next_event()
        if isinstance(event, h11.Request):
            self._chunks = self._chunk_bytes = 0
        elif isinstance(event, h11.Data):
            self._chunks += event.chunk_start
            self._chunk_bytes += len(event.data)
            if self._chunks > FREE_CHUNKS and self._chunk_bytes < MIN_CHUNK_BYTES * self._chunks:
                raise h11.RemoteProtocolError("the chunks of the body are too small")
        return event


class _CountedTransport:
    """A transport that counts what was written. What is not in its buffer any more has been sent."""

    def __init__(self, transport: asyncio.Transport) -> None:
        self._transport, self._written = transport, 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self._transport, name)

    def write(self, data: bytes) -> None:
        self._written += len(data)
        self._transport.write(data)

    @property
    def waiting(self) -> int:
        return self._transport.get_write_buffer_size()

    @property
    def sent(self) -> int:
        return self._written - self.waiting


class Connection(H11Protocol):
    """A connection whose requests must arrive, and whose responses must be read, in a limited time."""

    cycle: Any  # uvicorn's declaration leaves out that it is None before the first request

    limits = ConnectionLimits()

    def __init__(self, config: uvicorn.Config, *args: Any, **options: Any) -> None:
        super().__init__(config, *args, **options)
        self.conn = Requests(config.h11_max_incomplete_event_size or DEFAULT_MAX_INCOMPLETE_EVENT_SIZE)

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Called by asyncio. Over the limit, closes the connection that has waited longest for its request."""
        counted: Any = _CountedTransport(transport)
        self._counted = counted
        super().connection_made(counted)
        #: Since when the connection waits for the head of a request, or for the rest of its body; None if for neither.
        self._waits_since: float | None = time.monotonic()
        self._began = False  # whether a part of a head has arrived
        self._body_bytes = 0
        self._reads_since, self._sent_before = time.monotonic(), 0
        if len(self.connections) > self.limits.connections:
            self._close_another()

    @property
    def waits_for_head(self) -> bool:
        """Whether no request is in progress."""
        return self.cycle is None or (self.conn.their_state in (h11.IDLE, h11.DONE) and self.cycle.response_complete)

    @property
    def waits_for_body(self) -> bool:
        """Whether a request has begun that is not complete."""
        return self.cycle is not None and self.conn.their_state is h11.SEND_BODY

    def data_received(self, data: bytes) -> None:
        """Called by asyncio."""
        had_head = not self.waits_for_head
        if self._waits_since is None:
            self._waits_since = time.monotonic()
        self._began = True
        if self.waits_for_body:
            self._body_bytes += len(data)
        super().data_received(data)
        if not had_head and not self.waits_for_head:  # a head is complete: now its body is waited for
            self._waits_since, self._body_bytes = time.monotonic(), 0
        if not self.waits_for_head and not self.waits_for_body:
            self._waits_since = None

    def on_response_complete(self) -> None:
        """Called by uvicorn."""
        self._began = False
        if not self.waits_for_body:
            self._waits_since = time.monotonic()
        super().on_response_complete()

    def check(self, now: float) -> None:
        """Close the connection if the client is too slow."""
        limits = self.limits
        if self._counted.waiting == 0:
            self._reads_since, self._sent_before = now, self._counted.sent
        elif now - self._reads_since > limits.read_s:
            if self._counted.sent - self._sent_before < limits.read_s * limits.min_rate:
                self._counted.abort()
                return
            self._reads_since, self._sent_before = now, self._counted.sent
        if self._waits_since is None or self._counted.is_closing():
            return
        if self.flow.read_paused and self.waits_for_body:
            self._waits_since += CHECK_TICKS / 10  # the server does not read, so the client cannot send
        if now - self._waits_since <= (limits.body_s if self.waits_for_body else limits.head_s):
            return
        if self.waits_for_body and self._body_bytes >= limits.body_s * limits.min_rate:
            self._waits_since, self._body_bytes = now, 0
            return
        self._end("the request did not arrive in time")

    def _end(self, message: str) -> None:
        """Answer with 408 if a request has begun and has no answer, and close the connection."""
        answered = self.cycle is not None and self.cycle.response_started and not self.waits_for_head
        if self._began and not answered and self.conn.our_state in (h11.IDLE, h11.SEND_RESPONSE):
            body = json.dumps(ApiError(408, "request_timeout", message).as_dict()).encode()
            head = "HTTP/1.1 408 Request Timeout\r\nconnection: close\r\ncontent-type: application/json\r\n"
            self._counted.write(f"{head}content-length: {len(body)}\r\n\r\n".encode() + body)
        if self.cycle is not None:
            self.cycle.disconnected = True
            self.cycle.message_event.set()
        self._counted.close()

    def _close_another(self) -> None:
        """Close the connection that has waited longest: without a request, else without its body, else this one."""
        others = [each for each in self.connections if isinstance(each, Connection) and each._waits_since is not None]
        open_ones = [each for each in others if not each._counted.is_closing() and each is not self]
        waiting = [each for each in open_ones if each.waits_for_head] or open_ones
        oldest = min(waiting, key=lambda each: each._waits_since or 0.0, default=self)
        once_a_minute.warning("http.connections_full", limit=self.limits.connections)
        oldest._counted.abort()
        self.connections.discard(oldest)  # its descriptor is free at the end of this turn of the event loop


class Server(uvicorn.Server):
    """uvicorn with the limits of `Connection`."""

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Called by uvicorn."""
        await super().startup(sockets)
        asyncio.get_running_loop().set_exception_handler(_handle_exception)
        for listener in sockets or ():
            listener.listen(MAX_REQUESTS)  # asyncio lets as many wait as it accepts at once, which is few

    async def on_tick(self, counter: int) -> bool:
        """Called by uvicorn ten times a second."""
        if counter % CHECK_TICKS == 0:
            now = time.monotonic()
            for connection in list(self.server_state.connections):
                if isinstance(connection, Connection):
                    connection.check(now)
        return await super().on_tick(counter)


def _handle_exception(loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
    """Log a process without free descriptors once a minute: asyncio logs each connection that it cannot accept."""
    if "accept()" in context.get("message", ""):
        once_a_minute.warning("http.no_descriptors", error=str(context.get("exception")))
    else:
        loop.default_exception_handler(context)


class _OnceAMinute:
    """Logs each event at most once in LOG_EVERY_S."""

    def __init__(self) -> None:
        self._logged_at: dict[str, float] = {}

    def first(self, event: str) -> bool:
        """Whether the event was not logged lately; notes that it is now."""
        now = time.monotonic()
        if now - self._logged_at.get(event, -LOG_EVERY_S) < LOG_EVERY_S or len(self._logged_at) > 100:
            return False
        self._logged_at[event] = now
        return True

    def warning(self, event: str, **fields: Any) -> None:
        """Log a warning."""
        if self.first(event):
            log.warning(event, **fields)


once_a_minute = _OnceAMinute()


def quiet_uvicorn() -> None:
    """Let uvicorn log each of its messages once a minute: it writes one for each request that is not HTTP."""
    logging.getLogger("uvicorn.error").addFilter(lambda record: once_a_minute.first(str(record.msg)))
