"""The jobs of a key: `/jobs.json`, and cancelling one. Lists have neither prompts nor texts."""

from __future__ import annotations

import time
from typing import get_args

from starlette.requests import Request
from starlette.responses import Response

from headrace.client.http.context import context_of, owner_of, route, whole_number
from headrace.client.http.errors import not_found
from headrace.client.http.job_lists import public
from headrace.client.http.responses import JsonResponse
from headrace.client.wire.errors import InvalidRequest
from headrace.client.wire.results import State
from headrace.client.wire.values import show

#: Jobs in one answer: by default, and at most.
DEFAULT_LIMIT, MAX_LIMIT = 20, 100


async def list_jobs(request: Request) -> Response:
    """`GET /jobs.json`: the jobs of this key, the newest first; without keys, all that were sent without one."""
    query, states = request.query_params, get_args(State)
    state, limit = query.get("state") or "", query.get("limit") or str(DEFAULT_LIMIT)
    if state and state not in states:
        raise InvalidRequest("state", show(state), f"one of {', '.join(states)}")
    size = whole_number(limit, 1, MAX_LIMIT)
    if size is None:
        raise InvalidRequest("limit", show(limit), f"a whole number from 1 to {MAX_LIMIT}")
    lists = context_of(request).jobs.lists
    found = await lists.page(
        owner_of(request),
        state=state or None,
        model=query.get("model") or None,
        search=(query.get("search") or "").strip(),
        limit=size,
        after=query.get("after") or "",
    )
    return JsonResponse(found)


async def cancel_job(request: Request) -> Response:
    """`POST /jobs/{id}/cancel`: cancel a job of this key."""
    context, job_id, owner = context_of(request), request.path_params["id"], owner_of(request)
    job = await context.jobs.lists.find(job_id, owner)
    if job is None:
        raise not_found("job", job_id)
    if job.state in ("queued", "running"):
        await context.client.cancel(job_id)
        job = await context.jobs.lists.find(job_id, owner) or job
    return JsonResponse(public(job, time.time()))


ROUTES = [
    route("GET", "/jobs.json", list_jobs),
    route("POST", "/jobs/{id}/cancel", cancel_job),
]
