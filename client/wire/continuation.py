"""The field `continuation`: a text whose log probabilities after a prompt are the result of a job."""

from __future__ import annotations

from collections.abc import Iterable

from headrace.client.wire.errors import InvalidRequest
from headrace.client.wire.values import show

CONTINUATION_FORM = "text or token ids, as the prompt is, and not empty"


def check_continuation(
    given: str | list[int], prompt: str | list[int], *, is_chat: bool, others: Iterable[str], max_tokens: int
) -> None:
    """Refuse a continuation that cannot be scored after this prompt, and one beside generated text.

    Args:
        others: the fields of the request that ask for other results.

    Raises:
        InvalidRequest: names the field.
    """
    if is_chat:
        raise InvalidRequest("continuation", "a continuation of messages", "a prompt in place of messages")
    if not given or type(given) is not type(prompt):
        raise InvalidRequest("continuation", show(given), CONTINUATION_FORM)
    beside = [*others, *([f"max_tokens={max_tokens}"] if max_tokens else [])]
    if beside:
        expected = "max_tokens=0 beside it, and no other results"
        raise InvalidRequest("continuation", f"a continuation and {beside[0]}", expected)
