"""The arithmetic of the scaling benchmark by hand, and its workers' device."""

from __future__ import annotations

import os

import pytest

from benchmarks.scaling import Cost, Reading, busy_s, long_jobs, needs, processor_s, rate_in_the_middle


def test_what_a_job_takes_is_the_difference_of_two_readings() -> None:
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
    # 8 seconds of all cores in 4: 6 were ours.
    assert used.shares() == {"redis": 0.25, "workers": 0.75, "client": 0.5, "others": 0.5}


def test_the_rate_leaves_out_the_first_and_the_last_quarter() -> None:
    # 10 s until the first, then one of 5 tokens each second, and the last one late: 4 of them between 25 % and 75 %.
    arrivals = [(10.0 + i, 5) for i in range(8)]
    arrivals[-1] = (60.0, 5)
    assert rate_in_the_middle(arrivals) == 5.0


def test_jobs_have_64_tokens_in_the_mean() -> None:
    assert sum(item.new_tokens for item in long_jobs(650)) / 650 == 64
    assert {item.new_tokens for item in long_jobs(650)} == set(range(32, 97))


def test_what_a_thousand_gpus_need() -> None:
    cost = Cost(job_cpu_ms=0.2, worker_cpu_ms_per_s=1.0, job_bytes_in=2000, job_bytes_out=1000, worker_connections=8)
    found = needs(1000, gpu_tokens_per_s=6400, job_tokens=64, cost=cost)
    assert found.jobs_per_s == 100_000
    assert found.redis_cores == pytest.approx(20 + 1)
    assert found.servers == 42
    assert found.mbit_in == pytest.approx(1600)
    assert found.mbit_out == pytest.approx(800)
    assert found.connections == 8000


@pytest.mark.skipif(not os.path.exists("/proc/stat"), reason="reads /proc")
def test_processor_time_is_that_of_the_process() -> None:
    own, all_of_them = processor_s(os.getpid()), busy_s()
    assert 0 < own <= all_of_them
    assert abs(own - sum(os.times()[:2])) < 1.0
