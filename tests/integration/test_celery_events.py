"""What Celery's tools show of jobs: events as Flower reads them, `inspect`, `ping`; with one slot and a queue."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from celery import Celery
from celery.events.state import State

from headrace.client import Client
from headrace.worker.redis_server import EmbeddedRedis
from tests.integration.processes import paced, wait_until, worker_on
from tests.patience import PATIENCE_S

#: Each token of a job takes a step of this many seconds, so the number of tokens is a lower bound of its duration.
STEP_S = 0.02
JOB: dict[str, Any] = {"prompt": "Hello.", "temperature": 0, "ignore_eos": True}
LONG, SHORT = 250, 20
#: Seconds by which the monotonic clock and the time of day may differ on one machine.
CLOCK_S = 0.05


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
    server: EmbeddedRedis, app: Celery, state: State, tmp_path: Path
) -> None:
    """With one slot the second job is received while the first is computed, and starts when the first has ended."""
    inspect = app.control.inspect(timeout=PATIENCE_S, limit=1)
    settings = {"HEADRACE_SLOTS": "1", "HEADRACE_DRAFT_TOKENS": "0"}
    with (
        Client(redis_url=server.url) as client,
        worker_on(server, tmp_path / "worker.log", patch=paced(STEP_S), **settings) as worker,
    ):
        worker.wait_ready()
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
