"""Every invalid request is refused with the field, the value and what is valid."""

from __future__ import annotations

import json
import math
from typing import Any

import numpy as np
import pytest

from headrace.client.wire.errors import InvalidRequest
from headrace.client.wire.requests import GenerateRequest, SamplingParams, parse_request
from headrace.client.wire.results import Result

GOOD = {"prompt": "Hello."}


@pytest.mark.parametrize(
    ("field", "value", "shown", "expected"),
    [
        ("max_tokens", 0, "0", "at least 1"),
        ("max_tokens", -5, "-5", "at least 1"),
        ("max_tokens", 1.5, "1.5", "whole number"),
        ("max_tokens", "10", "'10'", "whole number"),
        ("max_tokens", True, "True", "whole number"),
        ("max_tokens", 10**30, "1000", "whole number"),
        ("temperature", -0.1, "-0.1", "from 0"),
        ("temperature", 2.1, "2.1", "to 2"),
        ("temperature", math.nan, "nan", "number"),
        ("temperature", math.inf, "inf", "number"),
        ("temperature", "hot", "'hot'", "number"),
        ("top_p", 0, "0", "above 0"),
        ("top_p", 1.01, "1.01", "at most 1"),
        ("top_k", -2, "-2", "off"),
        ("min_p", 1.5, "1.5", "0 (off) to 1"),
        ("n", 0, "0", "1 to 128"),
        ("n", 129, "129", "1 to 128"),
        ("stop", "", "''", "none empty"),
        ("stop", ["a", ""], "['a', '']", "none empty"),
        ("stop", ["x"] * 17, "[", "16 strings"),
        ("stop", ["x" * 2000], "[", "1,024 bytes"),
        ("stop", 5, "5", "strings"),
        ("seed", 2**63, str(2**63), "64 bits"),
        ("seed", 1.0, "1.0", "whole number"),
        ("logprobs", -1, "-1", "0 to 20"),
        ("logprobs", 21, "21", "0 to 20"),
        ("logit_bias", {"x": 1}, "{'x': 1}", "token ids"),
        ("logit_bias", {5: 101}, "{5: 101}", "-100 to 100"),
        ("logit_bias", {5: math.nan}, "{5: nan}", "-100 to 100"),
        ("logit_bias", {-5: 1}, "{-5: 1}", "token ids"),
        ("presence_penalty", 2.5, "2.5", "-2 to 2"),
        ("frequency_penalty", -2.5, "-2.5", "-2 to 2"),
        ("repetition_penalty", 0, "0", "0.01 to 100"),
        ("echo", 1, "1", "True or False"),
        ("min_tokens", -1, "-1", "0 to max_tokens"),
        ("min_tokens", 17, "17", "max_tokens, which is 16"),
        ("ignore_eos", "yes", "'yes'", "True or False"),
        ("stop_token_ids", [-1], "[-1]", "token ids"),
        ("stop_token_ids", 5, "5", "token ids"),
        ("priority", "urgent", "'urgent'", "'interactive'"),
        ("prompt", 5, "type int", "text"),
        ("prompt", [], "0 token ids", "1 to"),
        ("prompt", [1, -1], "item 1", "ids"),
        ("prompt", [1, "a"], "type list", "ids"),
        ("prompt", b"bytes", "type bytes", "text"),
        ("prompt", "x" * 70_000, "70000 bytes", "at most 65536"),
        ("prompt", [1] * 20_000, "20000 token ids", "16384"),
        ("prompt", "caf\udce9", "U+DCE9 at character 3", "valid Unicode"),
        ("stop", ["\ud83d"], "U+D83D", "valid Unicode"),
    ],
)
def test_an_invalid_value_is_named(field: str, value: object, shown: str, expected: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        parse_request({**GOOD, field: value})
    assert caught.value.field == field
    assert shown in caught.value.value
    assert expected in caught.value.expected
    assert str(caught.value).startswith(f"{field}: got ")


def test_numbers_with_thousands_of_digits_are_reported_by_size() -> None:
    with pytest.raises(InvalidRequest, match=r"max_tokens: got a number of \d+ bits"):
        parse_request({**GOOD, "max_tokens": 10**5000})
    with pytest.raises(InvalidRequest, match="item 1 is not a token id"):
        parse_request({"prompt": [1, 10**5000]})


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("max_new_tokens", "max_tokens"),
        ("max_token", "max_tokens"),
        ("temprature", "temperature"),
        ("num_return_sequences", "n?"),
        ("stop_sequences", "stop"),
        ("do_sample", "temperature=0"),
        ("zzz", "temperature"),
    ],
)
def test_an_unknown_name_is_refused_with_the_right_one(name: str, hint: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        parse_request({**GOOD, name: 1})
    assert caught.value.field == name
    assert hint in caught.value.expected


def test_a_missing_prompt_is_refused() -> None:
    with pytest.raises(InvalidRequest, match="prompt: got nothing"):
        parse_request({"max_tokens": 3})


def test_an_error_never_quotes_the_prompt() -> None:
    with pytest.raises(InvalidRequest) as caught:
        parse_request({"prompt": "my secret " * 10_000})
    assert "secret" not in str(caught.value)


def test_defaults_are_those_of_the_openai_api_and_vllm() -> None:
    expected: dict[str, Any] = {
        "max_tokens": 16, "temperature": 1.0, "top_p": 1.0, "top_k": 0, "min_p": 0.0, "n": 1, "stop": [], "seed": None,
        "logprobs": None, "logit_bias": {}, "presence_penalty": 0.0, "frequency_penalty": 0.0,
        "repetition_penalty": 1.0, "echo": False, "min_tokens": 0, "ignore_eos": False, "stop_token_ids": [],
    }  # fmt: skip
    assert SamplingParams().model_dump() == expected


def test_numpy_numbers_and_arrays_are_accepted() -> None:
    request = parse_request(
        {"prompt": np.array([15496, 13]), "max_tokens": np.int64(3), "temperature": np.float32(0.5), "stop": ("a", "b")}
    )
    assert (request.prompt, request.max_tokens, request.temperature, request.stop) == ([15496, 13], 3, 0.5, ["a", "b"])


def test_a_single_stop_string_and_string_keys_are_accepted() -> None:
    request = parse_request({**GOOD, "stop": "\n", "logit_bias": {"50256": -100}})
    assert (request.stop, request.logit_bias) == (["\n"], {50256: -100.0})


def test_a_request_survives_the_wire() -> None:
    request = parse_request(
        {**GOOD, "max_tokens": 3, "logit_bias": {7: 1.5}, "stop": ["x"], "seed": 2**52, "priority": "bulk"}
    )
    wire = json.loads(json.dumps(request.to_wire()))
    assert wire["schema_version"] == 1
    assert parse_request(wire) == request


def test_only_what_differs_from_the_defaults_is_sent() -> None:
    assert parse_request(GOOD).to_wire() == {"schema_version": 1, "prompt": "Hello."}


def test_a_request_written_by_the_first_release_still_decodes() -> None:
    stored = '{"schema_version": 1, "prompt": "Hello.", "max_tokens": 10, "temperature": 0.0, "seed": 123}'
    assert parse_request(json.loads(stored)) == GenerateRequest(
        prompt="Hello.", max_tokens=10, temperature=0.0, seed=123
    )


def test_a_result_written_by_the_first_release_or_a_later_one_still_decodes() -> None:
    stored = """{"schema_version": 1, "id": "a", "model": "demo", "choices": [{"index": 0, "text": "x",
      "token_ids": [87], "finish_reason": "length", "stop_reason": null, "logprobs": null}],
      "usage": {"prompt_tokens": 2, "completion_tokens": 1, "total_tokens": 3}, "seed": 5,
      "timings": {"waiting_s": 0.1, "prefill_s": 0.1, "decode_s": 0.1}, "fingerprint": "f", "something_new": [1]}"""
    result = Result.model_validate_json(stored)
    assert (result.text, result.seed) == ("x", 5)
