"""Slow, idle and too many connections, against a real socket in this process."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import resource
import socket
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import pytest
import uvicorn
from structlog.testing import capture_logs

from headrace.client.http import sockets
from headrace.client.http.auth import AccessMiddleware, Limits
from headrace.client.http.serve import _config, _listen
from headrace.client.http.sockets import (
    ConnectionLimits,
    make_room,
)
from headrace.client.wire.errors import InvalidRequest
from headrace.config import load_settings
from tests.patience import PATIENCE_S

GET = b"GET /health HTTP/1.1\r\nhost: localhost\r\n\r\n"
POST = b"POST /body HTTP/1.1\r\nhost: localhost\r\n"
SOON = ConnectionLimits(connections=16, head_s=0.3, body_s=0.3, read_s=0.3)
Streams = tuple[asyncio.StreamReader, asyncio.StreamWriter]


@pytest.fixture(autouse=True)
def frequent_checks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Check in every tick, and log again what another test has logged."""
    monkeypatch.setattr(sockets, "CHECK_TICKS", 1)
    sockets.once_a_minute.__init__()  # type: ignore[misc]


async def app(scope: Any, receive: Any, send: Any) -> None:
    """/health answers at once, /body when the body is complete, /flood with more than any buffer holds."""
    if scope["type"] != "http":
        return
    message = {"more_body": True}
    while message.get("more_body") and scope["path"] == "/body":
        message = await receive()
        if message["type"] == "http.disconnect":
            return
    await send({"type": "http.response.start", "status": 200, "headers": []})
    for _ in range(1_000 if scope["path"] == "/flood" else 1):
        await send({"type": "http.response.body", "body": b"x" * 65_536, "more_body": True})
    await send({"type": "http.response.body", "body": b""})


@contextlib.asynccontextmanager
async def serving(limits: ConnectionLimits, asgi: Any = app) -> AsyncIterator[tuple[uvicorn.Server, int]]:
    """A server with checks ten times a second, and its port."""
    listener = _listen("127.0.0.1", 0)
    config = _config(AccessMiddleware(asgi, Limits()), load_settings(soft_shutdown_s=1), limits)
    config.lifespan = "off"
    server = sockets.Server(config)
    task = asyncio.create_task(server.serve([listener]))
    try:
        while not server.started:
            await asyncio.sleep(0.01)
        yield server, listener.getsockname()[1]
    finally:
        server.should_exit = True
        await task


async def connect(port: int, data: bytes = b"") -> Streams:
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(data)
    await writer.drain()
    return reader, writer


async def health(port: int) -> bytes:
    reader, writer = await connect(port, GET.replace(b"\r\n\r\n", b"\r\nconnection: close\r\n\r\n"))
    answer = await asyncio.wait_for(reader.read(), PATIENCE_S)
    writer.close()
    return answer[:15]


def run(scenario: Callable[[], Awaitable[None]]) -> None:
    asyncio.run(asyncio.wait_for(scenario(), 8))  # type: ignore[arg-type]


async def drip(writer: asyncio.StreamWriter, piece: bytes) -> None:
    with contextlib.suppress(ConnectionError):
        while True:
            writer.write(piece)
            await writer.drain()
            await asyncio.sleep(0.05)


REQUESTS = [
    (b"", b"", b""),
    (b"GET / HT", b"", b"408"),
    (b"GET / HTTP/1.1\r\n", b"a: b\r\n", b"408"),
    (POST + b"content-length: 100\r\n\r\n", b"", b"408"),
    (POST + b"content-length: 100\r\n\r\nabc", b"a", b"408"),
    (POST + b"transfer-encoding: chunked\r\n\r\n", b"1\r\na\r\n", b"408"),
    (POST + b"transfer-encoding: chunked\r\n\r\n1", b"", b"408"),
    (GET + b"GET / HT", b"x", b"408"),
]


async def answer_to(port: int, first: bytes, piece: bytes) -> bytes:
    """The last response to a client that sends a part of a request, and then one more piece again and again."""
    answer = b""
    reader, writer = await connect(port, first)
    dripping = asyncio.create_task(drip(writer, piece))
    with contextlib.suppress(ConnectionError):  # a client that still sends may meet a reset, not the answer
        answer = await reader.read()
    dripping.cancel()
    writer.close()
    return answer[answer.rfind(b"HTTP/1.1 ") :]


CHUNKED = b"transfer-encoding: chunked\r\n\r\n"
ENDLESS = [
    (POST + CHUNKED, b"1\r\nx\r\n" * 1_000, b"400"),
    (POST + CHUNKED, (b"a\r\n" + b"x" * 10 + b"\r\n") * 500, b"400"),
    (POST.replace(b"/body", b"/health") + CHUNKED, b"1\r\nx\r\n" * 1_000, b""),
    (POST.replace(b"/body", b"/health") + CHUNKED, b"10000\r\n" + b"x" * 65_536 + b"\r\n", b""),
    (POST.replace(b"/body", b"/health") + b"content-length: 99999999999\r\n\r\n", b"x" * 65_536, b""),
]


@pytest.mark.parametrize(("head", "piece", "status"), ENDLESS, ids=["tiny", "small", "tiny late", "late", "long late"])
def test_a_body_without_an_end_holds_nobody_up_and_ends(head: bytes, piece: bytes, status: bytes) -> None:
    """Neither in tiny chunks, of which each costs time, nor after its request was answered."""
    sent = 0

    async def scenario() -> None:
        nonlocal sent
        async with serving(ConnectionLimits(connections=16)) as (server, port):
            reader, writer = await connect(port, head)
            answer = b""
            with contextlib.suppress(ConnectionError):
                while not reader.at_eof() and sent < 64 * 2**20:
                    writer.write(piece)
                    await asyncio.wait_for(writer.drain(), 1)
                    sent += len(piece)
                    await asyncio.sleep(0)
                answer = await reader.read()
            assert sent < 64 * 2**20
            assert not answer or answer[9:12] == (status or b"200")
            writer.close()
            await until(lambda: not server.server_state.connections)
            assert await health(port) == b"HTTP/1.1 200 OK"

    run(scenario)


def test_a_body_in_chunks_of_an_ordinary_size_arrives() -> None:
    async def scenario() -> None:
        async with serving(ConnectionLimits(connections=16)) as (_, port):
            few = b"1\r\nx\r\n" * 1_900
            lines = b"50\r\n" + b"x" * 80 + b"\r\n"
            reader, writer = await connect(port, POST + b"connection: close\r\n" + CHUNKED + few)
            writer.write(lines * 6_000 + b"0\r\n\r\n")
            assert (await asyncio.wait_for(reader.read(), PATIENCE_S))[:15] == b"HTTP/1.1 200 OK"
            writer.close()

    run(scenario)


def test_a_request_that_does_not_arrive_ends_its_connection() -> None:
    async def scenario() -> None:
        async with serving(SOON) as (server, port):
            answers = await asyncio.gather(*(answer_to(port, first, piece) for first, piece, _ in REQUESTS))
            for (first, piece, status), answer in zip(REQUESTS, answers, strict=True):
                assert answer[9:12] == status or (piece and not answer), (first, answer)
                if answer:
                    assert json.loads(answer.partition(b"\r\n\r\n")[2])["error"]["code"] == "request_timeout"
            assert await health(port) == b"HTTP/1.1 200 OK"
            await until(lambda: not server.server_state.connections and not server.server_state.tasks)

    run(scenario)


async def until(condition: Callable[[], bool]) -> None:
    while not condition():
        await asyncio.sleep(0.02)


@pytest.mark.parametrize("path", [b"/flood", b"/health"])
def test_a_client_that_does_not_read_is_disconnected(path: bytes) -> None:
    async def scenario() -> None:
        async with serving(SOON) as (server, port):
            with socket.socket() as client:
                client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1_024)
                client.connect(("127.0.0.1", port))
                pipelined = 200 if path == b"/health" else 1
                client.sendall(GET.replace(b"/health", path) * pipelined)
                await until(lambda: bool(server.server_state.connections))
                await until(lambda: not server.server_state.connections and not server.server_state.tasks)

    run(scenario)


def test_a_client_that_reads_and_sends_slowly_but_steadily_is_served() -> None:
    limits = ConnectionLimits(connections=8, head_s=5, body_s=0.3, read_s=0.3, min_rate=1)

    async def scenario() -> None:
        async with serving(limits) as (_, port):
            reader, writer = await connect(port, POST + b"content-length: 10\r\n\r\n")
            for _ in range(10):
                writer.write(b"a")
                await asyncio.sleep(0.08)
            assert (await reader.readline()).startswith(b"HTTP/1.1 200")
            writer.close()

    run(scenario)


def test_idle_connections_make_room_and_health_is_answered_all_the_time() -> None:
    limits = ConnectionLimits(connections=8)

    async def scenario() -> None:
        async with serving(limits) as (server, port):
            idle = [await connect(port, head) for head in (b"", b"GET / HT", POST + b"content-length: 9\r\n\r\n") * 20]
            for _ in range(5):
                assert await health(port) == b"HTTP/1.1 200 OK"
            assert len(server.server_state.connections) <= limits.connections
            for _, writer in idle:
                writer.close()

    with capture_logs() as logged:
        run(scenario)
    assert [each["event"] for each in logged].count("http.connections_full") == 1


def test_more_requests_than_are_served_at_once_get_503_but_health_is_answered() -> None:
    async def scenario() -> None:
        guard, statuses, gate = AccessMiddleware(waiting, Limits(max_requests=2)), [], asyncio.Event()

        async def waiting_send(message: Any) -> None:
            statuses.extend([message["status"]] if "status" in message else [])

        async def ask(path: str) -> None:
            scope = {"type": "http", "method": "GET", "path": path, "headers": [(b"host", b"localhost")], "gate": gate}

            async def receive() -> Any:
                return {"type": "http.request"}

            await guard(scope, receive, waiting_send)

        held = [asyncio.create_task(ask("/x")) for _ in range(2)]
        await asyncio.sleep(0)
        await ask("/x")
        await ask("/health")
        assert statuses == [503, 200]
        gate.set()
        await asyncio.gather(*held)
        await ask("/x")
        assert statuses[2:] == [200] * 3

    async def waiting(scope: Any, receive: Any, send: Any) -> None:
        if scope["path"] != "/health":
            await scope["gate"].wait()
        await app(scope, receive, send)

    run(scenario)


def test_what_is_not_http_is_logged_once_a_minute() -> None:
    shown = [sockets.once_a_minute.first("Invalid HTTP request received.") for _ in range(100)]
    assert shown == [True] + [False] * 99
    sockets.quiet_uvicorn()
    record = logging.LogRecord("uvicorn.error", logging.WARNING, "", 0, "Invalid HTTP request received.", None, None)
    assert not logging.getLogger("uvicorn.error").filter(record)


def test_a_process_without_descriptors_logs_one_line() -> None:
    loop = asyncio.new_event_loop()
    with capture_logs() as logged:
        for _ in range(100):
            context = {"message": "socket.accept() out of system resource", "exception": OSError(24, "Too many")}
            sockets._handle_exception(loop, context)
    loop.close()
    assert [each["event"] for each in logged] == ["http.no_descriptors"]


@pytest.mark.parametrize(
    ("soft", "hard", "raised", "room"),
    [
        (256, 1_000_000, 65_536, 1_100),
        (1_024, 1_024, None, 432),
        (1_024, 4_096, 4_096, 1_100),
        (resource.RLIM_INFINITY, resource.RLIM_INFINITY, None, 1_100),
        (1_024, resource.RLIM_INFINITY, 65_536, 1_100),
    ],
)
def test_the_limit_of_descriptors_is_raised_and_kept(
    monkeypatch: pytest.MonkeyPatch, soft: int, hard: int, raised: int | None, room: int
) -> None:
    found: list[Any] = []
    monkeypatch.setattr(resource, "getrlimit", lambda _: (soft, hard))
    monkeypatch.setattr(resource, "setrlimit", lambda _, limits: found.append(limits))
    assert make_room() == room
    assert found == ([] if raised is None else [(raised, hard)])


def test_too_few_descriptors_are_refused_at_the_start(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resource, "getrlimit", lambda _: (128, 128))
    with pytest.raises(InvalidRequest, match=r"at least 192; raise it with `ulimit -n 4096`"):
        make_room()


def test_timeouts_are_for_the_time_of_the_client_and_not_of_the_server() -> None:
    """A body that the server does not read yet is not late."""
    limits = ConnectionLimits(connections=8, body_s=0.2, min_rate=1_000_000)

    async def slow(scope: Any, receive: Any, send: Any) -> None:
        await asyncio.sleep(0.8)
        await app(scope, receive, send)

    async def scenario() -> None:
        async with serving(limits, slow) as (_, port):
            size = 200_000
            reader, writer = await connect(port, POST + b"content-length: %d\r\n\r\n" % size)
            began = time.monotonic()
            writer.write(b"a" * size)
            assert (await reader.readline()).startswith(b"HTTP/1.1 200"), time.monotonic() - began
            writer.close()

    run(scenario)
