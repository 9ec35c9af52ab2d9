"""The process that renders chat templates: it reads requests as JSON lines and answers each with one.

A template is a program from a model's directory: it may loop for ever or build a text of gigabytes, and neither can be
stopped inside a thread. So templates run here, in jinja2's sandbox and with a limit on memory, and the worker ends a
process that does not answer in time. The templates see what they see in transformers (its `chat_template_utils`).

Run as a file: it imports nothing of the worker.
"""

from __future__ import annotations

import contextlib
import functools
import json
import re
import resource
import signal
import sys
from collections.abc import Iterator
from datetime import datetime
from typing import Any

import jinja2
import jinja2.ext
from jinja2 import nodes
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

#: Address space of this process, in bytes.
MEMORY_BYTES = 512 * 2**20
#: The end of a message that the model is to continue. The text is cut here.
TAG = "CONTINUE_FINAL_MESSAGE_TAG "
#: Seconds after which this process ends if it is still rendering: the worker, which ends it sooner, was killed then.
LIMIT_S = 10.0
#: How much of what a template raises is told.
MAX_REASON = 300


class Refused(Exception):
    """A template that gives no text: the error code, and why."""

    def __init__(self, code: str, reason: str) -> None:
        super().__init__(reason)
        self.code, self.reason = code, reason


class _Generation(jinja2.ext.Extension):
    """`{% generation %}...{% endgeneration %}`, which marks answers for training and renders what is in it."""

    tags = {"generation"}  # noqa: RUF012  # as jinja2 declares it

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.CallBlock(self.call_method("_render"), [], [], body).set_lineno(line)

    def _render(self, caller: Any) -> Any:
        return caller()


class _Dict:
    """`dict` without its attributes, through which a template could reach what the sandbox hides."""

    def __call__(self, *args: Any, **kwargs: Any) -> dict[Any, Any]:
        return dict(*args, **kwargs)

    def fromkeys(self, *args: Any, **kwargs: Any) -> dict[Any, Any]:
        return dict.fromkeys(*args, **kwargs)


class _Namespace(jinja2.utils.Namespace):
    """`namespace` without attributes that begin with an underscore."""

    def __init__(*args: Any, **kwargs: Any) -> None:  # so that `namespace(self=...)` works
        self, rest = args[0], args[1:]
        attributes = dict(*rest, **kwargs)
        for name in attributes:
            _check_attribute(name)
        jinja2.utils.Namespace.__init__(self, attributes)

    def __setitem__(self, name: str, value: Any) -> None:
        _check_attribute(name)
        jinja2.utils.Namespace.__setitem__(self, name, value)


def _check_attribute(name: Any) -> None:
    if isinstance(name, str) and name.startswith("_"):
        raise jinja2.exceptions.SecurityError(f"a namespace cannot store {name!r}: it begins with an underscore")


def _raise_exception(message: Any) -> None:
    raise jinja2.exceptions.TemplateError(str(message))


def _tojson(
    value: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None, sort_keys: bool = False
) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _strftime_now(form: str) -> str:
    return datetime.now().strftime(form)


def environment() -> ImmutableSandboxedEnvironment:
    """The environment of transformers."""
    made = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, jinja2.ext.loopcontrols]
    )
    made.filters["tojson"] = _tojson
    made.globals.update(
        raise_exception=_raise_exception, strftime_now=_strftime_now, dict=_Dict(), namespace=_Namespace
    )
    return made


@functools.lru_cache(maxsize=8)
def _compiled(template: str) -> tuple[jinja2.Template, bool]:
    """A template, and whether it looks at the parts of a message's content."""
    made = environment()
    try:
        return made.from_string(template), _reads_parts(made.parse(template))
    except (jinja2.TemplateSyntaxError, RecursionError) as error:
        at = f" (line {error.lineno})" if isinstance(error, jinja2.TemplateSyntaxError) else ""
        raise Refused("invalid_chat_template", f"{_reason(error)}{at}") from None


def _reads_parts(tree: nodes.Template) -> bool:
    """Whether a template goes through the parts of a content, or asks whether it is a text."""
    names = {"content"}
    for assignment in tree.find_all(nodes.Assign):
        if isinstance(assignment.target, nodes.Name) and _names_content(assignment.node, set()):
            names.add(assignment.target.name)
    looped = [loop.iter for loop in tree.find_all(nodes.For)]
    tested = [test.node for test in tree.find_all(nodes.Test) if test.name in ("string", "sequence", "iterable")]
    return any(_names_content(node, names) for node in (*looped, *tested))


def _names_content(node: nodes.Node, names: set[str]) -> bool:
    """Whether an expression is `message.content`, `message['content']` or one of the names, perhaps filtered."""
    while isinstance(node, (nodes.Filter, nodes.Getitem, nodes.Getattr)) and node.node is not None:
        if isinstance(node, nodes.Getattr) and node.attr == "content":
            return True
        if isinstance(node, nodes.Getitem) and isinstance(node.arg, nodes.Const) and node.arg.value == "content":
            return True
        node = node.node
    return isinstance(node, nodes.Name) and node.name in names


def render(
    template: str,
    messages: list[dict[str, Any]],
    special_tokens: dict[str, str],
    variables: dict[str, Any],
    *,
    add_generation_prompt: bool,
    continue_final_message: bool,
    max_bytes: int,
) -> str:
    """The text of a chat.

    Raises:
        Refused: the template is none, raises, or writes too much.
    """
    compiled, reads_parts = _compiled(template)
    chat = [_prepared(message, reads_parts) for message in messages]
    last = _mark_end(chat, template) if continue_final_message else ""
    fields = {"tools": None, "documents": None, **special_tokens, **variables}
    fields.update(messages=chat, add_generation_prompt=add_generation_prompt)
    try:
        text = "".join(_bounded(compiled.generate(**fields), max_bytes))
    except Refused:
        raise
    except MemoryError:
        raise Refused("chat_template_failed", f"it needs more than {MEMORY_BYTES} bytes of memory") from None
    except Exception as error:  # whatever a template does, it fails its own job alone
        raise Refused("chat_template_failed", _reason(error)) from None
    return _cut(text, last) if continue_final_message else text


def _prepared(message: dict[str, Any], reads_parts: bool) -> dict[str, Any]:
    """A message as transformers passes it on; its text parts are joined for a template that knows only text."""
    message = dict(message)
    reasoning = next((message[k] for k in ("reasoning_content", "thinking", "reasoning") if k in message), None)
    if reasoning is not None:
        message = {"thinking": reasoning, **message, "reasoning_content": reasoning}
    if isinstance(message.get("content"), list) and not reads_parts:
        message["content"] = "\n".join(part["text"] for part in message["content"])
    return message


def _bounded(pieces: Iterator[str], max_bytes: int) -> Iterator[str]:
    size = 0
    for piece in pieces:
        size += len(piece)
        if size > max_bytes or (size + len(piece) * 3 > max_bytes and len(piece.encode()) > max_bytes):
            raise Refused("chat_template_failed", f"the text that it makes has more than {max_bytes} bytes")
        yield piece


def _mark_end(chat: list[dict[str, Any]], template: str) -> str:
    """Mark the end of the last message's content. Returns the content."""
    if "content" not in template:
        raise Refused("chat_template_failed", "it does not use the content of messages, so none can be continued")
    content = chat[-1].get("content")
    if isinstance(content, list):
        parts = chat[-1]["content"] = [dict(part) for part in content]
        content, parts[-1]["text"] = parts[-1]["text"], parts[-1]["text"] + TAG
    else:
        chat[-1]["content"] = f"{content}{TAG}"
    return str(content)


def _cut(text: str, last: str) -> str:
    """The text up to the mark."""
    if last.strip() not in text or TAG.strip() not in text:
        raise Refused("chat_template_failed", "it changes the last message, so that this cannot be continued")
    at = text.rindex(TAG.strip())
    return text[:at] if text[at : at + len(TAG)] == TAG else text[:at].rstrip()


def _reason(error: BaseException) -> str:
    """What a template raised, in one line."""
    text = re.sub(r"\s+", " ", str(error)).strip()
    text = "".join(c if c.isprintable() else "?" for c in text[: MAX_REASON + 1])
    text = text if len(text) <= MAX_REASON else f"{text[: MAX_REASON - 3]}..."
    return text if isinstance(error, jinja2.TemplateError) else f"{type(error).__name__}: {text}"


def _answer(line: bytes) -> dict[str, Any]:
    try:
        return {"text": render(**json.loads(line))}
    except Refused as refused:
        return {"code": refused.code, "reason": refused.reason}
    except MemoryError:
        return {"code": "chat_template_failed", "reason": f"it needs more than {MEMORY_BYTES} bytes of memory"}
    except Exception as error:
        return {"code": "chat_template_failed", "reason": _reason(error)}


def main() -> None:
    """Answer requests until the input ends."""
    with contextlib.suppress(ValueError, OSError):
        resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
    output = sys.stdout.buffer
    output.write(b'{"ready": true}\n')
    output.flush()
    for line in sys.stdin.buffer:
        signal.setitimer(signal.ITIMER_REAL, LIMIT_S)  # SIGALRM ends the process, whatever the template computes
        answer = _answer(line)
        signal.setitimer(signal.ITIMER_REAL, 0)
        output.write(json.dumps(answer).encode() + b"\n")
        output.flush()


if __name__ == "__main__":
    main()
