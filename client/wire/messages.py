"""The messages of a chat: their form and limits, and the errors for wrong ones.

The worker renders them with the model's chat template, because it has the template. Errors name the message and the
field, and never quote a text.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from headrace.client.wire.errors import InvalidRequest
from headrace.client.wire.unicode import check_unicode
from headrace.client.wire.values import is_missing, json_default, show_name, to_python

MAX_MESSAGES = 1_024
#: Bytes of all messages of a request, or of its `chat_template_kwargs`, as JSON in UTF-8.
MAX_MESSAGES_BYTES = 131_072
MAX_ROLE = 64

MESSAGES_FORM = (
    f"a list of 1 to {MAX_MESSAGES} messages such as {{'role': 'user', 'content': 'Hello'}}, at most "
    f"{MAX_MESSAGES_BYTES} bytes as JSON"
)
KWARGS_FORM = f"a map of the template's variables to JSON values, at most {MAX_MESSAGES_BYTES} bytes as JSON"
_CONTENT_FORM = "text, or a list of parts such as {'type': 'text', 'text': 'Hello'}"

#: Variables of a chat template that the fields of a request set.
RESERVED = {
    "messages": "the field messages",
    "add_generation_prompt": "the field add_generation_prompt",
    "continue_final_message": "the field continue_final_message",
    "chat_template": "no such variable; the template of the model's directory is used",
    "conversation": "the field messages",
    "tokenize": "no such variable; the worker always tokenizes",
    "return_dict": "no such variable",
    "return_tensors": "no such variable",
}


def check_messages(value: Any) -> Any:
    """Convert messages to plain JSON values and check them. A missing value of a key is the same as no key.

    Raises:
        InvalidRequest: the messages are not in the form that templates read, or too many or too large.
    """
    value = to_python(value)
    if not isinstance(value, (list, tuple)):
        raise InvalidRequest("messages", f"a value of type {type(value).__name__}", MESSAGES_FORM)
    if not 0 < len(value) <= MAX_MESSAGES:
        raise InvalidRequest("messages", f"a list of {len(value)} messages", MESSAGES_FORM)
    messages = [_check_message(message, f"messages[{index}]") for index, message in enumerate(value)]
    return _check_json(messages, "messages", MESSAGES_FORM)


def check_kwargs(value: Any) -> Any:
    """Convert the variables of a chat template to plain JSON values and check them. Raises InvalidRequest."""
    name, value = "chat_template_kwargs", to_python(value)
    if not isinstance(value, Mapping):
        raise InvalidRequest(name, f"a value of type {type(value).__name__}", KWARGS_FORM)
    if wrong := [key for key in value if not isinstance(key, str) or not key.isidentifier()]:
        raise InvalidRequest(name, f"a key {show_name(wrong[0])}", KWARGS_FORM)
    if taken := [key for key in value if key in RESERVED]:
        raise InvalidRequest(f"{name}.{taken[0]}", "a value", RESERVED[taken[0]])
    return _check_json(dict(value), name, KWARGS_FORM)


def is_text_part(part: Any) -> bool:
    """Whether this is a part of a message's content that holds text."""
    return isinstance(part, Mapping) and part.get("type") == "text" and isinstance(part.get("text"), str)


def _check_message(message: Any, place: str) -> dict[str, Any]:
    message = to_python(message)
    if not isinstance(message, Mapping):
        expected = "an object with role and content, such as {'role': 'user', 'content': 'Hello'}"
        raise InvalidRequest(place, f"a value of type {type(message).__name__}", expected)
    fields = {key: to_python(value) for key, value in message.items() if not is_missing(value)}
    if wrong := [key for key in fields if not isinstance(key, str)]:
        raise InvalidRequest(place, f"a key of type {type(wrong[0]).__name__}", "keys that are text")
    role = fields.get("role")
    if not isinstance(role, str) or not 0 < len(role) <= MAX_ROLE:
        given = "nothing" if role is None else _kind(role)
        expected = f"text of 1 to {MAX_ROLE} characters, such as 'system', 'user' or 'assistant'"
        raise InvalidRequest(f"{place}.role", given, expected)
    if "content" in fields:
        fields["content"] = _check_content(fields["content"], f"{place}.content")
    elif "tool_calls" not in fields:
        raise InvalidRequest(f"{place}.content", "nothing", _CONTENT_FORM)
    return fields


def _check_content(content: Any, place: str) -> Any:
    if isinstance(content, str):
        return content
    if not isinstance(content, (list, tuple)) or not content:
        raise InvalidRequest(place, _kind(content), _CONTENT_FORM)
    parts = [to_python(part) for part in content]
    for index, part in enumerate(parts):
        if isinstance(part, Mapping):  # tables give each row of a column the keys of all rows
            part = parts[index] = {key: to_python(item) for key, item in part.items() if not is_missing(item)}
        if not is_text_part(part):
            kind = part.get("type") if isinstance(part, Mapping) else None
            given = f"a part of type {kind[:40]!r}" if isinstance(kind, str) and kind != "text" else _kind(part)
            raise InvalidRequest(f"{place}[{index}]", given, "{'type': 'text', 'text': text}; models read text only")
    return parts


def _kind(value: Any) -> str:
    if isinstance(value, (str, list, tuple)):
        return f"a {type(value).__name__} of length {len(value)}"
    return f"a value of type {type(value).__name__}"


def _check_json(value: Any, name: str, expected: str) -> Any:
    """The value as plain JSON, which is bounded. Raises InvalidRequest."""
    check_unicode(value, name)
    try:
        text = json.dumps(value, ensure_ascii=False, allow_nan=False, default=json_default)
        size = len(text.encode())
    except (TypeError, ValueError, RecursionError) as error:
        raise InvalidRequest(name, f"a value that JSON cannot represent ({type(error).__name__})", expected) from None
    if size > MAX_MESSAGES_BYTES:
        raise InvalidRequest(name, f"{size} bytes", expected)
    return json.loads(text)
