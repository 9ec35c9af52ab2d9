"""The body of a request for a completion or for an answer in a chat."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from headrace.client.batch.endpoints import COMPLETIONS, Endpoint
from headrace.client.batch.openai import PROMPT_FORMS, STREAM_OPTIONS, split_prompts, take_names_field
from headrace.client.wire.errors import InvalidRequest
from headrace.client.wire.values import is_missing, show, show_name


@dataclass(frozen=True)
class CompletionRequest:
    """A parsed request body.

    Attributes:
        sources: what the texts are computed from, one for each job: of `/v1/completions` at least one prompt, a text or
            a list of token ids; of `/v1/chat/completions` the list of messages.
        is_list: whether the prompts came as a list, so that an error names the index of the wrong one.
        params: parameters for all prompts, as `Client.submit` takes them.
        stream: whether to answer with server-sent events.
        include_usage: whether the stream ends with the token counts.
        as_token_ids: whether log probabilities name tokens by their ids.
        continuous_usage: whether each chunk has the token counts so far.
        endpoint: whose request it is.
    """

    sources: list[Any]
    is_list: bool
    params: dict[str, Any] = field(default_factory=dict)
    stream: bool = False
    include_usage: bool = False
    as_token_ids: bool = False
    continuous_usage: bool = False
    endpoint: Endpoint = COMPLETIONS


def parse_completion_request(body: dict[str, Any], endpoint: Endpoint = COMPLETIONS) -> CompletionRequest:
    """Parse a request body. `Client.submit` checks messages and sampling parameters later.

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
    prompts, is_list = _prompts(fields) if endpoint is COMPLETIONS else ([], False)
    if stream and not is_missing(fields.get("prompt_logprobs")):
        raise InvalidRequest(
            "prompt_logprobs", show(fields["prompt_logprobs"]), "no such field beside stream, as in vLLM"
        )
    include_usage = _parse_include_usage(stream_options, stream=stream)
    # As in vLLM, the counts in each chunk need include_usage too.
    continuous = include_usage and bool(stream_options.get("continuous_usage_stats"))
    params = endpoint.fields(fields)
    source = params.pop(endpoint.source, None)
    sources = prompts or [source]
    return CompletionRequest(
        sources, is_list, params, stream, include_usage, as_token_ids, continuous, endpoint=endpoint
    )


def _prompts(fields: dict[str, Any]) -> tuple[list[Any], bool]:
    """The prompts, at least one, and whether they came as a list. Raises InvalidRequest."""
    if "prompt" not in fields:
        COMPLETIONS.fields(fields)  # messages get the error that says where to send them
        raise InvalidRequest("prompt", "nothing", PROMPT_FORMS)
    prompt = fields["prompt"]
    return split_prompts("" if prompt is None else prompt)  # OpenAI: null begins a new document


def _parse_include_usage(options: Any, *, stream: bool) -> bool:
    if options is None:
        return False
    if not isinstance(options, dict) or (any(options.values()) and not stream):
        raise InvalidRequest("stream_options", show(options), "an object, and only with stream")
    for name, value in options.items():
        if value is not None and (name not in STREAM_OPTIONS or not isinstance(value, bool)):
            raise InvalidRequest(f"stream_options.{show_name(name)[:40]}", show(value), "include_usage, True or False")
    return bool(options.get("include_usage"))
