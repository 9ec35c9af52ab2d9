"""What routes have in common."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from starlette.requests import Request
from starlette.routing import Route

from headrace.client.async_client import AsyncClient
from headrace.client.http.auth import OWNER
from headrace.client.http.batches import Batches
from headrace.client.http.comparison import Comparison
from headrace.client.http.errors import ApiError
from headrace.client.http.file_store import FileStore
from headrace.client.http.jobs import Gateway
from headrace.client.http.page import Overview


@dataclass
class Parts:
    """What routes work with, while the server runs."""

    client: AsyncClient
    gateway: Gateway
    files: FileStore
    batches: Batches
    overview: Overview
    comparison: Comparison


def parts_of(request: Request) -> Parts:
    """What the route works with."""
    parts: Parts = request.app.state.parts
    return parts


def owner_of(request: Request) -> str:
    """Whose files and batches the request may see."""
    owner: str = request.scope[OWNER]
    return owner


async def read_json(request: Request) -> dict[str, Any]:
    """The body. Raises ApiError if it is no JSON object."""
    try:
        body = json.loads(await request.body())
    except (ValueError, RecursionError) as error:
        raise ApiError(400, "invalid_json", f"the body is no JSON: {str(error)[:80]}") from None
    if not isinstance(body, dict):
        raise ApiError(400, "invalid_json", "the body has to be a JSON object")
    return body


def route(method: str, path: str, endpoint: Callable[[Request], Any]) -> Route:
    """An address of one method."""
    return Route(path, endpoint, methods=[method])
