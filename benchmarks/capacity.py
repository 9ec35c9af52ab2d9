"""Estimate what Redis needs for many GPUs, from the figures that benchmarks/scaling.py has measured."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import astuple, dataclass
from typing import Any


@dataclass(frozen=True)
class Cost:
    """Resources of Redis: milliseconds of a core, bytes received, bytes sent."""

    cpu_ms: float
    bytes_in: float
    bytes_out: float


@dataclass(frozen=True)
class Needs:
    """The load that many GPUs put on Redis."""

    jobs_per_s: float
    redis_cores: float
    #: Redis servers, if each may use half of a core for commands.
    servers: int
    mbit_in: float
    mbit_out: float
    connections: float


def needs(gpus: int, gpu_tokens_per_s: float, job_tokens: float, job: Cost, worker: Cost, connections: float) -> Needs:
    """Extrapolate from one job and one worker to many, assuming that the cost of each stays constant.

    Args:
        job: the cost of a job.
        worker: the cost of a busy worker per second, without its jobs.
        connections: the connections of a worker.
    """
    jobs_per_s = gpus * gpu_tokens_per_s / job_tokens
    cores = (jobs_per_s * job.cpu_ms + gpus * worker.cpu_ms) / 1000
    return Needs(
        jobs_per_s=jobs_per_s,
        redis_cores=cores,
        servers=max(1, -int(-cores // 0.5)),
        mbit_in=(jobs_per_s * job.bytes_in + gpus * worker.bytes_in) * 8 / 1e6,
        mbit_out=(jobs_per_s * job.bytes_out + gpus * worker.bytes_out) * 8 / 1e6,
        connections=gpus * connections,
    )


def costs(figures: dict[str, Any]) -> tuple[Cost, Cost]:
    """The cost of a job, from `saturate`, where jobs cause nearly all load, and of a worker, the rest of `scale`."""

    def cost(row: dict[str, Any]) -> Cost:
        per_job = row["per_job"]
        return Cost(per_job["redis_cpu_ms"], per_job["redis_bytes_in"], per_job["redis_bytes_out"])

    job = cost([row for row in figures["saturate"] if row["together"]][-1])
    busy, row = cost(figures["scale"][-1]), figures["scale"][-1]
    share = row["jobs_per_s"] / row["workers"]
    rest = [share * (one - other) for one, other in zip(astuple(busy), astuple(job), strict=True)]
    return job, Cost(*rest)


def paper(figures: dict[str, Any], gpus: int, rates: Sequence[float]) -> None:
    """Print what this number of GPUs needs at each rate, with jobs of 64 new tokens."""
    job, worker = costs(figures)
    row = figures["scale"][-1]
    print(f"a job: {job}\na busy worker, each second: {worker}")
    for rate in rates:
        found = needs(gpus, rate, 64, job, worker, row["connections"] / row["workers"])
        print(f"{gpus} GPUs at {rate:g} tokens/s: {found}")
