"""The outermost ASGI middleware, called as a server calls it."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import pytest
from structlog.testing import capture_logs

from headrace.client.http.auth import OWNER_KEY, AccessMiddleware, Limits, is_loopback

KEYS = ("first-key-0123456789", "second-key-0123456789")


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


async def echo(scope: Any, receive: Any, send: Any) -> None:
    """Read the body, and answer with its owner."""
    size, more = 0, True
    while more:
        message = await receive()
        size, more = size + len(message.get("body", b"")), message.get("more_body", False)
    if scope["path"] == "/fails":
        raise ValueError("a prompt that somebody wrote")
    await send({"type": "http.response.start", "status": 200, "headers": []})
    await send({"type": "http.response.body", "body": json.dumps([scope[OWNER_KEY], size]).encode()})


def ask(
    guard: AccessMiddleware, path: str = "/x", chunks: tuple[bytes, ...] = (b"",), **headers: str
) -> tuple[int, Any, Any]:
    """Status, body and headers of the answer."""
    sent: list[Any] = []
    waiting = list(chunks)
    raw = [
        (name.replace("_", "-").encode(), value.encode()) for name, value in {"host": "localhost", **headers}.items()
    ]

    async def receive() -> Any:
        return {"type": "http.request", "body": waiting.pop(0), "more_body": bool(waiting)}

    async def send(message: Any) -> None:
        sent.append(message)

    scope = {"type": "http", "method": "POST", "path": path, "headers": raw}
    asyncio.run(guard(scope, receive, send))
    body = json.loads(b"".join(message.get("body", b"") for message in sent))
    return sent[0]["status"], body, {name.decode(): value.decode() for name, value in sent[0]["headers"]}


def test_each_key_is_an_owner() -> None:
    guard = AccessMiddleware(echo, Limits(keys=KEYS))
    owners = [ask(guard, authorization=f"Bearer {key}")[1][0] for key in (*KEYS, KEYS[0])]
    assert owners[0] == owners[2] != owners[1]
    assert not any(key in owner for key in KEYS for owner in owners)
    assert ask(guard)[0] == 401
    assert ask(guard, authorization="Bearer other")[1]["error"]["code"] == "invalid_api_key"
    assert ask(guard, "/health")[1] == ["", 0]
    assert ask(AccessMiddleware(echo, Limits()))[1] == ["", 0]


def test_the_rate_limit_is_even_and_applies_to_each_key() -> None:
    clock = Clock()
    guard = AccessMiddleware(echo, Limits(keys=KEYS, requests_per_minute=6), clock)
    first, second = ({"authorization": f"Bearer {key}"} for key in KEYS)
    assert [ask(guard, **first)[0] for _ in range(7)] == [200] * 6 + [429]
    assert ask(guard, **second)[0] == 200
    status, body, headers = ask(guard, **first)
    assert (status, body["error"]["code"]) == (429, "rate_limit_exceeded")
    assert 10 <= int(headers["retry-after"]) <= 11
    clock.now = 9.0
    assert ask(guard, **first)[0] == 429
    clock.now = 10.5
    assert [ask(guard, **first)[0] for _ in range(2)] == [200, 429]
    clock.now = 1000.0
    assert [ask(guard, **first)[0] for _ in range(7)] == [200] * 6 + [429]
    assert ask(guard, "/health")[0] == 200


def test_the_body_limit_checks_the_announced_and_the_received_size() -> None:
    guard = AccessMiddleware(refusing_as_starlette_does, Limits(max_body_bytes=10, max_file_bytes=100))
    assert ask(guard, chunks=(b"a" * 5, b"b" * 5))[0] == 200
    assert ask(guard, chunks=(b"a" * 5, b"b" * 6))[0] == 413
    assert ask(guard, chunks=(b"a",), content_length="11")[0] == 413
    assert ask(guard, chunks=(b"a",), content_length="10")[0] == 200
    assert ask(guard, "/v1/files", chunks=(b"a" * 100,), content_length="100")[0] == 200


async def refusing_as_starlette_does(scope: Any, receive: Any, send: Any) -> None:
    from headrace.client.http.errors import ApiError

    try:
        await echo(scope, receive, send)
    except ApiError as error:
        await error.as_response()(scope, receive, send)


def test_an_exception_is_logged_without_its_message() -> None:
    with capture_logs() as logged:
        status, body, _ = ask(AccessMiddleware(echo, Limits()), "/fails")
    assert (status, body["error"]["code"]) == (500, "internal_error")
    assert "ValueError" in str(logged)
    assert "somebody" not in str(logged)


@pytest.mark.parametrize(
    ("limits", "headers", "status"),
    [
        (Limits(), {"host": "127.0.0.1:80", "origin": "http://127.0.0.1:80"}, 200),
        (Limits(), {"host": "evil.example"}, 403),
        (Limits(), {"origin": "http://evil.example"}, 403),
        (Limits(), {"origin": "http://[half"}, 403),
        (Limits(origins=("http://page.example",)), {"origin": "http://page.example"}, 200),
        (Limits(any_host=True), {"host": "server.example"}, 200),
        (Limits(any_host=True), {"host": "server.example", "origin": "http://evil.example"}, 403),
        (Limits(keys=KEYS), {"host": "server.example", "authorization": f"Bearer {KEYS[0]}"}, 200),
    ],
)
def test_which_origins_may_send_requests(limits: Limits, headers: dict[str, str], status: int) -> None:
    assert ask(AccessMiddleware(echo, limits), **headers)[0] == status


@pytest.mark.parametrize(
    ("host", "own"),
    [
        *((host, True) for host in ("127.0.0.1", "127.9.9.9", "::1", "localhost")),
        *((host, False) for host in ("0.0.0.0", "192.168.1.5", "localhost.example", "", "::")),
    ],
)
def test_which_addresses_are_local(host: str, own: bool) -> None:
    assert is_loopback(host) == own
