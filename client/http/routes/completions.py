"""`POST /v1/completions` and `POST /v1/chat/completions` in the OpenAI format: one mechanism for both.

`client.batch.endpoints` has the conversions that these routes share with batches.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import AsyncGenerator, Mapping
from dataclasses import replace
from typing import Any

from starlette.requests import Request
from starlette.responses import Response

from headrace.client.batch.endpoints import CHAT, COMPLETIONS, Endpoint
from headrace.client.batch.openai import OTHER_ENDPOINTS
from headrace.client.http.completion_answer import chunks_for, encode_answer, encode_part, stream_chunks
from headrace.client.http.completion_request import parse_completion_request
from headrace.client.http.context import context_of, json_body, owner_of, route
from headrace.client.http.errors import ApiError, renamed
from headrace.client.http.responses import encode_json
from headrace.client.http.sse import EventStream, encode_event, run_until_disconnect


async def create_completion(request: Request) -> Any:
    """`POST /v1/completions`."""
    return await _answer(request, COMPLETIONS)


async def create_chat_completion(request: Request) -> Any:
    """`POST /v1/chat/completions`."""
    return await _answer(request, CHAT)


async def _answer(request: Request, endpoint: Endpoint) -> Any:
    jobs = context_of(request).jobs
    async with json_body(request) as body:
        parsed = parse_completion_request(body, endpoint)
        params = {**parsed.params, **({"stream": True} if parsed.stream else {})}
        with renamed(endpoint.names):
            submitted = await jobs.submit(
                parsed.sources, params, field=endpoint.source, is_list=parsed.is_list, owner=owner_of(request)
            )
    del body
    parsed = replace(parsed, sources=[])  # not kept until the results come
    headers = {"x-request-id": submitted.jobs[0].id}
    if not parsed.stream:
        convert = functools.partial(encode_part, endpoint=endpoint, as_token_ids=parsed.as_token_ids)
        with renamed(endpoint.names):
            parts = await run_until_disconnect(request, jobs.results(submitted, convert))
        return Response(encode_answer(parts), media_type="application/json", headers=headers)
    chunks = stream_chunks(jobs, submitted, chunks_for(parsed, submitted), parsed.params.get("n", 1))
    return EventStream(_with_names(chunks, endpoint.names), _encode_chunk_error, headers=headers)


async def _with_names(chunks: AsyncGenerator[bytes], names: Mapping[str, str]) -> AsyncGenerator[bytes]:
    """The chunks; an error names fields as the request does."""
    async with contextlib.aclosing(chunks):
        with renamed(names):
            async for chunk in chunks:
                yield chunk


def _encode_chunk_error(error: ApiError) -> bytes:
    """The error as the last event, without `[DONE]`: the stream is incomplete."""
    return encode_event(encode_json(error.as_dict()))


# --- endpoints of other models ---------------------------------------------------------------------------------------


async def refuse_endpoint(request: Request) -> Any:
    """An endpoint of the OpenAI API that this server does not have: the error says what it offers instead."""
    path = request.scope["path"]
    raise ApiError(404, "unsupported_endpoint", f"{path}: {OTHER_ENDPOINTS[path]}", param="url")


ROUTES = [
    route("POST", COMPLETIONS.path, create_completion),
    route("POST", CHAT.path, create_chat_completion),
    *(route("POST", path, refuse_endpoint) for path in OTHER_ENDPOINTS),
]
