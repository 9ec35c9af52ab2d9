"""Jobs that Redis had and has no more: nobody waits for them without end, and nothing else counts as lost."""

from __future__ import annotations

import asyncio
import itertools
import json
import threading
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import redis

from headrace import client as api
from headrace.client import AsyncClient, Client, Job, JobCancelled, JobLost, ResultTimeout, UnknownJob
from headrace.client.batch.window import Window
from headrace.client.jobs import polling, presence, submission
from headrace.client.wire import keys
from headrace.client.wire.celery import TASK_NAME
from headrace.worker.jobs.redis_store import RedisStore
from tests.patience import PATIENCE_S

REVOKED = '{"status": "REVOKED", "result": null}'
#: Ways to wait for a job without a timeout.
WAITS: dict[str, Callable[[Client, Job], object]] = {
    "result": lambda _, job: job.result(),
    "wait": lambda _, job: job.wait(),
    "stream": lambda _, job: list(job.stream()),
    "as_completed": lambda client, job: list(client.as_completed([job])),
    "another handle": lambda client, job: client.job(job.id).result(),
    "a long timeout": lambda _, job: job.result(PATIENCE_S),
}


@pytest.fixture
def client(url: str) -> Iterator[Client]:
    with Client(redis_url=url, model="unit-lost") as made:
        yield made


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Look often, so that a test takes no seconds."""
    monkeypatch.setattr(presence, "LOOK_S", 0.05)
    monkeypatch.setattr(presence, "CONFIRM_S", 0.1)
    monkeypatch.setattr(polling, "LAST_POLL_S", 0.05)


def soon(action: Callable[[], object]) -> threading.Timer:
    """Run something while the test waits."""
    timer = threading.Timer(0.15, action)
    timer.start()
    return timer


@pytest.mark.parametrize("way", WAITS)
@pytest.mark.usefixtures("quick")
def test_a_job_that_redis_lost_is_not_waited_for_without_end(client: Client, connection: redis.Redis, way: str) -> None:
    job = client.submit("Hello.", stream=way == "stream")
    timer = soon(connection.flushdb)
    with pytest.raises(api.JobLost, match=f"{job.id}.*submit it again") as caught:
        WAITS[way](client, job)
    timer.join()
    assert caught.value.job == job
    assert isinstance(caught.value, UnknownJob)


def test_a_loss_is_noticed_within_seconds_and_by_a_handle_that_was_not_waiting(
    client: Client, connection: redis.Redis
) -> None:
    job, other = client.submit_many(["Hello."] * 2)
    stranger = client.job(other.id)
    assert stranger.status() == "queued"
    connection.flushdb()
    with pytest.raises(api.JobLost):
        job.result(10)
    for ask in (job.status, job.cancel, stranger.status, stranger.cancel):
        with pytest.raises(api.JobLost):
            ask()
    with pytest.raises(UnknownJob) as unknown:
        client.job(other.id).status()
    assert not isinstance(unknown.value, api.JobLost), "this handle has never seen it"


@pytest.mark.usefixtures("quick")
def test_one_evicted_job_among_many_is_told_after_the_outcomes_of_the_others(
    client: Client, connection: redis.Redis
) -> None:
    jobs = client.submit_many(["Hello."] * 600)

    def evict() -> None:
        connection.delete(keys.job(jobs[500].id))
        for job in jobs[:3]:
            connection.set(keys.result(job.id), REVOKED)

    timer = soon(evict)
    ended: list[Job] = []
    with pytest.raises(api.JobLost) as caught:
        ended.extend(client.as_completed(jobs))
    timer.join()
    assert caught.value.job == jobs[500]
    assert set(ended) == set(jobs[:3])


@pytest.mark.usefixtures("quick")
def test_the_async_client_tells_every_waiter(url: str, connection: redis.Redis) -> None:
    async def wait() -> list[object]:
        async with AsyncClient(redis_url=url, model="unit-lost") as client:
            job = await client.submit("Hello.", stream=True)

            async def collect() -> list[object]:
                return [event async for event in job.stream()]

            async def completed() -> list[object]:
                return [each async for each in client.as_completed([job])]

            waits = [job.result(), client.job(job.id).wait(), collect(), completed()]
            waiting = [asyncio.ensure_future(each) for each in waits]
            await asyncio.sleep(0.15)
            connection.flushdb()
            found = list(await asyncio.gather(*waiting, return_exceptions=True))
            with pytest.raises(api.JobLost) as caught:
                await job.status()
            assert caught.value.job is job
            return found

    found = asyncio.run(wait())
    assert [type(each) for each in found] == [api.JobLost] * 4


@pytest.mark.usefixtures("quick")
def test_a_batch_submits_lost_rows_again(client: Client, connection: redis.Redis) -> None:
    window: Window[int] = Window(client)
    jobs = [(i, client.submitter.prepare({"prompt": "a", "id": f"row-{i}"})) for i in range(3)]
    lists, ticks = keys.queue_lists("unit-lost"), itertools.count()
    sent: list[int] = []

    def tick() -> None:
        if next(ticks) == 0:
            connection.flushdb()
        if sum(map(connection.llen, lists)) and ticks.__reduce__()[1][0] > 1:  # type: ignore[arg-type]
            sent.append(1)
            for _, job in jobs:
                connection.set(keys.result(job.id), REVOKED)

    window._tick = tick
    outcomes = [outcome for pairs in window.run(jobs) for _, outcome in pairs]
    assert sent, "they were queued a second time"
    assert [type(outcome) for outcome in outcomes] == [JobCancelled] * 3


@pytest.mark.usefixtures("quick")
def test_a_worker_that_holds_a_lost_job_does_not_make_it_look_alive(client: Client, connection: redis.Redis) -> None:
    """Its message is lost too: if the worker ended before the job, nobody would compute it."""
    job = client.submit("Hello.")
    store = RedisStore(connection, result_ttl_s=60, checkpoint_ttl_s=60)
    store.count_attempts([job.id])
    connection.flushdb()
    store.started([job.id], "worker")
    store.returned([job.id], [job.id])
    with pytest.raises(api.JobLost):
        job.result()


# --- what is not lost ------------------------------------------------------------------------------------------------


def test_a_record_that_is_back_at_once_was_not_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    """For example because a worker replaces an invalid one, or a proxy asked a replica that lags."""
    now = 100.0
    monkeypatch.setattr(presence, "time", SimpleNamespace(monotonic=lambda: now))
    looks = presence.Presence()

    def look(*exist: int) -> tuple[int, list[str]]:
        commands = looks.request(["a", "b"])
        return len(commands), looks.answer(exist[: len(commands)])

    assert look() == (0, []), "not before LOOK_S"
    now += presence.LOOK_S
    assert look(1) == (1, []), "one of two records is missing"
    assert look(0, 1) == (2, []), "which one? a"
    assert look() == (0, [])
    now += presence.CONFIRM_S
    assert look(1, 1) == (2, []), "it is back, and b is there"
    now += presence.LOOK_S
    look(1)
    look(0, 1)
    now += presence.CONFIRM_S
    assert look(1, 0) == (2, ["a"]), "it is missing for the second time"


@pytest.mark.usefixtures("quick")
def test_a_message_of_another_producer_without_a_record_is_unknown_and_then_not_lost(
    client: Client, connection: redis.Redis
) -> None:
    """Plain Celery producers write no record; a worker writes the first field when it takes the message."""
    signature = client.signature("Hello.")
    client._app.send_task(TASK_NAME, args=signature.args, task_id=signature.id, queue=keys.queue("unit-lost"))
    with pytest.raises(UnknownJob) as unknown:
        client.job(signature.id).result(1)
    assert not isinstance(unknown.value, api.JobLost)
    connection.hincrby(keys.job(signature.id), "attempts", 1)
    handle = client.job(signature.id)
    with pytest.raises(ResultTimeout, match="still queued"):
        handle.result(0.3)
    assert handle.status() == "queued"


@pytest.mark.usefixtures("quick")
def test_a_result_whose_job_record_is_gone_is_a_result(client: Client, connection: redis.Redis) -> None:
    job = client.submit("Hello.")

    def end() -> None:
        connection.set(keys.result(job.id), REVOKED)
        connection.delete(keys.job(job.id))

    timer = soon(end)
    assert job.wait(PATIENCE_S) == "cancelled"
    timer.join()


def test_what_is_looked_up_costs_one_command_for_many_jobs(client: Client) -> None:
    """10,000 unfinished jobs: the requests that look for lost ones stay few and small."""
    state = polling.PollState()
    names = [f"{i:05}" for i in range(10_000)]
    for name in names:
        state.add(name)
    commands = state.request(0)
    state.answer([[None] * (len(command) - 1) if command[0] == "MGET" else 1 for command in commands])
    state._presence._look_at = 0.0
    looks = [command for command in state.request(0) if command[0] == "EXISTS"]
    assert sum(len(command) - 1 for command in looks) == presence.LOOK_JOBS
    assert len(looks) <= 8
    assert json.dumps(looks).count(keys.job("")) == presence.LOOK_JOBS


def test_a_record_whose_message_redis_lost_is_gone_soon(
    client: Client, connection: redis.Redis, quick: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A replica may have received the record and not the message, which is written next."""
    monkeypatch.setattr(keys, "UNSENT_TTL_S", 1)
    jobs = client.submit_many(["Hello.", {"prompt": "Hello.", "id": "chosen"}])
    assert all(connection.ttl(keys.job(job.id)) > keys.UNFINISHED_TTL_S - 60 for job in jobs)
    connection.flushdb()
    prepared = [client.submitter.prepare({"prompt": "Hello.", "id": job.id}) for job in jobs]
    client.submitter._write_records(prepared)  # what the replica has
    for job in jobs:
        with pytest.raises(JobLost):
            job.result()


def test_submitting_an_ended_job_again_does_not_let_its_record_outlive_the_result(
    client: Client, connection: redis.Redis
) -> None:
    job = client.submit("Hello.", id="chosen")
    RedisStore(connection, result_ttl_s=100, checkpoint_ttl_s=30).finish({job.id: REVOKED})
    assert connection.ttl(keys.job(job.id)) <= 100
    assert client.submit("Hello.", id="chosen") == job
    assert connection.ttl(keys.job(job.id)) <= 100


def test_a_job_that_ends_before_its_message_is_noted_keeps_the_lifetime_of_its_result(
    client: Client, connection: redis.Redis, monkeypatch: pytest.MonkeyPatch
) -> None:
    keep = client.submitter._keep_records

    def ended_before(group: Any) -> Any:
        for job in group:
            RedisStore(connection, result_ttl_s=100, checkpoint_ttl_s=30).finish({job.id: REVOKED})
        return keep(group)

    monkeypatch.setattr(client.submitter, "_keep_records", ended_before)
    job = client.submit("Hello.")
    assert connection.ttl(keys.job(job.id)) <= client.settings.result_ttl_s


def test_the_note_that_a_message_was_sent_is_repeated_while_redis_is_away(
    client: Client, connection: redis.Redis, monkeypatch: pytest.MonkeyPatch
) -> None:
    keep, calls = client.submitter._keep_records, 0

    def fails_twice(group: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls < 3:
            raise redis.ConnectionError
        return keep(group)

    monkeypatch.setattr(submission, "ANNOUNCE_PAUSES_S", (0, 0, 0))
    monkeypatch.setattr(client.submitter, "_keep_records", fails_twice)
    job = client.submit("Hello.")
    assert connection.ttl(keys.job(job.id)) > keys.UNSENT_TTL_S


@pytest.mark.parametrize("moment", ["_check_ids", "_write_records", "_publish", "_mark_sent", "_keep_records"])
@pytest.mark.parametrize("again", [False, True])
def test_whenever_redis_loses_a_job_while_it_is_submitted_no_record_stays(
    client: Client, connection: redis.Redis, monkeypatch: pytest.MonkeyPatch, moment: str, again: bool
) -> None:
    """A record without a lifetime would stay for ever, and one that says that it was sent would never be sent again."""
    if again:
        client.submit("Hello.", id="chosen")
    original = getattr(client.submitter, moment)

    def lost_then(*args: Any) -> Any:
        answer = original(*args)
        connection.flushdb()
        return answer

    monkeypatch.setattr(client.submitter, moment, lost_then)
    job = client.submit("Hello.", id="chosen")
    monkeypatch.undo()
    assert connection.ttl(keys.job(job.id)) != -1
    connection.delete(*keys.queue_lists(client.model_name))
    if not connection.exists(keys.job(job.id)):
        client.submit("Hello.", id="chosen")
        assert sum(connection.llen(name) for name in keys.queue_lists(client.model_name)) == 1  # type: ignore[misc]
