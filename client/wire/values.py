"""Values as callers pass them: conversions to plain Python, missing values, and short forms for error messages.

A caller may pass anything: numbers of numpy, scalars of pyarrow, `pandas.NA`, objects whose methods raise. Nothing here
raises, except `json_default`.
"""

from __future__ import annotations

import math
import operator
import reprlib
from collections.abc import Mapping
from typing import Any

#: Longer field names are shortened in error messages.
MAX_NAME = 64
#: The longest form of a value in an error message, in characters.
MAX_SHOWN = 80

_PLAIN = frozenset({type(None), bool, int, float, str, bytes, list, tuple, dict, set})


def to_python(value: Any) -> Any:
    """Convert a value of pyarrow, numpy, torch or pandas to plain Python; any other value is returned as it is."""
    if type(value) in _PLAIN:
        return value
    for method in ("as_py", "tolist"):
        try:
            if not isinstance(value, (str, bytes, memoryview)) and callable(found := getattr(value, method, None)):
                return found()
        except Exception:
            return value  # not a value of these libraries, whatever it calls its methods
    return value


def to_whole(value: Any) -> Any:
    """Convert a whole number to `int`, also `64.0`; any other value, also a bool, is returned as it is."""
    if type(value) is int:  # almost every value of a long prompt
        return value
    value = to_python(value)
    if isinstance(value, bool):
        return value
    if isinstance(value, float):
        return int(value) if value.is_integer() else value
    try:
        return operator.index(value)
    except Exception:
        return value


def is_missing(value: Any) -> bool:
    """Whether a value stands for none: None, `pandas.NA`, `pandas.NaT`, or a null of pyarrow."""
    if type(value) in _PLAIN:
        return value is None
    return type(value).__name__ in ("NAType", "NaTType") or to_python(value) is None


def json_default(value: Any) -> Any:
    """The `default` of `json.dumps`: converts values of pyarrow, numpy and pandas. Raises TypeError for others."""
    if is_missing(value):
        return None
    converted = to_python(value)
    if converted is value:
        raise TypeError(f"a {type(value).__name__}")
    return converted


def is_gap(value: Any) -> bool:
    """Whether a value is a gap in a column of a table: missing, or the NaN that pandas and numpy write for that."""
    value = to_python(value)
    return is_missing(value) or (isinstance(value, float) and math.isnan(value))


def without_gaps(row: Mapping[Any, Any]) -> dict[Any, Any]:
    """The fields that a row of a table sets."""
    return {name: value for name, value in row.items() if not is_gap(value)}


class _ShortRepr(reprlib.Repr):
    """`repr` with bounded work and output, however long or deep the value is."""

    def __init__(self) -> None:
        super().__init__()
        self.maxlist = self.maxtuple = self.maxdict = 24
        self.maxstring = self.maxother = self.maxlong = 80

    def repr_int(self, x: int, level: int) -> str:
        # Python refuses to convert a number of thousands of digits.
        return super().repr_int(x, level) if x.bit_length() < 1024 else f"a number of {x.bit_length()} bits"


#: Fields that hold what a user wrote.
PRIVATE_NAMES = frozenset({"prompt", "messages", "chat_template_kwargs"})


def show(value: Any, name: Any = "") -> str:
    """A value for an error message, shortened. For a prompt only its type: messages must not quote prompts."""
    if isinstance(name, str) and name in PRIVATE_NAMES:
        return f"a value of type {type(value).__name__}"
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    try:
        text = _ShortRepr().repr(value)
        text.encode()  # a repr may contain unpaired surrogates, which terminals and logs reject
    except Exception:
        text = f"a value of type {type(value).__name__}"
    return text if len(text) <= MAX_SHOWN else text[: MAX_SHOWN - 3] + "..."


def show_name(name: Any) -> str:
    """A field name that a caller chose, made safe to print."""
    return name if isinstance(name, str) and name.isprintable() and 0 < len(name) <= MAX_NAME else show(name)
