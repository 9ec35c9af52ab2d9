"""`POST /v1/completions`: what is asked as fields of ours, and results and events as OpenAI writes them.

What the two forms have in common with batches lies in `client.batch.rows` and `client.batch.output`.
"""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from headrace.client.batch.openai import completion, completion_fields, logprobs_fields
from headrace.client.http.jobs import Prompt
from headrace.client.http.sse import sse
from headrace.client.jobs.stream import Event
from headrace.client.wire.errors import InvalidRequest
from headrace.client.wire.results import Result

#: Prompts of one request; more are a batch.
MAX_PROMPTS = 1_024
PROMPTS = f"a text, a list of token ids, or a list of 1 to {MAX_PROMPTS} of these"
_STREAM_OPTIONS = ("include_usage", "include_obfuscation")


@dataclass(frozen=True)
class Order:
    """What a request asks for.

    Attributes:
        params: parameters for all prompts, as `Client.submit` takes them.
        listed: the prompts came as a list, so that an error says which.
    """

    prompts: list[Prompt]
    listed: bool
    params: dict[str, Any] = field(default_factory=dict)
    stream: bool = False
    include_usage: bool = False


def read_order(body: dict[str, Any]) -> Order:
    """The body of a request. Raises InvalidRequest; sampling parameters are left to `Client.submit`'s own check."""
    fields = dict(body)
    options = fields.pop("stream_options", None)
    stream = fields.pop("stream", None) or False
    if not isinstance(stream, bool):
        raise InvalidRequest("stream", repr(stream)[:80], "True or False")
    if "prompt" not in fields:
        raise InvalidRequest("prompt", "nothing", PROMPTS)
    prompt = fields.pop("prompt")
    prompts, listed = _prompts("" if prompt is None else prompt)  # OpenAI's: as if a document began
    params = {name: value for name, value in completion_fields(fields).items() if value is not None}
    return Order(prompts, listed, params, stream, _include_usage(options, stream=stream))


def _prompts(value: Any) -> tuple[list[Prompt], bool]:
    if isinstance(value, str):
        return [value], False
    if isinstance(value, list) and value:
        if all(isinstance(item, str) for item in value) or all(isinstance(item, list) for item in value):
            if len(value) > MAX_PROMPTS:
                raise InvalidRequest("prompt", f"a list of {len(value)} prompts", f"at most {MAX_PROMPTS}; see batches")
            return value, True
        if not any(isinstance(item, (str, list)) for item in value):
            return [value], False
        raise InvalidRequest("prompt", "a list of several kinds", PROMPTS)
    raise InvalidRequest("prompt", "an empty list" if value == [] else f"a {type(value).__name__}", PROMPTS)


def _include_usage(options: Any, *, stream: bool) -> bool:
    if options is None:
        return False
    if not isinstance(options, dict) or not stream:
        raise InvalidRequest("stream_options", repr(options)[:80], "an object, and only with stream")
    for name, value in options.items():
        if name not in _STREAM_OPTIONS or not isinstance(value, bool):
            raise InvalidRequest(f"stream_options.{str(name)[:40]}", repr(value)[:80], "include_usage, True or False")
    return bool(options.get("include_usage"))


def completions(results: Sequence[Result]) -> dict[str, Any]:
    """The answer to prompts, one result each; choices are numbered prompt by prompt, as OpenAI does."""
    parts = [completion(result) for result in results]
    whole = parts[0]
    whole["choices"] = [choice for part in parts for choice in part["choices"]]
    for number, choice in enumerate(whole["choices"]):
        choice["index"] = number
    whole["usage"] = total_usage(results)
    for name in ("system_fingerprint", "seed"):
        if any(part[name] != whole[name] for part in parts):
            whole[name] = None  # the prompts differ in it
    return whole


def total_usage(results: Sequence[Result]) -> dict[str, int]:
    """Tokens of all prompts."""
    usages = [result.usage.model_dump() for result in results]
    return {name: sum(usage[name] for usage in usages) for name in usages[0]}


class Chunks:
    """The chunks of one stream.

    Args:
        request_id: of the first job.
        samples: choices of each prompt.
    """

    def __init__(self, request_id: str, model: str, samples: int, *, include_usage: bool) -> None:
        created = int(time.time())
        self._head = {"id": f"cmpl-{request_id}", "object": "text_completion", "created": created, "model": model}
        self._samples, self._include_usage = samples, include_usage
        self._offsets: dict[int, int] = {}

    def piece(self, prompt: int, event: Event) -> bytes:
        """What one choice gained."""
        index = prompt * self._samples + event.index
        scores = None
        if event.logprobs is not None:
            at = self._offsets.get(index, 0)
            self._offsets[index] = at + sum(len(score.token) for score in event.logprobs)
            scores = logprobs_fields(event.logprobs, at)
        choice = {"index": index, "text": event.text, "logprobs": scores, "finish_reason": event.finish_reason}
        usage = {"usage": None} if self._include_usage else {}
        return sse(json.dumps({**self._head, "choices": [choice], **usage}))

    def end(self, results: Sequence[Result]) -> bytes:
        """What comes last."""
        done = sse("[DONE]")
        if not self._include_usage:
            return done
        fingerprints = {result.fingerprint for result in results}
        fingerprint = fingerprints.pop() if len(fingerprints) == 1 else None
        last = {**self._head, "choices": [], "system_fingerprint": fingerprint, "usage": total_usage(results)}
        return sse(json.dumps(last)) + done
