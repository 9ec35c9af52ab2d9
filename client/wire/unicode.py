"""Text from outside is valid Unicode, or is refused with the place at which it is not.

JSON can spell half of a surrogate pair (`"\\ud83d"`), and a command line or environment can hold bytes that are not
UTF-8. Python keeps both in a `str` that cannot be encoded: stored once, it fails wherever it is written later. So JSON
from outside is read by `parse_json`, and other values are checked by `check_unicode`, before anything is done with
them.
"""

from __future__ import annotations

import json
import re
from typing import Any, NoReturn

from headrace.client.wire.errors import InvalidRequest
from headrace.client.wire.values import show

EXPECTED = "text that is valid Unicode; decode it with the right encoding first"
#: The longest part of a path that is shown.
MAX_PATH = 100
#: An escape of JSON that stands for a surrogate. Without one, text in UTF-8 has no lone surrogates.
_ESCAPED_SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")
_SURROGATE = re.compile("[\ud800-\udfff]")


def parse_json(data: bytes | str, *, constants: bool = True) -> Any:
    """The value of a JSON text.

    Args:
        data: the text.
        constants: whether `NaN`, `Infinity` and `-Infinity` are numbers, which JSON itself does not have.

    Raises:
        InvalidRequest: a string or a name in it has a lone surrogate; `field` is its path, such as `metadata.title`.
        ValueError: it is not valid JSON, not valid Unicode, or nested too deeply. InvalidRequest is a ValueError too.
    """
    text = data.decode(json.detect_encoding(data)) if isinstance(data, bytes) else data
    try:
        value = json.loads(text, parse_constant=None if constants else _refuse_constant)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    if _ESCAPED_SURROGATE.search(text) or not (isinstance(data, bytes) or is_unicode(text)):
        check_unicode(value)
    return value


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not a number in JSON; leave the field out, or write null")


def check_unicode(value: Any, path: str = "") -> None:
    """Check all strings in a value, and the names in its objects, at any depth.

    Args:
        path: what the value is called in the error.

    Raises:
        InvalidRequest: one has a lone surrogate.
    """
    waiting = [(path, value)]
    while waiting:
        place, item = waiting.pop()
        if isinstance(item, str):
            if (lone := _SURROGATE.search(item)) is not None:
                at = f"an unpaired surrogate U+{ord(lone.group()):04X} at character {lone.start()}"
                raise InvalidRequest(place or "body", at, EXPECTED)
        elif isinstance(item, dict):
            for name, inner in item.items():
                below = _below(place, name)
                if isinstance(name, str) and not is_unicode(name):
                    raise InvalidRequest(below, "a name with an unpaired surrogate", EXPECTED)
                if isinstance(inner, (str, dict, list, tuple)):
                    waiting.append((below, inner))
        elif isinstance(item, (list, tuple)):
            waiting += [(f"{place}[{i}]", x) for i, x in enumerate(item) if isinstance(x, (str, dict, list, tuple))]


def is_unicode(text: str) -> bool:
    """Whether a text can be encoded: it has no surrogates."""
    return _SURROGATE.search(text) is None


def printable(text: str) -> str:
    """The text with escapes for what cannot be printed: surrogates, control characters, marks of direction."""
    return text if text.isprintable() else "".join(c if c.isprintable() else _escaped(c) for c in text)


def _escaped(character: str) -> str:
    return character.encode("unicode_escape", "backslashreplace").decode()


def _below(path: str, name: Any) -> str:
    shown = printable(name[:40]) if isinstance(name, str) else show(name)[:40]
    if len(path) + len(shown) > MAX_PATH:
        path = f"{path[: MAX_PATH - 60]}..."
    return f"{path}.{shown}" if path else shown or "''"
