"""`POST /v1/completions` in the OpenAI format, and `POST /execute` with events for each token.

`client.batch.openai` has the conversions that these routes share with batches.
"""

from __future__ import annotations

import contextlib
import functools
import time
from collections import Counter
from collections.abc import AsyncGenerator, Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

from starlette.requests import Request
from starlette.responses import Response

from headrace.client.batch.openai import (
    ENDPOINT,
    OTHER_ENDPOINTS,
    PROMPT_FORMS,
    STREAM_OPTIONS,
    completion,
    completion_fields,
    logprobs_fields,
    split_prompts,
    take_names_field,
)
from headrace.client.http.context import context_of, json_body, route
from headrace.client.http.errors import ApiError
from headrace.client.http.jobs import JobRunner, Prompt, SubmittedJobs
from headrace.client.http.responses import encode_json
from headrace.client.http.sse import EventStream, encode_event, run_until_disconnect
from headrace.client.jobs.stream import Event
from headrace.client.wire.errors import InvalidRequest
from headrace.client.wire.requests import plain_fields
from headrace.client.wire.results import Result
from headrace.client.wire.values import show, show_name

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
        as_token_ids: whether log probabilities name tokens by their ids.
        continuous_usage: whether each chunk has the token counts so far.
    """

    prompts: list[Prompt]
    is_list: bool
    params: dict[str, Any] = field(default_factory=dict)
    stream: bool = False
    include_usage: bool = False
    as_token_ids: bool = False
    continuous_usage: bool = False


def parse_completion_request(body: dict[str, Any]) -> CompletionRequest:
    """Parse a request body. `Client.submit` checks the sampling parameters later.

    Raises:
        InvalidRequest: a field has the wrong form; the error names it.
    """
    fields = dict(body)
    stream_options = fields.pop("stream_options", None)
    as_token_ids = take_names_field(fields)
    stream = fields.pop("stream", None)
    stream = False if stream is None else stream
    if not isinstance(stream, bool):
        raise InvalidRequest("stream", show(stream), "True or False")
    if "prompt" not in fields:
        raise InvalidRequest("prompt", "nothing", PROMPT_FORMS)
    prompt = fields.pop("prompt")
    prompts, is_list = split_prompts("" if prompt is None else prompt)  # OpenAI: null begins a new document
    include_usage = _parse_include_usage(stream_options, stream=stream)
    # As in vLLM, the counts in each chunk need include_usage too.
    continuous = include_usage and bool(stream_options.get("continuous_usage_stats"))
    params = completion_fields(fields)
    return CompletionRequest(prompts, is_list, params, stream, include_usage, as_token_ids, continuous)


def _parse_include_usage(options: Any, *, stream: bool) -> bool:
    if options is None:
        return False
    if not isinstance(options, dict) or (any(options.values()) and not stream):
        raise InvalidRequest("stream_options", show(options), "an object, and only with stream")
    for name, value in options.items():
        if value is not None and (name not in STREAM_OPTIONS or not isinstance(value, bool)):
            raise InvalidRequest(f"stream_options.{show_name(name)[:40]}", show(value), "include_usage, True or False")
    return bool(options.get("include_usage"))


# --- /v1/completions: the response -----------------------------------------------------------------------------------


async def create_completion(request: Request) -> Any:
    """`POST /v1/completions`."""
    jobs = context_of(request).jobs
    async with json_body(request) as body:
        parsed = parse_completion_request(body)
        params = {**parsed.params, **({"stream": True} if parsed.stream else {})}
        submitted = await jobs.submit(parsed.prompts, params, is_list=parsed.is_list)
    del body
    parsed = replace(parsed, prompts=[])  # not kept until the results come
    request_id = submitted.jobs[0].id
    headers = {"x-request-id": request_id}
    if not parsed.stream:
        convert = functools.partial(encode_part, as_token_ids=parsed.as_token_ids)
        parts = await run_until_disconnect(request, jobs.results(submitted, convert))
        return Response(encode_completion(parts), media_type="application/json", headers=headers)
    samples = parsed.params.get("n", 1)
    encoder = ChunkEncoder(
        request_id,
        submitted.model,
        samples,
        include_usage=parsed.include_usage,
        continuous_usage=parsed.continuous_usage,
        echo=parsed.params.get("echo") is True,
        as_token_ids=parsed.as_token_ids,
    )
    return EventStream(_stream_chunks(jobs, submitted, encoder, samples), _encode_chunk_error, headers=headers)


class CompletionPart(NamedTuple):
    """The part of a completion object that one result gives: its choices as JSON, and the other fields."""

    choices: list[bytes]
    fields: dict[str, Any]


def encode_part(prompt_index: int, result: Result, *, as_token_ids: bool = False) -> CompletionPart:
    """Encode a result. Choices are numbered across prompts."""
    fields = completion(result, as_token_ids=as_token_ids)
    choices = fields.pop("choices")
    for index, choice in enumerate(choices):
        choice["index"] = prompt_index * len(choices) + index
    return CompletionPart([encode_json(choice).encode() for choice in choices], fields)


def encode_completion(parts: Sequence[CompletionPart]) -> bytes:
    """OpenAI's completion object as JSON, of one part for each prompt.

    Of several prompts, each choice names the seed with which its prompt gives the same text again; see `join_results`.
    """
    whole = dict(parts[0].fields)
    whole["usage"] = {name: sum(part.fields["usage"][name] for part in parts) for name in whole["usage"]}
    for name in ("system_fingerprint", "seed"):
        whole[name] = _shared(part.fields[name] for part in parts)
    choices = [choice for part in parts for choice in part.choices]
    if len(parts) > 1:
        seeds = (part.fields["seed"] for part in parts for _ in part.choices)
        choices = [b'%s,"seed":%d}' % (choice[:-1], seed) for choice, seed in zip(choices, seeds, strict=True)]
    return b'{"choices":[' + b",".join(choices) + b"]," + encode_json(whole).encode()[1:]


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
        continuous_usage: whether each chunk has the token counts of its prompt and choice so far, as in vLLM.
        echo: whether choices begin with their prompts.
        as_token_ids: whether log probabilities name tokens by their ids.
    """

    def __init__(
        self,
        request_id: str,
        model: str,
        samples: int,
        *,
        include_usage: bool,
        continuous_usage: bool = False,
        echo: bool = False,
        as_token_ids: bool = False,
    ) -> None:
        created = int(time.time())
        self._common = {"id": f"cmpl-{request_id}", "object": "text_completion", "created": created, "model": model}
        self._samples, self._include_usage, self._as_token_ids = samples, include_usage, as_token_ids
        self._continuous_usage, self._echo = continuous_usage, echo
        self._text_offsets: dict[int, int] = {}  # for the scores of older workers, which have none
        self._tokens: Counter[int] = Counter()

    def encode(self, prompt_index: int, event: Event, result: Result | None = None) -> bytes:
        """The chunk with the new text of one choice.

        Args:
            result: of the prompt, if this is its last chunk: the chunk then names seed and fingerprint.
        """
        index = prompt_index * self._samples + event.index
        logprobs = None
        if event.logprobs is not None:
            offset = self._text_offsets.get(index, 0)
            self._text_offsets[index] = offset + sum(len(score.token) for score in event.logprobs)
            logprobs = logprobs_fields(event.logprobs, as_token_ids=self._as_token_ids, at=offset)
        choice = {"index": index, "text": event.text, "logprobs": logprobs, "finish_reason": event.finish_reason}
        if event.finish_reason is not None:
            choice["stop_reason"] = event.stop_reason
        more: dict[str, Any] = {"usage": self._usage_so_far(index, event)} if self._include_usage else {}
        if result is not None:
            more |= {"system_fingerprint": result.fingerprint, "seed": result.seed}
        return encode_event(encode_json({**self._common, "choices": [choice], **more}))

    def _usage_so_far(self, index: int, event: Event) -> dict[str, int] | None:
        """The token counts of one prompt and choice; None if they were not requested, or an old worker gives none."""
        self._tokens[index] += len(event.token_ids)
        if not self._continuous_usage or (prompt := event.prompt_tokens) is None:
            return None
        new = self._tokens[index] - (prompt if self._echo else 0)
        return {"prompt_tokens": prompt, "completion_tokens": new, "total_tokens": prompt + new}

    def encode_end(self, results: Sequence[Result]) -> bytes:
        """The end of a complete stream: `[DONE]`, after the token counts if they were requested."""
        done = encode_event("[DONE]")
        if not self._include_usage:
            return done
        same = {"system_fingerprint": _shared(r.fingerprint for r in results), "seed": _shared(r.seed for r in results)}
        return encode_event(encode_json({**self._common, "choices": [], **same, "usage": total_usage(results)})) + done


def _shared(values: Iterable[Any]) -> Any:
    """The value, if all are the same; else None."""
    found = set(values)
    return found.pop() if len(found) == 1 else None


async def _stream_chunks(
    jobs: JobRunner, submitted: SubmittedJobs, encoder: ChunkEncoder, samples: int
) -> AsyncGenerator[bytes]:
    unfinished = dict.fromkeys(range(len(submitted.jobs)), samples)
    last: dict[int, Event] = {}  # of each prompt: waits for the result, which has the seed and the fingerprint
    async with contextlib.aclosing(jobs.events(submitted)) as events:
        async for prompt_index, event in events:
            unfinished[prompt_index] -= event.finish_reason is not None
            if event.result is not None:
                if prompt_index in last:
                    yield encoder.encode(prompt_index, last.pop(prompt_index), event.result)
            elif event.finish_reason is not None and not unfinished[prompt_index]:
                last[prompt_index] = event
            else:
                yield encoder.encode(prompt_index, event)
    yield encoder.encode_end([await job.result() for job in submitted.jobs])


def _encode_chunk_error(error: ApiError) -> bytes:
    """The error as the last event, without `[DONE]`: the stream is incomplete."""
    return encode_event(encode_json(error.as_dict()))


# --- /execute --------------------------------------------------------------------------------------------------------


async def execute(request: Request) -> Any:
    """`POST /execute`: one prompt with the fields of `Client.submit`; events `started`, `token`, `end`, `error`."""
    jobs = context_of(request).jobs
    async with json_body(request) as body:
        fields = plain_fields(body)
        if fields.pop("stream", True) is not True:
            raise InvalidRequest("stream", "another value", "True: /execute always streams")
        if "prompt" not in fields:
            raise InvalidRequest("prompt", "nothing", "a text, or a list of token ids")
        submitted = await jobs.submit([fields.pop("prompt")], {**fields, "stream": True})
    return EventStream(_stream_events(jobs, submitted), _encode_error_event, start_immediately=True)


async def _stream_events(jobs: JobRunner, submitted: SubmittedJobs) -> AsyncGenerator[bytes]:
    yield encode_event(encode_json({"id": submitted.jobs[0].id, "model": submitted.model}), "started")
    async with contextlib.aclosing(jobs.events(submitted)) as events:
        async for _, event in events:
            if event.result is not None:
                yield encode_event(encode_json(event.result.model_dump(mode="json")), "end")
                return
            logprobs = None if event.logprobs is None else [score.model_dump() for score in event.logprobs]
            token = {"index": event.index, "text": event.text, "token_ids": event.token_ids, "logprobs": logprobs}
            ended = {"finish_reason": event.finish_reason, "stop_reason": event.stop_reason}
            yield encode_event(encode_json({**token, **ended}), "token")


def _encode_error_event(error: ApiError) -> bytes:
    return encode_event(encode_json(error.as_dict()), "error")


# --- endpoints of other models ---------------------------------------------------------------------------------------


async def refuse_endpoint(request: Request) -> Any:
    """An endpoint of the OpenAI API that needs another kind of model: the error says what this server offers."""
    path = request.scope["path"]
    raise ApiError(404, "unsupported_endpoint", f"{path}: {OTHER_ENDPOINTS[path]}", param="url")


ROUTES = [
    route("POST", ENDPOINT, create_completion),
    route("POST", "/execute", execute),
    *(route("POST", path, refuse_endpoint) for path in OTHER_ENDPOINTS),
]
