"""Which columns of a table are the prompt, the name and the parameters of a request."""

from __future__ import annotations

import difflib
import json
from collections.abc import Collection, Container, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from headrace.client.batch.formats.arrow_rows import ArrowRow
from headrace.client.wire.errors import InvalidRequest
from headrace.client.wire.values import is_gap, show, to_whole

#: Parameters whose text is not read as JSON, like that of the prompt: a continuation may be ` 42`.
TEXTS = frozenset({"continuation"})


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

    @cached_property
    def _named(self) -> tuple[str, ...]:
        return (self.prompt, *self.params, self.custom_id or "custom_id")

    @cached_property
    def _unnamed(self) -> tuple[str, ...]:
        return (self.prompt, *self.params)

    def used(self, names: Container[str]) -> tuple[str, ...]:
        """The columns that make a request, of a table with these columns."""
        return self._unnamed if self.custom_id is None and "custom_id" not in names else self._named

    def check(self, names: Collection[str]) -> None:
        """Refuse a table that lacks one of the columns. Raises InvalidRequest."""
        options = {self.prompt: "prompt_column", **dict.fromkeys(self.params, "params_columns")}
        if self.custom_id is not None:
            options[self.custom_id] = "id_column"
        for name, option in options.items():
            if name not in names:
                raise _missing(name, option, names)

    def split(self, row: Any) -> tuple[dict[str, Any], Mapping[str, Any]]:
        """The fields of a request, and the columns that are passed through.

        Raises:
            InvalidRequest: a column is missing, the prompt is no text or token ids, or the name is neither text nor a
                whole number.
        """
        if not isinstance(row, Mapping):
            kind = "null" if row is None else f"a value of type {type(row).__name__}"
            raise InvalidRequest("line", kind, "an object with the columns of the table")
        used = self.used(row)
        try:
            values = [row[name] for name in used]
        except KeyError:
            self.check(row)
            raise
        prompt, fields = values[0], dict(zip(self.params, values[1:], strict=False))
        if type(prompt) is not str:
            self._check_prompt(prompt)
        for name, value in fields.items():
            if isinstance(value, str) and name not in TEXTS:
                fields[name] = _parsed(value)
        if used is self._named:
            fields["custom_id"] = _name(values[-1])
        fields["prompt"] = prompt
        if isinstance(row, ArrowRow):
            return fields, row.without(used)
        return fields, {name: value for name, value in row.items() if name not in used}

    def aside(self, row: Mapping[str, Any]) -> tuple[Any, dict[str, Any]]:
        """The name of a row that is no request, None if it has none, and the columns that are passed through."""
        used = self.used(row)
        name = _name(row.get(used[-1])) if used is self._named else None
        return name, {column: value for column, value in row.items() if column not in used}

    def _check_prompt(self, prompt: Any) -> None:
        if is_gap(prompt):
            expected = "a prompt; leave rows without one out of the table, or let --skip-invalid put them aside"
            raise InvalidRequest(self.prompt, "null", expected)
        if isinstance(prompt, (bool, int, float, bytes, Mapping)):
            expected = "text, or token ids; make the column one of text, or choose another one with --prompt-column"
            raise InvalidRequest(self.prompt, f"a value of type {type(prompt).__name__}", expected)


def _missing(name: str, option: str, names: Iterable[str]) -> InvalidRequest:
    known = list(map(str, names))
    near = difflib.get_close_matches(name, known, 3, 0.5) or known[:10]
    expected = f"one of the columns, for example {', '.join(near)}" if near else "a table with columns"
    return InvalidRequest(option, f"{show(name)}, which the input does not have", expected)


def _name(value: Any) -> Any:
    """A name, from text or a whole number, also one that pandas wrote as 7.0 because of gaps in the column."""
    value = to_whole(value)
    return str(value) if isinstance(value, int) and not isinstance(value, bool) else value


def _parsed(value: str) -> Any:
    """The value of a text field, as that of `-p NAME=VALUE`: JSON, else text."""
    try:
        return json.loads(value)
    except ValueError:
        return value
