"""One answer on every CPU: workers with different instruction sets and numbers of threads share a queue."""

from __future__ import annotations

import itertools
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from headrace.client import Client, Result
from headrace.client.wire.requests import parse_request
from headrace.config import Settings
from headrace.worker.engine.build import load_engine
from headrace.worker.redis_server import EmbeddedRedis
from tests.chaos.run import mixed_rungs
from tests.integration.processes import WorkerProcess
from tests.patience import PATIENCE_S
from tests.varying import VARYING

JOBS = 500


def requests_of(count: int) -> list[dict[str, Any]]:
    """Short jobs of every kind: lengths, sampling, penalties, several samples, log probabilities."""
    dice, words = (
        random.Random(19),
        ["the", "river", "mill", "turns", "a", "wheel", "of", "stone", "under", "a", "grey", "sky"],
    )
    kinds: Sequence[dict[str, Any]] = (
        {"temperature": 0, "logprobs": 2},
        {"temperature": 0.8, "top_p": 0.9, "logprobs": 0},
        {"temperature": 1.2, "top_k": 40, "min_p": 0.05, "n": 2},
        {"temperature": 0.7, "repetition_penalty": 1.2, "frequency_penalty": 0.5, "logprobs": 1},
    )
    return [
        {
            "prompt": " ".join(dice.choices(words, k=dice.choice((1, 5, 20, 160)))),
            "seed": dice.randrange(2**32),
            "max_tokens": dice.randrange(1, 13),
            **kind,
        }
        for kind, _ in zip(itertools.cycle(kinds), range(count), strict=False)
    ]


def content(result: Result) -> dict[str, Any]:
    """What must not depend on the machine, the fingerprint included."""
    return result.model_dump(exclude=VARYING)


def test_workers_of_different_kinds_give_the_bits_of_any_one_of_them(
    own_server: EmbeddedRedis, own_client: Client, tmp_path: Path
) -> None:
    """Three workers, two of which are killed with SIGKILL while they compute, and replaced."""
    requests, rungs = requests_of(JOBS), itertools.cycle(mixed_rungs())
    settings = {"HEADRACE_REDIS_URL": own_server.url, "HEADRACE_LEASE_S": "3", "HEADRACE_DTYPE": "int8"}

    def worker(number: int) -> WorkerProcess:
        kind = {"HEADRACE_CPU_ISA": next(rungs), "HEADRACE_THREADS": str(1 + number % 2), "HEADRACE_SLOTS": "8"}
        return WorkerProcess(tmp_path / f"{number}.log", **settings, **kind).start()

    fleet = [worker(number) for number in range(3)]
    try:
        for each in fleet:
            each.wait_ready()
        jobs = own_client.submit_many(requests)
        for ended, _ in enumerate(own_client.as_completed(jobs, timeout=PATIENCE_S), 1):
            if ended in (JOBS // 8, JOBS // 3):
                fleet[len(fleet) - 3].kill()
                fleet.append(worker(len(fleet)))
        results = [job.result(timeout=0) for job in jobs]
    finally:
        for each in fleet:
            each.kill()
    with load_engine(Settings(model="demo", device="cpu", dtype="int8", threads=1)) as engine:
        alone = [engine.submit(parse_request(request)) for request in requests]
        expected = [future.result(timeout=PATIENCE_S) for future in alone]
    assert [content(result) for result in results] == [content(result) for result in expected]
