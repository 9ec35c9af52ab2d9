"""Helpers of all routes: access to the objects of the application, JSON bodies, pagination."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from starlette.requests import Request
from starlette.routing import Route

from headrace.client.async_client import AsyncClient
from headrace.client.http.auth import OWNER_KEY
from headrace.client.http.batches import Batches
from headrace.client.http.comparison import Comparison
from headrace.client.http.errors import ApiError
from headrace.client.http.file_store import FileStore
from headrace.client.http.jobs import JobRunner
from headrace.client.http.page import StatusReporter
from headrace.client.wire.errors import InvalidRequest
from headrace.client.wire.unicode import parse_json
from headrace.client.wire.values import show

#: Digits of a number in a query or a form. Python takes quadratic time to read one, and refuses more than 4,300 digits.
MAX_DIGITS = 12
#: A body of up to this size is parsed at once, whatever it has.
SMALL_BODY_BYTES = 65_536
#: Limits of a larger body. The largest valid request has 1,024 prompts and 1,024 members of `logit_bias`.
MAX_JSON_TEXTS, MAX_JSON_CONTAINERS = 16_384, 8_192


@dataclass
class AppContext:
    """The objects that routes work with while the server runs."""

    client: AsyncClient
    jobs: JobRunner
    files: FileStore
    batches: Batches
    status: StatusReporter
    comparison: Comparison
    #: Held while a large body is parsed and its jobs are submitted; see `json_body`.
    parsing: asyncio.Lock = field(default_factory=asyncio.Lock)


def context_of(request: Request) -> AppContext:
    """The context of the application that received the request."""
    context: AppContext = request.app.state.context
    return context


def owner_of(request: Request) -> str:
    """The owner whose files and batches the request may see; "" if no keys are configured."""
    owner: str = request.scope[OWNER_KEY]
    return owner


@contextlib.asynccontextmanager
async def json_body(request: Request) -> AsyncIterator[dict[str, Any]]:
    """The request body. During the block no other large body is parsed: objects take ten times the memory of their
    JSON, and the more of them there are, the longer a garbage collection holds up everybody.

    Raises:
        ApiError: it is not a JSON object, or has more values than any request needs.
        InvalidRequest: a string in it is not Unicode.
    """
    if request.headers.get("content-type", "").lower().startswith("multipart/"):
        message = "content-type: got multipart; expected application/json"
        raise ApiError(415, "unsupported_media_type", message, param="content-type")
    raw = await request.body()
    if len(raw) < SMALL_BODY_BYTES:
        yield _parse(raw)
    else:
        async with context_of(request).parsing:
            yield await asyncio.to_thread(_parse, raw)


async def read_json(request: Request) -> dict[str, Any]:
    """The request body; see `json_body`."""
    async with json_body(request) as body:
        return body


def _parse(raw: bytes) -> dict[str, Any]:
    if len(raw) >= SMALL_BODY_BYTES:
        check_structure(raw)
    try:
        body = parse_json(raw, constants=False)
    except InvalidRequest:
        raise
    except ValueError as error:
        raise ApiError(400, "invalid_json", f"the body is not valid JSON: {str(error)[:80]}") from None
    if not isinstance(body, dict):
        raise ApiError(400, "invalid_json", "the body must be a JSON object")
    return body


def check_structure(raw: bytes) -> None:
    """Refuse a body that is slow to parse. While it is parsed the server answers nobody, and a text of 4 MiB takes
    20 times as long if it is a million empty lists. Raises ApiError.
    """
    plain = raw.replace(rb"\\", b"").replace(rb"\"", b"") if b"\\" in raw else raw
    if plain.count(b'"') <= 2 * MAX_JSON_TEXTS:
        outside = b"".join(plain.split(b'"')[::2])  # without the texts
        containers = outside.count(b"[") + outside.count(b"{")
        if containers <= MAX_JSON_CONTAINERS and outside.count(b":") <= MAX_JSON_CONTAINERS:
            return
    message = f"the body has more than {MAX_JSON_TEXTS} texts, or {MAX_JSON_CONTAINERS} lists, objects or members"
    raise ApiError(400, "invalid_json", message)


class Listed(Protocol):
    """An object that lists show."""

    @property
    def id(self) -> str:
        """Its id."""

    def public(self) -> dict[str, Any]:
        """OpenAI's object."""


def paginate(request: Request, items: Sequence[Listed], default_limit: int, max_limit: int) -> dict[str, Any]:
    """OpenAI's list object: the page of `items` that the query parameters `after` and `limit` select; an empty one asks
    for nothing.

    Raises:
        InvalidRequest: `limit` is out of range.
        ApiError: there is no item with the id `after`.
    """
    limit, after = request.query_params.get("limit") or str(default_limit), request.query_params.get("after")
    size = whole_number(limit, 1, max_limit)
    if size is None:
        raise InvalidRequest("limit", show(limit), f"a whole number from 1 to {max_limit}")
    start = 0
    if after:
        start = next((index for index, item in enumerate(items, 1) if item.id == after), 0)
        if not start:
            message = f"after: got {show(after)}; expected the id of an object of this list"
            raise ApiError(404, "not_found", message, param="after")
    page = [item.public() for item in items[start : start + size]]
    ends = {"first_id": page[0]["id"] if page else None, "last_id": page[-1]["id"] if page else None}
    return {"object": "list", "data": page, **ends, "has_more": start + len(page) < len(items)}


def whole_number(text: str, low: int, high: int) -> int | None:
    """A number from `low` to `high`, as a query or a form has it; None if the text is not one."""
    if len(text) <= MAX_DIGITS and text.isascii() and text.isdecimal() and low <= int(text) <= high:
        return int(text)
    return None


def route(method: str, path: str, endpoint: Callable[[Request], Any]) -> Route:
    """A route that accepts one HTTP method."""
    return Route(path, endpoint, methods=[method])
