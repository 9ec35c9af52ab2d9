"""Formats of the OpenAI API: bodies of completions, and the lines of batch output files."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from headrace.client.batch.items import BatchItem
from headrace.client.wire.errors import InvalidRequest
from headrace.client.wire.requests import MAX_PROMPT_TOKENS, GenerateRequest, parse_request, plain_fields
from headrace.client.wire.results import Choice, Outcome, Result, TokenLogprob, TopLogprob, Usage
from headrace.client.wire.values import show, to_whole

#: The only endpoint that lines of a batch may name.
ENDPOINT = "/v1/completions"
_COMPLETES = f"this server completes text: send the whole text as `prompt` to {ENDPOINT}"
#: Endpoints of the OpenAI API that need another kind of model -> what to use instead.
OTHER_ENDPOINTS = {
    "/v1/chat/completions": f"GPT-2 has no chat format; {_COMPLETES}, for example the messages one after another",
    "/v1/responses": f"GPT-2 has no chat format; {_COMPLETES}, for example the messages one after another",
    "/v1/embeddings": f"GPT-2 gives no embeddings; {_COMPLETES}",
}
#: Codes of jobs that failed because of the request -> the field at fault. Every other code is a fault of the server.
REQUEST_ERRORS = {
    "context_length_exceeded": "prompt",
    "empty_prompt": "prompt",
    "invalid_token_id": "prompt",
    "too_many_logprobs": "logprobs",
    "checkpoints_off": "checkpoints",
    "checkpoints_too_large": "checkpoints",
    "result_too_large": "max_tokens",
    "invalid_request": None,
}
#: The `id` of an output line is this prefix and the digest of the request.
ROW_ID = "batch_req_"
#: Characters that end a line for `str.splitlines`, though not for JSON: escaped, so that every reader finds the lines.
_ESCAPED_LINE_ENDS = {code: f"\\u{code:04x}" for code in (0x85, 0x2028, 0x2029)}

#: The field with which vLLM names tokens by their ids.
NAMES_FIELD = "return_tokens_as_token_ids"
#: OpenAI's newer name of `max_tokens`.
_NEWER_NAME = "max_completion_tokens"


def completion_fields(body: Mapping[str, Any]) -> dict[str, Any]:
    """Convert a body of the completions API to what `Client.submit` takes, without fields that ask for nothing.

    Raises:
        InvalidRequest: `max_completion_tokens` is wrong, or is another number than `max_tokens`.
    """
    fields = plain_fields(body)
    if fields.get("stream") is False:
        del fields["stream"]
    if _NEWER_NAME in fields:
        newer = to_whole(fields.pop(_NEWER_NAME))
        _check_newer_name(newer, fields)
        fields["max_tokens"] = newer
    return fields


def _check_newer_name(newer: Any, fields: Mapping[str, Any]) -> None:
    """Check `max_completion_tokens`, so that errors have the name that the caller used."""
    try:
        parse_request({"prompt": "", "echo": fields.get("echo") is True, "max_tokens": newer})
    except InvalidRequest as error:
        raise InvalidRequest(_NEWER_NAME, error.value, error.expected) from None
    if (older := fields.get("max_tokens", newer)) != newer:
        raise InvalidRequest(_NEWER_NAME, show(newer), f"one of the two: max_tokens is {show(older)}")


def take_names_field(fields: dict[str, Any]) -> bool:
    """Remove `return_tokens_as_token_ids`, which concerns the format alone. Returns whether it is set.

    Raises:
        InvalidRequest: it is neither true, false nor null.
    """
    value = fields.pop(NAMES_FIELD, None)
    if value is not None and not isinstance(value, bool):
        raise InvalidRequest(NAMES_FIELD, show(value), "True or False")
    return bool(value)


#: Prompts of one request.
MAX_PROMPTS = 1_024
PROMPT_FORMS = f"a text, a list of token ids, or a list of 1 to {MAX_PROMPTS} of these"
#: Fields of `stream_options`. The second has no effect; with the third, each chunk has its usage, as in vLLM.
STREAM_OPTIONS = ("include_usage", "include_obfuscation", "continuous_usage_stats")


def split_prompts(value: Any) -> tuple[list[Any], bool]:
    """The prompts of a request, and whether they came as a list. `Client.submit` checks each prompt.

    Raises:
        InvalidRequest: the value has none of PROMPT_FORMS.
    """
    if isinstance(value, str):
        return [value], False
    if isinstance(value, list) and len(value) > MAX_PROMPT_TOKENS:  # before its items are looked at
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


class JoinedResult(Result):
    """The results of all prompts of one request. Choices are numbered across prompts."""

    #: None if the prompts differ in it.
    seed: int | None  # type: ignore[assignment]
    fingerprint: str | None = None  # type: ignore[assignment]
    #: For each choice the seed with which its prompt gives the same text again.
    seeds: list[int]


def join_results(results: Sequence[Result]) -> Result:
    """One result for the prompts of a request, in their order, with the id of the first."""
    first = results[0]
    if len(results) == 1:
        return first
    choices = [choice for result in results for choice in result.choices]
    return JoinedResult(
        id=first.id,
        model=first.model,
        choices=[choice.model_copy(update={"index": index}) for index, choice in enumerate(choices)],
        usage=Usage(**{name: sum(getattr(r.usage, name) for r in results) for name in Usage.model_fields}),
        timings=first.timings,
        seed=first.seed if all(result.seed == first.seed for result in results) else None,
        fingerprint=first.fingerprint if all(r.fingerprint == first.fingerprint for r in results) else None,
        seeds=[result.seed for result in results for _ in result.choices],
    )


def completion(result: Result, *, as_token_ids: bool = False) -> dict[str, Any]:
    """A result in the format of the completions API, with the seed, and with `stop_reason` as in vLLM."""
    choices = [_choice(choice, as_token_ids) for choice in result.choices]
    if isinstance(result, JoinedResult):
        choices = [{**choice, "seed": seed} for choice, seed in zip(choices, result.seeds, strict=True)]
    return {
        "id": f"cmpl-{result.id}",
        "object": "text_completion",
        "created": int(time.time()),
        "model": result.model,
        "choices": choices,
        "usage": result.usage.model_dump(),
        "system_fingerprint": result.fingerprint,
        "seed": result.seed,
    }


def _choice(choice: Choice, as_token_ids: bool) -> dict[str, Any]:
    scores = None if choice.logprobs is None else logprobs_fields(choice.logprobs, as_token_ids=as_token_ids)
    fields = choice.model_dump(include={"index", "text", "finish_reason", "stop_reason"})
    return {**fields, "logprobs": scores}


def logprobs_fields(scores: list[TokenLogprob], *, as_token_ids: bool = False, at: int = 0) -> dict[str, Any]:
    """Log probabilities in the format of the completions API.

    Args:
        scores: of consecutive tokens.
        as_token_ids: name tokens `token_id:13`, as vLLM does with `return_tokens_as_token_ids`.
        at: the offset of the first token, if an older worker made the scores: it sent no offsets.
    """
    offsets = []
    for score in scores:
        offsets.append(at if score.text_offset is None else score.text_offset)
        at += len(score.token)
    return {
        "tokens": [_id_name(score) if as_token_ids else score.token for score in scores],
        "token_logprobs": [score.logprob for score in scores],
        "top_logprobs": [_top_logprobs(score, as_token_ids) for score in scores],
        "text_offset": offsets,
    }


def _top_logprobs(score: TokenLogprob, as_token_ids: bool) -> dict[str, float] | None:
    """The token itself and the likeliest tokens at its place, by name. Each token has an entry of its own."""
    if score.logprob is None:
        return None
    found = {_id_name(score) if as_token_ids else score.token: score.logprob}
    for top in score.top:
        if top.token_id != score.token_id:
            name = top.token
            # Two tokens of a vocabulary can have the same text, and older workers named all bytes U+FFFD.
            found[_id_name(top) if as_token_ids or name in found else name] = top.logprob
    return found


def _id_name(token: TokenLogprob | TopLogprob) -> str:
    return f"token_id:{token.token_id}"


class Written(NamedTuple):
    """A request whose line is in an output file."""

    custom_id: str
    #: The digest of the request; empty if another program wrote the line.
    digest: str
    failed: bool


def output_line(row: BatchItem, job_id: str, outcome: Outcome | Exception) -> bytes:
    """The output line of a request, as OpenAI writes it.

    A request that was computed has status code 200, and one that could never be computed has 400 and an error object as
    its body. If anything else happened to the job, the line has an `error` and no response.
    """
    line: dict[str, Any] = {"id": ROW_ID + row.digest, "custom_id": row.custom_id, "response": None, "error": None}
    if isinstance(outcome, Result):
        body = completion(outcome, as_token_ids=row.as_token_ids)
        line["response"] = {"status_code": 200, "request_id": job_id, "body": body}
    elif (mistake := request_error(outcome)) is not None:
        line["response"] = {"status_code": 400, "request_id": job_id, "body": mistake}
    else:
        message = getattr(outcome, "message", None) or str(outcome)
        line["error"] = {"code": failure_code(outcome), "message": message}
    text = json.dumps(line, ensure_ascii=False).translate(_ESCAPED_LINE_ENDS)
    return text.encode("utf-8", "replace") + b"\n"


def read_output_line(line: bytes) -> Written | None:
    """Parse an output line. Returns None if it is incomplete or is not an output line."""
    if not line.endswith(b"\n"):
        return None  # at least its last byte is missing
    try:
        fields = json.loads(line)
        custom_id, row_id = fields["custom_id"], fields["id"]
        failed = fields["error"] is not None or fields["response"]["status_code"] != 200
    except (ValueError, LookupError, TypeError, RecursionError):
        return None
    if not isinstance(custom_id, str) or not isinstance(row_id, str):
        return None
    digest = row_id.removeprefix(ROW_ID)
    ours = row_id.startswith(ROW_ID) and len(digest) == 16 and set(digest) <= set("0123456789abcdef")
    return Written(custom_id, digest if ours else "", failed)


def request_error(error: Exception) -> dict[str, Any] | None:
    """OpenAI's error object, for a job that failed because of its request; None for any other failure."""
    code = failure_code(error)
    if code not in REQUEST_ERRORS:
        return None
    message = getattr(error, "message", None) or str(error)
    param = getattr(error, "field", None)
    if param is None:
        first_word = message.partition(" ")[0]  # an invalid token id may be in one of several fields
        param = first_word if first_word in GenerateRequest.model_fields else REQUEST_ERRORS[code]
    return error_object(message, "invalid_request_error", param, code)


def error_object(message: str, kind: str, param: str | None, code: str) -> dict[str, Any]:
    """The error object of the OpenAI API."""
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


def failure_code(error: Exception) -> str:
    """The error code under which a failure is counted."""
    return getattr(error, "code", None) or "invalid_request"
