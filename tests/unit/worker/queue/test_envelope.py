"""The envelope around a message, which anybody may have written."""

from __future__ import annotations

import base64
import json
from typing import Any

import pytest

from headrace.worker.queue.dead_letters import jobs_in_text
from headrace.worker.queue.envelope import check_unacked_entry, read_envelope

GOOD: dict[str, Any] = {"body": "", "headers": {}, "properties": {"delivery_info": {}, "priority": 3}}


def without(path: str, value: Any) -> dict[str, Any]:
    """A valid envelope with another value at a path such as `properties.priority`."""
    envelope = json.loads(json.dumps(GOOD))
    *outer, name = path.split(".")
    place = envelope
    for step in outer:
        place = place[step]
    place[name] = value
    return dict(envelope)


@pytest.mark.parametrize("priority", [None, 3.0, 0, 9])
def test_a_priority_may_be_null_or_a_whole_float(priority: Any) -> None:
    envelope = without("properties.priority", priority)
    assert read_envelope(json.dumps(envelope)) == envelope


@pytest.mark.parametrize("text", [json.dumps(GOOD), json.dumps(GOOD).encode()])
def test_a_good_envelope_is_read_from_text_or_bytes(text: str | bytes) -> None:
    assert read_envelope(text) == GOOD


@pytest.mark.parametrize(
    ("path", "value", "reason"),
    [
        ("body", None, "its body is of type NoneType; expected str"),
        ("headers", [], "its headers is of type list; expected dict"),
        ("properties", "x", "its properties are missing"),
        ("properties.delivery_info", 1, "its delivery_info is of type int; expected dict"),
        ("properties.priority", "high", "its priority is of type str; expected int"),
        ("properties.priority", 3.5, "its priority is of type float; expected int"),
        ("properties.delivery_tag", "\ud83d", "its properties.delivery_tag: got an unpaired surrogate"),
        ("properties.body_encoding", 7, "its body_encoding is of type int; expected str"),
    ],
)
def test_what_is_wrong_is_named(path: str, value: Any, reason: str) -> None:
    envelope = without(path, value)
    with pytest.raises(ValueError, match=reason):
        read_envelope(json.dumps(envelope))
    with pytest.raises(ValueError, match=reason):
        check_unacked_entry(json.dumps([envelope, "", "queue"]))


@pytest.mark.parametrize("text", [b"\xff\xfe", "not json", '{"__type__": "x", "__value__": 1}', "[]", "7"])
def test_text_that_is_no_envelope_is_refused(text: str | bytes) -> None:
    with pytest.raises(ValueError, match=r"it is not "):
        read_envelope(text)


@pytest.mark.parametrize("entry", ["{", "[]", json.dumps(GOOD), json.dumps([GOOD, ""])])
def test_an_unacknowledged_entry_has_three_parts(entry: str) -> None:
    with pytest.raises(ValueError, match=r"it is not "):
        check_unacked_entry(entry)


def test_the_jobs_of_a_message_are_found_though_its_envelope_is_wrong() -> None:
    one = {"headers": {"task": "headrace.generate", "id": "one"}, "properties": {"priority": "high"}, "body": {}}
    body = base64.b64encode(json.dumps([[[{"id": "a"}, {"id": "b"}]], {}, {}]).encode()).decode()
    many = {"headers": {"task": "headrace.generate_many", "id": "many"}, "body": body}
    assert jobs_in_text(json.dumps(one).encode()) == ["one"]
    assert jobs_in_text(json.dumps([one, "", "queue"])) == ["one"]
    assert jobs_in_text(json.dumps(many).encode()) == ["a", "b"]


@pytest.mark.parametrize(
    "text", [b"\xff", b"{", "[]", "7", '{"headers": []}', '{"headers": {"id": "\\ud83d"}}', "[" * 9_999]
)
def test_a_text_that_names_no_job_raises_nothing(text: str | bytes) -> None:
    assert jobs_in_text(text) == []
