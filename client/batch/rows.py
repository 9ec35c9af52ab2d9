"""Read one line of the input, or one item of an iterable, as a request.

A line is a request in the format of the OpenAI Batch API, an object with `prompt` and parameters, or, in a text file, a
prompt.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from typing import Any

from headrace.client.batch.items import BatchItem, digest_of, to_python
from headrace.client.batch.openai import ENDPOINT, completion_fields
from headrace.client.batch.sources import MAX_LINE_BYTES
from headrace.client.wire.errors import InvalidRequest
from headrace.client.wire.requests import show_value
from headrace.config.settings import slug

MAX_CUSTOM_ID = 512
_BATCH_KEYS = ("custom_id", "method", "url", "body")


class ItemReader:
    """Reads lines and items as requests.

    Args:
        model_name: the model of requests that name none.
        params: defaults for requests that do not set the parameter.
        text: each line is a prompt.
        models: the models that requests may name; None means any.
    """

    def __init__(
        self, model_name: str, params: Mapping[str, Any], *, text: bool = False, models: Collection[str] | None = None
    ) -> None:
        self._model_name, self._params, self._text, self._models = model_name, params, text, models

    def read(self, line: int, item: Any) -> BatchItem | None:
        """The request in a line (bytes) or in an item of an iterable; None if the line is blank.

        Raises:
            InvalidRequest: the form is wrong. `Submitter.prepare` checks the parameters.
        """
        if isinstance(item, bytes):
            item = self._decode(item, first=line == 1)
            if item is None:
                return None
        custom_id, given = _split_custom_id(to_python(item))
        fields = {name: value for name, value in {**self._params, **given}.items() if value is not None}
        if "stream" in fields:
            raise InvalidRequest(
                "stream", repr(fields["stream"])[:80], "no such parameter; a batch writes complete results"
            )
        model = self._model_of(fields)
        content = {name: value for name, value in fields.items() if name not in ("priority", "timeout_s")}
        name = f"row-{line}" if custom_id is None else custom_id
        digest = digest_of({**content, "custom_id": name, "model": model})
        # The seed follows from the content, so that every computation of the request draws the same numbers.
        return BatchItem(line, name, {"priority": "bulk", "seed": int(digest[:13], 16), **fields}, digest)

    def _decode(self, raw: bytes, *, first: bool) -> Any:
        """The text of a line, or the value of its JSON; None if it is blank."""
        if len(raw) > MAX_LINE_BYTES:
            raise InvalidRequest("line", f"more than {MAX_LINE_BYTES} bytes", "a shorter line")
        try:
            line = raw.decode("utf-8-sig" if first else "utf-8").rstrip("\r\n")
        except UnicodeDecodeError as error:
            raise InvalidRequest("line", f"bytes that are not UTF-8 at {error.start}", "text in UTF-8") from None
        if not line.strip():
            return None
        if self._text:
            return line
        try:
            return json.loads(line)
        except (ValueError, RecursionError) as error:
            raise InvalidRequest(
                "line", f"invalid JSON ({error})", "a JSON object; plain text lines need --text"
            ) from None

    def _model_of(self, fields: dict[str, Any]) -> str:
        named = fields.get("model")
        if not isinstance(named, str) or not named:  # the check of the parameters refuses it, if it is given
            return self._model_name
        model = slug(named)
        if self._models is not None and model not in self._models:
            raise InvalidRequest("model", show_value(model), f"one that is served: {', '.join(sorted(self._models))}")
        return model


def _split_custom_id(item: Any) -> tuple[str | None, dict[str, Any]]:
    """The custom id (None if there is none) and the parameters of a request in any of the formats."""
    if isinstance(item, (str, list, tuple)):
        return None, {"prompt": list(item) if isinstance(item, tuple) else item}
    if not isinstance(item, Mapping):
        raise InvalidRequest("line", f"a {type(item).__name__}", "an object with `prompt`, or one of the Batch API")
    fields = {name: to_python(value) for name, value in item.items()}
    if not fields.keys() & {"method", "url", "body"}:
        custom_id = fields.pop("custom_id", None)
        if "id" in fields:
            raise InvalidRequest("id", repr(fields["id"])[:80], "custom_id, the name of a request in a batch")
        return _check_custom_id(custom_id) if custom_id is not None else None, fields
    if unknown := [name for name in fields if name not in _BATCH_KEYS]:
        raise InvalidRequest(str(unknown[0])[:80], "a field", f"only the fields {', '.join(_BATCH_KEYS)}")
    if fields.get("method", "POST") != "POST" or fields.get("url", ENDPOINT) != ENDPOINT:
        got = f"{fields.get('method', 'POST')} {fields.get('url', ENDPOINT)}"
        raise InvalidRequest("url", show_value(got), f"'POST {ENDPOINT}'")
    if not isinstance(fields.get("body"), Mapping):
        raise InvalidRequest("body", f"a {type(fields.get('body')).__name__}", "an object with prompt and parameters")
    return _check_custom_id(fields.get("custom_id")), completion_fields(fields["body"])


def _check_custom_id(value: Any) -> str:
    if not isinstance(value, str) or not 0 < len(value) <= MAX_CUSTOM_ID or not _is_unicode(value):
        raise InvalidRequest("custom_id", show_value(value), f"text of 1 to {MAX_CUSTOM_ID} characters")
    return value


def _is_unicode(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True
