"""`POST /v1/completions` in the OpenAI format, and `POST /execute` with events for each token.

`client.batch.openai` has the conversions that these routes share with batches.
"""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import AsyncGenerator, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from starlette.requests import Request
from starlette.responses import Response

from headrace.client.batch.openai import completion, completion_fields, logprobs_fields
from headrace.client.http.context import context_of, read_json, route
from headrace.client.http.errors import ApiError
from headrace.client.http.jobs import JobRunner, Prompt, SubmittedJobs
from headrace.client.http.sse import EventStream, encode_event, run_until_disconnect
from headrace.client.jobs.stream import Event
from headrace.client.wire.errors import InvalidRequest
from headrace.client.wire.requests import MAX_PROMPT_TOKENS
from headrace.client.wire.results import Result

#: Prompts of one request; for more, use a batch.
MAX_PROMPTS = 1_024
PROMPT_FORMS = f"a text, a list of token ids, or a list of 1 to {MAX_PROMPTS} of these"
_STREAM_OPTIONS = ("include_usage", "include_obfuscation")

# --- /v1/completions: the request ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class CompletionRequest:
    """A parsed request body.

    Attributes:
        prompts: at least one; each a text or a list of token ids.
        is_list: whether the prompts came as a list, so that an error names the index of the wrong one.
        params: parameters for all prompts, as `Client.submit` takes them.
        stream: whether to answer with server-sent events.
        include_usage: whether the stream ends with the token counts.
    """

    prompts: list[Prompt]
    is_list: bool
    params: dict[str, Any] = field(default_factory=dict)
    stream: bool = False
    include_usage: bool = False


def parse_completion_request(body: dict[str, Any]) -> CompletionRequest:
    """Parse a request body. `Client.submit` checks the sampling parameters later.

    Raises:
        InvalidRequest: a field has the wrong form; the error names it.
    """
    fields = dict(body)
    stream_options = fields.pop("stream_options", None)
    stream = fields.pop("stream", None) or False
    if not isinstance(stream, bool):
        raise InvalidRequest("stream", repr(stream)[:80], "True or False")
    if "prompt" not in fields:
        raise InvalidRequest("prompt", "nothing", PROMPT_FORMS)
    prompt = fields.pop("prompt")
    prompts, is_list = _parse_prompts("" if prompt is None else prompt)  # OpenAI: null begins a new document
    params = {name: value for name, value in completion_fields(fields).items() if value is not None}
    return CompletionRequest(prompts, is_list, params, stream, _parse_include_usage(stream_options, stream=stream))


def _parse_prompts(value: Any) -> tuple[list[Prompt], bool]:
    """The prompts, and whether they came as a list."""
    if isinstance(value, str):
        return [value], False
    if isinstance(value, list) and len(value) > MAX_PROMPT_TOKENS:
        raise InvalidRequest("prompt", f"a list of {len(value)} items", PROMPT_FORMS)
    if isinstance(value, list) and value:
        if all(isinstance(item, str) for item in value) or all(isinstance(item, list) for item in value):
            if len(value) > MAX_PROMPTS:
                raise InvalidRequest("prompt", f"a list of {len(value)} prompts", f"at most {MAX_PROMPTS}; see batches")
            return value, True
        if not any(isinstance(item, (str, list)) for item in value):
            return [value], False
        raise InvalidRequest("prompt", "a list of mixed types", PROMPT_FORMS)
    raise InvalidRequest("prompt", "an empty list" if value == [] else f"a {type(value).__name__}", PROMPT_FORMS)


def _parse_include_usage(options: Any, *, stream: bool) -> bool:
    if options is None:
        return False
    if not isinstance(options, dict) or not stream:
        raise InvalidRequest("stream_options", repr(options)[:80], "an object, and only with stream")
    for name, value in options.items():
        if name not in _STREAM_OPTIONS or not isinstance(value, bool):
            raise InvalidRequest(f"stream_options.{str(name)[:40]}", repr(value)[:80], "include_usage, True or False")
    return bool(options.get("include_usage"))


# --- /v1/completions: the response -----------------------------------------------------------------------------------


async def create_completion(request: Request) -> Any:
    """`POST /v1/completions`."""
    jobs, parsed = context_of(request).jobs, parse_completion_request(await read_json(request))
    params = {**parsed.params, **({"stream": True} if parsed.stream else {})}
    submitted = await jobs.submit(parsed.prompts, params, is_list=parsed.is_list)
    request_id = submitted.jobs[0].id
    headers = {"x-request-id": request_id}
    if not parsed.stream:
        parts = await run_until_disconnect(request, jobs.results(submitted, encode_part))
        return Response(encode_completion(parts), media_type="application/json", headers=headers)
    samples = parsed.params.get("n", 1)
    encoder = ChunkEncoder(request_id, submitted.model, samples, include_usage=parsed.include_usage)
    return EventStream(_stream_chunks(jobs, submitted, encoder), _encode_chunk_error, headers=headers)


class CompletionPart(NamedTuple):
    """The part of a completion object that one result gives: its choices as JSON, and the other fields."""

    choices: bytes
    fields: dict[str, Any]


def encode_part(prompt_index: int, result: Result) -> CompletionPart:
    """Encode a result. Choices are numbered across prompts."""
    fields = completion(result)
    choices = fields.pop("choices")
    for index, choice in enumerate(choices):
        choice["index"] = prompt_index * len(choices) + index
    return CompletionPart(b",".join(json.dumps(choice, allow_nan=False).encode() for choice in choices), fields)


def encode_completion(parts: Sequence[CompletionPart]) -> bytes:
    """OpenAI's completion object as JSON, of one part for each prompt."""
    whole = parts[0].fields
    whole["usage"] = {name: sum(part.fields["usage"][name] for part in parts) for name in whole["usage"]}
    for name in ("system_fingerprint", "seed"):
        if any(part.fields[name] != whole[name] for part in parts):
            whole[name] = None  # the prompts differ in it
    return b'{"choices": [' + b",".join(part.choices for part in parts) + b"], " + json.dumps(whole).encode()[1:]


def total_usage(results: Sequence[Result]) -> dict[str, int]:
    """Token counts summed over all prompts."""
    usages = [result.usage.model_dump() for result in results]
    return {name: sum(usage[name] for usage in usages) for name in usages[0]}


class ChunkEncoder:
    """Encodes the chunks of one stream.

    Args:
        request_id: id of the first job.
        samples: number of choices for each prompt (`n`).
        include_usage: whether the stream ends with the token counts.
    """

    def __init__(self, request_id: str, model: str, samples: int, *, include_usage: bool) -> None:
        created = int(time.time())
        self._common = {"id": f"cmpl-{request_id}", "object": "text_completion", "created": created, "model": model}
        self._samples, self._include_usage = samples, include_usage
        self._text_offsets: dict[int, int] = {}

    def encode(self, prompt_index: int, event: Event) -> bytes:
        """The chunk with the new text of one choice."""
        index = prompt_index * self._samples + event.index
        logprobs = None
        if event.logprobs is not None:
            offset = self._text_offsets.get(index, 0)
            self._text_offsets[index] = offset + sum(len(score.token) for score in event.logprobs)
            logprobs = logprobs_fields(event.logprobs, offset)
        choice = {"index": index, "text": event.text, "logprobs": logprobs, "finish_reason": event.finish_reason}
        usage = {"usage": None} if self._include_usage else {}
        return encode_event(json.dumps({**self._common, "choices": [choice], **usage}))

    def encode_end(self, results: Sequence[Result]) -> bytes:
        """The end of a complete stream: `[DONE]`, after the token counts if they were requested."""
        done = encode_event("[DONE]")
        if not self._include_usage:
            return done
        fingerprints = {result.fingerprint for result in results}
        fingerprint = fingerprints.pop() if len(fingerprints) == 1 else None
        last = {**self._common, "choices": [], "system_fingerprint": fingerprint, "usage": total_usage(results)}
        return encode_event(json.dumps(last)) + done


async def _stream_chunks(jobs: JobRunner, submitted: SubmittedJobs, encoder: ChunkEncoder) -> AsyncGenerator[bytes]:
    async with contextlib.aclosing(jobs.events(submitted)) as events:
        async for prompt_index, event in events:
            if event.result is None:
                yield encoder.encode(prompt_index, event)
    yield encoder.encode_end([await job.result() for job in submitted.jobs])


def _encode_chunk_error(error: ApiError) -> bytes:
    """The error as the last event, without `[DONE]`: the stream is incomplete."""
    return encode_event(json.dumps(error.as_dict()))


# --- /execute --------------------------------------------------------------------------------------------------------


async def execute(request: Request) -> Any:
    """`POST /execute`: one prompt with the fields of `Client.submit`; events `started`, `token`, `end`, `error`."""
    jobs, fields = context_of(request).jobs, await read_json(request)
    if fields.pop("stream", True) is not True:
        raise InvalidRequest("stream", "another value", "True: /execute always streams")
    if "prompt" not in fields:
        raise InvalidRequest("prompt", "nothing", "a text, or a list of token ids")
    submitted = await jobs.submit([fields.pop("prompt")], {**fields, "stream": True})
    return EventStream(_stream_events(jobs, submitted), _encode_error_event, start_immediately=True)


async def _stream_events(jobs: JobRunner, submitted: SubmittedJobs) -> AsyncGenerator[bytes]:
    yield encode_event(json.dumps({"id": submitted.jobs[0].id, "model": submitted.model}), "started")
    async with contextlib.aclosing(jobs.events(submitted)) as events:
        async for _, event in events:
            if event.result is not None:
                yield encode_event(event.result.model_dump_json(), "end")
                return
            logprobs = None if event.logprobs is None else [score.model_dump() for score in event.logprobs]
            token = {"index": event.index, "text": event.text, "token_ids": event.token_ids, "logprobs": logprobs}
            yield encode_event(json.dumps({**token, "finish_reason": event.finish_reason}), "token")


def _encode_error_event(error: ApiError) -> bytes:
    return encode_event(json.dumps(error.as_dict()), "error")


ROUTES = [
    route("POST", "/v1/completions", create_completion),
    route("POST", "/execute", execute),
]
