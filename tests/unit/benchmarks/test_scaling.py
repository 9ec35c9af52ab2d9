"""The arithmetic of the scaling benchmark, worked out by hand, and its simulated device."""

from __future__ import annotations

import os
from typing import Any

import pytest

from benchmarks.capacity import Cost, costs, needs
from benchmarks.scaling import long_jobs
from benchmarks.usage import Reading, busy_s, processor_s, rate_in_the_middle


def test_the_cost_of_a_job_is_the_difference_of_two_readings() -> None:
    before = Reading(at=100, redis_s=1, workers_s=10, client_s=2, busy_s=50, commands=1000, bytes_in=0, bytes_out=5000)
    after = Reading(at=104, redis_s=2, workers_s=13, client_s=4, busy_s=58, commands=1800, bytes_in=40, bytes_out=9000)
    used = after - before
    assert used.per_job(400) == {
        "redis_cpu_ms": 2.5,
        "workers_cpu_ms": 7.5,
        "client_cpu_ms": 5.0,
        "redis_commands": 2.0,
        "redis_bytes_in": 0.1,
        "redis_bytes_out": 10.0,
    }
    # All processes used 8 seconds of cores in 4 seconds; Redis, workers and client used 6 of them.
    assert used.shares() == {"redis": 0.25, "workers": 0.75, "client": 0.5, "others": 0.5}


def test_the_rate_is_that_of_the_middle_half() -> None:
    # The run lasts from 100 to 120, so its middle half from 105 to 115: it contains all of the first job, half of the
    # second, and nothing of the last.
    spans = [(110.0, 4.0, 40), (117.0, 4.0, 20), (120.0, 2.0, 1000)]
    assert rate_in_the_middle(spans, 100.0) == (40 + 10) / 10


def test_jobs_have_64_tokens_on_average() -> None:
    assert sum(item.new_tokens for item in long_jobs(650)) / 650 == 64
    assert {item.new_tokens for item in long_jobs(650)} == set(range(32, 97))


def test_the_needs_of_a_thousand_gpus() -> None:
    job, worker = Cost(cpu_ms=0.2, bytes_in=2000, bytes_out=1000), Cost(cpu_ms=1, bytes_in=10_000, bytes_out=5_000)
    found = needs(1000, 6400, 64, job, worker, connections=8)
    assert found.jobs_per_s == 100_000
    assert found.redis_cores == pytest.approx(20 + 1)
    assert found.servers == 42
    assert found.mbit_in == pytest.approx(1600 + 80)
    assert found.mbit_out == pytest.approx(800 + 40)
    assert found.connections == 8000


def test_the_cost_of_workers_is_what_exceeds_that_of_jobs() -> None:
    def row(cpu_ms: float, bytes_in: float, bytes_out: float, **rest: float) -> dict[str, Any]:
        cost = {"redis_cpu_ms": cpu_ms, "redis_bytes_in": bytes_in, "redis_bytes_out": bytes_out}
        return {"per_job": cost, "together": True, **rest}

    figures = {"saturate": [row(0.1, 100, 50)], "scale": [row(0.5, 300, 150, jobs_per_s=80.0, workers=16)]}
    # Each worker computes 5 jobs per second; its cost is what exceeds the cost of these jobs.
    assert costs(figures) == (Cost(0.1, 100, 50), Cost(pytest.approx(2.0), 1000, 500))


@pytest.mark.skipif(not os.path.exists("/proc/stat"), reason="reads /proc")
def test_processor_time_is_that_of_the_process() -> None:
    own, all_of_them = processor_s(os.getpid()), busy_s()
    assert 0 < own <= all_of_them
    assert abs(own - sum(os.times()[:2])) < 1.0
