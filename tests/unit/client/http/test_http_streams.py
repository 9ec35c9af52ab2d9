"""Responses as server-sent events, on a simulated connection."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator
from typing import Any

import pytest

from headrace.client.http import sse as connections
from headrace.client.http.errors import ApiError
from headrace.client.http.sse import EventStream, encode_event


class Connection:
    """The ASGI connection that a server gives an application; the client closes it after `open_s`."""

    def __init__(self, open_s: float = 5) -> None:
        self.open_s, self.sent = open_s, list[dict[str, Any]]()

    async def receive(self) -> Any:
        await asyncio.sleep(self.open_s)
        return {"type": "http.disconnect"}

    async def send(self, message: Any) -> None:
        self.sent.append(message)

    @property
    def body(self) -> bytes:
        return b"".join(message.get("body", b"") for message in self.sent)


class Source:
    """Yields events; a number is a pause, and an exception is raised."""

    def __init__(self, *items: bytes | float | Exception) -> None:
        self.items, self.closed = items, False

    async def events(self) -> AsyncGenerator[bytes]:
        try:
            for item in self.items:
                if isinstance(item, bytes):
                    yield item
                elif isinstance(item, Exception):
                    raise item
                else:
                    await asyncio.sleep(item)
        finally:
            self.closed = True


def answered(source: Source, connection: Connection, **options: Any) -> Connection:
    stream = EventStream(source.events(), lambda error: encode_event(json.dumps(error.as_dict()), "error"), **options)
    asyncio.run(stream({}, connection.receive, connection.send))
    assert source.closed
    return connection


def test_events_are_sent_as_they_arrive_and_the_response_ends() -> None:
    found = answered(Source(b"a\n\n", b"b\n\n"), Connection(), headers={"x-request-id": "1"})
    assert [message["type"] for message in found.sent] == ["http.response.start", *["http.response.body"] * 3]
    assert dict(found.sent[0]["headers"])[b"x-request-id"] == b"1"
    assert found.body == b"a\n\nb\n\n"
    assert [message["more_body"] for message in found.sent[1:]] == [True, True, False]


def test_an_error_before_the_first_event_is_a_plain_error_response() -> None:
    connection, source = Connection(), Source(ApiError(400, "code", "message"))
    with pytest.raises(ApiError):
        answered(source, connection)
    assert source.closed
    assert connection.sent == []


@pytest.mark.parametrize("options", [{}, {"start_immediately": True}])
def test_a_later_error_is_the_last_event(options: dict[str, Any]) -> None:
    items = [ValueError("secret")] if options else [b"a\n\n", ValueError("secret")]
    found = answered(Source(*items), Connection(), **options)
    assert found.body.startswith(b"" if options else b"a\n\n")
    assert b'event: error\ndata: {"error": ' in found.body
    assert b"secret" not in found.body
    assert not found.sent[-1]["more_body"]


def test_a_quiet_stream_sends_keep_alive_comments(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connections, "KEEPALIVE_S", 0.05)
    found = answered(Source(0.2, b"a\n\n"), Connection())
    comments = found.body.count(b": keep-alive\n\n")
    assert comments >= 2
    assert found.body == b": keep-alive\n\n" * comments + b"a\n\n"


@pytest.mark.parametrize("items", [(5.0,), (b"a\n\n", 5.0)])
def test_a_closed_connection_closes_the_source_of_events(items: tuple[Any, ...]) -> None:
    found = answered(Source(*items), Connection(open_s=0.05))
    assert all(message.get("more_body", True) for message in found.sent)
