"""Rendering chats: messages become a prompt by the model's chat template, in a process that can be stopped.

See `chat_process` for what a template may do. A process takes one chat at a time and is kept for the next one; one that
takes too long is ended and replaced. Nothing here runs in the engine's thread.
"""

from __future__ import annotations

import atexit
import contextlib
import json
import os
import select
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextvars import ContextVar
from pathlib import Path
from typing import Any

import structlog

from headrace.client.wire.errors import JobFailed

log = structlog.get_logger("headrace.engine")

#: Chats that are rendered at the same time; half of them those that have taken longer than FIRST_LIMIT_S before.
MAX_PROCESSES = 4
#: Seconds that a template may take, and a process to start.
TIME_LIMIT_S, START_LIMIT_S = 5.0, 60.0
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


class _TooLong(Exception):
    """The process did not answer in time."""


class _Process:
    """A process that renders one chat at a time."""

    def __init__(self) -> None:
        kept = {name: os.environ[name] for name in ("PATH", "TZ", "LD_LIBRARY_PATH", "HOME") if name in os.environ}
        self._process = subprocess.Popen(  # noqa: S603  # this interpreter and a file of this package
            [sys.executable, "-P", str(_PROGRAM)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            # Without the worker's secrets; in a session of its own, so that Ctrl-C reaches the worker alone.
            env={**kept, "PYTHONPATH": os.pathsep.join(filter(None, sys.path)), "PYTHONUTF8": "1"},
            start_new_session=True,
        )
        stdin, stdout = self._process.stdin, self._process.stdout
        if stdin is None or stdout is None:
            raise OSError("no pipes")
        self._stdin, self._stdout = stdin, stdout
        try:
            self._read_line(START_LIMIT_S)
        except BaseException:
            self.end()
            raise

    def ask(self, request: dict[str, Any], limit_s: float) -> dict[str, Any]:
        """The answer to a request. Raises _TooLong, or OSError if the process has ended."""
        data = memoryview(json.dumps(request).encode() + b"\n")
        self._stdin.write(data)  # the process reads whole lines before it computes, so this does not block for long
        self._stdin.flush()
        answer: dict[str, Any] = json.loads(self._read_line(limit_s))
        return answer

    def _read_line(self, limit_s: float) -> bytes:
        stdout = self._stdout
        deadline, data = time.monotonic() + limit_s, bytearray()
        while not data.endswith(b"\n"):
            left = deadline - time.monotonic()
            if left <= 0 or not select.select([stdout], [], [], left)[0]:
                raise _TooLong
            piece = os.read(stdout.fileno(), 2**16)
            if not piece:
                raise OSError("the process that renders chats has ended")
            data += piece
        return bytes(data)

    def lives(self) -> bool:
        """Whether the process has not ended."""
        return self._process.poll() is None

    def end(self) -> None:
        """End the process."""
        with contextlib.suppress(OSError):
            self._process.kill()
        for pipe in (self._stdin, self._stdout):
            with contextlib.suppress(OSError):
                pipe.close()
        self._process.wait()


class Renderer:
    """Renders chats in other processes, at most MAX_PROCESSES at a time. May be used from any thread."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._idle: list[_Process] = []
        #: Where jobs with messages are prepared.
        self.threads = ThreadPoolExecutor(MAX_PROCESSES // 2, thread_name_prefix="headrace-chat")
        #: Where they are prepared again if that was Slow.
        self.slow_threads = ThreadPoolExecutor(MAX_PROCESSES // 2, thread_name_prefix="headrace-slow-chat")

    def render(self, request: dict[str, Any], limit_s: float) -> str:
        """The text of a chat. Raises JobFailed, or Slow in a first try."""
        process = self._idle_process()
        first = _first.get() and limit_s > FIRST_LIMIT_S
        try:
            process = process or _Process()
            answer = process.ask(request, FIRST_LIMIT_S if first else limit_s)
        except (_TooLong, OSError, ValueError) as error:
            if process is not None:
                process.end()
            if first and isinstance(error, _TooLong):
                raise Slow from None
            reason = (
                f"it took longer than {limit_s:g} s"
                if isinstance(error, _TooLong)
                else "the process that renders it ended, perhaps for lack of memory"
            )
            raise JobFailed("chat_template_failed", f"{_SENTENCES['chat_template_failed']}: {reason}") from None
        except BaseException:
            if process is not None:
                process.end()
            raise
        with self._lock:
            self._idle.append(process)
        if "text" in answer:
            return str(answer["text"])
        raise JobFailed(answer["code"], f"{_SENTENCES[answer['code']]}: {answer['reason']}")

    def _idle_process(self) -> _Process | None:
        """A process that waits; none that was killed meanwhile."""
        while True:
            with self._lock:
                process = self._idle.pop() if self._idle else None
            if process is None or process.lives():
                return process
            process.end()

    def close(self) -> None:
        """End the processes that wait."""
        with self._lock:
            idle, self._idle = self._idle, []
        for process in idle:
            process.end()


renderer = Renderer()
atexit.register(renderer.close)


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
