"""The client against a real Redis without a worker: what is queued, what is refused, what an outage looks like."""

from __future__ import annotations

import asyncio
import base64
import itertools
import json
import os
import ssl
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path

import kombu
import pytest
import redis

from headrace.client import (
    AsyncClient,
    Client,
    HeadraceError,
    InvalidBatch,
    InvalidRequest,
    Job,
    JobFailed,
    NoWorker,
    QueueFull,
    RedisRefused,
    RedisUnreachable,
    ResultNotKept,
    ResultTimeout,
    UnknownJob,
    UnreadableRecord,
)
from headrace.client.http.errors import translate
from headrace.client.jobs.submission import GROUP_JOBS
from headrace.client.wire import keys, queue_depth
from headrace.client.wire.celery import celery_url
from headrace.client.wire.queue_depth import QueueStatus
from headrace.client.wire.redis import connect
from headrace.config import load_settings
from headrace.worker.jobs.redis_store import RedisStore
from headrace.worker.redis_server import EmbeddedRedis


@pytest.fixture
def connection(redis_url: str) -> redis.Redis:
    return connect(redis_url)


@pytest.fixture
def client(redis_url: str, request: pytest.FixtureRequest) -> Iterator[Client]:
    """A client with a separate queue."""
    with Client(redis_url=redis_url, model=f"unit-{abs(hash(request.node.name))}") as made:
        yield made


def queued(client: Client, connection: redis.Redis) -> list[dict[str, object]]:
    names = keys.queue_lists(client.model_name)
    return [json.loads(message) for name in names for message in connection.lrange(name, 0, -1)]


def jobs_in(message: dict[str, object]) -> list[dict[str, object]]:
    """The first argument of a message, as a worker gets it."""
    (argument,), _, _ = json.loads(base64.b64decode(message["body"]))  # type: ignore[arg-type]
    return argument  # type: ignore[no-any-return]


def test_a_job_is_one_message_under_its_own_id(client: Client, connection: redis.Redis) -> None:
    job = client.submit("Hello.", max_tokens=3)
    (message,) = queued(client, connection)
    assert message["headers"]["id"] == job.id  # type: ignore[index]
    assert "Hello" not in json.dumps(message["headers"])
    assert job.status() == "queued"
    assert client.job(job.id) == job
    assert repr(job) == f"<Job {job.id}>"


def test_no_queue_is_declared_that_a_lost_connection_could_leave_half_declared(
    client: Client, connection: redis.Redis, monkeypatch: pytest.MonkeyPatch
) -> None:
    """kombu 5.7 fails with an AttributeError then."""

    def lost(*_: object) -> int:
        monkeypatch.undo()
        raise redis.ConnectionError("cut")

    monkeypatch.setattr("kombu.transport.redis.Channel._size", lost)
    job = client.submit("Hello.")
    assert [message["headers"]["id"] for message in queued(client, connection)] == [job.id]  # type: ignore[index]


@pytest.mark.parametrize(("priority", "place"), [("interactive", 0), ("normal", 1), ("bulk", 3)])
def test_each_priority_has_its_own_list(client: Client, connection: redis.Redis, priority: str, place: int) -> None:
    client.submit("Hello.", priority=priority)
    lengths = [connection.llen(name) for name in keys.queue_lists(client.model_name)]
    assert lengths == [int(i == place) for i in range(4)]


def test_a_seed_is_chosen_before_the_job_is_queued(client: Client) -> None:
    prepared = client.submitter.prepare({"prompt": "Hello."})
    assert prepared.request.seed is not None
    assert 0 <= prepared.request.seed < 2**52


@pytest.mark.parametrize(
    ("arguments", "field"),
    [
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_new_tokens": 5}, "max_new_tokens"),
        ({"id": ""}, "id"),
        ({"id": "with space"}, "id"),
        ({"id": "x" * 200}, "id"),
        ({"id": 7}, "id"),
        ({"model": ""}, "model"),
        ({"model": 3}, "model"),
        ({"timeout_s": 0}, "timeout_s"),
        ({"timeout_s": "soon"}, "timeout_s"),
        ({"timeout_s": float("nan")}, "timeout_s"),
        ({"expires_at": 5.0}, "expires_at"),
        ({"schema_version": 1}, "schema_version"),
    ],
)
def test_an_invalid_request_is_refused_before_anything_is_queued(
    client: Client, connection: redis.Redis, arguments: dict[str, object], field: str
) -> None:
    with pytest.raises(InvalidRequest) as caught:
        client.submit("Hello.", **arguments)  # type: ignore[arg-type]
    assert caught.value.field == field
    assert queued(client, connection) == []


def test_one_invalid_request_among_many_queues_none(client: Client, connection: redis.Redis) -> None:
    with pytest.raises(InvalidRequest, match=r"requests\[2\]\.top_p: got 7"):
        client.submit_many(["a", [1, 2], {"prompt": "c", "top_p": 7}])
    assert queued(client, connection) == []


@pytest.mark.parametrize("requests", [[], None, 5, "one prompt", {"prompt": "x"}, [{"max_tokens": 3}], [5]])
def test_submit_many_refuses_anything_but_a_list_of_prompts(client: Client, requests: object) -> None:
    with pytest.raises(InvalidRequest):
        client.submit_many(requests)  # type: ignore[arg-type]


def test_common_parameters_apply_to_requests_that_do_not_set_them(client: Client, connection: redis.Redis) -> None:
    client.submit_many(["a", {"prompt": "b", "max_tokens": 9}], max_tokens=4)
    (message,) = queued(client, connection)
    assert [job["request"]["max_tokens"] for job in jobs_in(message)] == [4, 9]  # type: ignore[index]


def test_jobs_submitted_together_share_messages_in_order(client: Client, connection: redis.Redis) -> None:
    jobs = client.submit_many([f"Hello {i}." for i in range(2 * GROUP_JOBS + 1)])
    *groups, alone = reversed(queued(client, connection))
    assert [len(jobs_in(group)) for group in groups] == [GROUP_JOBS] * 2
    assert [job["id"] for group in groups for job in jobs_in(group)] == [job.id for job in jobs[:-1]]
    assert alone["headers"]["id"] == jobs[-1].id  # type: ignore[index]
    assert "Hello" not in json.dumps([group["headers"] for group in groups])
    assert {job.status() for job in jobs} == {"queued"}


def make_known(connection: redis.Redis, *models: str) -> None:
    """Record models as served, because unknown models are refused if a worker of another test runs."""
    connection.zadd(keys.models(), dict.fromkeys(models, time.time()))


def test_a_message_holds_one_priority_and_one_model(client: Client, connection: redis.Redis) -> None:
    make_known(connection, "unit-one", "unit-two")
    client.submit_many([{"prompt": "x", "priority": ("bulk", "normal")[i % 2]} for i in range(8)])
    client.submit_many([{"prompt": "x", "model": ("unit-one", "unit-two")[i % 2]} for i in range(8)])
    assert [len(jobs_in(message)) for message in queued(client, connection)] == [4, 4]
    for model in ("unit-one", "unit-two"):
        assert sum(connection.llen(name) for name in keys.queue_lists(model)) == 1  # type: ignore[misc]


def test_urgent_jobs_of_a_list_are_sent_first(client: Client, connection: redis.Redis) -> None:
    """Otherwise earlier jobs of the list may fill a worker's slots."""
    priorities = ["bulk"] * (GROUP_JOBS + 1) + ["normal", "interactive"]
    lists = [name.encode("unicode_escape").decode() for name in keys.queue_lists(client.model_name)]
    with connection.monitor() as monitor:
        jobs = client.submit_many([{"prompt": "x", "priority": priority} for priority in priorities])
        sent = (line.split()[1] for line in (each["command"] for each in monitor.listen()) if line.startswith("LPUSH"))
        assert list(itertools.islice((name for name in sent if name in lists), 4)) == [*lists[:2], lists[-1], lists[-1]]
    assert [job.id for job in jobs[:GROUP_JOBS]] == [job["id"] for job in jobs_in(queued(client, connection)[-1])]


def test_long_prompts_are_split_over_messages(client: Client, connection: redis.Redis) -> None:
    client.submit_many(["x" * 30_000] * 4)
    assert [len(jobs_in(message)) for message in queued(client, connection)] == [2, 2]


def counted(client: Client) -> QueueStatus:
    """The status of the client's queue; other tests may have more queues."""
    (own,) = [queue for queue in client.status().queues if queue.model == client.model_name]
    return own


def test_status_and_the_limit_count_jobs_not_messages(redis_url: str) -> None:
    settings = load_settings(redis_url=redis_url, max_queue=30)
    with Client(settings=settings, model="unit-count") as client:
        client.submit_many(["a"] * 20)
        client.submit("b", priority="bulk")
        counts = counted(client)
        assert (counts.normal, counts.bulk, counts.total) == (20, 1, 21)
        with pytest.raises(QueueFull, match="holds 21 jobs and takes at most 30"):
            client.submit_many(["c"] * 10)
        client.submit_many(["c"] * 9)


def test_a_deep_queue_is_counted_from_a_sample(client: Client) -> None:
    client.submit_many(["a"] * (GROUP_JOBS * 50))
    assert counted(client).normal == GROUP_JOBS * 50


def test_a_queue_of_large_messages_is_counted_without_reading_them_all(
    client: Client, connection: redis.Redis, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A message may have 2 MiB, and `headrace serve` and each worker count every second or two."""
    client.submit("a")
    message = queued(client, connection)[0]
    large = json.dumps({**message, "padding": "x" * 2**18})
    name = keys.queue_lists(client.model_name)[1]
    assert connection.llen(name)
    connection.lpush(name, *[large] * 40)
    connection.hset(keys.unacked(), mapping={f"large-{number}": large for number in range(40)})
    read: list[int] = []
    real = queue_depth.execute_typed

    def execute(pipe: object, defaults: Sequence[object]) -> list[object]:
        answers = real(pipe, defaults)
        read.append(sum(len(text) for answer in answers if isinstance(answer, list) for text in answer))
        return answers

    monkeypatch.setattr(queue_depth, "execute_typed", execute)
    assert counted(client).normal == 41
    assert client.status().delivered >= 40
    assert max(read) < 2**21
    connection.hdel(keys.unacked(), *[f"large-{number}" for number in range(40)])


def test_a_full_queue_refuses_with_its_depth(redis_url: str) -> None:
    settings = load_settings(redis_url=redis_url, max_queue=3)
    with Client(settings=settings, model="unit-full") as client:
        client.submit_many(["a", "b"])
        with pytest.raises(QueueFull, match=r"holds 2 jobs and takes at most 3") as caught:
            client.submit_many(["c", "d"])
        assert (caught.value.depth, caught.value.limit) == (2, 3)
        client.submit("c")


def test_the_same_id_twice_is_one_job_and_another_request_is_refused(client: Client, connection: redis.Redis) -> None:
    client.submit("Hello.", id=f"{client.model_name}:1", max_tokens=4)
    client.submit("Hello.", id=f"{client.model_name}:1", max_tokens=4)
    assert len(queued(client, connection)) == 1
    with pytest.raises(InvalidRequest, match="used already"):
        client.submit("Other.", id=f"{client.model_name}:1")


def test_ids_that_clash_are_refused_before_anything_is_queued(client: Client, connection: redis.Redis) -> None:
    used, fresh = f"{client.model_name}:3", f"{client.model_name}:4"
    client.submit("Hello.", id=used)
    for batch in (["a", {"prompt": "other", "id": used}], [{"prompt": "x", "id": fresh}, {"prompt": "y", "id": fresh}]):
        with pytest.raises(InvalidRequest, match="used already"):
            client.submit_many(batch)
    assert len(queued(client, connection)) == 1


def test_the_same_id_for_another_model_is_another_request(client: Client, connection: redis.Redis) -> None:
    make_known(connection, "other")
    client.submit("Hello.", id=f"{client.model_name}:5")
    with pytest.raises(InvalidRequest, match="used already"):
        client.submit("Hello.", id=f"{client.model_name}:5", model="other")


@pytest.mark.parametrize("timeout", [float("nan"), -1, "5", True])
def test_an_invalid_timeout_is_refused(client: Client, timeout: object) -> None:
    with pytest.raises(InvalidRequest, match="timeout"):
        client.submit("Hello.").result(timeout)  # type: ignore[arg-type]


def test_jobs_of_another_redis_are_not_waited_for(client: Client) -> None:
    with Client(redis_url="redis://localhost:1/0") as elsewhere, pytest.raises(InvalidRequest, match="another Redis"):
        list(client.as_completed([elsewhere.job("x")]))


def test_a_full_redis_raises_redis_refused() -> None:
    with EmbeddedRedis.ephemeral() as server, Client(redis_url=server.url) as client:
        connect(server.url).config_set("maxmemory", "1")
        with pytest.raises(RedisRefused, match="memory"):
            client.submit("Hello.")


def test_an_id_whose_message_was_never_sent_is_sent_again(client: Client, connection: redis.Redis) -> None:
    """A client that dies between writing the record and sending the message must be able to try again."""
    prepared = client.submitter.prepare({"prompt": "Hello.", "id": f"{client.model_name}:2"})
    assert client.submitter._write_records([prepared])
    client.submit_many([{"prompt": "Hello.", "id": f"{client.model_name}:2"}] * 2)
    assert len(queued(client, connection)) == 1
    client.submit_many(["Hello.", {"prompt": "Hello.", "id": f"{client.model_name}:2"}])
    assert len(queued(client, connection)) == 2, "only the job that is new is published"


def test_no_worker_and_unknown_job_differ(client: Client) -> None:
    job = client.submit("Hello.")
    with pytest.raises(NoWorker, match="no worker serves queue") as late:
        job.result(0.1)
    assert late.value.job is job
    with pytest.raises(UnknownJob) as unknown:
        client.job("nobody").result(0.1)
    assert unknown.value.job == client.job("nobody")
    with pytest.raises(UnknownJob) as unknown:
        client.cancel("nobody")
    assert unknown.value.job == client.job("nobody")
    with pytest.raises(KeyError):
        client.job("nobody").status()


@pytest.fixture
def served(redis_url: str) -> Iterator[Callable[[str, str], None]]:
    """Registers a worker for a model, on a Redis that only this test uses."""
    connection = connect(redis_url.replace("db=0", "db=9"))
    connection.flushdb()
    store = RedisStore(connection, result_ttl_s=60, checkpoint_ttl_s=60)
    yield lambda worker, model: store.heartbeat(worker, {"model": model})
    connection.flushdb()


def test_a_model_that_no_worker_serves_is_refused_with_those_that_are_served(
    redis_url: str, served: Callable[[str, str], None], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("headrace.client.jobs.served.SERVED_S", 0.0)
    own = redis_url.replace("db=0", "db=9")
    with Client(redis_url=own) as client:
        client.submit("Hello.", model="anything")  # without a worker the valid names are unknown
        served("host-1@b", "beta")
        served("host-1@a", "alpha")
        served("spoilt", "\udcff")
        for ask in (
            lambda: client.submit("Hello.", model="alpah"),
            lambda: client.submit_many(["a", {"prompt": "b", "model": "alpah"}], model="alpha"),
            lambda: next(client.map(["Hello."], model="alpah")),
            lambda: client.batch([{"prompt": "a", "model": "alpah"}], tmp_path / "out.jsonl"),
        ):
            with pytest.raises((InvalidRequest, InvalidBatch)) as caught:
                ask()
            assert "model: got 'alpah'; expected one that is served: alpha, beta" in str(caught.value)
        for ask in (
            lambda: client.submit("Hello.", model="org/alpha"),
            lambda: client.submit_many(["a", "b"], model="org/alpha"),
        ):
            with pytest.raises(InvalidRequest, match="model: got 'org/alpha'; expected one that is served"):
                ask()
        assert sum(map(connect(own).llen, keys.queue_lists("alpah"))) == 0  # type: ignore[arg-type]
        assert client.models() == {"demo", "alpha", "beta"}
        for model in ("alpha", "beta", None, "demo"):  # demo is this client's own
            client.submit("Hello.", model=model)
        connect(own).delete(keys.worker("host-1@a"))  # as when it is being restarted
        client.submit("Hello.", model="alpha")
        connect(own).delete(keys.models())  # as after a day, or where workers are of an earlier version
        client.submit("Hello.", model="beta")
        with pytest.raises(InvalidRequest, match=r"one that is served: beta; or .* `headrace up --model alpha`"):
            client.submit("Hello.", model="alpha")
    with Client(redis_url=own, model="alpah") as client:
        client.submit("Hello.")  # its configured model, which a worker may serve later


def test_the_served_models_are_read_once_for_many_jobs(redis_url: str, served: Callable[[str, str], None]) -> None:
    own = redis_url.replace("db=0", "db=9")
    served("host-1", "alpha")
    with Client(redis_url=own) as client, connect(own) as admin:

        def asked() -> int:
            return int(admin.info("commandstats").get("cmdstat_zrange", {"calls": 0})["calls"])  # type: ignore[union-attr]

        before = asked()
        for _ in range(5):
            client.submit("Hello.")
        assert asked() == before
        for _ in range(20):
            client.submit("Hello.", model="alpha")
        assert 2 <= asked() - before <= 8, "both sets, and again if a second has passed"


NOT_TEXT = b"\xff\xfe{"


@pytest.mark.parametrize(
    "spoil",
    [
        lambda r, job: r.hset(keys.job(job), "state", "done"),
        lambda r, job: r.hset(keys.job(job), "state", "succeeded"),
        lambda r, job: r.hset(keys.job(job), "state", NOT_TEXT),
        lambda r, job: r.delete(keys.job(job)) and r.set(keys.job(job), "x"),
    ],
    ids=["state", "end", "bytes", "type"],
)
def test_a_record_that_is_none_of_ours_is_an_error_that_says_so(
    client: Client, connection: redis.Redis, spoil: Callable[[redis.Redis, str], object]
) -> None:
    job = client.submit("Hello.")
    spoil(connection, job.id)
    for ask in (job.status, job.cancel, lambda: job.result(0.05)):
        with pytest.raises(UnreadableRecord, match=f"record of job {job.id} cannot be read"):
            ask()


@pytest.mark.parametrize("wrong", [NOT_TEXT, b'{"status": "SUCCESS", "result": "\xff"}', None], ids=repr)
def test_a_result_that_is_none_of_ours_fails_its_job(
    client: Client, connection: redis.Redis, wrong: bytes | None
) -> None:
    job = client.submit("Hello.")
    if wrong is None:
        connection.rpush(keys.result(job.id), "x")
    else:
        connection.set(keys.result(job.id), wrong)
        with pytest.raises(JobFailed, match="cannot be read") as caught:
            job.result(1)
        assert caught.value.code == "unreadable_result"
    assert client.job(job.id).status() == "failed"


def test_invalid_records_of_workers_and_models_are_ignored_by_status(client: Client, connection: redis.Redis) -> None:
    connection.zadd(keys.workers(), {"strange": 1, b"\xff": 1, "list": 1})
    connection.hset(keys.worker("strange"), mapping={"model": NOT_TEXT, "slots": "x"})
    connection.lpush(keys.worker("list"), "x")
    job = client.submit("Hello.")
    connection.hset(keys.job(job.id), "model", NOT_TEXT)
    try:
        assert not {"strange", "list"} & {worker.name for worker in client.status().workers}
        with pytest.raises(NoWorker):
            job.result(0.05)
    finally:
        connection.delete(keys.workers(), keys.worker("strange"), keys.worker("list"))


def test_ten_thousand_jobs_are_waited_for_over_one_connection_and_no_channel(redis_url: str) -> None:
    own = redis_url.replace("db=0", "db=7")
    with Client(redis_url=own, model="unit-crowd") as client:
        ids = [job.id for job in client.submit_many(["a"] * 10_000)]
    with connect(redis_url) as admin, Client(redis_url=own, model="unit-crowd") as client:
        over = threading.Event()

        def there() -> set[str]:
            return {entry["id"] for entry in admin.client_list() if entry["db"] == "7"}

        before, seen = there(), set()  # kombu keeps what was published over, for this process

        def look() -> None:
            while not over.wait(0.02):
                seen.update(there() - before)

        watch = threading.Thread(target=look)
        watch.start()
        with pytest.raises(NoWorker):
            list(client.as_completed(map(client.job, ids), timeout=0.7))
        over.set()
        watch.join()
        assert len(seen) == 1
        assert not [name for name in admin.pubsub_channels() if "task-meta" in name]


def test_an_unreachable_redis_is_named_without_its_password() -> None:
    with Client(redis_url="redis://:hunter2@localhost:1/0") as client:
        with pytest.raises(RedisUnreachable, match="localhost:1") as caught:
            client.submit("Hello.")
        assert "hunter2" not in str(caught.value)
        with pytest.raises(ConnectionError):
            client.job("x").status()


def test_jobs_queued_before_redis_went_away_are_in_the_error() -> None:
    with EmbeddedRedis.ephemeral() as server, Client(redis_url=server.url) as client:
        publish, sent = client.submitter._publish, []

        def publish_two(group: list[object], producer: object) -> None:
            if len(sent) == 2:
                server.stop()
            sent.append(group)
            publish(group, producer)  # type: ignore[arg-type]

        client.submitter._publish = publish_two  # type: ignore[method-assign]
        with pytest.raises(RedisUnreachable, match=f"{2 * GROUP_JOBS} jobs were queued before") as caught:
            client.submit_many(["a"] * 4 * GROUP_JOBS)
        accepted = [job.id for group in sent[:2] for job in group]
        assert all(isinstance(job, Job) for job in caught.value.accepted.values())
        assert [(i, job.id) for i, job in caught.value.accepted.items()] == list(enumerate(accepted))


def test_jobs_queued_before_redis_was_full_are_in_the_error_each_at_its_place() -> None:
    with EmbeddedRedis.ephemeral() as server, Client(redis_url=server.url) as client:
        publish, sent = client.submitter._publish, []

        def publish_one(group: list[object], producer: object) -> None:
            if sent:
                connect(server.url).config_set("maxmemory", "1")
            publish(group, producer)  # type: ignore[arg-type]
            sent.append(group)

        client.submitter._publish = publish_one  # type: ignore[method-assign]
        with pytest.raises(RedisRefused, match=r"memory.* 2 jobs were queued before") as caught:
            client.submit_many([{"prompt": "a", "priority": p} for p in ("normal", "bulk", "normal")])
        assert [(i, job.id) for i, job in caught.value.accepted.items()] == list(
            zip((0, 2), (d.id for d in sent[0]), strict=True)
        )


def test_urls_for_redis_py_and_kombu_mean_the_same_place() -> None:
    assert celery_url("unix:///run/redis.sock?db=3") == "redis+socket:///run/redis.sock?virtual_host=3"
    assert celery_url("unix:///run/redis.sock") == "redis+socket:///run/redis.sock?virtual_host=0"
    assert celery_url("rediss://user:pw@host:6380/1") == "rediss://user:pw@host:6380/1"
    for url, database in (
        ("redis://host/2", 2),
        ("redis://host?db=3", 3),
        ("redis://user:p%40w@host:1/0?db=3", 3),
        ("rediss://host/1?db=4&ssl_cert_reqs=none", 4),
    ):
        assert redis.ConnectionPool.from_url(url).connection_kwargs["db"] == database
        with kombu.Connection(celery_url(url)) as connection:
            assert int(connection.virtual_host) == database
        if "ssl_" in url:
            assert connection.ssl == {"ssl_cert_reqs": ssl.CERT_NONE}


def test_importing_the_client_loads_no_torch_and_its_exports_are_sorted() -> None:
    code = "import sys, client; assert 'torch' not in sys.modules; assert client.__all__ == sorted(client.__all__)"
    subprocess.run([sys.executable, "-c", code + "; [getattr(client, n) for n in client.__all__]"], check=True)


@pytest.mark.parametrize("wrong", ["\ud83d", os.fsdecode(b"\xff")])
@pytest.mark.parametrize(
    "use",
    [
        lambda client, wrong: client.job(wrong),
        lambda client, wrong: client.cancel([wrong]),
        lambda client, wrong: client.submit(wrong),
        lambda client, wrong: client.submit("a", stop=wrong),
        lambda client, wrong: client.submit("a", id=wrong),
        lambda client, wrong: client.submit("a", model=wrong),
        lambda client, wrong: client.submit("a", priority=wrong),
        lambda client, wrong: client.submit("a", logit_bias={wrong: 1}),
        lambda client, wrong: client.submit("a", **{wrong: 1}),
        lambda client, wrong: client.submit_many([{wrong: 1}]),
        lambda client, wrong: client.signature("a", **{wrong: 1}),
        lambda client, wrong: client.signature("a", model=wrong),
        lambda client, wrong: next(client.map([{wrong: 1}])),
        lambda client, wrong: client.batch([{wrong: 1}], "/nowhere/out.jsonl"),
        lambda client, wrong: client.batch([{"prompt": "a", "custom_id": wrong}], "/nowhere/out.jsonl"),
        lambda client, wrong: client.batch(f"/nowhere/{wrong}", "/nowhere/out.jsonl"),
        lambda client, wrong: client.batch(["a"], f"/nowhere/{wrong}"),
    ],
)
def test_text_that_is_no_unicode_is_refused_with_an_error_that_can_be_printed(
    use: Callable[[Client, str], object], wrong: str
) -> None:
    with Client(redis_url="redis://localhost:1/0") as client, pytest.raises(HeadraceError) as caught:
        use(client, wrong)
    str(caught.value).encode()


def test_a_signature_with_a_countdown_is_a_queued_job_that_says_until_when_it_waits(
    client: Client, connection: redis.Redis
) -> None:
    soon = datetime.now(UTC) + timedelta(seconds=90)
    jobs = [
        client.job(client.signature("Hello.").apply_async(**when).id)
        for when in ({"countdown": 90}, {"eta": soon}, {"eta": soon.replace(tzinfo=None)}, {})
    ]
    assert [job.status() for job in jobs] == ["queued"] * 4
    for job in jobs[:3]:
        assert job.waits_until() == pytest.approx(soon.timestamp(), abs=10)
        with pytest.raises(ResultTimeout, match="countdown and waits until 20") as early:
            job.result(timeout=0)
        assert type(early.value) is ResultTimeout, "before its time it needs no worker"
        assert early.value.waits_until == job.waits_until()
    assert jobs[3].waits_until() is None
    with pytest.raises(NoWorker):
        jobs[3].result(timeout=0)
    for spoilt in ("soon", "nan", "inf", "1e300", "-1", "", str(time.time() - 1)):
        connection.hset(keys.job(jobs[0].id), keys.WAITS_UNTIL, spoilt)
        assert jobs[0].waits_until() is None
    assert jobs[1].cancel()


def test_an_async_job_says_until_when_it_waits(redis_url: str, connection: redis.Redis) -> None:
    until = time.time() + 60
    connection.hset(keys.job("late"), mapping={"state": "queued", keys.WAITS_UNTIL: until})

    async def ask() -> None:
        async with AsyncClient(redis_url=redis_url) as client:
            assert await client.job("late").waits_until() == pytest.approx(until)
            with pytest.raises(ResultTimeout, match="waits until"):
                await client.job("late").result(timeout=0)

    asyncio.run(ask())
    connection.delete(keys.job("late"))


def test_a_job_whose_result_was_not_kept_has_ended(client: Client, connection: redis.Redis) -> None:
    connection.set(keys.result("ignored"), json.dumps({"status": "SUCCESS", "result": None}))
    job = client.job("ignored")
    assert (job.status(), job.wait(0)) == ("succeeded", "succeeded")
    for read in (job.result, lambda: list(client.job("ignored").stream())):
        with pytest.raises(ResultNotKept, match="ignore_result=True") as raised:
            read()
        assert raised.value.job == job
    assert not client.job("ignored").cancel()
    assert translate(raised.value).status == 410
    connection.delete(keys.result("ignored"))


def test_a_job_that_is_submitted_again_after_its_end_does_not_outlive_its_result(
    client: Client, connection: redis.Redis
) -> None:
    """Its record would say for 30 days that it is to come, and nobody would compute it."""
    job = client.submit("Hello.", id="again")
    connection.set(keys.result(job.id), '{"status": "REVOKED", "result": null}', ex=7)
    connection.expire(keys.job(job.id), 7)
    assert client.submit("Hello.", id="again").id == job.id
    signature = client.signature("Hello.", id="again")
    signature.apply_async()
    assert 0 < connection.ttl(keys.job(job.id)) <= 7  # type: ignore[operator]
    with pytest.raises(InvalidRequest):
        client.submit("Another.", id="again")
    connection.delete(keys.result(job.id), keys.job(job.id))
    client.submit("Hello.", id="again")
    assert connection.ttl(keys.job(job.id)) > 7  # type: ignore[operator]
