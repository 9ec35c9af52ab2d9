"""Two thousand jobs at once: all finish, and the worker's memory does not grow."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from headrace.client import Client
from tests.integration.processes import WorkerProcess
from tests.patience import PATIENCE_S

JOBS = 2000


def resident_bytes(pid: int) -> int:
    """Memory of a process that is in RAM (Linux)."""
    pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    return pages * 4096


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="reads /proc")
def test_two_thousand_jobs_all_finish_and_memory_does_not_grow(client: Client, worker: WorkerProcess) -> None:
    rng = random.Random(2)
    requests = [
        {"prompt": "The house by the sea. " * rng.randint(1, 8), "max_tokens": rng.randint(1, 8), "temperature": 0}
        for _ in range(JOBS)
    ]
    jobs = client.submit_many(requests, ignore_eos=True)
    assert worker.process is not None
    sizes = []
    for job, _ in zip(client.as_completed(jobs, timeout=PATIENCE_S), range(JOBS), strict=True):
        sizes.append(resident_bytes(worker.process.pid))
        assert job.status() == "succeeded"
    quarter = JOBS // 4
    first, last = max(sizes[:quarter]), max(sizes[-quarter:])
    assert last < first + 32 * 2**20, f"{first / 2**20:.0f} MiB in the first quarter, {last / 2**20:.0f} in the last"
    for request, job in zip(requests, jobs, strict=True):
        assert job.result(0).usage.completion_tokens == request["max_tokens"]
