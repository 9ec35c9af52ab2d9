"""AsyncClient: the same methods, and one connection for all waiting calls."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

import pytest
from redis.asyncio.client import Pipeline

from headrace.client import (
    AsyncClient,
    Client,
    InvalidRequest,
    JobCancelled,
    JobFailed,
    NoCheckpoints,
    NoWorker,
    RedisUnreachable,
    UnknownJob,
)
from headrace.client.wire.redis import connect
from headrace.worker.redis_server import EmbeddedRedis
from tests.integration.processes import WorkerProcess, wait_until
from tests.patience import PATIENCE_S

LONG = {"max_tokens": 900, "temperature": 0, "ignore_eos": True}
JOBS = 10_000


def run(redis_url: str, body: Callable[[AsyncClient], Awaitable[Any]], **options: Any) -> Any:
    async def inside() -> Any:
        async with AsyncClient(redis_url=redis_url, **options) as client:
            return await body(client)

    return asyncio.run(inside())


@pytest.mark.usefixtures("worker")
def test_every_method_gives_the_results_of_the_synchronous_client(client: Client, redis_url: str) -> None:
    plain = client.submit("Hello.", max_tokens=10, temperature=0).result(PATIENCE_S)

    async def body(own: AsyncClient) -> None:
        job = await own.submit("Hello.", max_tokens=10, temperature=0, checkpoints=[10])
        assert (await job.result(PATIENCE_S)).choices == plain.choices
        assert await job.wait() == await job.status() == "succeeded"
        assert job == own.job(job.id)
        assert set(await own.job(job.id).checkpoints()) == {"next_token"}
        jobs = await own.submit_many([{"prompt": "Hello.", "max_tokens": n} for n in (200, 1, 30)], temperature=0)
        ended = [job async for job in own.as_completed([*jobs, job], timeout=PATIENCE_S)]
        assert {job.id for job in ended} == {job.id for job in jobs} | {job.id}
        assert ended[0] is job
        assert (await own.status()).serves("demo")
        texts = await asyncio.gather(*(own.job(job.id).result(PATIENCE_S) for job in jobs))
        assert [result.usage.completion_tokens for result in texts] == [200, 1, 30]
        scores = [score async for score in own.score_many([("The king", " had"), ("A", " b")] * 20, max_inflight=3)]
        assert scores == [await own.score("The king", " had"), client.score("A", " b")] * 20
        assert await own.choose(["The king"], [" had", " zebra"]) == client.choose(["The king"], [" had", " zebra"])

    run(redis_url, body)


def test_jobs_are_cancelled_one_and_many(client: Client, redis_url: str, worker: WorkerProcess) -> None:
    async def body(own: AsyncClient) -> None:
        one = await own.submit("Hello.", **LONG)
        assert await one.cancel()
        with pytest.raises(JobCancelled) as caught:
            await one.result(PATIENCE_S)
        assert caught.value.job is one
        many = await own.submit_many(["Hello."] * 20, **LONG)
        assert await own.cancel([one, *many[:10], *(job.id for job in many[10:])]) == [False] + [True] * 20
        assert {await job.wait(PATIENCE_S) for job in many} == {"cancelled"}

    with worker.slowly():
        run(redis_url, body)
        many = client.submit_many(["Hello."] * 20, **LONG)  # type: ignore[arg-type]
        assert client.cancel(many) == [True] * 20
    assert {job.wait(PATIENCE_S) for job in many} == {"cancelled"}
    assert client.cancel([job.id for job in many]) == [False] * 20
    with pytest.raises(UnknownJob):
        client.cancel([many[0].id, "nobody"])
    with pytest.raises(InvalidRequest):
        client.cancel([many[0], 5])  # type: ignore[list-item]


def test_a_cancelled_running_job_leaves_its_slot_to_the_next(client: Client, worker: WorkerProcess) -> None:
    with worker.slowly():
        full = client.submit_many(["Hello."] * 64, **LONG)  # type: ignore[arg-type]
        wait_until(lambda: all(job.status() == "running" for job in full[::16]))
        waiting = client.submit("Hello.", max_tokens=2, priority="interactive")
        assert all(client.cancel(full))
        assert waiting.wait(PATIENCE_S) == "succeeded"
        assert {job.wait(PATIENCE_S) for job in full} == {"cancelled"}


@pytest.mark.usefixtures("worker")
def test_errors_are_the_same_and_carry_the_job(redis_url: str) -> None:
    async def body(own: AsyncClient) -> None:
        bad = await own.submit([60_000])
        assert await bad.wait(PATIENCE_S) == "failed"
        with pytest.raises(JobFailed) as failed:
            await bad.result()
        assert (failed.value.code, failed.value.job) == ("invalid_token_id", bad)
        for ask in (own.job("nobody").result(1), own.job("nobody").status()):
            with pytest.raises(UnknownJob) as unknown:
                await ask
            assert (unknown.value.code, unknown.value.job.id) == ("unknown_job", "nobody")
        with pytest.raises(NoCheckpoints) as none:
            await bad.checkpoints()
        assert (none.value.code, none.value.job) == ("no_checkpoints", bad)
        with pytest.raises(InvalidRequest, match="max_tokens"):
            await own.submit("Hello.", max_new_tokens=3)
        with pytest.raises(InvalidRequest, match="timeout"):
            await bad._client.job("x").result(-1)
        with pytest.raises(InvalidRequest, match="model: got 'nobody-serves'; expected one that is served: demo"):
            await own.submit("Hello.", model="nobody-serves")
        async with AsyncClient(redis_url=redis_url, model="nobody-serves") as elsewhere:
            lonely = await elsewhere.submit("Hello.")
            with pytest.raises(NoWorker) as late:
                await lonely.result(0)
        assert late.value.job is not None
        assert late.value.job.id == lonely.id

    run(redis_url, body)


def test_ten_thousand_outstanding_jobs_take_one_connection() -> None:
    """Not counting the connections of redis-py and kombu for publishing, which exist before."""
    with EmbeddedRedis.ephemeral() as server:
        connection = connect(server.url)
        record = '{"status": "REVOKED", "result": null}'

        async def body(own: AsyncClient) -> list[str]:
            jobs = await own.submit_many(["Hello."] * JOBS, max_tokens=1)
            before = len(connection.client_list())
            waiting = [asyncio.create_task(job.wait(PATIENCE_S)) for job in jobs]
            done = asyncio.create_task(_collect(own, jobs))
            async with asyncio.timeout(PATIENCE_S):
                while len(own._polls) < JOBS:
                    await asyncio.sleep(0.02)
            assert len(own._polls) == JOBS
            assert len(connection.client_list()) - before <= 1
            pipe = connection.pipeline(transaction=False)
            for job in jobs:
                pipe.set(f"headrace:celery-task-meta-{job.id}", record)
            pipe.execute()
            states = await asyncio.gather(*waiting)
            assert await done == JOBS
            assert len(own._polls) == 0
            return states

        assert set(run(server.url, body)) == {"cancelled"}


async def _collect(client: AsyncClient, jobs: list[Any]) -> int:
    return len([job async for job in client.as_completed([client.job(job.id) for job in jobs], timeout=PATIENCE_S)])


def test_an_unreachable_redis_is_an_error_for_each_waiting_call() -> None:
    async def body(own: AsyncClient) -> None:
        answers = await asyncio.gather(*(own.job(name).result(5) for name in "abc"), return_exceptions=True)
        assert [type(answer) for answer in answers] == [RedisUnreachable] * 3
        assert len({id(answer) for answer in answers}) == 3

    run("redis://localhost:1/0", body)


def test_closing_ends_waiting_calls(redis_url: str) -> None:
    async def inside() -> None:
        client = AsyncClient(redis_url=redis_url, model="nobody-serves")
        job = await client.submit("Hello.")
        waiting = asyncio.create_task(job.result())
        await asyncio.sleep(0.1)
        await client.close()
        with pytest.raises(RuntimeError, match="closed"):
            await waiting

    asyncio.run(inside())


def test_closing_ends_though_a_cancellation_is_lost(redis_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """`asyncio.wait_for` of Python 3.11 loses a cancellation that comes together with the result."""
    execute, lost = Pipeline.execute, []

    async def lose_one_cancellation(self: Pipeline, *args: Any, **kwargs: Any) -> Any:
        replies = await execute(self, *args, **kwargs)
        try:
            await asyncio.sleep(0.2)
        except asyncio.CancelledError:
            if lost:
                raise
            lost.append(True)
        return replies

    async def inside() -> None:
        client = AsyncClient(redis_url=redis_url, model="nobody-serves")
        job = await client.submit("Hello.")
        waiting = asyncio.create_task(job.result())
        await asyncio.sleep(0.1)
        async with asyncio.timeout(PATIENCE_S):
            await client.close()
        with pytest.raises(RuntimeError, match="closed"):
            await waiting
        assert lost

    monkeypatch.setattr(Pipeline, "execute", lose_one_cancellation)
    asyncio.run(inside())


def test_token_ids_and_texts_come_from_a_worker(client: Client, worker: WorkerProcess) -> None:
    text = "Hello. caf\u00e9 <|endoftext|>"
    found = client.tokenize(text)
    assert (found.count, found.max_model_len) == (len(found.tokens), 1024)
    assert "".join(found.token_strs).startswith("Hello.")
    assert client.detokenize(found.tokens) == text
    special = client.tokenize(text, parse_special_tokens=True)
    assert special.tokens[-1] == 50256
    assert special.count < found.count
    assert client.detokenize(special.tokens, skip_special_tokens=True) == "Hello. caf\u00e9 "
    job = client.submit(text, parse_special_tokens=True, max_tokens=2, temperature=0)
    by_ids = client.submit(special.tokens, max_tokens=2, temperature=0)
    assert job.result(PATIENCE_S).choices == by_ids.result(PATIENCE_S).choices
    with pytest.raises(JobFailed, match="vocabulary ends at 50256"):
        client.detokenize([60_000])
    with pytest.raises(InvalidRequest, match=r"^token_ids: got"):
        client.detokenize("Hello")  # type: ignore[arg-type]
    with pytest.raises(InvalidRequest, match=r"^token_ids: got"):
        client.detokenize([-1])

    async def scenario() -> None:
        async with AsyncClient(settings=client.settings) as own:
            assert await own.tokenize(text) == found
            assert await own.detokenize(found.tokens) == text
            with pytest.raises(JobFailed, match="no chat template"):
                await own.tokenize(messages=[{"role": "user", "content": "my secret"}])

    asyncio.run(scenario())


def test_messages_for_a_model_without_a_template_are_refused_and_logged_without_their_text(
    client: Client, worker: WorkerProcess
) -> None:
    messages = [{"role": "user", "content": "my secret words"}]
    with pytest.raises(JobFailed, match="so it takes no messages; put the template into its directory") as caught:
        client.submit(messages=messages).result(PATIENCE_S)
    assert caught.value.code == "no_chat_template"
    done = list(client.map([{"messages": messages}, "Hello."], max_tokens=1, return_exceptions=True))
    assert [type(each).__name__ for each in done] == ["JobFailed", "Result"]
    assert "secret words" not in worker.log.read_text()
