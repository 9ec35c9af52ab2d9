"""Invalid messages and failures of Redis: the worker logs them and continues."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from celery import Celery

from headrace.client import Client, JobFailed
from headrace.client.wire import keys
from headrace.client.wire.redis import connect
from headrace.worker.redis_server import EmbeddedRedis
from tests.integration.processes import WorkerProcess, wait_until
from tests.patience import PATIENCE_S

HEADRACE = [sys.executable, "-m", "headrace.worker.cli"]


@pytest.fixture(scope="module")
def worker(server: EmbeddedRedis, tmp_path_factory: pytest.TempPathFactory) -> Iterator[WorkerProcess]:
    log = tmp_path_factory.mktemp("hostile") / "worker.log"
    with WorkerProcess(log, HEADRACE_REDIS_URL=server.url, HEADRACE_SLOTS="2", HEADRACE_LEASE_S="4") as process:
        process.wait_ready()
        yield process


@pytest.fixture
def client(server: EmbeddedRedis, worker: WorkerProcess) -> Iterator[Client]:
    with Client(redis_url=server.url) as made:
        yield made


@pytest.mark.parametrize(
    "call",
    [
        {"args": [{"x": 1}]},
        {"args": [], "kwargs": {"request": [1]}},
        {"args": [{"prompt": "x", "expires_at": 1e12}]},
        {"args": [None]},
        {"args": []},
        {"args": [{"prompt": "x"}], "task_id": 7},
        {"args": [{"prompt": "x", "repetition_penalty": 1e-300}]},
    ],
    ids=["object", "kwargs", "far away", "null", "nothing", "id", "penalty"],
)
def test_an_invalid_message_affects_no_other_job(
    client: Client, worker: WorkerProcess, call: dict[str, object]
) -> None:
    # Not with `app`, whose result backend would refuse an invalid id before it is sent.
    client._app.send_task("headrace.generate", **call)
    assert client.submit("Hello.", max_tokens=2).result(PATIENCE_S)
    assert worker.alive
    wait_until(lambda: connect(client.url).hlen(keys.unacked()) == 0)


@pytest.mark.parametrize(
    "call",
    [
        {"args": [5]},
        {"args": []},
        {"args": [[]]},
        {"args": [[1, None, {}, {"id": 7}, {"id": "x" * 500, "request": {"prompt": "x"}}]]},
        {"args": [[["id", "request"]] * 100], "kwargs": {"jobs": 3}},
        {"kwargs": {"jobs": [{"id": "by-name"}]}},
        {"args": [[{"id": "hostile", "request": {"prompt": "x"}}]], "task_id": 7},
    ],
    ids=["number", "nothing", "empty", "members", "lists", "keyword", "id"],
)
def test_an_invalid_group_affects_no_other_job(client: Client, worker: WorkerProcess, call: dict[str, object]) -> None:
    client._app.send_task("headrace.generate_many", **call)
    assert client.submit("Hello.", max_tokens=2).result(PATIENCE_S)
    assert worker.alive
    wait_until(lambda: connect(client.url).hlen(keys.unacked()) == 0)


def test_each_job_of_an_invalid_group_with_an_id_gets_its_own_result(client: Client) -> None:
    good = {"prompt": "Hello.", "max_tokens": 2, "ignore_eos": True}
    members = [
        {"id": "group:good", "request": good},
        {"id": "group:good", "request": {"prompt": "again"}},
        {"id": "group:none"},
        {"id": "group:list", "request": [1]},
        {"id": "group:version", "request": {"prompt": "x", "schema_version": 9}},
        {"id": "not a name", "request": good},
    ]
    client._app.send_task("headrace.generate_many", args=[members])
    wait_until(lambda: client._redis.exists(keys.result("group:good")))
    assert client.job("group:good").result(5).usage.completion_tokens == 2
    codes = {"none": "invalid_request", "list": "invalid_request", "version": "unsupported_version"}
    for name, code in codes.items():
        with pytest.raises(JobFailed) as caught:
            client.job(f"group:{name}").result(5)
        assert caught.value.code == code
    wait_until(lambda: connect(client.url).hlen(keys.unacked()) == 0)


def test_copies_of_a_group_and_of_its_jobs_are_one_result_each(
    client: Client, app: Celery, worker: WorkerProcess
) -> None:
    """A client that dies before it records the message sends the job again, in another batch composition."""
    request = {"prompt": "Hello.", "max_tokens": 150, "temperature": 0, "ignore_eos": True}
    names = [f"copies:{i}" for i in range(4)]
    jobs = client.submit_many([{**request, "id": name} for name in names])
    for part in (names, names[:2], names[2:]):
        app.send_task("headrace.generate_many", args=[[{"id": name, "request": request} for name in part]])
    app.send_task("headrace.generate", args=[request], task_id=names[0])
    assert {job.result(PATIENCE_S).usage.completion_tokens for job in jobs} == {150}
    wait_until(lambda: connect(client.url).hlen(keys.unacked()) == 0)
    inspect = app.control.inspect(timeout=PATIENCE_S, limit=1)
    active, reserved = inspect.active(), inspect.reserved()
    assert [*active.values(), *reserved.values()] == [[], []]


def test_a_redis_that_is_full_for_a_while_costs_no_job(
    client: Client, server: EmbeddedRedis, worker: WorkerProcess
) -> None:
    """Results cannot be stored for a while. They are stored when there is room again, and the worker continues."""
    connection = connect(server.url)
    refused: dict[str, Any] = {"rejected_calls": 0}  # of SETEX, with which Celery stores a result
    before = connection.info("commandstats").get("cmdstat_setex", refused)["rejected_calls"]
    with worker.slowly():
        jobs = client.submit_many(["Hello."] * 3, max_tokens=300, ignore_eos=True, temperature=0)
        jobs.append(client.submit("Hello.", max_tokens=300, ignore_eos=True, temperature=0))
        wait_until(lambda: any(job.status() == "running" for job in jobs))
        connection.config_set("maxmemory", "1")
    time.sleep(3)
    wait_until(lambda: connection.info("commandstats").get("cmdstat_setex", refused)["rejected_calls"] > before)
    assert not any(connection.exists(keys.result(job.id)) for job in jobs)
    connection.config_set("maxmemory", "0")
    assert {job.result(PATIENCE_S).usage.completion_tokens for job in jobs} == {300}
    assert client.submit("Hello.", max_tokens=2).result(PATIENCE_S)


def test_inspect_shows_no_prompt(client: Client, app: Celery, worker: WorkerProcess) -> None:
    long: dict[str, Any] = {"max_tokens": 1000, "ignore_eos": True}
    with worker.slowly():
        job, *pair = (
            client.submit("Peculiar zebra 7312", **long),
            *client.submit_many(["Peculiar zebra 7312"] * 2, **long),
        )
        wait_until(lambda: all(one.status() == "running" for one in (job, pair[0])))
        assert pair[1].status() == "queued", "with two slots, the second of the pair is to wait"
        shown = json.dumps(app.control.inspect(timeout=PATIENCE_S, limit=1).active())
        assert job.id in shown
        assert "headrace.generate_many" in shown
        assert "zebra" not in shown
        assert client.cancel([job, *pair]) == [True] * 3


def test_five_messages_of_one_job_are_one_result(client: Client, app: Celery) -> None:
    job = client.submit("Hello.", id="five", max_tokens=200, temperature=0, ignore_eos=True)
    for _ in range(4):
        app.send_task("headrace.generate", args=[{"prompt": "Hello.", "max_tokens": 200}], task_id="five")
    assert job.result(PATIENCE_S).usage.completion_tokens == 200
    wait_until(lambda: connect(client.url).hlen(keys.unacked()) == 0)


def test_a_failed_job_says_what_was_wrong_with_its_message(client: Client, app: Celery) -> None:
    app.send_task("headrace.generate", args=[{"prompt": "x", "top_p": 7}], task_id="strange")
    wait_until(lambda: client._redis.exists(keys.result("strange")))
    with pytest.raises(JobFailed, match=r"top_p: got 7; expected a number above 0"):
        client.job("strange").result(1)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL, signal.SIGINT], ids=lambda n: n.name)
def test_an_interrupted_generate_leaves_no_process_behind(tmp_path: Path, number: signal.Signals) -> None:
    environment = {**os.environ, "XDG_RUNTIME_DIR": str(tmp_path), "TMPDIR": str(tmp_path)}
    command = [*HEADRACE, "generate", "Hello.", "--max-tokens", "1000", "--ignore-eos"]
    process = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)

    def family() -> set[int]:
        found, todo = set(), [process.pid]
        while todo:
            children = Path(f"/proc/{todo[0]}/task/{todo.pop(0)}/children")
            todo += [int(pid) for pid in (children.read_text().split() if children.exists() else [])]
            found |= set(todo)
        return found

    wait_until(lambda: len(family()) >= 2)  # Redis and the worker
    started = family()
    process.send_signal(number)
    process.wait(PATIENCE_S)
    wait_until(lambda: not any(Path(f"/proc/{pid}").exists() for pid in started))


@pytest.mark.parametrize(
    ("arguments", "code"),
    [
        (["generate", "Hello.", "--max-tokens", "abc", "--json"], 2),
        (["generate", "--json"], 2),
        (["generate", "Hello.", "--bogus", "--json"], 2),
        (["generate", "Hello.", "--top-p", "7", "--json"], 2),
        (["generate", "Hello.", "--logit-bias", "x", "--json"], 2),
        (["status", "--json"], 3),
        (["validate", "--reference", "nonsense", "--json"], 1),
        (["nonsense", "--json"], 2),
    ],
)
def test_every_error_with_json_is_one_object_and_an_exit_code(arguments: list[str], code: int) -> None:
    environment = {**os.environ, "HEADRACE_REDIS_URL": "redis://localhost:1/0"}
    done = subprocess.run([*HEADRACE, *arguments], env=environment, capture_output=True, text=True, timeout=PATIENCE_S)
    assert done.returncode == code
    assert json.loads(done.stdout)["error"]["message"]
    assert "Traceback" not in done.stderr
