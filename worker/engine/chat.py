"""Rendering chats: messages become a prompt by the model's chat template, in a process that can be stopped.

See `chat_process` for what a template may do. A process takes one chat at a time and is kept for the next one; one that
takes too long is ended and replaced. Nothing here runs in the engine's thread.
"""

from __future__ import annotations

import atexit
import contextlib
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextvars import ContextVar
from pathlib import Path
from typing import Any

import structlog

from headrace.client.wire.errors import JobFailed
from headrace.worker.engine.helper_process import Helpers, TooLong

log = structlog.get_logger("headrace.engine")

#: Chats that are rendered at the same time; half of them those that have taken longer than FIRST_LIMIT_S before.
MAX_PROCESSES = 4
#: Seconds that a template may take.
TIME_LIMIT_S = 5.0
#: Seconds that a template may take at first, so that those that do not end hold up no quick ones.
FIRST_LIMIT_S = 0.5
#: Largest text of a chat, in bytes; the largest template, in characters.
MAX_TEXT_BYTES, MAX_TEMPLATE = 2**18, 2**20

NO_TEMPLATE = (
    "the model has no chat template (chat_template.jinja, or chat_template in tokenizer_config.json), so it takes no "
    "messages; put the template into its directory, or send a prompt in the form that the model was trained on"
)
_SENTENCES = {
    "invalid_chat_template": "the model's chat template cannot be read",
    "chat_template_failed": "the model's chat template cannot write these messages",
}
_PROGRAM = Path(__file__).with_name("chat_process.py")


class Slow(Exception):
    """A chat took longer than FIRST_LIMIT_S in its first try."""


#: Whether this is the first try of a chat.
_first: ContextVar[bool] = ContextVar("first", default=False)


@contextlib.contextmanager
def first_try() -> Iterator[None]:
    """In this block `render` raises Slow for a chat that takes longer than FIRST_LIMIT_S."""
    token = _first.set(True)
    try:
        yield
    finally:
        _first.reset(token)


class Renderer:
    """Renders chats in other processes, at most MAX_PROCESSES at a time. May be used from any thread."""

    def __init__(self) -> None:
        self.processes = Helpers(_PROGRAM)
        #: Where jobs with messages are prepared.
        self.threads = ThreadPoolExecutor(MAX_PROCESSES // 2, thread_name_prefix="headrace-chat")
        #: Where they are prepared again if that was Slow.
        self.slow_threads = ThreadPoolExecutor(MAX_PROCESSES // 2, thread_name_prefix="headrace-slow-chat")

    def render(self, request: dict[str, Any], limit_s: float) -> str:
        """The text of a chat. Raises JobFailed, or Slow in a first try."""
        first = _first.get() and limit_s > FIRST_LIMIT_S
        try:
            answer = self.processes.ask(request, FIRST_LIMIT_S if first else limit_s)
        except (TooLong, OSError, ValueError) as error:
            if first and isinstance(error, TooLong):
                raise Slow from None
            reason = (
                f"it took longer than {limit_s:g} s"
                if isinstance(error, TooLong)
                else "the process that renders it ended, perhaps for lack of memory"
            )
            raise JobFailed("chat_template_failed", f"{_SENTENCES['chat_template_failed']}: {reason}") from None
        if "text" in answer:
            return str(answer["text"])
        raise JobFailed(answer["code"], f"{_SENTENCES[answer['code']]}: {answer['reason']}")


renderer = Renderer()
atexit.register(renderer.processes.close)


def render(
    template: str | None,
    messages: Sequence[Mapping[str, Any]],
    special_tokens: Mapping[str, str],
    variables: Mapping[str, Any] | None = None,
    *,
    add_generation_prompt: bool = True,
    continue_final_message: bool = False,
    limit_s: float = TIME_LIMIT_S,
) -> str:
    """The text of a chat, as `apply_chat_template` of transformers gives it.

    Args:
        template: of the model; None if it has none.
        messages: as `client.wire.messages` checks them.
        special_tokens: "bos_token" -> its text, and so on: variables of the template.
        variables: further ones, `chat_template_kwargs` of the request.
        add_generation_prompt: end with what begins an answer.
        continue_final_message: end with the last message, unfinished.
        limit_s: seconds that the template may take.

    Raises:
        JobFailed: `no_chat_template`, `invalid_chat_template`, or `chat_template_failed` with what the template says.
    """
    if template is None:
        raise JobFailed("no_chat_template", NO_TEMPLATE)
    if len(template) > MAX_TEMPLATE:
        raise JobFailed("invalid_chat_template", f"the model's chat template has more than {MAX_TEMPLATE} characters")
    request = {
        "template": template,
        "messages": list(messages),
        "special_tokens": dict(special_tokens),
        "variables": dict(variables or {}),
        "add_generation_prompt": add_generation_prompt,
        "continue_final_message": continue_final_message,
        "max_bytes": MAX_TEXT_BYTES,
    }
    return renderer.render(request, limit_s)
