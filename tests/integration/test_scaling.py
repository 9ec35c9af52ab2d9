"""The scaling benchmark at its smallest size: real workers with simulated devices."""

from __future__ import annotations

import sys

import pytest

from benchmarks.scaling import Fleet, idle, long_jobs, run, short_jobs


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_workers_with_simulated_devices_compute_all_jobs_and_report_their_cost() -> None:
    """`run` compares every token with that of the device."""
    with Fleet(step_ms=5, slots=4) as fleet:
        fleet.grow(1)
        row = run(fleet, long_jobs(16), every_s=0.1)
        assert (row["workers"], row["jobs"], row["jobs_by_worker"]) == (1, 16, [16])
        # On average 64 tokens each, 4 at a time, 5 ms per step: a lower bound, however fast everything else is.
        assert 0 < row["tokens_per_s"] <= row["ideal_tokens_per_s"] == 800
        assert row["interactive_s"]
        assert row["per_job"]["redis_commands"] > 1
        assert 0 < row["cores"]["redis"] < 1
        assert run(fleet, short_jobs(8), together=False)["jobs_by_worker"] == [8]
        assert idle(fleet, 1.0)["commands_per_s"] > 1
