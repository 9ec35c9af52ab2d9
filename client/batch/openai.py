"""Formats of the OpenAI API: bodies of completions, and the lines of batch output files."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from typing import Any, NamedTuple

from headrace.client.batch.items import BatchItem
from headrace.client.wire.errors import InvalidRequest
from headrace.client.wire.requests import parse_request, plain_fields
from headrace.client.wire.results import Choice, Outcome, Result, TokenLogprob, TopLogprob
from headrace.client.wire.values import show, to_whole

#: The only endpoint that lines of a batch may name.
ENDPOINT = "/v1/completions"
#: The `id` of an output line is this prefix and the digest of the request.
ROW_ID = "batch_req_"

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


def completion(result: Result, *, as_token_ids: bool = False) -> dict[str, Any]:
    """A result in the format of the completions API, with the seed, and with `stop_reason` as in vLLM."""
    return {
        "id": f"cmpl-{result.id}",
        "object": "text_completion",
        "created": int(time.time()),
        "model": result.model,
        "choices": [_choice(choice, as_token_ids) for choice in result.choices],
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
    """The output line of a request. A job has no HTTP status: it has status code 200, or an `error` and no response."""
    line: dict[str, Any] = {"id": ROW_ID + row.digest, "custom_id": row.custom_id, "response": None, "error": None}
    if isinstance(outcome, Result):
        body = completion(outcome, as_token_ids=row.as_token_ids)
        line["response"] = {"status_code": 200, "request_id": job_id, "body": body}
    else:
        message = getattr(outcome, "message", None) or str(outcome)
        line["error"] = {"code": failure_code(outcome), "message": message}
    return json.dumps(line, ensure_ascii=False).encode("utf-8", "replace") + b"\n"


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


def failure_code(error: Exception) -> str:
    """The error code under which a failure is counted."""
    return getattr(error, "code", None) or "invalid_request"
