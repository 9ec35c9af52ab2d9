"""Requests and responses of /v1/completions, without a queue."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator
from types import SimpleNamespace
from typing import Any
from unittest.mock import AsyncMock

import pytest

from headrace.client.batch.openai import completion, join_results
from headrace.client.http.batch_objects import parse_batch_request
from headrace.client.http.completion_answer import CompletionChunks, encode_answer, encode_part, stream_chunks
from headrace.client.http.completion_request import parse_completion_request
from headrace.client.http.jobs import as_request_field
from headrace.client.jobs.stream import Event
from headrace.client.wire.errors import InvalidRequest
from headrace.client.wire.results import Choice, Result, Timings, TokenLogprob, Usage


def result(number: int, samples: int = 2) -> Result:
    return Result(
        id=f"job{number}",
        model="demo",
        choices=[Choice(index=i, text=f"{number}.{i}", token_ids=[1], finish_reason="stop") for i in range(samples)],
        usage=Usage.of(number, 2, cached_tokens=128 if number == 1 else 0),
        seed=7 + number,
        timings=Timings(waiting_s=0, prefill_s=0, decode_s=0),
        fingerprint="same",
    )


@pytest.mark.parametrize(
    ("prompt", "prompts", "listed"),
    [
        ("a", ["a"], False),
        ("", [""], False),
        (None, [""], False),
        ([1, 2], [[1, 2]], False),
        (["a", "b"], ["a", "b"], True),
        (["a"], ["a"], True),
        ([[1], [2, 3]], [[1], [2, 3]], True),
    ],
)
def test_prompts_come_in_four_forms(prompt: Any, prompts: list[Any], listed: bool) -> None:
    order = parse_completion_request({"prompt": prompt, "n": 2, "user": "u", "stop": None})
    assert (order.sources, order.is_list, order.params) == (prompts, listed, {"n": 2})
    assert not order.stream


@pytest.mark.parametrize(
    ("body", "field"),
    [
        ({}, "prompt"),
        ({"prompt": []}, "prompt"),
        ({"prompt": {}}, "prompt"),
        ({"prompt": ["a", 1]}, "prompt"),
        ({"prompt": [[1], "a"]}, "prompt"),
        ({"prompt": ["a"] * 1025}, "prompt"),
        ({"prompt": "a", "stream": 1}, "stream"),
        ({"prompt": "a", "return_tokens_as_token_ids": "yes"}, "return_tokens_as_token_ids"),
        ({"prompt": "a", "stream_options": {"include_usage": True}}, "stream_options"),
        ({"prompt": "a", "stream": True, "stream_options": []}, "stream_options"),
        ({"prompt": "a", "stream": True, "stream_options": {"include_usage": 1}}, "stream_options.include_usage"),
    ],
)
def test_an_invalid_form_is_named(body: dict[str, Any], field: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        parse_completion_request(body)
    assert caught.value.field == field


def test_fields_that_ask_for_nothing_are_left_out() -> None:
    nothing = {"suffix": "", "best_of": 1, "n": None, "use_beam_search": False, "detokenize": True,
               "priority": 0, "response_format": {"type": "text"}, "stream": None, "stream_options": None}  # fmt: skip
    assert parse_completion_request({"prompt": "a", **nothing}) == parse_completion_request({"prompt": "a"})
    for options in ({}, {"include_usage": False}, None):
        assert not parse_completion_request({"prompt": "a", "stream_options": options}).include_usage
    options = {"include_usage": None, "include_obfuscation": True}
    assert not parse_completion_request({"prompt": "a", "stream": True, "stream_options": options}).include_usage


def test_max_completion_tokens_is_another_name_of_max_tokens() -> None:
    for body in ({"max_completion_tokens": 5.0}, {"max_completion_tokens": 5, "max_tokens": 5}, {"max_tokens": 5.0}):
        params = parse_completion_request({"prompt": "a", **body}).params
        assert params == {"max_tokens": 5}
        assert type(params["max_tokens"]) is int
    for wrong in ({"max_tokens": 6}, {"max_tokens": "5"}, {"max_completion_tokens": 5.5}, {"max_completion_tokens": 0}):
        with pytest.raises(InvalidRequest, match=r"^max_completion_tokens: got \d"):
            parse_completion_request({"prompt": "a", "max_completion_tokens": 5, **wrong})
    with pytest.raises(InvalidRequest, match="True"):
        parse_completion_request({"prompt": "a", "max_completion_tokens": True, "max_tokens": 1})


@pytest.mark.parametrize(
    ("field", "listed", "named"),
    [
        ("top_p", False, "top_p"),
        ("prompt", False, "prompt"),
        ("requests[3].top_p", True, "top_p"),
        ("requests[3].prompt", True, "prompt[3]"),
    ],
)
def test_the_field_at_fault_is_named_as_the_client_wrote_it(field: str, listed: bool, named: str) -> None:
    assert as_request_field(InvalidRequest(field, "0", "more"), is_list=listed).field == named


def test_choices_are_numbered_prompt_by_prompt_and_usage_is_summed() -> None:
    found = json.loads(encode_answer([encode_part(i, result(i)) for i in range(3)]))
    assert [(c["index"], c["text"]) for c in found["choices"]] == [
        (0, "0.0"),
        (1, "0.1"),
        (2, "1.0"),
        (3, "1.1"),
        (4, "2.0"),
        (5, "2.1"),
    ]
    assert found["usage"] == {
        "prompt_tokens": 3,
        "completion_tokens": 6,
        "total_tokens": 9,
        "prompt_tokens_details": {"cached_tokens": 128},
    }
    assert (found["id"], found["seed"], found["system_fingerprint"]) == ("cmpl-job0", None, "same")
    assert json.loads(encode_answer([encode_part(0, result(1))]))["seed"] == 8


@pytest.mark.parametrize("value", [None, False, True])
def test_names_of_tokens_are_no_parameter_of_the_job(value: bool | None) -> None:
    order = parse_completion_request({"prompt": "a", "return_tokens_as_token_ids": value})
    assert (order.as_token_ids, order.params) == (bool(value), {})


@pytest.mark.parametrize("echo", [False, True])
def test_each_chunk_has_the_usage_so_far_if_it_is_requested(echo: bool) -> None:
    options = {"include_usage": True, "continuous_usage_stats": True}
    parsed = parse_completion_request({"prompt": "a", "stream": True, "stream_options": options, "echo": echo})
    assert parsed.continuous_usage
    chunks = CompletionChunks("job", "demo", 2, include_usage=True, continuous_usage=True, echo=echo)

    def usage(prompt: int, index: int, tokens: int, prompt_tokens: int | None) -> Any:
        event = Event(index, "a", [1] * tokens, prompt_tokens=prompt_tokens)
        return json.loads(chunks.encode(prompt, event).removeprefix(b"data: "))["usage"]

    def counts(prompt: int, completion: int) -> dict[str, int]:
        total = prompt + completion
        return {"prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": total}

    prompt = 3 if echo else 0
    assert usage(0, 0, prompt + 2, 3) == counts(3, 2)
    assert usage(0, 1, prompt + 1, 3) == counts(3, 1)
    assert usage(0, 0, 4, 3) == counts(3, 6)
    assert usage(1, 0, 1, None) is None  # from a worker of an earlier version


@pytest.mark.parametrize("options", [{"continuous_usage_stats": True}, {"include_usage": True}])
def test_usage_in_each_chunk_needs_both_options(options: dict[str, bool]) -> None:
    parsed = parse_completion_request({"prompt": "a", "stream": True, "stream_options": options})
    assert not parsed.continuous_usage


def test_offsets_that_an_older_worker_did_not_send_continue_where_the_last_piece_ended() -> None:
    chunks = CompletionChunks("job", "demo", 2, include_usage=False)

    def offsets(prompt: int, index: int, *tokens: str) -> tuple[int, list[int]]:
        scores = [TokenLogprob(token_id=1, token=token, logprob=-1.0) for token in tokens]
        data = chunks.encode(prompt, Event(index, "".join(tokens), [1] * len(tokens), scores))
        (choice,) = json.loads(data.removeprefix(b"data: "))["choices"]
        return choice["index"], choice["logprobs"]["text_offset"]

    assert offsets(0, 1, "ab", "c") == (1, [0, 2])
    assert offsets(1, 0, "abcd") == (2, [0])
    assert offsets(0, 1, "d", "e") == (1, [3, 4])
    assert chunks.encode_end([result(0)]) == b"data: [DONE]\n\n"


class Streams:
    """Jobs of two prompts whose events arrive mixed."""

    async def events(self, _: object) -> AsyncGenerator[tuple[int, Event]]:
        yield 0, Event(0, "a", [1], finish_reason="stop", stop_reason="x")
        yield 1, Event(0, "b", [1])
        yield 1, Event(1, "c", [1], finish_reason="length")
        yield 0, Event(1, "d", [1], finish_reason="stop", stop_reason=5)
        yield 0, Event(result=result(0))
        yield 1, Event(0, "e", [1], finish_reason="stop")
        yield 1, Event(result=result(1))


def test_the_last_chunk_of_each_prompt_names_what_its_text_depends_on() -> None:
    async def collect(*, include_usage: bool) -> list[Any]:
        jobs = [SimpleNamespace(result=AsyncMock(return_value=result(number))) for number in range(2)]
        chunks = CompletionChunks("job", "demo", 2, include_usage=include_usage)
        streamed = stream_chunks(Streams(), SimpleNamespace(jobs=jobs), chunks, 2)  # type: ignore[arg-type]
        data = b"".join([part async for part in streamed]).decode().removesuffix("data: [DONE]\n\n")
        return [json.loads(event.removeprefix("data: ")) for event in data.split("\n\n")[:-1]]

    found = asyncio.run(collect(include_usage=False))
    choices = [chunk["choices"][0] for chunk in found]
    assert [(choice["index"], choice["text"]) for choice in choices] == [
        (0, "a"),
        (2, "b"),
        (3, "c"),
        (1, "d"),
        (2, "e"),
    ]
    assert [choice.get("stop_reason", "") for choice in choices] == ["x", "", None, 5, None]
    assert [(chunk.get("seed"), chunk.get("system_fingerprint")) for chunk in found] == [
        *[(None, None)] * 3,
        (7, "same"),
        (8, "same"),
    ]
    last = asyncio.run(collect(include_usage=True))[-1]
    assert (last["seed"], last["system_fingerprint"]) == (None, "same")  # the prompts have different seeds


def test_choices_of_several_prompts_name_their_seeds() -> None:
    found = json.loads(encode_answer([encode_part(0, result(0)), encode_part(1, result(1))]))
    assert [choice["seed"] for choice in found["choices"]] == [7, 7, 8, 8]
    joined = completion(join_results([result(0), result(1)]))
    assert {**found, "created": 0} == {**joined, "created": 0}, "HTTP and batches write the same"
    assert "seed" not in json.loads(encode_answer([encode_part(0, result(0))]))["choices"][0]


BATCH = {"input_file_id": "file-0", "endpoint": "/v1/completions", "completion_window": "24h"}


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"metadata": {"a": 1}}, "metadata.a: got 1; expected at most 16 texts of at most 512 characters, with names"),
        ({"metadata": {"a": "x" * 513}}, "metadata.a: got 'xxx"),
        ({"metadata": {"n" * 65: "x"}}, f"metadata.{'n' * 65}: got 'nnn"),
        ({"metadata": []}, "metadata: got []; expected at most 16 texts"),
        ({"input_file_id": None}, "input_file_id: got nothing; expected the id of an uploaded file"),
        ({"input_file_id": 5}, "input_file_id: got 5; expected the id of an uploaded file"),
        (
            {"endpoint": "/v1/embeddings"},
            "endpoint: got '/v1/embeddings'; expected '/v1/completions' or '/v1/chat/completions'; the models",
        ),
        ({"completion_window": "1h"}, "completion_window: got '1h'; expected '24h'"),
        ({"output_expires_after": []}, "output_expires_after: got []; expected an object with anchor and seconds"),
        ({"output_expires_after": {"anchor": "x"}}, "output_expires_after.anchor: got 'x'; expected 'created_at'"),
        (
            {"output_expires_after": {"anchor": "created_at", "seconds": 60}},
            "output_expires_after.seconds: got 60; expected a whole number from 3600 to 2592000",
        ),
        ({"window": "24h"}, "window: got '24h'; expected one of input_file_id, endpoint, completion_window, metadata"),
    ],
    ids=str,
)
def test_a_wrong_field_of_a_batch_is_named_with_its_value(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        parse_batch_request({**BATCH, **fields})
    assert str(caught.value).startswith(message)


def test_null_and_whole_floats_pass_in_a_batch() -> None:
    nothing = {"metadata": None, "output_expires_after": None, "extra": None}
    assert parse_batch_request({**BATCH, **nothing}) == parse_batch_request(BATCH)
    expires = {"anchor": "created_at", "seconds": 3600.0}
    parsed = parse_batch_request({**BATCH, "output_expires_after": expires}).output_expires_after
    assert parsed is not None
    assert repr(parsed.seconds) == "3600"
