"""`POST /tokenize` and `POST /detokenize`, with the fields of vLLM. A worker computes them: the server has no model."""

from __future__ import annotations

from typing import Any

from starlette.requests import Request
from starlette.responses import Response

from headrace.client.http.context import context_of, owner_of, read_json, route
from headrace.client.http.errors import renamed
from headrace.client.http.responses import JsonResponse
from headrace.client.http.sse import run_until_disconnect
from headrace.client.http.token_requests import parse_detokenize_request, parse_tokenize_request
from headrace.client.wire.job_index import owned_by


async def tokenize(request: Request) -> Response:
    """`POST /tokenize`: the token ids of a prompt or of messages."""
    context = context_of(request)
    asked = parse_tokenize_request(await read_json(request))
    model, _ = await context.jobs.find_model(asked.model)
    with owned_by(owner_of(request)):
        found = await run_until_disconnect(request, context.client.tokenize(**asked.params, model=model))
    return JsonResponse(
        {
            "count": found.count,
            "max_model_len": found.max_model_len,
            "tokens": found.tokens,
            "token_strs": found.token_strs if asked.with_texts else None,
        }
    )


async def detokenize(request: Request) -> Response:
    """`POST /detokenize`: the text of token ids."""
    context = context_of(request)
    named, params = parse_detokenize_request(await read_json(request))
    model, _ = await context.jobs.find_model(named)
    with renamed({"prompt": "tokens", "token_ids": "tokens"}), owned_by(owner_of(request)):
        work: Any = context.client.detokenize(**params, model=model)
        text = await run_until_disconnect(request, work)
    return JsonResponse({"prompt": text})


ROUTES = [route("POST", "/tokenize", tokenize), route("POST", "/detokenize", detokenize)]
