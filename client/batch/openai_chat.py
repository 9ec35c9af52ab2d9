"""Formats of OpenAI's chat API: bodies of requests, of answers, and of the parts of a stream."""

from __future__ import annotations

import re
import time
from collections.abc import Mapping
from typing import Any

from headrace.client.batch.openai import CHAT_ENDPOINT, ENDPOINT, id_name, prompt_logprobs_field, shared_fields
from headrace.client.wire.errors import InvalidRequest
from headrace.client.wire.requests import MAX_LOGPROBS
from headrace.client.wire.results import Choice, Result, TokenLogprob, TopLogprob
from headrace.client.wire.values import is_missing, show, to_python, to_whole

#: The role in the message that answers.
ROLE = "assistant"
#: OpenAI's value for tokens that are very unlikely; JSON has no infinity.
LOWEST_LOGPROB = -9999.0
_BYTES_NAME = re.compile(r"bytes:((?:\\x[0-9a-f]{2})+)")
_NO_TEXT = "token_id:"
_LOGPROBS = f"True or False; top_logprobs, from 0 to {MAX_LOGPROBS}, is the number of alternatives"


def chat_fields(body: Mapping[str, Any]) -> dict[str, Any]:
    """Convert a body of the chat API to what `Client.submit` takes, without fields that ask for nothing.

    Raises:
        InvalidRequest: there are no messages, or a field has a form that only `/v1/completions` takes. `Client.submit`
            checks the messages and the sampling parameters.
    """
    given = dict(body)
    if not is_missing(given.get("prompt")):
        expected = f"no such field in {CHAT_ENDPOINT}, which takes messages; send a prompt to {ENDPOINT}"
        raise InvalidRequest("prompt", show(given["prompt"], "prompt"), expected)
    messages = to_python(given.pop("messages", None))
    if messages is None or messages == []:
        found = "nothing" if messages is None else "an empty list"
        raise InvalidRequest("messages", found, "a list of messages such as {'role': 'user', 'content': 'Hello'}")
    if not is_missing(echo := given.pop("echo", None)) and to_python(echo) is not False:
        raise InvalidRequest("echo", show(echo), f"False; the answer of {CHAT_ENDPOINT} is the new message alone")
    scores, alternatives = given.pop("logprobs", None), given.pop("top_logprobs", None)
    fields = {**shared_fields(given), "messages": messages}
    if (count := _alternatives(scores, alternatives)) is not None:
        fields["logprobs"] = count
    return fields


def _alternatives(scores: Any, count: Any) -> int | None:
    """The `logprobs` of `Client.submit` for `logprobs` and `top_logprobs` of a chat. Raises InvalidRequest."""
    scores, count = to_python(scores), None if is_missing(count) else to_whole(count)
    if not is_missing(scores) and not isinstance(scores, bool):
        raise InvalidRequest("logprobs", show(scores), _LOGPROBS)
    if count is not None and not (type(count) is int and 0 <= count <= MAX_LOGPROBS):
        raise InvalidRequest("top_logprobs", show(count), f"a whole number from 0 to {MAX_LOGPROBS}, or None")
    if scores is not True:
        if count:
            raise InvalidRequest("top_logprobs", show(count), "logprobs=True beside it")
        return None
    return count or 0


def chat_completion(result: Result, *, as_token_ids: bool = False) -> dict[str, Any]:
    """A result in the format of the chat API, with the seed, and with `stop_reason` as in vLLM."""
    prompt = (
        {} if result.prompt_logprobs is None else {"prompt_logprobs": prompt_logprobs_field(result.prompt_logprobs)}
    )
    return {
        "id": f"chatcmpl-{result.id}",
        "object": "chat.completion",
        "created": int(time.time()),
        "model": result.openai_model,
        "choices": [_choice(choice, as_token_ids) for choice in result.choices],
        "usage": result.usage.as_openai(),
        "system_fingerprint": result.fingerprint,
        "seed": result.seed,
        **prompt,
    }


def _choice(choice: Choice, as_token_ids: bool) -> dict[str, Any]:
    return {
        "index": choice.index,
        "message": {"role": ROLE, "content": choice.text, "refusal": None},
        "logprobs": chat_logprobs(choice.logprobs, as_token_ids=as_token_ids),
        "finish_reason": choice.finish_reason,
        "stop_reason": choice.stop_reason,
        **({} if choice.complete is None else {"complete": choice.complete}),
    }


def chat_logprobs(scores: list[TokenLogprob] | None, *, as_token_ids: bool = False) -> dict[str, Any] | None:
    """Log probabilities in the format of the chat API; None if there are none.

    Args:
        scores: of consecutive tokens.
        as_token_ids: name tokens `token_id:13`, as vLLM does with `return_tokens_as_token_ids`.
    """
    if scores is None:
        return None
    content = [
        {
            **_token_logprob(score, as_token_ids),
            "top_logprobs": [_token_logprob(top, as_token_ids) for top in score.top],
        }
        for score in scores
    ]
    return {"content": content, "refusal": None}


def _token_logprob(token: TokenLogprob | TopLogprob, as_token_ids: bool) -> dict[str, Any]:
    return {
        "token": id_name(token) if as_token_ids else token.token,
        "logprob": LOWEST_LOGPROB if token.logprob is None else max(token.logprob, LOWEST_LOGPROB),
        "bytes": None if (data := token_bytes(token.token)) is None else list(data),
    }


def token_bytes(name: str) -> bytes | None:
    r"""The bytes of a token from its name: its text, `bytes:\xe2\x80` if it is part of a character, or `token_id:13`
    if the vocabulary has no text for it, for which this is None.
    """
    if name.startswith(_NO_TEXT):
        return None
    found = _BYTES_NAME.fullmatch(name)
    return name.encode(errors="replace") if found is None else bytes.fromhex(found[1].replace(r"\x", ""))
