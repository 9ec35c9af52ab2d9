"""How messages are taken out of Redis: none is lost, and an unreadable one affects no other."""

from __future__ import annotations

import base64
import contextlib
import json
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import redis

from headrace.client import Client, JobFailed
from headrace.client.wire import keys
from headrace.client.wire.redis import connect
from headrace.worker.celery import make_app
from headrace.worker.redis_server import EmbeddedRedis
from tests.integration.processes import WorkerProcess, wait_until
from tests.patience import PATIENCE_S

NORMAL = keys.queue_lists("demo")[1]

#: Kills a worker while it takes a message: before the atomic step, and right after it.
KILL = (
    "import os\nfrom headrace.worker.queue import transport\ntransport.Channel.{} = lambda *_: os.kill(os.getpid(), 9)"
)


@pytest.fixture
def connection(server: EmbeddedRedis) -> Iterator[redis.Redis]:
    made = connect(server.url)
    made.flushall()
    yield made
    made.close()


@pytest.fixture
def client(server: EmbeddedRedis, connection: redis.Redis) -> Iterator[Client]:
    with Client(redis_url=server.url) as made:
        yield made


@pytest.fixture(scope="module")
def environment(server: EmbeddedRedis) -> dict[str, str]:
    return {"HEADRACE_REDIS_URL": server.url, "HEADRACE_SLOTS": "2", "HEADRACE_LEASE_S": "3"}


@pytest.fixture(scope="module")
def worker(environment: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> Iterator[WorkerProcess]:
    with WorkerProcess(tmp_path_factory.mktemp("messages") / "worker.log", **environment) as process:
        process.wait_ready()
        yield process


@contextlib.contextmanager
def full(connection: redis.Redis) -> Iterator[None]:
    """Redis refuses every command that needs memory."""
    connection.config_set("maxmemory", "1")
    try:
        yield
    finally:
        relieve(connection)


def relieve(connection: redis.Redis) -> None:
    connection.config_set("maxmemory", "0")


@contextlib.contextmanager
def asleep(worker: WorkerProcess) -> Iterator[None]:
    """The worker takes no message during the block."""
    worker.signal(signal.SIGSTOP)
    try:
        yield
    finally:
        worker.signal(signal.SIGCONT)


@pytest.mark.parametrize("place", ["_take", "_deliver_message"])
def test_a_worker_killed_while_it_takes_a_message_loses_none(
    client: Client,
    connection: redis.Redis,
    worker: WorkerProcess,
    environment: dict[str, str],
    tmp_path: Path,
    place: str,
) -> None:
    with asleep(worker):
        jobs = client.submit_many(["Hello."] * 16, max_tokens=2, priority="interactive")
        jobs.append(client.submit("Hello.", max_tokens=2, priority="bulk"))
        with WorkerProcess(tmp_path / "killed.log", patch=KILL.format(place), **environment) as killed:
            assert killed.wait() == -9
        waiting = sum(connection.llen(name) for name in keys.queue_lists("demo"))  # type: ignore[misc]
        held = connection.hlen(keys.unacked())
        assert (waiting, held) == ((2, 0) if place == "_take" else (1, 1))
        assert connection.zcard(keys.unacked_index()) == held, "what is held has a lease"
    assert {job.result(PATIENCE_S).usage.completion_tokens for job in jobs} == {2}
    wait_until(lambda: not connection.hlen(keys.unacked()))


def test_messages_are_taken_in_the_order_of_urgency_then_of_arrival(client: Client, worker: WorkerProcess) -> None:
    before = len(worker.events("message.accepted"))
    with asleep(worker):
        urgencies = ("bulk", "normal", "interactive", "normal")
        order = [client.submit("Hello.", max_tokens=1, priority=urgency).id for urgency in urgencies]
    worker.wait_for("message.accepted", count=before + 4)
    taken = [line["message_id"] for line in worker.events("message.accepted")[before:]]
    assert taken == [order[2], order[1], order[3], order[0]]


def test_a_worker_that_starts_while_redis_is_full_works_when_it_is_not(
    client: Client, connection: redis.Redis, environment: dict[str, str], tmp_path: Path
) -> None:
    job = client.submit("Hello.", max_tokens=1)
    with full(connection), WorkerProcess(tmp_path / "worker.log", **environment) as worker:
        worker.wait_for("redis.refused", count=2)
        relieve(connection)
        assert job.result(PATIENCE_S)
        wait_until(lambda: not connection.hlen(keys.unacked()))


def test_a_message_is_neither_lost_nor_in_the_way_while_redis_is_full(
    client: Client, connection: redis.Redis, worker: WorkerProcess
) -> None:
    """A sleeping worker gets the hint; when it wakes up, Redis is full. Then it has to reconnect."""
    refused = len(worker.events("redis.refused"))
    worker.signal(signal.SIGSTOP)
    job = client.submit("Hello.", max_tokens=1)
    with full(connection):
        worker.signal(signal.SIGCONT)
        worker.wait_for("redis.refused", count=refused + 1)
        waiting = sum(connection.llen(name) for name in keys.queue_lists("demo"))  # type: ignore[misc]
        held = connection.hlen(keys.unacked())
        assert waiting + held == 1  # type: ignore[operator]
        assert connection.zcard(keys.unacked_index()) == held, "what is held has a lease"
        refused = len(worker.events("redis.refused"))
        connection.client_kill_filter(_type="normal", skipme=True)
        worker.wait_for("redis.refused", count=refused + 1)
    assert job.result(PATIENCE_S)
    assert worker.alive
    wait_until(lambda: not connection.hlen(keys.unacked()))


def test_a_message_is_served_with_and_without_a_hint(
    client: Client, connection: redis.Redis, worker: WorkerProcess
) -> None:
    assert client.submit("Hello.", max_tokens=1).result(PATIENCE_S)
    wait_until(lambda: not connection.exists(keys.hint("demo")))
    client._app.send_task("headrace.generate", args=[{"prompt": "x", "max_tokens": 1}], task_id="unhinted")
    wait_until(lambda: connection.exists(keys.result("unhinted")))


def envelope(body: str = "W10=", **changes: Any) -> dict[str, Any]:
    """A message as kombu writes it."""
    properties = {"delivery_tag": "t", "delivery_info": {"exchange": "", "routing_key": "headrace.demo"}}
    properties |= {"body_encoding": "base64", "priority": 3, "correlation_id": "x"}
    headers = {"id": "x", "task": "headrace.generate", "lang": "py"}
    made = {"body": body, "content-encoding": "utf-8", "content-type": "application/json", "headers": headers}
    return {**made, "properties": properties, **changes}


def task(body: Any = ([{"prompt": "x"}], {}, {}), **headers: Any) -> str:
    """A message with a task, as Celery writes it, as text."""
    text = body if isinstance(body, str) else json.dumps(body)
    made = envelope(base64.b64encode(text.encode()).decode())
    made["headers"] = {name: value for name, value in {**made["headers"], **headers}.items() if value is not None}
    return json.dumps(made)


DEEP = "[" * 100_000 + "]" * 100_000
BAD: dict[str, str] = {
    "null": "null",
    "no JSON": "hello",
    "empty": "",
    "number": "1e999",
    "digits": "9" * 10_000,
    "deep": DEEP,
    "marked": json.dumps(envelope(headers={"__type__": "datetime", "__value__": "yesterday"})),
    "no body": json.dumps(envelope(body=None)),  # type: ignore[arg-type]
    "no base64": json.dumps(envelope(body="a")),
    "no headers": json.dumps(envelope(headers=None)),
    "no properties": json.dumps(envelope(properties=None)),
    "priority": json.dumps(envelope()).replace('"priority": 3', '"priority": 1e999'),
    "encoding": json.dumps(envelope()).replace('"body_encoding": "base64"', '"body_encoding": "rot13"'),
    "body null": task("null"),
    "body no JSON": task("{"),
    "body deep": task(DEEP),
    "body digits": task("9" * 10_000),
    "body list": task([1]),
    "body number": task(7),
    "body empty": task(""),
    "body of protocol 1": task({"args": [1]}),
    "another task": task(task="os.system"),
    "task list": task(task=["headrace.generate"]),
    "no task": task(task=None),
    "no id": task(id=None),
    "id number": task(id=7),
    "id list": task(id=[7]),
    "eta": task(eta="soon"),
    "expires": task(expires="soon"),
    "limits": task(timelimit="abc"),
    "group": task([[[]], {}, {}], task="headrace.generate_many"),
    "members": task([[[1, {"id": 7}]], {}, {}], task="headrace.generate_many"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_message_that_nobody_can_read_is_put_aside_and_the_worker_goes_on(
    client: Client, connection: redis.Redis, worker: WorkerProcess, name: str
) -> None:
    connection.lpush(NORMAL, BAD[name])
    wait_until(lambda: client.status().dead == 1)
    wait_until(lambda: not connection.hlen(keys.unacked()))
    (text,) = connection.lrange(keys.dead(), 0, -1)  # type: ignore[misc]
    letter = json.loads(text)
    assert letter["reason"]
    assert letter["queue"] == "headrace.demo"
    assert abs(letter["at"] - time.time()) < 60
    assert len(letter["message"]) <= keys.DEAD_TEXT_BYTES
    assert 0 < connection.ttl(keys.dead()) <= keys.DEAD_TTL_S  # type: ignore[operator]
    assert client.submit("Hello.", max_tokens=1).result(PATIENCE_S)
    assert worker.alive


@pytest.mark.parametrize(
    ("message", "job_id"),
    [
        (task(task="headrace.generate_images", id="of-tomorrow"), "of-tomorrow"),
        (task(timelimit="abc", id="limited"), "limited"),
        (task([[[{"id": "member", "request": {}}]], {}, {}], timelimit="abc", task="headrace.generate_many"), "member"),
        (task(timelimit=[None, 3], id="soft"), "soft"),
        (task(model="other", id="for-other"), "for-other"),
        (task(id="high").replace('"priority": 3', '"priority": "high"'), "high"),
        (task(id="moved").replace('"routing_key": "headrace.demo"', '"routing_key": "headrace.other"'), "moved"),
        (
            task(
                [[[{"id": "linked", "request": {}}]], {}, {"chord": {}, "callbacks": [{"task": "x"}]}],
                task="headrace.generate_many",
            ),
            "linked",
        ),
    ],
    ids=[
        "task",
        "limits",
        "group",
        "soft limit",
        "model in a header",
        "envelope",
        "moved from another queue",
        "link of a group",
    ],
)
def test_a_job_that_a_refused_message_names_fails(
    client: Client, connection: redis.Redis, worker: WorkerProcess, message: str, job_id: str
) -> None:
    connection.lpush(NORMAL, message)
    wait_until(lambda: connection.exists(keys.result(job_id)))
    with pytest.raises(JobFailed, match="the message was refused") as caught:
        client.job(job_id).result(1)
    assert caught.value.code == "unreadable_message"


def test_a_request_that_names_another_model_fails_and_its_group_continues(
    client: Client, connection: redis.Redis, worker: WorkerProcess
) -> None:
    members = [{"id": f"names:{name}", "request": {"prompt": "x", "max_tokens": 1, "model": name}} for name in "ab"]
    members[0]["request"]["model"] = "demo"  # type: ignore[index]
    connection.lpush(NORMAL, task([[members], {}, {}], task="headrace.generate_many", id="names"))
    wait_until(lambda: connection.exists(keys.result("names:a"), keys.result("names:b")) == 2)
    assert client.job("names:a").result(1).model == "demo"
    with pytest.raises(JobFailed, match=r"model: got 'b' in the queue 'headrace\.demo'"):
        client.job("names:b").result(1)


def test_the_number_of_kept_unreadable_messages_is_limited(connection: redis.Redis, worker: WorkerProcess) -> None:
    connection.lpush(keys.dead(), *["{}"] * (keys.DEAD_ENTRIES + 5))
    connection.lpush(NORMAL, b"\xff" * 10_000)
    wait_until(lambda: connection.llen(keys.dead()) == keys.DEAD_ENTRIES)
    letter = json.loads(connection.lindex(keys.dead(), 0))  # type: ignore[arg-type]
    assert letter["bytes"] == 10_000


def test_an_unreadable_message_of_a_dead_worker_does_not_hide_the_others(
    client: Client, connection: redis.Redis, worker: WorkerProcess
) -> None:
    """kombu's sweep runs in the order of the leases, and would stop at each entry that it cannot read."""
    good = task(id="behind")
    held = {"one": "[hello]", "two": "[null]", "three": '[null, "", "q"]', "good": f'[{good}, "", "headrace.demo"]'}
    connection.hset(keys.unacked(), mapping=held)
    connection.zadd(keys.unacked_index(), {tag: number + 1 for number, tag in enumerate(reversed(held))})
    wait_until(lambda: connection.exists(keys.result("behind")))
    wait_until(lambda: not connection.hlen(keys.unacked()))
    assert client.status().dead == 3


def test_a_cancellation_at_the_end_of_a_job_leaves_no_key(
    client: Client, connection: redis.Redis, worker: WorkerProcess, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = client.submit("Hello.", max_tokens=1)
    job.result(PATIENCE_S)
    look, first = client.reader._poll_many, iter([[(None, "running")]])
    monkeypatch.setattr(client.reader, "_poll_many", lambda job_ids: next(first, None) or look(job_ids))
    assert not client.cancel(job.id)
    assert not connection.exists(keys.cancel(job.id))


def test_every_key_has_a_lifetime_that_ends_with_the_result(
    client: Client, connection: redis.Redis, worker: WorkerProcess
) -> None:
    """Except the queues, kombu's list of delivered messages, and its bindings, one for each queue."""
    app = make_app(client.settings)
    app.control.revoke("revoked")
    named = [
        client.submit("Hello.", max_tokens=1, id=name, checkpoints=[1], stream=True) for name in ("named", "revoked")
    ]
    many = client.submit_many(["Hello."] * 3, max_tokens=900, ignore_eos=True)
    assert many[0].cancel()
    app.control.revoke(many[1].id)
    connection.lpush(NORMAL, "null")
    with Client(settings=client.settings, model="nobody-serves") as elsewhere:
        waiting = {elsewhere.submit("Hello.", max_tokens=1).id}
    wait_until(lambda: {job.status() for job in (*named, *many)} == {"succeeded", "cancelled"})
    wait_until(lambda: client.status().dead == 1 and not connection.hlen(keys.unacked()))
    endless = {*keys.queue_lists("demo"), *keys.queue_lists("nobody-serves"), keys.unacked(), keys.unacked_index()}
    for name in connection.scan_iter():
        if name in endless or name.startswith(f"{keys.PREFIX}_kombu.binding"):
            continue
        left = connection.ttl(name)
        unfinished = {*map(keys.job, waiting), keys.submitted(), keys.owners(), keys.jobs("")}
        longest = keys.UNFINISHED_TTL_S if name in unfinished else max(86_400, keys.DEAD_TTL_S)
        assert 0 < left <= longest, name  # type: ignore[operator]
        if name.startswith(keys.job("")) and name not in map(keys.job, waiting):
            assert left <= client.settings.result_ttl_s, name  # type: ignore[operator]
    app.close()
