"""Large results: refused at submit, and read a few at a time."""

from __future__ import annotations

from typing import Any

import fakeredis
import pytest

from headrace.client import Client
from headrace.client.jobs.polling import READ_BYTES
from headrace.client.jobs.reading import JobReader
from headrace.client.wire import keys
from headrace.client.wire.errors import InvalidRequest
from headrace.client.wire.requests import parse_request
from headrace.client.wire.result_size import largest_result
from headrace.client.wire.results import Choice, Result, Timings, TokenLogprob, TopLogprob, Usage
from headrace.config import load_settings


def result(n: int, tokens: int, logprobs: int, token: str) -> Result:
    top = [TopLogprob(token_id=50_000 + i, token=token, logprob=-12.345678901234567) for i in range(logprobs)]
    score = TokenLogprob(token_id=50_000, token=token, logprob=-12.345678901234567, top=top)
    choices = [
        Choice(
            index=i,
            text=token * tokens,
            token_ids=[50_000] * tokens,
            finish_reason="length",
            logprobs=[score] * tokens if logprobs else None,
        )
        for i in range(n)
    ]
    usage = Usage(prompt_tokens=1, completion_tokens=n * tokens, total_tokens=n * tokens + 1)
    timings = Timings(waiting_s=0, prefill_s=0, decode_s=0)
    return Result(id="a", model="demo", choices=choices, usage=usage, seed=1, timings=timings)


@pytest.mark.parametrize(("n", "tokens", "logprobs"), [(1, 100, 20), (16, 100, 5), (64, 50, 0)])
@pytest.mark.parametrize("token", [" the", " something", "\u00e9"])
def test_the_size_of_a_result_is_known_before_it_is_computed(n: int, tokens: int, logprobs: int, token: str) -> None:
    asked = {"prompt": "x", "n": n, "max_tokens": tokens, "logprobs": logprobs or None}
    expected = largest_result(parse_request({name: value for name, value in asked.items() if value is not None}))
    actual = len(result(n, tokens, logprobs, token).model_dump_json())
    assert 0.4 * expected < actual < 1.1 * expected + 1_000


@pytest.mark.parametrize(
    ("params", "field"),
    [
        ({"n": 128, "logprobs": 20, "max_tokens": 190}, "logprobs"),
        ({"n": 128, "max_tokens": 6_000}, "max_tokens"),
        ({"n": 128, "logprobs": 20, "max_tokens": 0, "echo": True, "prompt": [1] * 100}, "logprobs"),
        ({"n": 128, "logprobs": 20, "max_tokens": 0, "echo": True, "prompt": "a word " * 100}, "logprobs"),
    ],
)
def test_a_result_that_is_too_large_is_refused_at_submit(params: dict[str, Any], field: str) -> None:
    fields = {"prompt": "x", **params}
    with Client(settings=load_settings(redis_url="redis://localhost:1/0")) as client:
        with pytest.raises(InvalidRequest, match=r"at most 8388608 bytes.*HEADRACE_MAX_RESULT_BYTES") as caught:
            client.submitter.prepare(fields)
        assert caught.value.field == field
        if "echo" in params:  # shared parameters, and another prompt
            small = {**fields, "prompt": [1]}
            with pytest.raises(InvalidRequest):
                list(client.submitter.prepare_all([small, {**small, "prompt": fields["prompt"]}]))
    with Client(settings=load_settings(redis_url="redis://localhost:1/0", max_result_bytes=2**29)) as client:
        client.submitter.prepare(fields)


def test_cancelling_ended_jobs_does_not_read_their_results_at_once() -> None:
    connection = fakeredis.FakeRedis(decode_responses=True)
    record = '{"status": "REVOKED", "result": null}' + " " * (READ_BYTES // 2 - 100)
    names = [f"{i}" for i in range(5)]
    for name in names[:4]:
        connection.set(keys.result(name), record)
    connection.hset(keys.job("4"), "state", "queued")
    reader, largest = JobReader("redis://fake", connection, model_name="demo"), 0
    original = reader._poll_many

    def counted(job_ids: Any) -> Any:
        nonlocal largest
        largest = max(largest, sum(connection.strlen(keys.result(job_id)) for job_id in job_ids))
        return original(job_ids)

    reader._poll_many = counted  # type: ignore[method-assign]
    assert reader.cancel(names) == [False] * 4 + [True]
    assert largest <= READ_BYTES
