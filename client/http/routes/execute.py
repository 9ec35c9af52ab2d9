"""`POST /execute`: the life of one job as events."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncGenerator
from typing import Any, Literal

from starlette.requests import Request

from headrace.client.http.context import context_of, json_body, owner_of, route
from headrace.client.http.errors import ApiError
from headrace.client.http.jobs import JobRunner, SubmittedJobs
from headrace.client.http.responses import encode_json
from headrace.client.http.sse import EventStream, encode_event
from headrace.client.wire.errors import InvalidRequest
from headrace.client.wire.requests import plain_fields


async def execute(request: Request) -> Any:
    """`POST /execute`: a prompt or messages, with the fields of `Client.submit`; events `started`, `token`, `end`,
    `error`.
    """
    jobs = context_of(request).jobs
    async with json_body(request) as body:
        fields = plain_fields(body)
        if fields.pop("stream", True) is not True:
            raise InvalidRequest("stream", "another value", "True: /execute always streams")
        source: Literal["prompt", "messages"] = (
            "messages" if "messages" in fields and "prompt" not in fields else "prompt"
        )
        if source not in fields:
            raise InvalidRequest("prompt", "nothing", "a text, or a list of token ids; or messages, for a chat")
        submitted = await jobs.submit(
            [fields.pop(source)], {**fields, "stream": True}, field=source, owner=owner_of(request)
        )
    return EventStream(_stream_events(jobs, submitted), _encode_error_event, start_immediately=True)


async def _stream_events(jobs: JobRunner, submitted: SubmittedJobs) -> AsyncGenerator[bytes]:
    adapter = {} if submitted.adapter is None else {"adapter": submitted.adapter}
    yield encode_event(encode_json({"id": submitted.jobs[0].id, "model": submitted.model, **adapter}), "started")
    async with contextlib.aclosing(jobs.events(submitted)) as events:
        async for _, event in events:
            if event.result is not None:
                yield encode_event(encode_json(event.result.model_dump(mode="json")), "end")
                return
            logprobs = None if event.logprobs is None else [score.model_dump() for score in event.logprobs]
            token = {"index": event.index, "text": event.text, "token_ids": event.token_ids, "logprobs": logprobs}
            ended = {"finish_reason": event.finish_reason, "stop_reason": event.stop_reason}
            if event.complete is not None:
                ended["complete"] = event.complete
            yield encode_event(encode_json({**token, **ended}), "token")


def _encode_error_event(error: ApiError) -> bytes:
    return encode_event(encode_json(error.as_dict()), "error")


ROUTES = [route("POST", "/execute", execute)]
