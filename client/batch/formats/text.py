"""Values of tables as text: for JSON lines and for the cells of CSV."""

from __future__ import annotations

import base64
import datetime
import json
import math
from typing import Any

#: Characters that end a line for `str.splitlines`, though not for JSON: escaped, so that every reader finds the lines.
_ESCAPED_LINE_ENDS = {code: f"\\u{code:04x}" for code in (0x85, 0x2028, 0x2029)}


def as_json(fields: dict[str, Any]) -> bytes:
    """A line of JSON. What JSON does not have becomes text, bytes in Base64, and NaN and infinity null."""
    try:
        text = json.dumps(fields, ensure_ascii=False, default=_as_text, allow_nan=False)
    except ValueError:
        text = json.dumps(_finite(fields), ensure_ascii=False, default=_as_text)
    return text.translate(_ESCAPED_LINE_ENDS).encode("utf-8", "replace") + b"\n"


def as_cell(value: Any) -> str:
    """The cell of a value: null is empty, lists and objects are JSON."""
    if value is None:
        return ""
    if isinstance(value, str):
        return value
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, (int, float)):
        return str(value)
    if isinstance(value, (dict, list, tuple)):
        return as_json_text(value)
    return str(_as_text(value))


def as_json_text(value: Any) -> str:
    """A nested value as JSON."""
    return json.dumps(_finite(value), ensure_ascii=False, default=_as_text)


def _as_text(value: Any) -> str:
    if isinstance(value, (bytes, bytearray, memoryview)):
        return base64.b64encode(value).decode()
    if isinstance(value, (datetime.date, datetime.time)):  # a datetime is a date
        return value.isoformat()
    return str(value)


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {_as_text(name) if isinstance(name, bytes) else name: _finite(inner) for name, inner in value.items()}
    return [_finite(inner) for inner in value] if isinstance(value, (list, tuple)) else value
