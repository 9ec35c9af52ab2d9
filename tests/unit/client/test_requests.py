"""Every invalid request is refused with the field, the value and what is valid."""

from __future__ import annotations

import json
import math
from typing import Any

import numpy as np
import pandas as pd
import pyarrow
import pytest
from hypothesis import given
from hypothesis import strategies as st

from headrace.client.batch.openai import completion_fields
from headrace.client.wire.errors import InvalidRequest, JobFailed
from headrace.client.wire.foreign import ALIASES, FOREIGN, advice
from headrace.client.wire.requests import (
    DEFAULTED_BY_MODELS,
    PUBLIC_NAMES,
    WHOLE_NAMES,
    GenerateRequest,
    SamplingParams,
    parse_request,
)
from headrace.client.wire.results import Result
from headrace.worker.queue.messages import read_wire

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
        ("stop", [""], "['']", "none empty"),
        ("stop", ["a", ""], "['a', '']", "none empty"),
        ("stop", ["x"] * 17, "[", "16 strings"),
        ("stop", ["x" * 2000], "[", "1,024 bytes"),
        ("stop", 5, "5", "strings"),
        ("seed", 2**63, str(2**63), "64 bits"),
        ("seed", 1.5, "1.5", "whole number"),
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
        ("prompt", memoryview(b"bytes"), "type memoryview", "text"),
        ("prompt", "x" * 140_000, "140000 bytes", "at most 131072"),
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
        ("request_id", "did you mean id?"),
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
        parse_request({"prompt": "my secret " * 20_000})
    assert "secret" not in str(caught.value)


def test_defaults_are_those_of_the_openai_api_and_vllm() -> None:
    expected: dict[str, Any] = {
        "max_tokens": 16, "temperature": 1.0, "top_p": 1.0, "top_k": 0, "min_p": 0.0, "n": 1, "stop": [], "seed": None,
        "logprobs": None, "prompt_logprobs": None, "logit_bias": {}, "presence_penalty": 0.0, "frequency_penalty": 0.0,
        "repetition_penalty": 1.0, "echo": False, "min_tokens": 0, "ignore_eos": False, "stop_token_ids": [],
        "skip_special_tokens": True, "structured_outputs": None, "allowed_token_ids": None, "bad_words": [],
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


# Values that ask for nothing, and values in other forms


@pytest.mark.parametrize("seed", [-1, -1.0, np.int64(-1), None, pd.NA])
def test_the_seed_minus_one_means_none(seed: Any) -> None:
    assert parse_request({**GOOD, "seed": seed}) == parse_request(GOOD)
    assert SamplingParams(seed=None if seed is pd.NA else seed).seed is None


@pytest.mark.parametrize("seed", [-2, 0, 1.0, -(2**63), 2**63 - 1, np.float64(5)])
def test_other_negative_seeds_are_seeds(seed: Any) -> None:
    assert parse_request({**GOOD, "seed": seed}).seed == int(seed)


NEUTRAL: dict[str, list[Any]] = {
    "suffix": [""], "best_of": [1, 1.0], "user": ["u", ""], "metadata": [{}, {"a": "b"}], "store": [False],
    "service_tier": ["auto", "default"], "response_format": [{"type": "text"}], "extra_body": [{}],
    "stream_options": [{}, {"include_usage": False}],
    "tools": [[]], "tool_choice": ["none", "auto"], "parallel_tool_calls": [True], "top_logprobs": [0],
    "use_beam_search": [False, np.False_], "length_penalty": [1, 1.0, np.float32(1)], "early_stopping": [False],
    "skip_special_tokens": [True], "spaces_between_special_tokens": [True, False],
    "include_stop_str_in_output": [False],
    "bad_words": [[]], "structured_outputs": [{}], "detokenize": [True], "add_special_tokens": [True],
    "return_token_ids": [False], "return_tokens_as_token_ids": [False], "priority": [0, 0.0], "logprobs": [False],
    "top_k": [0, 0.0],
    "min_p": [0, 0.0], "repetition_penalty": [1, 1.0], "presence_penalty": [0], "frequency_penalty": [0.0],
    "logit_bias": [{}, [], {"5": None}], "stop": [[], (), ""], "stop_token_ids": [[], ()], "n": [1, 1.0],
    "echo": [False, np.False_],
    "ignore_eos": [False], "min_tokens": [0, 0.0], "typical_p": [1.0], "mirostat": [0], "repeat_penalty": [1.0],
    "cache_prompt": [True], "grammar": [""], "num_beams": [1], "no_repeat_ngram_size": [0], "watermark": [False],
    "details": [False], "top_n_tokens": [0], "id_slot": [-1], "thinking_token_budget": [-1], "stream": [False],
    "max_tokens": [16, 16.0], "temperature": [1, 1.0], "top_p": [1], "logits_processors": [[]], "xtc_probability": [0],
    "do_sample": [True], "checkpoints": [[], ()], "messages": [[]], "add_generation_prompt": [True, False],
    "continue_final_message": [False], "chat_template_kwargs": [{}, []],
}  # fmt: skip


@pytest.mark.parametrize(("name", "values"), NEUTRAL.items())
def test_a_value_that_asks_for_nothing_changes_nothing(name: str, values: list[Any]) -> None:
    for value in [*values, None, pd.NA, pd.NaT, pyarrow.scalar(None, pyarrow.int64())]:
        wire = parse_request({**GOOD, name: value}).to_wire()
        if name in DEFAULTED_BY_MODELS and wire.keys() > parse_request(GOOD).to_wire().keys():
            # A worker can tell it from a parameter that is not set, and takes no default of the model for it.
            assert wire.pop(name) == GenerateRequest.model_fields[name].default or name == "top_k", value
        assert wire == parse_request(GOOD).to_wire(), value
        assert completion_fields({**GOOD, name: value}).keys() <= {"prompt", name}


def test_every_foreign_parameter_may_be_null_and_is_refused_by_name_otherwise() -> None:
    nothing = dict.fromkeys(FOREIGN)
    assert parse_request({**GOOD, **nothing, "n": None}) == parse_request(GOOD)
    for name in FOREIGN.keys() - PUBLIC_NAMES:
        with pytest.raises(InvalidRequest, match=f"^{name}: got .*no such parameter"):
            parse_request({**GOOD, name: {"a": 1} if name != "metadata" else 7})


@pytest.mark.parametrize(
    ("fields", "part"),
    [
        ({"chat_template": "{{ messages }}"}, "the template of the model's directory is used"),
        ({"use_beam_search": True}, "except False; headrace samples"),
        ({"use_beam_search": 0}, "except False"),
        ({"length_penalty": 0.8}, "except 1"),
        ({"response_format": {"type": "json_object"}}, "use structured_outputs={'json': schema}"),
        ({"guided_regex": "a+"}, "use structured_outputs={'regex': pattern}"),
        ({"suffix": "x"}, "GPT-2 can only continue the prompt"),
        ({"best_of": 2}, "all n samples are returned"),
        ({"best_of": True}, "all n samples are returned"),
        ({"truncate_prompt_tokens": 5}, "shorten the prompt"),
        ({"repeat_penalty": 1.2}, "use repetition_penalty"),
        ({"priority": 1}, "'interactive'"),
        ({"priority": False}, "'interactive'"),
        ({"logprobs": True}, "0 to 20"),
    ],
)
def test_a_value_that_asks_for_something_else_is_refused_with_the_reason(fields: dict[str, Any], part: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        parse_request({**GOOD, **fields})
    assert caught.value.field == next(iter(fields))
    assert part in caught.value.expected


def test_best_of_is_compared_with_n() -> None:
    for n, best_of in ((3, 3), (3.0, 3), (None, 1), (1, 1)):
        assert parse_request({**GOOD, "n": n, "best_of": best_of}).n == (n or 1)
    with pytest.raises(InvalidRequest, match="best_of"):
        parse_request({**GOOD, "n": 2, "best_of": 3})


def test_do_sample_may_repeat_what_temperature_says() -> None:
    for temperature, sample in ((0, False), (0.0, False), (0.7, True), (None, True), (np.float32(0), np.False_)):
        parse_request({**GOOD, "temperature": temperature, "do_sample": sample})
        with pytest.raises(InvalidRequest, match=r"^do_sample: got .* temperature=0 is greedy"):
            parse_request({**GOOD, "temperature": temperature, "do_sample": not sample})


def test_a_null_in_a_map_of_biases_is_no_entry() -> None:
    table = pyarrow.Table.from_pylist([{"logit_bias": {"5": 1.0}}, {"logit_bias": {"13": -2.0}}])
    found = [parse_request({**GOOD, **row}).logit_bias for row in table.to_pylist()]
    assert found == [{5: 1.0}, {13: -2.0}]


@pytest.mark.parametrize("name", sorted(WHOLE_NAMES))
def test_whole_numbers_may_be_written_as_floats(name: str) -> None:
    for value in (8.0, np.float64(8), np.float32(8), np.int16(8), np.array(8)):
        found = getattr(parse_request({**GOOD, name: value}), name)
        assert (found, type(found)) == (8, int)
    for wrong in (8.5, np.float32(8.5), True, np.True_, "8", math.nan, math.inf, 1e300):
        with pytest.raises(InvalidRequest, match=f"^{name}: got"):
            parse_request({**GOOD, name: wrong})


@pytest.mark.parametrize(
    "fields",
    [
        {"temperature": True}, {"top_p": np.True_}, {"logit_bias": {5: True}}, {"logit_bias": {True: 1}},
        {"prompt": [True, 1]}, {"stop_token_ids": [False]}, {"checkpoints": [True]}, {"min_p": False},
    ],
)  # fmt: skip
def test_a_bool_is_not_a_number(fields: dict[str, Any]) -> None:
    with pytest.raises(InvalidRequest, match=f"^{next(iter(fields))}: got"):
        parse_request({**GOOD, **fields})


def test_token_ids_may_be_written_as_floats() -> None:
    request = parse_request(
        {"prompt": np.array([15496.0, 13.0]), "logit_bias": {13.0: np.float32(1)}, "stop_token_ids": [5.0]}
    )
    assert (request.prompt, request.logit_bias, request.stop_token_ids) == ([15496, 13], {13: 1.0}, [5])
    with pytest.raises(InvalidRequest, match="logit_bias"):
        parse_request({**GOOD, "logit_bias": {5: 1, "5": 2}})


def edited(name: str, at: int, letter: str) -> list[str]:
    """A name with one letter left out, replaced, repeated or added, and in other cases."""
    at %= len(name)
    return [
        name[:at] + name[at + 1 :],
        name[:at] + letter + name[at + 1 :],
        name[:at] + letter + name[at:],
        name.upper(),
    ]


@given(
    st.sampled_from(sorted(PUBLIC_NAMES | FOREIGN.keys() | ALIASES.keys() | set(GenerateRequest.model_fields))),
    st.integers(0, 40),
    st.sampled_from("abesn_-1 "),
)
def test_no_hint_names_the_rejected_word_itself(name: str, at: int, letter: str) -> None:
    for word in [name, *edited(name, at, letter)]:
        for public in (PUBLIC_NAMES, PUBLIC_NAMES - {word}):
            hint = advice(word, public)
            assert f"did you mean {word}?" not in hint
            assert word not in hint.removeprefix("one of ").split(", ")


def test_messages_of_other_producers_may_have_null_and_whole_floats_everywhere() -> None:
    nothing = dict.fromkeys(set(GenerateRequest.model_fields) | FOREIGN.keys())
    assert read_wire({**nothing, **GOOD}) == parse_request(GOOD)
    assert read_wire({**GOOD, "schema_version": 1.0, "max_tokens": 4.0}).max_tokens == 4


@pytest.mark.parametrize("word", ["model", "id", "timeout_s", "timeout", "expires", "max_completion_tokens"])
def test_a_hint_for_other_producers_names_what_a_message_may_have(word: str) -> None:
    with pytest.raises(JobFailed) as caught:
        read_wire({"prompt": "x", word: 1})
    _, _, hint = caught.value.message.partition("; expected ")
    names = hint.removeprefix("no such parameter; did you mean ").removeprefix("one of ").rstrip("?").split(", ")
    assert set(names) <= set(GenerateRequest.model_fields)


@pytest.mark.parametrize(
    ("word", "meant"),
    [("max_completion_tokens", "max_tokens"), ("n_predict", "max_tokens"), ("Top_P", "top_p"), ("top-k", "top_k")],
)
def test_a_hint_names_what_was_meant(word: str, meant: str) -> None:
    with pytest.raises(InvalidRequest, match=f"did you mean {meant}"):
        parse_request({**GOOD, word: 1})


def test_a_request_to_score_a_continuation_generates_nothing() -> None:
    scored = parse_request({"prompt": "The king", "continuation": " and"})
    assert scored == parse_request({"prompt": "The king", "continuation": " and", "max_tokens": 0})
    assert scored.to_wire()["max_tokens"] == 0  # not what a model's generation_config.json says
    assert parse_request({"prompt": "The king", "continuation": None}).max_tokens == 16
    with pytest.raises(InvalidRequest, match="continuation: got a continuation and max_tokens=5; expected"):
        parse_request({"prompt": "The king", "continuation": " and", "max_tokens": 5})
