"""Requests and responses of /v1/completions, without a queue."""

from __future__ import annotations

import json
from typing import Any

import pytest

from headrace.client.http.jobs import as_request_field
from headrace.client.http.routes.completions import (
    ChunkEncoder,
    encode_completion,
    encode_part,
    parse_completion_request,
)
from headrace.client.jobs.stream import Event
from headrace.client.wire.errors import InvalidRequest
from headrace.client.wire.results import Choice, Result, Timings, TokenLogprob, Usage


def result(number: int, samples: int = 2) -> Result:
    return Result(
        id=f"job{number}",
        model="demo",
        choices=[Choice(index=i, text=f"{number}.{i}", token_ids=[1], finish_reason="stop") for i in range(samples)],
        usage=Usage(prompt_tokens=number, completion_tokens=2, total_tokens=number + 2),
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
    assert (order.prompts, order.is_list, order.params) == (prompts, listed, {"n": 2})
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
        ({"prompt": "a", "stream_options": {}}, "stream_options"),
        ({"prompt": "a", "stream": True, "stream_options": []}, "stream_options"),
        ({"prompt": "a", "stream": True, "stream_options": {"include_usage": 1}}, "stream_options.include_usage"),
    ],
)
def test_an_invalid_form_is_named(body: dict[str, Any], field: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        parse_completion_request(body)
    assert caught.value.field == field


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
    found = json.loads(encode_completion([encode_part(i, result(i)) for i in range(3)]))
    assert [(c["index"], c["text"]) for c in found["choices"]] == [
        (0, "0.0"),
        (1, "0.1"),
        (2, "1.0"),
        (3, "1.1"),
        (4, "2.0"),
        (5, "2.1"),
    ]
    assert found["usage"] == {"prompt_tokens": 3, "completion_tokens": 6, "total_tokens": 9}
    assert (found["id"], found["seed"], found["system_fingerprint"]) == ("cmpl-job0", None, "same")
    assert json.loads(encode_completion([encode_part(0, result(1))]))["seed"] == 8


def test_offsets_in_a_stream_continue_where_the_last_piece_ended() -> None:
    chunks = ChunkEncoder("job", "demo", 2, include_usage=False)

    def offsets(prompt: int, index: int, *tokens: str) -> tuple[int, list[int]]:
        scores = [TokenLogprob(token_id=1, token=token, logprob=-1.0) for token in tokens]
        data = chunks.encode(prompt, Event(index, "".join(tokens), [1] * len(tokens), scores))
        (choice,) = json.loads(data.removeprefix(b"data: "))["choices"]
        return choice["index"], choice["logprobs"]["text_offset"]

    assert offsets(0, 1, "ab", "c") == (1, [0, 2])
    assert offsets(1, 0, "abcd") == (2, [0])
    assert offsets(0, 1, "d", "e") == (1, [3, 4])
    assert chunks.encode_end([result(0)]) == b"data: [DONE]\n\n"
