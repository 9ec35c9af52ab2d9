"""The bodies of `/tokenize` and `/detokenize`, with the fields of vLLM."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any, NamedTuple

from headrace.client.wire.errors import InvalidRequest
from headrace.client.wire.foreign import advice, drop_neutral
from headrace.client.wire.values import is_missing, show, show_name

#: Fields of `/tokenize` that are true or false; null is their default.
TOKENIZE_FLAGS = (
    *("add_special_tokens", "parse_special_tokens", "return_token_strs"),
    *("add_generation_prompt", "continue_final_message"),
)
_TOKENIZE = frozenset({"model", "prompt", "messages", "chat_template_kwargs", *TOKENIZE_FLAGS})
_DETOKENIZE = frozenset({"model", "tokens", "skip_special_tokens"})


class TokenizeRequest(NamedTuple):
    """A parsed body of `/tokenize`.

    Attributes:
        model: the name that it gives; None if it gives none.
        params: what `Client.tokenize` takes, without the model.
        with_texts: whether the answer has the text of each token.
    """

    model: Any
    params: dict[str, Any]
    with_texts: bool


def parse_tokenize_request(body: Mapping[str, Any]) -> TokenizeRequest:
    """Parse a body of `/tokenize`. `Client.tokenize` checks prompt and messages.

    Raises:
        InvalidRequest: a field is unknown or wrong; the error names it.
    """
    fields = _known(body, _TOKENIZE)
    if fields.keys() >= {"prompt", "messages"}:
        raise InvalidRequest("messages", "messages beside a prompt", "one of the two")
    if not fields.keys() & {"prompt", "messages"}:
        raise InvalidRequest("prompt", "nothing", "a text, or instead of it messages")
    if "prompt" in fields and not isinstance(fields["prompt"], str):
        raise InvalidRequest("prompt", show(fields["prompt"], "prompt"), "a text")
    if "messages" in fields and fields["messages"] == []:
        raise InvalidRequest("messages", "an empty list", "a list of messages")
    _check_flags(fields, TOKENIZE_FLAGS)
    return TokenizeRequest(fields.pop("model", None), fields, fields.pop("return_token_strs", False))


def parse_detokenize_request(body: Mapping[str, Any]) -> tuple[Any, dict[str, Any]]:
    """Parse a body of `/detokenize`: the model that it names, and what `Client.detokenize` takes.

    Raises:
        InvalidRequest: a field is unknown or wrong; the error names it.
    """
    fields = _known(body, _DETOKENIZE)
    if not isinstance(fields.get("tokens"), list):
        given = show(fields["tokens"], "prompt") if "tokens" in fields else "nothing"
        raise InvalidRequest("tokens", given, "a list of token ids")
    _check_flags(fields, ("skip_special_tokens",))
    return fields.pop("model", None), {"token_ids": fields.pop("tokens"), **fields}


def _known(body: Mapping[str, Any], names: Collection[str]) -> dict[str, Any]:
    """The fields that ask for something. Raises InvalidRequest for one that is not among `names`."""
    given = {name: value for name, value in body.items() if name in names and not is_missing(value)}
    for name, value in drop_neutral({name: value for name, value in body.items() if name not in names}).items():
        raise InvalidRequest(show_name(name), show(value, name), advice(name, names))
    return given


def _check_flags(fields: Mapping[str, Any], names: Collection[str]) -> None:
    for name in names:
        if name in fields and not isinstance(fields[name], bool):
            raise InvalidRequest(name, show(fields[name]), "True or False")
