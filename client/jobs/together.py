"""Limits of one request with many prompts, each of which becomes a job with its own copy of the parameters."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from headrace.client.wire.errors import InvalidRequest
from headrace.client.wire.requests import CHAT_NAMES, GenerateRequest, parse_request
from headrace.client.wire.result_size import largest_result
from headrace.client.wire.values import is_missing

#: Bytes of parameters, as JSON, that the jobs of one request may have together.
MAX_COPIED_BYTES = 8 * 2**20
#: The results of one request may take so many times HEADRACE_MAX_RESULT_BYTES.
MAX_RESPONSE_RESULTS = 8


def check_copies(prompts: int, params: Mapping[str, Any]) -> None:
    """Bound what a request puts into the queue.

    Raises:
        InvalidRequest: all copies of the parameters together are too large.
    """
    size = len(json.dumps(params, default=str)) if prompts > 1 else 0
    if prompts * size > MAX_COPIED_BYTES:
        expected = f"at most {MAX_COPIED_BYTES} bytes of parameters for all prompts; send fewer in a request"
        raise InvalidRequest("prompt", f"{prompts} prompts with {size} bytes of parameters each", expected)


def check_response(prompts: Sequence[Any], params: Mapping[str, Any], limit: int) -> None:
    """Bound the response to a request. Raises InvalidRequest if it can become too large, or a parameter is wrong.

    Args:
        prompts: texts and lists of token ids.
        limit: bytes of the results of all prompts together.
    """
    if len(prompts) == 1:
        return  # the client checks its result
    known = GenerateRequest.model_fields.keys() - {"prompt", *CHAT_NAMES}
    own = {name: value for name, value in params.items() if name in known and not is_missing(value)}
    request = parse_request({**own, "prompt": [0] if isinstance(own.get("continuation"), list) else ""})
    longest = max(prompts, key=len) if request.echo or request.prompt_logprobs is not None else ""
    size = len(prompts) * largest_result(request.model_copy(update={"prompt": longest}))
    if size > limit:
        expected = f"at most {limit} bytes; send fewer prompts in a request, or lower n, max_tokens or logprobs"
        raise InvalidRequest("prompt", f"{len(prompts)} prompts whose results may take {size} bytes together", expected)
