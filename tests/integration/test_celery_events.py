"""What Celery's tools show of jobs: events as Flower reads them, `inspect`, `ping`; with one slot and a queue."""

from __future__ import annotations

import contextlib
import re
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest
from celery import Celery
from celery.events.state import State

from headrace.client import Client, Job, JobExpired, JobFailed, Result
from headrace.client.wire import keys
from headrace.client.wire.celery import celery_url
from headrace.client.wire.redis import connect
from headrace.worker.redis_server import EmbeddedRedis
from tests.integration.processes import WorkerProcess, paced, wait_until, worker_on
from tests.patience import PATIENCE_S

#: Each token of a job takes a step of this many seconds, so the number of tokens is a lower bound of its duration.
STEP_S = 0.02
JOB: dict[str, Any] = {"prompt": "Hello.", "temperature": 0, "ignore_eos": True}
LONG, SHORT = 250, 20
#: Seconds by which the monotonic clock and the time of day may differ on one machine.
CLOCK_S = 0.05


def plain_app(url: str) -> Celery:
    """A Celery app as another project configures it; the tests read its results with a client."""
    plain = Celery("shop", broker=celery_url(url), backend="disabled", set_as_current=False)
    plain.conf.broker_transport_options = {"global_keyprefix": "headrace:"}
    return plain


@pytest.fixture(scope="module")
def worker(server: EmbeddedRedis, tmp_path_factory: pytest.TempPathFactory) -> Iterator[WorkerProcess]:
    """A worker with one slot. Before it starts, a message lies in a list that it does not read."""
    connect(server.url).lpush("headrace.demo", "a message without the prefix")
    settings = {"HEADRACE_SLOTS": "1", "HEADRACE_DRAFT_TOKENS": "0", "HEADRACE_LOG_LEVEL": "debug"}
    log = tmp_path_factory.mktemp("events") / "worker.log"
    with worker_on(server, log, patch=paced(STEP_S), **settings) as made:
        made.wait_ready()
        yield made


@pytest.fixture
def state(app: Celery) -> Iterator[State]:
    """The state that Celery's events describe, as Flower keeps it."""
    found, stop = State(), threading.Event()
    with app.connection() as connection:
        receiver = app.events.Receiver(connection, handlers={"*": found.event})
        with receiver.consumer_context(wakeup=False) as (own, _, _):

            def listen() -> None:
                while not stop.is_set():
                    with contextlib.suppress(TimeoutError):
                        own.drain_events(timeout=0.2)

            thread = threading.Thread(target=listen)
            thread.start()
            yield found
            stop.set()
            thread.join()


def test_celery_events_have_the_true_start_and_duration_of_jobs(
    server: EmbeddedRedis, app: Celery, state: State, worker: WorkerProcess
) -> None:
    """With one slot the second job is received while the first is computed, and starts when the first has ended."""
    inspect = app.control.inspect(timeout=PATIENCE_S, limit=1)
    with Client(redis_url=server.url) as client:
        worker.wait_for("messages.misplaced")
        assert client.status().misplaced[0].key == "headrace.demo"
        sent_at = time.time()
        first, second = client.submit(**JOB, max_tokens=LONG), client.submit(**JOB, max_tokens=SHORT)
        group = client.submit_many([{**JOB, "max_tokens": SHORT}] * 2)
        wait_until(lambda: first.id in state.tasks and state.tasks[first.id].started)
        ((active,),) = inspect.active().values()
        assert active["id"] == first.id
        assert sent_at <= active["time_start"] <= time.time()
        assert active["time_start"] <= state.tasks[first.id].started + CLOCK_S, "the event is sent afterwards"
        assert inspect.ping()
        (stats,) = inspect.stats().values()
        assert (stats["pool"]["slots"], stats["pool"]["running"]) == (1, 1)
        (waiting,) = inspect.reserved().values()
        assert second.id in {task["id"] for task in waiting}
        timings = {job.id: job.result(PATIENCE_S).timings for job in (first, second, *group)}
        wait_until(lambda: sum(task.state == "SUCCESS" for task in state.tasks.values()) == 3)
        ended_at = time.time()

    one, two = state.tasks[first.id], state.tasks[second.id]
    for task, tokens in ((one, LONG), (two, SHORT)):
        took = timings[task.uuid].prefill_s + timings[task.uuid].decode_s
        assert tokens * STEP_S <= took <= task.runtime + CLOCK_S
        assert sent_at <= task.received <= task.started <= task.succeeded <= ended_at
        # Neither the time in the queue of the engine nor that before the message came is part of it.
        assert task.runtime + timings[task.uuid].waiting_s <= task.succeeded - task.received + CLOCK_S
    assert two.received < one.succeeded
    assert two.started >= sent_at + LONG * STEP_S, "it had to wait for the slot"
    (several,) = [task for task in state.tasks.values() if task.name == "headrace.generate_many"]
    assert several.runtime >= 2 * SHORT * STEP_S, "the jobs of a message were computed one after the other"
    assert (one.args, one.result) == ("<redacted>", "<redacted>")


SECRET = "the-secret-prompt"


def test_what_a_plain_producer_sends_shows_no_prompt_and_control_does_what_it_says(
    server: EmbeddedRedis, app: Celery, state: State, worker: WorkerProcess
) -> None:
    """The producer knows nothing of headrace, so its messages have the arguments in their headers."""
    plain = plain_app(server.url)
    seen: list[dict[str, Any]] = []
    state.event_callback = lambda _, event: seen.append(event)
    secret, connection = {**JOB, "prompt": SECRET}, connect(server.url)
    control, inspect = app.control, app.control.inspect(timeout=PATIENCE_S, limit=1)

    def send(**request: Any) -> Job:
        sent = plain.send_task("headrace.generate", args=[{**secret, **request}], queue="headrace.demo")
        return client.job(sent.id)

    def result(job: Job) -> Result:
        wait_until(lambda: connection.exists(keys.result(job.id)))  # a client knows the job once a worker has it
        return job.result(1)

    def answer(command: str, **arguments: Any) -> dict[str, str]:
        ((reply,),) = [list(each.values()) for each in control.broadcast(command, arguments, reply=True, limit=1)]
        return dict(reply)

    with Client(redis_url=server.url) as client:
        later = plain.send_task(
            "headrace.generate", kwargs={"request": {**secret, "max_tokens": 1}}, queue="headrace.demo", countdown=600
        )
        first, second = send(max_tokens=LONG // 2), send(max_tokens=SHORT)
        failing = send(max_tokens=1, stop=[SECRET] * 99)
        calls = {"task": plain.signature("headrace.generate"), "it": [{**secret, "stop": [SECRET] * 99}]}
        mapped = plain.send_task("celery.map", kwargs=calls, queue="headrace.demo")
        wait_until(lambda: first.id in state.tasks and state.tasks[first.id].started)
        shown = [inspect.active(), inspect.reserved(), inspect.scheduled(), inspect.query_task(first.id, later.id)]
        assert {first.id, second.id, later.id} <= set(re.findall(r"'id': '([^']+)'", repr(shown)))
        with pytest.raises(JobFailed, match=f"stop.*{SECRET}"):
            result(failing)
        wait_until(lambda: connection.exists(keys.result(mapped.id)))
        assert result(first).usage.completion_tokens == LONG // 2
        wait_until(lambda: state.tasks[first.id].succeeded and state.tasks[failing.id].failed)
        assert state.tasks[failing.id].exception == "JobFailed('invalid_request', ...)"
        assert {event["type"] for event in seen} >= {"task-received", "task-started", "task-succeeded", "task-failed"}
        assert SECRET not in repr(shown) + repr(seen) + worker.text()

        # A time limit applies to what comes next; a queue that is not consumed keeps its messages.
        assert "ok" in answer("time_limit", task_name="headrace.generate", hard=3 * STEP_S)
        with pytest.raises(JobExpired):
            result(send(max_tokens=LONG))
        assert "ok" in answer("time_limit", task_name="headrace.generate", hard=0)
        assert "is not a queue of this worker" in answer("add_consumer", queue="headrace.other")["error"]
        assert "ok" in answer("cancel_consumer", queue="headrace.demo")
        wait_until(lambda: inspect.active_queues() is not None and not any(inspect.active_queues().values()))
        waits = send(max_tokens=1)
        assert "error" in answer("pool_grow", n=1)
        assert connection.llen(keys.queue_lists("demo")[0]) == 1
        assert "ok" in answer("add_consumer", queue="headrace.demo")
        assert result(waits).usage.completion_tokens == 1
    plain.close()
