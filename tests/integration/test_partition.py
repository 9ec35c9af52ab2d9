"""A network failure without errors cuts a worker off from Redis: other workers compute its jobs, once and correctly."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from headrace.client import Client, Job
from headrace.client.wire import keys
from headrace.client.wire.redis import connect
from tests.integration.processes import WorkerProcess, paced, wait_until
from tests.integration.servers import Link, redis_on_a_port
from tests.patience import PATIENCE_S

LEASE_S = 3
TOKENS = 80
REQUESTS: list[dict[str, Any]] = [
    {"prompt": "Hello.", "temperature": 0},
    {"prompt": "The sea was calm", "temperature": 0, "logprobs": 2},
    {"prompt": "The sea was calm", "seed": 1},
    {"prompt": "It is a truth", "seed": 2, "n": 2},
    {"prompt": [464, 3290, 318], "seed": 3, "top_p": 0.9},
    {"prompt": "Once upon a time", "seed": 4, "top_k": 20},
]


@contextlib.contextmanager
def cut_off_worker(port: int, log: Path, step_s: float) -> Iterator[tuple[WorkerProcess, Link]]:
    """A worker that takes `step_s` for each token, and its link to Redis."""
    settings = {"HEADRACE_SLOTS": "16", "HEADRACE_LEASE_S": str(LEASE_S), "HEADRACE_LOG_LEVEL": "debug"}
    with Link(port) as link:
        settings["HEADRACE_REDIS_URL"] = f"redis://127.0.0.1:{link.port}/0"
        flags = ("-n", f"{log.stem}@%h")
        with WorkerProcess(log, *flags, patch=paced(step_s), **settings) as worker:
            yield worker, link


def submit(client: Client) -> list[Job]:
    """Submit the requests, some in separate messages and the others in one message."""
    common = {"max_tokens": TOKENS, "ignore_eos": True}
    alone = [client.submit(**{**common, **request}) for request in REQUESTS[:3]]
    return alone + client.submit_many([{**common, **request} for request in REQUESTS[3:]])


def answers(jobs: list[Job]) -> list[Any]:
    return [job.result(PATIENCE_S).choices for job in jobs]


def both_live(client: Client) -> bool:
    """Whether both workers have a current record."""
    return len([w for w in client.status().workers if time.time() - w.beat_at < 5]) == 2


@pytest.mark.slow
@pytest.mark.parametrize("step_s", [1.0, 0.1], ids=["computes on meanwhile", "is done meanwhile"])
def test_a_worker_cut_off_for_longer_than_its_lease_loses_no_job_and_spoils_none(tmp_path: Path, step_s: float) -> None:
    with (
        redis_on_a_port(tmp_path) as port,
        Client(redis_url=f"redis://127.0.0.1:{port}/0") as client,
        cut_off_worker(port, tmp_path / "one.log", step_s) as (one, to_one),
        cut_off_worker(port, tmp_path / "two.log", 0.0) as (two, to_two),
        connect(client.url) as redis,
    ):
        one.wait_ready()
        two.wait_ready()
        to_one.cut()
        undisturbed = answers(submit(client))
        to_one.heal()

        to_two.cut()  # so that the first one takes all
        jobs = submit(client)
        unwanted = client.submit("Nobody waits for this.", max_tokens=TOKENS, ignore_eos=True)
        wait_until(lambda: all(job.status() == "running" for job in [*jobs, unwanted]))
        to_one.cut()
        unwanted.cancel()
        to_two.heal()
        assert answers(jobs) == undisturbed
        assert unwanted.wait(PATIENCE_S) == "cancelled"
        assert not one.events("job.finished"), "what it has computed cannot have been stored"
        names = [keys.result(job.id) for job in [*jobs, unwanted]]
        records = redis.mget(names)

        to_one.heal()
        wait_until(lambda: both_live(client) and {worker.running for worker in client.status().workers} == {0})
        wait_until(lambda: client.status().delivered == 0)
        assert redis.mget(names) == records, "no result was written again"
        assert client.job(unwanted.id).status() == "cancelled"
        if step_s == 1.0:
            assert not one.events("job.finished"), "nothing was computed to its end that was done"
            assert one.events("jobs.finished_before")
        to_two.cut()
        assert client.submit("Hello.", max_tokens=2).result(PATIENCE_S), "the first one takes jobs again"
        assert one.alive
