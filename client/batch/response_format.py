"""OpenAI's `response_format`, as `structured_outputs`."""

from __future__ import annotations

from typing import Any

from headrace.client.wire.constraints import FIELD, check_structured_outputs
from headrace.client.wire.errors import InvalidRequest
from headrace.client.wire.values import is_missing, show

NAME = "response_format"
_FORMS = '{"type": "text"}, {"type": "json_object"} or {"type": "json_schema", "json_schema": {"schema": {...}}}'


def take_response_format(fields: dict[str, Any]) -> None:
    """Replace `response_format` in the fields of a request by `structured_outputs`.

    Raises:
        InvalidRequest: it has another form, or the request has both.
    """
    value = fields.pop(NAME, None)
    if is_missing(value):
        return
    kind = value.get("type") if isinstance(value, dict) else None
    if kind == "json_object":
        form: dict[str, Any] = {"json_object": True}
    elif kind == "json_schema":
        form = {"json": _schema(value.get("json_schema"))}
    else:
        raise InvalidRequest(NAME, show(value), _FORMS)
    if FIELD in fields:
        raise InvalidRequest(NAME, f"a value beside {FIELD}", "one of the two")
    fields[FIELD] = form


def _schema(given: Any) -> Any:
    field = f"{NAME}.json_schema"
    if not isinstance(given, dict) or is_missing(given.get("schema")):
        raise InvalidRequest(field, show(given), 'an object with the schema, {"name": ..., "schema": {...}}')
    try:
        check_structured_outputs({"json": given["schema"]})
    except InvalidRequest as error:
        raise InvalidRequest(f"{field}.schema", error.value, error.expected) from None
    return given["schema"]
