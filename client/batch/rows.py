"""Read one line of the input, or one item of an iterable, as a request.

A line is a request in the format of the OpenAI Batch API, an object with `prompt` and parameters, or, in a text file, a
prompt.
"""

from __future__ import annotations

import contextlib
from collections.abc import Collection, Mapping
from dataclasses import replace
from typing import Any

from headrace.client.batch.adapters import check_adapter, check_one_adapter, model_of_adapter
from headrace.client.batch.alike import Template
from headrace.client.batch.columns import Columns
from headrace.client.batch.endpoints import COMPLETIONS, ENDPOINTS, Endpoint
from headrace.client.batch.formats.arrow_rows import ArrowRow
from headrace.client.batch.formats.line_reader import MAX_LINE_BYTES
from headrace.client.batch.formats.readers import FILES_JOINED, IN_UTF8
from headrace.client.batch.items import BatchItem, digest_of, seed_of
from headrace.client.batch.openai import NAMES_FIELD, OTHER_ENDPOINTS, split_prompts, take_names_field
from headrace.client.wire.errors import InvalidRequest
from headrace.client.wire.foreign import FOREIGN, advice
from headrace.client.wire.requests import INTERNAL_NAMES, PUBLIC_NAMES, plain_fields
from headrace.client.wire.unicode import check_unicode, is_unicode, parse_json
from headrace.client.wire.values import is_gap, is_missing, show, show_name, to_python, without_gaps
from headrace.config.model_names import served_name

MAX_CUSTOM_ID = 512
_KNOWN_NAMES = {*PUBLIC_NAMES, *INTERNAL_NAMES, NAMES_FIELD}
_BATCH_KEYS = ("custom_id", "method", "url", "body")


class ItemReader:
    """Reads lines and items as requests.

    Args:
        model_name: the model of requests that name none.
        params: defaults for requests that do not set the parameter.
        text: each line is a prompt.
        models: the models that requests may name; None means any.
        adapters: the LoRA adapters of models. A request may name one in place of its model.
        answers_mistakes: a request with a wrong parameter is answered by the error, as in OpenAI's batches. Otherwise
            it refuses the batch, as does in any case what is not a request, or names a model that is not served.
        endpoint: the path that requests of the Batch API name; if not given, the first of them decides.
        columns: items are rows of a table with these columns, not requests.
        skip_invalid: every faulty line is answered by its error, also one that is not a request.
    """

    def __init__(
        self,
        model_name: str,
        params: Mapping[str, Any],
        *,
        text: bool = False,
        models: Collection[str] | None = None,
        adapters: Mapping[str, Collection[str]] | None = None,
        answers_mistakes: bool = False,
        endpoint: str | None = None,
        columns: Columns | None = None,
        skip_invalid: bool = False,
    ) -> None:
        self.skip_invalid = skip_invalid
        self._columns = columns
        self._endpoint = None if endpoint is None else ENDPOINTS[endpoint]
        self._model_name, self._params, self._text, self._models = model_name, params, text, models
        self._adapters = adapters or {}
        self._answers_mistakes = answers_mistakes
        self._template: Template | None = None  # of rows that have only a prompt

    def answers(self, error: InvalidRequest) -> bool:
        """Whether the request with this error is answered by it, and the other requests are computed."""
        return self.skip_invalid or (self._answers_mistakes and error.field != "model")

    def is_default(self, row: BatchItem, name: str) -> bool:
        """Whether a request has this parameter only because it is one of `params`."""
        return name in self._params and row.fields.get(name) == plain_fields({name: self._params[name]}).get(name)

    def read(self, line: int, item: Any) -> BatchItem | None:
        """The request in a line (bytes) or in an item of an iterable; None if the line is blank.

        Raises:
            InvalidRequest: the form is wrong. `Submitter.prepare` checks the parameters.
        """
        try:
            if isinstance(item, bytes):
                text = self._decode(item)
                if text is None:
                    return None
                item = text if self._text else self._parse(text)
            elif isinstance(item, InvalidRequest):
                raise item
            elif not isinstance(item, ArrowRow):  # its texts are valid
                check_unicode(item)
                item = to_python(item)
            return self._row(line, item)
        except InvalidRequest as error:
            if not self.skip_invalid:
                raise
            return self._put_aside(line, item, error)

    def _put_aside(self, line: int, item: Any, error: InvalidRequest) -> BatchItem:
        """A line that is no request, to be answered by its error."""
        name, passed = f"row-{line}", dict[str, Any]()
        if self._columns is not None and isinstance(item, Mapping):
            with contextlib.suppress(InvalidRequest):  # what is not valid Unicode is in no output
                check_unicode(item)
                given, passed = self._columns.aside(item)
                name = _check_custom_id(given)
        return BatchItem(line, name, {}, digest_of({"line": line, "error": str(error)}), mistake=error, columns=passed)

    def _row(self, line: int, item: Any) -> BatchItem:
        """The request in a value. Raises InvalidRequest."""
        passed: Mapping[str, Any] = {}
        if self._columns is not None:
            item, passed = self._columns.split(item)
            if (row := self._alike(line, item, passed)) is not None:
                return row
        custom_id, given, named = self._split(item)
        name = f"row-{line}" if custom_id is None else custom_id
        endpoint = named or COMPLETIONS
        try:
            if named is None and self._columns is None:
                _check_names(given)
            row = self._request(line, name, given if named is None else named.fields(given), endpoint)
            row = replace(row, columns=passed) if passed else row
        except InvalidRequest as error:
            if not self.answers(error):
                raise
            digest = digest_of({"request": given, "custom_id": name})
            return BatchItem(line, name, {}, digest, mistake=error, endpoint=endpoint.path, columns=passed)
        if self._template is None and self._columns is not None and given.keys() == {"prompt"}:
            self._template = Template.made_from(row, self._model_of(row.fields))
        return row

    def _alike(self, line: int, fields: dict[str, Any], passed: Mapping[str, Any]) -> BatchItem | None:
        """The request in a row that has only a prompt and a name; None if it has more, or must be looked at closely."""
        template, prompt, name = self._template, fields["prompt"], fields.get("custom_id")
        if template is None or type(prompt) is not str or len(fields) != 1 + ("custom_id" in fields):
            return None
        if name is None:
            name = f"row-{line}"
        elif type(name) is not str or not name.isascii() or not 0 < len(name) <= MAX_CUSTOM_ID:
            return None
        return template.item(line, name, prompt, passed)

    def _split(self, item: Any) -> tuple[str | None, Mapping[str, Any], Endpoint | None]:
        """The custom id (None if there is none), the parameters, and the endpoint if these are the body of a request.

        Raises:
            InvalidRequest: the item has the form of no request.
        """
        if isinstance(item, (str, list, tuple)):
            return None, {"prompt": list(item) if isinstance(item, tuple) else item}, None
        if not isinstance(item, Mapping):
            raise InvalidRequest("line", json_kind(item), "an object with `prompt`, or one of the Batch API")
        fields = {name: to_python(value) for name, value in item.items()}
        if not fields.keys() & {"method", "url", "body"}:
            custom_id = fields.pop("custom_id", None)
            if "id" in fields:
                expected = "custom_id, the name of a request in a batch; --id-column id takes it from the field id"
                raise InvalidRequest("id", "a field", expected)
            if isinstance(custom_id, int) and not isinstance(custom_id, bool):
                expected = f"text of 1 to {MAX_CUSTOM_ID} characters; write it in quotes, or use --id-column"
                raise InvalidRequest("custom_id", "a whole number", expected)
            return None if is_gap(custom_id) else _check_custom_id(custom_id), fields, None
        if unknown := [name for name in fields if name not in _BATCH_KEYS]:
            raise InvalidRequest(str(unknown[0])[:80], "a field", f"only the fields {', '.join(_BATCH_KEYS)}")
        endpoint = self._endpoint_of(fields)
        if not isinstance(fields.get("body"), Mapping):
            expected = f"an object with {endpoint.source} and parameters"
            raise InvalidRequest("body", f"a {type(fields.get('body')).__name__}", expected)
        return _check_custom_id(fields.get("custom_id")), fields["body"], endpoint

    def _endpoint_of(self, fields: Mapping[str, Any]) -> Endpoint:
        """The endpoint of a request of the Batch API, the same for all of them. Raises InvalidRequest."""
        right = self._endpoint or COMPLETIONS
        target = {"method": "POST", "url": right.path}
        method, url = (default if is_missing(fields.get(name)) else fields[name] for name, default in target.items())
        named = ENDPOINTS.get(url) if isinstance(url, str) and method == "POST" else None
        if named is not None and self._endpoint in (None, named):
            self._endpoint = named
            return named
        texts = isinstance(method, str) and isinstance(url, str)
        given = f"{method} {url}" if texts else f"{show(method)} {show(url)}"
        expected = " or ".join(f"'POST {path}'" for path in (ENDPOINTS if self._endpoint is None else [right.path]))
        if named is not None:
            expected += ", the endpoint of the batch; all of its requests have the same"
        elif isinstance(url, str) and url in OTHER_ENDPOINTS:
            expected += f"; {OTHER_ENDPOINTS[url]}"
        raise InvalidRequest("url", show(given), expected)

    def _request(self, line: int, name: str, given: Mapping[str, Any], endpoint: Endpoint) -> BatchItem:
        """The request with these parameters. Raises InvalidRequest."""
        fields = plain_fields({**self._params, **without_gaps(given)})
        if (stream := fields.pop("stream", False)) is not False:
            raise InvalidRequest("stream", show(stream), "no such parameter; a batch writes complete results")
        as_token_ids = take_names_field(fields)
        content = {name: value for name, value in fields.items() if name not in ("priority", "timeout_s")}
        # The digest is that of the name in the request: an adapter's model is known only while a worker serves it.
        adapted = self._adapted(fields)
        content |= {"custom_id": name, "model": self._model_of(fields, is_adapter=bool(adapted))}
        digest = digest_of(content)
        # The seed follows from the content, so that every computation of the request draws the same numbers.
        completed = {"priority": "bulk", "seed": seed_of(digest), **fields, **adapted}
        form: dict[str, Any] = {NAMES_FIELD: True} if as_token_ids else {}
        if endpoint is not COMPLETIONS:
            form["url"] = endpoint.path
        if form:
            digest = digest_of({**content, **form})  # another output, of the same numbers
        return BatchItem(
            line,
            name,
            completed,
            digest,
            as_token_ids,
            _prompts(fields.get("prompt")),
            "seed" in fields,
            endpoint=endpoint.path,
        )

    def _decode(self, raw: bytes) -> str | None:
        """The text of a line; None if it is blank."""
        if len(raw) > MAX_LINE_BYTES:
            raise InvalidRequest("line", f"more than {MAX_LINE_BYTES} bytes", "a shorter line")
        try:
            line = raw.decode().rstrip("\r\n")
        except UnicodeDecodeError:
            raise InvalidRequest("line", "bytes that are not UTF-8", IN_UTF8) from None
        if line.startswith("\ufeff"):
            raise InvalidRequest("line", "a byte order mark at its start", FILES_JOINED)
        return line if line.strip() else None

    def _parse(self, line: str) -> Any:
        """The value of the JSON of a line. Raises InvalidRequest."""
        try:
            return parse_json(line)
        except InvalidRequest as error:
            raise InvalidRequest(error.field.removeprefix("body."), error.value, error.expected) from None
        except ValueError as error:
            raise InvalidRequest(
                "line", f"invalid JSON ({error})", "a JSON object; plain text lines need --text"
            ) from None

    def _adapted(self, fields: Mapping[str, Any]) -> dict[str, Any]:
        """The fields `model` and `adapter` of a request whose model is the name of an adapter; {} for any other."""
        named, models = fields.get("model"), self._models or self._adapters.keys()
        model = model_of_adapter(named, self._adapters, models) if isinstance(named, str) else None
        if model is None:
            check_adapter(fields.get("adapter"), self._model_of(fields, is_adapter=True), self._adapters)
            return {}
        check_one_adapter(fields, str(named))
        return {"model": model, "adapter": named}

    def _model_of(self, fields: Mapping[str, Any], *, is_adapter: bool = False) -> str:
        named = fields.get("model")
        if not isinstance(named, str) or not named:  # the check of the parameters refuses it, if it is given
            return self._model_name
        model = served_name(named)
        if model is None:
            return self._model_name  # refused by the same check
        if self._models is not None and model not in self._models and not is_adapter:
            raise InvalidRequest("model", show(named), f"one that is served: {', '.join(sorted(self._models))}")
        return model


def _prompts(value: Any) -> list[Any] | None:
    """The prompts of a request with a list of them; None for any other prompt, which `Submitter.prepare` checks."""
    if not isinstance(value, list) or not any(isinstance(item, (str, list)) for item in value):
        return None
    return split_prompts(value)[0]


def _check_names(fields: Mapping[Any, Any]) -> None:
    """Refuse a field that no request has. Raises InvalidRequest."""
    for name in fields.keys() - _KNOWN_NAMES:
        if name not in FOREIGN and not is_gap(fields[name]):
            expected = f"{advice(name, PUBLIC_NAMES)}; --prompt-column prompt passes all other fields to the output"
            raise InvalidRequest(show_name(name), "a field that no request has", expected)


def json_kind(value: Any) -> str:
    """The kind of a value, in the words of JSON."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    return "a number" if isinstance(value, (int, float)) else f"a value of type {type(value).__name__}"


def _check_custom_id(value: Any) -> str:
    if not isinstance(value, str) or not 0 < len(value) <= MAX_CUSTOM_ID or not is_unicode(value):
        raise InvalidRequest("custom_id", show(value), f"text of 1 to {MAX_CUSTOM_ID} characters")
    return value
