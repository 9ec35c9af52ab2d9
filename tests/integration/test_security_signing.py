"""A worker with a signing key computes only jobs that were signed with it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest
from celery import Celery

from headrace.client import Client, JobFailed
from headrace.client.wire import keys
from headrace.client.wire.errors import JobError
from headrace.client.wire.redis import connect
from headrace.client.wire.signing import sign
from headrace.config import load_settings
from headrace.worker.redis_server import EmbeddedRedis
from tests.integration.processes import WorkerProcess, wait_until
from tests.patience import PATIENCE_S

NEW, OLD, FOREIGN = "new-key-" * 4, "old-key-" * 4, "else-key" * 4
REQUEST = {"prompt": "Hello.", "max_tokens": 5, "temperature": 0}
TEXT = '\n\n"I am'


@pytest.fixture(scope="module")
def worker(server: EmbeddedRedis, tmp_path_factory: pytest.TempPathFactory) -> Iterator[WorkerProcess]:
    log = tmp_path_factory.mktemp("signing") / "worker.log"
    environment = {"HEADRACE_REDIS_URL": server.url, "HEADRACE_SIGNING_KEY": f"{NEW},{OLD}", "HEADRACE_SLOTS": "4"}
    with WorkerProcess(log, **environment) as process:
        process.wait_ready()
        yield process


def client_of(server: EmbeddedRedis, key: str | None) -> Client:
    return Client(settings=load_settings(redis_url=server.url, signing_key=key))


def outcome(client: Client, job_id: str) -> str:
    """Wait for a job, and return its text or the code of its failure."""
    wait_until(lambda: client._redis.exists(keys.result(job_id)))
    try:
        return client.job(job_id).result(5).text
    except JobError as error:
        return error.code


@pytest.mark.parametrize("key", [NEW, OLD, f"{NEW},{OLD}", f"{OLD},{FOREIGN}"], ids=["new", "old", "both", "first"])
def test_jobs_signed_with_a_key_of_the_worker_are_computed(
    server: EmbeddedRedis, worker: WorkerProcess, key: str
) -> None:
    with client_of(server, key) as client:
        jobs = [client.submit(**REQUEST), *client.submit_many([REQUEST] * 3)]
        assert [job.result(PATIENCE_S).text for job in jobs] == [TEXT] * 4


@pytest.mark.parametrize("key", [None, FOREIGN, f"{FOREIGN},{NEW}"], ids=["none", "foreign", "foreign first"])
def test_anything_else_fails_and_is_never_computed(
    server: EmbeddedRedis, worker: WorkerProcess, key: str | None
) -> None:
    started = len(worker.events("job.finished"))
    with client_of(server, key) as client:
        jobs = [client.submit(**REQUEST), *client.submit_many([REQUEST] * 3)]
        for job in jobs:
            with pytest.raises(JobFailed, match="HEADRACE_SIGNING_KEY") as caught:
                job.result(PATIENCE_S)
            assert caught.value.code == "bad_signature"
            assert job.status() == "failed"
    finished = worker.events("job.finished")[started:]
    assert {line["code"] for line in finished} == {"bad_signature"}


def test_each_job_of_a_group_is_verified_separately(server: EmbeddedRedis, worker: WorkerProcess, app: Celery) -> None:
    good = [sign(NEW.encode(), f"each:{i}", "demo", REQUEST) for i in range(6)]
    members: list[dict[str, Any]] = [
        {"id": "each:0", "request": good[0]},
        {"id": "each:1", "request": good[0]},  # another job's signature
        {"id": "each:2", "request": {**good[2], "max_tokens": 6}},
        {"id": "each:3", "request": sign(NEW.encode(), "each:3", "gpt2", REQUEST)},  # for another model's queue
        {"id": "each:4", "request": REQUEST},
        {"id": "each:5", "request": good[5]},
    ]
    app.send_task("headrace.generate_many", args=[members])
    with client_of(server, NEW) as client:
        assert [outcome(client, f"each:{i}") for i in (0, 5)] == [TEXT, TEXT]
        wait_until(lambda: client._redis.hlen(keys.unacked()) == 0)
        assert not any(client._redis.exists(keys.result(f"each:{i}")) for i in range(1, 5)), "nobody submitted these"
    assert "4 of its 6 jobs" in worker.events("message.refused")[-1]["reason"]


def test_who_has_no_key_ends_no_job_by_naming_it(server: EmbeddedRedis, worker: WorkerProcess, app: Celery) -> None:
    """This holds for running, waiting and future jobs; the refused message is kept with a reason."""
    refused = len(worker.events("message.refused"))
    long = {**REQUEST, "max_tokens": 900, "ignore_eos": True}
    forged = sign(FOREIGN.encode(), "victim:0", "demo", REQUEST)
    with client_of(server, NEW) as client:
        with worker.slowly():
            victims = [client.submit(id=f"victim:{i}", **long) for i in range(5)]  # one waits for a slot
            wait_until(lambda: victims[0].status() == "running")
            for name in (*(job.id for job in victims), "victim:later"):
                app.send_task("headrace.generate", args=[REQUEST], task_id=name, priority=0)
            app.send_task("headrace.generate_many", args=[[{"id": "victim:0", "request": forged}]], priority=0)
            app.send_task("headrace.generate", args=[REQUEST], task_id="victim:0", time_limit="x", priority=0)
            app.send_task("headrace.unheard", task_id="victim:0", priority=0)
            worker.wait_for("message.refused", count=refused + 9)
            assert victims[0].status() == "running"
        assert client.submit(id="victim:later", **REQUEST).result(PATIENCE_S).text == TEXT
        assert {job.result(PATIENCE_S).usage.completion_tokens for job in victims} == {900}
        letters = [json.loads(text)["reason"] for text in client._redis.lrange(keys.dead(), 0, 8)]  # type: ignore[union-attr]
        wait_until(lambda: client._redis.hlen(keys.unacked()) == 0)
    assert sum("1 of its 1 jobs have no valid signature" in reason for reason in letters) == 8
    assert sum("only signed jobs" in reason for reason in letters) == 1
    assert not worker.events("message.adopted")
    ended = [(line["job_id"], line["state"]) for line in worker.events("job.finished") if "victim" in line["job_id"]]
    assert sorted(ended) == sorted((job.id, "succeeded") for job in (*victims, client.job("victim:later")))


def test_a_message_sent_again_is_one_result(server: EmbeddedRedis, worker: WorkerProcess) -> None:
    """An attacker can replay a signed message: the worker knows its id and computes nothing."""
    with client_of(server, NEW) as client:
        job = client.submit(id="again", **REQUEST)
        first = job.result(PATIENCE_S)
        before = client._redis.get(keys.result("again"))
        wire = client.submitter.prepare({"id": "again", **REQUEST, "seed": first.seed}).wire
        client._app.send_task("headrace.generate", args=[wire], task_id="again")
        client._app.send_task("headrace.generate_many", args=[[{"id": "again", "request": wire}]])
        assert client.submit(**REQUEST).result(PATIENCE_S)  # the messages before it have been processed
        wait_until(lambda: client._redis.hlen(keys.unacked()) == 0)
        assert client._redis.get(keys.result("again")) == before
    assert [line["state"] for line in worker.events("job.finished") if line["job_id"] == "again"] == ["succeeded"]


def test_instructions_in_an_unsigned_envelope_are_ignored(
    server: EmbeddedRedis, worker: WorkerProcess, app: Celery
) -> None:
    """Celery's envelope is not signed, including its callbacks and its start time."""
    follower = app.tasks["headrace.generate"].signature(args=[REQUEST], task_id="follower")
    for name, more in {
        "envelope:link": {"link": follower},
        "envelope:error": {"link_error": follower},
        "envelope:chain": {"chain": [dict(follower)]},
        "envelope:late": {"countdown": 10_000},
        "envelope:expired": {"expires": 0.001},
    }.items():
        app.send_task("headrace.generate", args=[sign(NEW.encode(), name, "demo", REQUEST)], task_id=name, **more)
        with client_of(server, NEW) as client:
            assert outcome(client, name) == TEXT, name
    assert not connect(server.url).exists(keys.result("follower"))


@pytest.mark.parametrize(
    ("task", "args"),
    [
        ("celery.map", [{"task": "headrace.generate"}, [REQUEST]]),
        ("celery.starmap", [{"task": "headrace.generate"}, [[REQUEST]]]),
        ("celery.chord_unlock", ["group", {"task": "headrace.generate"}]),
        ("celery.backend_cleanup", []),
    ],
)
def test_celerys_own_tasks_are_refused(
    server: EmbeddedRedis, worker: WorkerProcess, app: Celery, task: str, args: list[Any]
) -> None:
    count = len(worker.events("message.refused"))
    app.send_task(task, args=args, task_id=f"own:{task}")
    worker.wait_for("message.refused", count=count + 1)
    assert "only signed jobs" in worker.events("message.refused")[-1]["reason"]
    wait_until(lambda: connect(server.url).hlen(keys.unacked()) == 0)


def test_without_a_key_the_message_is_unchanged(server: EmbeddedRedis) -> None:
    with EmbeddedRedis.ephemeral() as own, client_of(own, None) as client:
        client.submit("Hello.", id="plain", max_tokens=3, seed=1)
        client.submit_many([{"prompt": "Hello.", "id": f"plain:{i}", "seed": 1} for i in range(2)])
        raw = client._redis.lrange(keys.queue_lists("demo")[1], 0, -1)
    assert "signature" not in str([body_of(message) for message in raw])
    assert [body_of(message)[0] for message in raw] == [
        [[{"id": f"plain:{i}", "request": {"schema_version": 1, "prompt": "Hello.", "seed": 1}} for i in range(2)]],
        [{"schema_version": 1, "prompt": "Hello.", "seed": 1, "max_tokens": 3}],
    ]


def body_of(message: str) -> Any:
    import base64

    return json.loads(base64.b64decode(json.loads(message)["body"]))
