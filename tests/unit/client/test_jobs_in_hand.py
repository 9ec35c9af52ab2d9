"""Jobs are listed, looked at, cancelled and purged without a worker; lost messages are found."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import redis

from headrace.client import AsyncClient, Client, InvalidRequest, JobCancelled, JobLost, UnknownJob
from headrace.client.batch import window
from headrace.client.jobs import lost, presence, reading
from headrace.client.jobs.details import JobDetails
from headrace.client.jobs.listing import JobFilter
from headrace.client.wire import keys
from headrace.client.wire.job_index import DRAIN_ENTRIES, owned_by
from headrace.client.wire.results import cancelled_record
from headrace.worker.jobs.redis_store import RedisStore
from headrace.worker.jobs.store import Waiting
from headrace.worker.queue.backend import ResultBackend

MODEL = "unit-hand"
SUCCESS = '{"status": "SUCCESS", "result": {}, "task_id": "x"}'


@pytest.fixture
def client(url: str) -> Iterator[Client]:
    with Client(redis_url=url, model=MODEL) as made:
        yield made


@pytest.fixture
def store(connection: redis.Redis) -> RedisStore:
    return RedisStore(connection, result_ttl_s=100, checkpoint_ttl_s=100)


@pytest.fixture
def at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Jobs may be lost from the moment of their submission."""
    monkeypatch.setattr(lost, "SENDING_S", -1.0)
    monkeypatch.setattr(lost, "CONFIRM_S", 0.0)
    monkeypatch.setattr(reading, "LOOK_SHARE", 1.0)


def ids(jobs: Any) -> list[str]:
    return [job.id for job in jobs]


def take(connection: redis.Redis, model: str = MODEL) -> None:
    """Move the oldest message of normal priority to the unacknowledged ones, as take.lua does."""
    message = connection.rpop(keys.queue_lists(model)[1])
    connection.hset(keys.unacked(), "tag", f'[{message}, "", "headrace.{model}"]')


# --- lists -----------------------------------------------------------------------------------------------------------


def test_jobs_are_listed_newest_first_in_pages_whoever_submitted_them(client: Client, url: str) -> None:
    jobs = client.submit_many(["Hello."] * 40)
    with owned_by("a1b2"), Client(redis_url=url, model=MODEL) as other:
        jobs += other.submit_many(["Hello."] * 5)
    jobs.append(client.submit("Hello.", model="unit-hand-2"))
    newest_first = ids(reversed(jobs))
    assert ids(client.jobs()) == newest_first
    pages, after = list[list[str]](), ""
    while not pages or after:
        page = client.job_page(limit=7, after=after)
        pages.append(ids(page.jobs))
        after = page.after
    assert [job_id for page in pages for job_id in page] == newest_first
    assert [len(page) for page in pages] == [7, 7, 7, 7, 7, 7, 4]
    assert {(job.model, job.owner, job.state, job.ended_at) for job in client.jobs()} == {
        (MODEL, "", "queued", None),
        (MODEL, "a1b2", "queued", None),
        ("unit-hand-2", "", "queued", None),
    }
    assert ids(client.jobs(owner="a1b2")) == newest_first[1:6]
    assert ids(client.jobs(owner="")) == newest_first[:1] + newest_first[6:]
    assert ids(client.jobs(model="unit-hand-2")) == newest_first[:1]
    assert not ids(client.jobs(owner="nobody"))

    async def in_asyncio() -> list[str]:
        async with AsyncClient(redis_url=url, model=MODEL) as made:
            assert (await made.job_details(jobs[0])).state == "queued"
            return [job.id async for job in made.jobs(model=MODEL)]

    assert asyncio.run(in_asyncio()) == newest_first[1:]


def test_entries_of_the_same_time_are_all_on_some_page(client: Client, connection: redis.Redis) -> None:
    names = [f"same-{number:03}" for number in range(25)]
    for name in names:
        connection.hset(keys.job(name), "state", "queued")
    connection.zadd(keys.jobs(""), {f"{name} m": 1_700_000_000.25 for name in names[:15]})
    connection.zadd(keys.jobs("k"), {f"{name} m": 1_700_000_000.25 for name in names[15:]})
    connection.zadd(keys.owners(), {keys.NO_OWNER: 1, "k": 2})
    found, after = list[str](), ""
    while True:
        page = client.job_page(limit=4, after=after)
        found += ids(page.jobs)
        if not (after := page.after):
            break
    assert sorted(found) == names


def test_a_list_is_filtered_by_state_and_age(client: Client, connection: redis.Redis, store: RedisStore) -> None:
    jobs = client.submit_many(["Hello."] * 6)
    list(client.jobs())
    store.count_attempts(ids(jobs[:4]), "w 1")
    store.started(ids(jobs[:4]), "w")
    store.finish({jobs[0].id: SUCCESS, jobs[1].id: cancelled_record(jobs[1].id)})
    connection.set(keys.result(jobs[2].id), SUCCESS)  # by a worker of an earlier version
    for number, job in enumerate(jobs):
        connection.zadd(keys.jobs(""), {f"{job.id} {MODEL}": time.time() - 100 * number})
    by_state = {state: ids(client.jobs(state=state)) for state in ("queued", "running", "succeeded", "cancelled")}
    assert by_state == {
        "queued": ids(jobs[4:]),
        "running": [jobs[3].id],
        "succeeded": [jobs[0].id, jobs[2].id],
        "cancelled": [jobs[1].id],
    }
    listed = {job.id: job for job in client.jobs()}
    assert abs((listed[jobs[0].id].ended_at or 0) - time.time()) < 60
    assert listed[jobs[2].id].ended_at is None
    assert ids(client.jobs(older_than=150, newer_than=450)) == ids(jobs[2:5])
    assert ids(client.lister.all(JobFilter(search=jobs[3].id[3:20]))) == [jobs[3].id]
    assert ids(client.lister.all(JobFilter(search=keys.tag(jobs[3].id)))) == [jobs[3].id]


@pytest.mark.parametrize(
    ("conditions", "message"),
    [
        ({"state": "waiting"}, "state: got 'waiting'; expected one of queued, running, succeeded"),
        ({"older_than": -1}, "older_than: got -1; expected a number of seconds from 0"),
        ({"newer_than": 5, "older_than": 9}, "newer_than: got 5; expected more seconds than older_than, which is 9"),
        ({"model": "a b"}, "model"),
        ({"limit": 0}, "limit: got 0; expected a whole number from 1"),
        ({"after": "x"}, "after: got 'x'; expected the value that the page before gave"),
    ],
)
def test_a_wrong_condition_is_named(client: Client, conditions: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidRequest, match=message):
        client.job_page(**conditions)


def test_the_index_is_bounded_and_expires_with_its_jobs(
    client: Client, connection: redis.Redis, store: RedisStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(keys, "LISTED_JOBS", 30)
    jobs = client.submit_many(["Hello."] * 50)
    assert 0 < connection.ttl(keys.submitted()) <= keys.UNFINISHED_TTL_S
    store.fill_index()
    assert not connection.exists(keys.submitted())
    for name in (keys.jobs(""), keys.owners()):
        assert 0 < connection.ttl(name) <= keys.UNFINISHED_TTL_S
    assert ids(client.jobs()) == ids(reversed(jobs[20:]))
    connection.delete(*(keys.job(job.id) for job in jobs[20:40]))
    store.prune_index()
    assert connection.zcard(keys.jobs("")) == 10
    connection.delete(keys.job(jobs[45].id))
    assert ids(client.jobs()) == ids(reversed(jobs[40:45] + jobs[46:]))
    assert connection.zcard(keys.jobs("")) == 9, "who meets an entry of an expired job removes it"


def test_an_entry_that_a_stranger_wrote_is_dropped(client: Client, connection: redis.Redis) -> None:
    job = client.submit("Hello.")
    connection.lpush(
        keys.submitted(),
        "",
        "x",
        "- nan m a",
        "../x 1 m a",
        "- 1.2 m a",
        "- 9 m " + "x" * 10_000,
        "- 9999999999999999999 m a",
        "\xff",
    )
    connection.hset(keys.job("spoilt"), "state", "eaten 5")
    connection.set(keys.job("text"), "x")
    connection.zadd(keys.jobs(""), {"spoilt m": 5, "text m": 6, " ": 7, "": 8})
    assert ids(client.jobs()) == [job.id]


def test_jobs_of_other_celery_programs_are_listed(client: Client, store: RedisStore) -> None:
    signature = client.signature("Hello.", id="hand:signature")
    signature.apply_async()
    store.announce({"hand:plain": Waiting(MODEL, None)})
    assert sorted(ids(client.jobs())) == ["hand:plain", "hand:signature"]


def test_more_jobs_than_one_request_moves_are_listed(client: Client, connection: redis.Redis) -> None:
    names = [f"many-{number}" for number in range(DRAIN_ENTRIES + 5)]
    pipe = connection.pipeline()
    for place, name in enumerate(names):
        pipe.hset(keys.job(name), "state", "queued")
        pipe.lpush(keys.submitted(), f"- {(1_700_000_000 + place) * 10**6} m {name}")
    pipe.execute()
    assert ids(client.jobs()) == names[::-1]


# --- one job ---------------------------------------------------------------------------------------------------------


def test_all_that_is_known_of_a_job(client: Client, connection: redis.Redis, store: RedisStore) -> None:
    with owned_by("a1b2"):
        job = client.submit("A secret.", max_tokens=5)
    details = client.job_details(job.id)
    assert (details.state, details.model, details.owner, details.attempts) == ("queued", MODEL, "a1b2", 0)
    assert abs((details.submitted_at or 0) - time.time()) < 60
    assert "secret" not in details.model_dump_json()
    assert client.job_details(job, prompt=True).prompt == "A secret."
    take(connection)
    assert client.job_details(job, prompt=True).prompt == "A secret."
    store.count_attempts([job.id], "w 1")
    store.started([job.id], "w")
    details = client.job_details(job.id)
    assert (details.state, details.worker, details.attempts) == ("running", "w", 1)
    store.finish({job.id: json.dumps({"status": "FAILURE", "result": failure("no_room", "buy more", ["so far"])})})
    details = client.job_details(job.id)
    assert (details.state, details.error and details.error.code, details.texts) == ("failed", "no_room", None)
    assert client.job_details(job.id, texts=True).texts == ["so far"]
    assert details.ended_at is not None
    with pytest.raises(UnknownJob):
        client.job_details("nobodys")
    assert JobDetails.model_validate_json(details.model_dump_json()) == details


def failure(*arguments: Any) -> dict[str, Any]:
    return {"exc_type": "JobFailed", "exc_message": list(arguments), "exc_module": "x"}


# --- cancel and purge ------------------------------------------------------------------------------------------------


def test_a_job_that_no_worker_has_is_cancelled_at_once(
    client: Client, connection: redis.Redis, store: RedisStore
) -> None:
    single, *grouped = client.submit("Hello."), *client.submit_many(["Hello."] * 3)
    assert client.cancel([single, grouped[0]]) == [True, True]
    for job in (single, grouped[0]):
        with pytest.raises(JobCancelled, match="cancelled before it started"):
            job.result(0)
        assert 0 < connection.ttl(keys.job(job.id)) <= 86_400
    assert client.cancel([single, grouped[0]]) == [False, False]
    assert {job.id: job.state for job in client.jobs()} == {
        single.id: "cancelled",
        **{job.id: "cancelled" if job is grouped[0] else "queued" for job in grouped},
    }
    connection.delete(keys.result(single.id))
    with pytest.raises(UnknownJob):
        client.job(single.id).status()
    records = store.lookup([single.id, grouped[0].id, grouped[1].id])
    assert [record.finished for record in records] == [False, True, False], "a worker drops what has ended"


def test_the_record_of_a_cancelled_job_is_what_a_worker_would_store(redis_url: str, app_backend: ResultBackend) -> None:
    mine, theirs = (json.loads(record) for record in (cancelled_record("x"), app_backend.record("x", early())))
    assert mine.keys() == theirs.keys()
    for record in (mine, theirs):
        record.pop("date_done")
    assert mine == theirs


def early() -> JobCancelled:
    return JobCancelled(message="the job was cancelled before it started")


@pytest.fixture
def app_backend(redis_url: str) -> Iterator[ResultBackend]:
    from headrace.config import load_settings
    from headrace.worker.celery import make_app

    app = make_app(load_settings(redis_url=redis_url))
    yield app.backend
    app.close()


def test_a_running_job_and_one_of_a_canvas_are_left_to_their_worker(
    client: Client, connection: redis.Redis, store: RedisStore
) -> None:
    job = client.submit("Hello.")
    store.count_attempts([job.id], "w 1")
    store.started([job.id], "w")
    client.signature("Hello.", id="hand:canvas").apply_async()
    assert client.cancel([job.id, "hand:canvas"]) == [True, True]
    for job_id in (job.id, "hand:canvas"):
        assert connection.get(keys.cancel(job_id)) == "1"
        assert not connection.exists(keys.result(job_id))


def test_purge_ends_what_waits_and_nothing_else(client: Client, connection: redis.Redis, store: RedisStore) -> None:
    running, taken = client.submit("Hello."), client.submit("Hello.")
    take(connection)
    store.count_attempts([running.id], "w 1")
    store.started([running.id], "w")
    connection.rpop(keys.queue_lists(MODEL)[1])  # the message of `taken` is with a worker
    waiting = [*client.submit_many(["Hello."] * 40), client.submit("Hello.", priority="interactive")]
    other = client.submit("Hello.", model="unit-hand-2")
    (client.signature("Hello.", id="hand:purged") | client.signature("Hello.", id="hand:next")).apply_async()
    connection.lpush(keys.queue_lists(MODEL)[3], "not a message")
    assert client.purge(MODEL) == 43
    assert {job.status() for job in (*waiting, taken)} == {"cancelled"}
    assert (running.status(), other.status(), client.job("hand:purged").status()) == ("running", "queued", "queued")
    assert [connection.llen(name) for name in keys.queue_lists(MODEL)] == [0, 1, 0, 1], "the canvas, the unreadable one"
    assert connection.exists(keys.cancel("hand:purged"))
    assert client.purge(MODEL) <= 1
    assert client.cancel_all(MODEL) >= 1
    assert connection.get(keys.cancel(running.id)) == "1"
    assert other.status() == "queued"


# --- lost messages ---------------------------------------------------------------------------------------------------


def test_a_job_whose_message_was_purged_is_lost(
    client: Client, connection: redis.Redis, at_once: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reading, "REMIND_S", 0.2)
    job, named = client.submit("Hello."), client.submit("Hello.", id="hand:lost")
    connection.delete(*keys.queue_lists(MODEL))
    with pytest.raises(JobLost, match=r"in no queue and with no worker.*submit it again.*celery purge") as caught:
        job.result()
    assert caught.value.job == job
    with pytest.raises(JobLost):
        named.result(0.1)
    again = client.submit("Hello.", id="hand:lost")
    assert connection.llen(keys.queue_lists(MODEL)[1]) == 1, "its id is free again, and the job is sent"
    assert again.status() == "queued"

    async def in_asyncio() -> None:
        async with AsyncClient(redis_url=client.url, model=MODEL) as made:
            lost_job = await made.submit("Hello.")
            connection.delete(*keys.queue_lists(MODEL))
            with pytest.raises(JobLost):
                await lost_job.result(0.1)

    asyncio.run(in_asyncio())


def test_no_job_with_a_message_is_lost(
    client: Client, connection: redis.Redis, at_once: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    jobs = [client.submit("Hello."), *client.submit_many(["Hello."] * 20), client.submit("Hello.", priority="bulk")]
    client.signature("Hello.", id="hand:eta").apply_async(countdown=1000)
    take(connection)
    everything = [*ids(jobs), "hand:eta"]
    assert client.reader.find_lost(everything) == []
    connection.hset(keys.unacked(), "odd", "not a message")
    connection.lpush(keys.queue_lists(MODEL)[0], "not a message")
    assert client.reader.find_lost(everything) == []
    monkeypatch.setattr(lost, "SENDING_S", 60.0)
    connection.delete(keys.unacked(), *keys.queue_lists(MODEL))
    assert client.reader.find_lost(everything) == [], "their messages may still be on the way"


MOVES: dict[str, Callable[[redis.Redis], object]] = {
    "a worker takes it": take,
    "a worker begins it": lambda c: c.hincrby(keys.job("hand:moving"), "attempts", 1),
    "it ends": lambda c: c.set(keys.result("hand:moving"), SUCCESS),
    "it runs": lambda c: c.hset(keys.job("hand:moving"), "state", "running"),
}


@pytest.mark.parametrize("move", MOVES)
def test_a_job_that_moves_during_the_look_is_not_lost(
    client: Client, connection: redis.Redis, at_once: None, monkeypatch: pytest.MonkeyPatch, move: str
) -> None:
    """The message cannot be seen where the look reads, and the job changes between its two reads."""
    client.submit("Hello.", id="hand:moving")
    (message,) = connection.lrange(keys.queue_lists(MODEL)[1], 0, -1)
    if move != "a worker takes it":
        connection.delete(*keys.queue_lists(MODEL))
    read = lost.queued_messages

    def moving(*arguments: Any) -> Any:
        MOVES[move](connection)
        monkeypatch.setattr(lost, "queued_messages", read)
        return read(*arguments)

    monkeypatch.setattr(lost, "queued_messages", moving)
    assert client.reader.find_lost(["hand:moving"]) == []
    assert message


def test_a_batch_submits_rows_again_whose_messages_were_purged(
    client: Client, connection: redis.Redis, at_once: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(window, "REMIND_S", 0.1)
    monkeypatch.setattr(presence, "LOOK_S", 0.05)
    monkeypatch.setattr(presence, "CONFIRM_S", 0.05)
    told: list[str] = []
    rows = window.Window[int](client, notify=told.append)
    jobs = [(i, client.submitter.prepare({"prompt": "a", "id": f"hand:row-{i}"})) for i in range(3)]
    purged = False

    def tick() -> None:
        nonlocal purged
        queued = sum(map(connection.llen, keys.queue_lists(MODEL)))
        if queued and not purged:
            connection.delete(*keys.queue_lists(MODEL))
            purged = True
        elif queued:
            client.purge(MODEL)

    rows._tick = tick
    outcomes = [outcome for pairs in rows.run(jobs) for _, outcome in pairs]
    assert [type(outcome) for outcome in outcomes] == [JobCancelled] * 3
    assert any("3 jobs have lost their messages, as after `celery purge`" in line for line in told)
