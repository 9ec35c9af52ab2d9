"""Ends of a worker process, intended or not: no job is lost or fails because of it, and the process does end."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

import pytest

from headrace.client import Client, JobFailed
from headrace.client.wire import keys
from headrace.client.wire.redis import connect
from headrace.worker.celery import make_app
from headrace.worker.redis_server import EmbeddedRedis
from tests.integration.processes import attempts, paced, wait_until, worker_on
from tests.patience import PATIENCE_S

#: A prompt that kills the process when it is computed, in any batch composition.
POISON = [13, 13, 13]
DEADLY = f"""
import os
from headrace.worker.engine.model_runner import ModelRunner
run = ModelRunner.run
def deadly(self, step):
    if any(sequence.prompt == {POISON} for sequence in step.sequences):
        os.kill(os.getpid(), 9)
    return run(self, step)
ModelRunner.run = deadly
"""

#: Long jobs: each of their tokens takes a step of 0.03 s.
SLOWLY = paced(0.03)
LONG = {"temperature": 0, "ignore_eos": True}


def test_a_prompt_that_kills_its_process_fails_and_takes_nobody_with_it(
    own_server: EmbeddedRedis, own_client: Client, tmp_path: Path
) -> None:
    prompts = ["Hello.", "Once", POISON, "The river", "Alice"]
    group = own_client.submit_many(prompts, max_tokens=3, temperature=0)
    alone = own_client.submit("Hello.", max_tokens=3, temperature=0)
    deaths = 0
    while group[2].status() != "failed":
        log = tmp_path / f"{deaths}.log"
        with worker_on(own_server, log, patch=DEADLY, HEADRACE_MAX_ATTEMPTS="2") as worker:
            wait_until(lambda w=worker: not w.alive or group[2].status() == "failed")  # type: ignore[misc]
            if worker.alive:
                texts = [job.result(PATIENCE_S).text for job in (*group[:2], *group[3:], alone)]
                wait_until(lambda: connect(own_server.url).hlen(keys.unacked()) == 0)
            else:
                deaths += 1
    assert deaths == 2, "once with other jobs, once alone"
    assert texts[0] == texts[-1], "the text does not depend on the batch composition"
    with pytest.raises(JobFailed, match="started 2 times") as caught:
        group[2].result(1)
    assert caught.value.code == "max_attempts"


def test_sigquit_counts_no_attempt_and_waits_no_longer_than_the_rows(
    own_server: EmbeddedRedis, own_client: Client, tmp_path: Path
) -> None:
    """As SIGTERM does (test_worker_process.py)."""
    jobs = [own_client.submit("Hello.", **LONG, max_tokens=120) for _ in range(8)]
    with worker_on(own_server, tmp_path / "w.log", patch=SLOWLY, HEADRACE_SOFT_SHUTDOWN_S="300") as worker:
        wait_until(lambda: sum(job.status() == "running" for job in jobs) == 4)
        worker.signal(signal.SIGQUIT)
        worker.wait()
        assert worker.events("worker.stopped")
    states = [job.status() for job in jobs]
    assert states.count("succeeded") == 4
    assert states.count("queued") == 4
    assert [attempts(own_client, job.id) for job in jobs if job.status() == "queued"] == [0] * 4
    assert connect(own_server.url).hlen(keys.unacked()) == 0


@pytest.mark.parametrize(
    ("first", "second"),
    [(signal.SIGTERM, signal.SIGTERM), (signal.SIGINT, signal.SIGINT), (signal.SIGQUIT, signal.SIGTERM)],
    ids=["term", "int", "quit"],
)
def test_a_second_signal_hands_back_what_runs(
    own_server: EmbeddedRedis, own_client: Client, tmp_path: Path, first: signal.Signals, second: signal.Signals
) -> None:
    jobs = [own_client.submit("Hello.", **LONG, max_tokens=1000) for _ in range(2)]
    with worker_on(own_server, tmp_path / "w.log", patch=SLOWLY, HEADRACE_SOFT_SHUTDOWN_S="300") as worker:
        wait_until(lambda: any(job.status() == "running" for job in jobs))
        worker.signal(first)
        time.sleep(2)
        assert worker.alive
        worker.signal(second)
        worker.wait()
        assert worker.events("worker.stopped")
    assert [(job.status(), attempts(own_client, job.id)) for job in jobs] == [("queued", 0)] * 2
    assert own_client.status().queues[0].normal == 2


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGSTOP], ids=["gone", "silent"])
def test_sigterm_without_redis_ends_in_time_and_the_jobs_end_elsewhere(
    own_server: EmbeddedRedis, own_client: Client, tmp_path: Path, how: signal.Signals
) -> None:
    jobs = [own_client.submit("Hello.", **LONG, max_tokens=400) for _ in range(2)]
    with worker_on(own_server, tmp_path / "w.log", patch=SLOWLY, HEADRACE_SOFT_SHUTDOWN_S="2") as worker:
        wait_until(lambda: all(job.status() == "running" for job in jobs))
        time.sleep(1.2)  # appendfsync everysec
        assert own_server.pid is not None
        os.kill(own_server.pid, how)
        worker.signal(signal.SIGTERM)
        assert worker.wait() == 1
        assert "worker.abandoned" in worker.text()
    if how == signal.SIGSTOP:
        os.kill(own_server.pid, signal.SIGCONT)
    else:
        own_server.start()
    with worker_on(own_server, tmp_path / "next.log"):
        assert {job.result(90).usage.completion_tokens for job in jobs} == {400}


def test_a_job_ends_even_if_celerys_tracer_fails(own_server: EmbeddedRedis, own_client: Client, tmp_path: Path) -> None:
    """Both for a separate message and while a group has adopted the job: the group is neither lost nor recomputed."""
    patch = f"{SLOWLY}\nfrom headrace.worker.queue.backend import ResultBackend\nResultBackend.store_result = None"
    request = {**LONG, "prompt": "Hello.", "max_tokens": 150}
    app = make_app(own_client.settings)
    with worker_on(own_server, tmp_path / "w.log", patch=patch, HEADRACE_LOG_LEVEL="debug") as worker:
        alone = own_client.submit(**request)
        adopted = own_client.submit(**request, id="adopted")
        wait_until(lambda: adopted.status() != "queued")
        members = [{"id": name, "request": request} for name in ("adopted", "other")]
        app.send_task("headrace.generate_many", args=[members])
        assert {job.result(PATIENCE_S).usage.completion_tokens for job in (alone, adopted)} == {150}
        assert worker.events("message.adopted")
        wait_until(lambda: own_client._redis.exists(keys.result("other")))
        wait_until(lambda: own_client._redis.hlen(keys.unacked()) == 0)
        assert worker.alive
        assert sorted(line["job_id"] for line in worker.events("job.finished")) == sorted(
            [alone.id, "adopted", "other"]
        )
    app.close()
