"""The prompts and chats that the offline engine takes, in the forms that vLLM takes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from headrace.client.wire.errors import InvalidRequest, JobFailed
from headrace.client.wire.messages import check_messages
from headrace.client.wire.requests import parse_request
from headrace.client.wire.values import show, to_python
from headrace.model.tokenizer import Tokenizer
from headrace.worker.engine import chat
from headrace.worker.engine.offline_types import refuse_unknown

#: Arguments of vLLM's `generate` that ask for nothing with None, and what to do instead of giving another value.
_OPTIONS = {
    "prompt_adapter_request": "",
    "guided_options_request": "; give structured_outputs to SamplingParams",
    "tokenization_kwargs": "",
    "mm_processor_kwargs": "; GPT-2 reads text only",
    "prompt_token_ids": "; give the token ids as prompts",
}
#: The same of `chat`.
_CHAT_OPTIONS = {
    "tools": "; give what the template reads as chat_template_kwargs",
    "chat_template_content_format": ", 'auto' or 'string'",
}
_PROMPT_FORMS = "text, token ids, or a mapping with prompt or prompt_token_ids"


class InvalidPrompt(JobFailed, ValueError):
    """Raised when the model cannot compute a prompt, for example because it is too long; `code` says why."""


class Prompt(NamedTuple):
    """A prompt as the engine takes it, and its text if it is known."""

    content: str | list[int]
    text: str | None


def refuse_options(function: str, *, priority: Any, **options: Any) -> None:
    """Raise for arguments of `generate` or `chat` that ask for something that is not computed."""
    known = [*_OPTIONS, *_CHAT_OPTIONS] if function == "chat" else [*_OPTIONS, "prompts", "priority"]
    refuse_unknown(function, options, [*known, "sampling_params", "use_tqdm"])
    for name, value in options.items():
        one_for_each = isinstance(value, (list, tuple)) and all(item is None for item in value)
        if value is not None and value != {} and not one_for_each:
            raise InvalidRequest(name, show(value), f"None{(_OPTIONS | _CHAT_OPTIONS)[name]}")
    priority = to_python(priority)
    if priority is not None and not (isinstance(priority, (list, tuple)) and all(item == 0 for item in priority)):
        raise InvalidRequest("priority", show(priority), "None; prompts are computed in their order")


def as_list(prompts: Any) -> list[Any]:
    """A list of prompts. A list of numbers is one prompt."""
    if isinstance(prompts, (str, Mapping)):
        return [prompts]
    prompts = to_python(prompts)
    try:
        if isinstance(prompts, (bytes, bytearray, memoryview)):
            raise TypeError  # as a list it would be token ids
        listed = list(prompts)
    except TypeError:
        given = "nothing" if prompts is None else f"a value of type {type(prompts).__name__}"
        raise InvalidRequest("prompts", given, f"{_PROMPT_FORMS}, or a list of these") from None
    is_one = bool(listed) and isinstance(to_python(listed[0]), (int, float))
    return [listed] if is_one else listed


def prompt_of(item: Any) -> Prompt:
    if not isinstance(item, Mapping):
        content = to_python(item)
        if not isinstance(content, (str, list, tuple)):
            raise InvalidRequest("prompts", f"an item of type {type(item).__name__}", _PROMPT_FORMS)
        checked = parse_request({"prompt": content}).prompt
        return Prompt(checked, checked if isinstance(checked, str) else None)
    given = {name: value for name, value in item.items() if value is not None and value != {}}
    text, ids = given.pop("prompt", None), given.pop("prompt_token_ids", None)
    if given:
        name = next(iter(given))
        raise InvalidRequest("prompts", f"a mapping with {show(name)}", _PROMPT_FORMS)
    if (text is None and ids is None) or not isinstance(text, (str, type(None))):
        raise InvalidRequest("prompts", f"a mapping with {show(sorted(map(str, item)))}", _PROMPT_FORMS)
    checked = parse_request({"prompt": text if ids is None else ids}).prompt
    if ids is not None and isinstance(checked, str):
        raise InvalidRequest("prompts", "a text as prompt_token_ids", "token ids")
    return Prompt(checked, text)


def chats_of(messages: Any) -> list[list[dict[str, Any]]]:
    """The chats in the argument `messages`: one list of messages, or a list of such lists. Raises InvalidRequest."""
    form = "a list of messages with role and content, or a list of such lists"
    messages = to_python(messages)
    if not isinstance(messages, (list, tuple)) or not messages:
        raise InvalidRequest("messages", show(messages), form)
    chats = messages if isinstance(messages[0], (list, tuple)) else [messages]
    if not all(isinstance(each, (list, tuple)) for each in chats):
        raise InvalidRequest("messages", "messages beside lists of messages", form)
    return [check_messages(list(each)) or [] for each in chats]


def rendered(tokenizer: Tokenizer, template: str | None, messages: list[dict[str, Any]], **options: Any) -> Prompt:
    """The prompt for a chat, as the template writes it, with the token ids that it is encoded to.

    Args:
        tokenizer: of the model.
        template: the chat template; None for the model's own.
        messages: of the chat.
        options: of `chat.render`.

    Raises:
        InvalidPrompt: the model has no template, or the template cannot write these messages.
    """
    template = tokenizer.chat_template if template is None else template
    try:
        text = chat.render(template, messages, tokenizer.special_tokens, **options)
        return Prompt(tokenizer.encode(text, parse_special_tokens=True, add_special_tokens=False), text)
    except JobFailed as error:
        raise InvalidPrompt(error.code, error.message, error.partial) from None
