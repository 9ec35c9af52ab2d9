"""How much work one request makes: counted, not timed."""

from __future__ import annotations

import asyncio
import json
import threading
from types import SimpleNamespace
from typing import Any
from unittest.mock import AsyncMock

import pytest

from headrace.client import Client
from headrace.client.async_client import AsyncClient, AsyncJob
from headrace.client.batch.errors import InvalidBatch
from headrace.client.batch.run import Batch, prepare_parts
from headrace.client.http import context
from headrace.client.http.completion_request import parse_completion_request
from headrace.client.http.errors import ApiError
from headrace.client.http.jobs import JobRunner, SubmittedJobs
from headrace.client.jobs import submission
from headrace.client.jobs.async_replies import COMMANDS_AT_ONCE, send
from headrace.client.jobs.together import MAX_COPIED_BYTES
from headrace.client.wire.errors import InvalidRequest
from headrace.config import load_settings
from tests.unit.client.test_result_size import result

SHARED: dict[str, Any] = {"logit_bias": {str(i): 1.5 for i in range(1_024)}, "stop": ["x" * 1_000] * 16}
SETTINGS = load_settings(redis_url="redis://localhost:1/0", signing_key="k" * 32)


@pytest.fixture
def checked(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The sizes of the `logit_bias` that were checked."""
    sizes: list[int] = []
    parse = submission.parse_request

    def counted(fields: dict[str, Any]) -> Any:
        sizes.append(len(fields.get("logit_bias", ())))
        return parse(fields)

    monkeypatch.setattr(submission, "parse_request", counted)
    return sizes


@pytest.mark.parametrize("as_mappings", [False, True])
def test_shared_parameters_are_checked_once(
    checked: list[int], as_mappings: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    jobs: list[Any] = []
    with Client(settings=SETTINGS) as client:
        monkeypatch.setattr(client, "_submit", jobs.extend)
        prompts = [f"prompt {i}" for i in range(1_024)]
        if as_mappings:
            client.submit_many([{**SHARED, "prompt": prompt} for prompt in prompts])
        else:
            client.submit_many(prompts, **SHARED)
    assert sum(checked) == 1_024
    assert len({id(job.wire["logit_bias"]) for job in jobs[1:]}) <= 2, "the parameters are copied"


@pytest.mark.parametrize("params", [{}, SHARED, {"seed": 7}, {"priority": "bulk", "timeout_s": 9}])
def test_jobs_with_shared_parameters_are_those_that_are_prepared_alone(params: dict[str, Any]) -> None:
    prompts = ["a", "", [1, 2], "é", [50_256]]
    with Client(settings=SETTINGS) as client:
        together = list(client.submitter.prepare_all({**params, "prompt": prompt} for prompt in prompts))
        for prompt, job in zip(prompts, together, strict=True):
            seed = job.request.seed
            alone = client.submitter.prepare({**params, "prompt": prompt, "seed": seed, "id": job.id})
            assert {**alone.wire, "expires_at": 0, "signature": 0} == {**job.wire, "expires_at": 0, "signature": 0}
            assert alone.mark == job.mark
            assert abs(len(json.dumps(job.wire)) - job.size) < 200
    seeds = {job.request.seed for job in together}
    assert len(seeds) == (1 if "seed" in params else len(prompts))
    assert len({job.id for job in together}) == len(prompts)


def test_a_seed_that_means_a_random_one_is_drawn_for_each_prompt() -> None:
    with Client(settings=SETTINGS) as client:
        jobs = list(client.submitter.prepare_all({"prompt": "a", "n": 2, "seed": -1} for _ in range(4)))
    assert len({job.request.seed for job in jobs}) == 4
    assert all(job.wire["seed"] == job.request.seed for job in jobs)


def test_jobs_with_ids_are_those_that_are_prepared_alone() -> None:
    requests = [{**SHARED, "prompt": "a", "seed": seed, "id": f"job-{seed}"} for seed in (None, 1, 2)]
    with Client(settings=SETTINGS) as client:
        for fields, job in zip(requests, client.submitter.prepare_all(requests), strict=True):
            alone = client.submitter.prepare(fields)
            assert (job.id, job.digest, job.mark) == (alone.id, alone.digest, alone.mark)
        with pytest.raises(InvalidRequest, match=r"^id: "):
            list(client.submitter.prepare_all([requests[0], {**requests[1], "id": "not an id"}]))


def test_the_parameters_of_a_row_of_a_batch_are_checked_once_and_their_copies_bounded(checked: list[int]) -> None:
    body = {**SHARED, "max_tokens": 1}
    with Client(settings=SETTINGS) as client:
        batch = Batch(client, [{**body, "prompt": ["a"] * 200}])
        assert sum(checked) == 1_024
        jobs = [job for row in batch.rows() for _, job in prepare_parts(client, row, "run")]
        assert sum(checked) == 2 * 1_024
        assert [len(jobs), len({job.id for job in jobs}), len({job.request.seed for job in jobs})] == [200] * 3
        with pytest.raises(InvalidBatch, match=rf"line 1.*300 prompts with .*at most {MAX_COPIED_BYTES} bytes"):
            Batch(client, [{**body, "prompt": ["a"] * 300}])
        with pytest.raises(InvalidBatch, match=r"prompts whose results may take .* bytes together"):
            Batch(client, [{"logprobs": 20, "max_tokens": 50, "n": 8, "prompt": ["a"] * 100}])
        with pytest.raises(InvalidBatch, match=r"prompt\[2\]"):
            Batch(client, [{**body, "prompt": [[1], [2], [-1]]}])


def test_a_wrong_prompt_among_shared_parameters_is_named() -> None:
    with Client(settings=SETTINGS) as client, pytest.raises(InvalidRequest) as caught:
        client.submit_many(["a", "b", [-1]], **SHARED)
    assert caught.value.field == "requests[2].prompt"


def test_many_jobs_are_submitted_beside_short_calls(monkeypatch: pytest.MonkeyPatch) -> None:
    async def scenario() -> None:
        gate = threading.Event()
        async with AsyncClient(settings=SETTINGS) as client:
            monkeypatch.setattr(client._client, "submit_many", lambda *_: [gate.wait(60), []][1])
            monkeypatch.setattr(client._client, "status", lambda: "status")
            many = asyncio.create_task(client.submit_many(["a"] * 1_024))
            await asyncio.sleep(0)
            assert await client.status() == "status"
            gate.set()
            await many

    asyncio.run(scenario())


def test_the_copies_of_the_parameters_are_bounded() -> None:
    async def submit(prompts: int) -> None:
        async with AsyncClient(settings=SETTINGS) as client:
            await JobRunner(client, 60).submit(["a"] * prompts, SHARED, is_list=True)

    size = len(json.dumps(SHARED))
    with pytest.raises(InvalidRequest, match=rf"1024 prompts with {size} bytes.*at most {MAX_COPIED_BYTES} bytes"):
        asyncio.run(submit(1_024))
    with pytest.raises(ApiError) as caught:  # it goes on to ask who serves the model
        asyncio.run(submit(MAX_COPIED_BYTES // size))
    assert caught.value.code == "redis_unreachable"


@pytest.mark.parametrize(
    "body",
    [
        b"[" + b"[]," * 1_000_000 + b"[]]",
        b'{"a": [' + b"{}," * 1_000_000 + b"{}]}",
        b"{" + b",".join(b'"%d":1' % i for i in range(200_000)) + b"}",
        b'{"prompt": [' + b'"a",' * 1_000_000 + b'"a"]}',
        b'{"prompt": [' + rb'"\"",' * 500_000 + b'"a"]}',
        b'{"prompt": [' + rb'"\\",' * 500_000 + b'"a"]}',
        b"[" * 100_000,
    ],
    ids=["lists", "objects", "members", "texts", "quotes", "backslashes", "depth"],
)
def test_a_body_that_is_slow_to_parse_is_refused_before(body: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(context, "parse_json", lambda _: pytest.fail("it was parsed"))
    with pytest.raises(ApiError) as caught:
        context.check_structure(body)
    assert caught.value.code == "invalid_json"


@pytest.mark.parametrize(
    "body",
    [
        {"prompt": ["[{:" * 1_000] * 1_024, **SHARED},
        {"prompt": ['"\\' * 1_000] * 1_024},
        {"prompt": ["é\n\\"] * 1_024, "stop": ["\\" * 1_000] * 16},
        {"prompt": [list(range(500))] * 1_024},
    ],
)
def test_the_largest_requests_are_parsed(body: dict[str, Any]) -> None:
    context.check_structure(json.dumps(body).encode())


def test_one_large_body_is_held_as_objects_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    raw = json.dumps({"prompt": [list(range(600))] * 64}).encode()
    assert len(raw) > context.SMALL_BODY_BYTES
    held: list[int] = []

    async def one(request: Any) -> None:
        async with context.json_body(request):
            held.append(1)
            await asyncio.sleep(0.001)
            assert sum(held) == 1, "others wait until the jobs of this one are submitted"
            held.append(-1)

    async def all_of_them() -> None:
        application = SimpleNamespace(state=SimpleNamespace(context=SimpleNamespace(parsing=asyncio.Lock())))
        requests = [SimpleNamespace(headers={}, body=AsyncMock(return_value=raw), app=application) for _ in range(8)]
        await asyncio.gather(*map(one, requests))

    asyncio.run(all_of_them())
    assert len(held) == 16


def test_many_commands_to_redis_are_sent_in_parts() -> None:
    sizes: list[int] = []

    class Connection:
        def pipeline(self, **_: Any) -> Any:
            sent: list[tuple[Any, ...]] = []

            async def execute(**_: Any) -> list[Any]:
                sizes.append(len(sent))
                return [command[1] for command in sent]

            return SimpleNamespace(execute_command=lambda *command: sent.append(command), execute=execute)

    async def scenario() -> None:
        async with AsyncClient(settings=SETTINGS) as client:
            own, client._redis = client._redis, Connection()  # type: ignore[assignment]
            assert await send(client._redis, [("STRLEN", str(i)) for i in range(1_000)]) == [
                str(i) for i in range(1_000)
            ]
            client._redis = own

    asyncio.run(scenario())
    assert sum(sizes) == 1_000
    assert max(sizes) <= COMMANDS_AT_ONCE


def test_a_list_that_is_no_prompt_is_refused_without_looking_at_its_items() -> None:
    class Items(list[int]):
        def __iter__(self) -> Any:
            raise AssertionError("it was read")

    with pytest.raises(InvalidRequest, match="a list of 100000 items"):
        parse_completion_request({"prompt": Items([1] * 100_000)})


@pytest.mark.parametrize(
    ("params", "prompts"),
    [
        ({"logprobs": 20, "max_tokens": 50, "n": 8}, ["a"] * 100),
        ({"max_tokens": 600, "n": 100}, ["a"] * 100),
        ({"logprobs": 5, "max_tokens": 0, "echo": True}, ["word " * 400] * 1_000),
        ({"logprobs": 5, "max_tokens": 0, "echo": True}, [[1] * 600] * 1_000),
    ],
)
def test_the_response_to_a_request_is_bounded(params: dict[str, Any], prompts: list[Any]) -> None:
    async def submit(number: int) -> None:
        async with AsyncClient(settings=SETTINGS) as client:
            await JobRunner(client, 60).submit(prompts[:number], params, is_list=True)

    with pytest.raises(InvalidRequest, match=r"prompts whose results may take .* at most 67108864 bytes"):
        asyncio.run(submit(len(prompts)))
    with pytest.raises(ApiError, match="redis_unreachable"):
        asyncio.run(submit(8))


def test_results_are_encoded_as_they_arrive_and_not_kept() -> None:
    held: list[int] = []

    class Jobs:
        def __init__(self) -> None:
            self.url, self.cancelled = "redis://fake", list[str]()
            self.jobs = [AsyncJob(str(number), self) for number in range(5)]  # type: ignore[arg-type]

        async def as_completed(self, jobs: Any, timeout: float) -> Any:
            for number in (3, 1, 0, 4, 2):
                self.jobs[number].outcome = result(1, number, 0, "a")
                yield self.jobs[number]

        async def cancel(self, job_ids: list[str]) -> None:
            self.cancelled += job_ids

    def convert(index: int, found: Any) -> tuple[int, int]:
        held.append(sum(job.outcome is not None for job in client.jobs))
        if fails and index == 0:
            raise ValueError
        return index, found.usage.completion_tokens

    client, fails = Jobs(), False

    async def wait() -> Any:
        runner = JobRunner(client, 60)  # type: ignore[arg-type]
        try:
            return await runner.results(SubmittedJobs("demo", client.jobs, 60), convert)
        finally:
            await runner.close()

    assert asyncio.run(wait()) == [(number, number) for number in range(5)]
    assert held == [1] * 5
    assert client.cancelled == []
    client, fails = Jobs(), True
    with pytest.raises(ValueError):  # noqa: PT011
        asyncio.run(wait())
    assert client.cancelled == ["2", "4"]
