"""The sampling defaults of generation_config.json, for requests that do not set these parameters."""

from __future__ import annotations

from collections.abc import Mapping

from headrace.client.wire.errors import JobFailed
from headrace.client.wire.requests import GenerateRequest

Defaults = Mapping[str, int | float]
NO_DEFAULTS: Defaults = {}


def with_defaults(request: GenerateRequest, defaults: Defaults, room: int) -> tuple[GenerateRequest, Defaults]:
    """A request whose parameters that it does not set have the model's defaults, and these parameters.

    A default of `max_tokens` that exceeds the context is lowered to what fits, as in vLLM.

    Args:
        request: as it arrived.
        defaults: the model's, by the names of requests.
        room: how many new tokens fit into the context after the prompt.

    Raises:
        JobFailed: min_tokens of the request exceeds the default of max_tokens.
    """
    if not defaults:
        return request, {}
    missing = {name: value for name, value in defaults.items() if name not in request.model_fields_set}
    if not missing:
        return request, {}
    if "max_tokens" in missing:
        missing["max_tokens"] = max(1, min(int(missing["max_tokens"]), room))
        if request.min_tokens > missing["max_tokens"]:
            raise JobFailed(
                "invalid_request",
                f"min_tokens: got {request.min_tokens}; expected at most max_tokens, which is {missing['max_tokens']} "
                "by the model's generation_config.json; set max_tokens",
            )
    return request.model_copy(update=missing), missing
