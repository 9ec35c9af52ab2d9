"""The worker process: failing starts, signals, kills, and outages of Redis."""

from __future__ import annotations

import contextlib
import os
import signal
import time
from pathlib import Path

import pytest

from headrace.client import Client, Job, NoWorker, ResultNotKept, ResultTimeout
from headrace.client.wire import keys
from headrace.client.wire.redis import connect
from headrace.config import load_settings
from headrace.worker.redis_server import EmbeddedRedis
from tests.integration.processes import attempts, paced, skewed, wait_until, worker_on
from tests.patience import PATIENCE_S

#: Long jobs: each of their tokens takes a step of 0.02 s.
SLOWLY = paced(0.02)
LONG = {"max_tokens": 200, "temperature": 0, "ignore_eos": True}


def unacked(server: EmbeddedRedis) -> int:
    return int(connect(server.url).hlen(keys.unacked()))


@pytest.mark.parametrize(
    ("environment", "words"),
    [
        ({"HEADRACE_KV_CACHE_BYTES": "1000"}, ["HEADRACE_KV_CACHE_BYTES is 1000", "Raise it"]),
        ({"HEADRACE_SLOTS": "none"}, ["HEADRACE_SLOTS is 'none'", "whole number from 1 to 4096"]),
        ({"HEADRACE_SLOT": "4"}, ["HEADRACE_SLOT is not a setting", "HEADRACE_SLOTS"]),
    ],
    ids=["cache", "value", "name"],
)
def test_a_worker_that_cannot_start_says_why_and_ends(
    own_server: EmbeddedRedis, tmp_path: Path, environment: dict[str, str], words: list[str]
) -> None:
    with worker_on(own_server, tmp_path / "worker.log", **environment) as worker:
        assert worker.wait() != 0
        for word in words:
            assert word in worker.text()
        assert "Traceback" not in worker.text()


def test_a_worker_that_cannot_load_says_why_and_takes_nothing_from_the_queue(
    own_server: EmbeddedRedis, own_client: Client, tmp_path: Path
) -> None:
    job = own_client.submit("Hello.")
    settings = {"HEADRACE_MODEL": "/nowhere/at/all", "HEADRACE_SERVED_NAME": "demo"}
    with worker_on(own_server, tmp_path / "worker.log", **settings) as worker:
        assert worker.wait() != 0
        assert "/nowhere/at/all" in worker.text()
        assert "no such directory" in worker.text()
        assert "Traceback" not in worker.text()
    assert job.status() == "queued"
    assert own_client.status().queues[0].normal == 1


def test_sigterm_finishes_what_runs_and_returns_the_rest(
    own_server: EmbeddedRedis, own_client: Client, tmp_path: Path
) -> None:
    with worker_on(own_server, tmp_path / "worker.log", patch=SLOWLY, HEADRACE_SOFT_SHUTDOWN_S="300") as worker:
        worker.wait_ready()
        jobs = [own_client.submit("Hello.", **LONG) for _ in range(12)]
        wait_until(lambda: own_client.status().delivered >= 6 and any(job.status() == "running" for job in jobs))
        worker.signal(signal.SIGTERM)
        assert worker.wait() == 0
        (begun,), (ended,) = worker.events("worker.stopping"), worker.events("worker.stopped")
        assert (begun["running"], begun["held"], ended["queued"]) == (4, 6, {"demo": 8})
        assert all(0 < line["running"] <= 4 and line["tokens"] > 0 for line in worker.events("worker.draining"))
    returned = [job for job in jobs if job.status() == "queued"]
    assert [attempts(own_client, job.id) for job in returned] == [0] * 8
    assert {job.status() for job in jobs if job not in returned} == {"succeeded"}
    assert unacked(own_server) == 0
    assert own_client.status().queues[0].normal == 8
    assert own_client.status().workers == []
    with worker_on(own_server, tmp_path / "worker.log") as worker:
        assert {job.result(PATIENCE_S).usage.completion_tokens for job in jobs} == {200}


def test_a_group_that_is_returned_in_the_middle_is_finished_elsewhere_and_nothing_runs_twice(
    own_server: EmbeddedRedis, own_client: Client, tmp_path: Path
) -> None:
    """With 4 slots a worker holds six jobs: a message of 16 jobs exceeds that, so it takes no second message."""
    with worker_on(own_server, tmp_path / "worker.log", patch=SLOWLY, HEADRACE_LOG_LEVEL="debug") as worker:
        worker.wait_ready()
        requests = [{"prompt": "Hello.", "max_tokens": 2 if i < 3 else 100} for i in range(20)]
        jobs = own_client.submit_many(requests, temperature=0, ignore_eos=True)
        wait_until(lambda: sum(job.status() == "succeeded" for job in jobs) >= 3)
        assert (own_client.status().delivered, own_client.status().queues[0].normal) == (16, 4)
        worker.signal(signal.SIGTERM)
        assert worker.wait() == 0
        assert unacked(own_server) == 0
        assert {job.status() for job in jobs} == {"succeeded", "queued"}
        assert own_client.status().queues[0].normal == 20, "a message counts whole"
        (ended,) = worker.events("worker.stopped")
        assert ended["queued"] == {"demo": sum(job.status() == "queued" for job in jobs)}, "it knows what has ended"
    with worker_on(own_server, tmp_path / "worker.log", HEADRACE_LOG_LEVEL="debug") as worker:
        for job, request in zip(jobs, requests, strict=True):
            assert job.result(PATIENCE_S).usage.completion_tokens == request["max_tokens"]
        wait_until(lambda: unacked(own_server) == 0)
        computed = [line["job_id"] for line in worker.events("job.finished")]  # of both: they share the file
        assert sorted(computed) == sorted(job.id for job in jobs)


def test_sigquit_ends_at_once_and_returns_everything(
    own_server: EmbeddedRedis, own_client: Client, tmp_path: Path
) -> None:
    with worker_on(own_server, tmp_path / "worker.log", patch=SLOWLY, HEADRACE_SOFT_SHUTDOWN_S="0") as worker:
        worker.wait_ready()
        jobs = own_client.submit_many(["Hello."] * 8, **LONG)
        wait_until(lambda: any(job.status() == "running" for job in jobs))
        worker.signal(signal.SIGQUIT)
        worker.wait()
    assert unacked(own_server) == 0
    assert own_client.status().queues[0].normal == 8


@pytest.mark.parametrize("window", ["open", "full"])
def test_the_worker_outlives_a_redis_that_is_killed_and_restarted(
    own_server: EmbeddedRedis, own_client: Client, tmp_path: Path, window: str
) -> None:
    count = 3 if window == "open" else 6  # 4 slots and a look-ahead of 2
    settings = {"HEADRACE_LEASE_S": "60", "HEADRACE_LOG_LEVEL": "debug"}
    with worker_on(own_server, tmp_path / "worker.log", patch=SLOWLY, **settings) as worker:
        worker.wait_ready()
        if window == "open":
            jobs = own_client.submit_many(["Hello."] * count, **LONG)
        else:
            jobs = [own_client.submit("Hello.", **LONG) for _ in range(count)]
        wait_until(lambda: sum(job.status() == "running" for job in jobs) >= 3)
        time.sleep(1.2)  # appendfsync everysec: what was written before is on disk after that
        assert own_server.pid is not None
        os.kill(own_server.pid, signal.SIGKILL)
        wait_until(lambda: not own_server.alive)
        time.sleep(1.5)
        own_server.start()
        assert {job.result(90).usage.completion_tokens for job in jobs} == {200}
        assert worker.alive
        assert own_client.submit("Hello.", max_tokens=2).result(PATIENCE_S)
        wait_until(lambda: unacked(own_server) == 0)
        assert len(worker.events("job.finished")) == count + 1, "no job was computed twice"


def test_a_cut_connection_runs_no_job_twice(own_server: EmbeddedRedis, own_client: Client, tmp_path: Path) -> None:
    with worker_on(own_server, tmp_path / "worker.log", patch=SLOWLY, HEADRACE_LOG_LEVEL="debug") as worker:
        worker.wait_ready()
        jobs = own_client.submit_many(["Hello."] * 2, **LONG)
        jobs.append(own_client.submit("Hello.", **LONG))
        wait_until(lambda: sum(job.status() == "running" for job in jobs) == 3)
        connection = connect(own_server.url)
        for entry in connection.client_list():
            if "blocked" not in entry and entry["cmd"] != "client|list":
                connection.client_kill_filter(_id=entry["id"], skipme=True)
        assert {job.result(PATIENCE_S).usage.completion_tokens for job in jobs} == {200}
        wait_until(lambda: unacked(own_server) == 0)
        assert len(worker.events("job.finished")) == 3
        assert own_client.submit("Hello.", max_tokens=2).result(PATIENCE_S)


def test_a_job_longer_than_its_lease_runs_once(own_server: EmbeddedRedis, own_client: Client, tmp_path: Path) -> None:
    """Two workers, jobs of 6 s and leases of 3: one would take the other's job if its lease were not renewed.

    Their clocks are two hours apart: one would take the other's job at once, or end it as expired.
    """
    slow = {"HEADRACE_SLOTS": "8", "HEADRACE_LOG_LEVEL": "debug"}
    ahead, behind = (SLOWLY + skewed(seconds) for seconds in (3_600, -3_600))
    with (
        worker_on(own_server, tmp_path / "one.log", "-n", "one@%h", patch=ahead, **slow) as one,
        worker_on(own_server, tmp_path / "two.log", "-n", "two@%h", patch=behind, **slow) as two,
    ):
        one.wait_ready()
        two.wait_ready()
        params = {"max_tokens": 300, "ignore_eos": True, "timeout_s": PATIENCE_S}
        jobs = own_client.submit_many(["Hello."] * 4, **params)
        jobs += [own_client.submit("Hello.", **params) for _ in range(4)]
        for job in jobs:
            job.result(PATIENCE_S)
        assert len(one.events("job.finished")) + len(two.events("job.finished")) == 8


@pytest.mark.parametrize("pool", ["threads", "solo"])
def test_the_task_runs_under_celerys_own_pools(
    own_server: EmbeddedRedis, own_client: Client, tmp_path: Path, pool: str
) -> None:
    with worker_on(own_server, tmp_path / "worker.log", "-P", pool, "-c", "4") as worker:
        worker.wait_ready()
        jobs = own_client.submit_many(["Hello."] * 4, max_tokens=5, temperature=0)
        bad = own_client.submit([60000])
        assert {job.result(PATIENCE_S).text for job in jobs} == {'\n\n"I am'}
        wait_until(lambda: bad.status() == "failed")
        own_client.signature("Hello.", model="demo").apply_async(queue="headrace.demo", headers={"model": "other"})
        wait_until(lambda: own_client.status().dead == 1)
        (refused,) = worker.events("message.refused")
        assert "names 'other'" in refused["reason"]
        ignored = own_client.job(own_client.signature("Hello.", max_tokens=2).apply_async(ignore_result=True).id)
        assert ignored.wait(PATIENCE_S) == "succeeded"
        with pytest.raises(ResultNotKept):
            ignored.result()


def test_the_task_runs_eagerly() -> None:
    from headrace.worker.celery import make_app

    app = make_app(load_settings(redis_url="redis://localhost:1/0"))
    app.conf.update(task_always_eager=True, task_eager_propagates=True)
    task = app.tasks["headrace.generate"]
    result = task.delay({"prompt": "Hello.", "max_tokens": 5, "temperature": 0}).get()
    assert result["choices"][0]["text"] == '\n\n"I am'
    app.close()


def test_a_group_runs_eagerly_and_its_results_are_stored(own_server: EmbeddedRedis, own_client: Client) -> None:
    from headrace.worker.celery import make_app

    app = make_app(load_settings(redis_url=own_server.url))
    app.conf.update(task_always_eager=True, task_eager_propagates=True)
    request = {"prompt": "Hello.", "max_tokens": 5, "temperature": 0}
    app.tasks["headrace.generate_many"].delay([{"id": name, "request": request} for name in ("a", "b")]).get()
    assert {own_client.job(name).result(1).text for name in ("a", "b")} == {'\n\n"I am'}
    app.close()


def test_a_countdown_longer_than_the_lease_is_one_attempt_and_one_computation(
    own_server: EmbeddedRedis, own_client: Client, tmp_path: Path
) -> None:
    """Three workers with leases of 3 s, and messages that wait 6 s inside Celery."""
    with contextlib.ExitStack() as stack, connect(own_server.url) as redis:
        workers = [
            stack.enter_context(worker_on(own_server, tmp_path / f"{name}.log", "-n", f"{name}@%h"))
            for name in ("one", "two", "three")
        ]
        for worker in workers:
            worker.wait_ready()

        def send(countdown: float) -> Job:
            return own_client.job(own_client.signature("Hello.", max_tokens=3).apply_async(countdown=countdown).id)

        jobs = [send(6) for _ in range(6)]
        unwanted = send(3_600)
        assert own_client.submit("Hello.", max_tokens=2).result(PATIENCE_S), "they block no other job"
        until = jobs[0].waits_until()
        assert until is not None
        assert 0 < until - time.time() <= 6
        with pytest.raises(ResultTimeout, match="countdown and waits until 20") as early:
            jobs[0].result(timeout=0.1)
        assert not isinstance(early.value, NoWorker)
        wait_until(lambda: sum(worker.scheduled for worker in own_client.status().workers) == 7)
        assert unwanted.cancel()
        assert unwanted.wait(5) == "cancelled", "it ends at once"
        time.sleep(max(0.0, until - 1 - time.time()))
        renewed = [score for _, score in redis.zrange(keys.unacked_index(), 0, -1, withscores=True)]
        assert min(renewed) > time.time() - 3, "the leases of messages that Celery holds are renewed too"
        for job in jobs:
            assert job.result(PATIENCE_S).usage.completion_tokens == 3
            assert attempts(own_client, job.id) == 1
        assert time.time() >= until
        assert sum(len(worker.events("job.finished")) for worker in workers) == 6 + 1 + 1
        wait_until(lambda: own_client.status().delivered == 0)

        # A job whose result is ignored has ended too, and is not computed again.
        signature = own_client.signature("Hello.", max_tokens=2)
        ignored = own_client.job(signature.apply_async(ignore_result=True).id)
        assert ignored.wait(PATIENCE_S) == "succeeded"
        signature.apply_async(ignore_result=True)
        wait_until(lambda: any(worker.events("jobs.finished_before") for worker in workers))
        assert sum(len(worker.events("job.finished")) for worker in workers) == 6 + 1 + 1 + 1

        late = send(3_600)
        wait_until(lambda: sum(worker.scheduled for worker in own_client.status().workers) == 1)
        for worker in workers:
            worker.signal(signal.SIGTERM)
        assert [worker.wait() for worker in workers] == [0, 0, 0]
        assert unacked(own_server) == 0, "a worker that stops returns what waits"
        assert (late.status(), late.waits_until() is not None) == ("queued", True)
