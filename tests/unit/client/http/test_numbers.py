"""Numbers that enter by a query, a form, a header, a body or a call: bounded by value and by length."""

from __future__ import annotations

import asyncio
import errno
import socket
from typing import Any

import pytest
from starlette.requests import Request

from headrace.client import Client
from headrace.client.http.auth import _LimitedBody
from headrace.client.http.context import paginate, whole_number
from headrace.client.http.errors import ApiError
from headrace.client.http.file_store import MIN_RETENTION_S
from headrace.client.http.jobs import JobRunner, NamedModel
from headrace.client.http.routes.files import _check_range, _retention
from headrace.client.http.serve import serve
from headrace.client.wire.errors import InvalidRequest, RedisUnreachable
from headrace.client.wire.redis import redis_errors
from headrace.config import load_settings

LONG = "9" * 5_000
WRONG = [
    "",
    "0",
    "-1",
    "+1",
    "1.0",
    "1e3",
    "1_0",
    " 1",
    "٣",
    "²",
    "0x1",
    LONG,
    "000000000001" + LONG,
    "1" + "0" * 5_000,
    "nan",
]


@pytest.mark.parametrize("text", [*WRONG, "0" * 5_000 + "1"])
def test_a_number_in_a_query_or_a_form_is_bounded_by_value_and_length(text: str) -> None:
    assert whole_number(text, 1, 10_000) is None
    request = Request({"type": "http", "query_string": b"limit=" + text.encode("utf-8"), "headers": []})
    if text:  # an empty field of a form asks for nothing
        with pytest.raises(InvalidRequest, match=r"limit: got .*; expected a whole number from 1 to 100"):
            paginate(request, [], 20, 100)
    with pytest.raises(InvalidRequest, match="expires_after: got anchor 'created_at' and seconds"):
        _retention("created_at", text)


@pytest.mark.parametrize(
    "text", [LONG + "-", "0-" + LONG, "-" + LONG, "٣-", "1_0-2_0", "5-2", "abc", "", "+1-2", "0-1,x", "-"]
)
def test_a_range_that_cannot_be_read_is_an_error_of_the_api(text: str) -> None:
    with pytest.raises(InvalidRequest, match=r"range: .*expected such as 'bytes=0-99'"):
        _check_range(f"bytes={text}")


def test_ranges_are_read() -> None:
    for header in (None, "Bytes=0-", "bytes=-5", "bytes=0-1, 3-3", "bytes= 1-2 "):
        _check_range(header)


def test_numbers_within_their_bounds_are_read() -> None:
    assert whole_number("007", 1, 10) == 7
    assert _retention("created_at", str(MIN_RETENTION_S)) == MIN_RETENTION_S


@pytest.mark.parametrize(
    ("header", "refused"),
    [("9" * 20, True), (LONG, True), ("0" * 30 + "11", True), ("0" * 30 + "9", False), ("", False)],
)
def test_the_announced_length_of_a_body_is_read_whole(header: str, refused: bool) -> None:
    async def receive() -> Any:
        raise AssertionError

    body = _LimitedBody(receive, 10)
    if not refused:
        body.check_content_length(header)
        return
    with pytest.raises(ApiError):
        body.check_content_length(header)


@pytest.mark.parametrize("number", [float("inf"), float("nan"), -1, True])
def test_a_timeout_that_is_no_number_of_seconds_is_refused(number: float) -> None:
    class Model(JobRunner):
        async def find_model(self, requested: Any) -> NamedModel:
            return NamedModel("demo")

    class Jobs:
        async def submit_many(self, requests: list[Any]) -> list[Any]:
            with Client(settings=load_settings(redis_url="redis://localhost:1/0")) as client:
                return list(map(client.submitter.prepare, requests))

    with pytest.raises(InvalidRequest) as caught:
        asyncio.run(Model(Jobs(), 60).submit(["a"], {"timeout_s": number}))  # type: ignore[arg-type]
    assert caught.value.field == "timeout_s"


@pytest.mark.parametrize("timeout", [float("inf"), float("nan"), 1e10])
def test_the_option_timeout_is_bounded(timeout: float) -> None:
    with pytest.raises(InvalidRequest, match="timeout"):
        serve(load_settings(), host="localhost", port=0, announce=print, timeout=timeout)


@pytest.mark.parametrize("number", [10**5_000, -(10**5_000)], ids=["positive", "negative"])
def test_a_number_of_thousands_of_digits_in_a_call_is_named(number: int) -> None:
    with Client(settings=load_settings(redis_url="redis://localhost:1/0")) as client:
        calls = {
            "timeout_s": lambda: client.submit("a", timeout_s=number),
            "id": lambda: client.submit("a", id=number),  # type: ignore[arg-type]
            "model": lambda: client.submit("a", model=number),
            "expires_at": lambda: client.submit("a", expires_at=number),
            "max_tokens": lambda: client.submit("a", max_tokens=number),
            "job": lambda: client.cancel([number]),  # type: ignore[list-item]
            "max_inflight": lambda: next(client.map(["a"], max_inflight=-abs(number))),
        }
        if number < 0:
            calls["timeout"] = lambda: client.job("a").result(timeout=number)
        for field, call in calls.items():
            with pytest.raises(InvalidRequest) as caught:
                call()
            assert caught.value.field == field
            assert len(str(caught.value)) < 400


@pytest.mark.parametrize("url", ["redis://localhost:1/0", "embedded:///nowhere"])
def test_a_client_without_descriptors_says_what_to_do(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_descriptors(*_: Any, **__: Any) -> Any:
        raise OSError(errno.EMFILE, "Too many open files")

    with Client(settings=load_settings(redis_url="redis://localhost:1/0")) as client:
        monkeypatch.setattr(socket, "socket", no_descriptors)
        monkeypatch.setattr("redis.connection.get_lib_version", no_descriptors, raising=False)
        for call in (client.status, lambda: client.submit("a"), lambda: client.cancel("a"), client.job("a").result):
            with pytest.raises(RedisUnreachable, match=r"raise the limit with `ulimit -n 4096`"):
                call()
    with pytest.raises(RedisUnreachable, match="ulimit"), redis_errors(url):
        no_descriptors()
    with pytest.raises(PermissionError), redis_errors(url):
        raise PermissionError(errno.EACCES, "not ours")
