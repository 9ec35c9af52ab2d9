"""Requests and responses of /v1/chat/completions, without a worker."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from openai.types.chat import ChatCompletion, ChatCompletionChunk

from headrace.client.batch.endpoints import CHAT
from headrace.client.batch.items import BatchItem
from headrace.client.batch.openai_chat import chat_completion, chat_fields, chat_logprobs, token_bytes
from headrace.client.batch.output_lines import output_line
from headrace.client.http.completion_answer import ChatChunks, encode_answer, encode_part
from headrace.client.http.completion_request import parse_completion_request
from headrace.client.http.schemas import ChatCompletion as AnswerSchema
from headrace.client.http.schemas import ChatCompletionChunk as ChunkSchema
from headrace.client.jobs.stream import Event
from headrace.client.wire.errors import InvalidRequest, JobFailed
from headrace.client.wire.results import Choice, Result, Timings, TokenLogprob, TopLogprob, Usage
from tests.http_app import HttpApp

MESSAGES = [{"role": "user", "content": "Hello."}]
SCORES = [
    TokenLogprob(token_id=1, token="Hé", logprob=-0.5, top=[TopLogprob(token_id=1, token="Hé", logprob=-0.5)]),
    TokenLogprob(token_id=2, token=r"bytes:\xf0\x9f", logprob=float("-inf")),
]


def result(scores: list[TokenLogprob] | None = None) -> Result:
    choices = [
        Choice(index=0, text="Hi", token_ids=[1], finish_reason="stop", stop_reason="x", logprobs=scores),
        Choice(index=1, text="", token_ids=[], finish_reason="length", logprobs=scores and []),
    ]
    usage = Usage(prompt_tokens=3, completion_tokens=1, total_tokens=4)
    timings = Timings(waiting_s=0, prefill_s=0, decode_s=0)
    return Result(id="job", model="demo", choices=choices, usage=usage, seed=7, timings=timings, fingerprint="f")


def events(data: bytes) -> list[Any]:
    return [json.loads(event.removeprefix("data: ")) for event in data.decode().split("\n\n")[:-1]]


@pytest.mark.parametrize(
    ("body", "params"),
    [
        ({}, {}),
        ({"logprobs": True}, {"logprobs": 0}),
        ({"logprobs": True, "top_logprobs": 3.0}, {"logprobs": 3}),
        ({"logprobs": True, "top_logprobs": None}, {"logprobs": 0}),
        ({"logprobs": False, "top_logprobs": 0}, {}),
        ({"logprobs": None, "top_logprobs": None}, {}),
        ({"max_completion_tokens": 5}, {"max_tokens": 5}),
        ({"tools": [], "tool_choice": "none", "response_format": {"type": "text"}, "functions": None}, {}),
        ({"n": 2, "stop": "x", "seed": 3, "user": "u"}, {"n": 2, "stop": "x", "seed": 3}),
        ({"echo": False, "prompt": None, "stream": False, "parallel_tool_calls": True}, {}),
        ({"verbosity": "medium", "audio": None, "include_reasoning": True, "prompt_cache_retention": "24h"}, {}),
    ],
)
def test_parameters_of_a_chat_become_those_of_the_client(body: dict[str, Any], params: dict[str, Any]) -> None:
    parsed = parse_completion_request({"messages": MESSAGES, **body}, CHAT)
    assert (parsed.sources, parsed.params, parsed.endpoint) == ([MESSAGES], params, CHAT)
    assert chat_fields({"messages": MESSAGES, **body}) == {**params, "messages": MESSAGES}


WRONG: list[tuple[dict[str, Any], str, str]] = [
    ({}, "messages", "got nothing"),
    ({"messages": []}, "messages", "an empty list"),
    ({"messages": None}, "messages", "got nothing"),
    ({"prompt": "a"}, "prompt", "send a prompt to /v1/completions"),
    ({"prompt": ["a"], "messages": MESSAGES}, "prompt", "which takes messages"),
    ({"messages": MESSAGES, "logprobs": 3}, "logprobs", "top_logprobs, from 0 to 20, is the number"),
    ({"messages": MESSAGES, "top_logprobs": 3}, "top_logprobs", "logprobs=True"),
    ({"messages": MESSAGES, "logprobs": False, "top_logprobs": 3}, "top_logprobs", "logprobs=True"),
    ({"messages": MESSAGES, "logprobs": True, "top_logprobs": 21}, "top_logprobs", "from 0 to 20"),
    ({"messages": MESSAGES, "logprobs": True, "top_logprobs": True}, "top_logprobs", "from 0 to 20"),
    ({"messages": MESSAGES, "echo": True}, "echo", "the new message alone"),
    ({"messages": MESSAGES, "stream_options": {"include_usage": True}}, "stream_options", "only with stream"),
]
#: What the client refuses of the fields that the route hands on.
REFUSED: list[tuple[dict[str, Any], str, str]] = [
    ({"messages": MESSAGES, "tools": [{"type": "function"}]}, "tools", "no such parameter, except []"),
    ({"messages": MESSAGES, "tool_choice": "required"}, "tool_choice", "'none' or 'auto'"),
    ({"messages": MESSAGES, "functions": [{}]}, "functions", "no such parameter"),
    (
        {"messages": MESSAGES, "add_special_tokens": True},
        "add_special_tokens",
        "the chat template writes special tokens",
    ),
    (
        {"messages": MESSAGES, "parse_special_tokens": False},
        "parse_special_tokens",
        "the chat template writes special tokens",
    ),
    ({"messages": MESSAGES, "prediction": {"type": "content"}}, "prediction", "no such parameter"),
    ({"messages": MESSAGES, "web_search_options": {}}, "web_search_options", "no such parameter"),
    ({"messages": MESSAGES, "temperature": 3}, "temperature", "to 2"),
    ({"messages": MESSAGES, "n": 8, "max_tokens": 10**6, "logprobs": True}, "top_logprobs", "lower one of them"),
]


@pytest.mark.parametrize(("body", "field", "part"), WRONG, ids=[f"{i}" for i in range(len(WRONG))])
def test_an_invalid_form_is_named(body: dict[str, Any], field: str, part: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        parse_completion_request(body, CHAT)
    assert caught.value.field == field
    assert part in str(caught.value)


def test_a_request_for_text_has_no_messages() -> None:
    with pytest.raises(InvalidRequest, match=r"^messages: .*send messages to /v1/chat/completions"):
        parse_completion_request({"prompt": "a", "messages": MESSAGES})
    with pytest.raises(InvalidRequest, match=r"^messages: .*send messages to /v1/chat/completions"):
        parse_completion_request({"messages": MESSAGES})
    with pytest.raises(InvalidRequest, match=r"^prompt: got nothing"):
        parse_completion_request({"max_tokens": 5})
    assert parse_completion_request({"prompt": "a", "messages": []}).sources == ["a"]


def test_an_answer_has_the_shape_of_openais() -> None:
    (part,) = [encode_part(0, result(SCORES), endpoint=CHAT)]
    found = json.loads(encode_answer([part]))
    assert {**found, "created": 0} == {**json.loads(json.dumps(chat_completion(result(SCORES)))), "created": 0}
    AnswerSchema.model_validate(found, strict=True, extra="forbid")
    answer = ChatCompletion.model_validate(found, strict=True)
    assert (answer.id, answer.object, answer.model) == ("chatcmpl-job", "chat.completion", "demo")
    first, second = answer.choices
    assert (first.message.role, first.message.content, first.finish_reason) == ("assistant", "Hi", "stop")
    assert (second.message.content, second.finish_reason) == ("", "length")
    assert found["choices"][0]["stop_reason"] == "x"
    assert first.logprobs is not None
    assert first.logprobs.content is not None
    assert [(t.token, t.logprob, t.bytes) for t in first.logprobs.content] == [
        ("Hé", -0.5, [72, 195, 169]),
        (r"bytes:\xf0\x9f", -9999.0, [240, 159]),
    ]
    assert [top.token for top in first.logprobs.content[0].top_logprobs] == ["Hé"]
    assert json.loads(encode_answer([encode_part(0, result(), endpoint=CHAT)]))["choices"][0]["logprobs"] is None


def test_tokens_are_named_by_their_ids_if_it_is_requested() -> None:
    found = chat_logprobs(SCORES, as_token_ids=True)
    assert found is not None
    assert [(t["token"], t["bytes"]) for t in found["content"]] == [
        ("token_id:1", [72, 195, 169]),
        ("token_id:2", [240, 159]),
    ]
    assert found["content"][0]["top_logprobs"][0]["token"] == "token_id:1"
    assert (token_bytes("token_id:50300"), token_bytes("bytes: no"), token_bytes("")) == (None, b"bytes: no", b"")


def test_a_stream_has_the_role_then_text_then_the_reason() -> None:
    chunks = ChatChunks("job", "demo", 2, include_usage=True)
    pieces = [
        Event(0, "He", [1], SCORES[:1]),
        Event(1, "", [5]),
        Event(0, "y", [2], finish_reason="stop", stop_reason="x", complete=False),
    ]
    found = events(b"".join(chunks.encode(0, piece) for piece in pieces))
    found += events(chunks.encode(0, Event(1, "", [], [], finish_reason="length"), result()))
    found += events(chunks.encode_end([result()]).removesuffix(b"data: [DONE]\n\n"))
    for chunk in found:
        ChatCompletionChunk.model_validate(chunk, strict=True)
        ChunkSchema.model_validate(chunk, strict=True, extra="forbid")
    assert {chunk["id"] for chunk in found} == {"chatcmpl-job"}
    role = {"role": "assistant", "content": "", "refusal": None}
    choices = [choice for chunk in found for choice in chunk["choices"]]
    assert [(choice["index"], choice["delta"], choice["finish_reason"]) for choice in choices] == [
        (0, role, None),
        (0, {"content": "He"}, None),
        (1, role, None),
        (1, {"content": ""}, None),
        (0, {"content": "y"}, None),
        (0, {}, "stop"),
        (1, {}, "length"),
    ]
    assert choices[1]["logprobs"] == chat_logprobs(SCORES[:1])
    assert choices[5]["stop_reason"] == "x"
    assert [choice.get("complete") for choice in choices] == [None] * 5 + [False, None]
    assert [chunk.get("seed") for chunk in found] == [None] * 6 + [7, 7]
    assert (found[-1]["choices"], found[-1]["usage"]["total_tokens"]) == ([], 4)
    assert [chunk["usage"] for chunk in found[:-1]] == [None] * 7


def test_a_row_of_a_batch_is_answered_in_the_form_of_its_endpoint() -> None:
    row = BatchItem(1, "a", {}, "0" * 16, endpoint=CHAT.path)
    body = json.loads(output_line(row, "job", result(SCORES)))["response"]["body"]
    ChatCompletion.model_validate(body, strict=True)
    failed = json.loads(output_line(row, "job", JobFailed("context_length_exceeded", "too long")))
    assert failed["response"]["body"]["error"]["param"] == "messages"
    failed = json.loads(output_line(row, "job", JobFailed("no_chat_template", "the model has none")))
    assert (failed["response"]["status_code"], failed["error"]) == (400, None)


@pytest.mark.parametrize(("body", "field", "part"), [*WRONG, *REFUSED], ids=str)
def test_the_route_names_what_is_wrong(tmp_path: Path, body: dict[str, Any], field: str, part: str) -> None:
    app = HttpApp(tmp_path)
    answer = app.ask("POST", CHAT.path, body)
    error = answer.json()["error"]
    assert (answer.status, error["param"], error["code"]) == (400, field, "invalid_request")
    assert part in error["message"]
    app.close()
