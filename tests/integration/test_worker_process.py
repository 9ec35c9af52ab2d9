"""What happens to the worker process: bad starts, signals, kills, and a Redis that goes away."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from client import Client, keys
from client.transport import connect
from config import load_settings
from tests.integration.processes import WorkerProcess, wait_until
from worker.embedded import EmbeddedRedis

LONG = {"max_tokens": 300, "temperature": 0, "ignore_eos": True}


@pytest.fixture
def server() -> Iterator[EmbeddedRedis]:
    """A Redis that the test may kill."""
    with EmbeddedRedis.ephemeral() as own:
        yield own


@pytest.fixture
def own_client(server: EmbeddedRedis) -> Iterator[Client]:
    with Client(redis_url=server.url) as made:
        yield made


def worker_on(server: EmbeddedRedis, tmp_path: Path, *flags: str, **environment: str) -> WorkerProcess:
    defaults = {"MILLRACE_REDIS_URL": server.url, "MILLRACE_SLOTS": "4", "MILLRACE_LEASE_S": "4"}
    return WorkerProcess(tmp_path / "worker.log", *flags, **{**defaults, **environment})


def unacked(server: EmbeddedRedis) -> int:
    return int(connect(server.url).hlen(keys.unacked()))


@pytest.mark.parametrize(
    ("environment", "words"),
    [
        ({"MILLRACE_MODEL": "/nowhere/at/all"}, ["/nowhere/at/all", "no such directory"]),
        ({"MILLRACE_KV_CACHE_BYTES": "1000"}, ["MILLRACE_KV_CACHE_BYTES is 1000", "Raise it"]),
        ({"MILLRACE_SLOTS": "none"}, ["MILLRACE_SLOTS is 'none'", "whole number from 1 to 4096"]),
        ({"MILLRACE_SLOT": "4"}, ["MILLRACE_SLOT is no setting", "MILLRACE_SLOTS"]),
    ],
    ids=["model", "cache", "value", "name"],
)
def test_a_worker_that_cannot_start_says_why_and_ends(
    server: EmbeddedRedis, tmp_path: Path, environment: dict[str, str], words: list[str]
) -> None:
    with worker_on(server, tmp_path, **environment) as worker:
        assert worker.wait(60) != 0
        for word in words:
            assert word in worker.text()
        assert "Traceback" not in worker.text()


def test_nothing_is_taken_from_the_queue_by_a_worker_that_cannot_load(
    server: EmbeddedRedis, own_client: Client, tmp_path: Path
) -> None:
    job = own_client.submit("Hello.")
    with worker_on(server, tmp_path, MILLRACE_MODEL="/nowhere", MILLRACE_SERVED_NAME="demo") as worker:
        assert worker.wait(60) != 0
    assert job.status() == "queued"
    assert own_client.status().queues[0].normal == 1


def test_sigterm_finishes_what_runs_and_returns_the_rest(
    server: EmbeddedRedis, own_client: Client, tmp_path: Path
) -> None:
    with worker_on(server, tmp_path) as worker:
        worker.wait_ready()
        jobs = [own_client.submit("Hello.", **{**LONG, "max_tokens": 800}) for _ in range(12)]
        wait_until(lambda: own_client.status().delivered >= 6 and any(job.status() == "running" for job in jobs))
        worker.signal(signal.SIGTERM)
        assert worker.wait(60) == 0
    done = [job for job in jobs if job.status() == "succeeded"]
    assert len(done) == 4
    assert {job.status() for job in jobs} == {"succeeded", "queued"}
    assert unacked(server) == 0
    assert own_client.status().queues[0].normal == 8
    assert own_client.status().workers == []
    with worker_on(server, tmp_path) as worker:
        assert {job.result(60).usage.completion_tokens for job in jobs} == {800}


def test_a_group_that_is_returned_in_the_middle_is_finished_elsewhere_and_nothing_runs_twice(
    server: EmbeddedRedis, own_client: Client, tmp_path: Path
) -> None:
    """Six jobs are the window of 4 slots: one message of 16 jobs is more than that, and no second one is taken."""
    with worker_on(server, tmp_path, MILLRACE_LOG_LEVEL="debug") as worker:
        worker.wait_ready()
        requests = [{"prompt": "Hello.", "max_tokens": 2 if i < 3 else 200} for i in range(20)]
        jobs = own_client.submit_many(requests, temperature=0, ignore_eos=True)
        wait_until(lambda: sum(job.status() == "succeeded" for job in jobs) >= 3)
        assert (own_client.status().delivered, own_client.status().queues[0].normal) == (16, 4)
        worker.signal(signal.SIGTERM)
        assert worker.wait(60) == 0
        assert unacked(server) == 0
        assert {job.status() for job in jobs} == {"succeeded", "queued"}
        assert own_client.status().queues[0].normal == 20, "a message counts whole"
    with worker_on(server, tmp_path, MILLRACE_LOG_LEVEL="debug") as worker:
        for job, request in zip(jobs, requests, strict=True):
            assert job.result(60).usage.completion_tokens == request["max_tokens"]
        wait_until(lambda: unacked(server) == 0)
        computed = [line["job_id"] for line in worker.events("job.finished")]  # of both: they share the file
        assert sorted(computed) == sorted(job.id for job in jobs)


def test_sigquit_ends_at_once_and_returns_everything(server: EmbeddedRedis, own_client: Client, tmp_path: Path) -> None:
    settings = {"MILLRACE_SOFT_SHUTDOWN_S": "0"}
    with worker_on(server, tmp_path, **settings) as worker:
        worker.wait_ready()
        jobs = own_client.submit_many(["Hello."] * 8, **{**LONG, "max_tokens": 500})
        wait_until(lambda: any(job.status() == "running" for job in jobs))
        worker.signal(signal.SIGQUIT)
        worker.wait(20)
    assert unacked(server) == 0
    assert own_client.status().queues[0].normal == 8


@pytest.mark.parametrize("window", ["open", "full"])
def test_the_worker_outlives_a_redis_that_is_killed_and_restarted(
    server: EmbeddedRedis, own_client: Client, tmp_path: Path, window: str
) -> None:
    count = 3 if window == "open" else 6  # 4 slots and a look-ahead of 2
    with worker_on(server, tmp_path, MILLRACE_LEASE_S="60", MILLRACE_LOG_LEVEL="debug") as worker:
        worker.wait_ready()
        options = {**LONG, "max_tokens": 500}
        if window == "open":
            jobs = own_client.submit_many(["Hello."] * count, **options)
        else:
            jobs = [own_client.submit("Hello.", **options) for _ in range(count)]
        wait_until(lambda: sum(job.status() == "running" for job in jobs) >= 3)
        time.sleep(1.2)  # appendfsync everysec: what was written before is on disk after that
        assert server.pid is not None
        os.kill(server.pid, signal.SIGKILL)
        wait_until(lambda: not server.alive)
        time.sleep(1.5)
        server.start()
        assert {job.result(90).usage.completion_tokens for job in jobs} == {500}
        assert worker.alive
        assert own_client.submit("Hello.", max_tokens=2).result(60)
        wait_until(lambda: unacked(server) == 0)
        assert len(worker.events("job.finished")) == count + 1, "no job was computed twice"


def test_a_cut_connection_runs_no_job_twice(server: EmbeddedRedis, own_client: Client, tmp_path: Path) -> None:
    with worker_on(server, tmp_path, MILLRACE_LOG_LEVEL="debug") as worker:
        worker.wait_ready()
        jobs = own_client.submit_many(["Hello."] * 2, **{**LONG, "max_tokens": 500})
        jobs.append(own_client.submit("Hello.", **{**LONG, "max_tokens": 500}))
        wait_until(lambda: sum(job.status() == "running" for job in jobs) == 3)
        connection = connect(server.url)
        for entry in connection.client_list():
            if "blocked" not in entry and entry["cmd"] != "client|list":
                connection.client_kill_filter(_id=entry["id"], skipme=True)
        assert {job.result(60).usage.completion_tokens for job in jobs} == {500}
        wait_until(lambda: unacked(server) == 0)
        assert len(worker.events("job.finished")) == 3
        assert own_client.submit("Hello.", max_tokens=2).result(60)


def test_a_job_longer_than_its_lease_runs_once(server: EmbeddedRedis, own_client: Client, tmp_path: Path) -> None:
    """Two workers and a lease of 3 seconds: the second one would take the first one's job if it were not renewed."""
    slow = {"MILLRACE_LEASE_S": "3", "MILLRACE_PREFILL_CHUNK": "16", "MILLRACE_THREADS": "1"}
    slow["MILLRACE_LOG_LEVEL"] = "debug"
    with (
        WorkerProcess(tmp_path / "one.log", "-n", "one@%h", MILLRACE_REDIS_URL=server.url, **slow) as one,
        WorkerProcess(tmp_path / "two.log", "-n", "two@%h", MILLRACE_REDIS_URL=server.url, **slow) as two,
    ):
        one.wait_ready()
        two.wait_ready()
        jobs = own_client.submit_many(["Hello."] * 4, n=8, max_tokens=300, ignore_eos=True)
        jobs += [own_client.submit("Hello.", n=8, max_tokens=300, ignore_eos=True) for _ in range(4)]
        started = time.monotonic()
        for job in jobs:
            job.result(120)
        assert time.monotonic() - started > 4, "the jobs were too quick to tell"
        assert len(one.events("job.finished")) + len(two.events("job.finished")) == 8


@pytest.mark.parametrize("pool", ["threads", "solo"])
def test_the_task_runs_under_celerys_own_pools(
    server: EmbeddedRedis, own_client: Client, tmp_path: Path, pool: str
) -> None:
    with worker_on(server, tmp_path, "-P", pool, "-c", "4") as worker:
        worker.wait_ready()
        jobs = own_client.submit_many(["Hello."] * 4, max_tokens=5, temperature=0)
        bad = own_client.submit([60000])
        assert {job.result(60).text for job in jobs} == {'\n\n"I am'}
        wait_until(lambda: bad.status() == "failed")


def test_the_task_runs_eagerly() -> None:
    from worker.celery import make_app

    app = make_app(load_settings(redis_url="redis://localhost:1/0"))
    app.conf.update(task_always_eager=True, task_eager_propagates=True)
    task = app.tasks["millrace.generate"]
    result = task.delay({"prompt": "Hello.", "max_tokens": 5, "temperature": 0}).get()
    assert result["choices"][0]["text"] == '\n\n"I am'
    app.close()


def test_a_group_runs_eagerly_and_its_results_are_stored(server: EmbeddedRedis, own_client: Client) -> None:
    from worker.celery import make_app

    app = make_app(load_settings(redis_url=server.url))
    app.conf.update(task_always_eager=True, task_eager_propagates=True)
    request = {"prompt": "Hello.", "max_tokens": 5, "temperature": 0}
    app.tasks["millrace.generate_many"].delay([{"id": name, "request": request} for name in ("a", "b")]).get()
    assert {own_client.job(name).result(1).text for name in ("a", "b")} == {'\n\n"I am'}
    app.close()
