"""How large the result of a request can become, from its parameters alone."""

from __future__ import annotations

import json

from headrace.client.wire.errors import InvalidRequest
from headrace.client.wire.requests import GenerateRequest

#: Bytes of JSON that a sample takes, a token with its id and its text, and each of its log probabilities. For English
#: the last two are 11 and 66; most tokens of other languages take a little more.
SAMPLE_BYTES, TOKEN_BYTES, SCORE_BYTES = 128, 16, 80
#: A token of text has about four bytes.
BYTES_OF_PROMPT_TOKEN = 3


def largest_result(request: GenerateRequest) -> int:
    """Bytes of the result if every sample has `max_tokens` tokens."""
    prompt = _tokens(request.prompt if request.messages is None else json.dumps(request.messages))
    tokens = request.max_tokens + request.echo * prompt
    logprobs = request.logprobs
    if request.continuation is not None:
        tokens, logprobs = _tokens(request.continuation), request.logprobs or 0
    scores = 0 if logprobs is None else 1 + logprobs
    size = request.n * (SAMPLE_BYTES + tokens * (TOKEN_BYTES + scores * SCORE_BYTES))
    if request.prompt_logprobs is not None:
        size += prompt * (1 + request.prompt_logprobs) * SCORE_BYTES
    return size


def _tokens(text: str | list[int]) -> int:
    """About how many tokens a text has."""
    return -(-len(text.encode(errors="replace")) // BYTES_OF_PROMPT_TOKEN) if isinstance(text, str) else len(text)


def check_result_size(request: GenerateRequest, limit: int) -> None:
    """Refuse a request whose result can become larger than `limit` bytes. Raises InvalidRequest."""
    size = largest_result(request)
    if size > limit:
        asking = (name for name in ("prompt_logprobs", "logprobs") if getattr(request, name) is not None)
        field = next(asking, "max_tokens")
        asked = f"n={request.n}, max_tokens={request.max_tokens}, logprobs={request.logprobs}"
        if request.prompt_logprobs is not None:
            asked += f", prompt_logprobs={request.prompt_logprobs}"
        raise InvalidRequest(
            field,
            f"{asked}{', echo=True' if request.echo else ''}, whose result may take {size} bytes",
            f"at most {limit} bytes: lower one of them, submit the samples as several jobs with seeds of their own, "
            "or raise HEADRACE_MAX_RESULT_BYTES",
        )
