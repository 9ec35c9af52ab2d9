"""Formats of the OpenAI API: bodies of completions, and errors. `openai_chat` has those of chats."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import Any

from headrace.client.batch.response_format import take_response_format
from headrace.client.wire.errors import InvalidRequest
from headrace.client.wire.requests import MAX_PROMPT_TOKENS, GenerateRequest, parse_request, plain_fields
from headrace.client.wire.results import Choice, Result, TokenLogprob, TopLogprob, Usage
from headrace.client.wire.values import is_missing, show, to_whole

#: The endpoint for text, and the one of lines of a batch that name none.
ENDPOINT = "/v1/completions"
CHAT_ENDPOINT = "/v1/chat/completions"
_INSTEAD = f"send messages to {CHAT_ENDPOINT}, or a text as `prompt` to {ENDPOINT}"
#: Endpoints of the OpenAI API that this server does not have -> what to use instead.
OTHER_ENDPOINTS = {
    "/v1/responses": f"this server does not have it; {_INSTEAD}",
    "/v1/embeddings": f"the models of this server give no embeddings; {_INSTEAD}",
}
#: Codes of jobs that failed because of the request -> the field at fault. Every other code is a fault of the server.
REQUEST_ERRORS = {
    "context_length_exceeded": "prompt",
    "empty_prompt": "prompt",
    "no_tokenizer": "prompt",
    "no_chat_template": "messages",
    "invalid_chat_template": "messages",
    "chat_template_failed": "messages",
    "invalid_token_id": "prompt",
    "too_many_logprobs": "logprobs",
    "grammar_too_complex": "structured_outputs",
    "no_token_allowed": "structured_outputs",
    "adapter_not_found": "adapter",
    "checkpoints_off": "checkpoints",
    "checkpoints_too_large": "checkpoints",
    "result_too_large": "max_tokens",
    "invalid_request": None,
}
#: Codes whose messages name files of the worker -> what a caller is told instead; the worker's log has the file.
_PUBLIC_MESSAGES = {
    "no_tokenizer": "no tokenizer of the model can be read, so prompts must be token ids; its worker's log says why",
}

#: The field with which vLLM names tokens by their ids.
NAMES_FIELD = "return_tokens_as_token_ids"
#: OpenAI's newer name of `max_tokens`.
_NEWER_NAME = "max_completion_tokens"


def completion_fields(body: Mapping[str, Any]) -> dict[str, Any]:
    """Convert a body of the completions API to what `Client.submit` takes, without fields that ask for nothing.

    Raises:
        InvalidRequest: the body has messages, or `max_completion_tokens` is wrong.
    """
    fields = shared_fields(body)
    if "messages" in fields:
        expected = f"no such field in {ENDPOINT}, which takes a prompt; send messages to {CHAT_ENDPOINT}"
        raise InvalidRequest("messages", show(fields["messages"], "messages"), expected)
    return fields


def shared_fields(body: Mapping[str, Any]) -> dict[str, Any]:
    """What the bodies of both APIs have in common; see `completion_fields`.

    Raises:
        InvalidRequest: `max_completion_tokens` is wrong, or is another number than `max_tokens`; `response_format` is
            wrong.
    """
    fields = plain_fields(body)
    take_response_format(fields)
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
        scored = any(not is_missing(fields.get(name)) for name in ("prompt_logprobs", "continuation"))
        parse_request({"prompt": "", "echo": scored or fields.get("echo") is True, "max_tokens": newer})
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
    #: For each choice the log probabilities of its prompt.
    prompts: list[list[TokenLogprob] | None]


def join_results(results: Sequence[Result]) -> Result:
    """One result for the prompts of a request, in their order, with the id of the first."""
    first = results[0]
    if len(results) == 1:
        return first
    choices = [choice for result in results for choice in result.choices]
    return JoinedResult(
        id=first.id,
        model=first.model,
        adapter=first.adapter,
        choices=[choice.model_copy(update={"index": index}) for index, choice in enumerate(choices)],
        usage=Usage.total(result.usage for result in results),
        timings=first.timings,
        seed=first.seed if all(result.seed == first.seed for result in results) else None,
        fingerprint=first.fingerprint if all(r.fingerprint == first.fingerprint for r in results) else None,
        seeds=[result.seed for result in results for _ in result.choices],
        prompts=[result.prompt_logprobs for result in results for _ in result.choices],
    )


def completion(result: Result, *, as_token_ids: bool = False) -> dict[str, Any]:
    """A result in the format of the completions API, with the seed, and with `stop_reason` as in vLLM."""
    choices = [_choice(choice, as_token_ids) for choice in result.choices]
    if isinstance(result, JoinedResult):
        choices = [{**choice, "seed": seed} for choice, seed in zip(choices, result.seeds, strict=True)]
    prompts = result.prompts if isinstance(result, JoinedResult) else [result.prompt_logprobs] * len(choices)
    for choice, scores in zip(choices, prompts, strict=True):
        if scores is not None:
            choice["prompt_logprobs"] = prompt_logprobs_field(scores)
    return {
        "id": f"cmpl-{result.id}",
        "object": "text_completion",
        "created": int(time.time()),
        "model": result.openai_model,
        "choices": choices,
        "usage": result.usage.as_openai(),
        "system_fingerprint": result.fingerprint,
        "seed": result.seed,
    }


def _choice(choice: Choice, as_token_ids: bool) -> dict[str, Any]:
    scores = None if choice.logprobs is None else logprobs_fields(choice.logprobs, as_token_ids=as_token_ids)
    fields = choice.model_dump(include={"index", "text", "finish_reason", "stop_reason", "complete"})
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
        "tokens": [id_name(score) if as_token_ids else score.token for score in scores],
        "token_logprobs": [score.logprob for score in scores],
        "top_logprobs": [_top_logprobs(score, as_token_ids) for score in scores],
        "text_offset": offsets,
    }


def prompt_logprobs_field(scores: list[TokenLogprob]) -> list[dict[str, Any] | None]:
    """Log probabilities of a prompt in vLLM's form: for each token the tokens at its place, by their ids."""
    return [None if score.logprob is None else _by_id(score) for score in scores]


def _by_id(score: TokenLogprob) -> dict[str, Any]:
    own = {"logprob": score.logprob, "rank": score.rank, "decoded_token": score.token}
    found = {str(score.token_id): own}
    for rank, top in enumerate(score.top, start=1):
        found.setdefault(str(top.token_id), {"logprob": top.logprob, "rank": rank, "decoded_token": top.token})
    return found


def _top_logprobs(score: TokenLogprob, as_token_ids: bool) -> dict[str, float] | None:
    """The token itself and the likeliest tokens at its place, by name. Each token has an entry of its own."""
    if score.logprob is None:
        return None
    found = {id_name(score) if as_token_ids else score.token: score.logprob}
    for top in score.top:
        if top.token_id != score.token_id:
            name = top.token
            # Two tokens of a vocabulary can have the same text, and older workers named all bytes U+FFFD.
            found[id_name(top) if as_token_ids or name in found else name] = top.logprob
    return found


def id_name(token: TokenLogprob | TopLogprob) -> str:
    """A token's name by its id, as vLLM writes it with `return_tokens_as_token_ids`."""
    return f"token_id:{token.token_id}"


def request_error(error: Exception, names: Mapping[str, str] | None = None) -> dict[str, Any] | None:
    """OpenAI's error object, for a job that failed because of its request; None for any other failure.

    Args:
        names: fields of `Client.submit` -> their names in the request, where these differ.
    """
    code = failure_code(error)
    if code not in REQUEST_ERRORS:
        return None
    message = getattr(error, "message", None) or str(error)
    param = getattr(error, "field", None)
    if param is None:
        first_word = message.partition(" ")[0]  # an invalid token id may be in one of several fields
        param = first_word if first_word in GenerateRequest.model_fields else REQUEST_ERRORS[code]
    message = _PUBLIC_MESSAGES.get(code, message)
    return error_object(message, "invalid_request_error", (names or {}).get(param or "", param), code)


def error_object(message: str, kind: str, param: str | None, code: str) -> dict[str, Any]:
    """The error object of the OpenAI API."""
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


def failure_code(error: Exception) -> str:
    """The error code under which a failure is counted."""
    return getattr(error, "code", None) or "invalid_request"
