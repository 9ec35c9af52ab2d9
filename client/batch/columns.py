"""Which columns of a table are the prompt, the name and the parameters of a request."""

from __future__ import annotations

import difflib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from headrace.client.wire.errors import InvalidRequest
from headrace.client.wire.values import is_gap, show


@dataclass(frozen=True)
class Columns:
    """The columns of the input that make a request; all others are passed through to the output.

    Attributes:
        prompt: the column of the prompt.
        custom_id: the column of the name, text or a whole number; if None, `custom_id` where there is one.
        params: columns that are parameters of the same name; a gap leaves the default.
    """

    prompt: str = "prompt"
    custom_id: str | None = None
    params: Sequence[str] = ()

    def split(self, row: Any) -> tuple[dict[str, Any], dict[str, Any]]:
        """The fields of a request, and the columns that are passed through.

        Raises:
            InvalidRequest: a column is missing, or the name is neither text nor a whole number.
        """
        if not isinstance(row, Mapping):
            raise InvalidRequest("line", f"a {type(row).__name__}", "an object with the columns of the table")
        rest = dict(row)
        fields = {"prompt": _take(rest, self.prompt, "prompt_column")}
        if is_gap(fields["prompt"]):
            raise InvalidRequest(self.prompt, "null", "a prompt; a row without one has to be left out of the table")
        for name in self.params:
            value = _take(rest, name, "params_columns")
            fields[name] = _parsed(value) if isinstance(value, str) else value
        if self.custom_id is not None or "custom_id" in rest:
            fields["custom_id"] = _name(_take(rest, self.custom_id or "custom_id", "id_column"))
        return fields, rest


def _take(row: dict[str, Any], name: str, option: str) -> Any:
    try:
        return row.pop(name)
    except KeyError:
        near = difflib.get_close_matches(name, map(str, row), 3, 0.5) or list(map(str, row))[:10]
        expected = f"one of the columns, for example {', '.join(near)}" if near else "a table with columns"
        raise InvalidRequest(option, f"{show(name)}, which the input does not have", expected) from None


def _name(value: Any) -> Any:
    return str(value) if isinstance(value, int) and not isinstance(value, bool) else value


def _parsed(value: str) -> Any:
    """The value of a text field, as that of `-p NAME=VALUE`: JSON, else text."""
    try:
        return json.loads(value)
    except ValueError:
        return value
