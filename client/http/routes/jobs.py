"""The jobs of a key: `/jobs.json`, and cancelling one. Lists have neither prompts nor texts."""

from __future__ import annotations

import time
from typing import Any, get_args

from starlette.requests import Request
from starlette.responses import Response

from headrace.client.http.context import context_of, owner_of, route, whole_number
from headrace.client.http.errors import ApiError, not_found
from headrace.client.http.responses import JsonResponse
from headrace.client.wire.errors import InvalidRequest
from headrace.client.wire.results import State
from headrace.client.wire.values import show

#: Jobs in one answer: by default, and at most.
DEFAULT_LIMIT, MAX_LIMIT = 20, 100


async def list_jobs(request: Request) -> Response:
    """`GET /jobs.json`: the jobs that this key has sent to this server, the newest first."""
    query, states = request.query_params, get_args(State)
    state, limit = query.get("state") or "", query.get("limit") or str(DEFAULT_LIMIT)
    if state and state not in states:
        raise InvalidRequest("state", show(state), f"one of {', '.join(states)}")
    size = whole_number(limit, 1, MAX_LIMIT)
    if size is None:
        raise InvalidRequest("limit", show(limit), f"a whole number from 1 to {MAX_LIMIT}")
    context = context_of(request)
    filters = {"state": state, "model": query.get("model") or "", "search": (query.get("search") or "").strip()}
    found, counts = context.jobs.book.select(owner_of(request), await _running(request), **filters)
    start, after = 0, query.get("after")
    if after:
        start = next((index for index, entry in enumerate(found, 1) if entry.id == after), len(found))
    shown, now = found[start : start + size], time.time()
    more = start + len(shown) < len(found)
    return JsonResponse({"data": [entry.public(now) for entry in shown], "has_more": more, "counts": counts})


async def _running(request: Request) -> set[str]:
    """The tags of jobs in slots, as the last heartbeats say; none while Redis cannot be reached."""
    try:
        workers = (await context_of(request).status.latest()).workers
    except ApiError:
        return set()
    return {row.job for worker in workers for row in worker.rows}


async def cancel_job(request: Request) -> Response:
    """`POST /jobs/{id}/cancel`: ask for the end of a job that this key has sent to this server."""
    context, job_id = context_of(request), request.path_params["id"]
    entry = context.jobs.book.find(job_id, owner_of(request))
    if entry is None:
        raise not_found("job", job_id)
    if entry.ended_at is None:
        await context.client.cancel(job_id)
    answer: dict[str, Any] = entry.public(time.time())
    return JsonResponse(answer)


ROUTES = [
    route("GET", "/jobs.json", list_jobs),
    route("POST", "/jobs/{id}/cancel", cancel_job),
]
