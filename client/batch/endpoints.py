"""The endpoints of the OpenAI API that compute text: what their requests mean, and the form of their answers.

Routes over HTTP and rows of batches read and write them with the same functions.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

from headrace.client.batch.openai import CHAT_ENDPOINT, ENDPOINT, completion, completion_fields
from headrace.client.batch.openai_chat import chat_completion, chat_fields
from headrace.client.wire.results import Result


class Answer(Protocol):
    """Converts a result to the body of an answer."""

    def __call__(self, result: Result, *, as_token_ids: bool = False) -> dict[str, Any]:
        """The body; `as_token_ids` names tokens by their ids."""


@dataclass(frozen=True)
class Endpoint:
    """An endpoint.

    Attributes:
        path: of its URL.
        source: the field from which the text is computed.
        fields: converts the body of a request to what `Client.submit` takes; raises InvalidRequest.
        answer: converts a result to the body of the answer.
        names: fields of `Client.submit` -> the fields of a request that set them, where these have other names.
    """

    path: str
    source: Literal["prompt", "messages"]
    fields: Callable[[Mapping[str, Any]], dict[str, Any]]
    answer: Answer
    names: Mapping[str, str] = field(default_factory=dict)

    def name_of(self, name: str | None) -> str | None:
        """The field of a request that sets this field of `Client.submit`; errors name it."""
        return None if name is None else self.names.get(name, name)


COMPLETIONS = Endpoint(ENDPOINT, "prompt", completion_fields, completion)
CHAT = Endpoint(
    CHAT_ENDPOINT, "messages", chat_fields, chat_completion, {"prompt": "messages", "logprobs": "top_logprobs"}
)
#: By their paths.
ENDPOINTS = {endpoint.path: endpoint for endpoint in (COMPLETIONS, CHAT)}
