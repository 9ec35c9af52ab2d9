"""`structured_outputs`, `allowed_token_ids` and `bad_words`: what a request may hold, and where it is refused."""

from __future__ import annotations

import importlib.util
from typing import Any

import pytest

from headrace.client import Client, InvalidRequest
from headrace.client.batch.openai import completion_fields
from headrace.client.jobs import request_checks
from headrace.client.wire import constraints
from headrace.client.wire.requests import parse_request
from headrace.config import Settings

FORMS: list[tuple[dict[str, Any], dict[str, Any]]] = [
    ({"choice": ("a", "b", "a"), "regex": None}, {"choice": ["a", "b"]}),
    ({"regex": "[a-z]+", "disable_fallback": True, "whitespace_pattern": None}, {"regex": "[a-z]+"}),
    ({"json": '{"type": "object"}'}, {"json": {"type": "object"}}),
    ({"json": True}, {"json": {}}),
    ({"json_object": True}, {"json": {"type": "object"}}),
    ({"grammar": 'start: "a"'}, {"grammar": 'start: "a"'}),
]
DEEP: dict[str, Any] = {}
for _ in range(constraints.MAX_SCHEMA_DEPTH):
    DEEP = {"items": DEEP}
REFUSED: list[tuple[Any, str, str]] = [
    ("[a-z]", "structured_outputs", "a map with one of choice, regex"),
    ({"choice": ["a"], "regex": "a"}, "structured_outputs", "got 2 forms"),
    ({"rege": "a"}, "structured_outputs.rege", "no such form"),
    ({"structural_tag": {}}, "structured_outputs.structural_tag", "no such option"),
    ({"choice": []}, "structured_outputs.choice", "a list of 1 to 1024 texts"),
    ({"choice": ["a", 5]}, "structured_outputs.choice[1]", "got 5; expected a text"),
    ({"choice": ["a\ud800"]}, "structured_outputs.choice[0]", "valid Unicode"),
    ({"choice": ["a" * 40_000]}, "structured_outputs.choice", "got texts of 40000 bytes"),
    ({"regex": 5}, "structured_outputs.regex", "a regular expression"),
    ({"regex": "a" * 9_000}, "structured_outputs.regex", "at most 8192 bytes"),
    ({"json": "{"}, "structured_outputs.json", "the text is not JSON"),
    ({"json": False}, "structured_outputs.json", "an object, or its JSON text"),
    ({"json": [1]}, "structured_outputs.json", "an object, or its JSON text"),
    ({"json": {"const": float("nan")}}, "structured_outputs.json", "values must be those of JSON"),
    ({"json": {"const": object()}}, "structured_outputs.json", "values must be those of JSON"),
    ({"json": DEEP | {"items": DEEP}}, "structured_outputs.json", "at most 64 levels"),
    ({"json": {"description": "a" * 70_000}}, "structured_outputs.json", "at most 65536 bytes"),
    ({"json": {"anyOf": [{"$ref": "#"}] * 201}}, "structured_outputs.json", "at most 200 times $ref"),
    ({"json_object": "yes"}, "structured_outputs.json_object", "expected True"),
    ({"grammar": "".join(f"r{i}: r{i + 1}\n" for i in range(301))}, "structured_outputs.grammar", "at most 300 rules"),
]
#: What the library says, with the place.
UNREADABLE: list[tuple[dict[str, Any], str, str]] = [
    ({"regex": "ab(c"}, "regex", "unclosed group, at character 2"),
    ({"regex": "[z-a]"}, "regex", "invalid character class range, the start must be <= the end, at character 1"),
    ({"regex": r"(a)\1"}, "regex", "backreferences are not supported, at character 3"),
    ({"regex": "(?=a)b"}, "regex", "look-around"),
    ({"regex": "a$b"}, "regex", "the whole text must match"),
    ({"json": {"type": "strin"}}, "json", "Invalid type: strin"),
    ({"json": {"not": {}}}, "json", 'Unimplemented keys: ["not"]'),
    ({"json": {"type": "integer", "minimum": 5, "maximum": 3}}, "json", "minimum (5) is greater than maximum (3)"),
    ({"grammar": "start: word"}, "grammar", 'unknown name: "word", in line 1, column 8'),
    ({"grammar": 'begin: "a"'}, "grammar", "no start rule found"),
    ({"json": {"required": "\N{THUMBS UP SIGN}" * 40}}, "json", "llguidance cannot read it"),  # it panics
]


@pytest.fixture(scope="module")
def client() -> Client:
    """Preparing a job sends nothing, so no Redis is needed."""
    return Client(settings=Settings(redis_url="redis://localhost:1/0"))


@pytest.mark.parametrize(("given", "sent"), FORMS)
def test_a_form_goes_over_the_wire_by_its_kind(client: Client, given: dict[str, Any], sent: dict[str, Any]) -> None:
    wire = client.submitter.prepare({"prompt": "a", "structured_outputs": given}).wire
    assert wire["structured_outputs"] == sent
    assert parse_request(wire).to_wire() == wire


@pytest.mark.parametrize(("form", "field", "part"), REFUSED)
def test_a_form_that_is_none_is_refused_with_its_place(form: Any, field: str, part: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        parse_request({"prompt": "a", "structured_outputs": form})
    assert caught.value.field == field
    assert part in str(caught.value)


@pytest.mark.parametrize(("form", "kind", "part"), UNREADABLE)
def test_submit_refuses_what_the_library_cannot_read(client: Client, form: Any, kind: str, part: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        client.submitter.prepare({"prompt": "a", "structured_outputs": form})
    assert caught.value.field == f"structured_outputs.{kind}"
    assert part in caught.value.expected


def test_where_the_library_is_missing_the_error_says_what_to_install(
    client: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(request_checks, "find_spec", lambda name: None if name == "llguidance" else name)
    request_checks._reason.cache_clear()
    with pytest.raises(InvalidRequest, match=r"pip install '\.\[structured\]' -c constraints\.txt"):
        client.submitter.prepare({"prompt": "a", "structured_outputs": {"regex": "a"}})
    client.submitter.prepare({"prompt": "a", "structured_outputs": {"choice": ["a"]}})  # needs no reader
    request_checks._reason.cache_clear()
    assert importlib.util.find_spec("llguidance")


def test_a_request_for_no_tokens_has_no_form() -> None:
    with pytest.raises(InvalidRequest, match="max_tokens: got 0; expected at least 1 beside structured_outputs"):
        parse_request({"prompt": "a", "max_tokens": 0, "echo": True, "structured_outputs": {"choice": ["a"]}})


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        ({"type": "text"}, None),
        (None, None),
        ({"type": "json_object"}, {"json_object": True}),
        ({"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "null"}}}, {"json": {"type": "null"}}),
    ],
)
def test_response_format_is_a_form(body: Any, expected: Any) -> None:
    fields = completion_fields({"prompt": "a", "response_format": body})
    assert fields == {"prompt": "a"} | ({} if expected is None else {"structured_outputs": expected})


@pytest.mark.parametrize(
    ("body", "field"),
    [
        ({"response_format": {"type": "grammar"}}, "response_format"),
        ({"response_format": "json"}, "response_format"),
        ({"response_format": {"type": "json_schema"}}, "response_format.json_schema"),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"schema": 5}}},
            "response_format.json_schema.schema",
        ),
        ({"response_format": {"type": "json_object"}, "structured_outputs": {"regex": "a"}}, "response_format"),
    ],
)
def test_another_response_format_is_refused_by_name(body: dict[str, Any], field: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        completion_fields({"prompt": "a", **body})
    assert caught.value.field == field
