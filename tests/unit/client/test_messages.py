"""Messages in a request: what is accepted, what is refused with its place, and that no error quotes a text."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pandas as pd
import pytest

from headrace.client import Client, InvalidRequest
from headrace.client.batch.items import BatchItem
from headrace.client.batch.rows import ItemReader
from headrace.client.wire.messages import MAX_MESSAGES, MAX_MESSAGES_BYTES
from headrace.client.wire.requests import CHAT_NAMES, GenerateRequest, parse_request
from headrace.config import Settings

USER = {"role": "user", "content": "my secret"}
SECRET = "my secret"


@pytest.mark.parametrize(
    ("fields", "field", "part"),
    [
        ({"messages": "my secret"}, "messages", "a value of type str"),
        ({"messages": {"role": "user", "content": "my secret"}}, "messages", "a list of 1 to"),
        ({"messages": []}, "messages", "a list of 0 messages"),
        ({"messages": [USER] * (MAX_MESSAGES + 1)}, "messages", "1025 messages"),
        ({"messages": [{"role": "user", "content": "my secret " * 20_000}]}, "messages", "at most 131072 bytes"),
        ({"messages": ["my secret"]}, "messages[0]", "an object with role and content"),
        ({"messages": [USER, {"content": "my secret"}]}, "messages[1].role", "got nothing"),
        ({"messages": [{"role": 5, "content": "my secret"}]}, "messages[0].role", "type int"),
        ({"messages": [{"role": "my secret" * 10, "content": "a"}]}, "messages[0].role", "a str of length 90"),
        ({"messages": [{"role": ""}]}, "messages[0].role", "a str of length 0"),
        ({"messages": [{"role": "user"}]}, "messages[0].content", "text, or a list of parts"),
        ({"messages": [{"role": "user", "content": None}]}, "messages[0].content", "nothing"),
        ({"messages": [{"role": "user", "content": 5}]}, "messages[0].content", "type int"),
        ({"messages": [{"role": "user", "content": []}]}, "messages[0].content", "length 0"),
        ({"messages": [{"role": "user", "content": ["my secret"]}]}, "messages[0].content[0]", "'type': 'text'"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": SECRET}}]}]},
            "messages[0].content[0]",
            "a part of type 'image_url'",
        ),
        (
            {"messages": [{"role": "user", "content": [{"type": "text", "text": 5}]}]},
            "messages[0].content[0]",
            "type dict",
        ),
        ({"messages": [{"role": "user", "content": "\ud83d"}]}, "messages[0].content", "U+D83D"),
        ({"messages": [{**USER, "x": object()}]}, "messages", "JSON cannot represent"),
        ({"messages": [{**USER, "x": float("nan")}]}, "messages", "JSON cannot represent"),
        ({"messages": [{**USER, 5: 1}]}, "messages[0]", "a key of type int"),
        ({"prompt": "my secret", "messages": [USER]}, "messages", "one of the two"),
        ({"prompt": "", "messages": [USER]}, "messages", "one of the two"),
        ({}, "prompt", "or messages"),
        ({"prompt": "a", "continue_final_message": True}, "continue_final_message", "messages beside it"),
        ({"prompt": "a", "chat_template_kwargs": {"a": SECRET}}, "chat_template_kwargs", "messages beside it"),
        ({"messages": [USER], "chat_template_kwargs": SECRET}, "chat_template_kwargs", "type str"),
        ({"messages": [USER], "chat_template_kwargs": {"a b": 1}}, "chat_template_kwargs", "a key a b"),
        ({"messages": [USER], "chat_template_kwargs": {"messages": 1}}, "chat_template_kwargs.messages", "the field"),
        (
            {"messages": [USER], "chat_template_kwargs": {"chat_template": "a"}},
            "chat_template_kwargs.chat_template",
            "",
        ),
        ({"messages": [USER], "add_generation_prompt": "yes"}, "add_generation_prompt", "True or False"),
        (
            {"messages": [USER], "add_generation_prompt": True, "continue_final_message": True},
            "add_generation_prompt",
            "one of the two",
        ),
        ({"messages": [USER], "parse_special_tokens": False}, "parse_special_tokens", "the chat template writes"),
        ({"messages": [USER], "add_special_tokens": True}, "add_special_tokens", "the chat template writes"),
        ({"messages": [USER], "tools": [{}]}, "tools", "chat_template_kwargs"),
        ({"prompt": "a", "operation": "sing"}, "operation", "'tokenize'"),
        ({"prompt": "a", "operation": "detokenize"}, "token_ids", "a list of"),
    ],
)
def test_a_wrong_chat_is_refused_with_its_place(fields: dict[str, Any], field: str, part: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        parse_request(fields)
    assert caught.value.field == field
    assert part in str(caught.value)
    assert SECRET not in str(caught.value)


def test_a_chat_survives_the_wire_without_a_prompt() -> None:
    fields = {
        "messages": [USER, {"role": "assistant", "content": [{"type": "text", "text": "é"}], "name": "x"}],
        "continue_final_message": True,
        "chat_template_kwargs": {"date": "today", "tools": [{"a": None}]},
        "skip_special_tokens": False,
        "max_tokens": 3,
    }
    request = parse_request(fields)
    wire = json.loads(json.dumps(request.to_wire()))
    assert wire == {"schema_version": 1, **fields}
    assert parse_request(wire) == request
    assert not request.begins_answer
    assert parse_request({"messages": [USER]}).begins_answer


def test_the_fields_of_old_messages_mean_what_they_meant() -> None:
    request = parse_request({"schema_version": 1, "prompt": "Hello."})
    assert (request.parse_special_tokens, request.skip_special_tokens, request.messages) == (None, True, None)
    assert request.to_wire() == {"schema_version": 1, "prompt": "Hello."}
    assert parse_request({"prompt": ""}).to_wire() == {"schema_version": 1, "prompt": ""}


def test_an_older_worker_refuses_what_it_does_not_know() -> None:
    """Every field that changes a text is on the wire under a name that older workers have not."""
    old = set(GenerateRequest.model_fields) - CHAT_NAMES - {"parse_special_tokens", "skip_special_tokens"}
    assert not {"messages", "parse_special_tokens"} & old
    assert "parse_special_tokens" in parse_request({"prompt": "a", "parse_special_tokens": True}).to_wire()


def test_messages_from_tables_are_plain_json() -> None:
    """Parquet gives each row the keys of all rows, and lists as arrays."""
    messages = np.array([{"role": "user", "content": "a", "name": None}, {"role": "user", "content": "b"}])
    given = parse_request({"messages": messages, "prompt": pd.NA}).messages
    assert given == [{"role": "user", "content": "a"}, {"role": "user", "content": "b"}]
    parts = np.array([{"type": "text", "text": "a", "image_url": None}])
    given = parse_request({"messages": ({"role": "user", "content": parts},)}).messages
    assert given == [{"role": "user", "content": [{"type": "text", "text": "a"}]}]


def test_the_size_of_messages_is_counted_in_bytes() -> None:
    room = MAX_MESSAGES_BYTES - len(json.dumps([{"role": "user", "content": ""}]))
    assert parse_request({"messages": [{"role": "user", "content": "é" * (room // 2)}]})
    with pytest.raises(InvalidRequest, match="131073 bytes"):
        parse_request({"messages": [{"role": "user", "content": "a" * (room + 1)}]})


def test_jobs_with_messages_share_no_parameters_with_the_one_before() -> None:
    with Client(settings=Settings(redis_url="redis://localhost:1/0")) as client:
        messages = [USER]
        rows = [{"messages": messages, "max_tokens": 3}, {"messages": messages, "max_tokens": 3}, {"prompt": "a"}]
        jobs = list(client.submitter.prepare_all(rows))
        assert [job.request.messages for job in jobs] == [[USER], [USER], None]
        signature = client.signature(messages=[USER], id="one", max_tokens=3)
        assert signature.args[0]["messages"] == [USER]
        assert SECRET not in signature.options["argsrepr"]


def test_a_line_of_a_batch_may_have_messages() -> None:
    row = ItemReader("demo", {}).read(1, json.dumps({"messages": [USER], "max_tokens": 3}).encode())
    assert isinstance(row, BatchItem)
    assert row.fields["messages"] == [USER]
    assert "prompt" not in row.fields
    other = ItemReader("demo", {}).read(
        1, json.dumps({"messages": [{**USER, "content": "b"}], "max_tokens": 3}).encode()
    )
    assert isinstance(other, BatchItem)
    assert other.digest != row.digest
